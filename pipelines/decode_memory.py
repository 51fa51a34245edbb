"""Decoders that stay within the memory at hand: from the configuration's `[decode]` table, for both VAEs.

With `fixed`, what is decoded and how depends on the configuration alone, see `vae_group.memory.decode_within`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from pipelines.decode_choices import hunyuan_exact_choices, hunyuan_settings, hunyuan_tile_choices, wf_vae_choices
from pipelines.hunyuan_video_exact import exact_decode
from pipelines.hunyuan_video_tiles import hunyuan_tiled, tile_settings
from pipelines.models.wf_vae import WFVAEModel
from vae_group.memory import Setting, decode_within
from vae_group.retry import from_the_start
from vae_group.team import Part, PartDecoder, Team
from videopipe.config import DecodeConfig


def hunyuan_within(vae: Any, decode: DecodeConfig, *, fixed: bool = False) -> PartDecoder:
    """Decodes as `vae.decode` would with the configured tiles, or with smaller ones where memory asks for it.

    Args:
        vae: an `AutoencoderKLHunyuanVideo`.
    Raises:
        ValueError: tiles that do not meet; by the call, too little memory for the smallest.
    """
    strides = (vae.temporal_compression_ratio, vae.spatial_compression_ratio)
    wanted = hunyuan_settings(tile_settings(vae), decode, *strides)
    wanted.check(*strides)

    def decode_clip(latents: Tensor, team: Team) -> Iterator[Part]:
        choices = hunyuan_tile_choices(vae.config, wanted, _size(latents), team.members, latents.element_size())
        settings = [Setting(name=c.name, peak_bytes=c.peak_bytes, decoder=hunyuan_tiled(vae, c.how)) for c in choices]
        return decode_within(settings, latents, team, decode.memory_limit, fixed=fixed)

    return decode_clip


def hunyuan_exactly_within(vae: Any, decode: DecodeConfig, *, fixed: bool = False) -> PartDecoder:
    """Decodes as `vae.decode` would without tiles; in little memory more is computed twice, with the same result.

    Args:
        vae: an `AutoencoderKLHunyuanVideo`.
    Raises:
        ValueError: by the call, too little memory for the least that can be held.
    """

    def decode_clip(latents: Tensor, team: Team) -> Iterator[Part]:
        choices = hunyuan_exact_choices(vae.config, _size(latents), team.members, latents.element_size())
        settings = [
            Setting(
                name=choice.name,
                peak_bytes=choice.peak_bytes,
                decoder=from_the_start(partial(exact_decode, vae, plan=choice.how)),
                at_work_bytes=choice.at_work_bytes,
            )
            for choice in choices
        ]
        return decode_within(settings, latents, team, decode.memory_limit, fixed=fixed)

    return decode_clip


def wfvae_within(
    vae: WFVAEModel, decode: DecodeConfig, decoder: Callable[[int | None], PartDecoder], *, fixed: bool = False
) -> PartDecoder:
    """Decodes in the configured chunks of time, or in shorter ones where memory asks for it; the result is the same.

    Args:
        decoder: the decoder for so many latent frames in a chunk, None for all.
    Raises:
        ValueError: by the call, too little memory for the shortest chunk, or for the whole clip where the model's norms
            look at all of it.
    """
    chunked = vae.config.norm_type == "layernorm"

    def decode_clip(latents: Tensor, team: Team) -> Iterator[Part]:
        choices = wf_vae_choices(vae.config, decode, _size(latents), team.members, latents.element_size())
        settings = [
            Setting(
                name=choice.name,
                peak_bytes=choice.peak_bytes,
                decoder=from_the_start(decoder(choice.how if chunked else None)),
            )
            for choice in choices
        ]
        return decode_within(settings, latents, team, decode.memory_limit, fixed=fixed)

    return decode_clip


def _size(latents: Tensor) -> tuple[int, int, int]:
    _, _, frames, rows, cols = latents.shape
    return frames, rows, cols
