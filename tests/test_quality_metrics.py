"""Metrics equal scikit-image, torchmetrics and ffmpeg on the same frames; temporal ones find what they are for."""

import math
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as torch_ms_ssim

from tests.quality_clips import brighter, moving_picture, noisy
from videopipe import quality

SIZES = [(96, 128), (45, 61), (11, 11), (11, 400), (300, 37)]  # odd sizes, one window, one row of windows


def pair(height, width, num_frames=2):
    ref = moving_picture(num_frames, height, width)
    return ref, noisy(ref, 12)


def skimage_ssim(ref, cand, data_range=255):
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": data_range}
    return [structural_similarity(a, b, channel_axis=2, **options) for a, b in zip(ref, cand, strict=True)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_psnr_and_ssim_equal_scikit_image(height, width):
    ref, cand = pair(height, width)
    expected = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(ref, cand, strict=True)]
    assert quality.psnr(ref, cand) == pytest.approx(expected, abs=1e-3)
    assert quality.ssim(ref, cand) == pytest.approx(skimage_ssim(ref, cand), abs=1e-5)


@pytest.mark.parametrize("flat", [0, 250])
def test_ssim_of_nearly_flat_bright_and_dark_frames(flat):
    ref = np.full((1, 64, 80, 3), flat, np.uint8)
    cand = ref.copy()
    cand[:, ::3] += 1  # tiny variances, where cancellation would show
    assert quality.ssim(ref, cand) == pytest.approx(skimage_ssim(ref, cand), abs=1e-5)


def test_another_window_is_noticed():
    ref, cand = pair(45, 61)
    uniform = [structural_similarity(a, b, channel_axis=2, data_range=255) for a, b in zip(ref, cand, strict=True)]
    assert abs(quality.ssim(ref, cand)[0] - uniform[0]) > 1e-4


def test_ms_ssim_equals_torchmetrics():
    ref, cand = pair(176, 203)
    for other in (cand, 255 - ref, brighter(ref, 40), ref):
        planes = [torch.from_numpy(x).permute(0, 3, 1, 2).double() for x in (other, ref)]
        expected = [float(torch_ms_ssim(a[None], b[None], data_range=255.0)) for a, b in zip(*planes, strict=True)]
        assert quality.ms_ssim(ref, other) == pytest.approx(expected, abs=1e-4)


def test_float_frames_give_the_same_as_bytes():
    ref, cand = pair(45, 61)
    as_float = ref / 255.0, cand / 255.0
    assert quality.psnr(*as_float) == pytest.approx(quality.psnr(ref, cand), abs=1e-6)
    assert quality.ssim(*as_float) == pytest.approx(quality.ssim(ref, cand), abs=1e-5)
    assert quality.mae(*as_float) * 255 == pytest.approx(quality.mae(ref, cand))
    single = quality.max_abs(ref[0], cand[0])
    assert single == quality.max_abs(ref, cand)[:1]


def test_differences_of_bytes_do_not_wrap_around():
    black, white = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)
    for a, b in ((black, white), (white, black)):
        assert quality.max_abs(a, b) == [255]
        assert quality.mae(a, b) == [255]
        assert quality.mse(a, b) == [255**2]


def test_equal_frames_are_exactly_equal():
    ref, _ = pair(176, 203)
    assert quality.psnr(ref, ref).tolist() == [math.inf, math.inf]
    assert quality.ssim(ref, ref).tolist() == quality.ms_ssim(ref, ref).tolist() == [1.0, 1.0]
    assert quality.max_abs(ref, ref).tolist() == quality.mae(ref, ref).tolist() == [0.0, 0.0]


def test_one_pixel_shows_in_every_metric():
    ref = moving_picture(1, 176, 203)
    cand = ref.copy()
    cand[0, 100, 50, 1] ^= 1
    assert quality.max_abs(ref, cand) == [1]
    assert 0 < quality.mse(ref, cand)[0] < 1e-4
    assert quality.ssim(ref, cand)[0] < 1.0
    assert quality.ms_ssim(ref, cand)[0] < 1.0


def test_psnr_equals_ffmpegs_filter():
    ref, cand = pair(64, 80, num_frames=3)
    graph = av.filter.Graph()
    sources = [graph.add_buffer(width=80, height=64, format=av.VideoFormat("gbrp"), time_base="1/24") for _ in range(2)]
    psnr, sink = graph.add("psnr"), graph.add("buffersink")
    for i, source in enumerate(sources):
        source.link_to(psnr, 0, i)
    psnr.link_to(sink)
    graph.configure()
    found = []
    for t, frames in enumerate(zip(cand, ref, strict=True)):
        for source, picture in zip(sources, frames, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="gbrp")
            frame.pts = t
            source.push(frame)
        if t:  # the filter holds the last pair back
            found.append(float(sink.pull().metadata["lavfi.psnr.psnr_avg"]))
    assert len(found) >= 1
    assert quality.psnr(ref, cand)[: len(found)] == pytest.approx(found, abs=0.006)  # ffmpeg writes two decimals


@pytest.mark.parametrize(
    ("ref", "cand", "message"),
    [
        (np.zeros((1, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), np.uint8), "shapes differ"),
        (np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8), r"not \[T, H, W, 3\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8), "holds no pixel"),
        (np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3)), "dtypes differ"),
        (np.full((1, 8, 8, 3), 200.0), np.full((1, 8, 8, 3), 200.0), "nearest is data_range=255"),
        (np.full((1, 8, 8, 3), np.nan), np.zeros((1, 8, 8, 3)), "values lie in nan"),
    ],
)
def test_wrong_input_is_named(ref, cand, message):
    with pytest.raises(ValueError, match=message):
        quality.psnr(ref, cand)


def test_sides_too_small_are_named():
    small = np.zeros((1, 10, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="ssim needs sides of at least 11 px, frames are 64x10"):
        quality.ssim(small, small)
    with pytest.raises(ValueError, match="ms_ssim needs sides of at least 161 px, frames are 160x300"):
        quality.ms_ssim(np.zeros((1, 300, 160, 3), np.uint8), np.zeros((1, 300, 160, 3), np.uint8))


def test_flicker_is_blind_to_what_stays_and_sees_what_comes_and_goes():
    ref = moving_picture(8)
    assert quality.flicker(ref, brighter(ref, 10)).max() == 0.0
    cand = ref.copy()
    cand[4] = brighter(ref[4], 10)
    assert np.flatnonzero(quality.flicker(ref, cand)).tolist() == [4, 5]
    assert quality.flicker(ref, cand)[4] == pytest.approx(10)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, videopipe.quality; print({'torch', 'av', 'scipy', 'decord', 'rich'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_seam_score_finds_the_border_that_jumps():
    ref = moving_picture(24)
    smooth = quality.seam_scores(quality.frame_changes(ref), [8, 16])
    assert smooth == pytest.approx([1, 1], abs=0.1)
    cut = np.concatenate([ref[:16], 255 - ref[16:]])
    scores = quality.seam_scores(quality.frame_changes(cut), [8, 16])
    assert scores[0] == pytest.approx(1, abs=0.1)
    assert scores[1] > 1.5
    with pytest.raises(ValueError, match="seams=24 must lie between 1 and 23, nearest is 23"):
        quality.seam_scores(quality.frame_changes(ref), [24])
