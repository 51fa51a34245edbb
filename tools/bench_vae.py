"""Decoding with videopipe's VAE group against diffusers: what it costs by counting, and both measured in one run.

python -m tools.bench_vae --cost     # FLOPs, bytes moved, peak bytes at PipeDiT's shapes and at 129x720x1280, in bf16
python -m tools.bench_vae            # ours against `enable_tiling`; on the CPU with a small VAE and clip, on a GPU with
                                     # HunyuanVideo's own sizes (random weights) at 129x720x1280
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import typer
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipelines.hunyuan_video_exact import exact_decode
from pipelines.hunyuan_video_exact_plan import plan_decode
from pipelines.hunyuan_video_tiles import decode_tile, hunyuan_tiled, tile_settings
from pipelines.models.open_sora_plan_layout import DEFAULT_DECODE_CHUNK
from pipelines.models.wf_vae import WFVAEModel
from pipelines.vae_memory import hunyuan_tiled_bytes
from tools.count_ops import OpCounter
from vae_group.memory import WORKSPACE
from vae_group.team import Part, Team
from vae_group.tiled import row_bands
from vae_group.tiles import TileGrid, TileSettings, assign, next_wave, rows_within, tile_grid
from videopipe.files import write_bytes

SHAPES = ("65x352x480", "129x352x480", "129x592x800", "129x576x1024", "129x720x1280")  # PipeDiT's, and 720p
WF_SHAPES = ("93x352x640", *SHAPES)
RELEASED_WF: dict[str, Any] = {"connect_res_layer_num": 2, "norm_type": "layernorm", "t_interpolation": "trilinear"}
TILES = {
    "tiles of 256 px, 16 frames": TileSettings(),
    "tiles of 256 px, 64 frames": TileSettings(frames=64, overlap_frames=16),
    "whole pictures, 16 frames": TileSettings(spatial=False),
}
EXACT_ROOM = 20 * 10**9
BF16 = 2

Size = tuple[int, ...]


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """One decode: FLOPs, bytes that its operations read and write, most bytes of tensors alive (weights aside)."""

    model: str
    shape: str
    how: str
    flops: int
    moved_bytes: int
    peak_bytes: int


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Ours and diffusers' decode of the same latents, alternating: seconds each, ratio diffusers / ours, peak bytes."""

    device: str
    tiles: str
    ours_s: list[float]
    diffusers_s: list[float]
    ratio: float
    ratio_p10: float
    ratio_p90: float
    ours_peak_bytes: int
    diffusers_peak_bytes: int
    formula_bytes: int
    same_bits: bool


class StandIn(nn.Module):
    """In the place of a decoder: notes the tile's size, has as much alive as the decoder would, computes nothing."""

    def __init__(self, peak_bytes: Callable[[Size], int]) -> None:
        super().__init__()
        self.sizes: Counter[Size] = Counter()
        self._peak_bytes = peak_bytes

    def forward(self, z: Tensor) -> Tensor:
        t, h, w = size = tuple(z.shape[2:])
        self.sizes[size] += 1
        torch.empty(self._peak_bytes(size), dtype=torch.uint8)
        return z.new_empty(1, 3, 4 * t - 3, 8 * h, 8 * w)


def plain(vae: Any, z: Tensor) -> Tensor:
    """diffusers' decoder for one tile."""
    return vae.decoder(vae.post_quant_conv(z))


class Unblended(AutoencoderKLHunyuanVideo):  # type: ignore[misc]
    """diffusers' tiling without the thousands of small operations of its blending, which is in place."""

    def blend_v(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        return b

    blend_h = blend_t = blend_v


def count(work: Callable[[], Any]) -> OpCounter:
    """Run `work` and count."""
    with torch.no_grad(), OpCounter() as counter:
        work()
    return counter


def hunyuan_costs(shape: str) -> Iterator[Cost]:
    """HunyuanVideo: ours and diffusers' at the same tiles, and exact. Blending is not in FLOPs and traffic."""
    latent = latent_size(shape)
    vae: Any = Unblended().eval()
    z = torch.empty(1, 16, *latent)
    decoder, config = vae.decoder, vae.config
    counted: dict[tuple[bool, Size], OpCounter] = {}

    def tile(ours: bool, size: Size) -> OpCounter:
        if (ours, size) not in counted:
            part = torch.empty(1, 16, *size)
            vae.decoder = decoder
            decode = (lambda: decode_tile(vae, part)) if ours else (lambda: plain(vae, part))
            counted[ours, size] = count(decode)
        return counted[ours, size]

    for name, tiles in TILES.items():
        grid = tile_grid(latent, tiles, 4, 8)
        sizes = Counter(latent_of(grid, place) for place in grid.places(range(len(grid.frames))))
        peak = hunyuan_tiled_bytes(config, latent, tiles, 1, BF16)
        yield _sum("ours, " + name, shape, {size: (n, tile(True, size)) for size, n in sizes.items()}, peak)
        peaks = {size: tile(False, size).peak for size in sizes}
        done_sizes, peak = diffusers_tiles(vae, z, tiles, peaks)
        done = {size: (n, tile(False, size)) for size, n in done_sizes.items()}
        yield _sum("diffusers, " + name, shape, done, peak)
    for how, room in (("exact, as fast as it goes", None), (f"exact, in {EXACT_ROOM / 1e9:g} GB", EXACT_ROOM)):
        plan = plan_decode(config, latent, 1, BF16, memory_bytes=room)
        vae.decoder = decoder
        exact = count(partial(_exhaust, exact_decode(vae, z, Team(), plan=plan)))
        yield Cost(
            model="HunyuanVideo",
            shape=shape,
            how=how,
            flops=plan.flops,
            moved_bytes=exact.moved,
            peak_bytes=plan.peak_bytes,
        )


def _exhaust(parts: Iterator[Part]) -> None:
    for part in parts:
        del part


def diffusers_tiles(
    vae: Unblended, latents: Tensor, tiles: TileSettings, peaks: Mapping[Size, int]
) -> tuple[Counter[Size], int]:
    """Sizes of the tiles that diffusers decodes, and its peak bytes, given those of each tile; 0 where unknown.

    The decoder of `vae` is replaced.
    """
    stand_in = StandIn(lambda size: peaks.get(size, 0))
    vae.decoder = stand_in
    vae.enable_tiling(
        tiles.height,
        tiles.width,
        tiles.frames,
        tiles.height - tiles.overlap_height,
        tiles.width - tiles.overlap_width,
        tiles.frames - tiles.overlap_frames,
    )
    vae.use_tiling = tiles.spatial
    peak = count(lambda: vae.decode(latents)).peak
    return stand_in.sizes, peak


def _sum(how: str, shape: str, tiles: dict[Size, tuple[int, OpCounter]], peak: int) -> Cost:
    return Cost(
        model="HunyuanVideo",
        shape=shape,
        how=how,
        flops=sum(n * one.flops for n, one in tiles.values()),
        moved_bytes=sum(n * one.moved for n, one in tiles.values()),
        peak_bytes=peak,
    )


def wf_costs(shape: str) -> Iterator[Cost]:
    """WF-VAE: chunks of time and the whole clip at once; both are exact."""
    vae = WFVAEModel(**RELEASED_WF).eval()
    z = torch.empty(1, 8, *latent_size(shape))

    def stream(chunk: int | None) -> None:
        for video in vae.decode_stream(z, chunk):
            assert video.shape[1] == 3

    for how, chunk in (
        ("stream, 4 latent frames", DEFAULT_DECODE_CHUNK),
        ("stream, 1 latent frame", 1),
        ("clip", None),
    ):
        done = count(lambda chunk=chunk: stream(chunk))  # type: ignore[misc]
        yield Cost(
            model="WF-VAE",
            shape=shape,
            how=how,
            flops=done.flops,
            moved_bytes=done.moved,
            peak_bytes=done.peak,
        )


def latent_size(shape: str) -> tuple[int, int, int]:
    """T', H', W' of a clip `frames x height x width`."""
    frames, height, width = (int(n) for n in shape.split("x"))
    return ((frames - 1) // 4 + 1, height // 8, width // 8)


def latent_of(grid: TileGrid, place: tuple[int, int, int]) -> Size:
    """T', H', W' of one tile."""
    spans = (grid.frames[place[0]], grid.rows[place[1]], grid.cols[place[2]])
    return tuple(span.end - span.begin for span in spans)


def team_table(shape: str, tiles: TileSettings) -> Iterator[str]:
    """What a team's busiest member sends, against a team whose members keep to rows of tiles and exchange overlaps."""
    grid = tile_grid(latent_size(shape), tiles, 4, 8)
    costs = {place: grid.cost(place) for place in grid.places(range(len(grid.frames)))}
    for members in (2, 4, 8):
        bands, sent, busiest, start = row_bands(grid.height, members), [0] * members, 0, 0
        while start < len(grid.frames):
            wave = next_wave(grid, start, members)
            owners = assign({place: costs[place] for place in grid.places(wave)}, members)
            for (s, r, c), owner in owners.items():
                away = grid.rows[r].size - len(rows_within(grid.rows[r], bands[owner]))
                sent[owner] += 3 * grid.frames[s].size * away * grid.cols[c].size * BF16
            busiest += max(sum(costs[p] for p, owner in owners.items() if owner == m) for m in range(members))
            start = wave.stop
        rows = [sum(cost for (_, r, _), cost in costs.items() if r == row) for row in range(len(grid.rows))]
        by_rows = assign({(0, r, 0): cost for r, cost in enumerate(rows)}, members)
        loads = [sum(rows[r] for (_, r, _), owner in by_rows.items() if owner == m) for m in range(members)]
        frames = sum(span.size for span in grid.frames)
        overlap = max((row.blend for row in grid.rows), default=0) * grid.width * frames * 3 * BF16
        total = sum(costs.values())
        yield (
            f"| {members} | {max(sent) / 1e9:.2f} GB | {total / members / busiest:.0%} | {overlap / 1e9:.2f} GB | "
            f"{total / members / max(loads):.0%} |"
        )


def print_costs(shapes: list[str]) -> list[Cost]:
    """Both tables, as they are counted."""
    rows = []
    typer.echo(
        "| model | frames x height x width | decode | TFLOP | moved | peak of tensors |\n|---|---|---|---|---|---|"
    )
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            for shape in shapes or WF_SHAPES:
                both = [*(hunyuan_costs(shape) if shape in (shapes or SHAPES) else ()), *wf_costs(shape)]
                for cost in both:
                    typer.echo(
                        f"| {cost.model} | {shape} | {cost.how} | {cost.flops / 1e12:.0f} | "
                        f"{cost.moved_bytes / 1e12:.2f} TB | {cost.peak_bytes / 1e9:.2f} GB |"
                    )
                rows += both
    finally:
        torch.set_default_dtype(dtype)
    shape = (shapes or SHAPES)[-1]
    typer.echo(f"\n{shape} in tiles over a team (busiest member)\n")
    typer.echo("| members | sent: whole tiles | busy | sent: overlaps of rows of tiles | busy |\n|---|---|---|---|---|")
    for line in team_table(shape, TileSettings()):
        typer.echo(line)
    return rows


def measure(vae: Any, latents: Tensor, repetitions: int) -> Measured:
    """Both decodes in turn, after one of each that is not timed."""
    device = latents.device
    ours = hunyuan_tiled(vae)

    def run_ours() -> Tensor:
        return torch.cat([part.video for part in ours(latents, Team())], dim=2)

    def stream_ours() -> None:
        for part in ours(latents, Team()):
            del part  # as a writer would that has taken its frames

    def run_diffusers() -> Tensor:
        with torch.no_grad():
            return vae.decode(latents).sample

    same = torch.equal(run_ours(), run_diffusers())
    seconds: dict[str, list[float]] = {"ours": [], "diffusers": []}
    for _ in range(repetitions):
        for name, work in (("ours", stream_ours), ("diffusers", run_diffusers)):
            _wait(device)
            start = time.perf_counter()
            work()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    ratios = sorted(b / a for a, b in zip(seconds["ours"], seconds["diffusers"], strict=True))
    cuts = statistics.quantiles(ratios, n=10, method="inclusive") if len(ratios) > 1 else ratios * 9
    return Measured(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        tiles=f"{tuple(latents.shape[2:])} latents, {tile_settings(vae)}",
        ours_s=seconds["ours"],
        diffusers_s=seconds["diffusers"],
        ratio=statistics.median(ratios),
        ratio_p10=cuts[0],
        ratio_p90=cuts[-1],
        ours_peak_bytes=_peak(stream_ours, device),
        diffusers_peak_bytes=_peak(run_diffusers, device),
        formula_bytes=hunyuan_tiled_bytes(vae.config, latents.shape[2:], tile_settings(vae), 1, latents.element_size()),
        same_bits=same,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(work: Callable[[], Any], device: torch.device) -> int:
    """Most bytes above those before: of the allocator on a GPU (workspaces included), of tensors on the CPU."""
    if device.type != "cuda":
        return count(work).peak
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def benchmark_vae(device: torch.device) -> tuple[Any, str]:
    """The VAE to measure, tiled, with random weights, and the size of the clip."""
    torch.manual_seed(0)
    if device.type == "cuda":
        vae: Any = AutoencoderKLHunyuanVideo().eval().to(device, torch.bfloat16)
        vae.enable_tiling()
        return vae, "129x720x1280"
    vae = AutoencoderKLHunyuanVideo(block_out_channels=(16, 32, 32, 32), norm_num_groups=4, layers_per_block=1).eval()
    vae.enable_tiling(64, 64, 16, 48, 48, 12)
    return vae, "33x96x128"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    cost: Annotated[bool, typer.Option(help="count at real sizes instead of measuring")] = False,
    shape: Annotated[list[str] | None, typer.Option(help="frames x height x width; may be repeated")] = None,
    repetitions: Annotated[int, typer.Option(help="decodes of each kind")] = 5,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures")] = None,
) -> None:
    """Print the cost table, or measure ours against diffusers."""
    rows: list[Any]
    if cost:
        rows = print_costs(shape or [])
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        vae, default = benchmark_vae(device)
        rows = []
        for size in shape or [default]:
            z = torch.randn(1, 16, *latent_size(size), generator=torch.Generator().manual_seed(0))
            row = measure(vae, z.to(device, vae.dtype), repetitions)
            rows.append(row)
            typer.echo(
                f"{size} on {row.device}: ours {statistics.median(row.ours_s):.3f} s, diffusers "
                f"{statistics.median(row.diffusers_s):.3f} s, ratio {row.ratio:.2f} ({row.ratio_p10:.2f}-"
                f"{row.ratio_p90:.2f}); peak {row.ours_peak_bytes / 1e6:.1f} MB against "
                f"{row.diffusers_peak_bytes / 1e6:.1f} MB, by formula {row.formula_bytes / 1e6:.1f} MB and up to "
                f"{WORKSPACE:.0%} more on a GPU; same bits: {row.same_bits}"
            )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(output, msgspec.json.format(msgspec.json.encode(rows)))


if __name__ == "__main__":
    app()
