"""How far two clips are apart, frame by frame: plain numpy on [T, H, W, 3].

Every function takes two clips of one shape, uint8 or float, [T, H, W, 3] or a single frame [H, W, 3], and returns
float64 values [T]. `data_range` is the span of valid values: 255 for uint8, 1.0 for float frames unless said otherwise.
"""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[Any]
Values = NDArray[np.float64]

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_MIN_SIDE = (SSIM_WINDOW - 1) * 2 ** (len(MS_SSIM_WEIGHTS) - 1) + 1

# Sizes of one banded product. The maps of a strip stay in the cache, and rows x taps x columns stays below 2**18, where
# OpenBLAS would start threads of its own: frames are already spread over threads, and the two would fight for cores.
_STRIP = 24  # output rows filtered at a time
_BAND = 32  # output columns per horizontal product
_SPAN = 240  # columns per vertical product


def max_abs(ref: Frames, cand: Frames) -> Values:
    """Largest absolute difference of any value, per frame [T], in the frames' own units."""
    pairs = _pairs(ref, cand)
    return np.array([float(abs_difference(a, b).max(initial=0)) for a, b in pairs], dtype=np.float64)


def mae(ref: Frames, cand: Frames) -> Values:
    """Mean absolute difference over pixels and channels, per frame [T], in the frames' own units."""
    pairs = _pairs(ref, cand)
    return np.array([float(abs_difference(a, b).mean(dtype=np.float64)) for a, b in pairs], dtype=np.float64)


def mse(ref: Frames, cand: Frames) -> Values:
    """Mean squared difference over pixels and channels, per frame [T], in the frames' own units squared."""
    return np.array([mean_square(abs_difference(a, b)) for a, b in _pairs(ref, cand)], dtype=np.float64)


def psnr(ref: Frames, cand: Frames, data_range: float | None = None) -> Values:
    """Peak signal-to-noise ratio in dB, per frame [T]; infinite where the frames are equal.

    Raises:
        ValueError: shapes differ, or values lie outside `data_range`.
    """
    span = span_of(ref, cand, data_range)
    return psnr_of_mse(mse(ref, cand), span)


def psnr_of_mse(values: Values, data_range: float = 255.0) -> Values:
    """Mean squared errors [T] as PSNR in dB; 0 gives infinity."""
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(data_range**2 / np.asarray(values, dtype=np.float64))


def ssim(ref: Frames, cand: Frames, data_range: float | None = None) -> Values:
    """Structural similarity, per frame [T]: Gaussian window 11x11, sigma 1.5, mean over the three channels.

    Population covariance, and only windows that lie wholly inside the frame: what scikit-image gives with
    `gaussian_weights=True, sigma=1.5, use_sample_covariance=False`.

    Raises:
        ValueError: shapes differ, a side is below 11 px, or values lie outside `data_range`.
    Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity".
    """
    span = span_of(ref, cand, data_range)
    _check_sides(ref, SSIM_WINDOW, "ssim")
    return np.array([ssim_and_contrast(a, b, span)[0].mean() for a, b in _pairs(ref, cand)], dtype=np.float64)


def ms_ssim(ref: Frames, cand: Frames, data_range: float | None = None) -> Values:
    """Structural similarity over five scales, per frame [T], as torchmetrics gives it.

    Each scale halves the sides by 2x2 averaging and takes the mean over pixels and channels; negative means count as 0.

    Raises:
        ValueError: shapes differ, a side is below 161 px, or values lie outside `data_range`.
    Source: Wang, Simoncelli, Bovik 2003, "Multiscale structural similarity for image quality assessment".
    """
    span = span_of(ref, cand, data_range)
    _check_sides(ref, MS_SSIM_MIN_SIDE, "ms_ssim")
    return np.array([ssim_pair(a, b, span, scales=True)[1] for a, b in _pairs(ref, cand)], dtype=np.float64)


def ssim_pair(ref: Frames, cand: Frames, data_range: float, *, scales: bool) -> tuple[float, float]:
    """(SSIM, MS-SSIM) of one frame [H, W, 3], sharing the finest scale; MS-SSIM is NaN without `scales`."""
    if np.array_equal(ref, cand):
        return 1.0, 1.0 if scales else float("nan")
    similarity, contrast = ssim_and_contrast(ref, cand, data_range)
    single = float(similarity.mean())
    if not scales:
        return single, float("nan")
    product = max(float(contrast.mean()), 0.0) ** MS_SSIM_WEIGHTS[0]
    for level, weight in enumerate(MS_SSIM_WEIGHTS[1:], start=1):
        ref, cand = _halve(ref), _halve(cand)
        similarity, contrast = ssim_and_contrast(ref, cand, data_range)
        term = similarity if level == len(MS_SSIM_WEIGHTS) - 1 else contrast
        product *= max(float(term.mean()), 0.0) ** weight
    return single, product


def ssim_and_contrast(ref: Frames, cand: Frames, data_range: float) -> tuple[Values, Values]:
    """Mean SSIM and mean contrast-structure term of one frame [H, W, C], per channel [C].

    The sums of local variances are all that SSIM needs, so four maps are filtered instead of five: the sum s = x + y,
    the difference d = x - y and their squares. With d = 0 numerator and denominator are the same number: equal
    windows give exactly 1. The separable filter runs as products with banded matrices, a strip of rows at a time.
    """
    height, width, channels = ref.shape
    out_h, out_w = height - SSIM_WINDOW + 1, width - SSIM_WINDOW + 1
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    rows, cols = _band_matrix(_STRIP).T.copy(), _band_matrix(_BAND)
    similarity, contrast = np.zeros(channels), np.zeros(channels)
    halo = SSIM_WINDOW - 1
    padded = -(-out_w // _BAND) * _BAND + halo  # whole bands; what comes out of the zeros is cut off again
    out = np.empty((4, channels, _STRIP, padded - halo), dtype=np.float32)
    for top in range(0, out_h, _STRIP):
        strip = min(_STRIP, out_h - top)
        a = ref[top : top + strip + halo].transpose(2, 0, 1).astype(np.float32, order="C")
        b = cand[top : top + strip + halo].transpose(2, 0, 1).astype(np.float32, order="C")
        maps = np.empty((4, *a.shape), dtype=np.float32)  # s - data_range, d, and their squares
        np.add(a, b, out=maps[0])
        maps[0] -= data_range  # centred: the variance is then a difference of smaller numbers
        np.subtract(a, b, out=maps[1])
        np.multiply(maps[:2], maps[:2], out=maps[2:])
        down = np.empty((4, channels, strip, padded), dtype=np.float32)
        down[..., width:] = 0.0
        _products_down(rows[:strip, : strip + halo], maps, down[..., :width])
        np.matmul(_windows(down, _BAND + halo, _BAND), cols, out=_windows(out[:, :, :strip], _BAND, _BAND))
        mean_s, mean_d, square_s, square_d = out[:, :, :strip, :out_w]
        square_s -= mean_s * mean_s  # variance of the sum = var x + var y + 2 cov
        mean_s += np.float32(data_range)
        mean_s *= mean_s
        mean_d *= mean_d
        square_d -= mean_d  # variance of the difference = var x + var y - 2 cov
        cs = (square_s - square_d + np.float32(2 * c2)) / (square_s + square_d + np.float32(2 * c2))
        lum = (mean_s - mean_d + np.float32(2 * c1)) / (mean_s + mean_d + np.float32(2 * c1))
        contrast += cs.sum(axis=(1, 2), dtype=np.float64)
        lum *= cs
        similarity += lum.sum(axis=(1, 2), dtype=np.float64)
    return similarity / (out_h * out_w), contrast / (out_h * out_w)


def abs_difference(a: Frames, b: Frames) -> Frames:
    """|a - b| without wrap-around: uint8 stays uint8, anything else becomes float."""
    if a.dtype == np.uint8 and b.dtype == np.uint8:
        difference: Frames = np.maximum(a, b) - np.minimum(a, b)
        return difference
    return np.abs(a.astype(np.float64) - b.astype(np.float64))


def mean_square(difference: Frames) -> float:
    """Mean of the squares of an array of differences."""
    flat = difference.reshape(-1)
    if flat.dtype == np.uint8:
        flat = flat.astype(np.float32)
        whole = sum(float(np.dot(part, part)) for part in np.array_split(flat, max(1, flat.size // 65536)))
        return whole / flat.size
    return float(np.dot(flat, flat)) / flat.size


def span_of(ref: Frames, cand: Frames, data_range: float | None) -> float:
    """The data range to use: as given, else 255 for uint8 and 1.0 for float frames.

    Raises:
        ValueError: one clip is uint8 and the other float, or values lie outside the range.
    """
    if (ref.dtype == np.uint8) != (cand.dtype == np.uint8):
        raise ValueError(f"dtypes differ: {ref.dtype} and {cand.dtype}; convert both to uint8 or both to float")
    if ref.dtype == np.uint8:
        return 255.0 if data_range is None else data_range
    span = 1.0 if data_range is None else data_range
    if span <= 0:
        raise ValueError(f"data_range={span:g} must be positive, nearest is 1")
    for frames in (ref, cand):
        low, high = float(frames.min(initial=0)), float(frames.max(initial=0))
        if not (low >= -0.01 * span and high <= 1.01 * span):  # NaN fails both
            near = 255 if high <= 255.5 and low >= -1 else high - min(low, 0)
            raise ValueError(f"data_range={span:g} but values lie in {low:g}..{high:g}, nearest is data_range={near:g}")
    return span


def _pairs(ref: Frames, cand: Frames) -> list[tuple[Frames, Frames]]:
    if ref.shape != cand.shape:
        raise ValueError(f"shapes differ: {list(ref.shape)} and {list(cand.shape)}; both must be [T, H, W, 3]")
    if ref.ndim == 3:
        ref, cand = ref[None], cand[None]
    if ref.ndim != 4 or ref.shape[-1] != 3:
        raise ValueError(f"shape={list(ref.shape)} is not [T, H, W, 3] or [H, W, 3]")
    if 0 in ref.shape:
        raise ValueError(f"shape={list(ref.shape)} holds no pixel, need at least [1, 1, 1, 3]")
    return list(zip(ref, cand, strict=True))


def _check_sides(frames: Frames, least: int, name: str) -> None:
    if frames.ndim >= 3 and min(frames.shape[-3:-1]) < least:
        height, width = frames.shape[-3:-1]
        raise ValueError(f"{name} needs sides of at least {least} px, frames are {width}x{height}")


@functools.cache
def _band_matrix(outputs: int) -> NDArray[np.float32]:
    """[outputs + 10, outputs]: column j holds the Gaussian taps at rows j to j + 10."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    taps = np.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    taps /= taps.sum()
    band = np.zeros((outputs + SSIM_WINDOW - 1, outputs), dtype=np.float32)
    for column in range(outputs):
        band[column : column + SSIM_WINDOW, column] = taps
    return band


def _products_down(rows: Frames, maps: Frames, out: Frames) -> None:
    """out[..., strip, W] = rows [strip, K] @ maps [..., K, W], a span of columns at a time."""
    whole = maps.shape[-1] // _SPAN * _SPAN
    if whole:
        np.matmul(rows, _windows(maps[..., :whole], _SPAN, _SPAN), out=_windows(out[..., :whole], _SPAN, _SPAN))
    if whole < maps.shape[-1]:
        np.matmul(rows, maps[..., whole:], out=out[..., whole:])


def _windows(array: Frames, size: int, step: int) -> Frames:
    """View [..., windows, rows, size] of the columns of [..., rows, cols]: windows of `size`, `step` apart."""
    windows = np.lib.stride_tricks.sliding_window_view(array, size, axis=-1, writeable=True)[..., ::step, :]
    view: Frames = np.moveaxis(windows, -2, -3)  # [..., rows, windows, size] -> [..., windows, rows, size]
    return view


def _halve(frame: Frames) -> NDArray[np.float32]:
    """2x2 averages of [H, W, C]; an odd last row or column is left out."""
    height, width = frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2
    rows = np.add(frame[0:height:2, :width], frame[1:height:2, :width], dtype=np.float32)
    halved: NDArray[np.float32] = (rows[:, 0::2] + rows[:, 1::2]) * np.float32(0.25)
    return halved
