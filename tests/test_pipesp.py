"""Chunks of heads and uneven heads are bit-equal to one process, query rows to 1e-10; bytes are as the formulas say."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dit_group.kernels import sdpa
from dit_group.ulysses import Ulysses
from tests.ranks import leave, run_ranks
from videopipe.partition import JointSequence, split_evenly
from videopipe.runtime import Runtime

HEAD_DIM = 8


def tensors(batch: int, tokens: int, heads: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens * 100 + heads)
    return [torch.randn(batch, tokens, heads, HEAD_DIM, generator=generator, dtype=dtype) for _ in range(3)]


def check_all_ways(runtime: Runtime) -> int:
    member, members = runtime.rank, runtime.world_size
    checked = 0
    heads_and_tokens = [(24, (33, 9)), (members + 1, (17, 3)), (3, (members - 1, members))]
    for (heads, (video, text)), chunk, balance, masked, dtype, batch in product(
        heads_and_tokens, (None, 1, 2, 5), ("heads", "rows"), (False, True), (torch.float32, torch.float64), (1, 2)
    ):
        if dtype == torch.float64 and batch == 1:
            continue  # half of the combinations suffice
        sequence = JointSequence.even(video, text, members)
        q, k, v = tensors(batch, video + text, heads, dtype)
        mask = None
        if masked:
            valid = torch.arange(text) < max(text // 2, 1)
            mask = torch.cat([torch.ones(video, dtype=torch.bool), valid])[sequence.order()].expand(batch, -1)
        ulysses = Ulysses(
            group=runtime.exchange_group,
            member=member,
            token_counts=sequence.counts,
            num_heads=heads,
            kernel=sdpa,
            key_mask=mask,
            heads_per_chunk=chunk,
            balance=balance,  # type: ignore[arg-type]
        )
        start = sum(sequence.counts[:member])
        own = slice(start, start + sequence.counts[member])
        out = ulysses(q[:, own], k[:, own], v[:, own])
        whole = sdpa(q, k, v, mask)[:, own]
        case = (heads, video, text, chunk, balance, masked, dtype, batch)
        if ulysses.has_shared_heads and members > 1:
            # fewer query rows in one matrix product may be summed in another order
            limit = 1e-10 if dtype == torch.float64 else 1e-5
            assert out.numel() == 0 or float((out - whole).abs().max() / whole.abs().max()) <= limit, case
        else:
            assert torch.equal(out, whole), case
        checked += 1
    leave(runtime)
    return checked


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7, 8])
def test_every_way_to_move_heads_equals_one_process(world_size: int) -> None:
    assert run_ranks(check_all_ways, world_size, timeout=120)[0] == 144


def check_helpers(runtime: Runtime) -> None:
    member, members, tokens, heads = runtime.rank, runtime.world_size, 29, 12
    q, k, v = tensors(1, tokens, heads, torch.float32)
    for helpers, chunk in product((1, 2, 3), (None, 1, 2)):
        counts = (*split_evenly(tokens, members - helpers), *[0] * helpers)
        for head_counts in (split_evenly(heads, members), (1, *split_evenly(heads - 1, members - 1)), None):
            ulysses = Ulysses(
                group=runtime.exchange_group,
                member=member,
                token_counts=counts,
                num_heads=heads,
                kernel=sdpa,
                key_mask=None,
                heads_per_chunk=chunk,
                head_counts=head_counts,
            )
            start = sum(counts[:member])
            own = slice(start, start + counts[member])
            assert torch.equal(ulysses(q[:, own], k[:, own], v[:, own]), sdpa(q, k, v, None)[:, own])
    leave(runtime)


def test_helpers_without_tokens_change_no_bit() -> None:
    run_ranks(check_helpers, 5)


def check_uneven_shares(runtime: Runtime) -> None:
    """Two helpers with shares of their own, first or in line, and what is left over by query rows."""
    member, tokens, heads = runtime.rank, 29, 12
    q, k, v = tensors(1, tokens, heads, torch.float64)
    counts = (*split_evenly(tokens, 3), 0, 0)
    for head_counts, chunk, first in product(
        ((3, 3, 3, 2, 1), (2, 2, 2, 3, 1), (0, 0, 0, 11, 1)), (None, 1, 2), (False, True)
    ):
        ulysses = Ulysses(
            group=runtime.exchange_group,
            member=member,
            token_counts=counts,
            num_heads=heads,
            kernel=sdpa,
            key_mask=None,
            heads_per_chunk=chunk,
            balance="heads" if sum(head_counts) == heads else "rows",
            head_counts=head_counts,
            helpers_first=first,
        )
        if first:
            assert ulysses.chunks[0][1].partition.head_counts == (0, 0, 0, *head_counts[3:])
        start = sum(counts[:member])
        own = slice(start, start + counts[member])
        out, whole = ulysses(q[:, own], k[:, own], v[:, own]), sdpa(q, k, v, None)[:, own]
        if ulysses.has_shared_heads:
            assert out.numel() == 0 or float((out - whole).abs().max() / whole.abs().max()) <= 1e-10
        else:
            assert torch.equal(out, whole)
    leave(runtime)


def test_helpers_with_shares_of_their_own_and_first_change_nothing() -> None:
    run_ranks(check_uneven_shares, 5)


class CountingGroup:
    """Counts the bytes that this member hands to others in every all-to-all, by watching the public call."""

    def __init__(self, member: int) -> None:
        self.member = member
        self.sent = 0

    def __call__(self, received: Tensor, sent: Tensor, **arguments: object) -> dist.Work | None:
        sizes = arguments["input_split_sizes"]
        assert isinstance(sizes, list)
        self.sent += sum(n for peer, n in enumerate(sizes) if peer != self.member) * sent.element_size()
        return self.inner(received, sent, **arguments)

    inner = staticmethod(dist.all_to_all_single)


def check_bytes(runtime: Runtime) -> None:
    member, members, tokens, heads = runtime.rank, runtime.world_size, 30, 24
    q, k, v = tensors(1, tokens, heads, torch.float32)
    counts = split_evenly(tokens, members)
    start = sum(counts[:member])
    own = slice(start, start + counts[member])
    element = HEAD_DIM * 4
    for chunk, balance in product((None, 1, 3), ("heads", "rows")):
        ulysses = Ulysses(
            group=runtime.exchange_group,
            member=member,
            token_counts=counts,
            num_heads=heads,
            kernel=sdpa,
            key_mask=None,
            heads_per_chunk=chunk,
            balance=balance,  # type: ignore[arg-type]
        )
        counter = CountingGroup(member)
        with pytest.MonkeyPatch.context() as patch:  # a test may look where the code may not
            patch.setattr(dist, "all_to_all_single", counter)
            ulysses(q[:, own], k[:, own], v[:, own])
        whole = heads if balance == "heads" else heads // members * members
        mine = split_evenly(whole, members)[member] if chunk is None else None
        if mine is None:  # chunk by chunk, the remainders fall on the same members
            mine = split_evenly(whole, members)[member]
        to_heads = 3 * counts[member] * (whole - mine) * element
        to_tokens = (tokens - counts[member]) * mine * element
        gathered = 2 * counts[member] * (heads - whole) * (members - 1) * element
        assert counter.sent == to_heads + to_tokens + gathered, (chunk, balance)
    leave(runtime)


@pytest.mark.parametrize("world_size", [4, 5, 7])
def test_bytes_sent_equal_the_formula(world_size: int) -> None:
    run_ranks(check_bytes, world_size)


def check_wrong_order(runtime: Runtime) -> float:
    """The twin: chunks cut in each member's local order and concatenated as if they were in global order."""
    member, members, tokens, heads = runtime.rank, runtime.world_size, 16, 12
    q, k, v = tensors(1, tokens, heads, torch.float64)
    counts = split_evenly(tokens, members)
    start = sum(counts[:member])
    own = slice(start, start + counts[member])
    order = [i for first in range(members) for i in range(first, heads, members)]  # heads dealt out like cards
    ulysses = Ulysses(
        group=runtime.exchange_group,
        member=member,
        token_counts=counts,
        num_heads=heads,
        kernel=sdpa,
        key_mask=None,
        heads_per_chunk=1,
    )
    out = ulysses(q[:, own][:, :, order], k[:, own][:, :, order], v[:, own][:, :, order])
    leave(runtime)
    return float((out - sdpa(q, k, v, None)[:, own]).abs().max())


def test_heads_in_the_order_of_the_members_are_noticed() -> None:
    assert min(run_ranks(check_wrong_order, 3)) > 0.1
