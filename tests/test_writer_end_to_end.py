"""Batches that are rendered into a folder: files by a writer process, latents kept where a file cannot be written."""

import contextlib
import os
import select
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
import torch

from pipelines import HunyuanVideoPipeline, cli
from pipelines.batch import Batch, Job
from pipelines.cli_errors import CommandError
from pipelines.cli_render import gather_requests, render_all, resolve_config
from pipelines.delivery import Deliveries
from pipelines.faults import RankError
from pipelines.launch import LocalLauncher
from videopipe import media
from videopipe.config import Config, OutputConfig
from videopipe.geometry import VideoSpec
from videopipe.messages import EndDelivery, LatentsReturned
from videopipe.records import SideCar, VideoRequest
from videopipe.rendering import RenderResult, WriteError
from videopipe.trace import ENGINE_RANK

SPEC = VideoSpec(height=32, width=48, num_frames=9, fps=12)
ONE_THREAD = {"runtime": {"threads_per_rank": 1}}


def requests(name: str, count: int) -> list[VideoRequest]:
    return [
        VideoRequest(id=f"{name}-{index}", prompt="a fox", spec=SPEC, num_inference_steps=1, seed=index)
        for index in range(count)
    ]


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path, launcher: LocalLauncher) -> Iterator[HunyuanVideoPipeline]:
    with HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, config=ONE_THREAD, launcher=launcher) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def expected(pipe: HunyuanVideoPipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four clips saved in this process."""
    folder = tmp_path_factory.mktemp("expected")
    return {result.request_id: result.save_to(folder) for result in pipe.render(requests("a", 4))}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def clip_files(*ids: str) -> set[str]:
    return {f"{name}.{end}" for name in ids for end in ("mp4", "json")}


def frames_sha256(clip: Path) -> str | None:
    return media.read_side_car(clip.with_name(clip.stem + ".json")).frames_sha256


def shared_memory(pipe: HunyuanVideoPipeline) -> list[Path]:
    """Files of clips that are decoded and not written."""
    files = pipe.engine._run_directory.glob("*.frames")
    return [file for file in files if not file.with_suffix(".decoding").exists()]


def test_clips_rendered_into_a_folder_are_those_saved_in_process(
    pipe: HunyuanVideoPipeline, expected: dict[str, Path], tmp_path: Path
) -> None:
    results = {r.request_id: r for r in pipe.render(requests("a", 4), save_to=tmp_path / "new" / "out")}
    out = tmp_path / "new" / "out"
    assert names(out) == clip_files(*expected)
    for name, clip in expected.items():
        result = results[name]
        assert result.path == out / f"{name}.mp4" and result.frames is None and result.error is None
        assert result.path.read_bytes() == clip.read_bytes()
        assert frames_sha256(result.path) == frames_sha256(clip)
        assert media.read_side_car(out / f"{name}.json") == result.side_car
        stages = [(stage.stage, stage.rank) for stage in result.side_car.stages]
        assert {("denoise", 0), ("decode", 1)} <= set(stages) and stages[-1] == ("write", ENGINE_RANK)
        with pytest.raises(ValueError, match="already, its frames are not here"):
            result.save(tmp_path / "again.mp4")
    assert frames_sha256(expected["a-0"]) != frames_sha256(expected["a-1"])  # the twin: other clips have other hashes
    assert not shared_memory(pipe)


def test_latents_rendered_into_a_folder(tiny_checkpoint: Path, launcher: LocalLauncher, tmp_path: Path) -> None:
    config = {**ONE_THREAD, "output": {"format": "latent"}}
    with HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, config=config, launcher=launcher) as pipe:
        (result,) = pipe.render(requests("a", 1), save_to=tmp_path)
        assert not pipe.engine.writer_pids  # they are small
    assert result.path == tmp_path / "a-0.safetensors"
    assert torch.equal(media.read_latents(result.path)[0], result.latents)
    assert media.read_side_car(tmp_path / "a-0.json") == result.side_car


def test_sizes_that_no_file_can_hold_are_refused_before_anything_is_rendered(
    pipe: HunyuanVideoPipeline, tmp_path: Path
) -> None:
    slow = msgspec.structs.replace(SPEC, fps=0.0)
    bad = [msgspec.structs.replace(request, spec=slow) for request in requests("a", 1)]
    with pytest.raises(ValueError, match="fps=0"):
        pipe.render(bad, save_to=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- a slow disk ------------------------------------------------------------------------------------------------------


def test_a_slow_disk_holds_the_groups_back_and_loses_nothing(
    tiny_checkpoint: Path, launcher: LocalLauncher, tmp_path: Path
) -> None:
    overrides = ["queue.capacity=1", "queue.max_undelivered=2", "runtime.threads_per_rank=1"]
    overrides.append("faults.heartbeat_timeout_s=60")  # nothing but slow
    with HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, launcher=launcher, overrides=overrides) as pipe:
        list(pipe.render(requests("first", 1), save_to=tmp_path))
        (writer,) = pipe.engine.writer_pids
        before = len(pipe.trace.spans)
        os.kill(writer, signal.SIGSTOP)
        results = pipe.render(requests("a", 8), save_to=tmp_path)
        while len(shared_memory(pipe)) < 2:
            time.sleep(0.01)
        threading.Event().wait(1.5)  # the groups must come to rest
        decoded = {s.request for s in pipe.trace.spans[before:] if s.stage == "decode"}
        most = len(shared_memory(pipe))
        os.kill(writer, signal.SIGCONT)
        assert decoded == {"a-0", "a-1"} and most == 2
        assert len(list(results)) == 8
        assert pipe.engine.writer_pids == [writer]
    assert names(tmp_path) == clip_files("first-0", *(f"a-{index}" for index in range(8)))


def test_leaving_early_cancels_the_rest(pipe: HunyuanVideoPipeline, tmp_path: Path) -> None:
    results = pipe.render(requests("left", 12), save_to=tmp_path)
    first = next(results)
    results.close()
    assert first.path is not None and first.path.exists()
    assert len(list(pipe.render(requests("next", 6), save_to=tmp_path))) == 6  # nothing is held back
    assert len(names(tmp_path)) < 2 * (12 + 6)
    assert not any(name.startswith(".") for name in names(tmp_path)) and not shared_memory(pipe)


# -- what cannot be written -------------------------------------------------------------------------------------------


@pytest.fixture
def failed(pipe: HunyuanVideoPipeline, tmp_path: Path) -> RenderResult:
    """One clip of three cannot be written, since its name is a folder's."""
    (tmp_path / "out" / "a-1.mp4").mkdir(parents=True)
    results = {r.request_id: r for r in pipe.render(requests("a", 3), save_to=tmp_path / "out")}
    assert [results[f"a-{index}"].path is None for index in range(3)] == [False, True, False]
    return results["a-1"]


def test_one_clip_that_cannot_be_written_stops_no_other_and_keeps_its_latents(
    pipe: HunyuanVideoPipeline, failed: RenderResult, expected: dict[str, Path], tmp_path: Path
) -> None:
    out, error = tmp_path / "out", failed.error
    kept = out / "a-1.rescued.safetensors"
    assert isinstance(error, WriteError) and error.latents == kept
    assert str(error) == (
        f"{out}/a-1.mp4 could not be written: Is a directory after 9 frames; its latents are kept in {kept}, "
        f"to decode them: videopipe decode {kept} -o {out}"
    )
    rescued = {kept.name, "a-1.rescued.json"}
    assert names(out) == clip_files("a-0", "a-2") | {"a-1.mp4"} | rescued
    assert torch.equal(media.read_latents(kept)[0], failed.latents)
    assert not shared_memory(pipe)
    assert (out / "a-0.mp4").read_bytes() == expected["a-0"].read_bytes()


def test_the_command_of_the_error_makes_the_same_clip(
    failed: RenderResult, expected: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failed.error is not None and failed.error.command is not None
    (tmp_path / "out" / "a-1.mp4").rmdir()
    program, *arguments = shlex.split(failed.error.command)
    assert program == "videopipe" and cli.run(arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'a-1.mp4'}\n"
    assert (tmp_path / "out" / "a-1.mp4").read_bytes() == expected["a-1"].read_bytes()
    assert frames_sha256(tmp_path / "out" / "a-1.mp4") == frames_sha256(expected["a-1"])
    side_car = media.read_side_car(tmp_path / "out" / "a-1.json")
    assert (side_car.format, side_car.output, side_car.latents_sha256) == ("mp4", "a-1.mp4", None)
    assert cli.run([*arguments, "--output-format=npy"]) == 0
    assert np.load(tmp_path / "out" / "a-1.npy").shape == (9, 32, 48, 3)
    capsys.readouterr()
    assert cli.run([*arguments, "--set=decode.memory_limit=1000"]) == 2
    assert "decode.memory_limit=1000 bytes are too few to decode 'a-1', 9 frames of 32x48 px" in capsys.readouterr().err


def test_latents_that_are_not_those_of_their_side_car_are_refused(
    failed: RenderResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    media.write_latents(failed.latents + 1, tmp_path / "out" / "a-1.rescued", {})
    assert cli.run(["decode", str(tmp_path / "out" / "a-1.rescued.safetensors"), "-o", str(tmp_path / "x")]) == 2
    assert "not the latents that its side-car tells of, their hash differs" in capsys.readouterr().err
    assert cli.run(["decode", str(tmp_path / "none.safetensors"), "-o", str(tmp_path / "x")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_the_cli_reports_a_clip_that_could_not_be_written_and_ends_with_1(
    tiny_checkpoint: Path, launcher: LocalLauncher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "a fox", "id": "{name}"}}\n' for name in "abc"))
    flags = {"model.weights": str(tiny_checkpoint), "request.height": 32, "request.width": 48}
    flags |= {"request.num_frames": 9, "request.num_inference_steps": 1}
    config = resolve_config(None, (), flags)
    (tmp_path / "out" / "b.mp4").mkdir(parents=True)
    todo = gather_requests(config, None, None, prompts, None)
    with pytest.raises(CommandError, match=r"^2 of 3 clips are finished in .*out, the others could not be") as caught:
        render_all(config, todo, tmp_path / "out", quiet=True, launcher=launcher)
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    assert sorted(out.split()) == [str(tmp_path / "out" / f"{name}.mp4") for name in "ac"]
    assert err.startswith(f"videopipe: {tmp_path}/out/b.mp4 could not be written: Is a directory") and "decode" in err


class Told:
    """Deliveries without an engine: what they send and tell."""

    def __init__(self, folder: Path) -> None:
        self.sent: list[tuple[int, object]] = []
        self.delivered: list[str] = []
        self.deliveries = Deliveries(
            Config(output=OutputConfig(format="npy")),  # which opens its file at once
            send=lambda rank, message: self.sent.append((rank, message)),
            delivered=self.delivered.append,
            note_spans=lambda spans: None,
        )
        self.job = Job(request=requests("a", 1)[0], save_to=folder)
        self.batch = Batch(lambda what, argument: None, [self.job])
        self.memory = folder.parent / "frames"
        self.memory.write_bytes(bytes(9 * 32 * 48 * 3))
        self.deliveries.begin(self.job, self.batch, 7, self.memory, (9, 32, 48, 3))

    def look_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            select.select([self.deliveries.fileno()], [], [], 0.05)
            self.deliveries.look(time.monotonic())

    def close(self) -> None:
        self.deliveries.close()
        assert not self.memory.exists()


def test_a_clip_that_fails_while_it_is_being_decoded_is_told_when_it_has_been(tmp_path: Path) -> None:
    told = Told(tmp_path / "not-there")
    with contextlib.closing(told):
        told.deliveries.add("a-0", range(4))
        told.look_until(lambda: not told.memory.exists())
        told.deliveries.add("a-0", range(4, 9))
        assert not told.sent and not told.delivered  # the scheduler still has it decoded
        told.deliveries.end("a-0", expected_side_car(told.job.request))
        assert told.sent == [(7, EndDelivery(request="a-0", return_latents=True))] and not told.delivered
        latents = np.arange(6, dtype=np.float32).reshape(1, 1, 1, 2, 3)
        told.deliveries.returned(LatentsReturned(request="a-0", shape=latents.shape), latents.tobytes())
        (finished,) = told.batch
    assert told.delivered == ["a-0"]
    assert np.array_equal(finished.array, latents)
    assert finished.failure is not None and finished.failure.cause.startswith("No such file or directory")


def test_a_clip_that_is_cancelled_while_it_is_being_decoded_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    told = Told(tmp_path / "out")
    with contextlib.closing(told):
        told.deliveries.add("a-0", range(4))
        told.look_until(lambda: names(tmp_path / "out"))
        told.deliveries.cancel("a-0", Batch(lambda what, argument: None, []))  # another batch with the same id
        assert not told.sent
        told.deliveries.cancel("a-0", told.batch)
        assert told.sent == [(7, EndDelivery(request="a-0"))] and not told.delivered
        told.look_until(lambda: not names(tmp_path / "out"))


def expected_side_car(request: VideoRequest) -> SideCar:
    return SideCar(
        request=request,
        output="",
        format="mp4",
        frames_sha256=None,
        versions={},
        plan={},
        config={},
        stages=(),
        queue_wait_s=0.0,
        total_s=0.0,
        peak_memory_bytes={},
        finished_at="",
    )


def can_mount() -> bool:
    return os.geteuid() == 0 and shutil.which("mount") is not None


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if not can_mount() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("room_for_latents", [True, False])
def test_a_full_disk_keeps_the_latents(
    tiny_checkpoint: Path,
    launcher: LocalLauncher,
    expected: dict[str, Path],
    full_disk: Path,
    tmp_path: Path,
    room_for_latents: bool,
) -> None:
    spare = tmp_path / "spare"
    config = {**ONE_THREAD, "output": {"format": "npy", "rescue_directory": str(spare)}}
    free = 32_768 if room_for_latents else 4096  # a clip has 41 kB, its latents 18 kB
    (full_disk / "ballast").write_bytes(bytes(131_072 - free - 4096))
    with HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, config=config, launcher=launcher) as pipe:
        (result,) = pipe.render(requests("a", 1), save_to=full_disk)
        error = result.error
        assert error is not None and error.path == full_disk / "a-0.npy" and result.path is None
        assert error.cause.startswith("No space left on device after ")
        assert error.latents is not None and torch.equal(media.read_latents(error.latents)[0], result.latents)
        assert (error.latents.parent == full_disk) == room_for_latents
        assert error.latents.is_relative_to(spare) != room_for_latents
        assert not [name for name in names(full_disk) if name.startswith(".") or name.endswith(".npy")]
        (full_disk / "ballast").unlink()
        (again,) = pipe.render(requests("b", 1), save_to=full_disk)  # the pipeline goes on
        assert again.path == full_disk / "b-0.npy"
    assert cli.run(["decode", str(error.latents), "-o", str(tmp_path / "out")]) == 0
    assert frames_sha256(tmp_path / "out" / "a-0.npy") == frames_sha256(expected["a-0"])


def test_latents_that_can_be_kept_nowhere_are_told_and_stay_with_the_result(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = OutputConfig(rescue_directory=str(tmp_path / "file"))
    latents = torch.zeros(1, 4, 2, 4, 4)
    result = RenderResult(request_id="a", frames=None, latents=latents, side_car=None, output=output)  # type: ignore[arg-type]
    rescued = result.rescued(tmp_path / "file" / "a.mp4", "No space left on device")
    assert rescued.error is not None and rescued.error.latents is None and rescued.latents is latents
    assert "its latents are only in memory" in str(rescued.error) and "File exists" in str(rescued.error)


# -- death ------------------------------------------------------------------------------------------------------------


def test_a_killed_writer_loses_no_clip(pipe: HunyuanVideoPipeline, expected: dict[str, Path], tmp_path: Path) -> None:
    list(pipe.render(requests("first", 1), save_to=tmp_path))
    (writer,) = pipe.engine.writer_pids
    results = pipe.render(requests("a", 4), save_to=tmp_path)
    os.kill(writer, signal.SIGSTOP)  # so that it dies with clips in its hands
    while not shared_memory(pipe):
        time.sleep(0.01)
    os.kill(writer, signal.SIGKILL)
    assert all(r.error is None for r in results)
    assert pipe.engine.writer_pids != [writer]
    assert names(tmp_path) == clip_files("first-0", *expected)
    for name, clip in expected.items():
        assert (tmp_path / f"{name}.mp4").read_bytes() == clip.read_bytes()


def test_clips_that_a_writer_has_outlive_a_lost_rank(
    tiny_checkpoint: Path, launcher: LocalLauncher, tmp_path: Path
) -> None:
    with HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, config=ONE_THREAD, launcher=launcher) as pipe:
        list(pipe.render(requests("first", 1), save_to=tmp_path))
        (writer,) = pipe.engine.writer_pids
        os.kill(writer, signal.SIGSTOP)
        results = pipe.render(requests("a", 40), save_to=tmp_path)
        while len(shared_memory(pipe)) < 2:
            time.sleep(0.01)
        os.kill(pipe.engine.pids[0], signal.SIGKILL)
        timer = threading.Timer(1.5, os.kill, (writer, signal.SIGCONT))
        timer.start()
        finished = []
        with pytest.raises(RankError, match="was killed by SIGKILL"):
            finished.extend(result.request_id for result in results)
        timer.join()
    assert len(finished) >= 2 and names(tmp_path) == clip_files("first-0", *finished)
    assert not psutil.pid_exists(writer)


def test_closing_in_the_middle_leaves_nothing(tiny_checkpoint: Path, launcher: LocalLauncher, tmp_path: Path) -> None:
    with HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, config=ONE_THREAD, launcher=launcher) as pipe:
        results = pipe.render(requests("a", 40), save_to=tmp_path)
        first = next(results)
        pids = [*pipe.engine.pids.values(), *pipe.engine.writer_pids]
        assert len(pids) == 3
        directory = pipe.engine._run_directory
        pipe.close()
        with pytest.raises(RuntimeError, match="closed"):
            list(results)
    assert not any(psutil.pid_exists(pid) for pid in pids) and not directory.exists()
    assert first.path is not None and first.path.exists()
    assert not [name for name in names(tmp_path) if name.startswith(".")]
