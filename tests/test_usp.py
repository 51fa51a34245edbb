"""Ulysses along one axis of a mesh and a ring along the other: equal to one process for any degrees and counts."""

from itertools import product
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dit_group.attention import SequenceParallel
from dit_group.kernels import math, sdpa
from dit_group.ulysses import Balance
from dit_group.usp import Usp
from pipelines.explain import RankPlan, explain_config
from tests.ranks import leave, run_ranks
from videopipe.config import ConfigError, load_config
from videopipe.partition import JointSequence, Mesh, ring_bytes, split_evenly
from videopipe.runtime import Runtime

HEAD_DIM = 8
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
Inside = Literal["ulysses", "ring"]


def tensors(batch: int, tokens: int, heads: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens * 100 + heads)
    return [
        torch.randn(batch, tokens, heads, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(3)
    ]


def relative(ours: Tensor, other: Tensor) -> float:
    assert ours.shape == other.shape and ours.dtype == other.dtype
    return float((ours - other).double().norm() / other.double().norm().clamp_min(1e-30))


# -- the arithmetic of the mesh


@pytest.mark.parametrize(("members", "heads", "degree"), [(8, 24, 8), (8, 5, 4), (7, 24, 7), (7, 3, 1), (6, 4, 3)])
def test_degree_is_the_largest_divisor_that_heads_suffice_for(members: int, heads: int, degree: int) -> None:
    assert Mesh.choose(members, heads) == Mesh(degree, members // degree)


@pytest.mark.parametrize(("members", "heads", "degree", "near"), [(6, 24, 4, 3), (8, 4, 8, 4), (7, 24, 2, 1)])
def test_an_impossible_degree_is_refused(members: int, heads: int, degree: int, near: int) -> None:
    message = f"attention.ulysses_degree={degree} must divide {members} .*{heads} heads, nearest is {near}"
    with pytest.raises(ValueError, match=message):
        Mesh.choose(members, heads, degree)


def test_axes_of_a_mesh() -> None:
    near, far = Mesh(2, 3), Mesh(2, 3, inside="ring")
    assert [near.ulysses_members(i) for i in range(6)] == [(0, 1), (0, 1), (2, 3), (2, 3), (4, 5), (4, 5)]
    assert [near.ring_members(i) for i in range(2)] == [(0, 2, 4), (1, 3, 5)]
    assert far.ring_members(0) == (0, 1, 2) and far.ring_members(5) == (3, 4, 5)
    assert far.ulysses_members(0) == far.ulysses_members(3) == (0, 3)
    for mesh, member in product((near, far), range(6)):
        line, ring = mesh.ulysses_members(member), mesh.ring_members(member)
        assert set(line) & set(ring) == {member} and len(line) == 2 and len(ring) == 3


# -- equal to one process


COUNTS: dict[int, list[tuple[int, ...]]] = {
    2: [(9, 8)],
    4: [(6, 6, 5, 5), (0, 7, 0, 4)],
    6: [(4, 4, 4, 3, 3, 3), (5, 0, 0, 0, 1, 1)],
    8: [(3, 3, 3, 2, 2, 2, 2, 2)],
}
WAYS: list[tuple[int | None, Balance]] = [(None, "heads"), (1, "heads"), (2, "rows")]


def check_all(runtime: Runtime) -> int:
    member, members, checked = runtime.rank, runtime.world_size, 0
    meshes = [
        Mesh(degree, members // degree, inside)
        for degree in range(1, members + 1)
        if members % degree == 0
        for inside in (("ulysses", "ring") if 1 < degree < members else ("ulysses",))
    ]
    for mesh, counts, heads, masked in product(meshes, COUNTS[members], (3, 5), (False, True)):
        own = slice(sum(counts[:member]), sum(counts[: member + 1]))
        mask = None
        if masked:  # every third key, and all of the first member's for one sample
            mask = torch.arange(sum(counts))[None] % torch.tensor([[3], [4]]) != 1
            mask[1, : counts[0]] = False
        for (chunk, balance), dtype in product(WAYS, TOLERANCE):
            q, k, v = tensors(2, sum(counts), heads, dtype)
            usp = Usp(
                group=runtime.exchange_group,
                member=member,
                token_counts=counts,
                num_heads=heads,
                kernel=sdpa,
                key_mask=mask,
                heads_per_chunk=chunk,
                balance=balance,
                mesh=mesh,
            )
            ours = usp(q[:, own], k[:, own], v[:, own])
            truth = math(q, k, v, mask)[:, own]
            assert relative(ours, truth) <= TOLERANCE[dtype], (mesh, counts, heads, masked, chunk, balance)
            checked += 1
    leave(runtime)
    return checked


@pytest.mark.parametrize(
    ("world_size", "meshes"), [(2, 2), (4, 4), *(pytest.param(n, 6, marks=pytest.mark.slow) for n in (6, 8))]
)
def test_usp_equals_one_process(world_size: int, meshes: int) -> None:
    combinations = meshes * len(COUNTS[world_size]) * 2 * 2 * len(WAYS) * len(TOLERANCE)
    assert set(run_ranks(check_all, world_size, timeout=120)) == {combinations}


def check_beside_others(runtime: Runtime) -> None:
    """Ranks outside of the DiT group take no part."""
    member = runtime.dit_member
    if member is not None:
        parallel = SequenceParallel(
            group=runtime.exchange_group, member=member, members=4, num_heads=3, strategy="usp", mesh=Mesh(2, 2)
        )
        valid = torch.arange(4)[None] < 2
        layout = parallel.lay_out(13, 4, valid)
        parallel.use(layout)
        counts, order = layout.sequence.counts, layout.sequence.order()
        q, k, v = (x[:, order] for x in tensors(1, 17, 3, torch.float64))
        own = slice(sum(counts[:member]), sum(counts[: member + 1]))
        mask = torch.cat([valid.new_ones(1, 13), valid], dim=1)[:, order]
        ours = parallel.attention(q[:, own], k[:, own], v[:, own])
        assert relative(ours, math(q, k, v, mask)[:, own]) <= 1e-10
    leave(runtime)


def test_a_mesh_of_some_ranks_of_a_run() -> None:
    run_ranks(check_beside_others, 6, dit_ranks=(1, 2, 4, 5))


# -- bytes


def check_bytes(runtime: Runtime) -> None:
    member, members, heads = runtime.rank, runtime.world_size, 5
    counts = split_evenly(25, members)
    own = slice(sum(counts[:member]), sum(counts[: member + 1]))
    q, k, v = tensors(1, 25, heads, torch.float32)
    exchange = dist.all_to_all_single
    insides: tuple[Inside, ...] = ("ulysses", "ring")
    for inside in insides:
        mesh = Mesh(2, members // 2, inside)
        sent: dict[int, int] = {}  # to each rank of the run

        def count(received: Tensor, x: Tensor, *, watched: dict[int, int] = sent, **more: object) -> dist.Work | None:
            sizes, group = more["input_split_sizes"], more["group"]
            assert isinstance(sizes, list) and isinstance(group, dist.ProcessGroup)
            assert group is runtime.exchange_group, "both axes use one group: two at once may deadlock on CUDA"
            for peer, size in zip(dist.get_process_group_ranks(group), sizes, strict=True):
                if peer != runtime.rank and size:
                    watched[peer] = watched.get(peer, 0) + size * x.element_size()
            return exchange(received, x, **more)

        usp = Usp(
            group=runtime.exchange_group,
            member=member,
            token_counts=counts,
            num_heads=heads,
            kernel=sdpa,
            key_mask=None,
            mesh=mesh,
        )
        with pytest.MonkeyPatch.context() as patch:  # a test may look where the code may not
            patch.setattr(dist, "all_to_all_single", count)
            usp(q[:, own], k[:, own], v[:, own])
        line, ring = mesh.ulysses_members(member), mesh.ring_members(member)
        (other,) = set(line) - {member}
        mine = split_evenly(heads, 2)[line.index(member)]
        element = HEAD_DIM * 4
        expected = {}  # nothing goes to the others, though they are in the same group
        expected[other] = (3 * counts[member] * (heads - mine) + counts[other] * mine) * element
        following = ring[(ring.index(member) + 1) % len(ring)]
        brought = sum(counts[peer] for peer in mesh.ulysses_members(following))
        expected[following] = 2 * (25 - brought) * mine * element
        blocks = [sum(counts[peer] for peer in mesh.ulysses_members(r)) for r in ring]
        assert expected[following] == ring_bytes(blocks, ring.index(member), 1, mine, HEAD_DIM, 4)
        assert sent == expected, (inside, sent, expected)
    leave(runtime)


def test_bytes_sent_equal_the_formula() -> None:
    run_ranks(check_bytes, 6)


# -- twins


def check_twins(runtime: Runtime) -> dict[str, float]:
    member, members, heads = runtime.rank, runtime.world_size, 4
    sequence = JointSequence.even(20, 8, members)
    counts = sequence.counts
    own = slice(sum(counts[:member]), sum(counts[: member + 1]))
    q, k, v = tensors(1, 28, heads, torch.float64)
    mask = torch.arange(28)[None] % 3 != 1
    mask[:, : counts[0]] = False
    truth = math(q, k, v, mask)[:, own]
    across, near = Mesh(2, members // 2, "ring"), Mesh(2, members // 2)

    def make(mesh: Mesh, key_mask: Tensor = mask) -> Usp:
        return Usp(
            group=runtime.exchange_group,
            member=member,
            token_counts=counts,
            num_heads=heads,
            kernel=sdpa,
            key_mask=key_mask,
            mesh=mesh,
        )

    found = {}
    for name, mesh in (("ring inside", across), ("ulysses inside", near)):
        found[f"nothing wrong, {name}"] = relative(make(mesh)(q[:, own], k[:, own], v[:, own]), truth)
    start = [sum(counts[:i]) for i in range(members)]
    turned = [p for i in (0, 2, 1, 3) for p in range(start[i], start[i] + counts[i])]  # lines and rings confused
    confused = make(across, mask[:, turned])
    found["mask in the order of the other axis"] = relative(confused(q[:, own], k[:, own], v[:, own]), truth)
    alone = make(near)
    alone.line.kernel = sdpa  # each line attends to its own tokens only
    found["no ring"] = relative(alone(q[:, own], k[:, own], v[:, own]), truth)
    found["heads of another member"] = relative(make(near)(q[:, own], k[:, own].roll(1, 2), v[:, own]), truth)
    leave(runtime)
    return found


def test_mistakes_are_far_from_the_truth() -> None:
    found = run_ranks(check_twins, 4)
    for mistake in found[0]:
        worst = max(rank[mistake] for rank in found)
        assert worst <= 1e-10 if mistake.startswith("nothing wrong") else worst > 1e-2, (mistake, worst)


@pytest.mark.parametrize("mesh", [None, Mesh(1, 1)])
def test_a_mesh_of_another_size_is_refused(mesh: Mesh | None) -> None:
    with pytest.raises(ValueError, match=r"mesh of (None|1) members cannot hold 2"):
        Usp(group=None, member=0, token_counts=(3, 4), num_heads=2, kernel=sdpa, key_mask=None, mesh=mesh)


# -- the configuration


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["attention.strategy=usq"],
            "attention.strategy='usq' must be one of 'ulysses', 'ring', 'usp', 'xfuser'; nearest is 'usp'",
        ),
        (["attention.strategy=ring", "attention.balance=rows"], "attention.balance='rows' means nothing to .*'heads'"),
        (["attention.strategy=ring", "attention.heads_per_chunk=2"], "heads_per_chunk=2 means nothing to .*'all'"),
        (
            ["attention.ulysses_degree=2"],
            "ulysses_degree=2 means nothing to attention.strategy='ulysses', nearest is 0",
        ),
        (["attention.mesh_inside=ring"], "mesh_inside='ring' means nothing"),
        (
            ["attention.strategy=usp", "attention.ulysses_degree=4", "groups.dit_ranks=6"],
            "groups.dit_ranks=6, nearest is 3",
        ),
        (["attention.strategy=usp", "attention.ulysses_degree=-1"], "ulysses_degree=-1 must be at least 0"),
        (["attention.strategy=ring", "attention.co_processing=on"], "co_processing='on' means nothing to .*'off'"),
        (["attention.strategy=ring", "model.attention_kernel=sdpa-cudnn"], "'sdpa-cudnn' gives no log-sum-exp"),
    ],
)
def test_configurations_that_cannot_run_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def test_configurations_that_run() -> None:
    config = load_config(
        None,
        ["attention.strategy=usp", "attention.ulysses_degree=3", "groups.dit_ranks=6", "attention.mesh_inside=ring"],
    )
    assert config.attention.ulysses_degree == 3 and config.attention.mesh_inside == "ring"
    assert load_config(None, ["attention.strategy=ring"]).attention.strategy == "ring"


# -- what `videopipe explain` says of it


def explained(*overrides: str) -> list[RankPlan]:
    common = ["groups.dit_ranks=6", "groups.vae_ranks=1", "model.dtype=bfloat16", "runtime.device=cpu"]
    return list(explain_config(load_config(None, [*common, *overrides])).ranks)


def test_explain_counts_what_ring_and_usp_send() -> None:
    element = 128 * 2
    ranks = explained("attention.strategy=ring")[:6]
    counts = [rank.video_tokens + rank.text_tokens for rank in ranks]
    for i, rank in enumerate(ranks):
        assert rank.heads == 24
        assert rank.exchange_bytes_per_layer == 2 * (sum(counts) - counts[(i + 1) % 6]) * 24 * element
    for inside, partner, after in (("ulysses", 1, 2), ("ring", 3, 1)):
        mesh = explained("attention.strategy=usp", "attention.ulysses_degree=2", f"attention.mesh_inside={inside}")
        other, following = partner, counts[after] + counts[after + partner]  # the next line of the ring
        line = (3 * counts[0] + counts[other]) * 12 * element
        assert mesh[0].heads == 12
        assert mesh[0].exchange_bytes_per_layer == line + 2 * (sum(counts) - following) * 12 * element
        assert mesh[6].exchange_bytes_per_layer == 0
    plain, as_mesh = explained(), explained("attention.strategy=usp")
    assert [r.exchange_bytes_per_layer for r in plain] == [r.exchange_bytes_per_layer for r in as_mesh]
