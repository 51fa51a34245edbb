"""Times the ways to move heads on the ranks at hand: a few layers for each way, the real groups, kernel and blocks.

Every member of the DiT group and every helper calls `calibrate` at the same time, while nothing else runs. All of them
see the times of all, so each comes to the same next candidates without asking, and to the same choice.

A layer is a real block of the loaded DiT on random tokens, one for each kind of block, weighted by how many there are.
"linear" is such a block whose attention moves and computes nothing, "attention" the kernel alone on a member's heads,
"exchange" the same calls with a kernel that computes nothing, "assist" the kernel alone on a helper's heads. From the
time between two projections and that of the exchange follows how many chunks' v and k leave at once.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from dit_group.attention import Layout, SequenceParallel
from dit_group.call import run_call
from dit_group.kernels import Kernel
from dit_group.ulysses import Ulysses, early_chunks
from videopipe.arrangement import (
    Arrangement,
    Calibration,
    Rules,
    Shape,
    Timing,
    fastest,
    ways_with_helpers,
    ways_without_helpers,
)
from videopipe.runtime import Runtime, synchronize

MIN_ROUNDS, MAX_ROUNDS = 3, 9
PART_ROUNDS = 1
FULL_BUDGET_LAYER_S = 0.05
"""A shorter layer gets less than the given time, in proportion: its clips are done sooner, too."""

ALIKE = 0.1
"""Helpers whose speeds differ by less stand for one another: of sets of the same size only the first is timed."""

Run = Callable[[], object]


@runtime_checkable
class Part(Protocol):
    """What a rank's denoiser, or its assistant, offers to be timed and arranged, in families that can be."""

    @property
    def parallel(self) -> SequenceParallel | None:
        """This rank's place in the DiT group or beside it; None where attention is not divided at all."""

    @property
    def layer_kinds(self) -> tuple[tuple[int, int], ...]:
        """An attention layer of each kind, and how many are like it; empty on helpers, which follow the leader."""

    def layer(self, index: int, shape: Shape) -> Run:
        """Prepare to run attention layer `index`, with what surrounds it on this rank, in the layout then in use."""


@torch.no_grad()
def calibrate(part: Part, runtime: Runtime, shape: Shape, rules: Rules, budget_s: float) -> Calibration:
    """Time what `rules` leave open for this shape, and choose. Collective over DiT ranks and helpers.

    Args:
        part: the denoiser on DiT ranks, the assistant on helpers.
        budget_s: about how long it may take; after the plain way and a few others, less promising ones are left out.
    Returns:
        The same on every member.
    """
    return _Session(part, runtime, shape, rules, budget_s).calibrate()


class Stopwatch:
    """Times runs of all members in turn: every member knows every member's seconds afterwards.

    Args:
        group: all members; None for one alone.
        members: how many they are.
    """

    def __init__(self, group: dist.ProcessGroup | None, members: int, device: torch.device) -> None:
        self._group = group
        self._members = members
        self._device = device

    def time(self, runs: Sequence[Sequence[Run | None]], rounds: int) -> Tensor:
        """Run everything `rounds` times, in turn and in alternating order, all members together.

        Args:
            runs: by way and kind of layer; None where this member takes no part.
        Returns:
            Seconds, float64 [members, rounds, ways, kinds]; 0 where a member took no part.
        """
        seconds = torch.zeros((rounds, len(runs), len(runs[0])), dtype=torch.float64)
        for turn in range(rounds):
            order = list(enumerate(runs))
            for way, kinds in reversed(order) if turn % 2 else order:
                for kind, run in enumerate(kinds):
                    self._meet()
                    if run is None:
                        continue
                    synchronize(self._device)
                    begin = time.perf_counter()
                    run()
                    synchronize(self._device)
                    seconds[turn, way, kind] = time.perf_counter() - begin
        return self._share(seconds)

    def agree(self, seconds: float) -> float:
        """The largest of all members' numbers."""
        return float(self._share(torch.tensor([seconds], dtype=torch.float64)).max())

    def follow(self, table: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """The pairs of whole numbers that the first member has."""
        size = int(self._share(torch.tensor([len(table)]))[0])
        mine = torch.tensor(list(table) or [(0, 0)] * size)
        return [(int(a), int(b)) for a, b in self._share(mine)[0]]

    def _meet(self) -> None:
        if self._group is not None:
            dist.all_reduce(torch.zeros(1), group=self._group)  # on the host, also beside NCCL

    def _share(self, x: Tensor) -> Tensor:
        """[members, ...] of what each member has."""
        if self._group is None:
            return x.unsqueeze(0)
        parts = [torch.empty_like(x) for _ in range(self._members)]
        dist.all_gather(parts, x, group=self._group)
        return torch.stack(parts)


class _Still:
    """A strategy by which nothing travels and nothing is computed; it notes what the layer asked for, and when.

    `projection_s`: for each call the seconds until k or q is projected, norm and RoPE included.
    """

    def __init__(self, device: torch.device) -> None:
        self.kernel: Kernel | None = None
        self.query: Tensor | None = None
        self.device = device
        self.projection_s: list[float] = []

    def begin(self, kernel: Kernel | None = None) -> "_StillCall":
        """The call of one layer."""
        self.kernel = kernel
        return _StillCall(self)


class _StillCall:
    """Gives back the query."""

    def __init__(self, still: _Still) -> None:
        self._still = still
        self._begin = 0.0

    def value(self, v: Tensor) -> None:
        """Stays here."""
        synchronize(self._still.device)
        self._begin = time.perf_counter()

    def key(self, k: Tensor) -> None:
        """Stays here."""

    def query(self, q: Tensor) -> None:
        """Stays here."""
        synchronize(self._still.device)
        self._still.projection_s.append((time.perf_counter() - self._begin) / 2)
        self._still.query = q

    def attend(self) -> None:
        """Compute nothing."""

    def output(self) -> Tensor:
        """[B, S_local, N, D]."""
        assert self._still.query is not None, "query comes first"
        return self._still.query


class _Workload:
    """What one member runs for a way: the whole layer, or one part of it, for each kind of layer."""

    def __init__(
        self,
        part: Part,
        parallel: SequenceParallel,
        shape: Shape,
        kinds: Sequence[tuple[int, int]],
        with_me: Arrangement,
        device: torch.device,
    ) -> None:
        self._parallel = parallel
        self._shape = shape
        self._device = device
        self._layout = self._lay_out(with_me)
        self._layers: list[Run] = []
        self._kernels: list[Kernel | None] = []  # None is the configured one
        for index, _ in kinds:
            still = _Still(device)
            parallel.use(replace(self._layout, attention=still))
            self._layers.append(part.layer(index, shape))
            self._layers[-1]()
            self._kernels.append(still.kernel)
            assert still.query is not None, "the layer has no attention"
            self._query = still.query

    def nothing(self) -> list[Run | None]:
        """This member takes no part."""
        return [None] * len(self._layers)

    def layer(self, way: Arrangement) -> list[Run | None]:
        """The whole layer."""
        return self._in(self._lay_out(way))

    def linear(self) -> tuple[list[Run | None], list[float]]:
        """The layer without attention and exchange; the list gets the seconds of a projection with each run."""
        still = _Still(self._device)
        return self._in(replace(self._layout, attention=still)), still.projection_s

    def attention(self, way: Arrangement) -> list[Run | None]:
        """The kernel alone, on this member's heads, chunk by chunk."""
        plan = self._lay_out(way).attention
        if not isinstance(plan, Ulysses):  # a ring takes its parts from the whole layer only
            return self.nothing()
        heads = [exchange.partition.head_counts[plan.member] for _, exchange in plan.chunks]
        shared = plan.shared_heads.stop - plan.shared_heads.start
        return [self._heads(k or plan.kernel, heads, shared, plan.token_counts[plan.member]) for k in self._kernels]

    def heads(self, count: int, kernel_of: Arrangement) -> list[Run | None]:
        """The kernel alone, on so many heads."""
        plan = self._lay_out(kernel_of).attention
        if not isinstance(plan, Ulysses):
            return self.nothing()
        return [self._heads(kernel or plan.kernel, [count], 0, 0) for kernel in self._kernels]

    def exchange(self, way: Arrangement) -> list[Run | None]:
        """The transfers alone; once, they are the same for all kinds."""
        attention = self._lay_out(way).attention
        if not isinstance(attention, Ulysses):
            return self.nothing()
        x = self._query.contiguous()
        return [lambda: run_call(attention.begin(_identity), x, x, x), *self.nothing()[1:]]

    def _heads(self, kernel: Kernel, heads: Sequence[int], shared: int, rows: int) -> Run:
        B, _, _, D = self._query.shape
        q = self._query.new_ones((B, sum(self._layout.sequence.counts), max((*heads, shared, 1)), D)).normal_()

        def run() -> None:
            for count in heads:
                if count:
                    part = q[:, :, :count].contiguous()
                    kernel(part, part, part, None)
            if shared and rows:
                part = q[:, :, :shared].contiguous()
                kernel(part[:, :rows], part, part, None)

        return run

    def _lay_out(self, way: Arrangement) -> Layout:
        return self._parallel.lay_out_as(way, self._shape.num_video, self._shape.num_text)

    def _in(self, layout: Layout) -> list[Run | None]:
        def using(layer: Run) -> Run:
            def run() -> object:
                self._parallel.use(layout)
                return layer()

            return run

        return [using(layer) for layer in self._layers]


def _rounds(budget_s: float, round_s: float) -> int:
    return min(max(int(budget_s / round_s), MIN_ROUNDS), MAX_ROUNDS)


def _identity(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    return q


class _Session:
    """One calibration on one member."""

    def __init__(self, part: Part, runtime: Runtime, shape: Shape, rules: Rules, budget_s: float) -> None:
        assert part.parallel is not None, "attention is not divided here"
        self._shape = shape
        self._rules = rules
        self._begin = time.perf_counter()
        self._budget_s = budget_s
        helpers = tuple(sorted({helper for helpers in rules.helper_sets for helper in helpers}))
        self._ranks = (*runtime.dit_ranks, *helpers)  # in the order of the group's members
        self._num_dit = len(runtime.dit_ranks)
        self._rank = runtime.rank
        self._is_helper = runtime.dit_member is None
        group = runtime.assist_groups[helpers] if helpers else runtime.exchange_group
        self._watch = Stopwatch(group, len(self._ranks), runtime.device)
        kinds = self._watch.follow(part.layer_kinds)
        total = sum(count for _, count in kinds)
        self._weights = torch.tensor([count / total for _, count in kinds], dtype=torch.float64)
        with_me = Arrangement(helpers=helpers if self._is_helper else ())
        self._work = _Workload(part, part.parallel, shape, kinds, with_me, runtime.device)
        self._timings: dict[Arrangement, Timing] = {}
        self._projection_s = self._transfer_s = 0.0  # of one of v, k and q, all heads

    def calibrate(self) -> Calibration:
        """Measure and choose."""
        plain = self._rules.plain
        linear_s = self._time_linear()
        plain_s = self._seconds([self._layer(plain)], 2)[0][1]  # the first time warms up
        exchange = self._watch.time([self._taking_part(plain, self._work.exchange)], PART_ROUNDS)
        self._transfer_s = float(exchange[..., 0].amax()) / 4  # v, k, q and the output
        self._budget_s *= min(1.0, plain_s / FULL_BUDGET_LAYER_S)
        ways = (plain, *map(self._in_good_order, ways_without_helpers(self._rules)))
        timings = self._compare(ways, plain, self._budget_s / 3)
        alone = self._confirmed(fastest(timings[plain], list(timings.values())[1:]).arrangement, plain)
        chosen = (alone, *self._choose_helpers(alone)) if self._rules.helper_sets else (alone,)
        return Calibration(
            shape=self._shape,
            linear_s=linear_s,
            timings=tuple(self._timings.values()),
            chosen=chosen,
            seconds=self._watch.agree(time.perf_counter() - self._begin),
        )

    def _time_linear(self) -> float:
        """Seconds of a mean layer without attention and exchange; notes those of a projection."""
        linear, projections = (self._work.nothing(), []) if self._is_helper else self._work.linear()
        linear_s = self._median(self._watch.time([linear], PART_ROUNDS))[0]
        last = projections[-len(self._weights) :] or [0.0] * len(self._weights)
        self._projection_s = self._watch.agree(float(torch.tensor(last, dtype=torch.float64) @ self._weights))
        return linear_s

    def _in_good_order(self, way: Arrangement) -> Arrangement:
        """As many chunks of v and k leave at once as the link carries under the projections, where that is known."""
        num_chunks = way.num_chunks(self._rules.num_heads, self._rules.members)
        if num_chunks < 2 or not self._transfer_s:
            return way
        early = early_chunks(num_chunks, self._projection_s, self._transfer_s)
        return msgspec.structs.replace(way, early_chunks=early)

    def _choose_helpers(self, alone: Arrangement) -> list[Arrangement]:
        """The way to lend each set of helpers, the fastest set first; a set that does not pay is left out."""
        rules, speeds = self._rules, self._seconds_per_head()
        member_s = max(speeds[: self._num_dit])
        helper_s = dict(zip(self._ranks[self._num_dit :], speeds[self._num_dit :], strict=True))
        alike = max(helper_s.values()) <= (1 + ALIKE) * min(helper_s.values())
        timed: dict[tuple[int, ...] | int, tuple[float, Arrangement] | None] = {}
        found: list[tuple[float, Arrangement]] = []
        for helpers in sorted(rules.helper_sets, key=lambda helpers: (-len(helpers), helpers)):
            key = len(helpers) if alike else helpers
            if key not in timed:
                left = self._budget_s - self._watch.agree(time.perf_counter() - self._begin)
                if rules.choose_helpers and left <= 0:
                    continue  # what was not timed is not lent
                ways = ways_with_helpers(rules, alone, helpers, member_s, [helper_s[helper] for helper in helpers])
                timed[key] = self._choose_for(helpers, ways, alone, left / 2)
            best = timed[key]
            if best is not None:
                found.append((best[0], msgspec.structs.replace(best[1], helpers=helpers)))
        return [way for _, way in sorted(found, key=lambda item: item[0])]

    def _choose_for(
        self, helpers: tuple[int, ...], ways: Sequence[Arrangement], alone: Arrangement, budget_s: float
    ) -> tuple[float, Arrangement] | None:
        """The best way with these helpers and its ratio to the plain way without; None to lend none."""
        if not ways:
            return None
        reference = alone if self._rules.choose_helpers else ways[0]
        ordered = map(self._in_good_order, ways)
        timings = self._compare((self._rules.plain, reference, *ordered), reference, budget_s)
        candidates = [timing for way, timing in timings.items() if way.helpers and way != reference]
        best = self._confirmed(fastest(timings[reference], candidates).arrangement, reference)
        return (timings[best].ratio, best) if best.helpers else None

    def _confirmed(self, best: Arrangement, reference: Arrangement) -> Arrangement:
        """`best` if it is faster than `reference` in another measurement too: the best of many may be so by luck."""
        if best == reference:
            return reference
        pair = (reference, best)
        runs = [self._layer(way) for way in pair]
        round_s = 2 * self._timings[reference].layer_s[0] * len(self._weights)
        seconds_of = self._seconds(runs, _rounds(self._budget_s / 6, round_s))
        again = [Timing(arrangement=way, layer_s=s, ratios=()) for way, s in zip(pair, seconds_of, strict=True)]
        return fastest(again[0], again[1:]).arrangement

    def _compare(self, ways: Sequence[Arrangement], keep: Arrangement, budget_s: float) -> dict[Arrangement, Timing]:
        """Time these ways side by side, the plain one first: as many as the budget allows, `keep` and one more always.

        The first round does not count: it warms up, and shows what the others will cost.
        """
        ways = tuple(dict.fromkeys(ways))
        runs: dict[Arrangement, Sequence[Run | None]] = {}
        round_s = 0.0
        for index, way in enumerate(ways):
            if index < 2 or way == keep or (1 + MIN_ROUNDS) * round_s * (index + 1) / index < budget_s:
                runs[way] = self._layer(way)
                round_s += self._seconds([runs[way]], 1)[0][0] * len(self._weights)
        kept = list(runs)
        seconds_of = dict(zip(kept, self._seconds(list(runs.values()), _rounds(budget_s, round_s)), strict=True))
        attention = self._watch.time([self._taking_part(way, self._work.attention) for way in kept], PART_ROUNDS)
        exchange = self._watch.time([self._taking_part(way, self._work.exchange) for way in kept], PART_ROUNDS)
        members, helpers = attention[: self._num_dit], attention[self._num_dit :]
        parts = zip(
            self._median(members),
            self._median(helpers) if len(helpers) else [0.0] * len(kept),
            exchange[..., 0].amax(dim=0).median(dim=0).values.tolist(),
            strict=True,
        )
        timings = {}
        for way, (attention_s, assist_s, exchange_s) in zip(kept, parts, strict=True):
            pairs = zip(seconds_of[way], seconds_of[kept[0]], strict=True)
            timings[way] = Timing(
                arrangement=way,
                layer_s=seconds_of[way],
                ratios=tuple(mine / plain for mine, plain in pairs),
                attention_s=attention_s or None,
                exchange_s=exchange_s or None,
                assist_s=assist_s or None,
            )
        self._timings = timings | self._timings
        return timings

    def _seconds_per_head(self) -> list[float]:
        """Seconds that each member's kernel takes for a head, while all of them compute."""
        share = max(self._rules.num_heads // len(self._ranks), 1)
        way = Arrangement(helpers=self._ranks[self._num_dit :])
        seconds = self._watch.time([self._work.heads(share, way)], 3)[:, 1:]  # the first one warms up
        return [float(s) / share for s in (seconds[:, :, 0] @ self._weights).median(dim=1).values]

    def _seconds(self, runs: Sequence[Sequence[Run | None]], rounds: int) -> list[tuple[float, ...]]:
        """Seconds of a mean layer on the slowest member, by way and round."""
        slowest = self._watch.time(runs, rounds).amax(dim=0) @ self._weights  # [rounds, ways]
        return [tuple(row) for row in slowest.T.tolist()]

    def _median(self, seconds: Tensor) -> list[float]:
        """Of [members, rounds, ways, kinds]: the mean layer on the slowest member, by way."""
        return [float(s) for s in (seconds.amax(dim=0) @ self._weights).median(dim=0).values]

    def _layer(self, way: Arrangement) -> Sequence[Run | None]:
        return self._taking_part(way, self._work.layer)

    def _taking_part(
        self, way: Arrangement, runs: Callable[[Arrangement], Sequence[Run | None]]
    ) -> Sequence[Run | None]:
        return self._work.nothing() if self._is_helper and self._rank not in way.helpers else runs(way)
