"""Cost of the control plane: time between two denoising steps that is neither model nor exchange.

`python -m tools.bench_control` renders clips of many short steps on real ranks and takes, on every DiT rank, the gap
from the end of one step to the start of the next one of the same request: receiving the command, bookkeeping and the
report to the engine. The same gap is paid at any step length, so it is also given as a share of a 100 ms step. For
comparison the last column is the step itself.
"""

import json
import statistics
import tempfile
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipelines import HunyuanVideoPipeline
from pipelines.hunyuan_video import HunyuanVideo
from pipelines.launch import LocalLauncher
from tools.make_tiny_checkpoint import make_hunyuan_video
from videopipe.files import write_bytes
from videopipe.geometry import VideoSpec
from videopipe.records import VideoRequest
from videopipe.trace import Span

REFERENCE_STEP_S = 0.1


def step_gaps(spans: list[Span]) -> list[float]:
    """Seconds between consecutive steps of one request on one rank, for all of them."""
    steps: dict[tuple[int, str | None], list[Span]] = defaultdict(list)
    for span in spans:
        if span.stage == "denoise":
            steps[span.rank, span.request].append(span)
    gaps = []
    for own in steps.values():
        own.sort(key=lambda s: s.start_ns)
        gaps += [(b.start_ns - a.end_ns) / 1e9 for a, b in pairwise(own)]
    return gaps


def main(
    output: Annotated[Path, typer.Option(help="JSON file for the figures")] = Path("out/bench_control.json"),
    steps: Annotated[int, typer.Option(help="denoising steps of each clip")] = 200,
    clips: Annotated[int, typer.Option(help="clips for each group size")] = 4,
    groups: Annotated[list[str] | None, typer.Option(help="DiT+VAE ranks, such as 2+1")] = None,
) -> None:
    """Measure, print a table, write JSON."""
    launcher = LocalLauncher(HunyuanVideo.preload)
    rows = {}
    spec = VideoSpec(height=32, width=32, num_frames=5)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_hunyuan_video(Path(folder) / "model")
        for group in groups or ["1+0", "1+1", "2+1"]:
            dit, vae = (int(part) for part in group.split("+"))
            with HunyuanVideoPipeline.from_pretrained(
                checkpoint, dit_ranks=dit, vae_ranks=vae, overrides=["runtime.threads_per_rank=1"], launcher=launcher
            ) as pipe:
                requests = [
                    VideoRequest(id=f"clip{i}", prompt="a fox", spec=spec, num_inference_steps=steps, seed=i)
                    for i in range(clips)
                ]
                list(pipe.render(requests[:1]))  # warm-up
                pipe.trace.spans.clear()
                list(pipe.render(requests))
                gaps = sorted(step_gaps(pipe.trace.spans))
                length = statistics.median(
                    (s.end_ns - s.start_ns) / 1e9 for s in pipe.trace.spans if s.stage == "denoise"
                )
            rows[group] = {
                "gaps": len(gaps),
                "median_s": statistics.median(gaps),
                "p90_s": gaps[int(0.9 * len(gaps))],
                "share_of_100_ms_step": statistics.median(gaps) / REFERENCE_STEP_S,
                "median_step_s": length,
            }
    launcher.close()
    table = Table(title="time per step outside model and exchange")
    for name in ("DiT+VAE", "gaps", "median us", "p90 us", "share of a 100 ms step", "the step itself, ms"):
        table.add_column(name, justify="right")
    for group, row in rows.items():
        table.add_row(
            group,
            str(row["gaps"]),
            f"{row['median_s'] * 1e6:.0f}",
            f"{row['p90_s'] * 1e6:.0f}",
            f"{row['share_of_100_ms_step']:.2%}",
            f"{row['median_step_s'] * 1e3:.1f}",
        )
    Console().print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output, json.dumps(rows, indent=2).encode())


if __name__ == "__main__":
    typer.run(main)
