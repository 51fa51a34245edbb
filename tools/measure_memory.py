"""Host memory of a run by number of DiT ranks: each rank loads only its parts, and n ranks need no n copies.

`python -m tools.measure_memory --output out/memory.json` makes a checkpoint whose DiT has a few hundred MB of weights,
starts a pipeline with 1, 2, 4, ... DiT ranks and one VAE rank on the CPU, and adds up the proportional set size (PSS:
shared pages count once, divided among those that share them) of all ranks, at its peak while loading and after a clip.
"""

import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import msgspec
import psutil
import typer
from rich.console import Console
from rich.table import Table

from pipelines import HunyuanVideoPipeline
from pipelines.hunyuan_video import HunyuanVideo
from pipelines.launch import LocalLauncher
from tools.make_tiny_checkpoint import make_hunyuan_video
from videopipe.files import write_bytes


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one run. `weights` counts each part once for each rank that holds it."""

    dit_ranks: int
    weights: int
    checkpoint: int
    peak_loading: int
    after_clip: int


class PssSampler(threading.Thread):
    """Samples the summed PSS of a process and all its children, and keeps the peak."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._stop_event = threading.Event()

    def run(self) -> None:
        while not self._stop_event.wait(0.02):
            self.peak = max(self.peak, pss_of_children())

    def stop(self) -> int:
        """End sampling; the peak in bytes."""
        self._stop_event.set()
        self.join()
        return self.peak


def pss_of_children() -> int:
    """Summed PSS of this process's descendants, bytes."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended between the listing and the look
    return total


def measure(checkpoint: Path, dit_ranks: int, launcher: LocalLauncher) -> Measured:
    """Start one pipeline, render one clip."""
    size = sum(f.stat().st_size for f in checkpoint.rglob("*.safetensors"))
    sampler = PssSampler()
    sampler.start()
    overrides = ["runtime.device='cpu'", "runtime.threads_per_rank=1"]
    with HunyuanVideoPipeline.from_pretrained(
        checkpoint, dit_ranks=dit_ranks, vae_ranks=1, overrides=overrides, launcher=launcher
    ) as pipe:
        peak = sampler.stop()
        pipe("a fox", height=64, width=64, num_frames=5, num_inference_steps=1)
        time.sleep(0.2)
        weights = sum(sum(parts.values()) for parts in pipe.engine.weight_bytes.values())
        return Measured(
            dit_ranks=dit_ranks, weights=weights, checkpoint=size, peak_loading=peak, after_clip=pss_of_children()
        )


def main(
    output: Annotated[Path, typer.Option(help="JSON file for the figures")] = Path("out/memory.json"),
    ranks: Annotated[list[int] | None, typer.Option(help="numbers of DiT ranks")] = None,
    layers: Annotated[int, typer.Option(help="dual-stream and single-stream blocks of the DiT, each")] = 6,
) -> None:
    """Measure, print a table, write JSON."""
    launcher = LocalLauncher(HunyuanVideo.preload)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_hunyuan_video(
            Path(folder) / "model", heads=24, head_dim=32, num_layers=layers, num_single_layers=layers, mlp_ratio=4.0
        )
        measure(checkpoint, 1, launcher)  # brings the files into the page cache, and waits for the imports
        baseline = pss_of_children()
        for count in ranks or [1, 2, 4, 7]:
            rows.append(measure(checkpoint, count, launcher))
    launcher.close()
    table = Table(title=f"host memory in MB (the mother of the ranks alone: {baseline / 1e6:.0f})")
    for name in ("DiT ranks", "weights on disk", "weights x ranks", "peak while loading", "after a clip"):
        table.add_column(name, justify="right")
    for row in rows:
        figures = (row.checkpoint, row.weights, row.peak_loading, row.after_clip)
        table.add_row(str(row.dit_ranks), *(f"{value / 1e6:.0f}" for value in figures))
    Console().print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output, msgspec.json.format(msgspec.json.encode(rows)))


if __name__ == "__main__":
    typer.run(main)
