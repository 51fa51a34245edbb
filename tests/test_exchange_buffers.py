"""Memory of exchanges is used again, but never while somebody still reads or sends it.

`Poisoned` buffers turn to NaN the moment they are given back, so that whoever reads too late computes with NaN. The
twins give back too early, each at another place, and must be noticed.
"""

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dit_group.ring
import dit_group.ulysses
from dit_group.attention import STRATEGIES, SequenceParallel
from dit_group.kernels import sdpa
from tests.ranks import RanksError, leave, run_ranks
from videopipe import exchange
from videopipe.exchange import Buffers, Exchange, PendingExchange
from videopipe.partition import JointSequence, Mesh, Partition, split_evenly
from videopipe.runtime import Runtime

HEAD_DIM = 4
MESHES = {2: Mesh(2, 1), 3: Mesh(1, 3), 4: Mesh(2, 2)}


class Poisoned(Buffers):
    """What is given back cannot be mistaken for data, and says how often memory was used again."""

    def __init__(self) -> None:
        super().__init__()
        self.used_again = 0

    def take(self, numel: int, like: Tensor) -> Tensor:
        before = self.free_bytes
        flat = super().take(numel, like)
        self.used_again += self.free_bytes < before
        return flat

    def give_back(self, flat: Tensor) -> None:
        storage = flat.untyped_storage()
        flat.new_empty(0).set_(storage, 0, (storage.nbytes() // flat.element_size(),)).fill_(torch.nan)
        super().give_back(flat)


# -- the bookkeeping alone


@settings(max_examples=200, deadline=None)
@given(
    actions=st.lists(
        st.one_of(st.tuples(st.just("take"), st.integers(0, 40)), st.tuples(st.just("give"), st.integers(0, 9))),
        max_size=60,
    ),
    wide=st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_no_two_live_tensors_share_memory_and_buffers_are_few(actions: list[tuple[str, int]], wide: list[bool]) -> None:
    buffers, live, most = Buffers(), list[Tensor](), 0
    for (action, number), double in zip(actions, wide, strict=False):
        if action == "take":
            live.append(buffers.take(number, torch.empty(0, dtype=torch.float64 if double else torch.bfloat16)))
            assert live[-1].shape == (number,)
        elif live:
            buffers.give_back(live.pop(number % len(live)))
        used = [t for t in live if t.numel()]
        most = max(most, len(used))
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in used)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert buffers.free_bytes <= (most - len(used)) * 40 * 8, "more buffers than were in use at once"


def test_memory_is_used_again_and_a_larger_buffer_takes_the_place_of_a_smaller_one() -> None:
    buffers, like = Buffers(), torch.empty(0)
    small = buffers.take(10, like)
    place = small.data_ptr()
    buffers.give_back(small)
    assert buffers.take(7, like).data_ptr() == place
    buffers.give_back(small)
    large = buffers.take(1000, like)
    buffers.give_back(large)
    assert buffers.free_bytes == 4000
    assert buffers.take(0, like).shape == (0,)


def test_giving_back_twice_is_noticed() -> None:
    buffers = Buffers()
    flat = buffers.take(10, torch.empty(0))
    buffers.give_back(flat)
    with pytest.raises(AssertionError, match="given back twice"):
        buffers.give_back(flat)


# -- strategies on real ranks


def tensors(batch: int, tokens: int, heads: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, tokens, heads, HEAD_DIM, generator=generator) for _ in range(3)]


WAYS = [
    ("ulysses", {"heads_per_chunk": chunk, "early_chunks": early, "balance": balance})
    for chunk, early, balance in product((None, 1, 2), (None, 1, 2), ("heads", "rows"))
]
WAYS += [("ring", {}), ("usp", {}), ("usp", {"heads_per_chunk": 1})]


def check_strategies(runtime: Runtime, ways: int) -> tuple[int, int]:
    """Three layers of each way, one after the other on the same buffers; outputs of all are kept and compared last."""
    member, members, heads = runtime.rank, runtime.world_size, 5
    buffers, checked = Poisoned(), 0
    for (strategy, options), batch in product(WAYS[:ways], (1, 2)):
        counts = JointSequence.even(17, 4, members).counts
        own = slice(sum(counts[:member]), sum(counts[: member + 1]))
        attention = STRATEGIES[strategy](
            group=runtime.exchange_group,
            member=member,
            token_counts=counts,
            num_heads=heads,
            kernel=sdpa,
            key_mask=None,
            buffers=buffers,
            **options,
            **({"mesh": MESHES[members]} if strategy == "usp" else {}),
        )
        outputs = []
        for layer in range(3):
            q, k, v = tensors(batch, 21, heads, layer)
            call = attention.begin()
            call.value(v[:, own])
            call.key(k[:, own])
            call.query(q[:, own])
            call.attend()
            outputs.append((call.output(), sdpa(q, k, v, None)[:, own]))
        for ours, whole in outputs:
            assert float((ours - whole).abs().max()) <= 1e-5, (strategy, options, batch)  # NaN fails as well
        checked += 1
    leave(runtime)
    return checked, buffers.used_again


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_layers_on_used_memory_equal_one_process(world_size: int) -> None:
    for checked, used_again in run_ranks(check_strategies, world_size, len(WAYS)):
        assert checked == 2 * len(WAYS) and used_again > 100


def check_layouts_share(runtime: Runtime) -> None:
    """Layouts of one rank share their memory, and it goes with the last of them."""
    parallel = SequenceParallel(group=runtime.exchange_group, member=runtime.rank, members=2, num_heads=4)
    first, second = parallel.lay_out(11, 3), parallel.lay_out(40, 3)
    ulysses = [layout.attention for layout in (first, second)]
    assert ulysses[0].buffers is ulysses[1].buffers  # type: ignore[attr-defined]
    for layout, tokens in ((first, 14), (second, 43), (first, 14)):
        parallel.use(layout)
        q, k, v = tensors(1, tokens, 4, 0)
        own = slice(*((0, layout.sequence.counts[0]), (layout.sequence.counts[0], tokens))[runtime.rank])
        assert torch.equal(parallel.attention(q[:, own], k[:, own], v[:, own]), sdpa(q, k, v, None)[:, own])
    old = ulysses[0].buffers  # type: ignore[attr-defined]
    assert old.free_bytes > 0
    leave(runtime)


def test_layouts_share_their_memory() -> None:
    run_ranks(check_layouts_share, 2)


# -- twins


class LendsTwice(Poisoned):
    """Keeps for itself what it lends."""

    def take(self, numel: int, like: Tensor) -> Tensor:
        flat = super().take(numel, like)
        if numel and all(flat.data_ptr() != free.data_ptr() for free in self._free):
            self._free.append(flat.untyped_storage())
        return flat

    def give_back(self, flat: Tensor) -> None:
        self._free = [free for free in self._free if free.data_ptr() != flat.data_ptr()]
        super().give_back(flat)


class DoneAtWait(PendingExchange):
    """Gives its memory back when it hands it out, before anybody has read it."""

    def wait(self) -> Tensor:
        result = super().wait()
        self.done()
        return result


class SentTooSoon(PendingExchange):
    """Gives what is being sent back before the transfer has ended."""

    def __init__(self, work, sent, received, shapes, dim, *, packed=False, buffers=None) -> None:  # type: ignore[no-untyped-def]
        super().__init__(work, sent, received, shapes, dim, packed=False, buffers=buffers)
        if packed and buffers is not None:
            buffers.give_back(sent)


def check_twin(runtime: Runtime, twin: str) -> None:
    """One exchange after the other, and attention, on wrongly handled memory."""
    member, members = runtime.rank, runtime.world_size
    buffers = LendsTwice() if twin == "lends twice" else Poisoned()
    p = Partition(split_evenly(4000, members), split_evenly(6, members))
    with pytest.MonkeyPatch.context() as patch:
        if twin == "done at wait":
            patch.setattr(exchange, "PendingExchange", DoneAtWait)
        if twin == "sent too soon":
            patch.setattr(exchange, "PendingExchange", SentTooSoon)
        whole = tensors(1, p.num_tokens, p.num_heads, 0)
        moves = Exchange(runtime.exchange_group, p, member, buffers)
        under_way = [moves.start_to_heads(x[:, p.tokens_of(member)]) for x in whole]
        for x, pending in zip(whole, under_way, strict=True):
            assert torch.equal(pending.wait(), x[:, :, p.heads_of(member)]), "not what was sent"
            pending.done()
    leave(runtime)


def test_memory_that_is_handled_rightly_passes_where_the_twins_fail() -> None:
    run_ranks(check_twin, 2, "nothing wrong")


@pytest.mark.parametrize("twin", ["lends twice", "done at wait", "sent too soon"])
def test_memory_given_back_too_early_is_noticed(twin: str) -> None:
    with pytest.raises(RanksError, match="not what was sent"):
        run_ranks(check_twin, 2, twin)


def check_early_release(runtime: Runtime, module: str) -> None:
    """A ring that lets a block go before it has computed with it; a chunk that goes while the kernel still reads it."""
    member, members = runtime.rank, runtime.world_size
    counts = split_evenly(21, members)
    own = slice(sum(counts[:member]), sum(counts[: member + 1]))
    q, k, v = tensors(1, 21, 6, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "PendingExchange", DoneAtWait)
        strategy = dit_group.ring.Ring if module == "ring" else dit_group.ulysses.Ulysses
        attention = strategy(
            group=runtime.exchange_group,
            member=member,
            token_counts=counts,
            num_heads=6,
            kernel=sdpa,
            key_mask=None,
            buffers=Poisoned(),
        )
        assert torch.allclose(attention(q[:, own], k[:, own], v[:, own]), sdpa(q, k, v, None)[:, own]), "other values"
    leave(runtime)


@pytest.mark.parametrize("module", ["ring", "ulysses"])
def test_a_block_that_goes_before_its_reader_is_noticed(module: str) -> None:
    with pytest.raises(RanksError, match="other values"):
        run_ranks(check_early_release, 3, module)
