"""Out of memory in exact decodes by teams of real ranks: whichever tensor finds no room, all go on, or all fail."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vae_group.halo
from pipelines.decode_memory import hunyuan_exactly_within, wfvae_within
from pipelines.hunyuan_video_exact import exact_encode
from pipelines.hunyuan_video_exact_plan import decode_plans, plan_decode
from pipelines.open_sora_plan_decode import exact_encode as wf_exact_encode
from pipelines.open_sora_plan_decode import wfvae_exact
from tests.ranks import RanksError, leave, run_ranks
from tests.test_hunyuan_exact import random, relative, team_of, tiny_vae
from tests.test_hunyuan_exact_plan import RELEASED
from tests.test_wf_vae import TRILINEAR, clip, latents
from vae_group.memory import Setting, smaller
from vae_group.retry import TeamOutOfMemoryError, from_the_start, is_out_of_memory, together
from vae_group.team import Part, PartDecoder, Team
from videopipe.config import DecodeConfig
from videopipe.runtime import Runtime

SHAPE = (2, 3, 2)
PLACES = 6
"""Of all tensors that a decode makes, so many are tried as the one that finds no room."""


class RunsOut(TorchDispatchMode):
    """There is no memory for certain tensors, by their number; single values, which take none to speak of, apart.

    `of`: only what this operation makes is counted. Members with rows convolve equally often, so they fail in step.
    """

    def __init__(self, *places: int, of: str = "") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places = places
        self.of = of
        self.made = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.places and self.made > max(self.places):
            return result
        if func.namespace != "aten" or func.is_view or self.of not in func.overloadpacket.__name__:
            return result
        given, made = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        known = {x.untyped_storage()._cdata for x in given}
        if any(x.numel() > 1 and x.untyped_storage()._cdata not in known for x in made):
            self.made += 1
            if self.made - 1 in self.places:
                raise torch.OutOfMemoryError("no memory, says the test")
        return result


class Case:
    """A VAE's exact decode as the pipelines use it, and the whole video that it must give."""

    def __init__(self, decoder: PartDecoder, latents: Tensor, whole: Tensor) -> None:
        self.decoder = decoder
        self.latents = latents
        self.whole = whole

    def error(self, parts: Sequence[Part]) -> float:
        """The largest error of a member's parts, which must follow one another without a gap to the last frame."""
        frame, error = 0, 0.0
        for part in parts:
            t, h = part.video.shape[2:4]
            assert part.first_frame == frame
            expected = self.whole[:, :, frame : frame + t, part.first_row : part.first_row + h]
            error = max(error, relative(part.video, expected))
            frame += t
        assert frame == self.whole.shape[2]
        return error


def hunyuan() -> Case:
    vae, latents = tiny_vae(torch.float64), random(SHAPE, 4, torch.float64)
    decoder = hunyuan_exactly_within(vae, DecodeConfig(exact=True))
    return Case(decoder, latents, vae.decode(latents, return_dict=False)[0])


def wf_vae() -> Case:
    def in_chunks(chunk: int | None) -> PartDecoder:
        assert chunk is not None
        return wfvae_exact(TRILINEAR, chunk)

    z = latents(5, 3, 1)
    decoder = wfvae_within(TRILINEAR, DecodeConfig(mode="tiles"), in_chunks)
    return Case(decoder, z, TRILINEAR.decode(z).sample)


CASES = {"hunyuan": hunyuan, "wf_vae": wf_vae}


def settings_of(parts: Sequence[Part]) -> list[str]:
    return list(dict.fromkeys(part.setting for part in parts))


@torch.no_grad()
def with_failures(runtime: Runtime, name: str) -> tuple[list[str], list[tuple[float, list[str]]]]:
    """The settings without and with failures, of one member or of both, and how far from the whole video that is."""
    team, case, found = team_of(runtime), CASES[name](), []
    with RunsOut() as count:
        wanted = settings_of(list(case.decoder(case.latents, team)))
    failures = [RunsOut(*([count.made * i // PLACES] * (runtime.rank != i % 2))) for i in range(PLACES)]
    for failure in (*failures, RunsOut(0), RunsOut(17, of="convolution")):
        with failure:
            parts = list(case.decoder(case.latents, team))
        found.append((case.error(parts), settings_of(parts)))
    leave(runtime)
    return wanted, found


@pytest.mark.parametrize("name", CASES)
def test_whichever_tensor_finds_no_room_a_team_goes_on_and_is_exact(name: str) -> None:
    ranks = run_ranks(with_failures, 2, name)
    assert ranks[0][0] == ranks[1][0] and len(ranks[0][0]) == 1
    for (error, settings), (other_error, other_settings) in zip(ranks[0][1], ranks[1][1], strict=True):
        assert max(error, other_error) <= 1e-10
        assert settings == other_settings
        assert settings[-1] != ranks[0][0][0], "the smaller setting is told"
        assert settings[:-1] in ([], ranks[0][0])


@torch.no_grad()
def twice(runtime: Runtime) -> list[str]:
    """One member runs out, and when both go on with less, the other one."""
    team, said = team_of(runtime), []
    for case in (make() for make in CASES.values()):
        with pytest.raises(TeamOutOfMemoryError) as caught, RunsOut(40 if runtime.rank else 90):
            list(case.decoder(case.latents, team))
        said.append(str(caught.value))
        assert case.error(list(case.decoder(case.latents, team))) <= 1e-10, "the next clip is decoded"
    leave(runtime)
    return said


def test_a_second_time_is_an_error_for_all_members_and_nobody_waits() -> None:
    for said in run_ranks(twice, 2):
        assert said == ["1 of 2 ranks ran out of memory while decoding"] * len(CASES)


@torch.no_grad()
def encode_where_one_runs_out(runtime: Runtime) -> None:
    team = team_of(runtime)
    vae, video, pixels = tiny_vae(torch.float64), random((5, 24, 16), 3, torch.float64), clip(5, 24, 16)
    for encode in (
        lambda: exact_encode(vae, video, team),
        lambda: wf_exact_encode(TRILINEAR, pixels, team, chunk_frames=1),
    ):
        with pytest.raises(TeamOutOfMemoryError), RunsOut(*([60] * runtime.rank)):
            encode()
    leave(runtime)


def test_an_encode_ends_for_all_members() -> None:
    run_ranks(encode_where_one_runs_out, 2)


@torch.no_grad()
def without_agreement(runtime: Runtime) -> None:
    """The twin: members that go into a collective without asking."""
    case = hunyuan()
    with pytest.MonkeyPatch.context() as patch, RunsOut(*([200] * runtime.rank)):
        patch.setattr(vae_group.halo, "all_ready", lambda team, device: None)
        list(case.decoder(case.latents, team_of(runtime)))


def test_without_agreement_a_team_does_not_go_on() -> None:
    with pytest.raises(RanksError):
        run_ranks(without_agreement, 2, timeout=5.0)


@torch.no_grad()
@pytest.mark.parametrize(("make", "frames_before"), [(hunyuan, 0), (wf_vae, 11)])
def test_one_rank_goes_on_where_it_was_and_says_so(
    make: Callable[[], Case], frames_before: int, caplog: pytest.LogCaptureFixture
) -> None:
    case = make()
    with RunsOut() as count:
        (wanted,) = settings_of(list(case.decoder(case.latents, Team())))
    assert "instead of" not in caplog.text
    with RunsOut(count.made - 10):
        parts = list(case.decoder(case.latents, Team()))
    assert case.error(parts) <= 1e-10
    first, second = settings_of(parts) if frames_before else [wanted, *settings_of(parts)]
    assert first == wanted
    assert sum(part.video.shape[2] for part in parts if part.setting == first) == frames_before
    assert f"from frame {frames_before} on, {second} instead of {first}" in caplog.text


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def broken() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        together(Team(), torch.device("cpu"), broken)
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"))
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


# ---- which settings there are


@pytest.mark.parametrize(("latent", "members"), [((33, 90, 160), 1), ((33, 90, 160), 4), ((9, 30, 40), 3)])
def test_the_plans_are_those_that_any_room_would_ask_for(latent: tuple[int, int, int], members: int) -> None:
    plans = decode_plans(RELEASED, latent, members, 2)
    assert [plan.flops for plan in plans] == sorted(plan.flops for plan in plans)
    assert [plan.peak_bytes for plan in plans] == sorted({plan.peak_bytes for plan in plans}, reverse=True)
    most, least = plans[0].peak_bytes, plans[-1].peak_bytes
    for room in (most, most - 1, (most + least) // 2, least + 1, least):
        first = next(plan for plan in plans if plan.peak_bytes <= room)
        assert first == plan_decode(RELEASED, latent, members, 2, memory_bytes=room)
    with pytest.raises(ValueError, match=f"nearest is {least}"):
        plan_decode(RELEASED, latent, members, 2, memory_bytes=least - 1)


def test_the_second_try_needs_much_less() -> None:
    def of(*peaks: int) -> list[Setting]:
        return [Setting(name=str(peak), peak_bytes=peak, decoder=from_the_start(wf_vae().decoder)) for peak in peaks]

    def tried(*peaks: int) -> str | None:
        second = smaller(of(*peaks), 0)
        return None if second is None else second.name

    assert tried(100, 99, 76, 75, 20) == "75"
    assert tried(100, 99, 90) == "90", "the least, where nothing is much less"
    assert tried(100) is None and tried(100, 100) is None
    plans = decode_plans(RELEASED, (33, 90, 160), 1, 2)
    fits = next(i for i, plan in enumerate(plans) if plan.peak_bytes * 2 < 48e9)
    second = smaller(of(*(plan.peak_bytes for plan in plans)), fits)
    assert second is not None and second.peak_bytes < 0.75 * plans[fits].peak_bytes
