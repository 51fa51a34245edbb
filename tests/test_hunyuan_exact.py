"""HunyuanVideo's VAE over 1 to 6 ranks equals diffusers' untiled decode and encode: fp64 1e-10, fp32 1e-5."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import cycle, product

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vae_group.causal_conv
import vae_group.group_norm
from pipelines.hunyuan_video_exact import exact_decode, exact_encode, hunyuan_exact
from pipelines.hunyuan_video_exact_plan import ExactPlan, Level, StagePlan
from tests.ranks import leave, run_ranks
from tools.count_ops import OpCounter
from vae_group.frame_attention import FramePrefix
from vae_group.team import Team
from videopipe.runtime import Runtime

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
LATENTS = [(3, 5, 3), (1, 1, 2), (2, 9, 1)]  # frames, rows, cols; odd rows, fewer rows than ranks
VIDEOS = [(9, 40, 16), (1, 8, 8), (7, 21, 26)]  # sizes that strides do not divide among them
HELD, AGAIN = (Level.HOLD,) * 4, (Level.HOLD, Level.ENTER_AGAIN, Level.INSIDE_AGAIN, Level.STREAM)
PLANS = [(HELD, (2, 1, 3, 1)), (AGAIN, (1, 2, 1, 1)), ((*AGAIN[:1], Level.STREAM, *HELD[2:]), (9, 9, 9, 9))]


@cache
def tiny_vae(dtype: torch.dtype, attention: bool = True, channels: int = 4) -> AutoencoderKLHunyuanVideo:
    """Small, with weights that make norms and attention matter; untiled in space and time through public attributes."""
    torch.manual_seed(3)
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=(channels, 2 * channels, 2 * channels, 2 * channels),
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
        mid_block_add_attention=attention,
    )
    for name, parameter in vae.named_parameters():
        one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        torch.nn.init.normal_(parameter, one, 1.0 if ".to_" in name else 0.3)
    vae.disable_tiling()
    vae.use_framewise_decoding = vae.use_framewise_encoding = False
    return vae.eval().requires_grad_(False).to(dtype)


def made(levels: tuple[Level, ...], frames: tuple[int, ...]) -> ExactPlan:
    stages = tuple(StagePlan(level=lv, frames=f) for lv, f in zip(levels, frames, strict=True))
    return ExactPlan(stages=stages, peak_bytes=0, flops=0)


def random(shape: tuple[int, ...], channels: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(1, channels, *shape, generator=generator, dtype=torch.float64).to(dtype)


def relative(ours: Tensor, other: Tensor) -> float:
    assert ours.shape == other.shape and ours.dtype == other.dtype, (ours.shape, other.shape)
    return float((ours - other).abs().max() / other.abs().max()) if ours.numel() else 0.0


def decode_error(
    vae: AutoencoderKLHunyuanVideo, shape: tuple[int, ...], team: Team, plan: ExactPlan | None
) -> tuple[float, list[tuple[int, ...]]]:
    """How far this member's parts are from those rows of diffusers' untiled video; and which part of it they are."""
    latents = random(shape, 4, vae.dtype)
    reference = vae.decode(latents, return_dict=False)[0]
    parts = list(exact_decode(vae, latents, team, plan=plan))
    found = [(part.first_frame, part.video.shape[2], part.first_row, part.video.shape[3]) for part in parts]
    whole = torch.cat([part.video for part in parts], dim=2)
    first_row, rows = parts[0].first_row, whole.shape[3]
    return relative(whole, reference[:, :, :, first_row : first_row + rows]), found


def encode_error(vae: AutoencoderKLHunyuanVideo, shape: tuple[int, ...], team: Team, plan: ExactPlan | None) -> float:
    video = random(shape, 3, vae.dtype)
    return relative(exact_encode(vae, video, team, plan=plan), vae.encode(video).latent_dist.parameters)


def team_of(runtime: Runtime) -> Team:
    return Team(group=runtime.exchange_group, member=runtime.rank, members=runtime.world_size)


def check_all(runtime: Runtime) -> list[list[tuple[int, ...]]]:
    team, covered = team_of(runtime), []
    plans = cycle(PLANS)
    for shape, dtype in product(LATENTS, TOLERANCE):
        error, parts = decode_error(tiny_vae(dtype), shape, team, made(*next(plans)))
        assert error <= TOLERANCE[dtype], (shape, dtype, error)
        covered.append(parts)
    for shape, dtype in product(VIDEOS, TOLERANCE):
        levels, frames = next(plans)
        error = encode_error(tiny_vae(dtype), shape, team, made(levels[::-1], frames[::-1]))
        assert error <= TOLERANCE[dtype], (shape, dtype, error)
    leave(runtime)
    return covered


@pytest.mark.parametrize("members", [1, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4, 5, 6))])
def test_a_team_equals_the_untiled_vae(members: int) -> None:
    covered = run_ranks(check_all, members)
    for case, (shape, _) in enumerate(product(LATENTS, TOLERANCE)):
        of_members = [covered[member][case] for member in range(members)]
        times = [[(first, count) for first, count, *_ in parts] for parts in of_members]
        assert all(each == times[0] for each in times)  # in step
        ends = [first + count for first, count in times[0]]
        assert [first for first, _ in times[0]] == [0, *ends[:-1]] and ends[-1] == 1 + 4 * (shape[0] - 1)
        rows = [parts[0][2:] for parts in of_members]
        assert rows[0][0] == 0 and [start + count for start, count in rows] == [*(s for s, _ in rows[1:]), 8 * shape[1]]


levels_of = st.tuples(st.just(Level.HOLD), *[st.sampled_from(Level)] * 3)
frames_of = st.tuples(*[st.integers(1, 6)] * 4)


@settings(max_examples=10, deadline=None)
@given(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), levels_of, frames_of, st.booleans())
def test_any_size_plan_and_slab_decodes_exactly(
    shape: tuple[int, int, int], levels: tuple[Level, ...], frames: tuple[int, ...], attention: bool
) -> None:
    error, _ = decode_error(tiny_vae(torch.float64, attention), shape, Team(), made(levels, frames))
    assert error <= 1e-10


@settings(max_examples=10, deadline=None)
@given(st.tuples(st.integers(1, 14), st.integers(2, 20), st.integers(2, 20)), levels_of, frames_of, st.booleans())
def test_any_size_plan_and_slab_encodes_exactly(
    shape: tuple[int, int, int], levels: tuple[Level, ...], frames: tuple[int, ...], attention: bool
) -> None:
    assert encode_error(tiny_vae(torch.float64, attention), shape, Team(), made(levels[::-1], frames)) <= 1e-10


def test_the_vae_stays_as_it_is_and_so_does_what_it_gives() -> None:
    vae = tiny_vae(torch.float64)
    latents = random((2, 2, 2), 4, torch.float64)
    before, modules = vae.decode(latents, return_dict=False)[0], [type(module) for module in vae.modules()]
    video = torch.cat([part.video for part in hunyuan_exact(vae)(latents, Team())], dim=2)
    assert relative(video, before) <= 1e-10 and not video.requires_grad and torch.is_grad_enabled()
    assert torch.equal(vae.decode(latents, return_dict=False)[0], before)
    assert [type(module) for module in vae.modules()] == modules


def test_the_default_of_diffusers_is_another_video() -> None:
    """What is exact here is not what diffusers gives by default, which splits time even when tiling is off."""
    vae, latents = tiny_vae(torch.float64), random((6, 2, 2), 4, torch.float64)
    exact = vae.decode(latents, return_dict=False)[0]
    vae.use_framewise_decoding = True
    split = vae.decode(latents, return_dict=False)[0]
    vae.use_framewise_decoding = False
    assert relative(split, exact) > 1e-3


def test_padding_of_another_kind_is_refused() -> None:
    vae = AutoencoderKLHunyuanVideo(block_out_channels=(2, 2, 2, 2), norm_num_groups=1, layers_per_block=1).eval()
    vae.decoder.conv_out.pad_mode = "constant"
    with pytest.raises(ValueError, match=r"pad_mode='constant' has no exact decode.*need 'replicate'"):
        list(hunyuan_exact(vae)(torch.zeros(1, 16, 1, 1, 1), Team()))


# -- mistakes that must show


@contextmanager
def no_halo(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every member repeats its own border rows."""
    neighbours = vae_group.causal_conv.neighbour_rows
    none = lambda x, above, below, team, counts: neighbours(x, 0, 0, team, counts)  # noqa: E731
    patch.setattr(vae_group.causal_conv, "neighbour_rows", none)
    yield


@contextmanager
def halo_one_row_off(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The neighbour above gives the row before its last."""
    neighbours = vae_group.causal_conv.neighbour_rows

    def off(x: Tensor, above: int, below: int, team: Team, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        upper, lower = neighbours(x, above + 1, below, team, counts)
        return upper[:, :, :, :1], lower

    patch.setattr(vae_group.causal_conv, "neighbour_rows", off)
    yield


@contextmanager
def local_statistics(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each member normalises by its own rows."""
    patch.setattr(vae_group.group_norm, "all_sum", lambda x, team: x)
    yield


@contextmanager
def a_frame_too_far(patch: pytest.MonkeyPatch, by: int = 1) -> Iterator[None]:
    """Attention sees one frame of the future, or not its own."""
    attend = FramePrefix.attend
    patch.setattr(
        FramePrefix,
        "attend",
        lambda self, q, frame, heads: attend(self, q, min(max(frame + by, 0), self._filled - 1), heads),
    )
    yield


TWINS: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "no halo": no_halo,
    "halo one row off": halo_one_row_off,
    "local statistics": local_statistics,
    "a frame ahead": a_frame_too_far,
    "a frame behind": partial(a_frame_too_far, by=-1),
}


def check_twins(runtime: Runtime) -> dict[str, tuple[float, float]]:
    team, vae, found = team_of(runtime), tiny_vae(torch.float64), {}
    for name, twin in TWINS.items():
        with pytest.MonkeyPatch.context() as patch, twin(patch):  # type: ignore[attr-defined]
            decoded = decode_error(vae, (3, 5, 3), team, made(*PLANS[0]))[0]
            found[name] = (decoded, encode_error(vae, (9, 40, 16), team, made(*PLANS[0])))
    leave(runtime)
    return found


def test_mistakes_are_far_from_the_untiled_vae() -> None:
    found = run_ranks(check_twins, 2)
    assert set(found[0]) == set(TWINS)
    for name in TWINS:
        assert max(member[name][0] for member in found) > 1e-3, (name, found)
        assert max(member[name][1] for member in found) > 1e-3, (name, found)


def test_attention_takes_memory_linear_in_tokens() -> None:
    """Twice the tokens, twice the peak; nothing as large as a mask is ever there, as it is in diffusers."""
    vae, peaks = tiny_vae(torch.float32), []
    for cols in (24, 48):
        latents = random((4, 8, cols), 4, torch.float32)
        tokens = 4 * 8 * cols
        with OpCounter() as live:
            for _ in exact_decode(vae, latents, Team(), plan=made(HELD, (1, 1, 1, 1))):
                pass
        assert live.largest < tokens**2
        peaks.append(live.peak)
    assert 1.9 < peaks[1] / peaks[0] < 2.1
    with OpCounter() as live:
        vae.decoder.mid_block(random((4, 8, 24), 8, torch.float32))
    assert live.largest >= (4 * 8 * 24) ** 2
