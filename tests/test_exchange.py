"""The exchange only moves data: what members collect is the whole tensor, bit for bit, whatever the counts.

One fork for each group size; each checks every case of that size. The twins move data wrongly and must be noticed.
"""

import math as m
from itertools import product

import pytest
import torch
from torch import Tensor

from dit_group.attention import SequenceParallel
from dit_group.kernels import KERNELS, math, sdpa
from dit_group.ulysses import Ulysses
from tests.ranks import RanksError, leave, run_ranks
from videopipe.exchange import Exchange, gather_tokens
from videopipe.partition import JointSequence, Partition, offsets, split_evenly
from videopipe.runtime import Runtime

HEAD_DIM = 6
DTYPES = (torch.float32, torch.float64, torch.bfloat16)

# tokens and heads of a whole sequence, and sometimes of each member
CASES: dict[int, list[Partition]] = {
    1: [Partition.even(7, 3, 1)],
    2: [Partition.even(105, 24, 2), Partition((5, 0), (1, 2)), Partition((3, 4), (0, 3))],
    3: [Partition.even(7, 4, 3), Partition((4, 5, 0), (2, 1, 1)), Partition((0, 0, 3), (1, 0, 1))],
    4: [Partition.even(105, 6, 4), Partition((9, 0, 8, 0), (1, 3, 0, 2))],
    5: [Partition.even(33, 24, 5), Partition((8, 7, 7, 0, 0), (5, 5, 5, 5, 4))],
    6: [Partition.even(13, 5, 6)],
    7: [Partition.even(105, 24, 7), Partition.even(20, 4, 7), Partition((7, 6, 6, 6, 6, 6, 0), (3, 3, 3, 3, 3, 3, 6))],
    8: [Partition.even(105, 12, 8), Partition.even(6, 24, 8)],
}


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def check_moves(runtime: Runtime) -> int:
    member = runtime.rank
    checked = 0
    for p, batch, dtype in product(CASES[runtime.world_size], (1, 2), DTYPES):
        exchange = Exchange(runtime.exchange_group, p, member)
        whole = random((batch, p.num_tokens, p.num_heads, HEAD_DIM), 0, dtype)
        tokens, heads = whole[:, p.tokens_of(member)], whole[:, :, p.heads_of(member)]
        collected = exchange.to_heads(tokens)
        assert torch.equal(collected, heads), (p, batch, dtype)
        returned = exchange.to_tokens(collected)
        assert torch.equal(returned, tokens), (p, batch, dtype)
        # several under way at once, waited for in another order
        under_way = [exchange.start_to_heads(tokens * factor) for factor in (1, 2, 4)]
        for factor, pending in zip((4, 2, 1), reversed(under_way), strict=True):
            assert torch.equal(pending.wait(), heads * factor), (p, batch, dtype, factor)
        for dim in (1, 2):
            sideways = tokens.transpose(1, dim).contiguous()
            gathered = gather_tokens(sideways, p.token_counts, runtime.exchange_group, member, dim=dim)
            assert torch.equal(gathered, whole.transpose(1, dim)), (p, batch, dtype, dim)
        checked += 1
    leave(runtime)
    return checked


@pytest.mark.parametrize("world_size", list(CASES))
def test_exchange_equals_slicing_the_whole_tensor(world_size: int) -> None:
    assert set(run_ranks(check_moves, world_size)) == {len(CASES[world_size]) * 2 * len(DTYPES)}


# -- attention over the exchange


def joint_qkv(sequence: JointSequence, heads: int, dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    """q, k, v [B, S, N, D] of a whole sequence in its joint order."""
    shape = (batch, sum(sequence.counts), heads, HEAD_DIM)
    return [random(shape, seed, dtype)[:, sequence.order()] for seed in range(3)]


def text_mask(num_text: int, batch: int = 2) -> Tensor:
    """Each sample has another number of valid text tokens; padding lies on several members."""
    valid = torch.tensor([max(1, num_text // 2), max(1, num_text // 3)][:batch])
    return torch.arange(num_text)[None] < valid[:, None]


ATTENTION_CASES = [  # video tokens, text tokens, heads
    (97, 8, 24),
    (31, 7, 6),
    (9, 5, 4),
]


def check_attention(runtime: Runtime) -> float:
    member, members = runtime.rank, runtime.world_size
    worst = 0.0
    for (video, text, heads), dtype, masked in product(ATTENTION_CASES, (torch.float32, torch.float64), (False, True)):
        parallel = SequenceParallel(
            group=runtime.exchange_group, member=member, members=members, num_heads=heads, kernel="sdpa"
        )
        mask = text_mask(text) if masked else None
        layout = parallel.lay_out(video, text, mask)
        parallel.use(layout)
        sequence = layout.sequence
        q, k, v = joint_qkv(sequence, heads, dtype)
        start = offsets(sequence.counts)
        own = slice(start[member], start[member + 1])
        ours = parallel.attention(*(x[:, own].contiguous() for x in (q, k, v)))
        key_mask = None
        if mask is not None:
            key_mask = torch.cat([mask.new_ones(2, video), mask], dim=1)[:, sequence.order()]
        assert torch.equal(ours, sdpa(q, k, v, key_mask)[:, own]), (video, text, heads, dtype, masked)
        if masked:  # the mask bites: without it the result is another one
            assert key_mask is not None
            assert relative(sdpa(q, k, v, None), sdpa(q, k, v, key_mask)) > 1e-2
        if dtype == torch.float64:
            textbook = math(q, k, v, key_mask)
            worst = max(worst, float((textbook - sdpa(q, k, v, key_mask)).abs().max()))
    leave(runtime)
    return worst


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7, 8])
def test_sharded_attention_is_bit_equal_to_one_process(world_size: int) -> None:
    assert max(run_ranks(check_attention, world_size)) <= 1e-10


def check_helpers(runtime: Runtime) -> None:
    """The last member owns no token and lends itself to attention; uneven heads, one member without any."""
    member, members = runtime.rank, runtime.world_size
    for heads_each in ((3, 2, 1, 3), (4, 0, 2, 3), (0, 0, 0, 9)):
        heads = sum(heads_each)
        p = Partition((*split_evenly(19, members - 1), 0), heads_each)
        for dtype in (torch.float32, torch.float64):
            q, k, v = (random((2, 19, heads, HEAD_DIM), seed, dtype) for seed in range(3))
            visible = torch.arange(19)[None] < torch.tensor([[19], [12]])
            attention = Ulysses(
                group=runtime.exchange_group,
                member=member,
                token_counts=p.token_counts,
                num_heads=heads,
                kernel=sdpa,
                key_mask=visible,
                head_counts=p.head_counts,
            )
            own = p.tokens_of(member)
            ours = attention(q[:, own], k[:, own], v[:, own])
            assert ours.shape[1] == (0 if member == members - 1 else p.token_counts[member])
            assert torch.equal(ours, sdpa(q, k, v, visible)[:, own])
    leave(runtime)


def test_a_member_without_tokens_helps_and_changes_no_bit() -> None:
    run_ranks(check_helpers, 4)


@pytest.mark.parametrize("masked", [False, True])
def test_the_textbook_kernel_agrees_with_torch_in_float64(masked: bool) -> None:
    q, k, v = (random((2, 37, 4, 16), seed, torch.float64) for seed in range(3))
    mask = torch.arange(37)[None] < torch.tensor([[30], [11]]) if masked else None
    assert float((KERNELS["math"](q, k, v, mask) - KERNELS["sdpa"](q, k, v, mask)).abs().max()) <= 1e-10
    wrong_scale = KERNELS["sdpa"](q * 1.01, k, v, mask)
    assert float((KERNELS["math"](q, k, v, mask) - wrong_scale).abs().max()) > 1e-4


# -- twins


def relative(ours: Tensor, other: Tensor) -> float:
    return float((ours - other).norm() / other.norm())


def check_twins(runtime: Runtime) -> dict[str, float]:
    """How far each deliberate mistake takes attention from the truth."""
    member, members, video, text, heads = runtime.rank, runtime.world_size, 31, 7, 6
    sequence = JointSequence.even(video, text, members)
    p = Partition(sequence.counts, split_evenly(heads, members))
    q, k, v = joint_qkv(sequence, heads, torch.float64)
    own = p.tokens_of(member)
    local = [x[:, own].contiguous() for x in (q, k, v)]
    plain = torch.cat([torch.ones(2, video, dtype=torch.bool), text_mask(text)], dim=1)
    mask = plain[:, sequence.order()]
    exchange = Exchange(runtime.exchange_group, p, member)
    truth = sdpa(q, k, v, mask)[:, own]

    def through(kernel_mask: Tensor | None, turn: int = 0, drop: bool = False) -> Tensor:
        v_all, k_all, q_all = (exchange.to_heads(x) for x in reversed(local))
        if turn:
            k_all = k_all.roll(turn, dims=2)
        if drop:
            k_all, v_all, kernel_mask = k_all[:, 1:], v_all[:, 1:], mask[:, 1:]
        out = sdpa(q_all, k_all, v_all, kernel_mask) if q_all.shape[2] else q_all
        return exchange.to_tokens(out)

    found = {
        "nothing wrong": relative(through(mask), truth),
        "mask in plain order": relative(through(plain), truth),
        "no mask": relative(through(None), truth),
        "keys of another head": relative(through(mask, turn=1), truth),
        "one token dropped": relative(through(mask, drop=True), truth),
        "queries of another token": relative(through(mask), truth.roll(1, dims=1)),
    }
    leave(runtime)
    return found


def test_mistakes_in_order_mask_and_tokens_are_far_from_the_truth() -> None:
    found = run_ranks(check_twins, 2)
    for mistake in found[0]:
        distance = m.sqrt(sum(rank[mistake] ** 2 for rank in found))
        if mistake == "nothing wrong":
            assert distance == 0
        else:
            assert distance > 5e-3, (mistake, distance)


def collects_heads_in_reverse(runtime: Runtime) -> None:
    p = Partition.even(7, 4, runtime.world_size)
    turned = Exchange(runtime.exchange_group, p, runtime.rank)
    whole = random((1, 7, 4, HEAD_DIM), 0)
    collected = turned.to_heads(whole[:, p.tokens_of(runtime.rank)].flip(2))  # heads cut in another order
    assert torch.equal(collected, whole[:, :, p.heads_of(runtime.rank)]), "heads in another order"


def drops_a_token(runtime: Runtime) -> None:
    p = Partition.even(7, 4, runtime.world_size)
    whole = random((1, 7, 4, HEAD_DIM), 0)
    Exchange(runtime.exchange_group, p, runtime.rank).to_heads(whole[:, p.tokens_of(runtime.rank)][:, 1:])


def gathers_wrong_counts(runtime: Runtime) -> None:
    counts = (3, 4)
    whole = random((1, 7, 4), 0)
    own = whole[:, slice(*((0, 3), (3, 7))[runtime.rank])]
    padded = torch.cat([own, own.new_zeros(1, 4 - own.shape[1], 4)], dim=1)
    gathered = gather_tokens(padded, (4, 4), runtime.exchange_group, runtime.rank)
    assert torch.equal(gathered[:, : sum(counts)], whole), "padding between the shards"


@pytest.mark.parametrize(
    ("twin", "noticed"),
    [
        (collects_heads_in_reverse, "heads in another order"),
        (drops_a_token, "AssertionError"),
        (gathers_wrong_counts, "padding between the shards"),
    ],
)
def test_wrong_moves_are_noticed(twin: object, noticed: str) -> None:
    with pytest.raises(RanksError, match=noticed):
        run_ranks(twin, 2)  # type: ignore[arg-type]


def test_an_exchange_of_several_needs_a_group() -> None:
    with pytest.raises(ValueError, match="group=None needs a partition of one member, not 2"):
        Exchange(None, Partition.even(4, 4, 2), 0)


def test_one_member_is_the_identity() -> None:
    x = random((2, 5, 3, HEAD_DIM), 0)
    exchange = Exchange(None, Partition.even(5, 3, 1), 0)
    assert torch.equal(exchange.to_heads(x), x)
    assert torch.equal(exchange.to_tokens(x), x)
    assert gather_tokens(x, (5,), None, 0) is x
