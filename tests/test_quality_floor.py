"""The noise floor: measured on reruns, and a candidate judged against it."""

import numpy as np
import pytest

from tests.quality_clips import brighter, moving_picture, noisy
from videopipe.quality import ClipInfo, compare_clips
from videopipe.quality.floor import error_of, floor_from, judge, measure_floor

BASE = moving_picture(6, 48, 64)


class Frames:
    """A clip held in memory."""

    def __init__(self, frames):
        count, height, width, _ = frames.shape
        self.info = ClipInfo(path="memory", kind="npy", latents=False, num_frames=count, height=height, width=width)
        self._frames = frames

    def frames(self):
        yield from self._frames


def compare(a, b):
    return compare_clips(Frames(a), Frames(b), workers=1)


def judged(cand, runs, floor, **options):
    return judge([compare(run, cand) for run in runs], floor, **options)


def test_noise_like_the_floors_is_within_and_more_is_beyond():
    floor, runs = measure_floor(lambda k: noisy(BASE, 3, seed=k), compare, num_runs=3)
    assert (floor.num_runs, floor.bit_exact, len(runs)) == (3, False, 3)
    assert judged(noisy(BASE, 3, seed=9), runs, floor).verdict == "within-floor"
    assert judged(runs[1], runs, floor).verdict == "same"
    for spoilt in (noisy(BASE, 8, seed=9), brighter(runs[0], 9), np.roll(runs[0], 1, axis=2)):
        result = judged(spoilt, runs, floor)
        assert result.verdict == "beyond-floor"
        assert "is beyond the noise floor" in result.reasons[0]


def test_one_bad_frame_is_beyond_the_floor_though_the_mean_is_not():
    floor, runs = measure_floor(lambda k: noisy(BASE, 3, seed=k), compare)
    cand = noisy(BASE, 1, seed=9)
    cand[3] = noisy(BASE[3], 12, seed=4)
    reasons = judged(cand, runs, floor).reasons
    assert any("mae error" in line and "(worst)" in line for line in reasons)
    assert not any("mae error" in line and "(mean)" in line for line in reasons)


def test_with_a_bit_exact_floor_only_equality_passes():
    floor, runs = measure_floor(lambda k: BASE, compare)
    assert floor.bit_exact
    assert judged(BASE.copy(), runs, floor).verdict == "same"
    one = BASE.copy()
    one[2, 5, 5, 0] ^= 1
    assert judged(one, runs, floor).verdict == "beyond-floor"


def test_slack_widens_the_floor():
    floor, runs = measure_floor(lambda k: noisy(BASE, 3, seed=k), compare)
    more = noisy(BASE, 5, seed=9)
    assert judged(more, runs, floor, slack=1.0).verdict == "beyond-floor"
    assert judged(more, runs, floor, slack=3.0).verdict == "within-floor"


def test_wrong_use_is_named():
    comparison = compare(BASE, noisy(BASE))
    with pytest.raises(ValueError, match="num_runs=1 must be at least 2"):
        measure_floor(lambda k: BASE, compare, num_runs=1)
    with pytest.raises(ValueError, match="num_runs=1 must be at least 2"):
        floor_from([comparison], 1)
    floor = floor_from([comparison], 2)
    with pytest.raises(ValueError, match=r"slack=0.5 must be at least 1"):
        judge([comparison], floor, slack=0.5)
    with pytest.raises(ValueError, match="need the comparison"):
        judge([], floor)
    with pytest.raises(ValueError, match="metric=psnr has no error"):
        error_of(comparison.series["psnr"])
