"""PipeSP hides what can be hidden: on a simulated clock, exactly and without measuring any time.

The schedules are those of the real strategy; only the clock, the link and what computing takes are simulated. The twins
wait too early, or send in an order in which the first chunk waits for everything.
"""

import dataclasses
import json
import os
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

from dit_group.kernels import sdpa
from dit_group.ulysses import early_chunks
from tests.ranks import leave, run_ranks
from tools.bench_overlap import (
    Case,
    EmulatedLink,
    Layer,
    SimulatedClock,
    Variant,
    ideal,
    num_exchanges,
    simulate,
    variants,
    well_ordered,
)
from videopipe import exchange
from videopipe.exchange import PendingExchange
from videopipe.runtime import Runtime

CASE = Case(
    ranks=4,
    helpers=0,
    heads=24,
    head_dim=8,
    video=240,
    text=16,
    repetitions=1,
    link_mbit=3.0,
    latency_ms=0.5,
    head_ms=66.0,
    projection_ms=20.0,
    compute="fixed",
)


def ratio(case: Case, variant: Variant) -> float:
    """Seconds of a layer over the ideal's."""
    return simulate(case, variant)[0] / ideal(case, variant, case.head_ms / 1e3, case.projection_ms / 1e3).total_s


@pytest.mark.parametrize("projection_ms", [1, 10, 40, 90, 200])
def test_a_layer_takes_the_ideal_time_within_a_tenth(projection_ms: float) -> None:
    for head_ms, heads, chunk in product((4, 16, 33, 66, 130, 270), (24, 26), (1, 2, 3)):
        case = dataclasses.replace(CASE, head_ms=head_ms, heads=heads, projection_ms=projection_ms)
        found = ratio(case, well_ordered(case, Variant(name="", chunk=chunk)))
        assert 1 - 1e-9 <= found <= 1.1, (head_ms, heads, chunk, found)
        assert ratio(case, Variant(name="plain")) == pytest.approx(1.0)


def test_the_ideal_is_never_beaten() -> None:
    for heads, head_ms, projection_ms in product((24, 26, 27), (4, 40, 400), (0, 20, 200)):
        case = dataclasses.replace(CASE, heads=heads, head_ms=head_ms, projection_ms=projection_ms)
        for variant in variants(case):
            assert ratio(case, variant) >= 1 - 1e-9, (heads, head_ms, projection_ms, variant)


def test_leftover_heads_by_rows_are_within_a_tenth_as_well() -> None:
    for heads, chunk in product((25, 26, 27), (None, 1, 2)):
        case = dataclasses.replace(CASE, heads=heads)
        assert ratio(case, well_ordered(case, Variant(name="", balance="rows", chunk=chunk))) <= 1.1, (heads, chunk)


def test_the_next_chunk_travels_while_one_computes() -> None:
    """Of each chunk but the first, v, k and q arrive while an earlier one computes, and outputs but the last leave."""
    _, layer = simulate(CASE, Variant(name="", chunk=1, early=1))
    chunks, spans = 6, layer.link.spans
    assert len(layer.computed) == chunks and len(spans) == 4 * chunks
    inputs, outputs = spans[: 3 * chunks], spans[3 * chunks :]
    for index in range(1, chunks):
        arriving, busy = inputs[3 * index : 3 * index + 3], layer.computed[index - 1]
        assert all(span.start < busy.end for span in arriving), "sent when the chunk before it had been computed"
    assert all(first.end == second.start for first, second in pairwise(layer.computed)), "no chunk waits for the link"
    for index in range(chunks - 1):
        assert outputs[index].start < layer.computed[-1].end, "an output left after all computing"


class WaitsAtOnce(PendingExchange):
    """The twin: every exchange is waited for as soon as it has begun."""

    def __init__(self, work, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        work.wait()
        super().__init__(None, *args, **kwargs)


def test_waiting_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = Variant(name="", chunk=1, early=1)
    assert ratio(CASE, variant) <= 1.01
    monkeypatch.setattr(exchange, "PendingExchange", WaitsAtOnce)
    assert ratio(CASE, variant) > 1.5
    assert ratio(CASE, Variant(name="plain")) > 1.04  # v and k no longer hide under projections


def test_sending_all_v_and_k_before_any_q_is_noticed() -> None:
    assert ratio(CASE, Variant(name="", chunk=1, early=6)) > 1.3


def test_chunks_that_leave_early_are_as_many_as_the_link_carries_under_projections() -> None:
    assert [early_chunks(6, projection_s, 1.0) for projection_s in (0, 0.1, 0.5, 0.99, 5)] == [1, 1, 3, 6, 6]
    assert early_chunks(4, 1.0, 0.0) == 4


# -- the emulated link between real ranks


def check_link(runtime: Runtime, folder: str) -> None:
    """It moves what the group moves, and all members agree on when that ends."""
    case = dataclasses.replace(CASE, ranks=runtime.world_size, compute="real", video=19, text=2)
    for index, variant in enumerate((Variant(name="plain"), Variant(name="", chunk=1, early=1))):
        shape = (num_exchanges(case, 1), runtime.world_size, 2)
        size = shape[0] * shape[1] * shape[2]
        calls = torch.from_file(f"{folder}/{index}", shared=True, size=size, dtype=torch.float64)
        clock = SimulatedClock()
        clock.wait_until(1.0 + 0.1 * runtime.rank)  # some call later than others
        link = EmulatedLink(runtime.exchange_group, runtime.rank, calls.view(shape), clock, 1e6, 0.01)
        attention = Layer(case, variant, runtime.rank, link, clock).attention
        counts = attention.token_counts
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn((1, 21, 24, 8), generator=generator) for _ in range(3))
        own = slice(sum(counts[: runtime.rank]), sum(counts[: runtime.rank + 1]))
        assert torch.equal(attention(q[:, own], k[:, own], v[:, own]), sdpa(q, k, v, None)[:, own])
        slowest = 1.0 + 0.1 * (runtime.world_size - 1)
        assert link.spans[0].start == pytest.approx(slowest)
        assert link.spans[0].end - link.spans[0].start > 0.01
        assert all(first.end <= second.start for first, second in pairwise(link.spans)), "one after the other"
        ends = torch.tensor([link.spans[-1].end, -link.spans[-1].end], dtype=torch.float64)
        torch.distributed.all_reduce(ends, op=torch.distributed.ReduceOp.MAX, group=runtime.peers)
        assert float(ends[0]) == -float(ends[1]), "members disagree"
    leave(runtime)


def test_an_emulated_link_moves_tensors_and_all_members_agree_on_the_time(tmp_path: Path) -> None:
    run_ranks(check_link, 3, str(tmp_path))


@pytest.mark.slow
def test_the_chooser_runs_behind_a_link(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    sizes = "--ranks 2 --heads 3 --head-ms 5 --projection-ms 2 --link-mbit 3 --repetitions 3 --video 30 --budget-s 1"
    command = [sys.executable, "-m", "tools.bench_auto", *sizes.split(), "--output", str(tmp_path / "out.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    [row] = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(row["plain_s"]) == len(row["chosen_s"]) == 3 and row["chosen"]["helpers"] == []


def test_it_runs_on_real_ranks(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    sizes = "--ranks 2 --helpers 1 --heads 3 --head-ms 1 --projection-ms 1 --link-mbit 100 --repetitions 2 --video 30"
    command = [sys.executable, "-m", "tools.bench_overlap", *sizes.split(), "--output", str(tmp_path / "out.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["schedule"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert {"plain", "rows", "co-processing, 1 helpers"} <= set(rows)
    assert all(row["ratio"] >= 1 for row in rows.values())  # nothing is faster than the ideal
