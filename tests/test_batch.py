"""A batch that its caller gives up holds nothing back, and one whose pipeline is closed never hangs."""

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import HunyuanVideoPipeline
from pipelines.launch import LocalLauncher
from videopipe.geometry import VideoSpec
from videopipe.records import VideoRequest

SPEC = VideoSpec(height=32, width=32, num_frames=5)


def requests(name: str, count: int, steps: int = 1) -> list[VideoRequest]:
    return [
        VideoRequest(id=f"{name}-{index}", prompt="a fox", spec=SPEC, num_inference_steps=steps)
        for index in range(count)
    ]


@pytest.fixture
def pipe(tiny_checkpoint: Path, launcher: LocalLauncher) -> Iterator[HunyuanVideoPipeline]:
    with HunyuanVideoPipeline.from_pretrained(tiny_checkpoint, launcher=launcher) as pipe:
        yield pipe


def in_time(results: Iterator[object], timeout_s: float = 30.0) -> list[object]:
    """What an iterator gives, and how it ends; a hang is an error."""
    answers: queue.SimpleQueue[list[object]] = queue.SimpleQueue()

    def collect() -> None:
        found: list[object] = []
        try:
            found.extend(results)
        except RuntimeError as error:
            found.append(str(error))
        answers.put(found)

    threading.Thread(target=collect, daemon=True).start()
    return answers.get(timeout=timeout_s)


def test_a_batch_that_nobody_iterates_holds_nothing_back(pipe: HunyuanVideoPipeline) -> None:
    for name in ("a", "b"):
        pipe.render(requests(name, 6))  # more than may wait undelivered
    assert len(in_time(pipe.render(requests("c", 6)))) == 6


def test_a_batch_of_a_closed_pipeline_ends_with_an_error(pipe: HunyuanVideoPipeline) -> None:
    results = pipe.render(requests("a", 6, steps=50))
    next(results)
    pipe.close()
    assert in_time(results)[-1] == "this pipeline is closed"


def test_what_is_said_after_the_end_reaches_no_other_file(pipe: HunyuanVideoPipeline, tmp_path: Path) -> None:
    results = pipe.render(requests("a", 6, steps=50))
    next(results)
    pipe.close()
    files = [
        (tmp_path / str(index)).open("wb") for index in range(20)
    ]  # one of them gets the number of the wake-up pipe
    del results  # cancels what is left
    pipe.engine.tell("cancel", "a-0")
    for file in files:
        file.close()
    assert {(tmp_path / str(index)).stat().st_size for index in range(20)} == {0}
