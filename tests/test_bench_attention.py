"""The attention benchmark compares what it says, on real ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tools.bench_attention import Case, variants

SIZES = {"head_dim": 8, "video": 30, "text": 3, "repetitions": 2, "device": "cpu"}


def test_every_way_that_the_sizes_allow_is_tried() -> None:
    names = [v.name for v in variants(Case(ranks=5, helpers=1, heads=24, **SIZES))]  # type: ignore[arg-type]
    assert names[0] == "ulysses" and "leftover heads by rows" in names and "co-processing, 1 helpers" in names
    assert len(set(names)) == len(names)
    even = [v.name for v in variants(Case(ranks=4, helpers=0, heads=24, **SIZES))]  # type: ignore[arg-type]
    assert "leftover heads by rows" not in even and "pipesp, 5 heads a chunk" in even
    assert [v.name for v in variants(Case(ranks=1, helpers=0, heads=1, **SIZES))] == ["ulysses"]  # type: ignore[arg-type]


def test_it_runs_on_real_ranks(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    sizes = "--ranks 2 --helpers 1 --heads 3 --head-dim 8 --video 30 --text 3 --repetitions 2"
    command = [sys.executable, "-m", "tools.bench_attention", *sizes.split(), "--output", str(tmp_path / "out.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "out.json").read_text())
    ratios = {row["variant"]: row["ratio"] for row in record["rows"]}
    assert ratios["ulysses"] == 1.0 and {"ring", "co-processing, 1 helpers"} <= set(ratios)
    assert all(row["median_s"] > 0 for row in record["rows"])
