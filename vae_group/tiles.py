"""Overlapping tiles of a clip in space and time: which tile covers what, who decodes it, how its edges are blended.

The arithmetic, the order of blending and its rounding are those of diffusers' tiled decode of HunyuanVideo
(`AutoencoderKLHunyuanVideo.tiled_decode`, `_temporal_tiled_decode`), which follow HunyuanVideo's own
(arXiv 2412.03603), so that the result is theirs to the bit. Pure functions; `vae_group/tiled.py` runs them on a team.

A slab is all tiles of one span of time. Shapes: T' H' W' latent frames, rows, cols; t h w those of one tile in pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EVEN_ENOUGH = 0.9  # a wave takes more slabs until its busiest member has at most 1/0.9 of the mean load

Place = tuple[int, int, int]
"""Where a tile is: numbers of its slab, its tile row and its tile column."""


@dataclass(frozen=True, kw_only=True)
class TileSettings:
    """Sizes of tiles and their overlaps in px and frames, as `enable_tiling` has them (overlap = size - stride).

    `spatial` and `temporal` say whether the axes are tiled at all; a clip no larger than a tile never is.
    """

    height: int = 256
    width: int = 256
    frames: int = 16
    overlap_height: int = 64
    overlap_width: int = 64
    overlap_frames: int = 4
    spatial: bool = True
    temporal: bool = True

    def check(self, stride_t: int, stride_s: int) -> None:
        """Refuse sizes for which tiles do not meet.

        Raises:
            ValueError: a size that is not a positive multiple of the VAE's stride (diffusers rounds its latent tiles
                down, but not what it blends and keeps, so edges of different places are blended); an overlap that is
                negative or leaves no step to the next tile.
        """
        axes = (("height", stride_s), ("width", stride_s), ("frames", stride_t))
        for axis, stride in axes:
            size, overlap = getattr(self, axis), getattr(self, f"overlap_{axis}")
            for name, value, least in ((f"tile_{axis}", size, stride), (f"tile_overlap_{axis}", overlap, 0)):
                if value < least or value % stride:
                    near = max(least, (value + stride // 2) // stride * stride)
                    raise ValueError(f"{name}={value} must be {least} or a multiple of {stride}, nearest is {near}")
            if overlap >= size:
                raise ValueError(
                    f"tile_overlap_{axis}={overlap} must be smaller than tile_{axis}={size}, nearest is {size - stride}"
                )


@dataclass(frozen=True, kw_only=True)
class Span:
    """One tile along one axis: `begin`:`end` of the latents, `first`:`stop` of the pixels or frames that it gives.

    The first `blend` of those are mixed with the tile before; from `kept` on they are left to the tile after.
    `dropped` frames, which the decoder gives in front of `first`, are context alone.
    """

    begin: int
    end: int
    first: int
    stop: int
    kept: int
    blend: int
    dropped: int = 0

    @property
    def size(self) -> int:
        """Pixels or frames of the tile, without the dropped ones."""
        return self.stop - self.first


@dataclass(frozen=True, kw_only=True)
class TileGrid:
    """The tiles of a clip: the product of spans of frames, rows and cols."""

    frames: tuple[Span, ...]
    rows: tuple[Span, ...]
    cols: tuple[Span, ...]

    @property
    def height(self) -> int:
        """px of the clip."""
        return self.rows[-1].stop

    @property
    def width(self) -> int:
        """px of the clip."""
        return self.cols[-1].stop

    @property
    def num_frames(self) -> int:
        """Frames of the clip."""
        return self.frames[-1].stop

    def cost(self, place: Place) -> int:
        """What decoding a tile takes, in pixels that its decoder gives."""
        slab, row, col = place
        frames = self.frames[slab]
        return (frames.size + frames.dropped) * self.rows[row].size * self.cols[col].size

    def places(self, slabs: range) -> list[Place]:
        """All tiles of these slabs, slab by slab, row by row."""
        return [(s, r, c) for s in slabs for r in range(len(self.rows)) for c in range(len(self.cols))]


def tile_grid(latent: Sequence[int], settings: TileSettings, stride_t: int, stride_s: int) -> TileGrid:
    """The tiles of latents of T', H', W' (`latent`), as diffusers cuts them.

    A last slab of one latent frame, which diffusers decodes and then drops whole, is left out.

    Raises:
        ValueError: as `TileSettings.check`.
    """
    settings.check(stride_t, stride_s)
    T, H, W = latent
    rows, cols = settings.height // stride_s, settings.width // stride_s
    tiled = settings.spatial and (rows < H or cols < W)
    return TileGrid(
        frames=_time_spans(T, settings, stride_t),
        rows=_space_spans(H, rows, settings.overlap_height // stride_s, stride_s) if tiled else _whole(H, stride_s),
        cols=_space_spans(W, cols, settings.overlap_width // stride_s, stride_s) if tiled else _whole(W, stride_s),
    )


def _whole(size: int, scale: int) -> tuple[Span, ...]:
    return (Span(begin=0, end=size, first=0, stop=size * scale, kept=size * scale, blend=0),)


def _space_spans(size: int, tile: int, overlap: int, scale: int) -> tuple[Span, ...]:
    spans: list[Span] = []
    step = tile - overlap
    for begin in range(0, size, step):
        end = min(begin + tile, size)
        blend = min(spans[-1].size, (end - begin) * scale, overlap * scale) if spans else 0
        kept = min(begin + step, size) * scale
        spans.append(Span(begin=begin, end=end, first=begin * scale, stop=end * scale, kept=kept, blend=blend))
    return tuple(spans)


def _time_spans(size: int, settings: TileSettings, scale: int) -> tuple[Span, ...]:
    tile, overlap = settings.frames // scale, settings.overlap_frames // scale
    total = (size - 1) * scale + 1
    if not settings.temporal or size <= tile:
        return (Span(begin=0, end=size, first=0, stop=total, kept=total, blend=0),)
    spans: list[Span] = []
    step = tile - overlap
    for begin in range(0, size - 1, step):  # the frame before each span is its context, decoded and dropped
        end = min(begin + tile + 1, size)
        first, stop = (begin * scale + 1 if begin else 0), (end - 1) * scale + 1
        blend = min(spans[-1].size, stop - first, overlap * scale) if spans else 0
        kept = min((begin + step) * scale + 1, total)
        spans.append(Span(begin=begin, end=end, first=first, stop=stop, kept=kept, blend=blend, dropped=int(begin > 0)))
    return tuple(spans)


def assign(costs: Mapping[Place, int], members: int) -> dict[Place, int]:
    """Which member decodes which tile: the costliest first, each to the member with the least to do so far.

    Source: longest processing time first (Graham 1969); at most 4/3 of the best possible time.
    """
    loads = [0] * members
    owners = {}
    for place in sorted(costs, key=lambda p: (-costs[p], p)):
        member = min(range(members), key=loads.__getitem__)
        loads[member] += costs[place]
        owners[place] = member
    return owners


def balance(costs: Mapping[Place, int], owners: Mapping[Place, int], members: int) -> float:
    """Mean load over the largest load: the share of the members' time that is used."""
    loads = [0] * members
    for place, member in owners.items():
        loads[member] += costs[place]
    return sum(loads) / (members * max(loads))


def next_wave(grid: TileGrid, begin: int, members: int) -> range:
    """The slabs from `begin` on that a team decodes together before it blends them.

    As few as keep all members busy (`EVEN_ENOUGH`), never more than there are members, so that what a member holds is
    about one slab whatever the length of the clip.
    """
    best, best_balance = range(begin, begin + 1), 0.0
    for end in range(begin + 1, min(begin + members, len(grid.frames)) + 1):
        costs = {place: grid.cost(place) for place in grid.places(range(begin, end))}
        reached = balance(costs, assign(costs, members), members)
        if reached >= EVEN_ENOUGH:
            return range(begin, end)
        if reached > best_balance:
            best, best_balance = range(begin, end), reached
    return best


def slab_to_restart(grid: TileGrid, first_frame: int) -> int:
    """The slab to begin with so that all frames from `first_frame` on come out as if from the beginning."""
    wanted = next((i for i, span in enumerate(grid.frames) if first_frame < span.kept), len(grid.frames) - 1)
    start = wanted
    while start > 0 and grid.frames[start - 1].stop > grid.frames[wanted].first:
        start -= 1  # a slab that reaches into the wanted one is blended with it
    return start


def rows_within(span: Span, band: range) -> range:
    """The pixel rows of a tile that lie in a band of the clip, as rows of the clip; empty where it has none."""
    start = max(span.first, band.start)
    return range(start, max(start, min(span.stop, band.stop)))


def crossfade(before: Tensor, after: Tensor, dim: int, begin: int, extent: int) -> None:
    """Mix two tiles where they overlap, in place in `after`.

    Index k along `dim` is place y = begin + k of an overlap of `extent`: before * (1 - y / extent) + after *
    (y / extent), every product and the sum rounded to the dtype, as in diffusers' loop over y with plain numbers.
    """
    accurate = torch.float64 if after.dtype == torch.float64 else torch.float32
    shares = [y / extent for y in range(begin, begin + after.shape[dim])]
    shape = [1] * after.ndim
    shape[dim] = -1
    rising = torch.tensor(shares, dtype=accurate, device=after.device).view(shape)
    falling = torch.tensor([1 - share for share in shares], dtype=accurate, device=after.device).view(shape)
    old, new = (before.to(accurate) * falling).to(after.dtype), (after.to(accurate) * rising).to(after.dtype)
    torch.add(old, new, out=after)


def blend_rows(pieces: dict[tuple[int, int], Tensor], grid: TileGrid, band: range, video: Tensor) -> None:
    """Fill one slab's rows of a band from the same rows of its tiles; `pieces` is emptied.

    Every pixel depends on the pixels at its own place in the tiles that cover it and on no other, so that bands may be
    cut anywhere. Tiles above and to the left must themselves be blended before they are mixed in: row by row.

    Args:
        pieces: [1, 3, t, rows_within(tile, band), w] by tile row and column, overwritten; tiles without rows absent.
        band: pixel rows.
        video: [1, 3, t, len(band), W], to be filled.
    """
    for r, row in enumerate(grid.rows):
        lines = rows_within(row, band)
        if not lines:
            continue
        mixed = range(lines.start, max(lines.start, min(lines.stop, row.first + row.blend)))
        kept = range(lines.start, max(lines.start, min(lines.stop, row.kept)))
        for c, col in enumerate(grid.cols):
            piece = pieces[r, c]
            if mixed:
                above = pieces[r - 1, c]
                top = mixed.start - rows_within(grid.rows[r - 1], band).start
                above = above[..., top : top + len(mixed), :]
                crossfade(above, piece[..., : len(mixed), :], 3, mixed.start - row.first, row.blend)
            if col.blend:
                left = pieces[r, c - 1]
                crossfade(left[..., -col.blend :], piece[..., : col.blend], 4, 0, col.blend)
            top = kept.start - band.start
            video[..., top : top + len(kept), col.first : col.kept] = piece[..., : len(kept), : col.kept - col.first]
        for c in range(len(grid.cols)):
            pieces.pop((r - 1, c), None)
    pieces.clear()
