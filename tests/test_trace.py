"""Spans and their overlap: exact against counting every moment, cheap, and readable by trace viewers."""

import json
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videopipe.trace import OpenSpan, Span, SpanRecorder, Trace, union_ns

S = 1_000_000_000


def span(stage: str, request: str | None, rank: int, start: float, end: float, step: int | None = None) -> Span:
    return Span(stage=stage, request=request, step=step, rank=rank, start_ns=round(start * S), end_ns=round(end * S))


def two_groups() -> Trace:
    """Rank 0 denoises a (0 to 4 s) and b (4 to 8 s); rank 1 decodes a (5 to 7 s) and b (9 to 10 s)."""
    trace = Trace({0: "dit", 1: "vae", 2: "spare"})
    trace.add(span("denoise", "a", 0, t, t + 1, step=t) for t in range(4))
    trace.add(span("denoise", "b", 0, t + 4, t + 5, step=t) for t in range(4))
    trace.add([span("decode", "a", 1, 5, 7), span("decode", "b", 1, 9, 10), span("idle", None, 1, 0, 5)])
    return trace


LENGTH = 24
some_spans = st.lists(
    st.builds(
        lambda stage, request, rank, start, length: Span(
            stage=stage, request=request, rank=rank, start_ns=start, end_ns=min(start + length, LENGTH)
        ),
        st.sampled_from(["denoise", "decode", "idle"]),
        st.sampled_from(["a", "b", "c", None]),
        st.integers(0, 3),
        st.integers(0, LENGTH - 1),
        st.integers(0, 8),
    ),
    max_size=14,
)


def brute_force_overlap(spans: list[Span], stage_a: str, stage_b: str, different_requests: bool) -> float:
    """Looks at every nanosecond, and there at every pair."""
    count = 0
    for moment in range(LENGTH):
        now = [s for s in spans if s.start_ns <= moment < s.end_ns]
        pairs = [(a, b) for a in now for b in now if a.stage == stage_a and b.stage == stage_b and a.rank != b.rank]
        if different_requests:
            pairs = [(a, b) for a, b in pairs if a.request and b.request and a.request != b.request]
        count += bool(pairs)
    return count / 1e9


@settings(max_examples=300, deadline=None, derandomize=True)
@given(some_spans, st.booleans(), st.sampled_from(["denoise", "decode"]))
def test_overlap_equals_looking_at_every_moment(spans: list[Span], different: bool, stage_b: str) -> None:
    trace = Trace()
    trace.add(spans)
    assert trace.overlap("denoise", stage_b, different) == brute_force_overlap(spans, "denoise", stage_b, different)
    assert trace.overlap(stage_b, "denoise", different) == trace.overlap("denoise", stage_b, different)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(some_spans)
def test_busy_and_idle_equal_looking_at_every_moment(spans: list[Span]) -> None:
    trace = Trace()
    trace.add(spans)
    moments = [[s for s in spans if s.start_ns <= t < s.end_ns] for t in range(LENGTH)]
    for stage in ("denoise", "decode"):
        for request in (None, "a"):
            busy = [len({s.rank for s in now if s.stage == stage and request in (None, s.request)}) for now in moments]
            assert trace.busy_seconds(stage, request) == sum(busy) / 1e9
    summary = trace.summary()
    wall = max((s.end_ns for s in spans), default=0) - min((s.start_ns for s in spans), default=0)
    assert summary.wall_s == wall / 1e9
    for rank, idle_s in summary.idle_s.items():
        working = sum(any(s.rank == rank and s.stage != "idle" for s in now) for now in moments)
        assert idle_s == (wall - working) / 1e9
    assert summary.overlap_share is None or 0 <= summary.overlap_share <= 1
    assert union_ns(spans) == sum(bool(now) for now in moments)


def test_sum_of_pairwise_overlaps_is_not_the_overlap() -> None:
    """The twin: two decoders beside one denoiser would be counted twice, touching steps not at all."""
    trace = two_groups()
    trace.add([span("decode", "c", 2, 5, 7)])
    pairs = [
        max(0, min(a.end_ns, b.end_ns) - max(a.start_ns, b.start_ns)) / S
        for a in trace.spans
        for b in trace.spans
        if (a.stage, b.stage) == ("denoise", "decode") and a.request != b.request
    ]
    assert sum(pairs) == 4.0
    assert trace.overlap("denoise", "decode") == 2.0


def test_the_same_request_or_rank_does_not_overlap_with_itself() -> None:
    trace = Trace()
    trace.add([span("denoise", "a", 0, 0, 4), span("decode", "a", 1, 2, 4), span("decode", "b", 0, 1, 3)])
    assert trace.overlap("denoise", "decode") == 0.0
    assert trace.overlap("denoise", "decode", different_requests=False) == 2.0


def test_summary_of_two_groups() -> None:
    summary = two_groups().summary()
    assert summary.wall_s == 10.0
    assert summary.denoise_decode_overlap_s == 2.0
    assert summary.decode_s == 3.0
    assert summary.overlap_share == pytest.approx(2 / 3)
    assert summary.idle_s == {0: 2.0, 1: 7.0, 2: 10.0}
    assert [(t.rank, t.stage, t.seconds) for t in summary.stages] == [
        (0, "denoise", 8.0),
        (1, "decode", 3.0),
        (1, "idle", 5.0),
    ]
    assert summary.render_text() == "\n".join(
        [
            "seconds         decode  denoise   idle  busy",
            "rank 0 (dit)         -     8.00   2.00   80%",
            "rank 1 (vae)      3.00        -   7.00   30%",
            "rank 2 (spare)       -        -  10.00    0%",
            "wall time 10.00 s",
            "decoding 3.00 s, of which 2.00 s (67%) while another request was denoised",
        ]
    )


def test_an_empty_trace_has_a_summary(tmp_path: Path) -> None:
    trace = Trace({0: "dit"})
    assert trace.summary().idle_s == {0: 0.0}
    assert "nothing was decoded" in trace.summary().render_text()
    assert len(json.loads(trace.write_chrome(tmp_path / "t.json").read_text())["traceEvents"]) == 3


def test_a_span_that_ends_before_it_starts_is_refused() -> None:
    trace = Trace()
    with pytest.raises(ValueError, match=r"end_ns=1000000000 of decode on rank 3 .*nearest is 2000000000"):
        trace.add([span("decode", "a", 0, 0, 1), span("decode", "a", 3, 2, 1)])
    assert not trace.spans


def test_chrome_trace_has_a_row_for_each_rank(tmp_path: Path) -> None:
    path = two_groups().write_chrome(tmp_path / "trace.json", run="demo")
    assert list(tmp_path.iterdir()) == [path]
    events = json.loads(path.read_text())["traceEvents"]
    names = {(e["tid"], e["name"]): e["args"] for e in events if e["ph"] == "M"}
    assert names[0, "process_name"] == {"name": "demo"}
    assert [names[r, "thread_name"]["name"] for r in range(3)] == ["rank 0 (dit)", "rank 1 (vae)", "rank 2 (spare)"]
    spans = [e for e in events if e["ph"] == "X"]
    assert {e["pid"] for e in events} == {0}
    assert min(e["ts"] for e in spans) == 0
    (decode,) = [e for e in spans if e["cat"] == "decode" and e["args"]["request"] == "b"]
    assert (decode["ts"], decode["dur"], decode["tid"], decode["name"]) == (9e6, 1e6, 1, "decode")
    assert [e["name"] for e in spans if e["tid"] == 0][:2] == ["denoise 0", "denoise 1"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(some_spans)
def test_spans_of_a_chrome_row_nest(tmp_path_factory: pytest.TempPathFactory, spans: list[Span]) -> None:
    trace = Trace()
    trace.add(spans)
    path = tmp_path_factory.mktemp("trace") / "t.json"
    drawn = [e for e in json.loads(trace.write_chrome(path).read_text())["traceEvents"] if e["ph"] == "X"]
    assert sorted(e["tid"] % 1_000_000 for e in drawn) == sorted(s.rank for s in spans)
    for i, a in enumerate(drawn):
        for b in drawn[i + 1 :]:
            if a["tid"] == b["tid"]:
                a_end, b_end = round(1000 * (a["ts"] + a["dur"])), round(1000 * (b["ts"] + b["dur"]))
                assert b_end <= a_end or a_end <= round(1000 * b["ts"])


def test_a_send_beside_a_step_gets_its_own_row(tmp_path: Path) -> None:
    trace = Trace({0: "dit"})
    trace.add([span("denoise", "b", 0, 0, 2, 0), span("send", "a", 0, 1, 3), span("denoise", "b", 0, 2, 4, 1)])
    trace.add([span("exchange", "b", 0, 2, 3)])  # inside the second step: stays in its row
    events = json.loads(trace.write_chrome(tmp_path / "t.json").read_text())["traceEvents"]
    assert {e["name"]: e["tid"] for e in events if e["ph"] == "X"} == {
        "denoise 0": 0,
        "send": 1_000_000,
        "denoise 1": 0,
        "exchange": 0,
    }
    labels = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert labels == ["rank 0 (dit)", "rank 0 (dit), beside"]


def test_recorder_gives_spans_in_the_order_they_end() -> None:
    recorder = SpanRecorder(rank=2)
    before = time.monotonic_ns()
    assert recorder.current() is None
    with recorder.span("denoise", request="a", step=4):
        with recorder.span("send", request="z"):
            inner = recorder.current()
        outer = recorder.current()
    assert recorder.current() is None
    assert isinstance(inner, OpenSpan)
    assert isinstance(outer, OpenSpan)
    assert (inner.stage, inner.request, inner.step) == ("send", "z", None)
    assert (outer.stage, outer.request, outer.step) == ("denoise", "a", 4)
    send, denoise = recorder.drain()
    assert (send.stage, denoise.stage, denoise.step, denoise.rank) == ("send", "denoise", 4, 2)
    assert before <= denoise.start_ns == outer.since_ns <= send.start_ns <= send.end_ns <= denoise.end_ns
    assert recorder.drain() == []


def test_a_block_that_raises_is_recorded_and_closed() -> None:
    recorder = SpanRecorder(rank=0)
    with pytest.raises(RuntimeError), recorder.span("decode", request="a"):
        raise RuntimeError
    assert recorder.current() is None
    assert [s.stage for s in recorder.drain()] == ["decode"]


def test_threads_lose_no_span_and_see_what_runs_now() -> None:
    recorder = SpanRecorder(rank=0)
    num_threads, num_spans = 4, 300
    start, drained = threading.Barrier(num_threads + 1), []

    def work(name: str) -> None:
        start.wait()
        for step in range(num_spans):
            with recorder.span("denoise", request=name, step=step):
                now = recorder.current()
                assert now is not None

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(num_threads)]
    for thread in threads:
        thread.start()
    start.wait()
    while any(thread.is_alive() for thread in threads):
        drained += recorder.drain()
    drained += recorder.drain()
    assert len({(s.request, s.step) for s in drained}) == len(drained) == num_threads * num_spans
    assert recorder.current() is None


def test_spans_that_end_in_another_order_close_the_right_one() -> None:
    recorder = SpanRecorder(rank=0)
    first, second = recorder.span("send", request="a"), recorder.span("denoise", request="b")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    now = recorder.current()
    assert now is not None
    assert now.stage == "denoise"  # a plain stack would have popped this one
    second.__exit__(None, None, None)
    assert recorder.current() is None


def test_a_span_costs_microseconds() -> None:
    recorder = SpanRecorder(rank=0)
    best = float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        for step in range(500):
            with recorder.span("denoise", request="a", step=step):
                pass
        best = min(best, (time.perf_counter() - begin) / 500)
        recorder.drain()
    assert best < 100e-6, f"{best * 1e6:.1f} us a span"  # the limit is loose: shared test machines stall
