"""The benchmark of decodes: what it counts without computing, and one measurement at a tiny size."""

from collections import Counter

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.tiled_vae import draw_latents, small_vae
from tools.bench_vae import Unblended, count, diffusers_tiles, latent_of, latent_size, measure, plain, team_table
from vae_group.tiles import TileSettings, tile_grid

TILES = TileSettings(height=32, width=32, frames=8, overlap_height=8, overlap_width=8, overlap_frames=4)


def test_diffusers_counted_with_a_stand_in_is_diffusers_counted() -> None:
    with FakeTensorMode():
        config = {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 2, "layers_per_block": 1}
        vae = Unblended(**config).eval()
        z, size = torch.empty(1, 16, 5, 6, 5), (5, 6, 5)
        vae.enable_tiling(32, 32, 8, 24, 24, 4)
        whole = count(lambda: vae.decode(z))
        grid = tile_grid(size, TILES, 4, 8)
        sizes = Counter(latent_of(grid, place) for place in grid.places(range(len(grid.frames))))
        one = {size: count(lambda size=size: plain(vae, torch.empty(1, 16, *size))) for size in sizes}  # type: ignore[misc]
        done, peak = diffusers_tiles(vae, z, TILES, {size: c.peak for size, c in one.items()})
    assert done - sizes == Counter({(1, 4, 4): 1, (1, 4, 2): 1, (1, 3, 4): 1, (1, 3, 2): 1}), "a slab that it drops"
    assert abs(peak / whole.peak - 1) < 0.05
    flops = sum(n * one[size].flops for size, n in sizes.items())
    assert 0.8 * whole.flops < flops < whole.flops


def test_sizes_and_teams() -> None:
    assert latent_size("129x720x1280") == (33, 90, 160)
    lines = list(team_table("129x720x1280", TileSettings()))
    busy = [[int(cell.strip(" %")) for cell in line.split("|") if "%" in cell] for line in lines]
    assert all(ours >= 95 for ours, _ in busy)
    assert busy[-1][1] < 50, "4 rows of tiles do not occupy 8 members"


def test_both_are_measured_on_the_same_latents() -> None:
    vae = small_vae()
    vae.enable_tiling(32, 32, 16, 24, 24, 12)
    row = measure(vae, draw_latents(6, 5, 5), repetitions=2)
    assert row.same_bits
    assert len(row.ours_s) == len(row.diffusers_s) == 2
    assert row.ratio_p10 <= row.ratio <= row.ratio_p90
    assert 0 < row.ours_peak_bytes <= row.formula_bytes
    assert row.ours_peak_bytes < row.diffusers_peak_bytes
