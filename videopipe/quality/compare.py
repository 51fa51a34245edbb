"""Two clips compared frame by frame, streamed: what differs, where first, where worst."""

import math
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from videopipe.quality import metrics as pixel
from videopipe.quality.align import Align, check_pair, paired_frames
from videopipe.quality.clips import Clip, ClipInfo, VideoClip
from videopipe.quality.diagnose import Watcher
from videopipe.quality.temporal import flicker_step, seam_scores, signed_error

MetricName = Literal["max_abs", "mae", "psnr", "ssim", "ms_ssim", "flicker", "rel_l2", "seam", "vmaf", "lpips"]
FRAME_METRICS: tuple[MetricName, ...] = ("max_abs", "mae", "psnr", "ssim", "ms_ssim", "flicker")
LATENT_METRICS: tuple[MetricName, ...] = ("max_abs", "mae", "rel_l2")
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


class MetricInfo(msgspec.Struct, frozen=True, kw_only=True):
    """How a metric reads: its unit, and whether more is better."""

    unit: str
    higher_is_better: bool
    meaning: str


METRICS: dict[MetricName, MetricInfo] = {
    "max_abs": MetricInfo(unit="levels", higher_is_better=False, meaning="largest difference of any value, 0..255"),
    "mae": MetricInfo(unit="levels", higher_is_better=False, meaning="mean absolute difference, 0..255"),
    "psnr": MetricInfo(unit="dB", higher_is_better=True, meaning="peak signal-to-noise ratio, infinite where equal"),
    "ssim": MetricInfo(unit="", higher_is_better=True, meaning="structural similarity, Gaussian 11x11"),
    "ms_ssim": MetricInfo(unit="", higher_is_better=True, meaning="structural similarity over five scales"),
    "flicker": MetricInfo(unit="levels", higher_is_better=False, meaning="difference of frame differences, 0..255"),
    "rel_l2": MetricInfo(unit="", higher_is_better=False, meaning="norm of the difference over the norm of REF"),
    "seam": MetricInfo(unit="x", higher_is_better=False, meaning="jump at a segment border, over REF's there"),
    "vmaf": MetricInfo(unit="", higher_is_better=True, meaning="VMAF of ffmpeg's libvmaf, 0..100"),
    "lpips": MetricInfo(unit="", higher_is_better=False, meaning="learned perceptual distance"),
}


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One metric over time. `at` are the frames of `values` where not every frame has one (segment borders)."""

    name: MetricName
    values: tuple[float, ...]
    at: tuple[int, ...] | None = None

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value means more alike."""
        return METRICS[self.name].higher_is_better

    @property
    def mean(self) -> float:
        """Arithmetic mean; equal frames, whose PSNR is infinite, are left out unless all are equal."""
        finite = [value for value in self.values if math.isfinite(value)]
        return math.fsum(finite) / len(finite) if finite else math.inf

    @property
    def worst(self) -> float:
        """The value of the worst frame."""
        return min(self.values) if self.higher_is_better else max(self.values)

    @property
    def worst_frame(self) -> int:
        """The first frame that has the worst value."""
        index = self.values.index(self.worst)
        return index if self.at is None else self.at[index]

    def worst_frames(self, count: int) -> tuple[int, ...]:
        """The `count` worst frames, worst first, leaving out those as good as the best."""
        sign = 1 if self.higher_is_better else -1
        best = max(sign * value for value in self.values)
        order = sorted(range(len(self.values)), key=lambda i: (sign * self.values[i], i))
        return tuple(i if self.at is None else self.at[i] for i in order[:count] if sign * self.values[i] < best)

    def percentile(self, q: float) -> float:
        """The q-th percentile, a value that occurs."""
        return float(np.percentile(np.asarray(self.values), q, method="nearest"))


class Box(msgspec.Struct, frozen=True, kw_only=True):
    """Rows and columns [top, bottom) x [left, right) that hold every difference of a frame, in px."""

    top: int
    bottom: int
    left: int
    right: int


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What comparing two clips gave."""

    ref: ClipInfo
    cand: ClipInfo
    num_frames: int
    first_different_frame: int | None
    first_different_box: Box | None
    num_different_frames: int
    psnr_pooled: float | None
    series: dict[str, Series]
    findings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def identical(self) -> bool:
        """Whether every frame compared is equal and none is missing on either side."""
        return self.first_different_frame is None and self.ref.num_frames == self.cand.num_frames == self.num_frames

    def as_json(self) -> dict[str, Any]:
        """Plain values for CI: counts, `first_different_frame` or None, per metric `mean`, `worst`, `worst_frame`."""
        box = None if self.first_different_box is None else msgspec.to_builtins(self.first_different_box)
        data: dict[str, Any] = {
            "ref": self.ref.path,
            "cand": self.cand.path,
            "num_frames": self.num_frames,
            "identical": self.identical,
            "first_different_frame": self.first_different_frame,
            "first_different_box": box,
            "num_different_frames": self.num_different_frames,
            "findings": list(self.findings),
            "notes": list(self.notes),
        }
        for name, series in self.series.items():
            data[name] = {
                "mean": series.mean,
                "worst": series.worst,
                "worst_frame": None if self.first_different_frame is None else series.worst_frame,
                "percentiles": {f"p{q}": series.percentile(q) for q in PERCENTILES},
                "frames": list(series.values),
            }
            if series.at is not None:
                data[name]["at"] = list(series.at)
        if "psnr" in data and self.psnr_pooled is not None:
            data["psnr"]["pooled"] = self.psnr_pooled
        return data


def to_json(data: dict[str, Any]) -> bytes:
    """JSON text of plain values. Infinity becomes 1e999, a valid number that parsers read as infinity."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return msgspec.Raw(b"1e999") if value > 0 else msgspec.Raw(b"-1e999") if value < 0 else None
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return msgspec.json.encode(plain(data)) + b"\n"


def parse_metrics(text: str) -> tuple[MetricName, ...]:
    """`"psnr,ssim"` as names of metrics.

    Raises:
        ValueError: an unknown or empty name.
    """
    names: list[MetricName] = []
    for word in (part.strip() for part in text.split(",")):
        known = [name for name in (*FRAME_METRICS, "rel_l2") if name == word]
        if not known:
            raise ValueError(f"metrics={word!r} must be among {', '.join(FRAME_METRICS)}, rel_l2; nearest is 'psnr'")
        names.extend(name for name in get_args(MetricName) if name == word and name not in names)
    return tuple(names)


def default_metrics(info: ClipInfo) -> tuple[MetricName, ...]:
    """Every metric of one pass that this clip is large enough for."""
    if info.latents:
        return LATENT_METRICS
    side = min(info.height, info.width)
    least = {"ssim": pixel.SSIM_WINDOW, "ms_ssim": pixel.MS_SSIM_MIN_SIDE}
    return tuple(name for name in FRAME_METRICS if side >= least.get(name, 1))


def compare_clips(
    ref: Clip,
    cand: Clip,
    *,
    metrics: Sequence[MetricName] | None = None,
    align: Collection[Align] = (),
    resize: bool = False,
    seams: Sequence[int] = (),
    workers: int | None = None,
    on_frame: Callable[[int], None] | None = None,
) -> Comparison:
    """Compare every frame of two clips in one pass and in constant memory.

    Args:
        ref: the clip taken as right.
        cand: the clip to judge.
        metrics: names to compute; by default all that the size allows (MS-SSIM needs sides of 161 px).
        align: what to do about clips that do not match, see `videopipe.quality.align`.
        resize: scale CAND to REF's size.
        seams: first frames of the segments after the first: adds the metric `seam` at those borders.
        workers: frames measured at a time; by default one per core, at most 8.
        on_frame: called with the number of frames done.
    Raises:
        ValueError: the clips do not match, cannot be read, or are too small for a metric asked for.
    """
    if isinstance(ref, VideoClip) and isinstance(cand, VideoClip) and ref.info.decoder != cand.info.decoder:
        ref.use("av")  # one decoder for both: rounding of a colour conversion must not show as a difference
        cand.use("av")
    notes = check_pair(ref.info, cand.info, align, resize=resize)
    names = tuple(metrics) if metrics is not None else default_metrics(ref.info)
    _check_metrics(names, ref.info)
    _check_seams(seams, ref.info, min(ref.info.num_frames, cand.info.num_frames))
    measure = _measure_latents if ref.info.latents else _measure_frames
    rows: list[dict[MetricName, float]] = []
    squares: list[float] = []
    changes: tuple[list[float], list[float]] = ([0.0], [0.0])
    first: int | None = None
    box: Box | None = None
    different = 0
    watcher = None if ref.info.latents else Watcher()
    before: tuple[NDArray[Any], NDArray[Any]] | None = None
    pairs = paired_frames(ref, cand, align, resize=resize)
    for t, (now, result) in enumerate(_in_order(pairs, lambda prev, pair: measure(names, prev, pair), workers)):
        a, b = now
        equal = result.mean_square == 0.0
        if not equal:
            different += 1
            if first is None:
                first, box = t, None if ref.info.latents else difference_box(a, b)
        if watcher is not None:
            watcher.see(a, b, equal)
        if seams and before is not None:
            changes[0].append(float(pixel.abs_difference(a, before[0]).mean(dtype=np.float64)))
            changes[1].append(float(pixel.abs_difference(b, before[1]).mean(dtype=np.float64)))
        rows.append(result.values)
        squares.append(result.mean_square)
        before = now
        if on_frame is not None:
            on_frame(t + 1)
    if not rows:
        raise ValueError(f"no frames in common: REF has {ref.info.num_frames}, CAND has {cand.info.num_frames}")
    series = {name: Series(name=name, values=tuple(row[name] for row in rows)) for name in names}
    if seams:
        excess = seam_scores(changes[1], seams) / seam_scores(changes[0], seams)
        series["seam"] = Series(name="seam", values=tuple(float(v) for v in excess), at=tuple(seams))
    pooled = float(pixel.psnr_of_mse(np.asarray(math.fsum(squares) / len(squares)))) if "psnr" in names else None
    return Comparison(
        ref=ref.info,
        cand=cand.info,
        num_frames=len(rows),
        first_different_frame=first,
        first_different_box=box,
        num_different_frames=different,
        psnr_pooled=pooled,
        series={str(name): value for name, value in series.items()},
        findings=() if watcher is None else watcher.findings(box),
        notes=tuple(notes),
    )


def difference_box(ref: NDArray[Any], cand: NDArray[Any]) -> Box | None:
    """The smallest box that holds every differing pixel of one frame [H, W, 3]; None where there is none."""
    rows, cols = np.nonzero((ref != cand).any(axis=2))
    if rows.size == 0:
        return None
    return Box(top=int(rows.min()), bottom=int(rows.max()) + 1, left=int(cols.min()), right=int(cols.max()) + 1)


class _Measured(msgspec.Struct, frozen=True):
    values: dict[MetricName, float]
    mean_square: float


_Pair = tuple[NDArray[Any], NDArray[Any]]


def _in_order(
    pairs: Iterator[_Pair], work: Callable[[_Pair | None, _Pair], _Measured], workers: int | None
) -> Iterator[tuple[_Pair, _Measured]]:
    """Each pair with its measured values, in order; a few pairs are in flight, never more."""
    count = workers if workers is not None else min(8, len(os.sched_getaffinity(0)))
    if count < 1:
        raise ValueError(f"workers={count} must be at least 1, nearest is 1")
    waiting: deque[tuple[_Pair, Future[_Measured]]] = deque()
    before: _Pair | None = None
    with ThreadPoolExecutor(count) as pool:
        for pair in pairs:
            waiting.append((pair, pool.submit(work, before, pair)))
            before = pair
            if len(waiting) > 2 * count:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()


def _measure_frames(names: Sequence[MetricName], before: _Pair | None, pair: _Pair) -> _Measured:
    ref, cand = pair
    values: dict[MetricName, float] = {}
    difference = pixel.abs_difference(ref, cand)
    square = pixel.mean_square(difference)
    for name in names:
        if name == "max_abs":
            values[name] = float(difference.max())
        elif name == "mae":
            values[name] = float(difference.mean(dtype=np.float64))
        elif name == "psnr":
            values[name] = float(pixel.psnr_of_mse(np.asarray(square)))
        elif name == "flicker":
            values[name] = 0.0 if before is None else flicker_step(signed_error(*before), signed_error(ref, cand))
    if "ssim" in names or "ms_ssim" in names:
        single, scales = pixel.ssim_pair(ref, cand, 255.0, scales="ms_ssim" in names)
        if "ssim" in names:
            values["ssim"] = single
        if "ms_ssim" in names:
            values["ms_ssim"] = scales
    return _Measured(values, square)


def _measure_latents(names: Sequence[MetricName], before: _Pair | None, pair: _Pair) -> _Measured:
    del before
    ref, cand = pair
    if ref.shape != cand.shape:
        raise ValueError(f"latent shapes differ: REF has {list(ref.shape)} per frame, CAND {list(cand.shape)}")
    difference = pixel.abs_difference(ref, cand)
    square = pixel.mean_square(difference)
    norm = math.sqrt(pixel.mean_square(np.abs(ref.astype(np.float64))))
    relative = 0.0 if square == 0.0 else math.sqrt(square) / norm if norm > 0 else math.inf
    known: dict[MetricName, float] = {
        "max_abs": float(difference.max()),
        "mae": float(difference.mean()),
        "rel_l2": relative,
    }
    return _Measured({name: known[name] for name in names}, square)


def _check_metrics(names: Sequence[MetricName], info: ClipInfo) -> None:
    allowed = LATENT_METRICS if info.latents else FRAME_METRICS
    for name in names:
        if name not in allowed:
            what = "latents" if info.latents else "frames"
            raise ValueError(f"metrics={name} does not apply to {what}, which have {', '.join(allowed)}")
    least = {"ssim": pixel.SSIM_WINDOW, "ms_ssim": pixel.MS_SSIM_MIN_SIDE}
    for name in names:
        if min(info.height, info.width) < least.get(name, 1) and not info.latents:
            raise ValueError(
                f"metrics={name} needs sides of at least {least[name]} px, REF is {info.width}x{info.height}"
            )


def _check_seams(seams: Sequence[int], info: ClipInfo, num_frames: int) -> None:
    if seams and info.latents:
        raise ValueError(f"seams={list(seams)} applies to frames, {info.path} holds latents")
    for border in seams:
        if not 1 <= border < num_frames:
            near = min(max(border, 1), max(num_frames - 1, 1))
            raise ValueError(f"seams={border} must lie between 1 and {num_frames - 1}, nearest is {near}")
