"""WF-VAE over a team equals the whole clip decoded, or encoded, by one process: any members, sizes and chunks."""

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from pipelines import open_sora_plan_decode
from pipelines.models.wf_vae import WFVAEModel
from pipelines.open_sora_plan_decode import exact_encode, wfvae_exact
from tests.ranks import leave, run_ranks
from tests.test_wf_vae import NEAREST, TRILINEAR, clip, latents, tiny, worst
from vae_group import halo
from vae_group.team import Part, Team
from videopipe.runtime import Runtime


def team_of(runtime: Runtime) -> Team:
    group = runtime.exchange_group if runtime.world_size > 1 else None
    return Team(group=group, member=runtime.rank, members=runtime.world_size)


def cases(members: int) -> list[tuple[int, int, int, int]]:
    """Latent frames, rows, cols, chunk: fewer rows than members, odd ones, a left-over frame at the end."""
    draw = random.Random(members)
    fixed = [(1, 1, 2, 1), (2, members, 1, 1), (4, 5, 3, 2), (2, 2 * members + 1, 1, 5)]  # upstream's 4 in 2s is wrong
    return [*fixed, (draw.randint(3, 6), draw.randint(1, 8), draw.randint(1, 3), draw.randint(1, 4))]


def decode(parts: Iterator[Part], whole: Tensor, members: int) -> tuple[float, list[tuple[int, int]]]:
    """The worst error of a member's parts against the whole clip, and the frames of each part."""
    error, frames = 0.0, []
    for part in parts:
        t, h = part.video.shape[2:4]
        expected = whole[:, :, part.first_frame : part.first_frame + t, part.first_row : part.first_row + h]
        assert part.video.shape == expected.shape
        error = max(error, worst(part.video, expected)) if part.video.numel() else error
        frames.append((part.first_frame, t, part.first_row, h))
    return error, frames


def on_a_team(runtime: Runtime, single: bool) -> list[tuple[float, float, list[tuple[int, ...]]]]:
    team, found = team_of(runtime), []
    for i, (frames, rows, cols, chunk) in enumerate(cases(team.members)):
        model = NEAREST if i % 2 else TRILINEAR
        z, x = latents(frames, rows, cols, seed=i), clip(4 * frames - 3, 8 * rows, 8 * cols, seed=i)
        whole, moments = model.decode(z).sample, model.encode(x).latent_dist.parameters
        if single:
            model = model.float()
            z, x = z.float(), x.float()
        error, parts = decode(wfvae_exact(model, chunk)(z, team), whole, team.members)
        encoded = worst(exact_encode(model, x, team, chunk_frames=chunk), moments) if i < 3 else 0.0
        found.append((error / float(whole.abs().max()), encoded / float(moments.abs().max()), parts))
        model.double()
    leave(runtime)
    return found


@pytest.mark.parametrize("members", [1, 2, 3, 4, 6])
def test_a_team_equals_the_whole_clip(members: int) -> None:
    ranks = run_ranks(on_a_team, members, False)
    for i, (frames, rows, _, chunk) in enumerate(cases(members)):
        assert max(rank[i][0] for rank in ranks) < 1e-10
        assert max(rank[i][1] for rank in ranks) < 1e-10
        parts = [rank[i][2] for rank in ranks]
        assert {len(own) for own in parts} == {-(-frames // chunk)}  # in step
        covered = torch.zeros(4 * frames - 3, 8 * rows)
        for first_frame, t, first_row, h in (part for own in parts for part in own):
            covered[first_frame : first_frame + t, first_row : first_row + h] += 1
        assert bool((covered == 1).all())


def test_a_team_in_single_precision() -> None:
    for rank in run_ranks(on_a_team, 5, True):
        assert max(max(decoded, encoded) for decoded, encoded, _ in rank) < 1e-5


# -- twins, and what is refused

GROUPS_OF_ONE = {"base_channels": 32, "encoder_energy_flow_hidden_size": 32, "decoder_energy_flow_hidden_size": 32}


def broken_team(runtime: Runtime, breakage: str) -> float:
    team = team_of(runtime)
    z = latents(3, 6, 2)
    whole = TRILINEAR.decode(z).sample
    with pytest.MonkeyPatch.context() as patch:
        if breakage == "zeros for the neighbours' rows":
            patch.setattr(open_sora_plan_decode, "neighbour_rows", zeros_for_rows)
        elif breakage == "keys of the own rows alone":
            patch.setattr(open_sora_plan_decode, "gather_rows", lambda x, team, counts: x)
        error = decode(wfvae_exact(TRILINEAR, 2)(z, team), whole, team.members)[0]
    leave(runtime)
    return error / float(whole.abs().max())


def zeros_for_rows(x: Tensor, above: int, below: int, team: Team, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    upper, lower = halo.neighbour_rows(x, above, below, team, counts)
    return upper * 0, lower * 0


@pytest.mark.parametrize("breakage", ["zeros for the neighbours' rows", "keys of the own rows alone"])
def test_what_a_team_does_not_share_is_noticed(breakage: str) -> None:
    assert min(run_ranks(broken_team, 3, breakage)) > 1e-4


def test_the_model_is_free_between_the_pieces() -> None:
    """A team of one needs no ranks; the model's own decode gives the same while a clip is under way."""
    z = latents(4, 3, 2)
    whole = TRILINEAR.decode(z).sample
    pieces = wfvae_exact(TRILINEAR, 1)(z, Team())
    first = next(pieces)
    assert torch.equal(TRILINEAR.decode(z).sample, whole)
    rest = [part.video for part in pieces]
    assert worst(torch.cat([first.video, *rest], dim=2), whole) < 1e-10


@pytest.mark.parametrize(
    ("model", "chunk", "message"),
    [
        (lambda: TRILINEAR, 0, "chunk_frames=0 must be at least 1"),
        (lambda: tiny(norm_type="groupnorm", **GROUPS_OF_ONE), 2, "chunk_frames=2 needs norm_type='layernorm'"),
    ],
)
def test_what_cannot_be_decoded_exactly_is_refused(model: Callable[[], WFVAEModel], chunk: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wfvae_exact(model(), chunk)
