"""What one rank runs while ways to move heads are timed: a whole layer, or one part of it, for each kind of layer.

Where guidance has two branches, a layer is that of both (`videopipe.arrangement.Guidance`): a rank runs one after the
other, or both in turns, or as rows of one batch; with halves of the DiT group it runs that of its own half, and a
helper those of both.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol, runtime_checkable

import msgspec
import torch
from torch import Tensor

from dit_group.attention import Layout, SequenceParallel
from dit_group.call import TakenApart, Work, run_call
from dit_group.kernels import Kernel
from dit_group.stopwatch import Run
from videopipe.arrangement import Arrangement, Guidance, Shape
from videopipe.runtime import synchronize

LAYERS_IN_TURNS = 4
"""Of branches that take turns so many layers are run at once, one behind the other.

In the first one a helper has nothing to do while the first branch is projected, which happens once in a whole model.
"""


@runtime_checkable
class Part(Protocol):
    """What a rank's denoiser, or its assistant, offers to be timed and arranged, in families that can be."""

    @property
    def parallel(self) -> SequenceParallel | None:
        """Where layouts are taken into use; None where attention is not divided at all."""

    @property
    def branches_as_rows(self) -> bool:
        """Whether a pair of evaluations that does not take turns is one evaluation of two rows."""

    @property
    def layer_kinds(self) -> tuple[tuple[int, int], ...]:
        """An attention layer of each kind, and how many are like it; empty on helpers, which follow the leader."""

    def views(self, guidance: Guidance) -> Sequence[SequenceParallel]:
        """Who lays out evaluations that are guided so: one, but on a helper of two halves both of them."""

    def layer(self, index: int, shape: Shape) -> Run:
        """Prepare to run attention layer `index`, with what surrounds it on this rank, in the layout then in use.

        Args:
            shape: of one evaluation.
        """


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


class Workload:
    """What one member runs for a way.

    `projection_s`: for each kind, seconds of a projection of k or q; 0 on a helper, which projects nothing.

    Args:
        kinds: the layers of the leader.
        with_me: a way that this member takes part in.
    """

    def __init__(
        self, part: Part, shape: Shape, kinds: Sequence[tuple[int, int]], with_me: Arrangement, device: torch.device
    ) -> None:
        assert part.parallel is not None, "attention is not divided here"
        self._parallel = part.parallel
        self._views = part.views(shape.guidance)
        self._shape = shape
        self._device = device
        self._pair = shape.guidance == "pair"
        self._as_batch = self._pair and part.branches_as_rows
        self._layers: list[Run] = []
        self._batches: list[Run] = []  # the same with the rows of both branches
        self._kernels: list[Kernel | None] = []  # None is the configured one
        self._queries: list[Tensor] = []
        self.projection_s: list[float] = []
        for index, _ in kinds:
            still = _Still(device)
            self._parallel.use(replace(self._lay_out(with_me)[0], attention=still))
            self._layers.append(part.layer(index, shape))
            if self._as_batch:
                self._batches.append(part.layer(index, msgspec.structs.replace(shape, rows=2 * shape.rows)))
            for _ in range(2):  # the first one warms up
                self._layers[-1]()
            self.projection_s.append(min(still.projection_s, default=0.0))
            self._kernels.append(still.kernel)
            assert still.query is not None, "the layer has no attention"
            self._queries.append(still.query.contiguous())

    def nothing(self) -> list[Run | None]:
        """This member takes no part."""
        return [None] * len(self._layers)

    def layer(self, way: Arrangement) -> list[Run | None]:
        """The whole layer, of all branches that this member evaluates; or some layers, see `layers_in_a_run`."""
        return self._in(self._lay_out(way), way.in_turns or len(self._views) > 1, self.layers_in_a_run(way))

    def layers_in_a_run(self, way: Arrangement) -> int:
        """How many layers one run of `layer` has."""
        return LAYERS_IN_TURNS if way.in_turns else 1

    def linear(self) -> list[Run | None]:
        """The layer without attention and exchange."""
        layouts = self._lay_out(Arrangement())
        return self._in([replace(layout, attention=_Still(self._device)) for layout in layouts], False, 1)

    def attention(self, way: Arrangement) -> list[Run | None]:
        """The kernel alone, on this member's heads, chunk by chunk."""
        return self._computing(way, lambda plan, kernel: plan.own_work(kernel))

    def heads(self, count: int, way: Arrangement) -> list[Run | None]:
        """The kernel alone, on so many heads."""
        return self._computing(way, lambda plan, kernel: plan.work_of(count, kernel))

    def exchange(self, way: Arrangement) -> list[Run | None]:
        """The transfers alone."""
        plans = self._plans(way)

        def moving(kernel: Kernel | None, x: Tensor) -> Run:
            return lambda: [run_call(plan.transfers(kernel), x, x, x) for plan in plans]

        pairs = zip(self._kernels, self._queries, strict=True)
        return [moving(kernel, x) for kernel, x in pairs] if plans else self.nothing()

    def _computing(
        self, way: Arrangement, work_of: Callable[[TakenApart, Kernel | None], list[Work]]
    ) -> list[Run | None]:
        plans = self._plans(way)
        runs: list[Run | None] = []
        for kernel, query in zip(self._kernels, self._queries, strict=True):
            works = [work for plan in plans for work in work_of(plan, kernel)]
            runs.append(_computing(works, query) if works else None)
        return runs

    def _plans(self, way: Arrangement) -> list[TakenApart]:
        """How each evaluation's attention is divided; empty for a ring, which cannot be taken apart."""
        plans = [layout.attention for layout in self._lay_out(way)]
        return [plan for plan in plans if isinstance(plan, TakenApart)]

    def _lay_out(self, way: Arrangement) -> list[Layout]:
        """The sequence of each evaluation that this member takes part in."""
        found = [view.lay_out_as(way, self._shape.num_video, self._shape.num_text) for view in self._views]
        return found * 2 if self._pair else found

    def _in(self, layouts: Sequence[Layout], in_turns: bool, count: int) -> list[Run | None]:
        """So many layers in these layouts, in turns as `run_calls_in_turns` on a helper, or one after the other."""

        def use_and_run(layout: Layout, layer: Run) -> object:
            self._parallel.use(layout)
            return layer()

        if self._as_batch and not in_turns:
            return [partial(use_and_run, layouts[0], batch) for batch in self._batches]
        runs: list[Run | None] = []
        for layer in self._layers:
            chain = partial(_run_all, [layer] * count)
            each = [partial(use_and_run, layout, chain) for layout in layouts]
            runs.append(
                partial(self._parallel.in_turns, each, (), self._device) if in_turns else partial(_run_all, each)
            )
        return runs


def _run_all(runs: Sequence[Run]) -> None:
    for run in runs:
        run()


def _computing(works: Sequence[Work], like: Tensor) -> Run:
    """Calls of kernels on random numbers."""
    B, _, _, D = like.shape
    keys, heads = max(work.keys for work in works), max(work.heads for work in works)
    x = like.new_empty((B, keys, heads, D)).normal_()

    def run() -> None:
        for work in works:
            part = x[:, : work.keys, : work.heads].contiguous()
            work.kernel(part[:, : work.rows], part, part, None)

    return run
