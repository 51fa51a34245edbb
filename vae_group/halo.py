"""Rows of a frame sharded over a team: neighbours' rows for convolutions, and sums for statistics.

Member m holds `row_counts[m]` rows of every frame, members from top to bottom; counts may differ and may be zero.
Nobody enters a collective before all members have the memory for it (`vae_group.retry.all_ready`).
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from vae_group.retry import all_ready
from vae_group.team import Team
from videopipe.exchange import gather_tokens
from videopipe.partition import offsets


def neighbour_rows(x: Tensor, above: int, below: int, team: Team, row_counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The neighbours' rows that lie at this member's rows; one collective, which every member must make.

    Args:
        x: [B, C, T, h, W] with h == row_counts[team.member]; all members agree in the other sizes.
        above, below: rows wanted at either side, the same on every member; may be more than a neighbour has, they then
            come from several.
        row_counts: rows of each member.
    Returns:
        [B, C, T, up to above, W] and [B, C, T, up to below, W]. Rows beyond the clip's border are not there: what they
        are to be is the caller's decision. A member without rows gets none.
    Raises:
        ValueError: x has not the rows that row_counts says.
    """
    B, C, T, h, W = x.shape
    if len(row_counts) != team.members or row_counts[team.member] != h:
        raise ValueError(f"row_counts={row_counts} must have {h} rows for member {team.member} of {team.members}")
    none = x[:, :, :, :0]
    if team.group is None:
        return none, none
    top = offsets(row_counts)[team.member]
    outgoing = [
        x[:, :, :, rows.start - top : rows.stop - top]
        for rows in (halo(peer, team.member, above, below, row_counts) for peer in range(team.members))
    ]
    counts = [len(halo(team.member, peer, above, below, row_counts)) for peer in range(team.members)]
    row = B * C * T * W
    received = x.new_empty(sum(counts) * row)
    sent = torch.cat([part.reshape(-1) for part in outgoing])
    all_ready(team, x.device)
    dist.all_to_all_single(
        received,
        sent,
        output_split_sizes=[count * row for count in counts],
        input_split_sizes=[part.numel() for part in outgoing],
        group=team.group,
    )
    del sent
    blocks = received.split([count * row for count in counts])
    parts = [block.view(B, C, T, count, W) for block, count in zip(blocks, counts, strict=True)]
    return _joined(parts[: team.member], none), _joined(parts[team.member :], none)


def halo(member: int, peer: int, above: int, below: int, row_counts: Sequence[int]) -> range:
    """The rows of `peer`, counted from the clip's top, that `member` needs beside its own; plain arithmetic."""
    start = offsets(row_counts)
    if not row_counts[member] or peer == member:
        return range(0)
    if peer < member:
        return range(max(start[peer], start[member] - above), max(start[peer + 1], start[member] - above))
    return range(min(start[peer], start[member + 1] + below), min(start[peer + 1], start[member + 1] + below))


def gather_rows(x: Tensor, team: Team, row_counts: tuple[int, ...]) -> Tensor:
    """All members' rows: [B, C, T, h, W] -> [B, C, T, H, W]; one collective."""
    return gather_tokens(x, row_counts, team.group, team.member, dim=3, ready=partial(all_ready, team, x.device))


def all_sum(x: Tensor, team: Team) -> Tensor:
    """The sum of all members' tensors of one shape, added in member order: the same bits everywhere and every time.

    Meant for small tensors such as the statistics of a norm: each member collects all of them.
    """
    if team.group is None:
        return x
    ready = partial(all_ready, team, x.device)
    gathered = gather_tokens(x.reshape(1, -1), (1,) * team.members, team.group, team.member, dim=0, ready=ready)
    total = gathered[0].clone()
    for other in gathered[1:]:
        total += other
    return total.view(x.shape)


def _joined(parts: Sequence[Tensor], none: Tensor) -> Tensor:
    rows = [part for part in parts if part.shape[3]]
    return torch.cat(rows, dim=3) if rows else none
