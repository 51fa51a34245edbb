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

import msgspec
import torch
from torch import Tensor

from dit_group.stopwatch import Run, Stopwatch
from dit_group.ulysses import early_chunks
from dit_group.workload import Part, Workload
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
from videopipe.runtime import Runtime

MIN_ROUNDS, MAX_ROUNDS = 3, 9
PART_ROUNDS = 1
FULL_BUDGET_LAYER_S = 0.05
"""A shorter layer gets less than the given time, and a longer one more, in proportion, as its clips do."""

MOST_BUDGETS = 4
"""So many times the given time at most, for layers so much longer: else little could be tried where it matters most."""

ALIKE = 0.1
"""Helpers whose speeds differ by less stand for one another: of sets of the same size only the first is timed."""


@torch.no_grad()
def calibrate(part: Part, runtime: Runtime, shape: Shape, rules: Rules, budget_s: float) -> Calibration:
    """Time what `rules` leave open for this shape, and choose. Collective over DiT ranks and helpers.

    Args:
        part: the denoiser on DiT ranks, the assistant on helpers.
        budget_s: about how long it may take where a layer takes `FULL_BUDGET_LAYER_S`; after the plain way and a few
            others, less promising ones are left out.
    Returns:
        The same on every member.
    """
    return _Session(part, runtime, shape, rules, budget_s).calibrate()


def _rounds(budget_s: float, round_s: float) -> int:
    return min(max(int(budget_s / round_s), MIN_ROUNDS), MAX_ROUNDS)


class _Session:
    """One calibration on one member."""

    def __init__(self, part: Part, runtime: Runtime, shape: Shape, rules: Rules, budget_s: float) -> None:
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
        self._work = Workload(part, shape, kinds, with_me, runtime.device)
        self._timings: dict[Arrangement, Timing] = {}
        projection_s = torch.tensor(self._work.projection_s, dtype=torch.float64) @ self._weights
        self._projection_s = self._watch.agree(float(projection_s))
        self._evaluations = 2 if shape.guidance == "pair" else 1  # in what is timed, one after the other or in turns
        self._linear_s = 0.0
        self._transfer_s = 0.0  # of one of v, k and q, all heads; 0 where it is not known

    def calibrate(self) -> Calibration:
        """Measure and choose."""
        plain = self._rules.plain
        linear = self._work.nothing() if self._is_helper else self._work.linear()
        self._linear_s = self._median(self._watch.time([linear], PART_ROUNDS))[0]
        plain_s = self._seconds([plain], [self._layer(plain)], 2)[0][1]  # the first time warms up
        exchange = self._watch.time([self._taking_part(plain, self._work.exchange)], PART_ROUNDS)
        self._transfer_s = self._median(exchange)[0] / (4 * self._evaluations)  # v, k, q and the output
        self._budget_s *= min(MOST_BUDGETS, plain_s / FULL_BUDGET_LAYER_S)
        ways = (plain, *map(self._in_good_order, ways_without_helpers(self._rules)))
        timings = self._compare(ways, plain, self._budget_s / 3)
        alone = self._confirmed(fastest(timings[plain], list(timings.values())[1:]).arrangement, plain)
        chosen = (alone, *self._choose_helpers(alone)) if self._rules.helper_sets else (alone,)
        return Calibration(
            shape=self._shape,
            linear_s=self._linear_s,
            timings=tuple(self._timings.values()),
            chosen=chosen,
            seconds=self._watch.agree(time.perf_counter() - self._begin),
        )

    def _in_good_order(self, way: Arrangement) -> Arrangement:
        """As many chunks of v and k leave at once as the link carries under the projections, where that is known."""
        num_chunks = way.num_chunks(self._rules.num_heads, self._rules.members)
        if num_chunks < 2 or not self._transfer_s or self._rules.groups > 1:
            return way  # with groups of tokens there are other chunks in each layer
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
                speeds_of = [helper_s[helper] for helper in helpers]
                linear_s = self._linear_s / self._evaluations
                ways = ways_with_helpers(rules, alone, helpers, member_s, speeds_of, linear_s)
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
        round_s = sum(self._work.layers_in_a_run(way) for way in pair) * self._timings[reference].layer_s[0]
        seconds_of = self._seconds(pair, runs, _rounds(self._budget_s / 6, round_s * len(self._weights)))
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
                layers = self._work.layers_in_a_run(way) * len(self._weights)
                round_s += self._seconds([way], [runs[way]], 1)[0][0] * layers
        kept = list(runs)
        seconds_of = dict(zip(kept, self._seconds(kept, list(runs.values()), _rounds(budget_s, round_s)), strict=True))
        attention = self._watch.time([self._taking_part(way, self._work.attention) for way in kept], PART_ROUNDS)
        exchange = self._watch.time([self._taking_part(way, self._work.exchange) for way in kept], PART_ROUNDS)
        members, helpers = attention[: self._num_dit], attention[self._num_dit :]
        parts = zip(
            self._median(members),
            self._median(helpers) if len(helpers) else [0.0] * len(kept),
            self._median(exchange),
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
        """Seconds that each member's kernel takes for a head of an evaluation, while all of them compute.

        Of both, on a helper of two halves.
        """
        share = max(self._rules.num_heads // len(self._ranks), 1)
        way = Arrangement(helpers=self._ranks[self._num_dit :])
        seconds = self._watch.time([self._work.heads(share, way)], 3)[:, 1:]  # the first one warms up
        count = share * self._evaluations
        return [float(s) / count for s in (seconds[:, :, 0] @ self._weights).median(dim=1).values]

    def _seconds(
        self, ways: Sequence[Arrangement], runs: Sequence[Sequence[Run | None]], rounds: int
    ) -> list[tuple[float, ...]]:
        """Seconds of a mean layer on the slowest member, by way and round, where these are their runs."""
        layers = torch.tensor([self._work.layers_in_a_run(way) for way in ways])
        slowest = self._watch.time(runs, rounds).amax(dim=0) @ self._weights / layers  # [rounds, ways]
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
