"""Decoders that stay within the memory at hand: from the configuration's `[decode]` table, for both VAEs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from pipelines.hunyuan_video_exact import exact_decode
from pipelines.hunyuan_video_exact_plan import decode_plans
from pipelines.hunyuan_video_tiles import hunyuan_tiled, tile_settings
from pipelines.models.wf_vae import DEFAULT_DECODE_CHUNK, STRIDE_T, WFVAEModel
from pipelines.vae_memory import hunyuan_tiled_bytes, wf_vae_chunk_bytes
from vae_group.memory import Setting, decode_within
from vae_group.retry import from_the_start
from vae_group.team import Part, PartDecoder, Team
from vae_group.tiles import TileSettings
from videopipe.config import DecodeConfig

SIDES = (1024, 768, 512, 384, 256, 192, 128, 96, 64)  # px of square tiles, a quarter of which overlaps
OFFICIAL = TileSettings(frames=64, overlap_frames=16)  # those of github.com/Tencent-Hunyuan/HunyuanVideo


def hunyuan_within(vae: Any, decode: DecodeConfig) -> PartDecoder:
    """Decodes as `vae.decode` would with the configured tiles, or with smaller ones where memory asks for it.

    Args:
        vae: an `AutoencoderKLHunyuanVideo`.
    Raises:
        ValueError: tiles that do not meet; by the call, too little memory for the smallest.
    """
    strides = (vae.temporal_compression_ratio, vae.spatial_compression_ratio)
    first = hunyuan_settings(tile_settings(vae), decode, *strides)
    first.check(*strides)

    def decode_clip(latents: Tensor, team: Team) -> Iterator[Part]:
        latent = latents.shape[2:]
        settings = []
        for tiles in smaller_tiles(first, max(latent[1:]) * vae.spatial_compression_ratio):
            peak = hunyuan_tiled_bytes(vae.config, latent, tiles, team.members, latents.element_size())
            settings.append(Setting(name=describe(tiles), peak_bytes=peak, decoder=hunyuan_tiled(vae, tiles)))
        return decode_within(settings, latents, team, decode.memory_limit)

    return decode_clip


def hunyuan_exactly_within(vae: Any, decode: DecodeConfig) -> PartDecoder:
    """Decodes as `vae.decode` would without tiles; in little memory more is computed twice, with the same result.

    Args:
        vae: an `AutoencoderKLHunyuanVideo`.
    Raises:
        ValueError: by the call, too little memory for the least that can be held.
    """

    def decode_clip(latents: Tensor, team: Team) -> Iterator[Part]:
        T, H, W = latents.shape[2:]
        settings = [
            Setting(
                name=plan.describe(),
                peak_bytes=plan.peak_bytes,
                decoder=from_the_start(partial(exact_decode, vae, plan=plan)),
            )
            for plan in decode_plans(vae.config, (T, H, W), team.members, latents.element_size())
        ]
        return decode_within(settings, latents, team, decode.memory_limit)

    return decode_clip


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


def wfvae_within(
    vae: WFVAEModel, decode: DecodeConfig, *, whole: bool, decoder: Callable[[int | None], PartDecoder]
) -> PartDecoder:
    """Decodes in the configured chunks of time, or in shorter ones where memory asks for it; the result is the same.

    Args:
        whole: begin with the whole clip as one chunk rather than with the model's own chunk.
        decoder: the decoder for so many latent frames in a chunk, None for all.
    Raises:
        ValueError: by the call, too little memory for the shortest chunk, or for the whole clip where the model's norms
            look at all of it.
    """
    chunked = vae.config.norm_type == "layernorm"

    def decode_clip(latents: Tensor, team: Team) -> Iterator[Part]:
        frames, height, width = latents.shape[2:]
        rows = height if team.members == 1 else -(-height // team.members) + 2  # a row of the neighbours at each side
        settings = []
        for chunk in chunks(frames, decode, whole) if chunked else [frames]:
            peak = wf_vae_chunk_bytes(vae.config, (chunk, rows, width), latents.element_size())
            part_decoder = decoder(chunk if chunked else None)
            name = f"chunks of {chunk} latent frames" if chunk < frames else "whole clips"
            settings.append(Setting(name=name, peak_bytes=peak, decoder=from_the_start(part_decoder)))
        return decode_within(settings, latents, team, decode.memory_limit)

    return decode_clip


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
