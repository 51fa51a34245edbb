"""The demo: what `make demo` leaves behind, at a size that takes a second."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.launch import LocalLauncher
from tools import demo
from videopipe import media
from videopipe.geometry import VideoSpec


def test_the_demo_leaves_clips_a_trace_and_a_contact_sheet(
    tmp_path: Path, launcher: LocalLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    spec = VideoSpec(height=64, width=64, num_frames=9)
    for _ in range(2):  # the second time the checkpoint is there, and finished files are replaced
        paths = demo.run_demo(
            out,
            prompts=["a red fox", "a blue boat"],
            spec=spec,
            steps=2,
            dit_ranks=1,
            vae_ranks=1,
            seed=0,
            launcher=launcher,
        )
    names = {path.name for path in out.iterdir()}
    clips = {"00000-a-red-fox-0", "00001-a-blue-boat-1"}
    files = {f"{clip}.{suffix}" for clip in clips for suffix in ("mp4", "json")}
    assert names == {*files, "checkpoint", "trace.json", "contact_sheet.png"}
    assert sorted(path.stem for path in paths) == sorted(clips)
    assert all(media.probe(path).num_frames == 9 for path in paths)
    assert json.loads((out / "trace.json").read_text())["traceEvents"]
    told = capsys.readouterr().err
    assert "while another request was denoised" in told and "The weights are random" in told
    assert told.count("writing a tiny random checkpoint") == 1


def test_a_size_that_cannot_be_rendered_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(demo.app, ["--output", str(tmp_path), "--height=65"])
    assert result.exit_code == 2
    assert "height=65 must be a multiple of 16, nearest is 64" in result.stderr
