"""Tiled decode by teams of real ranks: the bits of one rank, and out of memory in the middle."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.hunyuan_video_tiles import decode_tile, hunyuan_tiled, tile_settings
from tests.ranks import leave, run_ranks
from tests.tiled_vae import draw_latents, join, reference, small_vae
from vae_group import tiled
from vae_group.retry import TeamOutOfMemoryError, from_the_start, with_retry
from vae_group.team import Part, Team
from vae_group.tiled import TiledDecoder
from vae_group.tiles import TileSettings
from videopipe.runtime import Runtime

SMALL = {
    "tile_sample_min_height": 32, "tile_sample_min_width": 24, "tile_sample_min_num_frames": 8,
    "tile_sample_stride_height": 24, "tile_sample_stride_width": 16, "tile_sample_stride_num_frames": 4,
}  # fmt: skip
CASES = (  # latent sizes, arguments of enable_tiling, dtype; each on teams of 1 to 6
    ((5, 7, 5), SMALL, torch.float32),
    ((6, 5, 4), {}, torch.bfloat16),  # tiles in time alone: several slabs in a wave
    ((2, 1, 1), SMALL, torch.float32),  # one tile: most members decode nothing
    ((13, 3, 9), {**SMALL, "tile_sample_stride_num_frames": 8}, torch.bfloat16),  # slabs that do not overlap
)


def place(parts: list[Part], height: int) -> tuple[list[tuple[int, int]], Any]:
    """Where this member's parts begin, and its rows in a clip that is empty elsewhere, exact in float32."""
    rows = join(parts).float()
    video = torch.full((*rows.shape[:3], height, rows.shape[4]), torch.nan)
    video[:, :, :, parts[0].first_row : parts[0].first_row + rows.shape[3]] = rows
    return [(part.first_frame, part.video.shape[2]) for part in parts], video.numpy()


def decode_on_teams(runtime: Runtime, cheap: bool) -> list[list[Any]]:
    """For each case and each size of team that this rank is in: its parts."""
    groups = [dist.new_group(list(range(n))) for n in range(1, runtime.world_size + 1)]
    results: list[list[Any]] = []
    for shape, tiling, dtype in CASES if cheap else CASES[:2]:
        vae = small_vae(dtype=dtype, cheap=cheap, **tiling)
        results.append([])
        for members in range(runtime.rank + 1, runtime.world_size + 1):
            group = groups[members - 1] if members > 1 else None
            decoder = TiledDecoder(lambda z, vae=vae: vae.decoder(vae.post_quant_conv(z)), tile_settings(vae), 4, 8)
            if not cheap:
                decoder = hunyuan_tiled(vae)
            team = Team(group=group, member=runtime.rank, members=members)
            parts = list(decoder(draw_latents(*shape, dtype=dtype), team))
            results[-1].append(place(parts, shape[1] * 8))
    leave(runtime)
    return results


@pytest.mark.parametrize(("cheap", "world_size"), [(True, 6), (False, 2)])
def test_teams_give_the_bits_of_one_rank_and_of_diffusers(cheap: bool, world_size: int) -> None:
    results = run_ranks(decode_on_teams, world_size, cheap)
    for i, (shape, tiling, dtype) in enumerate(CASES if cheap else CASES[:2]):
        expected = reference(small_vae(dtype=dtype, cheap=cheap, **tiling), draw_latents(*shape, dtype=dtype)).float()
        for members in range(1, world_size + 1):
            mine = [results[member][i][members - member - 1] for member in range(members)]
            steps = [where for where, _ in mine]
            assert all(step == steps[0] for step in steps), "members are in step"
            video = np.nanmax(np.stack([rows for _, rows in mine]), axis=0)
            counts = sum(~np.isnan(rows) for _, rows in mine)
            assert (counts == 1).all(), "the parts cover the clip once"
            assert np.array_equal(video, expected.numpy()), (shape, members)


def decode_without_exchange_of_edges(runtime: Runtime) -> Any:
    """Members that put zeros where other members' tiles reach into their rows."""
    vae = small_vae(cheap=True, **SMALL)

    class Forgetful(tiled.SlabExchange):
        def _exchange(self) -> None:
            super()._exchange()
            for (r, c), piece in self._pieces.items():
                if (r + c) % 2:
                    self._pieces[r, c] = torch.zeros_like(piece)

    tiled.SlabExchange = Forgetful  # type: ignore[misc]
    decoder = TiledDecoder(lambda z: vae.decoder(vae.post_quant_conv(z)), tile_settings(vae), 4, 8)
    team = Team(group=dist.group.WORLD, member=runtime.rank, members=runtime.world_size)
    result = place(list(decoder(draw_latents(5, 7, 5), team)), 56)[1]
    leave(runtime)
    return result


def test_tiles_of_others_matter() -> None:
    rows = run_ranks(decode_without_exchange_of_edges, 2)
    expected = reference(small_vae(cheap=True, **SMALL), draw_latents(5, 7, 5)).numpy()
    assert not np.allclose(np.nanmax(np.stack(rows), axis=0), expected, atol=1e-2)


# ---- out of memory


class RunsOut:
    """Decodes tiles until it has decoded so many, then has no memory."""

    def __init__(self, vae: Any, tiles: float) -> None:
        self.vae = vae
        self.left = tiles

    def __call__(self, z: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise torch.OutOfMemoryError("no memory, says the test")
        return decode_tile(self.vae, z)


def retrying(vae: Any, tiles: float, then: float = float("inf")) -> Any:
    """Tiles of 32x24 px for so many tiles, then of 16x16 px."""
    wanted = tile_settings(vae)
    smaller = TileSettings(height=16, width=16, frames=8, overlap_height=8, overlap_width=8, overlap_frames=4)
    first = TiledDecoder(RunsOut(vae, tiles), wanted, 4, 8)
    return with_retry(first, TiledDecoder(RunsOut(vae, then), smaller, 4, 8), "smaller tiles"), smaller


def test_out_of_memory_goes_on_with_smaller_tiles_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    vae, latents = small_vae(**SMALL), draw_latents(5, 5, 4)
    slab = 4  # tiles in a slab
    whole = join(list(hunyuan_tiled(vae)(latents, Team())))
    for tiles, frames in ((slab + 1, 5), (0, 0)):
        decoder, smaller = retrying(vae, tiles)
        got = join(list(decoder(latents, Team())))
        rest = join(list(hunyuan_tiled(vae, smaller)(latents, Team())))
        assert torch.equal(got[:, :, :frames], whole[:, :, :frames])
        assert torch.equal(got[:, :, frames:], rest[:, :, frames:])
        assert f"from frame {frames} on, smaller tiles" in caplog.text
    decoder, _ = retrying(vae, slab + 1)
    assert not torch.equal(join(list(decoder(latents, Team()))), whole), "smaller tiles are other numbers"


def test_out_of_memory_twice_is_an_error() -> None:
    decoder, _ = retrying(small_vae(**SMALL), 0, then=0)
    with pytest.raises(TeamOutOfMemoryError, match="1 of 1 ranks ran out of memory"):
        list(decoder(draw_latents(3, 5, 4), Team()))


def decode_where_one_runs_out(runtime: Runtime) -> tuple[Any, int]:
    vae = small_vae(**SMALL)
    decoder, _ = retrying(vae, 2 if runtime.rank == 1 else float("inf"))
    team = Team(group=dist.group.WORLD, member=runtime.rank, members=runtime.world_size)
    steps, video = place(list(decoder(draw_latents(7, 5, 4), team)), 40)
    leave(runtime)
    return video, len(steps)


def test_a_team_restarts_together_when_one_member_runs_out() -> None:
    results = run_ranks(decode_where_one_runs_out, 3)
    vae, latents = small_vae(**SMALL), draw_latents(7, 5, 4)
    _, smaller = retrying(vae, 0)
    whole, rest = (join(list(hunyuan_tiled(vae, s)(latents, Team()))) for s in (None, smaller))
    got = torch.from_numpy(np.nanmax(np.stack([video for video, _ in results]), axis=0))
    assert len({steps for _, steps in results}) == 1
    same = [torch.equal(got[:, :, f], whole[:, :, f]) for f in range(got.shape[2])]
    switch = same.index(False)
    assert 0 < switch < got.shape[2]
    assert torch.equal(got[:, :, switch:], rest[:, :, switch:])


def test_a_decoder_that_cannot_restart_begins_again() -> None:
    def in_pieces(count: int, fails_at: int) -> Any:
        def decode(latents: Tensor, team: Team) -> Iterator[Part]:
            for i in range(0, latents.shape[2], count):
                if i == fails_at:
                    raise torch.OutOfMemoryError("no memory, says the test")
                yield Part(video=latents[:, :, i : i + count], first_frame=i)

        return from_the_start(decode)

    latents = torch.arange(10.0).view(1, 1, 10, 1, 1)
    decoder = with_retry(in_pieces(4, 8), in_pieces(3, -1), "fewer frames")
    parts = list(decoder(latents, Team()))
    assert [(part.first_frame, part.video.shape[2]) for part in parts] == [(0, 4), (4, 4), (8, 1), (9, 1)]
    assert torch.equal(join(parts), latents)
