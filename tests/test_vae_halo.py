"""Neighbours' rows are slices of the whole tensor, bit for bit, for any counts; sums are the same bits everywhere."""

import random
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ranks import leave, run_ranks
from vae_group.halo import all_sum, gather_rows, halo, neighbour_rows
from vae_group.team import Team
from videopipe.partition import offsets
from videopipe.runtime import Runtime

HALOS = ((0, 0), (1, 1), (1, 0), (0, 2), (3, 2), (50, 50))


def team_of(runtime: Runtime) -> Team:
    return Team(group=runtime.exchange_group, member=runtime.rank, members=runtime.world_size)


def some_counts(members: int) -> list[tuple[int, ...]]:
    """Even, uneven, with members that have fewer rows than the halo, or none."""
    draw = random.Random(members)
    drawn = [tuple(draw.choice((0, 0, 1, 1, 2, 3, 7)) for _ in range(members)) for _ in range(6)]
    return [(2,) * members, (0,) * (members - 1) + (1,), (0,) * members, *drawn]


def clip(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(2, 3, 2, rows, 5, generator=generator, dtype=torch.float64).to(dtype)


def check_rows(runtime: Runtime) -> int:
    team, checked = team_of(runtime), 0
    for counts, (above, below), dtype in product(
        some_counts(runtime.world_size), HALOS, (torch.float32, torch.bfloat16)
    ):
        whole, start = clip(sum(counts), dtype), offsets(counts)
        top, end = start[team.member], start[team.member + 1]
        own = whole[:, :, :, top:end]
        first, last = (max(top - above, 0), end + below) if end > top else (top, end)
        upper, lower = neighbour_rows(own, above, below, team, counts)
        assert torch.equal(upper, whole[:, :, :, first:top]) and torch.equal(lower, whole[:, :, :, end:last]), counts
        assert torch.equal(gather_rows(own, team, counts), whole), counts
        checked += 1
    leave(runtime)
    return checked


@pytest.mark.parametrize("members", range(1, 7))
def test_rows_with_halo_are_slices_of_the_whole(members: int) -> None:
    assert set(run_ranks(check_rows, members)) == {9 * len(HALOS) * 2}


def check_sums(runtime: Runtime) -> list[list[float]]:
    team, sums = team_of(runtime), []
    for dtype in (torch.float32, torch.float64):
        parts = [clip(member + 1)[0, :, 0, :1].to(dtype) * 10.0 ** (4 * member) for member in range(team.members)]
        expected = parts[0]
        for part in parts[1:]:
            expected = expected + part
        for _ in range(3):
            total = all_sum(parts[team.member], team)
            assert total.shape == expected.shape and torch.equal(total, expected)
        sums.append(total.flatten().tolist())
    leave(runtime)
    return sums


@pytest.mark.parametrize("members", [1, 3, 6])
def test_sums_are_the_same_bits_on_every_member(members: int) -> None:
    results = run_ranks(check_sums, members)
    assert all(result == results[0] for result in results)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 9), st.integers(0, 9), st.integers(0, 5))
def test_a_halo_is_every_row_in_reach_once(counts: list[int], above: int, below: int, member: int) -> None:
    member %= len(counts)
    start = offsets(counts)
    rows = [row for peer in range(len(counts)) for row in halo(member, peer, above, below, counts)]
    top, end = start[member], start[member + 1]
    reach = [*range(max(0, top - above), top), *range(end, min(start[-1], end + below))] if end > top else []
    assert rows == reach
    for peer in range(len(counts)):
        assert all(start[peer] <= row < start[peer + 1] for row in halo(member, peer, above, below, counts))


def test_wrong_row_counts_are_named() -> None:
    with pytest.raises(ValueError, match=r"row_counts=\(3,\) must have 4 rows for member 0 of 1"):
        neighbour_rows(clip(4), 1, 1, Team(), (3,))
