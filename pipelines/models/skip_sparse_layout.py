"""Which tokens each rank holds so that skip-sparse blocks exchange one tensor instead of four: plain arithmetic.

The groups of a sparse block never meet, and everything but self-attention acts on each token alone. So where the ranks
divide the groups (or the other way round), a rank may hold whole groups (or a share of one) and attend without the
others. Between blocks of different patterns only the residual stream changes hands: one [B, S/n, N*D] per block, where
Ulysses sends q, k, v and the result. For 32 blocks, 28 of them sparse, that is 16 + 29 tensors instead of 128.

With more ranks than groups, the `peers` of a rank share its group and exchange heads for tokens among themselves.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.models.open_sora_plan import DENSE, PADDED, SkipSparse, skip_sparse_attention


@dataclass(frozen=True, kw_only=True)
class Reshard:
    """What one rank sends and receives when the layout changes; the form of `all_to_all_single` along the token axis.

    `send_order` picks the rank's own rows in the order of receivers, `send_counts` rows for each; the received rows,
    in the order of senders, `receive_counts` from each, are then picked by `receive_order`.
    """

    send_order: Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    receive_order: Tensor


def can_hold_groups(sparse: SkipSparse, ranks: int) -> bool:
    """Whether whole groups, or equal shares of one, fall to each rank: 1, 2, 4, 8, ... ranks for 4 groups."""
    return sparse.groups % ranks == 0 or ranks % sparse.groups == 0


def held_tokens(sparse: SkipSparse, tokens: int, ranks: int) -> tuple[Tensor, ...]:
    """The tokens of each rank, in the order it holds them: consecutive runs where dense, else group by group.

    Raises:
        ValueError: the ranks neither divide the groups nor are a multiple of them.
    """
    if not can_hold_groups(sparse, ranks):
        near = max(n for n in range(1, ranks) if can_hold_groups(sparse, n))
        raise ValueError(f"{ranks} ranks cannot share {sparse.groups} groups evenly, nearest is {near}")
    order = torch.arange(tokens)
    if sparse.kind == "dense":
        return order.tensor_split(ranks)
    groups = [order[group_of(order, sparse) == g] for g in range(sparse.k)]
    if ranks <= sparse.k:
        each = sparse.k // ranks
        return tuple(torch.cat(groups[r * each : (r + 1) * each]) for r in range(ranks))
    shares = ranks // sparse.k
    return tuple(share for group in groups for share in group.tensor_split(shares))


def group_of(tokens: Tensor, sparse: SkipSparse) -> Tensor:
    """The group of each token, by its index in the sequence."""
    if sparse.kind == "dense":
        return torch.zeros_like(tokens)
    return tokens % sparse.k if sparse.kind == "single" else tokens // sparse.k % sparse.k


def peers(sparse: SkipSparse, ranks: int, rank: int) -> range:
    """The ranks that share a group with this one: itself alone where it holds whole groups."""
    shares = ranks if sparse.kind == "dense" else max(1, ranks // sparse.k)
    return range(rank // shares * shares, rank // shares * shares + shares)


def reshard(before: tuple[Tensor, ...], after: tuple[Tensor, ...], rank: int) -> Reshard:
    """How `rank` gets from its tokens of one layout (`held_tokens`) to those of another."""
    total = sum(len(held) for held in before)
    old_rank, new_rank, old_row, new_row = (torch.empty(total, dtype=torch.long) for _ in range(4))
    for r, (old, new) in enumerate(zip(before, after, strict=True)):
        old_rank[old], new_rank[new] = r, r
        old_row[old], new_row[new] = torch.arange(len(old)), torch.arange(len(new))
    # each pair of ranks passes its rows in the order in which the receiver holds them
    mine = before[rank]
    outgoing = mine[torch.argsort(new_rank[mine] * total + new_row[mine])]
    wanted = after[rank]
    incoming = wanted[torch.argsort(old_rank[wanted] * total + new_row[wanted])]
    return Reshard(
        send_order=old_row[outgoing],
        send_counts=tuple(torch.bincount(new_rank[mine], minlength=len(before)).tolist()),
        receive_counts=tuple(torch.bincount(old_rank[wanted], minlength=len(before)).tolist()),
        receive_order=torch.argsort(new_row[incoming]),
    )


def attend_held_groups(
    q: Tensor, k: Tensor, v: Tensor, *, sparse: SkipSparse, held: Tensor, tokens: int, key_bias: Tensor | None
) -> Tensor:
    """Self-attention of a rank that holds whole groups: equals those rows of `skip_sparse_attention`.

    Args:
        q, k, v: [B, len(held), N, D].
        sparse: the block's pattern.
        held: the rank's tokens, from `held_tokens`.
        tokens: length S of the whole sequence.
        key_bias: [B, S] to add to the logits of each key, None for none.
    """
    out = torch.empty_like(q)
    group = group_of(held, sparse)
    for g in group.unique().tolist():
        rows = (group == g).nonzero().flatten()
        fill = sparse.padded(tokens) // sparse.groups - len(rows)
        bias = None if key_bias is None else key_bias[:, held[rows].to(key_bias.device)]
        if fill and bias is None:
            bias = q.new_zeros(q.shape[0], len(rows))
        if bias is not None:
            bias = F.pad(bias, (0, fill), value=PADDED)
        own = rows.to(q.device)
        queries, keys, values = (F.pad(x[:, own], (0, 0, 0, 0, 0, fill)) for x in (q, k, v))
        attended = skip_sparse_attention(queries, keys, values, sparse=DENSE, key_bias=bias)
        out[:, own] = attended[:, : len(rows)]
    return out
