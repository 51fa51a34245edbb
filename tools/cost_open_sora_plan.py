"""What one denoising step of Open-Sora-Plan 1.3 costs, dense against skip-sparse: by formula, and measured on a GPU.

python -m tools.cost_open_sora_plan                        # 93x352x640, the released model, bf16
python -m tools.cost_open_sora_plan --measure              # also times single blocks; needs a CUDA device
"""

import time
from dataclasses import dataclass
from typing import Annotated

import torch
import typer

from pipelines.models.open_sora_plan import OpenSoraPlanBlock, Rotary3D
from pipelines.models.skip_sparse import (
    DENSE,
    FIRST_DENSE_TAIL_BLOCK,
    FIRST_SPARSE_BLOCK,
    SkipSparse,
    block_sparsity,
)
from pipelines.open_sora_plan import check_request
from pipelines.open_sora_plan_family import GEOMETRY
from videopipe.geometry import VideoSpec


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """The sizes that cost depends on; the defaults are those of the released model."""

    num_layers: int = 32
    num_heads: int = 24
    head_dim: int = 96
    caption_channels: int = 4096
    parameters: int = 2_771_981_600

    @property
    def width(self) -> int:
        """N * D."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """FLOPs of one step by kind (a multiplication and an addition are two), bytes moved, bytes that must fit."""

    linear_flops: int
    self_attention_flops: int
    cross_attention_flops: int
    moved_bytes: int
    peak_bytes: int

    @property
    def flops(self) -> int:
        """All of them."""
        return self.linear_flops + self.self_attention_flops + self.cross_attention_flops


def step_cost(
    tokens: int,
    *,
    sparse_n: int,
    rows: int = 2,
    text_tokens: int = 512,
    item_bytes: int = 2,
    model: Denoiser | None = None,
) -> StepCost:
    """The cost of one step over `rows` of the batch (2 under classifier-free guidance).

    The keys and values of the text are computed once per clip and not counted. Memory traffic counts that each
    operation (norm, modulation, linear layer, rotation, regrouping, attention, gate with residual, GELU) reads its
    operands and writes its result once, weights included, and that attention never writes its scores.

    Args:
        tokens: video tokens S.
        sparse_n: 4 for skip-sparse attention in blocks 2 to 29, 1 for dense attention throughout.
        rows: batch.
        text_tokens: text tokens L that are kept.
        item_bytes: of one number, 2 in bf16.
        model: sizes, those of the released model by default.
    """
    m = model or Denoiser()
    S, W, L = tokens, m.width, text_tokens
    patterns = [block_sparsity(i, True, sparse_n) for i in range(m.num_layers)]
    # per block q, k, v, out (4), cross q, out (2), MLP up and down (8), in units of W * W; 32 channels in and out
    linear = rows * S * (m.num_layers * 2 * 14 * W * W + 2 * 2 * 32 * W)
    attention = sum(4 * rows * p.padded(S) * (p.padded(S) // p.groups) * W for p in patterns)
    cross = m.num_layers * 4 * rows * S * L * W

    activation = rows * S * W * item_bytes
    # norm, modulation, gate and residual around attention and MLP: 2 * (2 + 2 + 3); q, k, v: 6; rotation: 4;
    # attention: 4; out: 2; cross q, attention, out, residual: 9; MLP: 5 + 8 + 5
    plain = 14 + 6 + 4 + 4 + 2 + 9 + 18
    regrouping = 8  # q, k, v into groups and the result back, each read and written
    moves = sum(plain + (0 if p.kind == "dense" else regrouping) for p in patterns)
    text = m.num_layers * 2 * rows * L * W * item_bytes
    weights = m.parameters * item_bytes
    alive = 11  # in the MLP: the block's input, x, its normed copy, and 4W-wide values before and after GELU
    return StepCost(
        linear_flops=linear,
        self_attention_flops=attention,
        cross_attention_flops=cross,
        moved_bytes=moves * activation + text + weights,
        peak_bytes=weights + text + alive * activation,
    )


def measure_block(
    sparse: SkipSparse, spec: VideoSpec, *, rows: int = 2, text_tokens: int = 512, repeats: int = 10
) -> tuple[float, int]:
    """Median seconds and peak bytes of one full-size block in bf16 on the CUDA device, its weights included."""
    m = Denoiser()
    grid = GEOMETRY.token_grid(spec)
    device = torch.device("cuda")
    block = OpenSoraPlanBlock(num_heads=m.num_heads, head_dim=m.head_dim, sparse=sparse)
    block = block.to(device, torch.bfloat16).eval().requires_grad_(False)
    x = torch.randn(rows, grid.video, m.width, device=device, dtype=torch.bfloat16)
    modulation = torch.randn(rows, 6, m.width, device=device, dtype=torch.bfloat16) * 0.1
    text = block.text_keys_values(torch.randn(rows, text_tokens, m.width, device=device, dtype=torch.bfloat16))
    rope = Rotary3D(m.head_dim, (1.0, 1.0, 1.0))(grid.frames, grid.rows, grid.cols, device)
    seconds = []
    for i in range(repeats + 2):  # the first two warm up
        if i == 2:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        block(x, modulation, rope, text)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[2:])[repeats // 2], torch.cuda.max_memory_allocated()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    num_frames: Annotated[int, typer.Option(help="frames")] = 93,
    height: Annotated[int, typer.Option(help="px")] = 352,
    width: Annotated[int, typer.Option(help="px")] = 640,
    steps: Annotated[int, typer.Option(help="denoising steps of a clip")] = 100,
    rows: Annotated[int, typer.Option(help="batch: 2 with classifier-free guidance")] = 2,
    text_tokens: Annotated[int, typer.Option(help="text tokens that are kept")] = 512,
    measure: Annotated[bool, typer.Option(help="also time single blocks on the CUDA device")] = False,
) -> None:
    """Print the cost of one denoising step, dense against skip-sparse, as a table."""
    spec = VideoSpec(height=height, width=width, num_frames=num_frames)
    try:
        check_request(spec, steps)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    tokens = GEOMETRY.token_grid(spec).video
    dense, sparse = (step_cost(tokens, sparse_n=n, rows=rows, text_tokens=text_tokens) for n in (1, 4))
    first, last = FIRST_SPARSE_BLOCK, FIRST_DENSE_TAIL_BLOCK - 1
    typer.echo(f"{num_frames}x{height}x{width}: {tokens} tokens, batch {rows}, {text_tokens} text tokens, bf16")
    typer.echo(f"\n| | dense | skip-sparse (blocks {first} to {last}) | ratio |\n|---|---|---|---|")
    lines: list[tuple[str, float, float, float, str]] = [
        ("linear layers", dense.linear_flops, sparse.linear_flops, 1e12, "TFLOP"),
        ("self-attention", dense.self_attention_flops, sparse.self_attention_flops, 1e12, "TFLOP"),
        ("cross-attention", dense.cross_attention_flops, sparse.cross_attention_flops, 1e12, "TFLOP"),
        ("one step", dense.flops, sparse.flops, 1e12, "TFLOP"),
        (f"{steps} steps", dense.flops * steps, sparse.flops * steps, 1e15, "PFLOP"),
        ("memory traffic of one step", dense.moved_bytes, sparse.moved_bytes, 1e9, "GB"),
        ("peak memory", dense.peak_bytes, sparse.peak_bytes, 1e9, "GB"),
    ]
    for name, a, b, unit, word in lines:
        typer.echo(f"| {name} | {a / unit:.1f} {word} | {b / unit:.1f} {word} | {a / b:.2f} |")
    if measure:
        if not torch.cuda.is_available():
            typer.echo("error: --measure needs a CUDA device", err=True)
            raise typer.Exit(2)
        typer.echo(f"\n| block on {torch.cuda.get_device_name()} | median | peak memory |\n|---|---|---|")
        for pattern in (DENSE, SkipSparse(kind="single", k=4), SkipSparse(kind="group", k=4)):
            seconds, peak = measure_block(pattern, spec, rows=rows, text_tokens=text_tokens)
            typer.echo(f"| {pattern.kind} | {seconds * 1e3:.2f} ms | {peak / 1e9:.2f} GB |")


if __name__ == "__main__":
    app()
