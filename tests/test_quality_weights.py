"""Metrics that need something of the user's: VMAF an ffmpeg with libvmaf, LPIPS weights on disk."""

import math
import stat
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from typer.testing import CliRunner

from pipelines.compare_cli import app
from tests.quality_clips import moving_picture, noisy
from videopipe.quality.lpips import Lpips
from videopipe.quality.vmaf import find_ffmpeg, vmaf

REF = moving_picture(4, 64, 82)
CAND = noisy(REF, 40)


def weights(folder):
    """Random weights with the names and shapes of the real ones: nothing here says what LPIPS values mean."""
    draw = torch.Generator().manual_seed(0)
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    backbone, heads = {}, {}
    for i, (name, shape) in enumerate(shapes.items()):
        backbone[f"features.{name}.weight"] = torch.randn(shape, generator=draw) / math.sqrt(math.prod(shape[1:]))
        backbone[f"features.{name}.bias"] = 0.1 * torch.randn(shape[:1], generator=draw)
        heads[f"lin{i}.model.1.weight"] = torch.rand((1, shape[0], 1, 1), generator=draw)
    backbone["classifier.1.weight"] = torch.zeros(1)  # the real file holds more than is needed
    torch.save(backbone, folder / "alexnet.pth")
    save_file(heads, folder / "heads.safetensors")
    return folder / "alexnet.pth", folder / "heads.safetensors"


def test_lpips_is_the_head_weighted_distance_of_unit_features(tmp_path):
    backbone, heads = weights(tmp_path)
    convs, linear = torch.load(backbone, weights_only=True), Lpips(backbone, heads)._heads
    plan = {0: (4, 2, False), 3: (1, 2, True), 6: (1, 1, True), 8: (1, 1, False), 10: (1, 1, False)}

    def features(frame):
        x = torch.from_numpy(frame).permute(2, 0, 1)[None].double() / 127.5 - 1
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(
            1, 3, 1, 1
        )
        for name, (stride, padding, pool) in plan.items():
            x = F.max_pool2d(x, 3, 2) if pool else x
            weight, bias = (convs[f"features.{name}.{part}"].double() for part in ("weight", "bias"))
            x = F.relu(F.conv2d(x, weight, bias, stride, padding))
            yield F.normalize(x, dim=1)

    for ref, cand in zip(REF, CAND, strict=True):
        layers = zip(features(ref), features(cand), linear, strict=True)
        expected = sum(float(F.conv2d((a - b) ** 2, head.double()).mean()) for a, b, head in layers)
        assert Lpips(backbone, heads).frame(ref, cand) == pytest.approx(expected, rel=1e-5)
        assert expected > 1e-4


def test_lpips_orders_differences(tmp_path):
    lpips = Lpips(*weights(tmp_path))
    values = [lpips.frame(REF[0], other) for other in (REF[0], noisy(REF[:1], 4)[0], CAND[0], 255 - REF[0])]
    assert values[0] == 0.0
    assert values == sorted(values)


def test_wrong_weights_are_named(tmp_path):
    backbone, heads = weights(tmp_path)
    with pytest.raises(ValueError, match=r"features.0.weight must have shape \[64, 3, 11, 11\], found nothing"):
        Lpips(heads, heads)
    with pytest.raises(ValueError, match=r"lin0.model.1.weight must have shape \[1, 64, 1, 1\], found nothing"):
        Lpips(backbone, backbone)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pth: not a readable file of weights"):
        Lpips(tmp_path / "text.pth", heads)
    with pytest.raises(ValueError, match=r"absent\.pth: not a readable file of weights"):
        Lpips(tmp_path / "absent.pth", heads)
    with pytest.raises(ValueError, match="sides at least 31 px"):
        Lpips(backbone, heads).frame(REF[0, :20], REF[0, :20])


def test_lpips_on_the_command_line(tmp_path):
    backbone, heads = weights(tmp_path)
    np.save(tmp_path / "a.npy", REF)
    np.save(tmp_path / "b.npy", CAND)
    clips = [str(tmp_path / "a.npy"), str(tmp_path / "b.npy"), "--metrics", "psnr"]
    options = ["--lpips-backbone", str(backbone), "--lpips-heads", str(heads), "--json", str(tmp_path / "o.json")]
    result = CliRunner().invoke(app, [*clips, *options, "--fail-under", "lpips=0.000001"])
    assert result.exit_code == 1, result.output
    values = msgspec.json.decode((tmp_path / "o.json").read_bytes())["lpips"]["frames"]
    assert values == pytest.approx(Lpips(backbone, heads).values(zip(REF, CAND, strict=True)))
    alone = CliRunner().invoke(app, [*clips, *options[:2]])
    assert (alone.exit_code, "needs --lpips-heads" in alone.output) == (2, True)


@pytest.fixture(scope="module")
def ffmpeg():
    try:
        return find_ffmpeg()
    except ValueError as error:
        pytest.skip(str(error))


def test_vmaf_equals_ffmpeg_on_two_files(ffmpeg, tmp_path):
    for name, frames in (("ref", REF), ("cand", CAND)):
        (tmp_path / f"{name}.rgb").write_bytes(frames.tobytes())
    side = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "82x64", "-r", "24", "-i"]
    graph = "[0:v]format=yuv444p[a];[1:v]format=yuv444p[b];[a][b]libvmaf=log_fmt=json:log_path=log.json"
    command = [str(ffmpeg), "-v", "error", *side, "cand.rgb", *side, "ref.rgb", "-lavfi", graph, "-f", "null", "-"]
    subprocess.run(command, cwd=tmp_path, check=True)
    frames = msgspec.json.decode((tmp_path / "log.json").read_bytes())["frames"]
    found = vmaf(zip(REF, CAND, strict=True), ffmpeg)
    assert found == pytest.approx([frame["metrics"]["vmaf"] for frame in frames], abs=1e-3)
    swapped = vmaf(zip(CAND, REF, strict=True), ffmpeg)
    assert np.abs(np.array(found) - swapped).max() > 0.5  # REF and CAND are not interchangeable


def program(path, *lines):
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_an_ffmpeg_without_libvmaf_is_refused(tmp_path):
    bare = program(tmp_path / "ffmpeg", "echo ' .. psnr  VV->V  Calculate the PSNR'")
    with pytest.raises(ValueError, match=f"not found in: {bare}"):
        find_ffmpeg(bare)
    with pytest.raises(ValueError, match="cannot be started"):
        find_ffmpeg(tmp_path / "absent")
    np.save(tmp_path / "a.npy", REF)
    clips = [str(tmp_path / "a.npy")] * 2
    result = CliRunner().invoke(app, [*clips, "--vmaf", "--ffmpeg", str(bare)])
    assert (result.exit_code, "libvmaf" in result.output) == (2, True)


def test_a_failing_ffmpeg_is_reported_and_nothing_hangs(tmp_path):
    broken = program(tmp_path / "ffmpeg", "echo 'no such model' >&2", "exit 3")
    with pytest.raises(ValueError, match=r"failed \(3\): no such model"):
        vmaf(((REF[0], CAND[0]) for _ in range(200)), Path(broken))
    with pytest.raises(ValueError, match="no frames to compare"):
        vmaf(iter(()), Path(broken))
