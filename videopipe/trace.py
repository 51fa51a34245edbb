"""Who did what when: spans of every rank, how stages overlap, and a trace that browsers show.

Times are nanoseconds of the host's monotonic clock, which all processes of one host share. Spans of another host must
be moved to this host's clock before they are added.
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import msgspec

from videopipe.files import write_bytes
from videopipe.records import StageTime

IDLE = "idle"
ENGINE_RANK = -1  # the process of the caller, which writes files: it has spans, and is no rank


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """One rank was in one stage from `start_ns` to `end_ns`.

    `stage` is a word such as "load", "encode", "denoise", "finish", "send", "receive", "decode", "write" or "idle";
    `request` and `step` say for what, where that has a meaning.
    """

    stage: str
    request: str | None = None
    step: int | None = None
    rank: int
    start_ns: int
    end_ns: int


class OpenSpan(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank is doing now, and since when."""

    stage: str
    request: str | None = None
    step: int | None = None
    since_ns: int


class SpanRecorder:
    """Collects the spans of one rank, from any of its threads.

    ```
    with recorder.span("denoise", request="fox", step=3):
        ...
    ```
    A span is recorded also when its block raises. Spans may nest.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._lock = threading.Lock()
        self._open: list[OpenSpan] = []
        self._done: list[Span] = []
        self.failed: OpenSpan | None = None  # the innermost span that an error left first

    def span(self, stage: str, *, request: str | None = None, step: int | None = None) -> "SpanBlock":
        """A block to time; it begins where the `with` begins."""
        return SpanBlock(self, stage, request, step)

    def drain(self) -> list[Span]:
        """The spans that ended since the last call, in the order they ended."""
        with self._lock:
            done, self._done = self._done, []
        return done

    def current(self) -> OpenSpan | None:
        """The span begun last of those that have not ended, None between spans. Safe from another thread."""
        with self._lock:
            return self._open[-1] if self._open else None

    def _begin(self, span: OpenSpan) -> None:
        with self._lock:
            self._open.append(span)

    def _end(self, begun: OpenSpan, span: Span) -> None:
        with self._lock:
            # by identity: two threads may hold equal spans, and they need not end in the order they began
            for index in range(len(self._open) - 1, -1, -1):
                if self._open[index] is begun:
                    del self._open[index]
                    break
            self._done.append(span)


class SpanBlock:
    """The context manager that `SpanRecorder.span` gives; enter it once."""

    __slots__ = ("_begun", "_recorder", "_request", "_stage", "_step")

    def __init__(self, recorder: SpanRecorder, stage: str, request: str | None, step: int | None) -> None:
        self._recorder = recorder
        self._stage = stage
        self._request = request
        self._step = step

    def __enter__(self) -> None:
        self._begun = OpenSpan(stage=self._stage, request=self._request, step=self._step, since_ns=time.monotonic_ns())
        self._recorder._begin(self._begun)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        begun = self._begun
        if error is not None and self._recorder.failed is None:
            self._recorder.failed = begun
        span = Span(
            stage=begun.stage,
            request=begun.request,
            step=begun.step,
            rank=self._recorder.rank,
            start_ns=begun.since_ns,
            end_ns=time.monotonic_ns(),
        )
        self._recorder._end(begun, span)


class OverlapSummary(msgspec.Struct, frozen=True, kw_only=True):
    """How well the ranks were used.

    Attributes:
        wall_s: from the first begin to the last end.
        stages: seconds by stage and rank, sorted by rank and then stage.
        denoise_decode_overlap_s: seconds in which one rank denoised a request while another decoded a different one.
        decode_s: seconds in which at least one rank decoded.
        overlap_share: denoise_decode_overlap_s / decode_s, between 0 and 1; None when nothing was decoded.
        idle_s: by rank, wall_s less the time in any stage other than "idle".
        rank_names: as given to the trace.
    """

    wall_s: float
    stages: tuple[StageTime, ...]
    denoise_decode_overlap_s: float
    decode_s: float
    overlap_share: float | None
    idle_s: dict[int, float]
    rank_names: dict[int, str]

    def render_text(self) -> str:
        """A table for the terminal: a row for each rank, a column for each stage, and two lines on the overlap."""
        seconds = {(t.rank, t.stage): t.seconds for t in self.stages}
        names = sorted({t.stage for t in self.stages if t.stage != IDLE})
        rows = [["seconds", *names, IDLE, "busy"]]
        for rank, idle in sorted(self.idle_s.items()):
            share = f"{1 - idle / self.wall_s:.0%}" if self.wall_s else "-"
            cells = [f"{seconds[rank, name]:.2f}" if (rank, name) in seconds else "-" for name in names]
            rows.append([rank_label(rank, self.rank_names), *cells, f"{idle:.2f}", share])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)])
            for row in rows
        ]
        lines.append(f"wall time {self.wall_s:.2f} s")
        if self.overlap_share is None:
            lines.append("nothing was decoded")
        else:
            lines.append(
                f"decoding {self.decode_s:.2f} s, of which {self.denoise_decode_overlap_s:.2f} s "
                f"({self.overlap_share:.0%}) while another request was denoised"
            )
        return "\n".join(lines)


class Trace:
    """The spans of all ranks of one run.

    Args:
        rank_names: what each rank is, such as {0: "dit", 1: "vae"}; a rank without spans is shown (and idle) only if
            it is named here.
    """

    def __init__(self, rank_names: Mapping[int, str] | None = None) -> None:
        self.rank_names = dict(rank_names or {})
        self.spans: list[Span] = []

    def add(self, spans: Iterable[Span]) -> None:
        """Append spans of any rank, in any order.

        Raises:
            ValueError: a span ends before it starts; none of `spans` is added.
        """
        checked = list(spans)
        for span in checked:
            if span.end_ns < span.start_ns:
                raise ValueError(
                    f"end_ns={span.end_ns} of {span.stage} on rank {span.rank} lies before its start, "
                    f"nearest is {span.start_ns}"
                )
        self.spans += checked

    def write_chrome(self, path: Path, run: str = "videopipe") -> Path:
        """Write the spans as Chrome trace event JSON, for Perfetto or chrome://tracing.

        One process named `run`, one thread for each rank ("rank 0 (dit)"), microseconds since the first span began.
        Viewers cannot draw two spans of one thread that overlap without one holding the other, such as a send beside a
        denoising step: the later one goes to an extra row of its rank ("rank 0 (dit), beside").

        Raises:
            OSError: cannot be written; an earlier file stays.
        """
        origin = min((span.start_ns for span in self.spans), default=0)
        spans: list[dict[str, object]] = []
        row_ends: dict[int, list[list[int]]] = {rank: [[]] for rank in self._ranks()}  # ends of open spans, by row
        # of two spans that begin together the longer one comes first: it holds the other
        for span in sorted(self.spans, key=lambda s: (s.start_ns, -s.end_ns)):
            known = {"request": span.request, "step": span.step}
            spans.append(
                {
                    "ph": "X",
                    "pid": 0,
                    "tid": _row_id(span.rank, _fitting_row(row_ends[span.rank], span)),
                    "name": span.stage if span.step is None else f"{span.stage} {span.step}",
                    "cat": span.stage,
                    "ts": (span.start_ns - origin) / 1000,
                    "dur": (span.end_ns - span.start_ns) / 1000,
                    "args": {key: value for key, value in known.items() if value is not None},
                }
            )
        names: list[dict[str, object]] = [
            {"ph": "M", "pid": 0, "tid": 0, "name": "process_name", "args": {"name": run}}
        ]
        for rank, rows in row_ends.items():
            for row in range(len(rows)):
                thread = {"ph": "M", "pid": 0, "tid": _row_id(rank, row)}
                label = rank_label(rank, self.rank_names) + (", beside" if row else "")
                names.append({**thread, "name": "thread_name", "args": {"name": label}})
                names.append({**thread, "name": "thread_sort_index", "args": {"sort_index": rank * 100 + row}})
        write_bytes(path, msgspec.json.encode({"traceEvents": names + spans, "displayTimeUnit": "ms"}))
        return path

    def busy_seconds(self, stage: str, request: str | None = None) -> float:
        """Rank-seconds in `stage`, of one request or of all: nested or simultaneous spans of a rank count once."""
        by_rank: dict[int, list[Span]] = defaultdict(list)
        for span in self.spans:
            if span.stage == stage and request in (None, span.request):
                by_rank[span.rank].append(span)
        return sum(union_ns(spans) for spans in by_rank.values()) / 1e9

    def overlap(self, stage_a: str, stage_b: str, different_requests: bool = True) -> float:
        """Seconds in which some rank was in `stage_a` while another rank was in `stage_b`.

        Exact: begins and ends are swept in order. Each moment counts once, however many ranks take part.

        Args:
            stage_a, stage_b: may be the same stage.
            different_requests: count only pairs that worked for two different requests; spans that belong to no request
                then never count.
        """
        events: list[tuple[int, int, int, tuple[int, str | None]]] = []
        for span in self.spans:
            if different_requests and span.request is None:
                continue
            who = (span.rank, span.request)
            for side, stage in enumerate((stage_a, stage_b)):
                if span.stage == stage:
                    events += [(span.start_ns, 1, side, who), (span.end_ns, -1, side, who)]
        events.sort(key=lambda event: event[0])

        active: tuple[Counter[tuple[int, str | None]], Counter[tuple[int, str | None]]] = (Counter(), Counter())
        total, since = 0, 0
        together = False
        for now, change, side, who in events:
            if together:
                total += now - since
            since = now
            active[side][who] += change
            if not active[side][who]:
                del active[side][who]
            together = any(
                a[0] != b[0] and not (different_requests and a[1] == b[1]) for a in active[0] for b in active[1]
            )
        return total / 1e9

    def summary(self) -> OverlapSummary:
        """Wall time, seconds by stage and rank, overlap of denoising with decoding, idle time."""
        by_stage: dict[tuple[int, str], list[Span]] = defaultdict(list)
        working: dict[int, list[Span]] = {rank: [] for rank in self._ranks()}
        for span in self.spans:
            by_stage[span.rank, span.stage].append(span)
            if span.stage != IDLE:
                working[span.rank].append(span)
        starts = [span.start_ns for span in self.spans]
        wall_ns = max(span.end_ns for span in self.spans) - min(starts) if starts else 0
        decode_s = union_ns(span for span in self.spans if span.stage == "decode") / 1e9
        overlap_s = self.overlap("denoise", "decode")
        return OverlapSummary(
            wall_s=wall_ns / 1e9,
            stages=tuple(
                StageTime(stage=stage, rank=rank, seconds=union_ns(spans) / 1e9)
                for (rank, stage), spans in sorted(by_stage.items())
            ),
            denoise_decode_overlap_s=overlap_s,
            decode_s=decode_s,
            overlap_share=overlap_s / decode_s if decode_s else None,
            idle_s={rank: (wall_ns - union_ns(spans)) / 1e9 for rank, spans in working.items()},
            rank_names=self.rank_names,
        )

    def _ranks(self) -> list[int]:
        return sorted({span.rank for span in self.spans} | self.rank_names.keys())


def union_ns(spans: Iterable[Span]) -> int:
    """Nanoseconds covered by at least one of `spans`."""
    total, covered_to = 0, None
    for start, end in sorted((span.start_ns, span.end_ns) for span in spans):
        if covered_to is None or start >= covered_to:
            total += end - start
            covered_to = end
        elif end > covered_to:
            total += end - covered_to
            covered_to = end
    return total


def rank_label(rank: int, names: Mapping[int, str]) -> str:
    """`rank 0 (dit)`, or `rank 0` where it has no name; the caller's process has only a name."""
    if rank == ENGINE_RANK:
        return names.get(rank, "engine")
    return f"rank {rank} ({names[rank]})" if rank in names else f"rank {rank}"


def _fitting_row(rows: list[list[int]], span: Span) -> int:
    """Index of the first row whose open spans all hold `span`, which is then open there; a new row if there is none."""
    for index, ends in enumerate(rows):
        while ends and ends[-1] <= span.start_ns:
            ends.pop()
        if not ends or span.end_ns <= ends[-1]:
            ends.append(span.end_ns)
            return index
    rows.append([span.end_ns])
    return len(rows) - 1


def _row_id(rank: int, row: int) -> int:
    return rank % 1_000_000 + 1_000_000 * row  # viewers want no negative thread
