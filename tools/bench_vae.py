"""Decoding with videopipe's VAE group against diffusers: what it costs by counting, and both measured in one run.

python -m tools.bench_vae --cost                    # FLOPs, bytes moved, peak bytes at the paper's shapes and at 720p
python -m tools.bench_vae                           # ours against enable_tiling: on the CPU a small VAE and clip,
                                                    # on a GPU HunyuanVideo's own sizes, 129x720x1280 in bf16
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import typer
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pipelines.hunyuan_video_tiles import decode_tile, hunyuan_tiled, tile_settings
from pipelines.models.wf_vae import WFVAEModel
from pipelines.vae_memory import hunyuan_tiled_bytes, wf_vae_chunk_bytes
from tools.count_ops import OpCounter
from vae_group.memory import WORKSPACE
from vae_group.team import Team
from vae_group.tiles import TileGrid, TileSettings, assign, next_wave, tile_grid
from videopipe.files import write_bytes
from videopipe.runtime import DTYPES

SHAPES = ("65x352x480", "129x352x480", "129x592x800", "129x576x1024", "129x720x1280")  # PipeDiT's, and 720p
WF_SHAPES = ("93x352x640", *SHAPES)
RELEASED_WF: dict[str, Any] = {"connect_res_layer_num": 2, "norm_type": "layernorm", "t_interpolation": "trilinear"}
DEFAULT = TileSettings()
OFFICIAL = TileSettings(frames=64, overlap_frames=16)


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What one decode takes: FLOPs, bytes moved between memory and processor, most bytes of tensors alive."""

    shape: str
    how: str
    flops: int
    moved_bytes: int
    peak_bytes: int


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds and peak bytes of one decode, in the order in which they were taken."""

    how: str
    seconds: list[float]
    peak_bytes: int


@dataclass(frozen=True)
class Exchanged:
    """Bytes that the busiest member of a team sends in a decode."""

    tiles: int
    overlaps: int


def count(work: Callable[[], Any]) -> OpCounter:
    """Run `work` on tensors without values and count."""
    with torch.no_grad(), OpCounter() as counter:
        work()
    return counter


def hunyuan_costs(shape: str, latent: tuple[int, int, int], vae: Any) -> Iterator[Cost]:
    """HunyuanVideo's decode: ours in tiles as diffusers has them, and diffusers' own at the same tiles."""
    for name, sizes in (
        ("tiles 256 px, 16 frames", DEFAULT),
        ("tiles 256 px, 64 frames", OFFICIAL),
        ("whole pictures, 16 frames", replace(DEFAULT, spatial=False)),
    ):
        for how, decode in (("ours", lambda z: decode_tile(vae, z)), ("diffusers", lambda z: plain(vae, z))):
            flops, moved = tiles_cost(tile_grid(latent, sizes, 4, 8), decode)
            peak = hunyuan_tiled_bytes(vae.config, latent, sizes, 1, 2) if how == "ours" else 0
            yield Cost(shape=shape, how=f"{name}: {how}", flops=flops, moved_bytes=moved, peak_bytes=peak)


def plain(vae: Any, z: Tensor) -> Tensor:
    """diffusers' decoder for one tile."""
    return vae.decoder(vae.post_quant_conv(z))
