"""What exact decode and encode of HunyuanVideo's VAE cost, as Markdown tables: `python -m tools.exact_vae_cost`.

Arithmetic alone (`pipelines.hunyuan_video_exact_plan`), for the released VAE in bfloat16; no weight is loaded.
"""

from collections.abc import Iterator
from itertools import product

import torch
from diffusers import AutoencoderKLHunyuanVideo

from pipelines.hunyuan_video_exact_plan import ExactPlan, Level, plan_decode, plan_encode

SHAPES = ((129, 544, 960), (129, 720, 1280))
MEMBERS = (1, 2, 4, 8)
LEVELS = ((0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 0, 3), (0, 0, 1, 3), (0, 0, 3, 3))
BYTES = 2


def main() -> None:
    """Print the tables."""
    with torch.device("meta"):
        vae = AutoencoderKLHunyuanVideo()
    for T, H, W in SHAPES:
        latents = (1 + (T - 1) // 4, H // 8, W // 8)
        print(f"\n{T}x{H}x{W}, bfloat16: GiB of activations, PFLOP of each rank\n")
        print("| levels of the four stages | " + " | ".join(f"{members} ranks" for members in MEMBERS) + " |")
        print("|---" * (1 + len(MEMBERS)) + "|")
        for levels in LEVELS:
            chosen = [Level(level) for level in levels]
            plans = [plan_decode(vae.config, latents, members, BYTES, levels=chosen) for members in MEMBERS]
            print(f"| decode {' '.join(map(str, levels))} | " + " | ".join(map(_cell, plans)) + " |")
        encoded = [plan_encode(vae.config, (T, H, W), members, BYTES) for members in MEMBERS]
        print("| encode 0 0 0 0 | " + " | ".join(map(_cell, encoded)) + " |")
        tiled = sum(plan_decode(vae.config, tile, 1, BYTES, levels=[Level.HOLD] * 4).flops for tile in _tiles(latents))
        print(f"\nThe tiles that diffusers decodes after `enable_tiling()`: {tiled / 1e15:.2f} PFLOP on one rank.")


def _tiles(latents: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    """diffusers' default tiles: 5 latent frames every 3, 32 rows and columns every 24."""
    sizes = [
        [min(size, total - start) for start in range(0, total, stride)]
        for total, size, stride in zip(latents, (5, 32, 32), (3, 24, 24), strict=True)
    ]
    yield from ((frames, rows, cols) for frames, rows, cols in product(*sizes))


def _cell(plan: ExactPlan) -> str:
    return f"{plan.peak_bytes / 2**30:.1f}, {plan.flops / 1e15:.2f}"


if __name__ == "__main__":
    main()
