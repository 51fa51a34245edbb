"""What counts as good enough: `--fail-under psnr=45,ssim=0.99` and `--expect`."""

import math
from typing import Literal

import msgspec

from videopipe.quality.compare import METRICS, Comparison, MetricName

Statistic = Literal["worst", "mean"]
Expectation = Literal["identical", "within-floor"]


class Threshold(msgspec.Struct, frozen=True, kw_only=True):
    """A limit on one metric: on its worst frame, or on its mean."""

    metric: MetricName
    statistic: Statistic
    limit: float

    def holds(self, comparison: Comparison) -> bool:
        """Whether the comparison stays on the good side of the limit, the limit itself included.

        Raises:
            ValueError: the comparison does not hold this metric.
        """
        value = self.value(comparison)
        return value >= self.limit if METRICS[self.metric].higher_is_better else value <= self.limit

    def value(self, comparison: Comparison) -> float:
        """The comparison's value that the limit is about."""
        series = comparison.series.get(self.metric)
        if series is None:
            raise ValueError(f"fail-under {self.metric}: not measured, have {', '.join(comparison.series)}")
        return series.worst if self.statistic == "worst" else series.mean

    def explain(self, comparison: Comparison) -> str:
        """One line: the value, the limit, and the frame."""
        series = comparison.series[self.metric]
        side = "below" if METRICS[self.metric].higher_is_better else "above"
        where = f" at frame {series.worst_frame}" if self.statistic == "worst" else " on average"
        return f"{self.metric} {self.value(comparison):.6g}{where} is {side} {self.limit:g}"


def parse_thresholds(text: str) -> tuple[Threshold, ...]:
    """`"psnr=45,ssim.mean=0.99"`: the worst frame unless `.mean` is said.

    Metrics where less is better (`mae`, `max_abs`, ...) must not exceed their limit.

    Raises:
        ValueError: an unknown metric or statistic, or a limit that is no number.
    """
    thresholds = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, number = item.partition("=")
        metric, _, statistic = name.strip().partition(".")
        known = [candidate for candidate in METRICS if candidate == metric]
        if not equals or not known:
            names = ", ".join(METRICS)
            raise ValueError(
                f"fail-under={item!r} must be METRIC=LIMIT with METRIC among {names}, nearest is 'psnr=45'"
            )
        if statistic not in ("", "worst", "mean"):
            raise ValueError(
                f"fail-under={item!r}: {statistic!r} must be 'worst' or 'mean', nearest is '{metric}.worst'"
            )
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if math.isnan(limit):
            raise ValueError(f"fail-under={item!r}: {number!r} is not a number, nearest is '{metric}=0'")
        chosen: Statistic = "mean" if statistic == "mean" else "worst"
        thresholds.append(Threshold(metric=known[0], statistic=chosen, limit=limit))
    return tuple(thresholds)


def failures(comparison: Comparison, thresholds: tuple[Threshold, ...]) -> tuple[str, ...]:
    """One line for each limit that does not hold."""
    return tuple(threshold.explain(comparison) for threshold in thresholds if not threshold.holds(comparison))
