"""Tiled decode: the arithmetic of tiles, and the bits of diffusers' own tiled decode on one rank."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipelines.hunyuan_video_tiles import decode_tile, frame_causal_attention, hunyuan_tiled, tile_settings
from tests.tiled_vae import draw_latents, join, reference, small_vae
from vae_group import tiles
from vae_group.team import Team
from vae_group.tiled import TiledDecoder, row_bands
from vae_group.tiles import TileSettings, assign, balance, blend_rows, next_wave, rows_within, tile_grid

SMALL = {
    "tile_sample_min_height": 32, "tile_sample_min_width": 24, "tile_sample_min_num_frames": 8,
    "tile_sample_stride_height": 24, "tile_sample_stride_width": 16, "tile_sample_stride_num_frames": 4,
}  # fmt: skip


@st.composite
def tile_sizes(draw: st.DrawFn) -> TileSettings:
    """Any tiles that meet, including overlaps of nothing and of more than half a tile."""
    sizes = {}
    for axis, stride in (("height", 8), ("width", 8), ("frames", 4)):
        tile = draw(st.integers(1, 5))
        sizes[axis] = tile * stride
        sizes[f"overlap_{axis}"] = draw(st.integers(0, tile - 1)) * stride
    return TileSettings(**sizes, spatial=draw(st.booleans()), temporal=draw(st.booleans()))


def configure(vae: object, sizes: TileSettings) -> None:
    """The same tiles in diffusers' terms."""
    vae.enable_tiling(  # type: ignore[attr-defined]
        sizes.height, sizes.width, sizes.frames,
        sizes.height - sizes.overlap_height, sizes.width - sizes.overlap_width, sizes.frames - sizes.overlap_frames,
    )  # fmt: skip
    vae.use_tiling = sizes.spatial  # type: ignore[attr-defined]
    vae.use_framewise_decoding = sizes.temporal  # type: ignore[attr-defined]


@settings(max_examples=100, deadline=None)
@given(
    sizes=tile_sizes(),
    shape=st.tuples(st.integers(1, 11), st.integers(1, 11), st.integers(1, 11)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_any_tiles_give_the_bits_of_diffusers(
    sizes: TileSettings, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    vae = small_vae(cheap=True, dtype=dtype)
    configure(vae, sizes)
    assert tile_settings(vae) == sizes
    latents = draw_latents(*shape, dtype=dtype)
    decoder = TiledDecoder(lambda z: vae.decoder(vae.post_quant_conv(z)), sizes, 4, 8)
    parts = list(decoder(latents, Team()))
    assert torch.equal(join(parts), reference(vae, latents))
    assert [part.first_frame for part in parts] == [span.first for span in tile_grid(shape, sizes, 4, 8).frames], (
        "one part for each slab"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiling", [{}, SMALL], ids=["time", "space and time"])
def test_the_vae_in_tiles_gives_the_bits_of_its_own_decode(tiling: dict[str, int], dtype: torch.dtype) -> None:
    vae = small_vae(dtype=dtype, **tiling)
    latents = draw_latents(6, 6, 5, dtype=dtype)
    assert torch.equal(join(list(hunyuan_tiled(vae)(latents, Team()))), reference(vae, latents))


@pytest.mark.parametrize("shape", [(1, 3, 5), (4, 6, 6), (7, 4, 2)])
def test_one_tile_gives_the_bits_of_the_decoder(shape: tuple[int, int, int]) -> None:
    vae, latents = small_vae(), draw_latents(*shape)
    with torch.no_grad():
        expected = vae.decoder(vae.post_quant_conv(latents))
    assert torch.equal(decode_tile(vae, latents), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("frames", "tokens"), [(5, 7), (1, 40), (9, 130), (3, 700), (5, 561), (2, 1500)])
def test_attention_in_pieces_gives_the_bits_of_the_whole_mask(frames: int, tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(1, 1, frames * tokens, 16, generator=generator).to(dtype) for _ in range(3))
    frame = torch.arange(frames * tokens) // tokens
    mask = torch.where(frame[None] > frame[:, None], -torch.inf, 0.0).to(dtype)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.equal(frame_causal_attention(q, k, v, tokens), expected)
    if frames > 1:
        unmasked = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert not torch.allclose(frame_causal_attention(q, k, v, tokens), unmasked, atol=1e-2)


# ---- what must not pass: a decode that is broken on purpose


def broken_decode(latents: Tensor, monkeypatch: pytest.MonkeyPatch, name: str, broken: object) -> Tensor:
    """The cheap VAE's tiled decode with one function of the blending replaced."""
    vae = small_vae(cheap=True, **SMALL)
    monkeypatch.setattr(f"vae_group.tiled.{name}", broken)
    decoder = TiledDecoder(lambda z: vae.decoder(vae.post_quant_conv(z)), tile_settings(vae), 4, 8)
    return join(list(decoder(latents, Team())))


def test_tiles_blended_from_the_last_one_on_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(pieces: dict[tuple[int, int], Tensor], *rest: object) -> None:
        # every tile meets neighbours that have not been blended themselves
        raw = {place: piece.clone() for place, piece in pieces.items()}

        class Raw(dict[tuple[int, int], Tensor]):
            def __getitem__(self, place: tuple[int, int]) -> Tensor:
                return raw[place] if self.pop(place, None) is None else pieces[place]

        blend_rows(Raw(pieces), *rest)  # type: ignore[arg-type]

    latents = draw_latents(5, 9, 9)
    wrong = broken_decode(latents, monkeypatch, "blend_rows", backwards)
    expected = reference(small_vae(cheap=True, **SMALL), latents)
    assert not torch.allclose(wrong, expected, atol=1e-3)


def test_a_missing_tile_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_one(pieces: dict[tuple[int, int], Tensor], *rest: object) -> None:
        pieces[1, 1] = torch.zeros_like(pieces[1, 1])
        blend_rows(pieces, *rest)  # type: ignore[arg-type]

    latents = draw_latents(5, 9, 9)
    wrong = broken_decode(latents, monkeypatch, "blend_rows", without_one)
    assert not torch.allclose(wrong, reference(small_vae(cheap=True, **SMALL), latents), atol=1e-3)


def test_frames_that_are_not_blended_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    latents = draw_latents(9, 4, 3)
    wrong = broken_decode(latents, monkeypatch, "crossfade", lambda *_: None)
    assert not torch.allclose(wrong, reference(small_vae(cheap=True, **SMALL), latents), atol=1e-3)


# ---- sizes that diffusers gets wrong


@pytest.mark.parametrize(
    ("change", "near"),
    [
        ({"frames": 18}, "tile_frames=18 must be 4 or a multiple of 4, nearest is 20"),
        ({"overlap_frames": 6}, "tile_overlap_frames=6 must be 0 or a multiple of 4, nearest is 8"),
        ({"height": 250}, "tile_height=250 must be 8 or a multiple of 8, nearest is 248"),
        ({"overlap_width": 4}, "tile_overlap_width=4 must be 0 or a multiple of 8, nearest is 8"),
        ({"width": 0}, "tile_width=0 must be 8 or a multiple of 8, nearest is 8"),
        ({"overlap_height": 256}, "tile_overlap_height=256 must be smaller than tile_height=256, nearest is 248"),
    ],
)
def test_tiles_that_do_not_meet_are_refused(change: dict[str, int], near: str) -> None:
    with pytest.raises(ValueError, match=near):
        hunyuan_tiled(small_vae(), replace(TileSettings(), **change))


def test_diffusers_misplaces_frames_where_we_refuse() -> None:
    """The reason to refuse: with an identity of a decoder, frames come out at the wrong times."""

    class Identity(torch.nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z[:, :3].repeat_interleave(4, dim=2)[:, :, 3:].repeat_interleave(8, 3).repeat_interleave(8, 4)

    vae = small_vae(cheap=True)
    vae.decoder, vae.post_quant_conv = Identity(), torch.nn.Identity()
    latents = torch.arange(13.0).view(1, 1, 13, 1, 1).expand(1, 16, 13, 1, 1)
    right = torch.arange(13.0).repeat_interleave(4)[3:]
    assert torch.allclose(reference(vae, latents)[0, 0, :, 0, 0], right, atol=1e-5)
    vae.tile_sample_stride_num_frames = 10
    assert not torch.allclose(reference(vae, latents)[0, 0, :, 0, 0], right, atol=0.5)


@pytest.mark.parametrize("shape", [(16, 3, 1, 2, 2), (1, 16, 0, 2, 2), (16, 3, 2, 2)])
def test_latents_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        next(hunyuan_tiled(small_vae())(torch.zeros(shape), Team()))


def test_a_last_slab_of_one_latent_frame_is_not_decoded() -> None:
    """diffusers decodes it and then drops all of its frames."""
    assert [span.begin for span in tile_grid((16, 4, 4), TileSettings(), 4, 8).frames] == [0, 3, 6, 9, 12]
    vae, count = small_vae(cheap=True), itertools.count()
    decoder = TiledDecoder(lambda z: (next(count), vae.decoder(vae.post_quant_conv(z)))[1], TileSettings(), 4, 8)
    latents = draw_latents(16, 4, 4)
    assert torch.equal(join(list(decoder(latents, Team()))), reference(vae, latents))
    assert next(count) == 5


# ---- who does what


@settings(max_examples=60, deadline=None)
@given(sizes=tile_sizes(), shape=st.tuples(*[st.integers(1, 12)] * 3), members=st.integers(1, 6), cut=st.data())
def test_bands_of_rows_are_the_rows_of_the_whole(
    sizes: TileSettings, shape: tuple[int, int, int], members: int, cut: st.DataObject
) -> None:
    grid = tile_grid(shape, sizes, 4, 8)
    generator = torch.Generator().manual_seed(0)
    raw = {
        (r, c): torch.randn(1, 3, 2, row.size, col.size, generator=generator)
        for (r, row), (c, col) in itertools.product(enumerate(grid.rows), enumerate(grid.cols))
    }

    def blended(band: range) -> Tensor:
        video = torch.full((1, 3, 2, len(band), grid.width), torch.nan)
        pieces = {}
        for (r, c), tile in raw.items():
            row = grid.rows[r]
            if lines := rows_within(row, band):
                pieces[r, c] = tile[..., lines.start - row.first : lines.stop - row.first, :].clone()
        blend_rows(pieces, grid, band, video)
        return video

    whole = blended(range(grid.height))
    assert not whole.isnan().any()
    assert torch.equal(torch.cat([blended(band) for band in row_bands(grid.height, members)], dim=3), whole)


@settings(max_examples=60, deadline=None)
@given(sizes=tile_sizes(), shape=st.tuples(*[st.integers(1, 20)] * 3), members=st.integers(1, 8))
def test_every_tile_has_one_member_and_loads_differ_by_less_than_a_tile(
    sizes: TileSettings, shape: tuple[int, int, int], members: int
) -> None:
    grid = tile_grid(shape, sizes, 4, 8)
    start, seen = 0, []
    while start < len(grid.frames):
        wave = next_wave(grid, start, members)
        assert wave.start == start and 1 <= len(wave) <= members
        costs = {place: grid.cost(place) for place in grid.places(wave)}
        owners = assign(costs, members)
        assert set(owners) == set(costs) and set(owners.values()) <= set(range(members))
        loads = [sum(costs[p] for p, member in owners.items() if member == m) for m in range(members)]
        assert max(loads) <= sum(loads) / members + max(costs.values())
        seen += grid.places(wave)
        start = wave.stop
    assert seen == grid.places(range(len(grid.frames)))


def test_members_are_busy_at_real_sizes() -> None:
    """129x720x1280 in diffusers' tiles: 11 slabs of 28; without spatial tiles a wave has a slab for each member."""
    grid = tile_grid((33, 90, 160), TileSettings(), 4, 8)
    assert (len(grid.frames), len(grid.rows), len(grid.cols)) == (11, 4, 7)
    for members in range(1, 9):
        wave = next_wave(grid, 1, members)
        costs = {place: grid.cost(place) for place in grid.places(wave)}
        assert len(wave) <= 2
        assert balance(costs, assign(costs, members), members) > tiles.EVEN_ENOUGH
    assert len(next_wave(tile_grid((33, 90, 160), TileSettings(spatial=False), 4, 8), 1, 8)) == 8


def test_a_restart_gives_the_same_frames() -> None:
    vae = small_vae(cheap=True)
    sizes = TileSettings(height=32, width=24, frames=20, overlap_height=8, overlap_width=8, overlap_frames=16)
    decoder = TiledDecoder(lambda z: vae.decoder(vae.post_quant_conv(z)), sizes, 4, 8)
    latents = draw_latents(14, 5, 5)
    whole = join(list(decoder(latents, Team())))
    for frame in (0, 1, 5, 20, 21, 40, 52):
        parts = list(decoder(latents, Team(), first_frame=frame))
        begin = frame - parts[0].first_frame
        assert begin >= 0
        assert torch.equal(join(parts)[:, :, begin:], whole[:, :, frame:]), frame
    assert parts[0].first_frame > 0, "earlier slabs are not decoded again"
