"""Which tokens and heads each rank has in skip-sparse attention, so that little travels: arithmetic.

In a sparse block the k groups of tokens never meet, and everything but self-attention acts on each token alone. So a
rank holds whole groups where it can, or a share of few groups, and those who share a group exchange heads for tokens
among themselves. Where the pattern changes from one block to the next, tokens change hands once, as one tensor of the
residual stream. Dense attention does not mind the order of tokens: dense blocks keep the layout of the nearest sparse
one, so 27 such moves are all that the released model makes.

With U the values of one tensor [B, S, N*D], e the share of a group's tokens that is not where its heads are computed,
and m the share of tokens that move between the two patterns, all ranks together send

    plain   32 blocks * 4 * (1 - 1/n) U                       q, k, v and the output of every block
    groups   4 blocks * 4 * (1 - 1/n) U + 28 * 4 e U + 27 m U

    ranks n      2      3      4      5      6      7      8
    e            0   0.17      0   0.32   0.44   0.53   0.50
    m         0.50   0.38   0.75   0.55   0.50   0.48   0.50
    plain, U    64   85.3     96  102.4  106.7  109.7    112
    groups, U 21.5   39.5   32.2   63.4   76.6   85.7   83.5

(`tests/test_skip_sparse_layout.py` counts this table, for 93x352x640.) Groups are cheaper for every n up to 24 and with
helpers too, so the sharded model always uses them. Heads of all groups are dealt out together: of 96, 7 ranks get 13 or
14 each, where they get 3 or 4 of the 24 heads of a dense block.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from pipelines.models.skip_sparse import DENSE, SkipSparse
from videopipe.partition import Partition, split_evenly


def held_patterns(patterns: Sequence[SkipSparse]) -> tuple[SkipSparse, ...]:
    """By which pattern the tokens lie over the ranks in each block.

    A sparse block wants its own; a dense one takes that of the sparse block before it, or else of the first one.
    """
    sparse = [pattern for pattern in patterns if pattern.kind != "dense"]
    current = sparse[0] if sparse else DENSE
    held = []
    for pattern in patterns:
        current = current if pattern.kind == "dense" else pattern
        held.append(current)
    return tuple(held)


@dataclass(frozen=True, kw_only=True)
class Held:
    """Which tokens each rank holds: `tokens[rank]` are indices in the sequence, group by group, ascending in each.

    `counts[group][rank]` says how many of each group.
    """

    tokens: tuple[Tensor, ...]
    counts: tuple[tuple[int, ...], ...]

    @property
    def totals(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        return tuple(len(tokens) for tokens in self.tokens)


def held_tokens(pattern: SkipSparse, num_tokens: int, ranks: int) -> Held:
    """The tokens of each rank in blocks that lie by `pattern`: about S/n each, of as few groups as that allows.

    The layouts of the two sparse patterns are made together, so that a rank keeps many of its tokens between them.
    """
    if pattern.kind == "dense":
        counts = split_evenly(num_tokens, ranks)
        return Held(tokens=torch.arange(num_tokens).split(counts), counts=(counts,))
    single, group = (SkipSparse(kind=kind, k=pattern.k) for kind in ("single", "group"))
    ids = torch.arange(num_tokens)
    group_ids = {p: p.group_of(ids) for p in (single, group)}
    counts_of = {p: _deal(torch.bincount(group_ids[p], minlength=p.k).tolist(), _shares(p, ranks)) for p in group_ids}
    left = {p: [list(counts) for counts in counts_of[p]] for p in group_ids}
    owner = {p: torch.full((num_tokens,), -1) for p in group_ids}
    for rank in range(ranks):  # what a rank can hold in both layouts
        for a in range(pattern.k):
            for b in range(pattern.k):
                take = min(left[single][a][rank], left[group][b][rank])
                if take:
                    cell = (owner[single] < 0) & (group_ids[single] == a) & (group_ids[group] == b)
                    chosen = cell.nonzero().flatten()[:take]
                    owner[single][chosen] = owner[group][chosen] = rank
                    left[single][a][rank] -= len(chosen)
                    left[group][b][rank] -= len(chosen)
    mine, home = owner[pattern], group_ids[pattern]
    for g in range(pattern.k):  # the rest, wherever there is room
        rest = ((mine < 0) & (home == g)).nonzero().flatten()
        mine[rest] = torch.arange(ranks).repeat_interleave(torch.tensor(left[pattern][g]))
    held = [(mine == rank).nonzero().flatten() for rank in range(ranks)]
    by_group = tuple(tokens[torch.argsort(home[tokens], stable=True)] for tokens in held)
    return Held(tokens=by_group, counts=counts_of[pattern])


def head_counts(
    pattern: SkipSparse, heads: int, ranks: int, helpers: Sequence[Fraction] = ()
) -> tuple[tuple[int, ...], ...]:
    """Heads [group][member] that each member computes: about k * N / (n + m) in all, and where the tokens are.

    Args:
        helpers: the last members, who hold no tokens and take the same share of every group: how much of what a rank
            computes; 1 for equal shares.
    """
    shares = [[*[share * ranks for share in row], *helpers] for row in _shares(pattern, ranks)]
    return _deal([heads] * pattern.groups, shares)


def _shares(pattern: SkipSparse, ranks: int) -> list[list[Fraction]]:
    """The share of each group that falls to each rank, [group][rank]; a rank has k / n in all."""
    k = pattern.groups
    of_rank, of_group = [Fraction(k, ranks)] * ranks, [Fraction(1)] * k
    shares = [[Fraction(0)] * ranks for _ in range(k)]

    def give(rank: int, group: int) -> None:
        amount = min(of_rank[rank], of_group[group])
        shares[group][rank] += amount
        of_rank[rank] -= amount
        of_group[group] -= amount

    if ranks < k:  # whole groups to each rank
        for group in range(k // ranks * ranks):
            give(group // (k // ranks), group)
    else:  # whole ranks to each group, any two of them to different pairs of a "single" and a "group" group
        each = ranks // k
        for rank in range(each * k):
            give(rank, rank % k if pattern.kind == "group" else rank // each)
    for rank in range(ranks):  # what does not come out even
        for group in range(k):
            give(rank, group)
    return shares


def _deal(totals: Sequence[int], shares: Sequence[Sequence[Fraction]]) -> tuple[tuple[int, ...], ...]:
    """Each total in whole numbers as the shares say; who was given too little gets the next one left over."""
    owed = [Fraction(0)] * len(shares[0])
    dealt = []
    for total, row in zip(totals, shares, strict=True):
        exact = [total * share / sum(row) for share in row]
        counts = [int(value) for value in exact]
        owed = [debt + value - count for debt, value, count in zip(owed, exact, counts, strict=True)]
        for _ in range(total - sum(counts)):
            member = max((m for m, share in enumerate(row) if share), key=lambda m: owed[m])
            counts[member] += 1
            owed[member] -= 1
        dealt.append(tuple(counts))
    return tuple(dealt)


@dataclass(frozen=True, kw_only=True)
class Move:
    """What one rank sends and receives when the layout changes; the form of an all-to-all along the token axis.

    `send_order` picks the rank's own rows in the order of receivers, `send_counts` rows for each; the received rows,
    in the order of senders, `receive_counts` from each, are then picked by `receive_order`.
    """

    send_order: Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    receive_order: Tensor

    def to(self, device: torch.device) -> "Move":
        """The same with its indices on `device`."""
        return replace(self, send_order=self.send_order.to(device), receive_order=self.receive_order.to(device))


def move_between(before: Held, after: Held, rank: int) -> Move:
    """How `rank` gets from its tokens of one layout to those of another."""
    total, ranks = sum(before.totals), len(before.tokens)
    old_rank, new_rank, old_row, new_row = (torch.empty(total, dtype=torch.long) for _ in range(4))
    for r, (old, new) in enumerate(zip(before.tokens, after.tokens, strict=True)):
        old_rank[old], new_rank[new] = r, r
        old_row[old], new_row[new] = torch.arange(len(old)), torch.arange(len(new))
    # each pair of ranks passes its rows in the order in which the receiver holds them
    mine = before.tokens[rank]
    outgoing = mine[torch.argsort(new_rank[mine] * total + new_row[mine])]
    wanted = after.tokens[rank]
    incoming = wanted[torch.argsort(old_rank[wanted] * total + new_row[wanted])]
    return Move(
        send_order=old_row[outgoing],
        send_counts=tuple(torch.bincount(new_rank[mine], minlength=ranks).tolist()),
        receive_counts=tuple(torch.bincount(old_rank[wanted], minlength=ranks).tolist()),
        receive_order=torch.argsort(new_row[incoming]),
    )


def sent_values(
    patterns: Sequence[SkipSparse],
    num_tokens: int,
    *,
    ranks: int,
    member: int,
    heads: int,
    head_dim: int,
    helpers: int = 0,
    out_values: int = 0,
) -> int:
    """Values that `member` sends to others in one evaluation, for one row of the batch.

    Members from `ranks` on are helpers. `out_values`: of each token of the prediction, which returns to those who hold
    it in the first block.
    """
    held = held_patterns(patterns)
    layouts = {pattern: held_tokens(pattern, num_tokens, ranks) for pattern in set(held)}
    total = 0
    for (pattern, lies), layers in Counter(zip(patterns, held, strict=True)).items():
        tokens = (layouts[lies].totals,) if pattern.kind == "dense" else layouts[lies].counts
        dealt = head_counts(pattern, heads, ranks, [Fraction(1)] * helpers)
        for group_tokens, group_heads in zip(tokens, dealt, strict=True):
            partition = Partition((*group_tokens, *[0] * helpers), group_heads)
            sent = 3 * partition.to_heads_bytes(member, 1, head_dim, 1)
            total += layers * (sent + partition.to_tokens_bytes(member, 1, head_dim, 1))
    if member < ranks:
        values = Counter({(held[-1], held[0]): out_values})
        for change in pairwise(held):
            values[change] += heads * head_dim
        for (before, after), of_a_token in values.items():
            if before != after:
                counts = move_between(layouts[before], layouts[after], member).send_counts
                total += (sum(counts) - counts[member]) * of_a_token
    return total
