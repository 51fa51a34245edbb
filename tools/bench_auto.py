"""Whether `auto` ever loses to the plain way: the real chooser on real gloo ranks behind emulated links.

`python -m tools.bench_auto --ranks 4` measures and chooses as a run does before its first clip
(`dit_group.calibrate.calibrate`), for one link after the other, then times the choice and the plain way in turn.
Computing takes a fixed time per head and per projection, and links are those of `tools.bench_overlap`.
"""

import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, cast

import msgspec
import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed import FileStore

from dit_group.attention import SequenceParallel
from dit_group.calibrate import calibrate
from dit_group.stopwatch import Stopwatch
from tools.bench_attention import commit, on_ranks
from tools.bench_overlap import EmulatedLink, WallClock
from videopipe.arrangement import Arrangement, Guidance, Rules, Shape
from videopipe.files import write_bytes
from videopipe.runtime import end_runtime, start_runtime

MAX_EXCHANGES = 200_000


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of the layer, the links, and what computing takes; travels to the ranks."""

    ranks: int
    heads: int
    head_dim: int
    video: int
    text: int
    repetitions: int
    links_mbit: tuple[float, ...]
    latency_ms: float
    head_ms: float
    projection_ms: float
    budget_s: float


class WaitingPart:
    """A layer that waits where it would compute; see `dit_group.workload.Part`."""

    def __init__(self, case: Case, parallel: SequenceParallel) -> None:
        self._case = case
        self._parallel = parallel

    @property
    def parallel(self) -> SequenceParallel:
        """This rank's place in the DiT group."""
        return self._parallel

    @property
    def branches_as_rows(self) -> bool:
        """There is one branch."""
        return False

    def views(self, guidance: Guidance) -> tuple[SequenceParallel, ...]:
        """The group."""
        return (self._parallel,)

    @property
    def layer_kinds(self) -> tuple[tuple[int, int], ...]:
        """One kind."""
        return ((0, 1),)

    def layer(self, index: int, shape: Shape) -> Callable[[], object]:
        """Prepare to run it on this member's tokens, in the layout then in use."""
        case, parallel = self._case, self._parallel
        x = torch.zeros(shape.rows, parallel.sequence.counts[parallel.member], case.heads, case.head_dim)

        def run() -> object:
            call = parallel.begin(self._attend)
            for send in (call.value, call.key, call.query):
                time.sleep(case.projection_ms / 1e3)
                send(x)
            call.attend()
            out = call.output()
            time.sleep(case.projection_ms / 1e3)
            return out

        return run

    def laid_out(self, way: Arrangement, shape: Shape) -> Callable[[], object]:
        """The layer with its heads moved in this way."""
        layout = self._parallel.lay_out_as(way, shape.num_video, shape.num_text)
        self._parallel.use(layout)
        layer = self.layer(0, shape)

        def run() -> object:
            self._parallel.use(layout)
            return layer()

        return run

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        share = q.shape[2] * q.shape[1] / k.shape[1]  # whole heads; query rows count as a part of one
        time.sleep(share * self._case.head_ms / 1e3)
        return torch.zeros_like(q)


@dataclass(frozen=True, kw_only=True)
class Found:
    """Of one link: what was chosen, and the slowest rank's seconds of the plain way and of the choice, by round."""

    link_mbit: float
    chosen: Arrangement
    plain_s: tuple[float, ...]
    chosen_s: tuple[float, ...]

    @property
    def speeds(self) -> list[float]:
        """Of the choice to the plain way, sorted: above 1 is faster."""
        return sorted(plain / chosen for plain, chosen in zip(self.plain_s, self.chosen_s, strict=True))


@torch.no_grad()
def be_rank(rank: int, case: Case, folder: str, results: "multiprocessing.Queue[list[Found]]") -> None:
    """Choose for every link, then time the choice; rank 0 sends what was found."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    runtime = start_runtime(
        rank=rank,
        world_size=case.ranks,
        dit_ranks=tuple(range(case.ranks)),
        device=device,
        store=FileStore(str(Path(folder) / "store"), case.ranks),
    )
    watch = Stopwatch(runtime.exchange_group, case.ranks, device)
    rules = Rules(num_heads=case.heads, members=case.ranks, choose_chunks=True, balance=None)
    shape = Shape(num_video=case.video, num_text=case.text)
    found = []
    for link_mbit in case.links_mbit:
        size = (MAX_EXCHANGES, case.ranks, 2)
        path = str(Path(folder) / f"{link_mbit:g}")
        calls = torch.from_file(path, shared=True, size=math.prod(size), dtype=torch.float64).view(size)
        link = EmulatedLink(
            runtime.exchange_group, rank, calls, WallClock(), link_mbit * 1e6 / 8, case.latency_ms / 1e3
        )
        parallel = SequenceParallel(
            group=cast(dist.ProcessGroup, link), member=rank, members=case.ranks, num_heads=case.heads
        )
        part = WaitingPart(case, parallel)
        chosen = calibrate(part, runtime, shape, rules, case.budget_s).chosen[0]
        runs = [[part.laid_out(way, shape)] for way in (rules.plain, chosen)]
        seconds = watch.time(runs, case.repetitions).amax(dim=0)[..., 0]  # [rounds, ways]
        plain_s, chosen_s = (tuple(way) for way in seconds.T.tolist())
        found.append(Found(link_mbit=link_mbit, chosen=chosen, plain_s=plain_s, chosen_s=chosen_s))
    if rank == 0:
        results.put(found)
    end_runtime(runtime)


def main(
    output: Annotated[Path, typer.Option(help="JSON file for the figures")] = Path("out/bench_auto.json"),
    ranks: Annotated[int, typer.Option(help="DiT ranks")] = 4,
    heads: Annotated[int, typer.Option(help="attention heads")] = 26,
    head_dim: Annotated[int, typer.Option(help="channels of a head")] = 8,
    video: Annotated[int, typer.Option(help="video tokens")] = 240,
    text: Annotated[int, typer.Option(help="text tokens")] = 16,
    repetitions: Annotated[int, typer.Option(help="counted runs of the plain way and of the choice")] = 10,
    link_mbit: Annotated[list[float], typer.Option(help="Mbit/s of each rank's link; several times for several")] = [  # noqa: B006
        1000.0,
        30.0,
        15.0,
        8.0,
    ],
    latency_ms: Annotated[float, typer.Option(help="of each exchange")] = 1.0,
    head_ms: Annotated[float, typer.Option(help="attention of one head")] = 12.0,
    projection_ms: Annotated[float, typer.Option(help="one of the projections of v, k, q and the output")] = 8.0,
    budget_s: Annotated[float, typer.Option(help="seconds to measure for one link where a layer takes 50 ms")] = 8.0,
) -> None:
    """Measure, print a table, write JSON."""
    case = Case(
        ranks=ranks,
        heads=heads,
        head_dim=head_dim,
        video=video,
        text=text,
        repetitions=repetitions,
        links_mbit=tuple(link_mbit),
        latency_ms=latency_ms,
        head_ms=head_ms,
        projection_ms=projection_ms,
        budget_s=budget_s,
    )
    found: list[Found] = on_ranks(be_rank, ranks, case)
    table = Table(
        title=f"one layer, {ranks} ranks, {heads} heads, {head_ms:g} ms a head, {projection_ms:g} ms projected"
    )
    for column in ("link Mbit/s", "chosen", "plain ms", "auto ms", "speed of auto to plain", "p10", "p90"):
        table.add_column(column, justify="left" if column == "chosen" else "right")
    rows = []
    for one in found:
        speeds = one.speeds
        low, high = speeds[int(0.1 * len(speeds))], speeds[min(int(0.9 * len(speeds)), len(speeds) - 1)]
        medians = [f"{statistics.median(seconds) * 1e3:.0f}" for seconds in (one.plain_s, one.chosen_s)]
        shares = [f"{speed:.3f}" for speed in (statistics.median(speeds), low, high)]
        table.add_row(f"{one.link_mbit:g}", one.chosen.describe(), *medians, *shares)
        rows.append({**asdict(one), "chosen": msgspec.to_builtins(one.chosen), "speed": statistics.median(speeds)})
    Console().print(table)
    record = {"command": " ".join(sys.argv), "commit": commit(), "case": asdict(case), "rows": rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output, json.dumps(record, indent=2).encode())


if __name__ == "__main__":
    typer.run(main)
