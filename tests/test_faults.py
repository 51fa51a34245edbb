"""A rank that is killed, stops, hangs, raises or runs out of memory is noticed in seconds and named."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import torch

from pipelines import HunyuanVideoPipeline
from pipelines.faults import Doing, FaultDetector, RankError
from pipelines.launch import LocalLauncher, RankEnded
from videopipe.config import FaultsConfig
from videopipe.geometry import VideoSpec
from videopipe.messages import Heartbeat, RankFailed
from videopipe.records import VideoRequest

SPEC = VideoSpec(height=64, width=64, num_frames=17)
BASE = {"runtime": {"threads_per_rank": 1}}


def requests(count: int, steps: int = 4, spec: VideoSpec = SPEC) -> list[VideoRequest]:
    return [
        VideoRequest(id=f"clip{i}", prompt="a fox", spec=spec, num_inference_steps=steps, seed=i) for i in range(count)
    ]


class Lost:
    """A pipeline whose rank is harmed after its first clip, and what came of it."""

    def __init__(self, pipe: HunyuanVideoPipeline, rank: int, signal_number: int, steps: int) -> None:
        pids = list(pipe.engine.pids.values())
        self.finished: list[str] = []
        results = pipe.render(requests(40, steps))
        self.finished.append(next(results).request_id)
        while pipe.engine.doing(rank).stage == "idle":  # caught at work, not between two pieces of it
            time.sleep(0.001)
        os.kill(pipe.engine.pids[rank], signal_number)
        since = time.monotonic()
        with pytest.raises(RankError) as caught:
            self.finished.extend(result.request_id for result in results)
        self.seconds = time.monotonic() - since
        self.error = caught.value
        with pytest.raises(RankError):
            pipe("a fox", height=64, width=64, num_frames=17)
        pipe.close()
        assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize(("rank", "role"), [(0, "dit"), (1, "dit"), (2, "vae")])
def test_a_killed_rank_is_named(tiny_checkpoint: Path, launcher: LocalLauncher, rank: int, role: str) -> None:
    with HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, config=BASE, dit_ranks=2, launcher=launcher) as pipe:
        lost = Lost(pipe, rank, signal.SIGKILL, steps=10)
    assert lost.seconds < 10
    assert lost.error.rank == rank and lost.error.kind == "killed"
    assert lost.error.stage == {"dit": "denoise", "vae": "decode"}[role]
    assert lost.error.request is not None and (role == "vae" or lost.error.step is not None)
    assert f"rank {rank} ({role}) was killed by SIGKILL during" in str(lost.error)
    assert lost.finished[0] == "clip0"


@pytest.mark.parametrize("rank", [1, 2])
def test_a_stopped_rank_is_noticed_by_its_silence(tiny_checkpoint: Path, launcher: LocalLauncher, rank: int) -> None:
    config = {**BASE, "faults": {"heartbeat_timeout_s": 3.0}}
    with HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, config=config, dit_ranks=2, launcher=launcher) as pipe:
        lost = Lost(pipe, rank, signal.SIGSTOP, steps=10)
    assert lost.seconds < 10
    assert lost.error.rank == rank and lost.error.kind == "silent"


def test_a_rank_that_makes_no_progress_is_named(tiny_checkpoint: Path, launcher: LocalLauncher) -> None:
    config = {**BASE, "faults": {"hang_timeout_s": 1.0}}
    slow = VideoSpec(height=256, width=256, num_frames=33)  # decodes for several seconds
    with HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, config=config, launcher=launcher) as pipe:
        since = time.monotonic()
        with pytest.raises(RankError) as caught:
            list(pipe.render(requests(1, steps=1, spec=slow)))
        assert time.monotonic() - since < 30
    assert (caught.value.rank, caught.value.kind, caught.value.stage) == (1, "hung", "decode")
    assert "made no progress for" in str(caught.value) and caught.value.request == "clip0"


def test_a_rank_that_raises_is_named_with_its_traceback(tiny_checkpoint: Path, launcher: LocalLauncher) -> None:
    wrong = {
        "prompt_embeds": torch.zeros(1, 8, 3),  # the model expects another width
        "pooled_prompt_embeds": torch.zeros(1, 3),
        "prompt_attention_mask": torch.ones(1, 8, dtype=torch.int64),
    }
    with (
        HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, config=BASE, dit_ranks=2, launcher=launcher) as pipe,
        pytest.raises(RankError) as caught,
    ):
        pipe(**wrong, height=64, width=64, num_frames=17, num_inference_steps=2)
    error = caught.value
    assert error.kind == "raised" and error.stage == "denoise" and error.step == 0 and error.request == "call1-0"
    assert "RuntimeError" in str(error) and "Traceback" in error.details


def test_out_of_memory_is_told_apart(tiny_checkpoint: Path, launcher: LocalLauncher) -> None:
    with HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, config=BASE, launcher=launcher) as pipe:
        list(pipe.render(requests(1)))
        pid = pipe.engine.pids[1]
        limit = psutil.Process(pid).memory_info().vms + (64 << 20)
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
        large = VideoSpec(height=256, width=256, num_frames=33)
        with pytest.raises(RankError) as caught:
            list(pipe.render(requests(1, steps=1, spec=large)))
    assert (caught.value.rank, caught.value.kind, caught.value.stage) == (1, "out_of_memory", "decode")
    assert "ran out of memory" in str(caught.value)


def test_a_broken_checkpoint_fails_at_load_and_leaves_nothing(
    tiny_checkpoint: Path, launcher: LocalLauncher, tmp_path: Path
) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    for file in (broken / "vae").glob("*.safetensors"):
        file.write_bytes(b"not a tensor")
    children = {p.pid for p in psutil.Process().children(recursive=True)}
    with pytest.raises(RankError) as caught:
        HunyuanVideoPipeline.from_pretrained(broken, config=BASE, launcher=launcher)
    assert (caught.value.rank, caught.value.stage) == (1, "load")
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= children


SCRIPT = """
import sys, time
from pipelines import HunyuanVideoPipeline
pipe = HunyuanVideoPipeline.from_pretrained(sys.argv[1], overrides=["runtime.threads_per_rank=1"])
print(pipe.engine._run_directory, *pipe.engine.pids.values(), flush=True)
for result in pipe.render(["a fox"] * 200):
    print("finished", result.request_id, flush=True)
"""


@pytest.fixture
def script(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A plain script, without an entry-point guard and without a context manager, that renders for a long time."""
    path = tmp_path / "script.py"
    overrides = '"request.height=64", "request.width=64", "request.num_frames=17", "request.num_inference_steps=4"'
    path.write_text(SCRIPT.replace('["runtime.threads_per_rank=1"]', f'["runtime.threads_per_rank=1", {overrides}]'))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, str(path), str(tiny_checkpoint)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    yield process
    process.kill()
    process.communicate()


def wait_for_first_clip(process: subprocess.Popen[str]) -> tuple[Path, list[int]]:
    """Where the run keeps its sockets and frames, and the processes of its ranks."""
    assert process.stdout is not None
    directory, *pids = process.stdout.readline().split()
    assert len(pids) == 2
    assert process.stdout.readline().startswith("finished")
    return Path(directory), [int(pid) for pid in pids]


def gone(pids: list[int], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGTERM))],
    ids=lambda n: n.name,
)
def test_a_script_that_ends_in_any_way_takes_its_ranks_with_it(script: subprocess.Popen[str], number: int) -> None:
    _, pids = wait_for_first_clip(script)
    script.send_signal(number)
    since = time.monotonic()
    script.wait(timeout=10)
    assert time.monotonic() - since < 5
    assert script.returncode != 0
    assert gone(pids, within_s=5)


def test_nothing_stays_in_shared_memory(script: subprocess.Popen[str]) -> None:
    directory, pids = wait_for_first_clip(script)
    assert directory.is_dir()
    script.kill()
    assert gone(pids, within_s=5)
    deadline = time.monotonic() + 5
    while directory.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not directory.exists()


# ---- which of several signs is the cause: no processes, a clock of our own ------------------------------------------


def failure(traceback: str, stage: str = "denoise") -> RankFailed:
    return RankFailed(
        kind="RuntimeError",
        message="Connection closed by peer\nmore",
        traceback=traceback,
        stage=stage,
        request="clip0",
        step=3,
        out_of_memory=False,
    )


def beat(seconds: float, waiting: bool = False) -> Heartbeat:
    return Heartbeat(stage="denoise", request="clip0", step=1, seconds=seconds, waiting=waiting, where="a.py:1")


def detector(now: float = 0.0) -> FaultDetector:
    config = FaultsConfig(heartbeat_timeout_s=8.0, hang_timeout_s=30.0, start_timeout_s=60.0)
    found = FaultDetector(config, (0, 1, 2), now)
    for rank in range(3):
        found.alive(rank, now)
    return found


def test_the_killed_rank_is_the_cause_not_its_neighbours_echo() -> None:
    found = detector()
    found.raised(0, failure('File "x/videopipe/exchange.py", line 3'), 1.0)  # the echo arrives first
    assert found.check(1.1, {}) is None
    found.ended(RankEnded(0, 1), Doing("denoise"), 1.2)
    found.ended(RankEnded(1, -signal.SIGKILL), Doing("denoise", "clip0", 3), 1.3)
    sign = found.check(1.5, {})
    assert sign is not None and (sign.rank, sign.kind) == (1, "killed")


def test_an_error_of_ones_own_beats_an_error_in_a_transfer() -> None:
    found = detector()
    found.raised(0, failure('File "x/videopipe/exchange.py", line 3'), 1.0)
    found.raised(2, failure('File "x/pipelines/hunyuan_video_parts.py", line 3'), 1.1)
    sign = found.check(2.0, {})
    assert sign is not None and sign.rank == 2 and "\n" not in sign.what


def test_running_out_of_memory_in_a_transfer_is_no_echo() -> None:
    found = detector()
    in_transfer = failure('File "x/videopipe/exchange.py", line 3')
    found.raised(0, in_transfer, 1.0)
    found.raised(1, msgspec.structs.replace(in_transfer, out_of_memory=True), 1.1)
    sign = found.check(2.0, {})
    assert sign is not None and (sign.rank, sign.kind) == (1, "out_of_memory")


def test_the_hanging_rank_is_the_cause_not_those_that_wait_for_it() -> None:
    found = detector()
    found.alive(0, 1.0, beat(31.0, waiting=True))
    found.alive(1, 1.0, beat(30.5, waiting=False))
    assert found.check(1.0, {}) is None
    sign = found.check(1.5, {})
    assert sign is not None and (sign.rank, sign.kind) == (1, "hung")


def test_silence_while_the_engine_itself_was_stopped_does_not_count() -> None:
    found = detector()
    found.check(0.1, {})
    assert found.check(100.0, {}) is None  # a laptop that slept
    for tenth in range(1005, 1075):
        assert found.check(tenth / 10, {}) is None
    for tenth in range(1075, 1095):
        sign = found.check(tenth / 10, {})
    assert sign is not None and sign.kind == "silent"
