"""Decodes a clip tile by tile with a team: tiles divided by cost, finished tiles exchanged, each blended once."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from vae_group.retry import together
from vae_group.team import Part, Team
from vae_group.tiles import (
    Place,
    TileGrid,
    TileSettings,
    assign,
    blend_rows,
    crossfade,
    next_wave,
    rows_within,
    slab_to_restart,
    tile_grid,
)
from videopipe.partition import offsets, split_evenly

Tiles = dict[Place, Tensor]


class TiledDecoder:
    """A `PartDecoder` that gives what diffusers' tiled decode gives at the same settings, slab by slab.

    Members decode whole tiles, the costliest first to whoever has least to do, and each blends one band of pixel rows,
    for which it gets those rows of every tile. So each finished tile travels once, and tiles may lie anywhere; had
    members bands of tiles of their own, they would exchange overlaps alone, but 4 rows of tiles could occupy no more
    than 4 members (`tools/bench_vae.py --cost` counts both). Bands do not change bits: a pixel depends on the pixels
    at its own place alone.

    Memory does not grow with the number of frames: the tiles of a wave (at most about a slab for each member), one
    slab's band, and the frames that the next slab is blended with.
    """

    def __init__(
        self, decode_tile: Callable[[Tensor], Tensor], settings: TileSettings, stride_t: int, stride_s: int
    ) -> None:
        """`decode_tile`: latents [1, C, t', h', w'] -> [1, 3, (t'-1) * stride_t + 1, h' * stride_s, w' * stride_s].

        Raises:
            ValueError: as `TileSettings.check`.
        """
        settings.check(stride_t, stride_s)
        self.settings = settings
        self._decode_tile = decode_tile
        self._strides = (stride_t, stride_s)

    @torch.no_grad()
    def __call__(self, latents: Tensor, team: Team, first_frame: int = 0) -> Iterator[Part]:
        """This member's band of rows of each slab, in time order; from the first slab that `first_frame` needs.

        Raises:
            ValueError: latents that are not one clip.
            TeamOutOfMemoryError: some member has no memory for its next tiles.
        """
        if latents.ndim != 5 or latents.shape[0] != 1 or 0 in latents.shape:
            raise ValueError(f"latents of shape {tuple(latents.shape)} must be [1, C, T', H', W']")
        grid = tile_grid(latents.shape[2:], self.settings, *self._strides)
        bands = row_bands(grid.height, team.members)
        tail: Tensor | None = None  # the last blended frames of the slab before, which reach into this one
        start = slab_to_restart(grid, first_frame)
        while start < len(grid.frames):
            wave = next_wave(grid, start, team.members)
            owners = assign({place: grid.cost(place) for place in grid.places(wave)}, team.members)
            tiles = together(team, latents.device, partial(self._decode, latents, grid, owners, team.member))
            for slab in wave:
                exchange = SlabExchange(grid, slab, owners, bands, team)
                together(team, latents.device, partial(exchange.prepare, tiles, latents))
                video = exchange.finish(tail)
                span = grid.frames[slab]
                shared = grid.frames[slab + 1].blend if slab + 1 < len(grid.frames) else 0
                tail = video[:, :, span.size - shared :].clone() if shared else None
                video = video[:, :, : span.kept - span.first]
                yield Part(video=video, first_frame=span.first, first_row=bands[team.member].start)
                del video
            start = wave.stop

    def _decode(self, latents: Tensor, grid: TileGrid, owners: Mapping[Place, int], member: int) -> Tiles:
        tiles: Tiles = {}
        for place in sorted(place for place, owner in owners.items() if owner == member):
            frames, row, col = grid.frames[place[0]], grid.rows[place[1]], grid.cols[place[2]]
            part = latents[:, :, frames.begin : frames.end, row.begin : row.end, col.begin : col.end]
            tiles[place] = self._decode_tile(part)[:, :, frames.dropped :]
        return tiles


def row_bands(height: int, members: int) -> list[range]:
    """The pixel rows that each member blends."""
    edges = offsets(split_evenly(height, members))
    return [range(*edges[i : i + 2]) for i in range(members)]


class SlabExchange:
    """One slab on its way from finished tiles on any member to each member's band of blended rows."""

    def __init__(
        self, grid: TileGrid, slab: int, owners: Mapping[Place, int], bands: Sequence[range], team: Team
    ) -> None:
        self._grid = grid
        self._team = team
        self._bands = bands
        self._span = grid.frames[slab]
        places = grid.places(range(slab, slab + 1))
        self._owned = [[place for place in places if owners[place] == member] for member in range(team.members)]
        self._pieces: dict[tuple[int, int], Tensor] = {}

    def prepare(self, tiles: Tiles, like: Tensor) -> None:
        """Take this slab out of `tiles`, and all the memory that `finish` needs; `like` has its dtype and device."""
        member = self._team.member
        self._video = like.new_empty(1, 3, self._span.size, len(self._bands[member]), self._grid.width)
        own = {place: tiles.pop(place) for place in self._owned[member]}
        if self._team.group is None:
            self._pieces = {place[1:]: tile for place, tile in own.items()}
            return
        outgoing = [self._cut(own, band) for band in self._bands]
        self._sent_counts = [sum(piece.numel() for piece in pieces) for pieces in outgoing]
        self._sent = torch.cat([piece.reshape(-1) for pieces in outgoing for piece in pieces] or [like.new_empty(0)])
        assert self._sent.dtype == like.dtype, (self._sent.dtype, like.dtype)
        self._shapes = [{place: shape for place in owned if (shape := self._shape(place))[3]} for owned in self._owned]
        self._received = like.new_empty(sum(math.prod(shape) for shapes in self._shapes for shape in shapes.values()))

    def finish(self, tail: Tensor | None) -> Tensor:
        """This member's band, [1, 3, t, rows, W], blended with `tail`, the last frames of the slab before.

        `tail` is None for the first slab, and for the one that a restart begins with, whose first frames nobody wants.
        """
        if self._team.group is not None:
            self._exchange()
        if self._pieces:
            blend_rows(self._pieces, self._grid, self._bands[self._team.member], self._video)
        if tail is not None:
            assert tail.shape[2] == self._span.blend, (self._span, tail.shape)
            crossfade(tail, self._video[:, :, : self._span.blend], 2, 0, self._span.blend)
        return self._video

    def _exchange(self) -> None:
        dist.all_to_all_single(
            self._received,
            self._sent,
            output_split_sizes=[sum(math.prod(s) for s in shapes.values()) for shapes in self._shapes],
            input_split_sizes=self._sent_counts,
            group=self._team.group,
        )
        del self._sent
        shapes = {place: shape for shapes in self._shapes for place, shape in shapes.items()}
        flat = self._received.split([math.prod(shape) for shape in shapes.values()])
        self._pieces = {place[1:]: x.view(shape) for (place, shape), x in zip(shapes.items(), flat, strict=True)}
        del self._received

    def _cut(self, own: Tiles, band: range) -> list[Tensor]:
        """The rows of this member's tiles that lie in a band."""
        pieces = []
        for place, tile in own.items():
            row = self._grid.rows[place[1]]
            lines = rows_within(row, band)
            if lines:
                pieces.append(tile[..., lines.start - row.first : lines.stop - row.first, :])
        return pieces

    def _shape(self, place: Place) -> tuple[int, int, int, int, int]:
        """Shape of what this member gets of a tile; no rows where the tile lies outside of its band."""
        _, row, col = place
        lines = rows_within(self._grid.rows[row], self._bands[self._team.member])
        return (1, 3, self._span.size, len(lines), self._grid.cols[col].size)
