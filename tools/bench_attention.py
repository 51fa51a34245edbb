"""One attention layer over a sharded sequence, every way to move heads, side by side: ratios to plain Ulysses.

`python -m tools.bench_attention --ranks 4 --helpers 1 --heads 24 --video 2304 --text 32` starts gloo ranks on the CPU
(`--device cuda`: NCCL, one GPU each) and times the same layer (projections of v, k, q, attention, output projection)
on the same tensors in turn: Ulysses, the same on fresh memory in every exchange, PipeSP with each chunk size, leftover
heads by query rows, ring, USP with each degree that divides the ranks, xfuser's exchange where yunchang is installed
and sizes divide, and attention co-processing with each number of helpers. Warm-up excluded; the slowest rank counts.
With one rank it shows what cutting attention into chunks of heads costs. A ratio below 1 is faster than plain Ulysses.
`--link-gbit 2` emulates a link of 2 Gbit/s between the ranks: transfers then take time and no processor, and can hide.
"""

import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed import FileStore

from dit_group.attention import STRATEGIES, Strategy
from dit_group.kernels import KERNELS
from videopipe.arrangement import Balance
from videopipe.exchange import Buffers
from videopipe.files import write_bytes
from videopipe.partition import JointSequence, Mesh
from videopipe.runtime import Runtime, end_runtime, start_runtime, synchronize
from videopipe.scheduler import helper_sets


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of the layer and how often it runs; travels to the ranks."""

    ranks: int
    helpers: int
    heads: int
    head_dim: int
    video: int
    text: int
    repetitions: int
    device: str
    exchange_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to move heads. `ulysses_degree` is that of a mesh, 0 for none; `fresh`: uses no memory again."""

    name: str
    strategy: str = "ulysses"
    chunk: int | None = None
    balance: Balance = "heads"
    helpers: int = 0
    ulysses_degree: int = 0
    fresh: bool = False


class FreshMemory(Buffers):
    """Forgets what it is given back, so that every exchange has new memory."""

    def give_back(self, flat: Tensor) -> None:
        """Let it go."""


def variants(case: Case) -> list[Variant]:
    """All that can run with these sizes; the first one is the reference."""
    ranks, heads, helpers = case.ranks, case.heads, case.helpers
    share = -(-heads // ranks)
    rows = [Variant(name="ulysses")]
    rows += [Variant(name=f"pipesp, {chunk} heads a chunk", chunk=chunk) for chunk in range(1, share) if chunk <= 6]
    if ranks > 1:
        rows += [Variant(name=f"{row.name}, fresh memory", chunk=row.chunk, fresh=True) for row in rows[:2]]
    if heads % ranks:
        rows.append(Variant(name="leftover heads by rows", balance="rows"))
        rows.append(Variant(name="leftover heads by rows, 1 head a chunk", balance="rows", chunk=1))
    if case.exchange_only:
        return rows
    if ranks > 1:
        rows.append(Variant(name="ring", strategy="ring"))
    for degree in range(2, ranks):
        if ranks % degree == 0:
            name = f"usp, {degree} divide heads, rings of {ranks // degree}"
            rows.append(Variant(name=name, strategy="usp", ulysses_degree=degree))
    even = not (case.video % ranks or case.text % ranks or heads % ranks)
    if ranks > 1 and even and importlib.util.find_spec("yunchang") is not None:
        rows.append(Variant(name="xfuser", strategy="xfuser"))
    for count in range(1, helpers + 1):
        rows.append(Variant(name=f"co-processing, {count} helpers", helpers=count))
        rows.append(Variant(name=f"co-processing, {count} helpers, 1 head a chunk", helpers=count, chunk=1))
    return rows


class Layer:
    """Projections, attention and output projection of one member's tokens, for one variant."""

    def __init__(self, case: Case, runtime: Runtime, variant: Variant, mesh: Mesh | None) -> None:
        self._runtime = runtime
        ranks, heads, dim = case.ranks, case.heads, case.head_dim
        self._heads = heads
        lent = tuple(range(ranks, ranks + variant.helpers))
        self.takes_part = runtime.rank < ranks or runtime.rank in lent
        sequence = JointSequence.even(case.video, case.text, ranks)
        counts = (*sequence.counts, *(0 for _ in lent))
        member = runtime.rank
        tokens = counts[member] if member < len(counts) else 0
        dtype = torch.bfloat16 if runtime.device.type == "cuda" else torch.float32
        generator = torch.Generator().manual_seed(0)
        width = heads * dim

        def weights(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(runtime.device, dtype) / shape[-1] ** 0.5

        projects = member < ranks and not case.exchange_only
        self._projections = [weights(width, width) for _ in range(4)] if projects else []
        self.tokens = weights(1, tokens, width) if member < ranks else torch.empty(1, 0, width)
        nothing = torch.empty((1, 0, heads, dim), dtype=dtype, device=runtime.device)
        self._heads_of_tokens = self.tokens.unflatten(2, (heads, dim)) if member < ranks else nothing
        self._attention: Strategy | None = None
        if self.takes_part:
            self._attention = STRATEGIES[variant.strategy](
                group=runtime.assist_groups[lent] if lent else runtime.exchange_group,
                member=member,
                token_counts=counts,
                num_heads=heads,
                kernel=pass_on if case.exchange_only else KERNELS["sdpa"],
                key_mask=None,
                heads_per_chunk=variant.chunk,
                balance=variant.balance,
                buffers=FreshMemory() if variant.fresh else None,
                **({"mesh": mesh} if variant.ulysses_degree else {}),
            )

    def __call__(self) -> Tensor:
        """Run the layer once; a helper takes its share of the heads."""
        assert self._attention is not None
        call = self._attention.begin()
        if not self._projections:
            for send in (call.value, call.key, call.query):
                send(self._heads_of_tokens)
            call.attend()
            return call.output()
        to_v, to_k, to_q, to_out = self._projections
        for send, weight in ((call.value, to_v), (call.key, to_k), (call.query, to_q)):
            send((self.tokens @ weight.T).unflatten(2, (self._heads, -1)))
        call.attend()
        return call.output().flatten(2) @ to_out.T


def pass_on(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """In the place of attention, where only what travels is of interest."""
    return q.clone()


def timed(run: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def on_ranks(target: Callable[..., None], count: int, case: Any) -> Any:
    """Run `target(rank, case, folder, results)` on so many processes; what one of them puts into the queue `results`.

    Raises:
        SystemExit: one of them failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=target, args=(rank, case, folder, results)) for rank in range(count)]
        for process in processes:
            process.start()
        while results.empty() and all(process.exitcode in (None, 0) for process in processes):
            time.sleep(0.05)
        if results.empty():
            raise SystemExit("a rank failed; its error is above")
        found = results.get()
        for process in processes:
            process.join()
    return found


def be_rank(rank: int, case: Case, folder: str, results: "multiprocessing.Queue[dict[str, list[float]]]") -> None:
    """Time every variant in turn, `repetitions` times; rank 0 sends the slowest rank's seconds."""
    torch.set_num_threads(1)
    ranks, helpers = case.ranks, case.helpers
    device = torch.device("cuda", rank) if case.device == "cuda" else torch.device("cpu")
    runtime = start_runtime(
        rank=rank,
        world_size=ranks + helpers,
        dit_ranks=tuple(range(ranks)),
        device=device,
        store=FileStore(str(Path(folder) / "store"), ranks + helpers),
        helper_sets=helper_sets(range(ranks, ranks + helpers)),
    )
    layers = {}
    for variant in variants(case):
        degree = variant.ulysses_degree
        mesh = Mesh(degree, ranks // degree) if degree else None
        layers[variant.name] = Layer(case, runtime, variant, mesh)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    repetitions = case.repetitions
    with torch.no_grad():
        for repetition in range(-2, repetitions):
            order = list(layers.items())
            for name, layer in order if repetition % 2 else reversed(order):
                if runtime.peers is not None:
                    dist.barrier(group=runtime.peers)
                mine = timed(layer, device) if layer.takes_part else 0.0
                slowest = torch.tensor([mine], dtype=torch.float64)
                if runtime.peers is not None:
                    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=runtime.peers)
                if repetition >= 0:
                    seconds[name].append(float(slowest))
    if rank == 0:
        results.put(seconds)
    end_runtime(runtime)


def run_behind_a_link(gbit: float) -> NoReturn:
    """Start this program again in a network namespace of its own, whose loopback carries so much and no more.

    Raises:
        SystemExit: with its exit status; a message where no namespace can be made.
    """
    if os.geteuid() != 0 or not all(shutil.which(name) for name in ("unshare", "ip", "tc")):
        raise SystemExit(f"--link-gbit={gbit:g} needs root and the programs unshare, ip and tc; nearest is 0")
    shape = f"ip link set lo up && tc qdisc add dev lo root tbf rate {gbit * 1000:.0f}mbit burst 512kb latency 2s"
    again = [sys.executable, "-m", "tools.bench_attention", *sys.argv[1:], "--link-gbit=0"]  # the last one counts
    command = ["unshare", "--net", "sh", "-c", f'{shape} && exec "$@"', "sh", *again]
    raise SystemExit(subprocess.run(command, check=False).returncode)


def commit() -> str:
    """The checkout's commit, for the record."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main(
    output: Annotated[Path, typer.Option(help="JSON file for the figures")] = Path("out/bench_attention.json"),
    ranks: Annotated[int, typer.Option(help="DiT ranks")] = 2,
    helpers: Annotated[int, typer.Option(help="VAE ranks that may be lent")] = 1,
    heads: Annotated[int, typer.Option(help="attention heads")] = 24,
    head_dim: Annotated[int, typer.Option(help="channels of a head")] = 32,
    video: Annotated[int, typer.Option(help="video tokens")] = 2304,
    text: Annotated[int, typer.Option(help="text tokens")] = 32,
    repetitions: Annotated[int, typer.Option(help="counted runs of each variant")] = 10,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="where the ranks run")] = "cpu",
    exchange_only: Annotated[bool, typer.Option(help="no projections and no attention, only what travels")] = False,
    link_gbit: Annotated[
        float, typer.Option(help="Gbit/s of an emulated link between the ranks (Linux, root); 0 for none")
    ] = 0.0,
) -> None:
    """Measure, print a table, write JSON."""
    if link_gbit:
        run_behind_a_link(link_gbit)
    case = Case(
        ranks=ranks,
        helpers=helpers,
        heads=heads,
        head_dim=head_dim,
        video=video,
        text=text,
        repetitions=repetitions,
        device=device,
        exchange_only=exchange_only,
    )
    seconds = on_ranks(be_rank, ranks + helpers, case)
    reference = next(iter(seconds.values()))
    table = Table(title=f"one layer, {video} + {text} tokens, {heads} heads x {head_dim}, {ranks} ranks, {device}")
    for column in ("variant", "median ms", "ratio to ulysses", "p10", "p90"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    rows = []
    for name, times in seconds.items():
        ratios = sorted(t / r for t, r in zip(times, reference, strict=True))
        row = {
            "variant": name,
            "median_s": statistics.median(times),
            "ratio": statistics.median(ratios),
            "p10": ratios[int(0.1 * len(ratios))],
            "p90": ratios[min(int(0.9 * len(ratios)), len(ratios) - 1)],
        }
        rows.append(row)
        figures = (f"{row['ratio']:.2f}", f"{row['p10']:.2f}", f"{row['p90']:.2f}")
        table.add_row(name, f"{statistics.median(times) * 1e3:.1f}", *figures)
    Console().print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {"command": " ".join(sys.argv), "commit": commit(), "case": asdict(case), "rows": rows}
    write_bytes(output, json.dumps(record, indent=2).encode())


if __name__ == "__main__":
    typer.run(main)
