"""Latents of which each member owns some tokens: how they lie in a whole tensor, and how they become whole."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_group.attention import Layout
from videopipe.exchange import gather_tokens
from videopipe.geometry import LatentGeometry


def patchify(latents: Tensor, geometry: LatentGeometry) -> Tensor:
    """[B, C, T', H', W'] -> [B, S, C * patch], S tokens in the order frame, row, col, as DiTs embed them."""
    t, s = geometry.patch_t, geometry.patch_s
    x = latents.unflatten(4, (-1, s)).unflatten(3, (-1, s)).unflatten(2, (-1, t))  # [B, C, T, t, H, s, W, s]
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, shape: Sequence[int], geometry: LatentGeometry) -> Tensor:
    """The inverse of `patchify`: [B, S, C * patch] -> `shape`, [B, C, T', H', W']."""
    t, s = geometry.patch_t, geometry.patch_s
    grid = (shape[2] // t, shape[3] // s, shape[4] // s)
    x = tokens.unflatten(2, (shape[1], t, s, s)).unflatten(1, grid)  # [B, T, H, W, C, t, s, s]
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(tuple(shape))


def gather_latents(latents: Tensor, layout: Layout, geometry: LatentGeometry) -> Tensor:
    """Latents [B, C, T', H', W'], right in this member's own video tokens, whole on every member of the layout.

    Collective over them; with one member the tensor itself.
    """
    if layout.group is None:
        return latents
    own = patchify(latents, geometry)[:, layout.own]
    assert layout.member is not None
    whole = gather_tokens(own, layout.sequence.video_counts, layout.group, layout.member)
    return unpatchify(layout.in_sequence(whole), latents.shape, geometry)


def exchange_branches(prediction: Tensor, layout: Layout, geometry: LatentGeometry) -> tuple[Tensor, Tensor]:
    """The predictions of both branches of guidance from this member's own and that of its twin in the other half.

    Args:
        prediction: [B, C, T', H', W'] of this half's branch, right in this member's own tokens; only these travel.
        layout: of this half.
    Returns:
        Those of the first and of the second half, each right in this member's own tokens and zero elsewhere.
    Source: CFG parallelism as in xDiT (arXiv 2411.01738), which exchanges whole predictions; here own tokens suffice.
    """
    assert layout.branch is not None and layout.member is not None, layout
    own, count = layout.own, layout.sequence.video_counts[layout.member]
    tokens = patchify(prediction, geometry)
    both = gather_tokens(tokens[:, own], (count, count), layout.branch.pair, layout.branch.index)

    def placed(part: Tensor) -> Tensor:
        whole = torch.zeros_like(tokens)
        whole[:, own] = part
        return unpatchify(whole, prediction.shape, geometry)

    first, second = both.split(count, dim=1)
    return placed(first), placed(second)
