"""What writing costs the caller: clips saved in its own thread against the same clips by a writer process.

`python -m tools.bench_writer` renders the same batch both ways in turn on one pipeline. For each way: the processor
time that the caller's thread spends on a clip, and, as a ratio, the seconds of the whole batch.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from pipelines import HunyuanVideoPipeline
from tools.make_tiny_checkpoint import make_hunyuan_video
from videopipe.geometry import VideoSpec
from videopipe.records import VideoRequest


def render(pipe: HunyuanVideoPipeline, requests: Sequence[VideoRequest], folder: Path, by_writer: bool) -> "Cost":
    """Render and write a batch; what it costs."""
    begin, begin_thread = time.monotonic(), time.thread_time()
    for result in pipe.render(requests, save_to=folder if by_writer else None):
        if not by_writer:
            result.save_to(folder)
    return Cost(time.monotonic() - begin, (time.thread_time() - begin_thread) / len(requests))


class Cost:
    """Seconds of a batch, and of the caller's thread for each clip."""

    def __init__(self, batch_s: float, thread_s: float) -> None:
        self.batch_s = batch_s
        self.thread_s = thread_s


def main(
    height: Annotated[int, typer.Option(help="rows, px")] = 128,
    width: Annotated[int, typer.Option(help="columns, px")] = 192,
    num_frames: Annotated[int, typer.Option(help="frames of a clip")] = 17,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 4,
    clips: Annotated[int, typer.Option(min=1, help="clips of a batch")] = 3,
    repetitions: Annotated[int, typer.Option(min=1, help="batches each way")] = 10,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="path=value, for the configuration")] = None,
) -> None:
    """Measure and print."""
    spec = VideoSpec(height=height, width=width, num_frames=num_frames)
    requests = [
        VideoRequest(id=f"clip{i}", prompt="a fox", spec=spec, num_inference_steps=steps, seed=i) for i in range(clips)
    ]
    costs: dict[bool, list[Cost]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as name:
        checkpoint = make_hunyuan_video(Path(name) / "model")
        options = ["runtime.threads_per_rank=1", *(overrides or ())]
        with HunyuanVideoPipeline.from_pretrained(checkpoint, overrides=options) as pipe:
            for repetition in range(repetitions + 1):
                for by_writer in (False, True) if repetition % 2 else (True, False):
                    cost = render(pipe, requests, Path(name) / "out", by_writer)
                    if repetition:  # the first one warms up
                        costs[by_writer].append(cost)
    shape = f"{num_frames}x{height}x{width}, {steps} steps, {clips} clips, {repetitions} repetitions"
    pairs = list(zip(costs[False], costs[True], strict=True))
    own, other = (statistics.median(cost.thread_s for cost in costs[by_writer]) * 1000 for by_writer in (False, True))
    print(shape)
    print(f"caller's thread, ms of processor time for each clip: {own:.1f} in process, {other:.1f} by a writer")
    print(f"seconds of a batch, in process / by a writer: {spread([a.batch_s / b.batch_s for a, b in pairs])}")


def spread(values: Sequence[float]) -> str:
    """Median (p10-p90)."""
    low, high = np.percentile(values, [10, 90])
    return f"{statistics.median(values):.3g} ({low:.3g}-{high:.3g})"


if __name__ == "__main__":
    typer.run(main)
