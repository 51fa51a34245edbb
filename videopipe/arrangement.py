"""How the heads of a sequence are divided and travel: what can be tried, and what measurements choose. No torch.

What runs without a measurement is the plain way (`Rules.plain`). It is always a candidate, and another way takes its
place only where it was faster beyond the noise of the measurement.

Source: the parts are PipeDiT's (arXiv 2511.12056): PipeSP cuts heads into chunks, Aco lends idle VAE ranks. The paper
fixes one head a chunk and equal shares; here both are measured for each shape.
"""

import statistics
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from videopipe.partition import split_evenly

Balance = Literal["heads", "rows"]

TIE = 0.02
"""Less than this faster than the plain way counts as equal to it."""


Guidance = Literal["none", "halves", "pair"]
"""How the two branches of guidance are evaluated, as far as ways to move heads depend on it.

`halves`: by one half of the DiT group each, at the same time. `pair`: by the whole group, and they may take turns.
`none`: there is one evaluation, or two that follow each other.
"""


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes on which times depend: tokens of one sequence, and rows of the batch (B) of an evaluation."""

    num_video: int
    num_text: int
    rows: int = 1
    guidance: Guidance = "none"

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * (self.num_video + self.num_text)


class Arrangement(msgspec.Struct, frozen=True, kw_only=True):
    """How heads are divided among DiT ranks and `helpers`, and in which chunks they travel.

    `heads_per_chunk`, `balance`, `head_counts`, `helpers_first`, `early_chunks`: as for `dit_group.ulysses.Ulysses`;
    counts are of the DiT ranks in order, then of the helpers. `in_turns`: a pair of evaluations takes turns
    (`dit_group.ping_pong`).
    """

    helpers: tuple[int, ...] = ()
    heads_per_chunk: int | None = None
    balance: Balance = "heads"
    head_counts: tuple[int, ...] | None = None
    helpers_first: bool = False
    early_chunks: int | None = None
    in_turns: bool = False

    def num_chunks(self, num_heads: int, members: int) -> int:
        """Into how many chunks whole heads are cut among `members` DiT ranks and the helpers."""
        ranks = members + len(self.helpers)
        counts = self.head_counts
        if counts is None:
            counts = split_evenly(num_heads - num_heads % ranks if self.balance == "rows" else num_heads, ranks)
        lent_first = self.helpers_first and any(counts[members:])
        busiest = max(counts[:members] if lent_first else counts)
        return lent_first + (min(busiest, 1) if self.heads_per_chunk is None else -(-busiest // self.heads_per_chunk))

    def describe(self) -> str:
        """For people: `2 heads a chunk, leftover heads by rows, rank 7 helps with 3 heads`."""
        parts = ["all heads at once" if self.heads_per_chunk is None else f"{_heads(self.heads_per_chunk)} a chunk"]
        if self.balance == "rows":
            parts.append("leftover heads by rows")
        if self.helpers:
            counts = None if self.head_counts is None else self.head_counts[-len(self.helpers) :]
            shares = "equal shares" if counts is None else " + ".join(_heads(count) for count in counts)
            several = len(self.helpers) > 1
            ranks = ", ".join(map(str, self.helpers))
            parts.append(f"{'ranks' if several else 'rank'} {ranks} {'help' if several else 'helps'} with {shares}")
        if self.helpers_first:
            parts.append("theirs first")
        if self.early_chunks is not None:
            parts.append(f"v and k of {self.early_chunks} early")
        if self.in_turns:
            parts.append("branches in turns")
        return ", ".join(parts)


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What may be chosen, and what is given.

    `members` DiT ranks that divide the heads; `heads_per_chunk`, `balance` and `in_turns` where they are given, None
    where they are to be chosen (for the number of heads: `choose_chunks`); `helper_sets` VAE ranks that may be lent
    together, `choose_helpers` whether lending is to be chosen or given. `groups`: of tokens that sparse layers keep
    apart; a member has heads of few of them, and more of these.
    """

    num_heads: int
    members: int
    heads_per_chunk: int | None = None
    choose_chunks: bool = False
    balance: Balance | None = "heads"
    helper_sets: tuple[tuple[int, ...], ...] = ()
    choose_helpers: bool = False
    in_turns: bool | None = False
    groups: int = 1

    @property
    def plain(self) -> Arrangement:
        """Without a measurement: what is given, else all heads at once and whole heads."""
        return Arrangement(
            heads_per_chunk=self.heads_per_chunk, balance=self.balance or "heads", in_turns=bool(self.in_turns)
        )

    @property
    def is_open(self) -> bool:
        """Whether there is anything to choose."""
        return len(ways_without_helpers(self)) > 1 or (self.choose_helpers and bool(self.helper_sets))

    def without_choice(self) -> tuple[Arrangement, ...]:
        """What runs where nothing was measured: the plain way, and given helpers with equal shares."""
        lent = () if self.choose_helpers else self.helper_sets
        return (self.plain, *(msgspec.structs.replace(self.plain, helpers=helpers) for helpers in lent))


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """One way, timed. Seconds are those of the slowest rank in a mean layer.

    `ratios`: to the plain way, each run against the plain run of the same round. `attention_s` and `exchange_s` are
    the parts alone (median), and `assist_s` the helpers' attention alone; None where it was not taken apart.
    """

    arrangement: Arrangement
    layer_s: tuple[float, ...]
    ratios: tuple[float, ...]
    attention_s: float | None = None
    exchange_s: float | None = None
    assist_s: float | None = None

    @property
    def ratio(self) -> float:
        """The median one."""
        return statistics.median(self.ratios)


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured for one shape, and what follows from it.

    `chosen`: first the way without helpers, then those with the sets of helpers that pay, the fastest first.
    `linear_s`: seconds of a mean layer without its attention and its exchange. `seconds`: how long measuring took.
    """

    shape: Shape
    linear_s: float
    timings: tuple[Timing, ...]
    chosen: tuple[Arrangement, ...]
    seconds: float


# -- what can be tried


def ways_without_helpers(rules: Rules) -> tuple[Arrangement, ...]:
    """The plain way first, then all others worth a measurement, those in one piece before those in chunks.

    Chunk sizes are those that make 2, 3 and 4 chunks, and single heads. Branches in turns hide the exchanges by
    themselves, so they are tried in one piece where that is to be chosen.
    """
    plain, found = rules.plain, [rules.plain]
    balances: list[Balance] = ["heads", "rows"] if rules.balance is None and _has_leftover(rules) else [plain.balance]
    for balance in balances:
        share = rules.num_heads // rules.members if balance == "rows" else -(-rules.num_heads // rules.members)
        shares = {share}
        if rules.members > rules.groups > 1:  # ranks that share a group have more heads of it
            shares.add(-(-rules.num_heads * rules.groups // rules.members))
        sizes: list[int | None] = [plain.heads_per_chunk]
        if rules.choose_chunks and rules.members > 1:
            cuts = {
                size for most in shares for size in ({-(-most // chunks) for chunks in (2, 3, 4)} | {1}) if size < most
            }
            sizes += sorted(cuts, reverse=True)
        found += [msgspec.structs.replace(plain, heads_per_chunk=size, balance=balance) for size in sizes]
        if rules.in_turns is None:
            found.append(msgspec.structs.replace(plain, balance=balance, in_turns=True))
    return tuple(sorted(dict.fromkeys(found), key=lambda way: way.heads_per_chunk != plain.heads_per_chunk))


def ways_with_helpers(
    rules: Rules,
    alone: Arrangement,
    helpers: tuple[int, ...],
    member_s: float,
    helper_s: Sequence[float],
    linear_s: float = 0.0,
) -> tuple[Arrangement, ...]:
    """Ways to lend these helpers, the most promising ones first; none where no share of the heads could pay.

    Args:
        alone: the way chosen without helpers.
        member_s, helper_s: measured seconds of one head on a DiT rank, and on each of `helpers`.
        linear_s: those of one evaluation's layer without its attention.
    """
    chunked = dict.fromkeys((alone.heads_per_chunk, rules.plain.heads_per_chunk))
    if not rules.choose_helpers:  # lent in equal shares whatever is measured; only how heads travel is open
        sizes = (rules.plain.heads_per_chunk, *chunked)
        turns = (False, True) if rules.in_turns is None else (rules.in_turns,)
        return tuple(
            dict.fromkeys(
                Arrangement(helpers=helpers, heads_per_chunk=size, balance=balance, in_turns=in_turns)
                for in_turns in turns
                for balance in (rules.plain.balance, alone.balance)
                for size in sizes
            )
        )
    ways: list[Arrangement] = []
    if rules.in_turns is not True:
        best = share_heads(rules.num_heads, rules.members, member_s, helper_s)
        for counts in _shares_to_try(rules, best):
            for size in chunked if counts == best else (alone.heads_per_chunk,):
                ways += _lend(rules, alone, helpers, counts, heads_per_chunk=size)
                ways += _lend(rules, alone, helpers, counts, heads_per_chunk=size, helpers_first=True)
    if rules.in_turns is not False:  # helpers compute under the linear layers of the other branch as well
        best = share_heads(rules.num_heads, rules.members, member_s, helper_s, linear_s)
        for counts in _shares_to_try(rules, best):
            ways += _lend(rules, alone, helpers, counts, heads_per_chunk=rules.plain.heads_per_chunk, in_turns=True)
    return tuple(dict.fromkeys(ways))


def _shares_to_try(rules: Rules, best: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Heads of each helper: the best ones by the speeds, equal ones, one less, half; none where one helper has none.

    The set without that helper is there as well.
    """
    if 0 in best:
        return ()
    fewer, half = tuple(max(count - 1, 0) for count in best), tuple(count // 2 for count in best)
    equal = split_evenly(rules.num_heads, rules.members + len(best))[rules.members :]
    return tuple(dict.fromkeys((best, equal, fewer, half)))


def share_heads(
    num_heads: int, members: int, member_s: float, helper_s: Sequence[float], linear_s: float = 0.0
) -> tuple[int, ...]:
    """Heads of each helper so that all ranks finish at about the same time.

    A helper gets a head more as long as it then finishes before the DiT ranks do, which share the others evenly; a slow
    one may get none.

    Args:
        member_s, helper_s: seconds of one head on a DiT rank, and on each helper.
        linear_s: what else a DiT rank computes meanwhile; 0 to judge by attention alone.
    """
    counts = [0] * len(helper_s)
    while True:
        first = min(range(len(counts)), key=lambda helper: helper_s[helper] * (counts[helper] + 1))
        left = num_heads - sum(counts)
        if not left or helper_s[first] * (counts[first] + 1) >= member_s * left / members + linear_s:
            return tuple(counts)
        counts[first] += 1


def _lend(
    rules: Rules, alone: Arrangement, helpers: tuple[int, ...], counts: tuple[int, ...], **more: Any
) -> list[Arrangement]:
    """A way with so many heads for each helper, the others for the DiT ranks.

    None where that relieves no DiT rank, or where a helper would get nothing.
    """
    if 0 in counts:
        return []
    left = rules.num_heads - sum(counts)
    rows = rules.balance == "rows" or (rules.balance is None and left % rules.members > 0)
    own = (left // rules.members,) * rules.members if rows else split_evenly(left, rules.members)
    fine = rows or rules.groups > 1  # the heads of all groups are dealt out together
    busiest = left / rules.members if fine else max(own)
    before = rules.num_heads / rules.members
    if busiest >= (before if alone.balance == "rows" or rules.groups > 1 else -(-rules.num_heads // rules.members)):
        return []
    balance: Balance = "rows" if rows else "heads"
    return [Arrangement(helpers=helpers, balance=balance, head_counts=(*own, *counts), **more)]


def _has_leftover(rules: Rules) -> bool:
    return rules.num_heads % rules.members > 0


def _heads(count: int) -> str:
    return "1 head" if count == 1 else f"{count} heads"


# -- what measurements choose


def pays(ratios: Sequence[float]) -> bool:
    """Whether a way is faster beyond noise: by more than `TIE` in the median, and at all in three rounds of four.

    Args:
        ratios: its time to that of the way it would replace, both of the same round.
    """
    ordered = sorted(ratios)
    upper = ordered[int(0.75 * (len(ordered) - 1) + 0.5)]
    return statistics.median(ordered) <= 1 - TIE and upper < 1


def fastest(reference: Timing, candidates: Sequence[Timing]) -> Timing:
    """The candidate that is fastest beyond noise, `reference` where none is.

    Of candidates within `TIE` of the fastest the earliest counts, so list simple ones first.

    Args:
        reference, candidates: timed in the same rounds.
    """
    winners = [timing for timing in candidates if pays(relative(timing, reference))]
    if not winners:
        return reference
    best = min(statistics.median(relative(timing, reference)) for timing in winners)
    return next(t for t in winners if statistics.median(relative(t, reference)) <= best + TIE)


def relative(timing: Timing, reference: Timing) -> tuple[float, ...]:
    """The time of one way to that of another, round by round."""
    return tuple(mine / other for mine, other in zip(timing.layer_s, reference.layer_s, strict=True))
