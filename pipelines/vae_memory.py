"""How many bytes a VAE's decoder has alive at once, by formula: no tensor is made.

Shapes: T' H' W' latent frames, rows, cols of a tile or a chunk. Only tensors are counted, not what a convolution's
kernel takes for itself (`vae_group.memory.WORKSPACE`) and not weights. `tests/test_vae_memory.py` holds the formulas
to a count of the real decoders' tensors.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vae_group.tiled import row_bands
from vae_group.tiles import TileSettings, assign, next_wave, tile_grid

ATTENTION_ROWS = 1024
"""Queries of HunyuanVideo's VAE that attend at a time, when it decodes a tile. A multiple of every kernel's block of
queries and keys, so that cutting there changes no bit."""


def hunyuan_tile_bytes(config: Mapping[str, Any], latent: Sequence[int], item_bytes: int) -> int:
    """Most bytes that `decode_tile` has alive for one tile.

    Args:
        config: of `AutoencoderKLHunyuanVideo`: block_out_channels, layers_per_block, mid_block_add_attention.
        latent: T', H', W' of the tile.
        item_bytes: of one number.
    """
    widths = tuple(reversed(config["block_out_channels"]))
    t, h, w = latent
    peak = _resnet(widths[0], widths[0], t, h, w)
    attention = _attention(widths[0], t, h, w, item_bytes) if config["mid_block_add_attention"] else 0
    before = widths[0]
    for i, width in enumerate(widths):
        peak = max(peak, _resnet(before, width, t, h, w), _resnet(width, width, t, h, w))
        before = width
        if i < 3:  # rows and cols double three times, frames in the last two of them
            small = width * t * h * w
            t, h, w = (1 + (t - 1) * 2 if i else t), 2 * h, 2 * w
            whole, padded = width * t * h * w, width * _padded(t, h, w)
            peak = max(peak, small + whole, whole + padded)
    return max(peak * item_bytes, attention)


def _padded(t: int, h: int, w: int) -> int:
    """Voxels before a causal convolution of kernel 3."""
    return (t + 2) * (h + 2) * (w + 2)


def _resnet(c_in: int, c_out: int, t: int, h: int, w: int) -> int:
    n, padded = t * h * w, _padded(t, h, w)
    skip = c_out if c_in != c_out else c_in  # the shortcut's result, or the input itself
    return max(
        (c_in + c_in + (c_out if c_in != c_out else 0)) * n,  # input, normed, shortcut
        (skip + c_in) * n + c_in * padded,
        (skip + c_out) * n + max(c_in, c_out) * padded,
        (skip + c_out + c_out) * n,
    )


def _attention(c: int, t: int, h: int, w: int, item_bytes: int) -> int:
    n = t * h * w
    rows = n if n < ATTENTION_ROWS else ATTENTION_ROWS + n % ATTENTION_ROWS
    return 5 * c * n * item_bytes + rows * n * (item_bytes + 1) + 8 * n  # tokens, q, k, v, result; mask; frame numbers


def wf_vae_chunk_bytes(config: Mapping[str, Any], latent: Sequence[int], item_bytes: int) -> int:
    """Most bytes that `WFVAEModel.decode_stream` has alive in a chunk that is neither the first nor the last.

    Args:
        config: of `WFVAEModel`: base_channels, decoder_num_resblocks, decoder_energy_flow_hidden_size, ...
        latent: T', H', W' of the chunk: T' frames of a clip that goes on.
        item_bytes: of one number.
    """
    t, h, w = latent
    c1, flow = config["base_channels"], config["decoder_energy_flow_hidden_size"]
    c2, c4 = 2 * c1, 4 * c1
    tall, wide = 2 * t, 4 * h * w  # frames and pixels after the first upsampling
    joined = (c4 + flow) * tall * wide  # what both branches are cut out of
    full = 4 * wide
    peak = max(
        _stream_resnet(c4, c4 + flow, t, h * w),
        _stream_resnet(c4, c4 + flow, tall, wide),
        joined + _stream_resnet(c4, c2, tall, wide),
        joined + _stream_resnet(c2, c2, tall, full),
        joined + _stream_resnet(c2, c1, tall, full),
    )
    given = 3 * 4 * t * 64 * h * w  # the pixels of the chunk before, which whoever took them may still have
    return (peak + given + _wf_vae_past(config, h, w)) * item_bytes


def _stream_resnet(c_in: int, c_out: int, t: int, pixels: int) -> int:
    n, past = t * pixels, 2 * pixels
    first = (3 * c_in + c_out) * n + 2 * c_in * past  # input, normed, the past and that, result; the past by itself
    return max(first, (c_in + 4 * c_out) * n + 2 * c_out * past)


def _wf_vae_past(config: Mapping[str, Any], h: int, w: int) -> int:
    """Numbers that the layers remember between chunks: two frames of what each causal convolution reads."""
    c1, flow = config["base_channels"], config["decoder_energy_flow_hidden_size"]
    blocks, pair = config["decoder_num_resblocks"], config["connect_res_layer_num"]
    c2, c4 = 2 * c1, 4 * c1
    small, middle, full = h * w, 4 * h * w, 16 * h * w
    at_small = config["latent_dim"] + 2 * c4 + (c4 + c4 + flow) + 2 * c4 * blocks + 2 * flow * pair
    at_middle = c4 + (c4 + c4 + flow) + (c4 + c2) + 2 * c2 * (blocks - 1) + 2 * flow * pair
    at_full = 2 * c2 + (c2 + c1) + 2 * c1
    return 2 * (at_small * small + at_middle * middle + at_full * full) + c4 * small


def hunyuan_tiled_bytes(
    config: Mapping[str, Any], latent: Sequence[int], settings: TileSettings, members: int, item_bytes: int
) -> int:
    """Most bytes that any member of a team has alive in a `hunyuan_tiled` decode of latents of T', H', W' (`latent`).

    While a tile is decoded, the member's other tiles of the wave, the part given before and the frames kept for the
    next slab are alive; while a slab is exchanged, those tiles, what is sent and received, and the new part.
    """
    grid = tile_grid(latent, settings, config["temporal_compression_ratio"], config["spatial_compression_ratio"])
    widest_band = max(len(band) for band in row_bands(grid.height, members))
    frame = 3 * widest_band * grid.width * item_bytes
    activations: dict[tuple[int, ...], int] = {}  # equal tiles are many
    peak, start, held = 0, 0, 0
    while start < len(grid.frames):
        wave = next_wave(grid, start, members)
        costs = {place: grid.cost(place) for place in grid.places(wave)}
        finished = [0] * members
        for (s, r, c), member in sorted(assign(costs, members).items()):  # each member decodes its own in this order
            spans = (grid.frames[s], grid.rows[r], grid.cols[c])
            size = tuple(span.end - span.begin for span in spans)
            if size not in activations:
                activations[size] = hunyuan_tile_bytes(config, size, item_bytes)
            peak = max(peak, held + finished[member] + activations[size])
            finished[member] += 3 * costs[s, r, c] * item_bytes
        tails = [span.blend for span in (*grid.frames[1:], grid.frames[0])]  # what the next slab is blended with
        parts = max(grid.frames[s].size + tails[s] for s in wave) * frame
        moved = 0 if members == 1 else 2 * max(finished)
        peak = max(peak, held + max(finished) + moved + parts)
        held, start = parts, wave.stop
    return peak
