"""The CPU benchmark: its arithmetic, and one real run against itself as a control."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tools import bench_cpu
from tools.bench_cpu import Case, Stages, balanced_steps, ideal_ratio, max_abs_diff, parse_case, spread


def stages(threads: int, encode_s: float, denoise_s: float, decode_s: float) -> Stages:
    return Stages(threads=threads, encode_s=encode_s, denoise_s=denoise_s, decode_s=decode_s)


def test_case_text() -> None:
    assert parse_case("64x96x17:4") == Case(height=64, width=96, num_frames=17, steps=4)
    assert parse_case("64x64x1:auto").steps is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("64x64:4", "must be HEIGHTxWIDTHxFRAMES:STEPS"),
        ("60x64x17:4", "height=60 .* nearest is 64"),
        ("64x8x17:4", "width=8 .* nearest is 16"),
        ("64x64x16:4", "num_frames=16 .* nearest is 17"),
        ("64x64x17:0", "steps=0 .* nearest is 1"),
    ],
)
def test_impossible_cases_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_case(text)


def test_balanced_steps_solves_for_the_decode_time() -> None:
    # 0.1 s once and 0.05 s a step: 18 steps take 1.0 s
    assert balanced_steps((2, 0.2), (10, 0.6), decode_s=1.0) == 18
    assert balanced_steps((2, 0.2), (10, 0.6), decode_s=0.01) == 1
    with pytest.raises(ValueError, match="many=2"):
        balanced_steps((2, 0.2), (2, 0.2), decode_s=1.0)


def test_ideal_ratio() -> None:
    # threads gain nothing and the stages are equal: 2 for many clips, less for few, none for one
    equal = stages(1, 0.0, 1.0, 1.0)
    assert ideal_ratio(equal, equal, clips=8) == pytest.approx(16 / 9)
    assert ideal_ratio(equal, equal, clips=1) == 1
    # threads gain everything: two stages on half the cores each can at best draw level
    perfect = stages(2, 0.0, 0.5, 0.5)
    assert ideal_ratio(perfect, equal, clips=8) == pytest.approx(8 / 9)
    # text is encoded beside the shorter stage
    assert ideal_ratio(stages(1, 0.5, 1.0, 3.0), stages(1, 0.5, 1.0, 3.0), clips=2) == pytest.approx(9 / 7.5)


def test_spread() -> None:
    values = spread([3.0, 1.0, 2.0])
    assert (values.median, values.p10, values.p90) == pytest.approx((2.0, 1.2, 2.8))


def test_max_abs_diff(tmp_path: Path) -> None:
    clip = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "clip0.npy", clip)
    assert max_abs_diff(tmp_path / "a", tmp_path / "b") == 0
    np.save(tmp_path / "b" / "clip0.npy", clip[::-1])
    assert max_abs_diff(tmp_path / "a", tmp_path / "b") == 12
    np.save(tmp_path / "c" / "clip0.npy", clip.astype(np.float32))
    with pytest.raises(ValueError, match="must be uint8"):
        max_abs_diff(tmp_path / "a", tmp_path / "c")
    np.save(tmp_path / "c" / "clip1.npy", clip)
    with pytest.raises(ValueError, match="clips differ"):
        max_abs_diff(tmp_path / "a", tmp_path / "c")


def run(output: Path, *arguments: str) -> dict[str, object]:
    command = [f"--output={output}", "--prompts=2", "--diffusers-threads=1", "--case=32x32x5:1", *arguments]
    result = CliRunner().invoke(bench_cpu.app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report: dict[str, object] = json.loads((output / "bench_cpu.json").read_text())
    return report


def test_a_run_against_itself(tmp_path: Path) -> None:
    """Both processes run diffusers: equal frames, every repetition timed on both sides, a table with a row a case."""
    report = run(tmp_path / "out", "--against=diffusers", "--repetitions=3", "--no-auto-balance")
    (row,) = report["results"]  # type: ignore[misc]
    assert row["max_abs_diff"] == 0
    assert len(row["diffusers_s"]) == len(row["other_s"]) == 3
    assert row["clips"] == 2
    ratios = [one / other for one, other in zip(row["diffusers_s"], row["other_s"], strict=True)]
    assert row["ratio"]["median"] == pytest.approx(np.median(ratios))
    assert row["reference_stages"]["threads"] == 1
    table = (tmp_path / "out" / "bench_cpu.md").read_text()
    assert table.count("| 32x32x5 |") == 1
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"bench_cpu.json", "bench_cpu.md"}


def test_a_side_that_dies_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"side=diffusers ended with exit status [1-9]"):
        run(tmp_path / "out", "--against=nothing", f"--model={tmp_path}")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_auto_balance_adds_a_case_with_equal_stage_times(tmp_path: Path) -> None:
    report = run(tmp_path / "out", "--against=nothing", "--repetitions=3", "--case=64x64x17:2")
    balanced = [row for row in report["results"] if row["balanced"] and row["case"]["height"] == 64]  # type: ignore[attr-defined]
    (row,) = balanced
    stage = row["shared_stages"]
    assert 0.5 < stage["denoise_s"] / stage["decode_s"] < 2
    assert row["ratio"] is None
