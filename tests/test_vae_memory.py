"""Peak memory by formula against a count of the real decoders' tensors, and the choice of what fits."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pipelines.decode_choices import chunks, describe, hunyuan_settings, smaller_tiles
from pipelines.decode_memory import hunyuan_within, wfvae_within
from pipelines.hunyuan_video import HunyuanVideo
from pipelines.hunyuan_video_tiles import decode_tile, hunyuan_tiled, tile_settings
from pipelines.models.wf_vae import WFVAEModel
from pipelines.vae_memory import hunyuan_tile_bytes, hunyuan_tiled_bytes, wf_vae_chunk_bytes
from tests.tiled_vae import draw_latents, join, reference, small_vae
from tools.count_ops import OpCounter
from vae_group.memory import WORKSPACE, Setting, bytes_at_hand, bytes_needed, choose, decode_within
from vae_group.retry import TeamOutOfMemoryError
from vae_group.team import Part, Team
from vae_group.tiles import TileSettings
from videopipe.config import ConfigError, DecodeConfig, load_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RELEASED_WF: dict[str, Any] = {"connect_res_layer_num": 2, "norm_type": "layernorm", "t_interpolation": "trilinear"}
SMALL_WF: dict[str, Any] = {"base_channels": 32, "decoder_energy_flow_hidden_size": 32, **RELEASED_WF}


def fake_hunyuan(**config: Any) -> Any:
    return AutoencoderKLHunyuanVideo(**config).eval()


@pytest.mark.parametrize("config", [{}, {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 2}])
@pytest.mark.parametrize("latent", [(5, 32, 32), (17, 12, 16), (1, 9, 7), (2, 4, 5)])
def test_one_tile_is_counted_to_the_byte(config: dict[str, Any], latent: tuple[int, int, int]) -> None:
    with FakeTensorMode():
        vae = fake_hunyuan(**config)
        z = torch.empty(1, 16, *latent)
        with OpCounter() as count:
            decode_tile(vae, z)
    assert hunyuan_tile_bytes(vae.config, latent, 4) == count.peak


def test_diffusers_has_more_alive_for_the_same_tile() -> None:
    with FakeTensorMode():
        vae = fake_hunyuan()
        z = torch.empty(1, 16, 5, 32, 32)
        with torch.no_grad(), OpCounter() as count:
            vae.decoder(vae.post_quant_conv(z))
    assert count.peak > 1.5 * hunyuan_tile_bytes(vae.config, (5, 32, 32), 4)


@pytest.mark.parametrize(
    ("latent", "sizes"),
    [
        ((6, 12, 9), TileSettings(height=64, width=64, frames=16, overlap_height=16, overlap_width=16)),
        ((11, 6, 5), TileSettings(spatial=False)),
        ((6, 9, 9), TileSettings(height=32, width=32, overlap_height=8, overlap_width=8, temporal=False)),
    ],
)
def test_a_tiled_decode_stays_just_below_its_formula(latent: tuple[int, int, int], sizes: TileSettings) -> None:
    with FakeTensorMode():
        vae = fake_hunyuan(block_out_channels=(16, 32, 32, 32), norm_num_groups=4)
        z = torch.empty(1, 16, *latent)
        with OpCounter() as count:
            for part in hunyuan_tiled(vae, sizes)(z, Team()):
                assert part.video.shape[4] == latent[2] * 8
    formula = hunyuan_tiled_bytes(vae.config, latent, sizes, 1, 4)
    assert 0.93 * formula <= count.peak <= formula


def test_the_count_of_computed_tensors_is_that_of_fake_ones() -> None:
    vae, latents = small_vae(), draw_latents(3, 6, 5)
    with OpCounter() as real:
        decode_tile(vae, latents)
    assert real.peak == hunyuan_tile_bytes(vae.config, (3, 6, 5), 4)


def test_memory_does_not_grow_with_the_number_of_frames() -> None:
    peaks = []
    for frames in (9, 18):
        with FakeTensorMode():
            vae = fake_hunyuan(block_out_channels=(4, 4, 8, 8), norm_num_groups=2)
            z = torch.empty(1, 16, frames, 6, 5)
            with OpCounter() as count:
                for part in hunyuan_tiled(vae)(z, Team()):
                    del part
            peaks.append(count.peak)
            with torch.no_grad(), OpCounter() as whole:
                vae.decode(z)
            peaks.append(whole.peak)
    ours, theirs = peaks[::2], peaks[1::2]
    assert ours[0] == ours[1]
    assert theirs[1] > theirs[0], "diffusers keeps all slabs until the end"


@pytest.mark.parametrize("config", [RELEASED_WF, SMALL_WF], ids=["released", "small"])
@pytest.mark.parametrize(("frames", "chunk", "rows", "cols"), [(12, 4, 22, 40), (5, 1, 11, 20)])
def test_a_stream_of_wf_vae_stays_just_below_its_formula(
    config: dict[str, Any], frames: int, chunk: int, rows: int, cols: int
) -> None:
    with FakeTensorMode():
        vae = WFVAEModel(**config).eval()
        z = torch.empty(1, 8, frames, rows, cols)
        with torch.no_grad(), OpCounter() as count:
            for video in vae.decode_stream(z, chunk):
                assert video.shape[3] == rows * 8
    assert abs(wf_vae_chunk_bytes(vae.config, (chunk, rows, cols), 4) / count.peak - 1) < 0.02


# ---- real sizes


def test_129x720x1280_fits_a_card_of_24_gb() -> None:
    config = {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "mid_block_add_attention": True,
        "temporal_compression_ratio": 4, "spatial_compression_ratio": 8,
    }  # fmt: skip
    weights, latent = 246_478_803 * 2, (33, 90, 160)
    tiled = hunyuan_tiled_bytes(config, latent, TileSettings(), 1, 2)
    official = hunyuan_tiled_bytes(config, latent, TileSettings(frames=64, overlap_frames=16), 1, 2)
    whole_pictures = hunyuan_tiled_bytes(config, latent, TileSettings(spatial=False), 1, 2)
    assert weights + bytes_needed(tiled, CUDA) < 5e9
    assert weights + bytes_needed(official, CUDA) < 24e9
    assert weights + bytes_needed(whole_pictures, CUDA) > 24e9, "without spatial tiles it would not"


# ---- the choice


def settings_of(*peaks: int) -> list[Setting]:
    def decode(latents: Tensor, team: Team, first_frame: int = 0) -> Iterator[Part]:
        yield from ()

    return [Setting(name=f"setting {i}", peak_bytes=peak, decoder=decode) for i, peak in enumerate(peaks)]


def test_the_first_that_fits_is_chosen() -> None:
    settings = settings_of(100, 60, 20)
    assert [choose(settings, room, CPU) for room in (100, 99, 60, 59, 20)] == [0, 1, 1, 2, 2]
    assert choose(settings, int(60 * (1 + WORKSPACE)), CUDA) == 1, "a GPU's kernels take memory of their own"
    with pytest.raises(ValueError, match=r"19 bytes are too few .* nearest is 20 bytes, for setting 2"):
        choose(settings, 19, CPU)


def test_room_on_the_cpu_is_the_limit() -> None:
    assert bytes_at_hand(CPU, 123, Team()) == 123
    assert bytes_at_hand(CPU, 0, Team()) > 1 << 60


def test_a_limit_leads_to_smaller_tiles_which_is_said(caplog: pytest.LogCaptureFixture) -> None:
    vae, latents = small_vae(), draw_latents(2, 13, 13)
    decode = DecodeConfig(tiling=True, tile_height=96, tile_width=96)
    wanted = hunyuan_settings(tile_settings(vae), decode, 4, 8)
    smaller = smaller_tiles(wanted, 104)[1]
    assert (smaller.height, smaller.overlap_height) == (64, 16)
    room = hunyuan_tiled_bytes(vae.config, (2, 13, 13), wanted, 1, 4)
    for limit, sizes in ((room, wanted), (room - 1, smaller)):
        limited = msgspec.structs.replace(decode, memory_limit=limit)
        parts = list(hunyuan_within(vae, limited)(latents, Team()))
        assert {part.setting for part in parts} == {describe(sizes)}
        assert torch.equal(join(parts), join(list(hunyuan_tiled(vae, sizes)(latents, Team()))))
        assert ("decoding in tiles of 64x64 px" in caplog.text) == (sizes is smaller)
    with pytest.raises(ValueError, match="too few"):
        list(hunyuan_within(vae, DecodeConfig(memory_limit=1000))(latents, Team()))


def test_without_keys_the_decode_is_the_vaes_own() -> None:
    vae, latents = small_vae(), draw_latents(6, 5, 5)
    assert torch.equal(join(list(hunyuan_within(vae, DecodeConfig())(latents, Team()))), reference(vae, latents))


def test_the_keys_become_tiles() -> None:
    own = tile_settings(small_vae())

    def tiles_of(**keys: Any) -> TileSettings:
        return hunyuan_settings(own, DecodeConfig(**keys), 4, 8)

    assert own == TileSettings(spatial=False) == tiles_of()
    assert tiles_of(tiling=True) == TileSettings()
    assert tiles_of(tile_preset="official") == TileSettings(frames=64, overlap_frames=16)
    assert tiles_of(tile_preset="largest", tiling=False) == TileSettings(spatial=False)
    assert tiles_of(tile_height=128) == TileSettings(height=128, overlap_height=32)
    assert tiles_of(tile_frames=20, tile_overlap_frames=8) == TileSettings(frames=20, overlap_frames=8, spatial=False)
    assert tiles_of(tile_frames=24).overlap_frames == 4, "a quarter, in whole latent frames"
    assert describe(tiles_of(tiling=True)) == "tiles of 256x256 px, 16 frames at a time"
    assert [t.height for t in smaller_tiles(tiles_of(tile_preset="largest"), 800)[1:]] == [768, 512, 384, 256, 192, 128, 96, 64]  # noqa: E501  # fmt: skip
    with pytest.raises(ValueError, match="tile_height=100 must be"):
        hunyuan_within(small_vae(), DecodeConfig(tile_height=100))
    with pytest.raises(ConfigError, match=r"decode\.tile_width=-8 must be at least 0"):
        load_config({"decode": {"tile_width": -8}})


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        ({"tile_height": 100}, "decode.tile_height=100 must be 8 or a multiple of 8, nearest is 104"),
        (
            {"tile_frames": 16, "tile_overlap_frames": 16},
            "decode.tile_overlap_frames=16 must be smaller than tile_",
        ),
    ],
)
def test_tiles_that_do_not_meet_are_refused_before_anything_is_loaded(decode: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        HunyuanVideo().check_config(load_config({"decode": decode}))
    assert str(error.value).startswith(message)
    HunyuanVideo().check_config(load_config({"decode": {"tile_height": 104, "tile_frames": 16}}))


def test_wf_vae_takes_the_longest_chunk_that_fits() -> None:
    assert chunks(24, DecodeConfig(), whole=False) == [4, 2, 1]
    assert chunks(24, DecodeConfig(tile_frames=48), whole=False) == [12, 6, 3, 1]
    assert chunks(7, DecodeConfig(tile_preset="largest"), whole=False) == [7, 3, 1]
    assert chunks(24, DecodeConfig(), whole=True) == [24, 12, 6, 3, 1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = WFVAEModel(**SMALL_WF).eval()
    latents = torch.randn(1, 8, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    used: list[int | None] = []

    def decoder(chunk: int | None) -> Any:
        def decode(latents: Tensor, team: Team) -> Iterator[Part]:
            used.append(chunk)
            first_frame = 0
            for video in vae.decode_stream(latents, chunk):
                yield Part(video=video, first_frame=first_frame)
                first_frame += video.shape[2]

        return decode

    with torch.no_grad():
        whole = join(list(wfvae_within(vae, DecodeConfig(), decoder)(latents, Team())))
        limit = wf_vae_chunk_bytes(vae.config, (2, 3, 4), 4)
        within = wfvae_within(vae, DecodeConfig(memory_limit=limit), decoder)
        chunked = join(list(within(latents, Team())))
    assert used == [5, 2]
    assert torch.allclose(chunked, whole, atol=1e-5)


# ---- deterministic runs


def running_out(*failing: int) -> list[Setting]:
    """Three settings that give one frame each; those named have no memory."""

    def of(i: int) -> Setting:
        def decode(latents: Tensor, team: Team, first_frame: int = 0) -> Iterator[Part]:
            if i in failing:
                raise TeamOutOfMemoryError("no memory, says the test")
            yield Part(video=torch.full((1, 3, 1, 1, 1), float(i)))

        return Setting(name=f"setting {i}", peak_bytes=(100, 60, 20)[i], decoder=decode)

    return [of(i) for i in range(3)]


def used(settings: list[Setting], limit: int, *, fixed: bool) -> list[str]:
    return [part.setting for part in decode_within(settings, torch.zeros(1), Team(), limit, fixed=fixed)]


def test_fixed_numbers_come_from_the_limit_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert used(running_out(), 0, fixed=True) == ["setting 0"]
    assert used(running_out(), 70, fixed=True) == used(running_out(), 70, fixed=False) == ["setting 1"]
    assert used(running_out(0), 0, fixed=False) == ["setting 1"], "otherwise what runs out is tried once more"
    with pytest.raises(TeamOutOfMemoryError):
        used(running_out(0), 0, fixed=True)
    with pytest.raises(TeamOutOfMemoryError):
        used(running_out(0, 1), 0, fixed=False)
    monkeypatch.setattr("vae_group.memory.bytes_at_hand", lambda device, limit, team: 50)  # of a device
    assert used(running_out(), 70, fixed=False) == ["setting 2"]
    assert used(running_out(), 70, fixed=True) == ["setting 1"]


def test_where_nothing_fits_any_more_the_least_is_tried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vae_group.memory.bytes_at_hand", lambda device, limit, team: 10)
    assert used(running_out(), 0, fixed=False) == ["setting 2"]
    assert "decoding in setting 2, which needs 0.00 GB: setting 0 would need" in caplog.text
    with pytest.raises(TeamOutOfMemoryError):
        used(running_out(2), 0, fixed=False)
    with pytest.raises(ValueError, match="19 bytes are too few"):
        used(running_out(), 19, fixed=False)
