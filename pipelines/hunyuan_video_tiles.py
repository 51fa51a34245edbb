"""HunyuanVideo's VAE decoded in tiles, with diffusers' numbers and less memory than diffusers needs for one tile."""

import itertools
import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor

from pipelines.vae_memory import ATTENTION_ROWS
from vae_group.tiled import TiledDecoder
from vae_group.tiles import TileSettings


def tile_settings(vae: AutoencoderKLHunyuanVideo) -> TileSettings:
    """What `vae.decode` would do: its own sizes, spatial tiles after `enable_tiling`, temporal ones by default."""
    return TileSettings(
        height=vae.tile_sample_min_height,
        width=vae.tile_sample_min_width,
        frames=vae.tile_sample_min_num_frames,
        overlap_height=vae.tile_sample_min_height - vae.tile_sample_stride_height,
        overlap_width=vae.tile_sample_min_width - vae.tile_sample_stride_width,
        overlap_frames=vae.tile_sample_min_num_frames - vae.tile_sample_stride_num_frames,
        spatial=vae.use_tiling,
        temporal=vae.use_framewise_decoding,
    )


def hunyuan_tiled(vae: AutoencoderKLHunyuanVideo, settings: TileSettings | None = None) -> TiledDecoder:
    """A `PartDecoder` with the numbers of `vae.decode` at these settings (by default those of `vae`).

    Raises:
        ValueError: settings for which tiles do not meet (`TileSettings.check`).
    """
    return TiledDecoder(
        partial(decode_tile, vae),
        settings or tile_settings(vae),
        vae.temporal_compression_ratio,
        vae.spatial_compression_ratio,
    )


@torch.no_grad()
def decode_tile(vae: AutoencoderKLHunyuanVideo, z: Tensor) -> Tensor:
    """What the VAE's decoder makes of one tile [1, C, t', h', w'], without tiling: [1, 3, t, h, w], to the bit.

    The layers are diffusers' own. What differs is what stays in memory: a tensor ends as soon as its last reader has
    run, SiLU and sums overwrite, and the causal mask of the attention is made for some queries at a time.
    """
    decoder = vae.decoder
    held = [decoder.conv_in(vae.post_quant_conv(z))]
    mid = decoder.mid_block
    _resnet(mid.resnets[0], held)
    for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
        if attention is not None:
            _attend(attention, held)
        _resnet(resnet, held)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            _resnet(resnet, held)
        for upsampler in block.upsamplers or ():
            _upsample(upsampler, held)
    held.append(F.silu(decoder.conv_norm_out(held.pop()), inplace=True))
    _convolve(decoder.conv_out, held)
    return held.pop()


# Each of these takes the one tensor out of `held` and puts its result there: a caller's own name for the argument would
# keep it alive until the callee returns.


def _resnet(block: Any, held: list[Tensor]) -> None:
    x = held.pop().contiguous()
    inner = [F.silu(block.norm1(x), inplace=True)]
    if block.conv_shortcut is not None:
        x = block.conv_shortcut.conv(x)  # kernel 1: nothing to pad; done first, so that the wider input can end
    _convolve(block.conv1, inner)
    inner.append(F.silu(block.norm2(inner.pop()), inplace=True))
    _convolve(block.conv2, inner)
    held.append(inner.pop().add_(x))


def _convolve(conv: Any, held: list[Tensor]) -> None:
    padded = F.pad(held.pop(), conv.time_causal_padding, mode=conv.pad_mode)
    held.append(conv.conv(padded))


def _upsample(layer: Any, held: list[Tensor]) -> None:
    x = held.pop()
    B, C, T, H, W = x.shape
    up_t, up_h, up_w = (int(factor) for factor in layer.upsample_factor)
    result = x.new_empty(B, C, 1 + (T - 1) * up_t, H * up_h, W * up_w)
    result[:, :, 0] = F.interpolate(x[:, :, 0], scale_factor=(up_h, up_w), mode="nearest")
    for frame in range(1, T):  # nearest neighbours: a frame gives `up_t` equal ones, the clip's first frame one
        one = F.interpolate(x[:, :, frame], scale_factor=(up_h, up_w), mode="nearest")
        result[:, :, 1 + (frame - 1) * up_t : 1 + frame * up_t] = one.unsqueeze(2)
    del x
    held.append(result)
    del result
    _convolve(layer.conv, held)


def _attend(attention: Any, held: list[Tensor]) -> None:
    x = held.pop()
    B, C, T, H, W = x.shape
    tokens = x.permute(0, 2, 3, 4, 1).flatten(1, 3)  # [B, C, T, H, W] -> [B, T*H*W, C]
    del x
    normed = attention.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
    q, k, v = (layer(normed).unsqueeze(1) for layer in (attention.to_q, attention.to_k, attention.to_v))
    del normed
    out = frame_causal_attention(q, k, v, H * W).squeeze(1)
    del q, k, v
    out = attention.to_out[0](out).add_(tokens)
    held.append(out.unflatten(1, (T, H, W)).permute(0, 4, 1, 2, 3))


def frame_causal_attention(q: Tensor, k: Tensor, v: Tensor, frame_tokens: int) -> Tensor:
    """Attention in which a token sees the tokens of its own and of earlier frames, in memory linear in tokens.

    Args:
        q, k, v: [B, N, S, D], frame after frame of `frame_tokens` tokens each.
    Returns:
        [B, N, S, D], the bits of one call with the whole [S, S] mask: queries are cut only where the kernel begins a
        block anyway, and of the keys only whole blocks that nobody may see are left out.
    """
    S = q.shape[2]
    frame = torch.arange(S, device=q.device) // frame_tokens
    out = torch.empty_like(v)
    cuts = [*range(0, max(1, S - ATTENTION_ROWS + 1), ATTENTION_ROWS), S]  # the last piece takes the remainder
    for begin, end in itertools.pairwise(cuts):
        seen = math.ceil(end / frame_tokens) * frame_tokens
        keys = min(S, math.ceil(seen / ATTENTION_ROWS) * ATTENTION_ROWS)
        hidden = frame[None, :keys] > frame[begin:end, None]
        mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -math.inf)
        del hidden
        out[:, :, begin:end] = F.scaled_dot_product_attention(
            q[:, :, begin:end], k[:, :, :keys], v[:, :, :keys], attn_mask=mask
        )
    return out
