"""Group norm of a clip that is never in one piece: statistics gathered slab by slab and member by member.

Moments (count, mean, sum of squared deviations) are taken around each piece's own mean and merged pairwise, so that a
large mean costs no digits: the two-level form of Welford's method. Pieces are reduced in float32 (float64 for float64
activations), moments are merged in float64, in an order that does not depend on timing.

Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_group.halo import all_sum
from vae_group.team import Team

PIECE = 2**24
"""Elements that are widened to float32 at a time, so that statistics of bfloat16 slabs need little room."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Of each channel: `count` elements, their `mean` [B, C] and `squares` [B, C], the sum of squared deviations."""

    count: int
    mean: Tensor
    squares: Tensor


def measure(slabs: Iterable[Tensor]) -> Moments:
    """Moments of this member's part of a clip, from its slabs [B, C, t, h, W]."""
    # by map, which lets go of a slab before it asks for the next one
    return reduce(_merged, chain.from_iterable(map(_of_frames, slabs)))


def _of_frames(slab: Tensor) -> list[Moments]:
    return [_of_frame(frame) for frame in slab.unbind(2)]


def _of_frame(frame: Tensor) -> Moments:
    """Moments of [B, C, h, W]."""
    B, C, h, W = frame.shape
    if not h * W:
        zero = frame.new_zeros(B, C, dtype=torch.float64)
        return Moments(count=0, mean=zero, squares=zero)
    wide = torch.float64 if frame.dtype == torch.float64 else torch.float32
    channels = max(1, PIECE // (B * h * W))
    parts = [torch.var_mean(piece.to(wide), dim=(2, 3), correction=0) for piece in frame.split(channels, dim=1)]
    var, mean = (torch.cat(kind, dim=1).double() for kind in zip(*parts, strict=True))
    return Moments(count=h * W, mean=mean, squares=var * (h * W))


def _merged(a: Moments, b: Moments) -> Moments:
    count = a.count + b.count
    if not count:
        return a
    delta = b.mean - a.mean
    return Moments(
        count=count,
        mean=a.mean + delta * (b.count / count),
        squares=a.squares + b.squares + delta * delta * (a.count * b.count / count),
    )


class GroupNorm:
    """A group norm with the statistics of the whole clip, as a function of any part of it.

    Args:
        norm: weights, groups and epsilon.
        moments: of this member's part; every member makes one, which is two small collectives.
    """

    def __init__(self, norm: nn.GroupNorm, moments: Moments, team: Team) -> None:
        B, C = moments.mean.shape
        G = norm.num_groups
        group_mean, group_var = _over_groups(moments, G, team)
        dtype = torch.float64 if norm.weight.dtype == torch.float64 else torch.float32
        self._mean, self._var = (
            x.to(dtype).repeat_interleave(C // G, dim=1).flatten() for x in (group_mean, group_var)
        )
        self._weight, self._bias = norm.weight.to(dtype).repeat(B), norm.bias.to(dtype).repeat(B)
        self._eps = norm.eps

    def step(self, x: Tensor) -> Tensor:
        """[B, C, t, h, W] of the clip, normalised; computed in float32 or better without a widened copy."""
        if not x.numel():
            return x
        B, C, t, h, W = x.shape
        flat = x.reshape(1, B * C, t, h, W)  # with given statistics, group norm is a batch norm at inference
        normalised = F.batch_norm(flat, self._mean, self._var, self._weight, self._bias, training=False, eps=self._eps)
        return normalised.view(x.shape)


def _over_groups(moments: Moments, groups: int, team: Team) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [B, groups] over all members and the channels of each group."""
    mean, squares = moments.mean.unflatten(1, (groups, -1)), moments.squares.unflatten(1, (groups, -1))
    count = mean.new_tensor([float(moments.count * mean.shape[2])])
    sums = all_sum(torch.cat([count, (mean * moments.count).sum(2).flatten()]), team)
    total, group_mean = sums[0], (sums[1:] / sums[0]).view(mean.shape[:2])
    deviation = (squares + moments.count * (mean - group_mean[..., None]).square()).sum(2)
    return group_mean, all_sum(deviation, team) / total
