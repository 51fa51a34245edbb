"""A clip that the decoding ranks have no memory for is refused when it is submitted, and the others go on."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo

from pipelines import HunyuanVideoPipeline
from pipelines.decode_choices import Choice, Latent
from pipelines.decode_room import DecodeRoom
from pipelines.families import load_family
from pipelines.hunyuan_video import HunyuanVideo
from pipelines.launch import LocalLauncher
from pipelines.open_sora_plan_family import GEOMETRY
from tests.test_hunyuan_exact_plan import RELEASED
from vae_group.memory import bytes_needed
from vae_group.tiles import TileSettings
from videopipe.config import load_config
from videopipe.geometry import VideoSpec
from videopipe.records import VideoRequest

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HUNYUAN = RELEASED | {"tiles": asdict(TileSettings(spatial=False))}
WF_VAE = {
    "base_channels": 128, "connect_res_layer_num": 2, "decoder_energy_flow_hidden_size": 128,
    "decoder_num_resblocks": 2, "latent_dim": 8, "norm_type": "layernorm",
}  # fmt: skip


def request(frames: int = 129, height: int = 720, width: int = 1280) -> VideoRequest:
    spec = VideoSpec(height=height, width=width, num_frames=frames)
    return VideoRequest(id="fox", prompt="", spec=spec, num_inference_steps=1)


def room_of(*rooms: float, family: str = "hunyuan-video", device: torch.device = CUDA, **decode: Any) -> DecodeRoom:
    """Of decoding ranks 1, 2, ... with so many bytes free."""
    mode = decode.pop("schedule", "fast")
    config = load_config(
        {"model": {"family": family, "dtype": "bfloat16"}, "decode": decode, "schedule": {"mode": mode},
         "groups": {"vae_ranks": len(rooms)}}
    )  # fmt: skip
    osp = family == "open-sora-plan"
    vae, members = WF_VAE if osp else HUNYUAN, len(config.decode_teams[0])
    choices = partial(load_family(family).decode_choices, vae, config, members)
    geometry = GEOMETRY if osp else HunyuanVideo.published.facts.geometry
    return DecodeRoom(config, geometry, choices, {i + 1: int(room) for i, room in enumerate(rooms)}, device)


@pytest.mark.parametrize(
    ("room", "decode"),
    [
        (22e9, {}),  # without spatial tiles it does not fit: smaller ones are taken
        (4e9, {"tiling": True}),
        (75e9, {"exact": True}),
        (20e9, {"exact": True}),
        (9e9, {"family": "open-sora-plan"}),
    ],
)
def test_what_some_setting_fits_is_taken(room: float, decode: dict[str, Any]) -> None:
    room_of(room, **decode).check(request())


def test_the_rank_with_the_least_memory_counts() -> None:
    room_of(48e9, 48e9, exact=True).check(request())
    with pytest.raises(ValueError, match=r"rank 2 has 12000000000; nearest is num_frames=\d+"):
        room_of(48e9, 12e9, exact=True).check(request())


def nearest(error: ValueError) -> dict[str, int]:
    """What an error names as valid."""
    words = str(error).rsplit("nearest is ", 1)[1].split()
    return {name: int(value) for name, value in (word.split("=") for word in words)}


@pytest.mark.parametrize("room", [14e9, 11e9])
def test_the_nearest_length_fits_and_the_next_longer_one_does_not(room: float) -> None:
    ranks = room_of(room, exact=True)
    with pytest.raises(ValueError, match=r"requests\[3\]\.num_frames=129 at height=720 width=1280 cannot") as error:
        ranks.check(request(), "requests[3].")
    frames = nearest(error.value)["num_frames"]
    assert 1 <= frames < 129
    ranks.check(request(frames))
    with pytest.raises(ValueError, match=f"nearest is num_frames={frames}$"):
        ranks.check(request(frames + 4))


def test_where_not_even_one_frame_fits_the_nearest_size_is_named() -> None:
    ranks = room_of(3e8, exact=True)
    with pytest.raises(ValueError) as error:
        ranks.check(request(33))
    size = nearest(error.value)
    ranks.check(request(33, **size))
    assert 0 < size["height"] < 720 and size["height"] % 16 == size["width"] % 16 == 0
    with pytest.raises(ValueError, match=r"nearest is a device with \d+ bytes free"):
        room_of(1000, exact=True).check(request())


def test_a_limit_that_is_too_low_is_named_with_the_least_that_will_do() -> None:
    limited = room_of(24e9, exact=True, memory_limit=10**9)
    with pytest.raises(ValueError, match=r"decode\.memory_limit=1000000000 bytes are too few to decode 'fox'") as error:
        limited.check(request(33))
    need = int(str(error.value).split("nearest is ")[1].split(",")[0])
    room_of(24e9, exact=True, memory_limit=need).check(request(33))
    with pytest.raises(ValueError, match=f"nearest is {need}, for exact"):
        room_of(24e9, exact=True, memory_limit=need - 1).check(request(33))


def test_deterministic_runs_take_what_the_configuration_says_whatever_is_free() -> None:
    wanted = room_of(22e9, tiling=True, tile_preset="official", schedule="deterministic")
    wanted.check(request())
    with pytest.raises(ValueError, match=r"decode\.memory_limit=0 allows for whole pictures.*nearest is 22000000000"):
        room_of(22e9, schedule="deterministic").check(request())
    room_of(22e9, schedule="deterministic", memory_limit=22 * 10**9).check(request())
    with pytest.raises(ValueError, match="cannot be decoded"):
        room_of(1000, schedule="deterministic").check(request())


def test_a_cpu_has_no_kernels_that_take_memory_of_their_own() -> None:
    config = load_config({"model": {"dtype": "bfloat16"}})
    (first, *_) = load_family("hunyuan-video").decode_choices(HUNYUAN, config, 1, (33, 90, 160))
    room = first.peak_bytes
    assert bytes_needed(room, CUDA) > room
    fixed = {"schedule": "deterministic"}
    room_of(room, device=CPU, **fixed).check(request())
    with pytest.raises(ValueError, match="nearest is"):
        room_of(room, device=CUDA, **fixed).check(request())


def test_sizes_that_fit_are_not_counted_again() -> None:
    counted = []

    def choices(latent: Latent) -> Iterator[Choice[int]]:
        counted.append(latent)
        yield Choice(name="", peak_bytes=sum(latent), how=1)

    room = DecodeRoom(load_config({}), GEOMETRY, choices, {1: 1000}, CPU)
    for frames in (9, 9, 13, 9):
        room.check(request(frames))
    assert counted == [(3, 90, 160), (4, 90, 160)]


# ---- with ranks

SMALL, LARGE = VideoSpec(height=64, width=48, num_frames=9), VideoSpec(height=64, width=48, num_frames=33)


def clip(name: str, spec: VideoSpec, steps: int = 1) -> VideoRequest:
    return VideoRequest(id=name, prompt="a fox", spec=spec, num_inference_steps=steps)


@pytest.mark.parametrize(("mode", "vae"), [("clip", 1), ("tiles", 2)])
def test_a_clip_without_room_is_refused_and_the_others_go_on(
    tiny_checkpoint: Path, launcher: LocalLauncher, tmp_path: Path, mode: str, vae: int
) -> None:
    config = {"decode": {"exact": True, "mode": mode}, "groups": {"vae_ranks": vae}, "runtime": {"threads_per_rank": 1}}
    facts = AutoencoderKLHunyuanVideo.load_config(tiny_checkpoint, subfolder="vae")
    (*_, last) = HunyuanVideo().decode_choices(facts, load_config(config), vae, (3, 8, 6))
    limit = f"decode.memory_limit={last.peak_bytes}"
    with HunyuanVideoPipeline.from_pretrained(
        tiny_checkpoint, config=config, overrides=[limit], launcher=launcher
    ) as pipe:
        told = pipe.engine._decoders
        assert set(told) == set(range(1, 1 + vae)) and all(decoder.room_bytes > 1 << 60 for decoder in told.values())
        going_on = pipe.render([clip(f"small{i}", SMALL, steps=4) for i in range(2)])
        first = next(going_on)
        for large in ([clip("large", LARGE)], [clip("good", SMALL), clip("large", LARGE)]):
            with pytest.raises(ValueError, match=r"decode\.memory_limit=\d+ bytes are too few to decode 'large'"):
                pipe.render(large)
        (second,) = going_on
        assert [r.side_car.plan["decoded_in"] for r in (first, second)] == [[last.name]] * 2
        assert {r.request_id for r in pipe.render([clip("good", SMALL)], save_to=tmp_path)} == {"good"}
        latents = pipe("a fox", height=64, width=48, num_frames=33, num_inference_steps=1, output_type="latent")
        assert latents.frames.shape == (1, 16, 9, 8, 6), "latents are not decoded"
