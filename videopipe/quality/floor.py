"""The noise floor: how far apart several renders of one request are, and whether a candidate is any further.

Kernels that sum in varying order give another video each time, and a denoiser makes much of a small difference, so a
fixed limit on SSIM cannot tell a mistake from kernel noise. The floor is measured on renders of the same request with
the same code, all pairs of them; a candidate is judged against it.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeVar

import msgspec

from videopipe.quality.compare import Comparison, Series

Verdict = Literal["same", "within-floor", "beyond-floor"]
RunT = TypeVar("RunT")


class FloorLine(msgspec.Struct, frozen=True, kw_only=True):
    """The error of one metric (0 is equal, more is worse) that renders of the same request show among themselves."""

    mean: float
    worst: float


class NoiseFloor(msgspec.Struct, frozen=True, kw_only=True):
    """What is usual among `num_runs` renders of one request: the largest error over all pairs, per metric."""

    num_runs: int
    lines: dict[str, FloorLine]

    @property
    def bit_exact(self) -> bool:
        """Whether all runs were equal."""
        return all(line.worst == 0.0 for line in self.lines.values())


class FloorJudgement(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate against the floor: the verdict, and one line per metric that lies beyond it."""

    verdict: Verdict
    reasons: tuple[str, ...]


def error_of(series: Series) -> FloorLine:
    """Mean and worst error of a metric: 0 where equal, growing with the difference.

    SSIM and MS-SSIM count as 1 - value. PSNR is left to `mae`, which says the same without infinities.

    Raises:
        ValueError: the metric has no error of this kind.
    """
    if series.name in ("ssim", "ms_ssim"):
        return FloorLine(mean=1.0 - series.mean, worst=1.0 - series.worst)
    if series.name in ("max_abs", "mae", "flicker", "rel_l2", "lpips"):
        return FloorLine(mean=series.mean, worst=series.worst)
    raise ValueError(f"metric={series.name} has no error that is 0 where frames are equal, nearest is 'mae'")


def floor_from(pairs: Iterable[Comparison], num_runs: int) -> NoiseFloor:
    """The floor from comparisons of renders of one request with each other.

    Raises:
        ValueError: no comparison, or fewer than two runs.
    """
    comparisons = list(pairs)
    if num_runs < 2 or not comparisons:
        raise ValueError(f"num_runs={num_runs} must be at least 2 to measure a noise floor, nearest is 2")
    lines: dict[str, FloorLine] = {}
    for comparison in comparisons:
        for name, line in _errors(comparison).items():
            seen = lines.get(name, line)
            lines[name] = FloorLine(mean=max(seen.mean, line.mean), worst=max(seen.worst, line.worst))
    return NoiseFloor(num_runs=num_runs, lines=lines)


def judge(candidates: Sequence[Comparison], floor: NoiseFloor, *, slack: float = 1.5) -> FloorJudgement:
    """Judge a candidate by its comparisons with each run of the floor.

    The closest of the runs counts: a candidate that equals any of them is the same. Two runs are a small sample, so
    errors up to `slack` times the floor's still count as within it; with a bit-exact floor nothing but equality does.

    Raises:
        ValueError: no comparison, or `slack` below 1.
    """
    if slack < 1:
        raise ValueError(f"slack={slack:g} must be at least 1, nearest is 1")
    if not candidates:
        raise ValueError("candidates: need the comparison with at least one run of the floor")
    if any(comparison.identical for comparison in candidates):
        return FloorJudgement(verdict="same", reasons=())
    found = [_beyond(comparison, floor, slack) for comparison in candidates]
    fewest = min(found, key=len)
    return FloorJudgement(verdict="beyond-floor" if fewest else "within-floor", reasons=tuple(fewest))


def measure_floor(
    render: Callable[[int], RunT], compare: Callable[[RunT, RunT], Comparison], num_runs: int = 2
) -> tuple[NoiseFloor, tuple[RunT, ...]]:
    """Render the same request `num_runs` times and compare all pairs.

    Args:
        render: renders run k in 0..num_runs-1 and returns it; it may spread the runs over ranks and kernels.
        compare: compares two runs, such as `compare_clips` of the clips they wrote.
        num_runs: renders to make.
    Returns:
        The floor, and the runs, which a candidate is then compared with.
    Raises:
        ValueError: fewer than two runs.
    """
    if num_runs < 2:
        raise ValueError(f"num_runs={num_runs} must be at least 2 to measure a noise floor, nearest is 2")
    runs = tuple(render(k) for k in range(num_runs))
    return floor_from((compare(a, b) for a, b in itertools.combinations(runs, 2)), num_runs), runs


def _errors(comparison: Comparison) -> dict[str, FloorLine]:
    return {
        name: error_of(series) for name, series in comparison.series.items() if name not in ("psnr", "vmaf", "seam")
    }


def _beyond(comparison: Comparison, floor: NoiseFloor, slack: float) -> list[str]:
    reasons = []
    for name, line in _errors(comparison).items():
        usual = floor.lines.get(name)
        if usual is None:
            raise ValueError(f"metric={name} was not measured for the noise floor, have {', '.join(floor.lines)}")
        for statistic, value, limit in (("mean", line.mean, usual.mean), ("worst", line.worst, usual.worst)):
            if value > slack * limit:
                what = f"{name} error {value:.6g} ({statistic})"
                reasons.append(f"{what} is beyond the noise floor {limit:.6g} x {slack:g}")
    if comparison.num_frames != comparison.ref.num_frames:
        reasons.append(f"{comparison.num_frames} of {comparison.ref.num_frames} frames could be compared")
    return reasons
