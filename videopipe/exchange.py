"""The one exchange: an all-to-all between two views of the same activations, with any counts for each member."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from videopipe.partition import Partition

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Subset:
    """Some members of a group, who exchange among themselves through the group's own all-to-all.

    The members that are not in it exchange in subsets of their own at the same time: all members of the group make the
    same number of calls in the same order. One group has one stream of communication; two groups used at once, as the
    axes of a mesh would be, may wait for each other in another order on each device and never end (torch's
    documentation of `new_group` forbids it for NCCL).
    """

    group: dist.ProcessGroup
    members: tuple[int, ...]
    size: int

    def __post_init__(self) -> None:
        assert list(self.members) == sorted(set(self.members)) and self.members[-1] < self.size, self

    def spread(self, counts: Sequence[int]) -> list[int]:
        """One number for each member of the group, zero for those outside, from one for each member in here."""
        inside = dict(zip(self.members, counts, strict=True))
        return [inside.get(member, 0) for member in range(self.size)]


Group = dist.ProcessGroup | Subset


class Buffers:
    """Memory that exchanges use again, layer after layer and step after step.

    Whoever takes a buffer owns it until it is given back; one that never is given back is simply freed with its last
    tensor. Any tensor fits that is not larger, of whatever dtype. Where nothing free is large enough, a larger buffer
    takes the place of a free one, so there are never more buffers than were in use at once.

    On CUDA "given back" means in the order of the current stream: a collective begins after what that stream was told
    before, and `PendingExchange.wait` lets the stream wait for the collective's end. All takers use one stream.
    """

    def __init__(self) -> None:
        self._free: list[torch.UntypedStorage] = []

    def take(self, numel: int, like: Tensor) -> Tensor:
        """An uninitialised flat tensor [numel] with the dtype and on the device of `like`."""
        size = numel * like.element_size()
        if not size:
            return like.new_empty(0)
        sizes = {place: free.nbytes() for place, free in enumerate(self._free) if free.device == like.device}
        fitting = [place for place in sizes if sizes[place] >= size]
        if not fitting:
            if sizes:
                del self._free[max(sizes, key=sizes.__getitem__)]
            return like.new_empty(numel)
        smallest = self._free.pop(min(fitting, key=sizes.__getitem__))
        return like.new_empty(0).set_(smallest, 0, (numel,), (1,))

    def give_back(self, flat: Tensor) -> None:
        """What `take` gave will not be read or written any more by its taker, nor by anybody it was shown to."""
        storage = flat.untyped_storage()
        assert all(storage.data_ptr() != free.data_ptr() for free in self._free), "given back twice"
        if storage.nbytes():
            self._free.append(storage)

    @property
    def free_bytes(self) -> int:
        """Bytes that wait to be used again."""
        return sum(storage.nbytes() for storage in self._free)


class PendingExchange:
    """An exchange under way; `wait()` or `wait_into()` gives the result once, in the caller's stream order.

    Args:
        sent, received: flat; kept alive until the transfer has ended.
        shapes: of the blocks in `received`, which are joined along `dim`.
        packed: whether `sent` was taken from `buffers`, and not from the caller.
        buffers: where `received` and a packed `sent` come from and return to; None for memory that is used once.
    """

    def __init__(
        self,
        work: dist.Work | None,
        sent: Tensor,
        received: Tensor,
        shapes: Sequence[Shape],
        dim: int,
        *,
        packed: bool = False,
        buffers: Buffers | None = None,
    ) -> None:
        self._work = work
        self._sent: Tensor | None = sent
        self._received: Tensor | None = received
        self._shapes = shapes
        self._dim = dim
        self._packed = packed
        self._buffers = buffers

    def wait(self) -> Tensor:
        """The tensor in its new view. It may lie in a buffer: say `done` when its reader has been called."""
        received, shapes, dim = self._arrived(), self._shapes, self._dim
        if len(shapes) == 1:
            return received.view(shapes[0])
        if dim == 1 and shapes[0][0] == 1:  # [1, s_0, n, D], [1, s_1, n, D], ... already lie as [1, S, n, D]
            return received.view(1, sum(shape[1] for shape in shapes), *shapes[0][2:])
        joined = torch.cat(_blocks(received, shapes), dim=dim)
        self.done()
        return joined

    def wait_into(self, out: Tensor) -> None:
        """Write the tensor in its new view to `out`, which may have any strides."""
        blocks = _blocks(self._arrived(), self._shapes)
        places = out.split([shape[self._dim] for shape in self._shapes], self._dim)
        for place, block in zip(places, blocks, strict=True):
            place.copy_(block)
        self.done()

    def done(self) -> None:
        """What `wait` gave will not be read any more; where nobody says so, its memory is not used again."""
        if self._buffers is not None and self._received is not None:
            self._buffers.give_back(self._received)
        self._received = None

    def _arrived(self) -> Tensor:
        """What came, once the transfer has ended."""
        assert self._sent is not None and self._received is not None, "the result is given once"
        if self._work is not None:
            self._work.wait()
        if self._packed and self._buffers is not None:
            self._buffers.give_back(self._sent)
        self._sent = None
        return self._received


class Exchange:
    """Moves activations of one group between the token view and the head view.

    to_heads : [B, S_local, N, D] -> [B, S, N_local, D]   give away heads, collect all tokens
    to_tokens: [B, S, N_local, D] -> [B, S_local, N, D]   the inverse; a round trip is bit-exact

    The counts of every member are known to all (a pure function of sizes), so nothing but activations travels. A
    member may own zero tokens, zero heads, or both; every member of the group makes the same calls in the same order.
    With one member both are the identity and no group is needed.

    Source: DeepSpeed-Ulysses (arXiv 2309.14509), generalised to arbitrary counts as PipeDiT (arXiv 2511.12056)
    needs for its attention co-processing.

    Args:
        buffers: memory for packing and receiving that is used again; None for fresh memory each time.
    """

    def __init__(self, group: Group | None, partition: Partition, member: int, buffers: Buffers | None = None) -> None:
        if group is None and partition.members != 1:
            raise ValueError(f"group=None needs a partition of one member, not {partition.members}")
        self.group = group
        self.partition = partition
        self.member = member
        self.buffers = buffers

    def to_heads(self, x: Tensor) -> Tensor:
        """[B, S_local, N, D] -> [B, S, N_local, D], blocking."""
        return self.start_to_heads(x).wait()

    def to_tokens(self, x: Tensor) -> Tensor:
        """[B, S, N_local, D] -> [B, S_local, N, D], blocking."""
        return self.start_to_tokens(x).wait()

    def start_to_heads(self, x: Tensor) -> PendingExchange:
        """Begin `to_heads`; the transfer goes on while the caller computes."""
        p = self.partition
        B, S_local, N, D = x.shape
        assert (S_local, N) == (p.token_counts[self.member], p.num_heads), (x.shape, p)
        N_local = p.head_counts[self.member]
        outgoing = x.split(p.head_counts, dim=2)
        return self._start(x, outgoing, [(B, s, N_local, D) for s in p.token_counts], dim=1)

    def start_to_tokens(self, x: Tensor) -> PendingExchange:
        """Begin `to_tokens`; the transfer goes on while the caller computes."""
        p = self.partition
        B, S, N_local, D = x.shape
        assert (S, N_local) == (p.num_tokens, p.head_counts[self.member]), (x.shape, p)
        S_local = p.token_counts[self.member]
        outgoing = x.split(p.token_counts, dim=1)
        return self._start(x, outgoing, [(B, S_local, n, D) for n in p.head_counts], dim=2)

    def _start(self, x: Tensor, outgoing: Sequence[Tensor], shapes: Sequence[Shape], dim: int) -> PendingExchange:
        if self.group is None:
            return PendingExchange(None, x, x, [tuple(x.shape)], dim)
        # rank-major blocks; a split along tokens with B = 1 is already laid out like that and is sent without a copy
        packed = not (x.is_contiguous() and x.shape[0] == 1 and dim == 2)
        sent = _pack(outgoing, self.buffers) if packed else x.view(-1)
        leaving, arriving = [part.numel() for part in outgoing], [math.prod(shape) for shape in shapes]
        work, received = _all_to_all(sent, leaving, arriving, self.group, self.buffers)
        return PendingExchange(work, sent, received, shapes, dim, packed=packed, buffers=self.buffers)


def start_gather_tokens(
    x: Tensor,
    token_counts: Sequence[int],
    group: Group | None,
    member: int,
    dim: int = 1,
    buffers: Buffers | None = None,
    ready: Callable[[], None] | None = None,
) -> PendingExchange:
    """Begin to make a sharded tensor whole on every member.

    Args:
        x: this member's shard; size `token_counts[member]` along `dim`.
        token_counts: tokens of each member; may differ, may be zero.
        group: None for one member.
        ready: called when all memory is there, right before tensors travel; what it raises ends the exchange.
    Returns:
        What will be the whole tensor, size sum(token_counts) along `dim`, shards in member order.
    """
    assert x.shape[dim] == token_counts[member], (x.shape, dim, token_counts, member)
    shapes = [(*x.shape[:dim], count, *x.shape[dim + 1 :]) for count in token_counts]
    if group is None:
        return PendingExchange(None, x, x, shapes, dim)
    # an all-to-all in which everybody gets the same: gloo rejects an uneven all_gather, and is slower at an even one
    sent = _pack([x] * len(token_counts), buffers)
    arriving = [math.prod(shape) for shape in shapes]
    work, received = _all_to_all(sent, [x.numel()] * len(token_counts), arriving, group, buffers, ready)
    return PendingExchange(work, sent, received, shapes, dim, packed=True, buffers=buffers)


def gather_tokens(
    x: Tensor,
    token_counts: Sequence[int],
    group: Group | None,
    member: int,
    dim: int = 1,
    ready: Callable[[], None] | None = None,
) -> Tensor:
    """As `start_gather_tokens`, blocking; with one member the tensor itself."""
    if group is None:
        return x
    return start_gather_tokens(x, token_counts, group, member, dim, ready=ready).wait()


def exchange_tokens(
    x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], group: Group | None
) -> Tensor:
    """Tokens change hands: some of them to each member, blocking.

    Args:
        x: [B, S_local, C], the tokens for the first member, then those for the second, ...
        send_counts, receive_counts: tokens for and from each member; may be zero.
        group: None for one member.
    Returns:
        [B, sum(receive_counts), C], in the order of the members that they come from.
    """
    assert x.shape[1] == sum(send_counts), (x.shape, send_counts)
    if group is None:
        return x
    B, _, C = x.shape
    shapes = [(B, count, C) for count in receive_counts]
    sent = _pack(x.split(list(send_counts), dim=1), None)
    leaving, arriving = [B * count * C for count in send_counts], [math.prod(shape) for shape in shapes]
    work, received = _all_to_all(sent, leaving, arriving, group, None)
    return PendingExchange(work, sent, received, shapes, 1, packed=True).wait()


def start_take_from_previous(
    x: Tensor,
    num_tokens: int,
    group: Group,
    member: int,
    members: int,
    buffers: Buffers | None = None,
) -> PendingExchange:
    """Begin one turn of a ring: give a block to the next member and take the previous one's.

    Args:
        x: [B, S_block, N, D], what this member hands on; may have no tokens.
        num_tokens: tokens of the block that arrives; every member knows all counts, so nothing else travels.
    Returns:
        What will be the previous member's block, [B, num_tokens, N, D].
    """
    assert members > 1, members
    following, previous = (member + 1) % members, (member - 1) % members
    shape = (x.shape[0], num_tokens, *x.shape[2:])
    packed = not x.is_contiguous()
    sent = _pack([x], buffers) if packed else x.view(-1)
    # an all-to-all that is empty but for the neighbours: one primitive for all moves, and no order of sends to agree on
    leaving = [x.numel() if peer == following else 0 for peer in range(members)]
    arriving = [math.prod(shape) if peer == previous else 0 for peer in range(members)]
    work, received = _all_to_all(sent, leaving, arriving, group, buffers)
    return PendingExchange(work, sent, received, [shape], 1, packed=packed, buffers=buffers)


def _all_to_all(
    sent: Tensor,
    leaving: list[int],
    arriving: list[int],
    group: Group,
    buffers: Buffers | None,
    ready: Callable[[], None] | None = None,
) -> tuple[dist.Work | None, Tensor]:
    """Begin to send `leaving[peer]` elements to each member; what will be the received ones lie in member order."""
    if isinstance(group, Subset):
        leaving, arriving, group = group.spread(leaving), group.spread(arriving), group.group
    received = _take(sum(arriving), sent, buffers)
    if ready is not None:
        ready()
    work = dist.all_to_all_single(
        received, sent, output_split_sizes=arriving, input_split_sizes=leaving, group=group, async_op=True
    )
    return work, received


def _pack(parts: Sequence[Tensor], buffers: Buffers | None) -> Tensor:
    """The parts one after the other in a flat tensor; each is copied once, whatever its strides."""
    counts = [part.numel() for part in parts]
    flat = _take(sum(counts), parts[0], buffers)
    for place, part in zip(flat.split(counts), parts, strict=True):
        place.view(part.shape).copy_(part)
    return flat


def _take(numel: int, like: Tensor, buffers: Buffers | None) -> Tensor:
    return like.new_empty(numel) if buffers is None else buffers.take(numel, like)


def _blocks(flat: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """The blocks that lie one after the other in `flat`; a single one is the tensor itself, of any strides."""
    if len(shapes) == 1:
        return [flat.view(shapes[0])]
    blocks = flat.split([math.prod(shape) for shape in shapes])
    return [block.view(shape) for block, shape in zip(blocks, shapes, strict=True)]
