"""The three ways to decode, end to end: the same frames, in parts as they are ready, by one rank or by several."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from numpy.typing import NDArray

from pipelines import HunyuanVideoPipeline
from pipelines.faults import RankError
from pipelines.launch import LocalLauncher
from pipelines.vae_memory import hunyuan_tiled_bytes
from vae_group.decode import to_frames
from vae_group.tiles import TileSettings
from videopipe import media
from videopipe.config import ConfigError, load_config
from videopipe.geometry import VideoSpec
from videopipe.records import VideoRequest

SPEC = VideoSpec(height=64, width=48, num_frames=33)  # three tiles of time
LONG = VideoSpec(height=64, width=48, num_frames=97)  # eight
LAYOUTS = [("clip", 1, 1), ("stream", 1, 1), ("tiles", 1, 2), ("tiles", 2, 3), ("tiles", 2, 0)]


def request(index: int, steps: int = 2, spec: VideoSpec = SPEC) -> VideoRequest:
    return VideoRequest(id=f"clip{index}", prompt=f"fox {index}", spec=spec, num_inference_steps=steps, seed=index)


class Recording:
    """A consumer that notes what it is given."""

    def __init__(self, then: Callable[[str], None] | None = None) -> None:
        self.parts: dict[str, list[tuple[int, NDArray[Any]]]] = {}
        self._then = then

    def __call__(self, clip: str, first_frame: int, frames: NDArray[Any]) -> None:
        assert not frames.flags.writeable
        self.parts.setdefault(clip, []).append((first_frame, frames))
        if self._then is not None:
            self._then(clip)

    def joined(self, clip: str) -> NDArray[Any]:
        firsts = [first for first, _ in self.parts[clip]]
        lengths = [len(frames) for _, frames in self.parts[clip]]
        assert firsts == [sum(lengths[:index]) for index in range(len(lengths))]  # each frame once and in order
        return np.concatenate([frames for _, frames in self.parts[clip]])


def start(
    checkpoint: Path, launcher: LocalLauncher, mode: str, dit: int, vae: int, **more: Any
) -> HunyuanVideoPipeline:
    config = {
        "runtime": {"threads_per_rank": 1},
        "decode": {"mode": mode},
        "attention": {"co_processing": "on" if vae > 1 else "off"},
    }
    return HunyuanVideoPipeline.from_pretrained(
        checkpoint, config=config, dit_ranks=dit, vae_ranks=vae, launcher=launcher, **more
    )


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path, launcher: LocalLauncher) -> dict[int, dict[str, NDArray[Any]]]:
    """Frames as diffusers decodes whole clips, by number of DiT ranks."""
    reference = AutoencoderKLHunyuanVideo.from_pretrained(tiny_checkpoint, subfolder="vae").eval()
    frames = {}
    for dit in (1, 2):
        with start(tiny_checkpoint, launcher, "clip", dit, 1, overrides=["output.format=latent"]) as pipe:
            latents = {r.request_id: r.latents for r in pipe.render([request(i) for i in range(3)])}
        with torch.no_grad():
            videos = {clip: reference.decode(x / reference.config.scaling_factor).sample for clip, x in latents.items()}
        frames[dit] = {clip: to_frames(video).numpy() for clip, video in videos.items()}
    return frames


@pytest.fixture(params=LAYOUTS, ids=lambda p: f"{p[0]}-{p[1]}+{p[2]}", scope="module")
def pipeline(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, launcher: LocalLauncher
) -> Iterator[HunyuanVideoPipeline]:
    with start(tiny_checkpoint, launcher, *request.param) as pipe:
        yield pipe


def test_frames_equal_those_of_whole_clips_to_the_bit(
    pipeline: HunyuanVideoPipeline, expected: dict[int, dict[str, NDArray[Any]]]
) -> None:
    frames = expected[pipeline.config.groups.dit_ranks]
    consumer = Recording()
    results = {r.request_id: r for r in pipeline.render([request(i) for i in range(3)], on_frames=consumer)}
    for clip, result in results.items():
        np.testing.assert_array_equal(result.frames, frames[clip])
        np.testing.assert_array_equal(consumer.joined(clip), frames[clip])
        assert len(consumer.parts[clip]) == 3
    assert not np.array_equal(results["clip0"].frames, frames["clip1"])
    (team, *_) = pipeline.config.decode_teams
    assert {s.rank for s in results["clip0"].side_car.stages if s.stage == "decode"} == set(team)
    assert results["clip0"].side_car.plan["decode_teams"] == [list(team)]
    assert results["clip0"].side_car.plan["decoded_in"] == ["whole pictures, 16 frames at a time"]


def test_a_side_car_tells_of_smaller_tiles_than_asked_for(tiny_checkpoint: Path, launcher: LocalLauncher) -> None:
    spec = VideoSpec(height=96, width=80, num_frames=5)
    config = AutoencoderKLHunyuanVideo.load_config(tiny_checkpoint, subfolder="vae")
    tiles = TileSettings(height=64, width=64, overlap_height=16, overlap_width=16)
    limit = hunyuan_tiled_bytes(config, (2, 12, 10), tiles, 1, 4)
    with start(tiny_checkpoint, launcher, "clip", 1, 1, overrides=[f"decode.memory_limit={limit}"]) as pipe:
        (small,) = pipe.render([request(0, spec=spec)])
    with start(tiny_checkpoint, launcher, "clip", 1, 1) as pipe:
        (whole,) = pipe.render([request(0, spec=spec)])
    assert small.side_car.plan["decoded_in"] == ["tiles of 64x64 px, 16 frames at a time"]
    assert whole.side_car.plan["decoded_in"] == ["whole pictures, 16 frames at a time"]
    assert not np.array_equal(small.frames, whole.frames), "smaller tiles are other numbers"


def test_what_a_team_has_decoded_is_written(
    pipeline: HunyuanVideoPipeline, expected: dict[int, dict[str, NDArray[Any]]], tmp_path: Path
) -> None:
    results = {r.request_id: r for r in pipeline.render([request(i) for i in range(2)], save_to=tmp_path)}
    assert {file.name for file in tmp_path.iterdir()} == {"clip0.mp4", "clip0.json", "clip1.mp4", "clip1.json"}
    for clip, result in results.items():
        frames = expected[pipeline.config.groups.dit_ranks][clip]
        assert result.side_car.frames_sha256 == media.frames_hash(frames)


def test_first_frames_are_written_before_the_last_ones_are_decoded(
    tiny_checkpoint: Path, launcher: LocalLauncher, tmp_path: Path
) -> None:
    with start(tiny_checkpoint, launcher, "stream", 1, 1) as pipe:
        rank, stopped = pipe.engine.pids[1], threading.Event()

        def stop(clip: str) -> None:
            if not stopped.is_set():
                os.kill(rank, signal.SIGSTOP)
                stopped.set()

        consumer = Recording(stop)
        results = pipe.render([request(0, spec=LONG)], save_to=tmp_path, on_frames=consumer)
        assert stopped.wait(30)
        deadline = time.monotonic() + 6  # then the rank would count as lost
        while not any(s.stage == "write" for s in list(pipe.trace.spans)) and time.monotonic() < deadline:
            time.sleep(0.01)
        written_early = any(s.stage == "write" for s in list(pipe.trace.spans))
        decoded = sum(len(frames) for _, frames in consumer.parts["clip0"])
        os.kill(rank, signal.SIGCONT)
        (result,) = results
    assert written_early and decoded < LONG.num_frames
    assert media.probe(tmp_path / "clip0.mp4").num_frames == LONG.num_frames
    assert result.side_car.frames_sha256 == media.frames_hash(consumer.joined("clip0"))


def test_a_clip_that_cannot_be_written_is_noticed_while_it_is_decoded_and_its_latents_are_kept(
    tiny_checkpoint: Path, launcher: LocalLauncher, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    consumer = Recording(lambda clip: shutil.rmtree(folder, ignore_errors=True))  # before the writer opens its file
    with start(tiny_checkpoint, launcher, "tiles", 1, 2) as pipe:
        (result,) = pipe.render([request(0, spec=LONG)], save_to=folder, on_frames=consumer)
        assert result.error is not None and result.error.latents is not None and result.error.latents.exists()
        assert len(consumer.joined("clip0")) == LONG.num_frames
        (after,) = pipe.render([request(1)], save_to=tmp_path / "other")
        assert after.path is not None and after.path.exists()
        assert not list(pipe.engine._run_directory.glob("clip*"))


def test_other_kinds_of_results_come_from_teams_too(pipeline: HunyuanVideoPipeline) -> None:
    arguments = {"height": 64, "width": 48, "num_frames": 33, "num_inference_steps": 2}
    images = np.stack(pipeline("fox 0", **arguments, seed=0).frames[0])
    floats = pipeline("fox 0", **arguments, seed=0, output_type="np").frames[0]
    assert floats.dtype == np.float32
    np.testing.assert_array_equal(np.round(floats * 255).astype(np.uint8), images)
    assert pipeline("fox 0", **arguments, seed=0, output_type="latent").frames.shape == (1, 16, 9, 8, 6)


def test_a_clip_that_is_cancelled_while_it_is_decoded_leaves_nothing(pipeline: HunyuanVideoPipeline) -> None:
    cut, closed = threading.Event(), threading.Event()

    def hold(clip: str) -> None:
        if clip == "clip1" and not cut.is_set():
            cut.set()
            closed.wait(30)  # the engine hears of it after this frame, however late this thread wakes up

    consumer = Recording(hold)
    results = pipeline.render([request(i, spec=LONG) for i in range(5)], on_frames=consumer)
    assert next(results).request_id == "clip0"
    assert cut.wait(30)
    results.close()
    closed.set()
    again = {r.request_id for r in pipeline.render([request(i) for i in range(7, 10)])}
    assert again == {"clip7", "clip8", "clip9"}
    told = sum(len(frames) for _, frames in consumer.parts["clip1"])
    assert told < LONG.num_frames  # it was cancelled in the middle, and nobody was told of the rest
    deadline = time.monotonic() + 5
    while not pipeline.engine._scheduler.idle and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not list(pipeline.engine._run_directory.glob("clip*"))


@pytest.mark.parametrize(("mode", "dit", "vae"), [("clip", 1, 1), ("stream", 1, 1), ("tiles", 1, 2), ("tiles", 2, 0)])
def test_exact_frames_are_those_of_the_untiled_decode(
    tiny_checkpoint: Path, launcher: LocalLauncher, mode: str, dit: int, vae: int
) -> None:
    arguments = {"height": 64, "width": 48, "num_frames": 33, "num_inference_steps": 1, "seed": 3}
    with start(tiny_checkpoint, launcher, mode, dit, vae, overrides=["decode.exact=true"]) as pipe:
        latents = pipe("a fox", **arguments, output_type="latent").frames
        ours = torch.as_tensor(pipe("a fox", **arguments, output_type="pt").frames[0])
    reference = AutoencoderKLHunyuanVideo.from_pretrained(tiny_checkpoint, subfolder="vae").eval()
    tiled, untiled = (decode(reference, latents, in_time) for in_time in (True, False))
    assert (ours - untiled).abs().max() < 1e-5
    assert (ours - tiled).abs().max() > 1e-3  # the twin: the seams of tiles in time


@torch.no_grad()
def decode(vae: AutoencoderKLHunyuanVideo, latents: torch.Tensor, in_time: bool) -> torch.Tensor:
    """diffusers' frames [T, 3, H, W] in 0..1."""
    vae.use_framewise_decoding = in_time
    video = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    return (video[0] * 0.5 + 0.5).clamp(0, 1).transpose(0, 1)


class Order:
    """Notes stages and frames in the order in which the engine comes to know of them."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def loaded(self, rank: int, world_size: int) -> None:
        """Nothing to note."""

    def step(self, request: str, step: int, num_steps: int) -> None:
        """Nothing to note."""

    def stage(self, request: str, stage: str) -> None:
        self.events.append((request, stage))


@pytest.mark.parametrize(("num_frames", "pieces"), [(33, 3), (13, 1)])
def test_frames_leave_while_the_rest_is_decoded(
    tiny_checkpoint: Path, launcher: LocalLauncher, num_frames: int, pieces: int
) -> None:
    order = Order()
    consumer = Recording(lambda clip: order.events.append((clip, "frames")))
    spec = VideoSpec(height=64, width=48, num_frames=num_frames)
    with start(tiny_checkpoint, launcher, "stream", 1, 1, progress=order) as pipe:
        list(pipe.render([request(0, spec=spec)], on_frames=consumer))
    stages = [stage for _, stage in order.events]
    assert stages == ["encode", "denoise", "decode", *["frames"] * pieces, "done"]


@pytest.mark.parametrize(("dit", "vae", "rank"), [(1, 2, 1), (1, 2, 2), (2, 0, 1)])
def test_a_member_that_dies_in_the_middle_of_a_decode_is_named(
    tiny_checkpoint: Path, launcher: LocalLauncher, dit: int, vae: int, rank: int
) -> None:
    with start(tiny_checkpoint, launcher, "tiles", dit, vae) as pipe:
        engine = pipe.engine

        def kill(clip: str) -> None:
            if clip == "clip1" and rank in engine.pids:
                os.kill(engine.pids[rank], signal.SIGKILL)

        results = pipe.render([request(i, spec=LONG) for i in range(3)], on_frames=Recording(kill))
        assert next(results).request_id == "clip0"
        since = time.monotonic()
        with pytest.raises(RankError) as caught:
            list(results)
    assert time.monotonic() - since < 10
    error = caught.value
    assert (error.rank, error.kind, error.stage, error.request) == (rank, "killed", "decode", "clip1")


def test_lent_members_still_decode(tiny_checkpoint: Path, launcher: LocalLauncher) -> None:
    with start(tiny_checkpoint, launcher, "tiles", 2, 2) as pipe:
        assert len(list(pipe.render([request(i, steps=6) for i in range(4)]))) == 4
        spans = pipe.trace.spans
    for rank in (2, 3):
        own = sorted((s.start_ns, s.stage) for s in spans if s.rank == rank and s.stage in ("assist", "decode"))
        stages = [stage for _, stage in own]
        assert "assist" in stages[: stages.index("decode")] and "decode" in stages


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["decode.mode=tile"], "decode.mode='tile' must be one of 'clip', 'tiles', 'stream'; nearest is 'tiles'"),
        (["decode.exact=1"], "decode.exact=1 must be true or false, nearest is true"),
        (["decode.exact=true", "decode.tiling=true"], "decode.tiling=true blends tiles, which decode.exact=true is"),
        (["decode.exact=true", "decode.tile_preset=official"], "decode.tile_preset='official' blends tiles, which"),
        (["decode.exact=true", "decode.tile_width=256"], "decode.tile_width=256 means nothing to decode.exact=true"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("mode", "dit", "vae", "teams"),
    [
        ("clip", 2, 3, ((2,), (3,), (4,))),
        ("stream", 2, 3, ((2,), (3,), (4,))),
        ("tiles", 2, 3, ((2, 3, 4),)),
        ("tiles", 2, 0, ((0, 1),)),
        ("clip", 2, 0, ((0,), (1,))),
    ],
)
def test_who_decodes_with_whom(mode: str, dit: int, vae: int, teams: tuple[tuple[int, ...], ...]) -> None:
    config = load_config({"decode": {"mode": mode}, "groups": {"dit_ranks": dit, "vae_ranks": vae}})
    assert config.decode_teams == teams
