"""A comparison in the terminal: a table with one line per metric, and a sparkline over time."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from videopipe.quality.compare import METRICS, Comparison, Series

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 40, *, higher_is_better: bool) -> str:
    """The values over time in `width` characters at most; each shows the worst of its stretch.

    Infinite values (equal frames) stand at the top.
    """
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    pick = min if higher_is_better else max
    worst = [pick(values[a:b]) for a, b in itertools.pairwise(edges)]
    finite = [value for value in worst if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    if any(not math.isfinite(value) for value in worst):
        high += (high - low) / 7 or 1.0  # infinity is above every finite value
    if high == low:
        return (_BARS[7] if higher_is_better else _BARS[0]) * count
    scale = 7 / (high - low)
    return "".join(_BARS[7 if not math.isfinite(value) else round((value - low) * scale)] for value in worst)


def number(value: float) -> str:
    """A value in at most eight characters."""
    if not math.isfinite(value):
        return "inf"
    return f"{value:.4f}" if 0.01 <= abs(value) < 100 or value == 0 else f"{value:.5g}"


def print_comparison(console: Console, comparison: Comparison, *, title: str | None = None) -> None:
    """The table, where the clips part, and what the difference looks like."""
    head = title or f"{Path(comparison.ref.path).name} and {Path(comparison.cand.path).name}"
    table = Table(title=escape(head), title_justify="left", header_style="bold")
    percentiles = (5, 50, 95) if console.width >= 110 else ()
    for column in ("metric", "mean", "worst", "frame", *(f"p{q}" for q in percentiles), "over time"):
        table.add_column(column, justify="left" if column in ("metric", "over time") else "right", no_wrap=True)
    width = max(8, min(40, console.width - 52 - 10 * len(percentiles)))
    for name, series in comparison.series.items():
        table.add_row(*_row(name, series, width, percentiles, equal=comparison.first_different_frame is None))
    console.print(table)
    console.print(_verdict(comparison), highlight=False, soft_wrap=True)
    for line in (*comparison.findings, *comparison.notes):
        console.print(f"  - {escape(line)}", highlight=False, soft_wrap=True)


def _row(name: str, series: Series, width: int, percentiles: tuple[int, ...], *, equal: bool) -> tuple[str, ...]:
    unit = METRICS[series.name].unit
    return (
        f"{name} [{unit}]".replace("[]", "").strip().replace("[", r"\["),
        number(series.mean),
        number(series.worst),
        "-" if equal else str(series.worst_frame),
        *(number(series.percentile(q)) for q in percentiles),
        sparkline(series.values, width, higher_is_better=series.higher_is_better),
    )


def _verdict(comparison: Comparison) -> str:
    first, box = comparison.first_different_frame, comparison.first_different_box
    if first is None:
        missing = "" if comparison.identical else ", but frames are missing on one side"
        return f"identical: all {comparison.num_frames} frames compared are equal{missing}"
    where = ""
    if box is not None:
        where = f", rows {box.top} to {box.bottom - 1}, columns {box.left} to {box.right - 1}"
    share = f"{comparison.num_different_frames} of {comparison.num_frames} frames differ"
    return f"first different frame: {first}{where}; {share}"
