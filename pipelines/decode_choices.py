"""The ways to decode a clip with each VAE, and the bytes that each takes: from sizes alone, no model is needed.

The first way is the one that is wanted, the others take ever less. Ranks decode with them (`pipelines.decode_memory`),
the engine asks beforehand whether any of them fits (`pipelines.decode_room`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch

from pipelines.hunyuan_video_exact_plan import ExactPlan, decode_plans
from pipelines.models.open_sora_plan_layout import DEFAULT_DECODE_CHUNK, STRIDE_T
from pipelines.vae_memory import hunyuan_tiled_bytes, wf_vae_chunk_bytes
from vae_group.memory import bytes_needed
from vae_group.tiles import TileSettings
from videopipe.config import DecodeConfig

SIDES = (1024, 768, 512, 384, 256, 192, 128, 96, 64)  # px of square tiles, a quarter of which overlaps
OFFICIAL = TileSettings(frames=64, overlap_frames=16)  # those of github.com/Tencent-Hunyuan/HunyuanVideo
HUNYUAN_KEYS = (
    "block_out_channels", "layers_per_block", "mid_block_add_attention", "in_channels", "out_channels",
    "latent_channels", "spatial_compression_ratio", "temporal_compression_ratio",
)  # fmt: skip
WF_VAE_KEYS = (
    "base_channels", "connect_res_layer_num", "decoder_energy_flow_hidden_size", "decoder_num_resblocks", "latent_dim",
    "norm_type",
)  # fmt: skip
"""What the bytes depend on of each VAE's configuration."""

Latent = tuple[int, int, int]
"""T', H', W' of a clip's latents."""

How = TypeVar("How", TileSettings, ExactPlan, int)


@dataclass(frozen=True, kw_only=True)
class Choice(Generic[How]):
    """One way: in words, the most bytes of tensors alive at once on any member (weights aside), and what it is.

    `how` are tiles, the plan of an exact decode, or the latent frames in a chunk. `at_work_bytes` as in
    `vae_group.memory.Setting`.
    """

    name: str
    peak_bytes: int
    how: How
    at_work_bytes: int | None = None

    def needs(self, device: torch.device) -> int:
        """Bytes that must be free on a device."""
        return bytes_needed(self.peak_bytes, device, self.at_work_bytes)


def hunyuan_tile_choices(
    vae: Mapping[str, Any], wanted: TileSettings, latent: Latent, members: int, item_bytes: int
) -> Iterator[Choice[TileSettings]]:
    """HunyuanVideo in tiles, `wanted` ones and then smaller ones, which give other numbers.

    Args:
        vae: of its configuration `HUNYUAN_KEYS`.
        members: ranks that decode a clip together.
        item_bytes: of one number.
    """
    for tiles in smaller_tiles(wanted, max(latent[1:]) * vae["spatial_compression_ratio"]):
        peak = hunyuan_tiled_bytes(vae, latent, tiles, members, item_bytes)
        yield Choice(name=describe(tiles), peak_bytes=peak, how=tiles)


def hunyuan_exact_choices(
    vae: Mapping[str, Any], latent: Latent, members: int, item_bytes: int
) -> Iterator[Choice[ExactPlan]]:
    """HunyuanVideo without tiles: the fastest plan, then those that compute more twice, with the same result.

    Arguments as for `hunyuan_tile_choices`.
    """
    for plan in decode_plans(vae, latent, members, item_bytes):
        yield Choice(name=plan.describe(), peak_bytes=plan.peak_bytes, how=plan, at_work_bytes=plan.at_work_bytes)


def wf_vae_choices(
    vae: Mapping[str, Any], decode: DecodeConfig, latent: Latent, members: int, item_bytes: int
) -> Iterator[Choice[int]]:
    """WF-VAE in chunks of time, those wanted and then shorter ones, with the same result.

    Norms that look at the whole clip leave one chunk of all frames. Arguments as for `hunyuan_tile_choices`, `vae` with
    `WF_VAE_KEYS`.
    """
    frames, height, width = latent
    rows = height if members == 1 else -(-height // members) + 2  # a row of the neighbours at each side
    whole = decode.mode == "clip" and not decode.tiling
    for chunk in chunks(frames, decode, whole) if vae["norm_type"] == "layernorm" else [frames]:
        peak = wf_vae_chunk_bytes(vae, (chunk, rows, width), item_bytes)
        yield Choice(
            name=f"chunks of {chunk} latent frames" if chunk < frames else "whole clips", peak_bytes=peak, how=chunk
        )


def hunyuan_settings(default: TileSettings, decode: DecodeConfig, stride_t: int, stride_s: int) -> TileSettings:
    """The tiles that the configuration asks for; `default` are the VAE's own, used where it says nothing."""
    if decode.tile_preset == "official":
        default = replace(OFFICIAL, spatial=True)
    elif decode.tile_preset == "largest":
        default = replace(default, spatial=False)
    given = {}
    for axis, stride in (("height", stride_s), ("width", stride_s), ("frames", stride_t)):
        size, overlap = getattr(decode, f"tile_{axis}"), getattr(decode, f"tile_overlap_{axis}")
        if size:
            given[axis] = size
            given[f"overlap_{axis}"] = size // 4 // stride * stride
        if overlap:
            given[f"overlap_{axis}"] = overlap
    spatial = default.spatial or decode.tiling or bool(decode.tile_height or decode.tile_width)
    return replace(default, **given, spatial=spatial)


def smaller_tiles(first: TileSettings, clip_px: int) -> list[TileSettings]:
    """`first`, then the same tiles in time with ever smaller ones in space; `clip_px`: the clip's larger side."""
    side = min(clip_px, max(first.height, first.width)) if first.spatial else clip_px
    return [
        first,
        *(
            replace(first, height=s, width=s, overlap_height=s // 4, overlap_width=s // 4, spatial=True)
            for s in SIDES
            if s < side
        ),
    ]


def describe(tiles: TileSettings) -> str:
    """Tiles in words."""
    space = f"tiles of {tiles.width}x{tiles.height} px" if tiles.spatial else "whole pictures"
    return f"{space}, {tiles.frames} frames at a time" if tiles.temporal else space


def chunks(frames: int, decode: DecodeConfig, whole: bool) -> Sequence[int]:
    """Latent frames in a chunk: those wanted, then ever fewer."""
    wanted = DEFAULT_DECODE_CHUNK
    if decode.tile_frames:
        wanted = max(1, decode.tile_frames // STRIDE_T)
    elif whole or decode.tile_preset == "largest":
        wanted = frames
    result = [min(wanted, frames)]
    while result[-1] > 1:
        result.append(result[-1] // 2)
    return result
