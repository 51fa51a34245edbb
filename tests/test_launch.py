"""The same pipeline from torchrun, from a notebook cell and from a script read on standard input."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipelines import HunyuanVideoPipeline
from pipelines.launch import LocalLauncher
from pipelines.start import check_devices
from videopipe import media
from videopipe.config import ConfigError, load_config

ROOT = Path(__file__).parent.parent
OVERRIDES = [
    "runtime.threads_per_rank=1",
    "request.height=64",
    "request.width=64",
    "request.num_frames=5",
    "request.num_inference_steps=2",
]
SCRIPT = f"""
import sys
from pipelines import HunyuanVideoPipeline
from videopipe import media
with HunyuanVideoPipeline.from_pretrained(sys.argv[1], dit_ranks=2, vae_ranks=1, overrides={OVERRIDES!r}) as pipe:
    for result in pipe.render(["a fox", "a boat"]):
        print("clip", result.request_id, media.frames_hash(result.frames), flush=True)
print("done", flush=True)
"""


def run(command: list[str], stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=env, timeout=150, check=False)


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path, launcher: LocalLauncher) -> set[str]:
    with HunyuanVideoPipeline.from_pretrained(
        tiny_checkpoint, dit_ranks=2, vae_ranks=1, overrides=OVERRIDES, launcher=launcher
    ) as pipe:
        results = list(pipe.render(["a fox", "a boat"]))
    return {f"clip {result.request_id} {media.frames_hash(result.frames)}" for result in results}


def test_torchrun_gives_the_same_clips_once(tiny_checkpoint: Path, tmp_path: Path, expected: set[str]) -> None:
    script = tmp_path / "render.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", "--standalone"]
    done = run([*torchrun, str(script), str(tiny_checkpoint)])
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert sorted(line for line in lines if line.startswith("clip")) == sorted(expected)
    assert lines.count("done") == 1  # the script goes on in rank 0 alone


def test_a_script_on_standard_input_needs_no_entry_point_guard(tiny_checkpoint: Path, expected: set[str]) -> None:
    done = run([sys.executable, "-", str(tiny_checkpoint)], stdin=SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {line for line in done.stdout.splitlines() if line.startswith("clip")} == expected


def test_a_notebook_cell_runs_inside_an_event_loop(
    tiny_checkpoint: Path, launcher: LocalLauncher, expected: set[str]
) -> None:
    """A cell is code without a file that runs while the kernel's event loop is running."""
    import asyncio

    seen: list[str] = []
    cell = (
        "with HunyuanVideoPipeline.from_pretrained(model, dit_ranks=2, vae_ranks=1, overrides=overrides,"
        " launcher=launcher) as pipe:\n"
        "    for result in pipe.render(['a fox', 'a boat']):\n"
        "        seen.append(f'clip {result.request_id} {media.frames_hash(result.frames)}')\n"
    )
    names = {
        "HunyuanVideoPipeline": HunyuanVideoPipeline,
        "media": media,
        "model": tiny_checkpoint,
        "overrides": OVERRIDES,
        "launcher": launcher,
        "seen": seen,
    }

    async def kernel() -> None:
        exec(compile(cell, "<cell>", "exec"), names)

    asyncio.run(kernel())
    assert set(seen) == expected


def test_a_launcher_serves_one_pipeline_after_the_other(tiny_checkpoint: Path, launcher: LocalLauncher) -> None:
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    for _ in range(2):
        with HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, overrides=OVERRIDES, launcher=launcher) as pipe:
            assert len(list(pipe.render(["a fox"]))) == 1
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before


def test_torchrun_with_another_number_of_ranks_is_refused() -> None:
    config = load_config(None, ["groups.dit_ranks=2", "groups.vae_ranks=1"])
    check_devices(config, "cpu", 3)
    with pytest.raises(ConfigError, match=r"need 3 ranks but torchrun started 4, nearest is dit_ranks=3 vae_ranks=1"):
        check_devices(config, "cpu", 4)


def test_pipelines_of_one_launcher_do_not_touch_each_other(tiny_checkpoint: Path, launcher: LocalLauncher) -> None:
    first = HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, dit_ranks=2, overrides=OVERRIDES, launcher=launcher)
    with first:
        with HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, overrides=OVERRIDES, launcher=launcher) as second:
            assert set(second.engine.pids) == {0, 1}
            assert not set(second.engine.pids.values()) & set(first.engine.pids.values())
            assert len(list(second.render(["a fox"]))) == 1
        assert len(first.engine.pids) == 3
        assert all(psutil.pid_exists(pid) for pid in first.engine.pids.values())
        assert len(list(first.render(["a boat"]))) == 1
