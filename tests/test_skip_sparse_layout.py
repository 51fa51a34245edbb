"""Ranks that hold whole groups of skip-sparse blocks: who holds what, what travels, and that nothing is lost."""

import itertools
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dit_group.call import run_call
from dit_group.shards import gather_latents
from pipelines.models.open_sora_plan import OpenSoraPlanTransformer3DModel, skip_sparse_attention
from pipelines.models.skip_sparse import DENSE, SkipSparse, block_sparsity
from pipelines.open_sora_plan_attention import (
    GroupParallel,
    LayerKernel,
    helper_shares,
    layer_kernels,
    parallelize,
)
from pipelines.skip_sparse_layout import Move, head_counts, held_patterns, held_tokens, move_between, sent_values
from tests.ranks import leave, run_ranks
from videopipe.arrangement import Arrangement
from videopipe.geometry import LatentGeometry
from videopipe.runtime import Runtime

SINGLE, GROUP = SkipSparse(kind="single", k=4), SkipSparse(kind="group", k=4)
RELEASED = [block_sparsity(i, True, 4) for i in range(32)]
TOKENS = 105  # no multiple of 16, 4 or 2
TINY = {"num_attention_heads": 6, "attention_head_dim": 12, "cross_attention_dim": 72, "caption_channels": 8}


# -- arithmetic


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 7, 8, 12])
@pytest.mark.parametrize("tokens", [1, 3, 16, 105, 1056])
def test_every_token_is_held_once_and_evenly(ranks: int, tokens: int) -> None:
    for pattern in (DENSE, SINGLE, GROUP):
        held = held_tokens(pattern, tokens, ranks)
        assert torch.equal(torch.cat(held.tokens).sort().values, torch.arange(tokens))
        assert max(held.totals) - min(held.totals) <= 8  # a last, incomplete run of 16 makes groups differ by 4
        for rank, mine in enumerate(held.tokens):
            groups = pattern.group_of(mine)
            assert torch.equal(groups, groups.sort().values)
            counted = tuple(int((groups == g).sum()) for g in range(pattern.groups))
            assert counted == tuple(counts[rank] for counts in held.counts)


@pytest.mark.parametrize(("ranks", "groups_of_a_rank"), [(1, 4), (2, 2), (4, 1), (8, 1), (16, 1)])
def test_ranks_hold_whole_groups_or_a_share_of_one(ranks: int, groups_of_a_rank: int) -> None:
    for pattern in (SINGLE, GROUP):
        held = held_tokens(pattern, 256, ranks)
        assert {len(pattern.group_of(mine).unique()) for mine in held.tokens} == {groups_of_a_rank}
        assert set(held.totals) == {256 // ranks}


@pytest.mark.parametrize(("ranks", "helpers"), [(1, 1), (2, 0), (3, 0), (3, 1), (5, 0), (7, 0), (7, 1), (8, 0), (6, 2)])
def test_heads_are_dealt_evenly_and_where_the_tokens_are(ranks: int, helpers: int) -> None:
    for pattern in (SINGLE, GROUP):
        counts = head_counts(pattern, 24, ranks, [Fraction(1)] * helpers)
        assert all(sum(group) == 24 for group in counts)
        loads = [sum(group[member] for group in counts) for member in range(ranks + helpers)]
        assert max(loads) - min(loads) <= 1
        held = held_tokens(pattern, 1056, ranks)
        for tokens, heads in zip(held.counts, counts, strict=True):
            assert all(bool(t) == bool(h) for t, h in zip(tokens, heads[:ranks], strict=True))
    assert head_counts(DENSE, 24, 7) == ((4, 4, 4, 3, 3, 3, 3),)


def test_dense_blocks_lie_as_the_nearest_sparse_one() -> None:
    held = held_patterns(RELEASED)
    assert held[:4] == (SINGLE, SINGLE, SINGLE, GROUP)
    assert held[-4:] == (SINGLE, GROUP, GROUP, GROUP)
    assert sum(a != b for a, b in itertools.pairwise(held)) == 27
    assert held_patterns([DENSE] * 3) == (DENSE,) * 3


def exchange(shards: list[Tensor], plans: list[Move]) -> list[Tensor]:
    """What an all-to-all does between the plans' two indexings, in one process."""
    pieces = [
        shard[:, plan.send_order].split(plan.send_counts, dim=1) for shard, plan in zip(shards, plans, strict=True)
    ]
    received = []
    for r, plan in enumerate(plans):
        parts = [pieces[source][r] for source in range(len(plans))]
        assert tuple(part.shape[1] for part in parts) == plan.receive_counts
        received.append(torch.cat(parts, dim=1)[:, plan.receive_order])
    return received


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("tokens", [3, 35, 105])
def test_every_token_finds_its_new_rank(ranks: int, tokens: int) -> None:
    x = torch.arange(2.0 * tokens * 3).view(2, tokens, 3)
    held = {p: held_tokens(p, tokens, ranks) for p in (DENSE, SINGLE, GROUP)}
    before, shards = held[DENSE], [x[:, ids] for ids in held[DENSE].tokens]
    for pattern in (SINGLE, GROUP, SINGLE, DENSE):
        after = held[pattern]
        shards = exchange(shards, [move_between(before, after, r) for r in range(ranks)])
        assert all(torch.equal(shard, x[:, ids]) for shard, ids in zip(shards, after.tokens, strict=True))
        before = after


def sent_in_all(ranks: int, helpers: int = 0, tokens: int = 21_120) -> float:
    """In units of one tensor [S, N*D]."""
    members = range(ranks + helpers)
    sizes = {"ranks": ranks, "heads": 24, "head_dim": 96, "helpers": helpers}
    return sum(sent_values(RELEASED, tokens, member=m, **sizes) for m in members) / (tokens * 24 * 96)


def plain(ranks: int, helpers: int = 0) -> float:
    return 32 * 4 * (1 - 1 / (ranks + helpers))


@pytest.mark.parametrize(
    ("ranks", "units"), [(2, 21.5), (3, 39.5), (4, 32.25), (5, 63.4), (6, 76.6), (7, 85.7), (8, 83.5)]
)
def test_what_travels_in_a_step_is_the_documented_table(ranks: int, units: float) -> None:
    assert sent_in_all(ranks) == pytest.approx(units, abs=0.06)
    assert units < 0.79 * plain(ranks)


def test_groups_are_never_dearer_than_the_plain_exchange() -> None:
    assert all(sent_in_all(ranks, tokens=1056) < plain(ranks) for ranks in (2, 3, 4, 6, 7, 8, 9, 12, 16, 24))
    assert sent_in_all(1, 1, tokens=1056) == plain(1, 1)
    for ranks, helpers in ((2, 1), (3, 1), (4, 2), (6, 2), (7, 1)):
        assert sent_in_all(ranks, helpers, tokens=1056) < plain(ranks, helpers)


# -- real ranks


def make_model() -> OpenSoraPlanTransformer3DModel:
    """Two dense blocks before four sparse ones and, since indices are absolute, two dense ones behind them."""
    torch.manual_seed(0)
    model = OpenSoraPlanTransformer3DModel(num_layers=6, **TINY).eval().requires_grad_(False)
    tail = OpenSoraPlanTransformer3DModel(num_layers=2, **TINY).eval().requires_grad_(False)
    model.transformer_blocks.extend(tail.transformer_blocks)
    for name, parameter in model.named_parameters():
        if "attn1.to_q" in name or "attn1.to_k" in name:
            parameter.mul_(8)  # attention that sees a difference
    return model


def inputs(frames: int, rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 8, frames, rows, cols, generator=g),
        torch.tensor(500.0),
        torch.randn(2, 1, 5, 8, generator=g),
    )


class Counter:
    """Counts the bytes that this member hands to others in every all-to-all, by watching the public call."""

    def __init__(self, member: int) -> None:
        self.member = member
        self.calls: list[int] = []

    def __call__(self, received: Tensor, sent: Tensor, **arguments: object) -> dist.Work | None:
        sizes = arguments["input_split_sizes"]
        assert isinstance(sizes, list)
        self.calls.append(sum(n for peer, n in enumerate(sizes) if peer != self.member) * sent.element_size())
        return self.inner(received, sent, **arguments)

    inner = staticmethod(dist.all_to_all_single)


def on_ranks(runtime: Runtime, sizes: list[tuple[int, int, int]], breakage: str) -> tuple[float, list[tuple[int, int]]]:
    """The largest error of the sharded model against the whole one, and bytes counted and by formula, per size."""
    members = runtime.world_size
    whole, model = make_model(), make_model()
    patterns = [block.sparse for block in model.blocks()]
    kernels = list(layer_kernels(patterns))
    if breakage == "the other pattern":
        swap = {SINGLE: GROUP, GROUP: SINGLE, DENSE: DENSE}
        kernels = list(layer_kernels([swap[p] for p in patterns]))
    elif breakage == "tokens lie by the other pattern":
        kernels[3] = LayerKernel(pattern=GROUP, held=SINGLE)
    parallel = GroupParallel(
        kernels=kernels,
        device=runtime.device,
        group=runtime.exchange_group,
        member=runtime.rank,
        members=members,
        num_heads=6,
        heads_per_chunk=1 if breakage == "chunks" else None,
    )
    parallelize(model, parallel)
    if breakage == "angles of the first layout":
        for block in model.blocks()[3:]:
            block.register_forward_pre_hook(lambda module, args: (*args[:2], first_angles(parallel, model), *args[3:]))
    worst, bytes_of = 0.0, []
    for size in sizes:
        arguments = inputs(*size)
        tokens = size[0] * size[1] * size[2] // 4
        parallel.use(parallel.lay_out(tokens, 0))
        counter = Counter(runtime.rank)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_to_all_single", counter)
            ours = model(*arguments).sample
        sizes_of_model = {"ranks": members, "member": runtime.rank, "heads": 6, "head_dim": 12, "out_values": 32}
        formula = 2 * 4 * sent_values(patterns, tokens, **sizes_of_model)
        bytes_of.append((sum(counter.calls), formula))
        geometry = LatentGeometry(channels=8, stride_t=4, stride_s=8, patch_t=1, patch_s=2)
        gathered = gather_latents(ours, parallel.layout, geometry)
        worst = max(worst, float((gathered - whole(*arguments).sample).abs().max()))
    leave(runtime)
    return worst, bytes_of


def first_angles(parallel: GroupParallel, model: OpenSoraPlanTransformer3DModel) -> tuple[Tensor, ...]:
    """Of the clip of SIZES[1], the angles of the tokens that this rank held at first."""
    own = parallel._whole.own
    return tuple(table[own] for table in model.rotary.forward(4, 4, 4))


SIZES = [(3, 10, 14), (4, 8, 8), (1, 2, 6)]  # 105, 64 and 3 tokens


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 7, 8])
def test_sharded_blocks_give_the_whole_models_output_and_send_what_the_formula_says(ranks: int) -> None:
    for error, counted in run_ranks(on_ranks, ranks, SIZES, "nothing"):
        assert error < 1e-5
        assert all(sent == formula for sent, formula in counted), counted


def test_heads_in_chunks_change_nothing() -> None:
    for error, counted in run_ranks(on_ranks, 3, SIZES[:1], "chunks"):
        assert error < 1e-5
        assert all(sent == formula for sent, formula in counted), counted


@pytest.mark.parametrize(
    "breakage", ["the other pattern", "tokens lie by the other pattern", "angles of the first layout"]
)
def test_what_breaks_the_groups_is_noticed(breakage: str) -> None:
    assert min(error for error, _ in run_ranks(on_ranks, 4, SIZES[1:2], breakage)) > 1e-3


def attend_with_help(runtime: Runtime) -> float:
    """The worst error of attention with two helpers that own no tokens; helpers report 0."""
    ranks, helpers, heads = 3, (3, 4), 6
    kernels = layer_kernels([SINGLE, GROUP])
    parallel = GroupParallel(
        kernels=kernels,
        device=runtime.device,
        group=None,
        member=runtime.rank if runtime.rank < ranks else None,
        members=ranks,
        num_heads=heads,
        rank=runtime.rank,
        assist_groups={helpers: runtime.exchange_group},
    )
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, TOKENS, heads, 12, generator=g) for _ in range(3))
    worst = 0.0
    for way in (
        Arrangement(helpers=helpers),
        Arrangement(helpers=helpers, head_counts=(1, 1, 1, 2, 1), helpers_first=True, heads_per_chunk=1),
        Arrangement(helpers=helpers, head_counts=(2, 2, 1, 0, 1), early_chunks=1, heads_per_chunk=2),
    ):
        layout = parallel.lay_out_as(way, TOKENS, 0)
        for kernel in kernels:
            held = held_tokens(kernel.held, TOKENS, ranks).tokens
            mine = held[runtime.rank] if runtime.rank < ranks else held[0][:0]
            out = run_call(layout.attention.begin(kernel), q[:, mine], k[:, mine], v[:, mine])
            expected = skip_sparse_attention(q, k, v, sparse=kernel.pattern, key_bias=None)[:, mine]
            worst = max(worst, float((out - expected).abs().max())) if len(mine) else worst
    leave(runtime)
    return worst


@pytest.mark.parametrize("counts", [(2, 2, 2, 3, 1), (4, 4, 4, 0, 1), (0, 0, 0, 5, 5)])
def test_helpers_get_their_share_of_every_group(counts: tuple[int, ...]) -> None:
    """As of the heads of a dense block, as far as whole heads allow."""
    shares = helper_shares(Arrangement(helpers=(3, 4), head_counts=counts), 3)
    for pattern in (DENSE, SINGLE, GROUP):
        dealt = head_counts(pattern, 24, 3, shares)
        assert all(sum(group) == 24 for group in dealt)
        for helper in (3, 4):
            wanted = pattern.groups * 24 * counts[helper] / sum(counts)
            found = sum(group[helper] for group in dealt)
            assert abs(found - wanted) <= 1 if sum(counts[:3]) else found >= 8 * pattern.groups


def test_helpers_take_heads_of_every_group() -> None:
    errors = run_ranks(attend_with_help, 5)
    assert max(errors) < 1e-5
    assert errors[3:] == [0.0, 0.0]
