"""Frames per second of `videopipe.quality` against ffmpeg's own psnr and ssim filters, in one run.

    python -m tools.bench_compare                      # 720p, makes its own two clips
    python -m tools.bench_compare --ref a.mp4 --cand b.mp4

Both sides decode the two files and measure PSNR and SSIM of every frame, in this process, in alternating order. CPU
time per frame says what remains to be had on a machine that others use as well. ffmpeg measures on the decoded planes
with its 8x8 SSIM; videopipe on RGB with the Gaussian 11x11 window of the literature.
"""

import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import av
import numpy as np
import typer

from videopipe.quality.clips import open_clip
from videopipe.quality.compare import MetricName, compare_clips


def make_clips(folder: Path, height: int, width: int, num_frames: int) -> tuple[Path, Path]:
    """Two encodings, crf 18 and 28, of moving soft shapes under fine grain."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    grain = rng.normal(0, 3, (height, width, 1)).astype(np.float32)
    paths = folder / "crf18.mp4", folder / "crf28.mp4"
    for path, crf in zip(paths, ("18", "28"), strict=True):
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=24, options={"crf": crf, "preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for t in range(num_frames):
                waves = [np.sin((x * a + y * b) / 90 + 0.1 * t * c) for a, b, c in ((1, 2, 1), (2, -1, 2), (-1, 1, 3))]
                picture = np.clip(128 + 90 * np.stack(waves, axis=2) + grain, 0, 255).astype(np.uint8)
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
    return paths


def ours(ref: Path, cand: Path, metrics: tuple[MetricName, ...]) -> int:
    """Compare with videopipe; returns the number of frames."""
    return compare_clips(open_clip(ref), open_clip(cand), metrics=metrics).num_frames


def ffmpeg(ref: Path, cand: Path, filters: tuple[str, ...] = ("psnr", "ssim")) -> int:
    """Compare with ffmpeg's filters through PyAV; returns the number of frames."""
    graph = av.filter.Graph()
    with av.open(str(ref)) as a, av.open(str(cand)) as b:
        streams = a.streams.video[0], b.streams.video[0]
        for stream in streams:
            stream.thread_type = "AUTO"
        sources = [graph.add_buffer(template=stream) for stream in streams]
        splits = []
        for source in sources:
            split = graph.add("split", str(len(filters)))
            source.link_to(split)
            splits.append(split)
        sinks = []
        for i, name in enumerate(filters):
            node, sink = graph.add(name), graph.add("buffersink")
            splits[1].link_to(node, i, 0)
            splits[0].link_to(node, i, 1)
            node.link_to(sink)
            sinks.append(sink)
        graph.configure()
        count = 0
        for left, right in zip(a.decode(streams[0]), b.decode(streams[1]), strict=True):
            sources[0].push(left)
            sources[1].push(right)
            count += 1
            for sink in sinks:
                _drain(sink)
        return count


def _drain(sink: "av.filter.context.FilterContext") -> None:
    while True:
        try:
            sink.pull()
        except (av.BlockingIOError, av.EOFError):
            return


def main(
    ref: Annotated[Path | None, typer.Option(help="A video file; made if left out.")] = None,
    cand: Annotated[Path | None, typer.Option(help="Another one of the same size.")] = None,
    height: int = 720,
    width: int = 1280,
    num_frames: int = 72,
    repeats: int = 10,
    metrics: str = "psnr,ssim",
) -> None:
    """Print frames per second of both and their ratio, median with 10th and 90th percentile."""
    from videopipe.quality.compare import parse_metrics

    if (ref is None) != (cand is None):
        raise typer.BadParameter("give both --ref and --cand, or neither")
    if repeats < 1 or num_frames < 1:
        raise typer.BadParameter("repeats and num_frames must be at least 1")
    names = parse_metrics(metrics)
    with tempfile.TemporaryDirectory() as scratch:
        if ref is None or cand is None:
            ref, cand = make_clips(Path(scratch), height, width, num_frames)
        sides: dict[str, Callable[[], int]] = {
            "videopipe": lambda: ours(ref, cand, names),
            "ffmpeg": lambda: ffmpeg(ref, cand),
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        cpu_ms: dict[str, list[float]] = {name: [] for name in sides}
        for run in sides.values():
            run()  # warm-up
        for i in range(repeats):
            for name in sides if i % 2 == 0 else reversed(sides):
                start, cpu_start = time.perf_counter(), time.process_time()
                frames = sides[name]()
                rates[name].append(frames / (time.perf_counter() - start))
                cpu_ms[name].append(1000 * (time.process_time() - cpu_start) / frames)
        info = open_clip(ref).info
    for name, values in rates.items():
        print(f"{name}: {_spread(values)} frames/s, {_spread(cpu_ms[name])} ms of CPU time per frame")
    ratios = [a / b for a, b in zip(rates["videopipe"], rates["ffmpeg"], strict=True)]
    print(
        f"videopipe / ffmpeg: {_spread(ratios)}, {info.num_frames} frames of {info.width}x{info.height}, "
        f"{','.join(names)}, {_commit()}   # python -m tools.bench_compare"
    )


def _spread(values: list[float]) -> str:
    low, high = np.percentile(values, [10, 90])
    return f"{statistics.median(values):.3g} ({low:.3g}-{high:.3g})"


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "no commit"


if __name__ == "__main__":
    typer.run(main)
