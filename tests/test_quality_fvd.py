"""Frechet video distance: the distance itself, the network around the user's weights, and the folder tool."""

import csv

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn
from typer import Typer
from typer.testing import CliRunner

from tests.quality_clips import brighter, moving_picture, noisy
from tools import compare_videos
from videopipe.quality import open_clip
from videopipe.quality.fvd import _MIXED, _STEM, I3D, _same, clip_features, frechet_distance

REF = moving_picture(16, 48, 64)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights with the names and shapes of the real ones: nothing here says what FVD values mean."""
    draw = torch.Generator().manual_seed(0)
    state = {"logits.conv3d.weight": torch.randn((400, 1024, 1, 1, 1), generator=draw) / 32}
    state["logits.conv3d.bias"] = torch.zeros(400)

    def unit(name, channels, out, kernel):
        shape = (out, channels, kernel, kernel, kernel)
        state[f"{name}.conv3d.weight"] = torch.randn(shape, generator=draw) * (2 / (channels * kernel**3)) ** 0.5
        for part in ("weight", "running_var"):
            state[f"{name}.bn.{part}"] = 0.5 + torch.rand(out, generator=draw)
        for part in ("bias", "running_mean"):
            state[f"{name}.bn.{part}"] = 0.1 * torch.randn(out, generator=draw)

    for name, channels, out, kernel, _ in _STEM:
        unit(name, channels, out, kernel)
    for name, (channels, b0, b1a, b1b, b2a, b2b, b3b) in _MIXED.items():
        for branch, ins, outs, kernel in (
            ("b0", channels, b0, 1),
            ("b1a", channels, b1a, 1),
            ("b1b", b1a, b1b, 3),
            ("b2a", channels, b2a, 1),
            ("b2b", b2a, b2b, 3),
            ("b3b", channels, b3b, 1),
        ):
            unit(f"{name}.{branch}", ins, outs, kernel)
    path = tmp_path_factory.mktemp("weights") / "i3d.pt"
    torch.save(state, path)
    return path


def test_distance_equals_the_formula_with_a_matrix_root():
    draw = np.random.default_rng(0)
    a = draw.normal(size=(300, 5))
    b = draw.normal(size=(200, 5)) @ draw.normal(size=(5, 5)) + 0.5
    A, B = np.cov(a.T), np.cov(b.T)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(A + B - 2 * sqrtm(A @ B).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    few = draw.normal(size=(3, 400))  # fewer clips than features: singular covariances
    assert frechet_distance(few, few + 0.1) == pytest.approx(4.0)
    with pytest.raises(ValueError, match="N, M of at least 2"):
        frechet_distance(a[:1], b)


def test_batch_norm_is_folded_exactly(weights):
    state, model = torch.load(weights, weights_only=True), I3D(weights)
    x = torch.randn((1, 64, 2, 6, 6), generator=torch.Generator().manual_seed(1))
    norm = nn.BatchNorm3d(192, eps=1e-3).eval()
    norm.load_state_dict(
        {k.split("bn.")[1]: v for k, v in state.items() if k.startswith("Conv3d_2c_3x3.bn")}, strict=False
    )
    plain = nn.functional.conv3d(x, state["Conv3d_2c_3x3.conv3d.weight"], padding=1)
    assert torch.allclose(model._unit(x, "Conv3d_2c_3x3"), norm(plain).relu(), atol=1e-4)


@pytest.mark.parametrize(("size", "kernel", "stride"), [(224, 7, 2), (17, 7, 2), (9, 3, 2), (8, 2, 2), (5, 3, 1)])
def test_padding_gives_the_rounded_up_size_with_the_odd_zero_at_the_end(size, kernel, stride):
    padded = _same(torch.ones(1, 1, size, 1, 1), (kernel, 1, 1), (stride, 1, 1))[0, 0, :, 0, 0]
    assert (len(padded) - kernel) // stride + 1 == -(-size // stride)
    before = int(padded.argmax())
    after = len(padded) - size - before
    assert after - before in (0, 1)


def test_a_clip_too_short_and_wrong_weights_are_named(weights, tmp_path):
    np.save(tmp_path / "short.npy", REF[:8])
    with pytest.raises(ValueError, match=r"short\.npy: holds 8 frames, FVD needs at least 9 frames"):
        clip_features(I3D(weights), [open_clip(tmp_path / "short.npy")], num_frames=5)
    with pytest.raises(ValueError, match=r"must be \[B, 3, T, 224, 224\]"):
        I3D(weights).features(torch.zeros(1, 3, 16, 64, 64))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: Conv3d_1a_7x7.conv3d.weight must have shape"):
        I3D(tmp_path / "other.pt")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    spoilt = {"ref": lambda x: x, "near": lambda x: noisy(x, 2), "far": lambda x: brighter(255 - x, 20)}
    for folder, spoil in spoilt.items():
        (root / folder).mkdir()
        for stem, frames in (("a", REF), ("b", REF[:, ::-1, ::-1])):
            np.save(root / folder / f"{stem}.npy", spoil(frames))
    return [str(root / folder) for folder in spoilt]


def run(*arguments):
    app = Typer()
    app.command()(compare_videos.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_folders_against_a_reference(folders, tmp_path):
    result = run(*folders, "--csv", tmp_path / "t.csv")
    assert result.exit_code == 0, result.output
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [(row["folder"].rsplit("/", 1)[1], row["clip"]) for row in rows]
    assert found == [("near", "a"), ("near", "b"), ("far", "a"), ("far", "b")]
    assert float(rows[0]["psnr"]) > 40 > float(rows[2]["psnr"])
    (tmp_path / "one").mkdir()
    np.save(tmp_path / "one" / "a.npy", REF)
    short = run(folders[0], tmp_path / "one")
    assert (short.exit_code, "'b' is missing in CAND" in " ".join(short.output.split())) == (2, True)


@pytest.mark.slow
def test_fvd_grows_with_the_difference(folders, weights):
    result = run(*folders, "--fvd-weights", weights, "--fvd-frames", 9)
    assert result.exit_code == 0, result.output
    near, far = (float(line.split(": ")[1].split()[0]) for line in result.output.splitlines() if line.startswith("FVD"))
    assert 0 < near < 0.1 * far
