"""How soon the first frames of a clip are on the disk after its last denoising step: decoded as `stream` and as `clip`.

`python -m tools.bench_first_frame` renders clips on 1+1 ranks of a tiny model, one clip at a time, in turn with
`decode.mode` stream and clip by a writer process, and with `clip` saved by the caller when all is decoded, as with a
pipeline that returns whole clips. Files are npy, whose bytes are there as soon as they are written; an mp4's encoder
holds back pictures for its look-ahead and its file a buffer, which at these sizes is most of a clip.

All times begin at the end of the clip's last `denoise` span:
    first decoded  the end of its first `decode` span: the first frames are in the host's memory
    on disk        the whole first frame is in the file, which is looked at every millisecond
    all decoded    the end of its last `decode` span
    complete       the caller has the clip: for a writer, the file has its name; else when `save_to` has returned
"""

import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipelines import HunyuanVideoPipeline, OpenSoraPlanPipeline
from pipelines.launch import LocalLauncher
from pipelines.pipeline import VideoPipeline
from tools.bench_writer import spread
from tools.make_tiny_checkpoint import make_hunyuan_video
from tools.tiny_open_sora_plan import make_open_sora_plan
from videopipe.files import PART_SUFFIX
from videopipe.geometry import VideoSpec
from videopipe.records import VideoRequest

Model = Literal["hunyuan-video", "open-sora-plan"]
MOMENTS = ("first decoded", "on disk", "all decoded", "complete")
WAYS = {"stream": ("stream", True), "clip": ("clip", True), "clip, saved by the caller": ("clip", False)}
"""Name: `decode.mode`, and whether a writer process gets the frames."""


class Watch(threading.Thread):
    """Notes when a file that is being written in a folder, under whatever name, first has `num_bytes`."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        super().__init__(daemon=True)
        self.seen_ns = 0
        self._folder = folder
        self._num_bytes = num_bytes
        self._ended = threading.Event()

    def run(self) -> None:
        """Look until it is seen or `end` is called."""
        while not self.seen_ns and not self._ended.wait(0.001):
            self._look()

    def end(self) -> int:
        """When it was seen, in ns of the monotonic clock; now, if only the finished file has so much."""
        self._ended.set()
        self.join()
        return self.seen_ns or time.monotonic_ns()

    def _look(self) -> None:
        for part in self._folder.glob(f".*{PART_SUFFIX}"):
            try:
                size = part.stat().st_size
            except FileNotFoundError:  # it has got its name just now
                continue
            if size >= self._num_bytes:
                self.seen_ns = time.monotonic_ns()


def measure(pipe: VideoPipeline, request: VideoRequest, by_writer: bool) -> dict[str, float]:
    """Render and write one clip; seconds from its last denoising step to each moment."""
    spec = request.spec
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        watch = Watch(folder, 128 + spec.height * spec.width * 3)  # npy's header, one frame
        watch.start()
        (result,) = pipe.render([request], save_to=folder if by_writer else None)
        if not by_writer:
            result.save_to(folder)
        complete = time.monotonic_ns()
        on_disk = min(watch.end(), complete)
    ends = {
        stage: [span.end_ns for span in pipe.trace.spans if (span.stage, span.request) == (stage, request.id)]
        for stage in ("denoise", "decode")
    }
    begin = max(ends["denoise"])
    moments = (min(ends["decode"]), on_disk, max(ends["decode"]), complete)
    return {moment: (at - begin) / 1e9 for moment, at in zip(MOMENTS, moments, strict=True)}


def start(
    model: Model, checkpoint: Path, mode: str, overrides: Sequence[str] = (), launcher: LocalLauncher | None = None
) -> VideoPipeline:
    """1+1 ranks with a thread each."""
    options = [f"model.family={model}", "runtime.threads_per_rank=1", "output.format=npy", f"decode.mode={mode}"]
    kind = HunyuanVideoPipeline if model == "hunyuan-video" else OpenSoraPlanPipeline
    return kind.from_pretrained(
        checkpoint, overrides=[*options, *overrides], dit_ranks=1, vae_ranks=1, launcher=launcher
    )


def main(
    model: Annotated[Model, typer.Option(help="whose tiny random checkpoint")] = "open-sora-plan",
    height: Annotated[int, typer.Option(help="rows, px")] = 64,
    width: Annotated[int, typer.Option(help="columns, px")] = 96,
    num_frames: Annotated[int, typer.Option(help="frames of a clip")] = 93,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 2,
    repetitions: Annotated[int, typer.Option(min=1, help="clips each way")] = 10,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="path=value, for the configuration")] = None,
) -> None:
    """Measure and print."""
    spec = VideoSpec(height=height, width=width, num_frames=num_frames)
    seconds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        make = make_hunyuan_video if model == "hunyuan-video" else make_open_sora_plan
        checkpoint = make(Path(name) / "model")
        pipes = {
            mode: stack.enter_context(start(model, checkpoint, mode, overrides or ())) for mode in ("stream", "clip")
        }
        for repetition in range(repetitions + 1):
            for way in (*WAYS,) if repetition % 2 else reversed(WAYS):
                mode, by_writer = WAYS[way]
                request = VideoRequest(
                    id=f"{way[:1]}{by_writer:d}-{repetition}", prompt="a fox", spec=spec, num_inference_steps=steps
                )
                moments = measure(pipes[mode], request, by_writer)
                if repetition:  # the first ones warm up
                    seconds[way].append(moments)
    print(f"{model}, {num_frames}x{height}x{width}, 1+1, {repetitions} clips each way; ms after the last step")
    for way, rows in seconds.items():
        medians = (f"{moment} {statistics.median(row[moment] for row in rows) * 1000:.1f}" for moment in MOMENTS)
        print(f"{way}: {', '.join(medians)}")
    for way in list(WAYS)[1:]:
        ratios = [other["on disk"] / own["on disk"] for own, other in zip(seconds["stream"], seconds[way], strict=True)]
        print(f"first frame on disk, {way} / stream: {spread(ratios)}")


if __name__ == "__main__":
    typer.run(main)
