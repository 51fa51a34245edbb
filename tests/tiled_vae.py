"""A small VAE for tests of tiles, and one whose decoder is arithmetic that differs wherever two tiles overlap."""

import itertools
import math
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor, nn

from vae_group.team import Part


class CheapDecoder(nn.Module):
    """Latents [B, C, t, h, w] -> [B, 3, 4t-3, 8h, 8w]: enlarged, and scaled by where in the tile a pixel is."""

    def forward(self, z: Tensor) -> Tensor:
        x = z[:, :3].repeat_interleave(8, dim=3).repeat_interleave(8, dim=4).repeat_interleave(4, dim=2)[:, :, 3:]
        place = torch.linspace(
            0.5, 1.5, math.prod(x.shape[2:]), dtype=torch.float64
        )  # float16's differs from call to call
        return x + place.to(x.dtype).view(x.shape[2:])


def small_vae(seed: int = 0, dtype: torch.dtype = torch.float32, cheap: bool = False, **tiling: int) -> Any:
    """diffusers' class with weights that matter; tiled in space where `tiling` has arguments of `enable_tiling`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKLHunyuanVideo(block_out_channels=(4, 4, 8, 8), norm_num_groups=2, layers_per_block=1).eval()
        for parameter in vae.parameters():
            parameter.data.normal_(0, 0.2)
    if cheap:
        vae.decoder = CheapDecoder()
    for module in vae.modules():
        module._apply(lambda x: x.to(dtype), recurse=False)
    if tiling:
        vae.enable_tiling(**tiling)
    return vae


def draw_latents(frames: int, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same normal numbers in every process."""
    generator = torch.Generator().manual_seed(frames * 10_000 + rows * 100 + cols)
    return torch.randn(1, 16, frames, rows, cols, generator=generator).to(dtype)


def reference(vae: Any, latents: Tensor) -> Tensor:
    """diffusers' own decode."""
    with torch.no_grad():
        return vae.decode(latents).sample


def join(parts: list[Part]) -> Tensor:
    """One member's parts one after the other, checked to follow each other in time."""
    for before, after in itertools.pairwise(parts):
        assert after.first_frame == before.first_frame + before.video.shape[2]
        assert after.first_row == before.first_row
    return torch.cat([part.video for part in parts], dim=2)
