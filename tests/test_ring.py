"""Ring attention equals attention in one process, float64 within 1e-10, float32 within 1e-5; bytes as the formula."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import dit_group.ring
from dit_group.attention import SequenceParallel
from dit_group.kernels import math, merge_partial, sdpa, sdpa_with_lse
from dit_group.ring import Ring
from tests.ranks import leave, run_ranks
from videopipe.partition import JointSequence, split_evenly
from videopipe.runtime import Runtime

HEAD_DIM = 8
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}

# tokens of each member; more members than heads, members without tokens, fewer tokens than members
COUNTS: dict[int, list[tuple[int, ...]]] = {
    1: [(19,)],
    2: [(17, 16), (0, 9), (9, 0)],
    3: [(7, 6, 6), (5, 0, 4), (0, 0, 3)],
    5: [(7, 7, 7, 6, 6), (1, 1, 0, 0, 0)],
    8: [(3, 3, 3, 2, 2, 2, 2, 2), (0, 9, 0, 1, 4, 0, 0, 2)],
}


def tensors(batch: int, tokens: int, heads: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens * 100 + heads)
    return [
        torch.randn(batch, tokens, heads, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(3)
    ]


def masks(counts: tuple[int, ...]) -> list[Tensor | None]:
    """None, some keys of each sample, and all keys of the first member that has any hidden (a block nobody sees)."""
    tokens = sum(counts)
    scattered = (torch.arange(tokens)[None] % torch.tensor([[3], [5]])) != 1
    scattered[:, -1] = True
    first = next(i for i, count in enumerate(counts) if count)
    start = sum(counts[:first])
    whole_block = torch.ones(2, tokens, dtype=torch.bool)
    whole_block[:, start : start + counts[first]] = False
    one_sample = torch.ones(2, tokens, dtype=torch.bool)  # a block that one sample does not see, the other does
    one_sample[1, start : start + counts[first]] = False
    found: list[Tensor | None] = [None, scattered, scattered[:1].expand(2, -1)]  # the last: alike in all samples
    return found + [mask for mask in (whole_block, one_sample) if bool(mask.any(dim=1).all())]


def relative(ours: Tensor, other: Tensor) -> float:
    assert ours.shape == other.shape and ours.dtype == other.dtype
    return float((ours - other).double().norm() / other.double().norm().clamp_min(1e-30))


def check_all(runtime: Runtime) -> int:
    member, checked = runtime.rank, 0
    for counts, heads, dtype, kernel in product(COUNTS[runtime.world_size], (1, 3), TOLERANCE, (sdpa, math)):
        if kernel is math and dtype != torch.float32:
            continue
        q, k, v = tensors(2, sum(counts), heads, dtype)
        own = slice(sum(counts[:member]), sum(counts[: member + 1]))
        for mask in masks(counts):
            ring = Ring(
                group=runtime.exchange_group,
                member=member,
                token_counts=counts,
                num_heads=heads,
                kernel=kernel,
                key_mask=mask,
            )
            for _ in range(2):  # a second layer meets no leftovers of the first
                ours = ring(q[:, own], k[:, own], v[:, own])
                assert relative(ours, math(q, k, v, mask)[:, own]) <= TOLERANCE[dtype], (counts, heads, dtype, mask)
            checked += 1
    leave(runtime)
    return checked


@pytest.mark.parametrize("world_size", [pytest.param(n, marks=pytest.mark.slow) if n == 8 else n for n in COUNTS])
def test_ring_equals_one_process(world_size: int) -> None:
    combinations = sum(len(masks(counts)) for counts in COUNTS[world_size]) * 2 * (len(TOLERANCE) + 1)
    assert set(run_ranks(check_all, world_size)) == {combinations}


def check_bytes(runtime: Runtime) -> None:
    member, members, exchange = runtime.rank, runtime.world_size, dist.all_to_all_single
    for counts in COUNTS[members]:
        q, k, v = tensors(2, sum(counts), 3, torch.float32)
        own = slice(sum(counts[:member]), sum(counts[: member + 1]))
        sent: dict[int, int] = {}

        def count(received: Tensor, x: Tensor, *, watched: dict[int, int] = sent, **more: object) -> dist.Work | None:
            sizes = more["input_split_sizes"]
            assert isinstance(sizes, list)
            for peer, size in enumerate(sizes):
                watched[peer] = watched.get(peer, 0) + size * x.element_size()
            return exchange(received, x, **more)

        ring = Ring(
            group=runtime.exchange_group,
            member=member,
            token_counts=counts,
            num_heads=3,
            kernel=sdpa,
            key_mask=None,
        )
        with pytest.MonkeyPatch.context() as patch:  # a test may look where the code may not
            patch.setattr(dist, "all_to_all_single", count)
            ring(q[:, own], k[:, own], v[:, own])
        following = (member + 1) % members
        formula = 2 * 2 * (sum(counts) - counts[following]) * 3 * HEAD_DIM * 4
        assert sent.pop(following) == formula, counts
        assert not any(sent.values()), "only the next member gets anything"
    leave(runtime)


@pytest.mark.parametrize("world_size", [2, 5])
def test_bytes_sent_equal_the_formula_and_go_to_the_neighbour(world_size: int) -> None:
    run_ranks(check_bytes, world_size)


def check_transfer_before_compute(runtime: Runtime) -> None:
    """The next block has left before the kernel runs on the block in hand."""
    member, members, events = runtime.rank, runtime.world_size, []
    counts = split_evenly(23, members)
    q, k, v = tensors(1, 23, 2, torch.float32)
    own = slice(sum(counts[:member]), sum(counts[: member + 1]))
    ring = Ring(
        group=runtime.exchange_group, member=member, token_counts=counts, num_heads=2, kernel=sdpa, key_mask=None
    )
    start, kernel = dit_group.ring.start_take_from_previous, ring.kernel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dit_group.ring, "start_take_from_previous", lambda *arguments: events.append("send") or start(*arguments)
        )
        ring.kernel = lambda *arguments: events.append("compute") or kernel(*arguments)  # type: ignore[assignment]
        call = ring.begin()
        call.value(v[:, own])
        call.key(k[:, own])
        assert events == ["send", "send"]  # before the queries are there
        call.query(q[:, own])
        call.attend()
        call.output()
    assert events == ["send", "send", "compute"] * (members - 1) + ["compute"]
    leave(runtime)


def test_each_block_leaves_before_it_is_computed_with() -> None:
    run_ranks(check_transfer_before_compute, 3)


def check_joint_sequence(runtime: Runtime) -> float:
    """Through `SequenceParallel`: video and text, padding on several members."""
    member, members, video, text = runtime.rank, runtime.world_size, 31, 7
    parallel = SequenceParallel(
        group=runtime.exchange_group, member=member, members=members, num_heads=3, strategy="ring", kernel="sdpa"
    )
    valid = torch.arange(text)[None] < torch.tensor([[4], [2]])
    layout = parallel.lay_out(video, text, valid)
    parallel.use(layout)
    sequence = layout.sequence
    q, k, v = (x[:, sequence.order()] for x in tensors(2, video + text, 3, torch.float64))
    own = slice(sum(sequence.counts[:member]), sum(sequence.counts[: member + 1]))
    mask = torch.cat([valid.new_ones(2, video), valid], dim=1)[:, sequence.order()]
    found = relative(parallel.attention(q[:, own], k[:, own], v[:, own]), math(q, k, v, mask)[:, own])
    leave(runtime)
    return found


def test_a_ring_over_video_and_text() -> None:
    assert max(run_ranks(check_joint_sequence, 4)) <= 1e-10


# -- twins


def check_twins(runtime: Runtime) -> dict[str, float]:
    """How far each deliberate mistake takes a ring from the truth."""
    member, members = runtime.rank, runtime.world_size
    sequence = JointSequence.even(20, 7, members)
    counts = sequence.counts
    q, k, v = tensors(2, 27, 2, torch.float64)
    own = slice(sum(counts[:member]), sum(counts[: member + 1]))
    mask = torch.arange(27)[None] % torch.tensor([[3], [4]]) != 2
    mask[0, : counts[0]] = False  # one sample sees nothing of the first block
    truth = math(q, k, v, mask)[:, own]

    def make(key_mask: Tensor | None = mask) -> Ring:
        return Ring(
            group=runtime.exchange_group,
            member=member,
            token_counts=counts,
            num_heads=2,
            kernel=sdpa,
            key_mask=key_mask,
        )

    def result(ring: Ring) -> float:
        return relative(ring(q[:, own], k[:, own], v[:, own]), truth)

    found = {
        "nothing wrong": result(make()),
        "no mask": result(make(None)),
        "mask turned": result(make(mask.roll(1, 1))),
    }
    ring = make()
    ring.kernel = lambda q, k, v, key_mask: (
        sdpa_with_lse(q, k, v, key_mask)[0],
        torch.zeros(2, 2, q.shape[1]).double(),
    )
    found["all blocks weigh the same"] = result(ring)
    ring = make()

    def zero_where_blind(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse = sdpa_with_lse(q, k, v, key_mask)
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    ring.kernel = zero_where_blind  # what torch's kernel itself returns
    found["lse 0 for what nobody sees"] = result(ring)
    ring = make()
    ring.blocks = ring.blocks[1:] + ring.blocks[:1]  # masks of the block that is one further on
    if len(set(counts)) == 1:
        found["masks out of step"] = result(ring)
    short = make()
    short.blocks[1].is_visible = False
    found["a block left out"] = result(short)
    leave(runtime)
    return found


def test_mistakes_are_far_from_the_truth() -> None:
    found = run_ranks(check_twins, 3)
    assert len(found[0]) == 7
    for mistake in found[0]:
        worst = max(rank[mistake] for rank in found)
        assert worst <= 1e-10 if mistake == "nothing wrong" else worst > 1e-3, (mistake, worst)


# -- merging


def test_merging_two_halves_is_the_whole_and_order_does_not_matter() -> None:
    q, k, v = tensors(2, 12, 3, torch.float64)
    left, right = (sdpa_with_lse(q, k[:, part], v[:, part], None) for part in (slice(0, 5), slice(5, 12)))
    whole, whole_lse = sdpa_with_lse(q, k, v, None)
    for first, second in ((left, right), (right, left)):
        out, lse = merge_partial(*first, *second)
        assert relative(out, whole) <= 1e-14 and relative(lse, whole_lse) <= 1e-14
    averaged = (left[0] + right[0]) / 2
    assert relative(averaged, whole) > 0.05


def test_merging_with_nothing_changes_no_bit() -> None:
    q, k, v = tensors(2, 12, 3, torch.float32)
    out, lse = sdpa_with_lse(q, k, v, None)
    nothing, never = sdpa_with_lse(q, k, v, torch.zeros(2, 12, dtype=torch.bool))
    assert not nothing.any() and bool(never.isneginf().all())
    for merged, merged_lse in (merge_partial(out, lse, nothing, never), merge_partial(nothing, never, out, lse)):
        assert torch.equal(merged, out) and torch.equal(merged_lse, lse)
    both, both_lse = merge_partial(nothing, never, nothing, never)
    assert not both.any() and bool(both_lse.isneginf().all())


def test_where_all_samples_see_the_same_keys_no_mask_is_left() -> None:
    """So that kernels without masks run, and nothing waits for the device inside a layer."""
    q, k, v = tensors(2, 12, 3, torch.float32)
    alike = (torch.arange(12) % 3 != 1).expand(2, -1)
    differing = alike.clone()
    differing[1, 0] = False
    for mask, keys in ((alike, 8), (differing, 12), (None, 12)):
        seen: list[tuple[int, bool]] = []

        def watch(
            q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, calls: list[tuple[int, bool]] = seen
        ) -> tuple[Tensor, Tensor]:
            calls.append((k.shape[1], key_mask is None))
            return sdpa_with_lse(q, k, v, key_mask)

        ring = Ring(group=None, member=0, token_counts=(12,), num_heads=3, kernel=sdpa, key_mask=mask)
        ring.kernel = watch
        assert relative(ring(q, k, v), math(q, k, v, mask)) <= 1e-6
        assert seen == [(keys, mask is not differing)]


# -- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads_per_chunk": 2}, "heads_per_chunk=2 divides heads, but a ring does not; nearest is None"),
        ({"balance": "rows"}, "balance='rows' divides heads"),
        ({"head_counts": (1, 2)}, "head_counts=.* divides heads"),
        ({"kernel": lambda q, k, v, key_mask: q}, "gives no log-sum-exp"),
        ({"token_counts": (3, 4)}, "group=None needs token_counts of one member, not 2"),
    ],
)
def test_what_a_ring_cannot_do_is_refused(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "group": None,
        "member": 0,
        "token_counts": (7,),
        "num_heads": 3,
        "kernel": sdpa,
        "key_mask": None,
    }
    with pytest.raises(ValueError, match=message):
        Ring(**(arguments | changes))  # type: ignore[arg-type]
