"""How much of an attention layer's communication shows: seconds of a layer behind an emulated link, against the ideal.

`python -m tools.bench_overlap --ranks 4` starts gloo ranks that exchange real tensors, and lets each exchange end only
when a link of fixed bandwidth and latency would have carried it. Computing takes a fixed time per head and per
projection (the rank waits), so that what is measured is the schedule, and not how ranks contend for two cores; with
`--compute real` it is the real kernel, whose time per head is measured in the same run. No privileges are needed.
`--simulate` runs the same code in one process on a simulated clock: exact, in no time.

The ideal is max(compute, communication) + fill. Compute: projections and the attention of the rank with most heads.
Communication: all transfers of the layer one after the other. Fill, what the busier of the two must wait for: where
computing takes longer, the first chunk's tensors as far as no projection hides them, and the last chunk's output; where
the link does, projections before which it has nothing to carry and the last one, and the last chunk's attention as
far as no other output hides it.

The link: an exchange begins when every member has called it and the one before has ended, and takes its latency and
the time of the most bytes that a member sends or receives.
"""

import json
import math
import multiprocessing
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, Protocol, cast

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed import FileStore

from dit_group.kernels import Kernel, sdpa
from dit_group.ulysses import Ulysses, early_chunks
from tools.bench_attention import commit, on_ranks
from videopipe.arrangement import Balance
from videopipe.files import write_bytes
from videopipe.partition import JointSequence
from videopipe.runtime import end_runtime, start_runtime
from videopipe.scheduler import helper_sets


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of the layer, the link, and what computing takes; travels to the ranks."""

    ranks: int
    helpers: int
    heads: int
    head_dim: int
    video: int
    text: int
    repetitions: int
    link_mbit: float
    latency_ms: float
    head_ms: float
    projection_ms: float
    compute: Literal["fixed", "real"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One schedule of a layer."""

    name: str
    chunk: int | None = None
    early: int | None = None
    balance: Balance = "heads"
    helpers: int = 0


def variants(case: Case) -> list[Variant]:
    """All schedules that these sizes allow; the first one is the plain path."""
    rows = [Variant(name="plain")]
    for chunk in range(1, -(-case.heads // case.ranks)):
        name = f"{chunk} heads a chunk"
        rows.append(well_ordered(case, Variant(name=name, chunk=chunk)))
        rows.append(Variant(name=f"{name}, all v and k first", chunk=chunk, early=case.heads))
    if case.heads % case.ranks:
        rows.append(Variant(name="rows", balance="rows"))
        rows.append(well_ordered(case, Variant(name="rows, 1 head a chunk", balance="rows", chunk=1)))
    for count in range(1, case.helpers + 1):
        name = f"co-processing, {count} helpers"
        rows.append(Variant(name=name, helpers=count))
        rows.append(well_ordered(case, Variant(name=f"{name}, 1 head a chunk", helpers=count, chunk=1)))
    return rows


def well_ordered(case: Case, variant: Variant) -> Variant:
    """The variant with as many chunks of v and k leaving at once as suits the link and what computing takes."""
    if case.compute == "real":
        return variant  # that is not known before the run
    plan = make_plan(case, variant, 0, idle_link(case), sdpa)
    seconds = sum(there for there, _ in transfers(case, plan))
    return replace(variant, early=early_chunks(len(plan.chunks), case.projection_ms / 1e3, seconds))


# -- time


class Clock(Protocol):
    """Tells the time and lets it pass."""

    def now(self) -> float:
        """Seconds."""

    def wait_until(self, moment: float) -> None:
        """Returns at `moment`, or at once where that is past."""


class WallClock:
    """The machine's monotonic clock, which all processes share."""

    def now(self) -> float:
        return time.monotonic()

    def wait_until(self, moment: float) -> None:
        time.sleep(max(moment - time.monotonic(), 0.0))


class SimulatedClock:
    """Time passes only while somebody waits."""

    def __init__(self) -> None:
        self.time = 1.0

    def now(self) -> float:
        return self.time

    def wait_until(self, moment: float) -> None:
        self.time = max(self.time, moment)


# -- the link


@dataclass
class Span:
    """When something began and ended."""

    start: float
    end: float


class EmulatedLink:
    """Stands where a process group does in an exchange: the group's own all-to-all, ending as late as behind a link.

    Args:
        inner: moves the tensors; None for a simulation of members that all do the same at the same time.
        calls: float64 [exchanges, members, 2] in memory that all members share, zero at first: when a member called,
            and how long its bytes take.
    """

    def __init__(
        self,
        inner: dist.ProcessGroup | None,
        member: int,
        calls: Tensor,
        clock: Clock,
        bytes_per_s: float,
        latency_s: float,
    ) -> None:
        self._inner = inner
        self._member = member
        self._calls = calls
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._started = 0
        self.spans: list[Span] = []

    def all_to_all_single(
        self, received: Tensor, sent: Tensor, arriving: list[int], leaving: list[int], options: dist.AllToAllOptions
    ) -> "EmulatedWork":
        """What `torch.distributed.all_to_all_single` calls of a group."""
        foreign = [sum(n for peer, n in enumerate(sizes) if peer != self._member) for sizes in (arriving, leaving)]
        own = self._calls[self._started, self._member]
        own[1] = max(foreign) * sent.element_size() / self._bytes_per_s
        own[0] = self._clock.now()  # last: it tells the others that this row may be read
        work = None
        if self._inner is not None:
            work = dist.all_to_all_single(received, sent, arriving, leaving, group=self._inner, async_op=True)
        self._started += 1
        return EmulatedWork(self, self._started - 1, work)

    alltoall_base = all_to_all_single  # its name in older versions of torch

    def finish(self, index: int) -> None:
        """Return when the link has carried exchange `index`."""
        while len(self.spans) <= index:
            calls = self._calls[len(self.spans)]
            while not bool((calls[:, 0] > 0).all()):
                time.sleep(5e-5)
            free = self.spans[-1].end if self.spans else 0.0
            start = max(float(calls[:, 0].max()), free)
            self.spans.append(Span(start, start + self._latency_s + float(calls[:, 1].max())))
        self._clock.wait_until(self.spans[index].end)


class EmulatedWork:
    """An exchange on an emulated link."""

    def __init__(self, link: EmulatedLink, index: int, inner: dist.Work | None) -> None:
        self._link = link
        self._index = index
        self._inner = inner

    def wait(self) -> bool:
        """As `torch.distributed.Work.wait`."""
        if self._inner is not None:
            self._inner.wait()
        self._link.finish(self._index)
        return True


# -- a layer


def make_plan(case: Case, variant: Variant, member: int, link: EmulatedLink, kernel: Kernel) -> Ulysses:
    """The attention of one member."""
    sequence = JointSequence.even(case.video, case.text, case.ranks)
    return Ulysses(
        group=cast(dist.ProcessGroup, link),  # all that an exchange asks of its group is the all-to-all
        member=member,
        token_counts=(*sequence.counts, *(0 for _ in range(variant.helpers))),
        num_heads=case.heads,
        kernel=kernel,
        key_mask=None,
        heads_per_chunk=variant.chunk,
        balance=variant.balance,
        early_chunks=variant.early,
    )


def make_link(case: Case, member: int, calls: Tensor, clock: Clock, inner: dist.ProcessGroup | None) -> EmulatedLink:
    """The link of one variant."""
    return EmulatedLink(inner, member, calls, clock, case.link_mbit * 1e6 / 8, case.latency_ms / 1e3)


def idle_link(case: Case) -> EmulatedLink:
    """A link on which nothing travels, for plans that are only looked at."""
    return make_link(case, 0, torch.empty(0), SimulatedClock(), None)


@dataclass
class Layer:
    """One member's projections, attention and output projection. `computed` is when it computed heads."""

    case: Case
    variant: Variant
    member: int
    link: EmulatedLink
    clock: Clock
    computed: list[Span] = field(default_factory=list)
    projected: list[Span] = field(default_factory=list)

    def __post_init__(self) -> None:
        case = self.case
        self.attention = make_plan(case, self.variant, self.member, self.link, self._attend)
        generator = torch.Generator().manual_seed(self.member)
        self._tokens = torch.randn(
            (1, self.attention.token_counts[self.member], case.heads, case.head_dim), generator=generator
        )
        width = case.heads * case.head_dim if case.compute == "real" else 0
        self._weight = torch.randn((width, width), generator=generator) / max(width, 1) ** 0.5

    def __call__(self) -> Tensor:
        """Run the layer once; a helper has no tokens to project."""
        call = self.attention.begin()
        for send in (call.value, call.key, call.query):
            send(self._project(self._tokens))
        call.attend()
        return self._project(call.output())

    def _project(self, x: Tensor) -> Tensor:
        if not x.shape[1]:
            return x
        start = self.clock.now()
        if self.case.compute == "real":
            x = (x.flatten(2) @ self._weight).unflatten(2, (self.case.heads, -1))
        else:
            self.clock.wait_until(start + self.case.projection_ms / 1e3)
        self.projected.append(Span(start, self.clock.now()))
        return x

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        start = self.clock.now()
        share = q.shape[2] * q.shape[1] / k.shape[1]  # whole heads; query rows count as a part of one
        out = sdpa(q, k, v, key_mask) if self.case.compute == "real" else torch.zeros_like(q)
        if self.case.compute == "fixed":
            self.clock.wait_until(start + share * self.case.head_ms / 1e3)
        self.computed.append(Span(start, self.clock.now()))
        return out


# -- the ideal


@dataclass(frozen=True, kw_only=True)
class Ideal:
    """Seconds of a layer whose computing and communication overlap as far as its data allow."""

    compute_s: float
    communication_s: float
    total_s: float


def ideal(case: Case, variant: Variant, head_s: float, projection_s: float) -> Ideal:
    """See the head of this file.

    Args:
        head_s: attention of one head over all queries.
        projection_s: one of the four projections.
    """
    plan = make_plan(case, variant, 0, idle_link(case), sdpa)
    counts, members = plan.token_counts, len(plan.token_counts)
    partitions = [exchange.partition for _, exchange in plan.chunks]
    there, back = zip(*transfers(case, plan), strict=True)
    shared, gathers, rows_s = plan.shared_heads.stop - plan.shared_heads.start, 0.0, 0.0
    if shared:
        away = [max(count * (members - 1), sum(counts) - count) * shared for count in counts]
        gathers = 2 * transfer_s(case, max(away))
        rows_s = max(counts) / sum(counts) * shared * head_s
    busiest = max(sum(p.head_counts[member] for p in partitions) for member in range(members))
    compute_s = 4 * projection_s + busiest * head_s + rows_s
    communication_s = 3 * sum(there) + sum(back) + gathers
    last_s = max(partitions[-1].head_counts) * head_s
    computing = compute_s + max(there[0], 3 * there[0] - 2 * projection_s) + max(back[-1] - rows_s, 0.0)
    # before the link can carry v, k, q there are one, two, three projections, and the others' share of it is past
    unprojected = max((i + 1) * projection_s - i * (sum(there) + gathers / 2) for i in range(3))
    sending = communication_s + unprojected + projection_s + max(last_s + back[-1] - sum(back) - gathers, 0.0)
    return Ideal(compute_s=compute_s, communication_s=communication_s, total_s=max(computing, sending))


def transfers(case: Case, plan: Ulysses) -> list[tuple[float, float]]:
    """For each chunk, the seconds in which one of its tensors arrives, and its output leaves."""
    found = []
    for _, exchange in plan.chunks:
        p, members = exchange.partition, range(len(plan.token_counts))
        tokens_away = [p.token_counts[m] * (p.num_heads - p.head_counts[m]) for m in members]
        heads_away = [p.head_counts[m] * (p.num_tokens - p.token_counts[m]) for m in members]
        seconds = transfer_s(case, max(*tokens_away, *heads_away))  # one way out and the other way in, at once
        found.append((seconds, seconds))
    return found


def transfer_s(case: Case, rows: int) -> float:
    """Seconds until the link has carried so many rows of one head in float32."""
    return case.latency_ms / 1e3 + rows * case.head_dim * 4 * 8 / (case.link_mbit * 1e6)


# -- runs


def num_exchanges(case: Case, layers: int) -> int:
    """At least as many as so many layers make."""
    return layers * (4 * case.heads + 4)


def simulate(case: Case, variant: Variant) -> tuple[float, Layer]:
    """Seconds of one layer on a simulated clock, and the layer with its spans."""
    clock = SimulatedClock()
    calls = torch.zeros((num_exchanges(case, 1), 1, 2), dtype=torch.float64)
    layer = Layer(case, variant, 0, make_link(case, 0, calls, clock, None), clock)
    start = clock.now()
    layer()
    return clock.now() - start, layer


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What rank 0 sends: the slowest rank's seconds for each variant, and the medians of its own computing."""

    seconds: dict[str, list[float]]
    head_s: float
    projection_s: float


def be_rank(rank: int, case: Case, folder: str, results: "multiprocessing.Queue[Measured]") -> None:
    """Time every variant in turn, `repetitions` times."""
    torch.set_num_threads(1)
    world, clock = case.ranks + case.helpers, WallClock()
    runtime = start_runtime(
        rank=rank,
        world_size=world,
        dit_ranks=tuple(range(case.ranks)),
        device=torch.device("cpu"),
        store=FileStore(str(Path(folder) / "store"), world),
        helper_sets=helper_sets(range(case.ranks, world)),
    )
    layers: dict[str, Layer | None] = {}
    for index, variant in enumerate(variants(case)):
        lent = tuple(range(case.ranks, case.ranks + variant.helpers))
        members = case.ranks + variant.helpers
        shape = (num_exchanges(case, case.repetitions + 1), members, 2)
        calls = torch.from_file(str(Path(folder) / str(index)), shared=True, size=math.prod(shape), dtype=torch.float64)
        group = runtime.assist_groups.get(lent) if lent else runtime.exchange_group
        layers[variant.name] = None
        if rank < members:
            link = make_link(case, rank, calls.view(shape), clock, group)
            layers[variant.name] = Layer(case, variant, rank, link, clock)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    with torch.no_grad():
        for repetition in range(-1, case.repetitions):
            order = list(layers.items())
            for name, layer in order if repetition % 2 else reversed(order):
                dist.barrier(group=runtime.peers)
                start = clock.now()
                if layer is not None:
                    layer()
                slowest = torch.tensor([clock.now() - start], dtype=torch.float64)
                dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=runtime.peers)
                if repetition >= 0:
                    seconds[name].append(float(slowest))
    if rank == 0:
        plain = layers["plain"]
        assert plain is not None
        heads = -(-case.heads // case.ranks)
        head_s = statistics.median(span.end - span.start for span in plain.computed) / heads
        projection_s = statistics.median(span.end - span.start for span in plain.projected)
        results.put(Measured(seconds=seconds, head_s=head_s, projection_s=projection_s))
    end_runtime(runtime)


def main(
    output: Annotated[Path, typer.Option(help="JSON file for the figures")] = Path("out/bench_overlap.json"),
    ranks: Annotated[int, typer.Option(help="DiT ranks")] = 4,
    helpers: Annotated[int, typer.Option(help="VAE ranks that may be lent")] = 0,
    heads: Annotated[int, typer.Option(help="attention heads")] = 24,
    head_dim: Annotated[int, typer.Option(help="channels of a head")] = 8,
    video: Annotated[int, typer.Option(help="video tokens")] = 240,
    text: Annotated[int, typer.Option(help="text tokens")] = 16,
    repetitions: Annotated[int, typer.Option(help="counted runs of each variant")] = 10,
    link_mbit: Annotated[float, typer.Option(help="Mbit/s of each rank's emulated link, in either direction")] = 3.0,
    latency_ms: Annotated[float, typer.Option(help="of each exchange")] = 1.0,
    head_ms: Annotated[float, typer.Option(help="attention of one head")] = 66.0,
    projection_ms: Annotated[float, typer.Option(help="one of the projections of v, k, q and the output")] = 20.0,
    compute: Annotated[Literal["fixed", "real"], typer.Option(help="wait so long, or compute with SDPA")] = "fixed",
    simulated: Annotated[bool, typer.Option("--simulate", help="on a simulated clock, in this process")] = False,
) -> None:
    """Measure, print a table, write JSON."""
    if simulated and (helpers or compute == "real"):
        raise typer.BadParameter("--simulate is for members that do the same: --helpers 0 and --compute fixed")
    case = Case(
        ranks=ranks,
        helpers=helpers,
        heads=heads,
        head_dim=head_dim,
        video=video,
        text=text,
        repetitions=repetitions,
        link_mbit=link_mbit,
        latency_ms=latency_ms,
        head_ms=head_ms,
        projection_ms=projection_ms,
        compute=compute,
    )
    head_s, projection_s = head_ms / 1e3, projection_ms / 1e3
    if simulated:
        seconds = {variant.name: [simulate(case, variant)[0]] for variant in variants(case)}
    else:
        found: Measured = on_ranks(be_rank, ranks + helpers, case)
        seconds = found.seconds
        if compute == "real":
            head_s, projection_s = found.head_s, found.projection_s
    title = f"one layer, {ranks} ranks, {heads} heads, link {link_mbit:g} Mbit/s + {latency_ms:g} ms, {compute} compute"
    table = Table(title=f"{title}: {head_s * 1e3:.1f} ms a head, {projection_s * 1e3:.1f} ms a projection")
    for column in ("schedule", "compute", "link", "ideal", "measured ms", "measured / ideal", "p10", "p90"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    rows = []
    for variant in variants(case):
        best = ideal(case, variant, head_s, projection_s)
        times = seconds[variant.name]
        ratios = sorted(t / best.total_s for t in times)
        row = {"schedule": variant.name, **asdict(best), "median_s": statistics.median(times)}
        row |= {"ratio": statistics.median(ratios), "p10": ratios[int(0.1 * len(ratios))]}
        row |= {"p90": ratios[min(int(0.9 * len(ratios)), len(ratios) - 1)]}
        rows.append(row)
        figures = (best.compute_s, best.communication_s, best.total_s, statistics.median(times))
        shares = (f"{row['ratio']:.3f}", f"{row['p10']:.3f}", f"{row['p90']:.3f}")
        table.add_row(variant.name, *(f"{figure * 1e3:.1f}" for figure in figures), *shares)
    Console().print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {"command": " ".join(sys.argv), "commit": commit(), "case": asdict(case), "rows": rows}
    write_bytes(output, json.dumps(record, indent=2).encode())


if __name__ == "__main__":
    typer.run(main)
