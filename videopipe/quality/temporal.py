"""What happens between frames: flicker of the difference, and jumps at segment borders."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from videopipe.quality.metrics import Frames, Values, abs_difference


def flicker(ref: Frames, cand: Frames) -> Values:
    """Difference of frame differences [T]: mean |(c[t] - c[t-1]) - (r[t] - r[t-1])|, 0 for the first frame.

    A constant error, such as a gamma change of a still picture, gives 0; an error that comes and goes shows at the
    frames where it does. In the frames' own units.

    Raises:
        ValueError: shapes differ or are not [T, H, W, 3].
    """
    if ref.shape != cand.shape or ref.ndim != 4:
        raise ValueError(f"shapes {list(ref.shape)} and {list(cand.shape)} must be equal and [T, H, W, 3]")
    values = np.zeros(len(ref))
    for t in range(1, len(ref)):
        values[t] = flicker_step(signed_error(ref[t - 1], cand[t - 1]), signed_error(ref[t], cand[t]))
    return values


def signed_error(ref: Frames, cand: Frames) -> NDArray[Any]:
    """cand - ref of one frame without wrap-around: int16 for uint8 frames, float32 otherwise."""
    if ref.dtype == np.uint8 and cand.dtype == np.uint8:
        return np.subtract(cand, ref, dtype=np.int16)
    return np.subtract(cand, ref, dtype=np.float32)


def flicker_step(before: NDArray[Any], after: NDArray[Any]) -> float:
    """Mean absolute change between two signed errors of `signed_error`."""
    return float(np.abs(after - before).mean(dtype=np.float64))


def frame_changes(frames: Frames) -> Values:
    """Mean absolute difference of each frame [T] from the one before it, 0 for the first."""
    values = np.zeros(len(frames))
    for t in range(1, len(frames)):
        values[t] = abs_difference(frames[t], frames[t - 1]).mean(dtype=np.float64)
    return values


def seam_scores(changes: Values | Sequence[float], borders: Sequence[int], window: int = 8) -> Values:
    """How much each segment border jumps [len(borders)]: its frame change over the usual one around it.

    Args:
        changes: mean absolute change from frame to frame [T], as from `frame_changes`.
        borders: first frames of the segments after the first, each in 1..T-1.
        window: frames on either side that say what is usual; their median is taken, borders left out.
    Returns:
        1 where a border is like its neighbours, larger where it jumps. A change of half a grey level is taken as
        usual where the neighbours are still, so that a still clip has finite scores.
    Raises:
        ValueError: a border outside the clip, or a window below 1.
    """
    values = np.asarray(changes, dtype=np.float64)
    if window < 1:
        raise ValueError(f"window={window} must be at least 1, nearest is 1")
    for border in borders:
        if not 1 <= border < len(values):
            near = min(max(border, 1), max(len(values) - 1, 1))
            raise ValueError(f"seams={border} must lie between 1 and {len(values) - 1}, nearest is {near}")
    scores = np.zeros(len(borders))
    for i, border in enumerate(borders):
        low, high = max(1, border - window), min(len(values), border + window + 1)
        around = [values[t] for t in range(low, high) if t not in borders]
        usual = max(float(np.median(around)) if around else 0.0, 0.5)
        scores[i] = max(values[border], 0.5) / usual
    return scores
