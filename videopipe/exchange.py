"""The one exchange: an all-to-all between two views of the same activations, with any counts for each member."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from videopipe.partition import Partition


class PendingExchange:
    """An exchange under way; `wait()` gives the result once, in the caller's stream order."""

    def __init__(
        self, work: dist.Work | None, received: Tensor, sent: Tensor, counts: Sequence[Sequence[int]], dim: int
    ) -> None:
        self._work = work
        self._received = received
        self._sent: Tensor | None = sent  # kept alive until the transfer has ended
        self._shapes = counts
        self._dim = dim

    def wait(self) -> Tensor:
        """The tensor in its new view."""
        if self._work is not None:
            self._work.wait()
        self._sent = None
        return _concatenate(self._received, self._shapes, self._dim)


class Exchange:
    """Moves activations of one group between the token view and the head view.

    to_heads : [B, S_local, N, D] -> [B, S, N_local, D]   give away heads, collect all tokens
    to_tokens: [B, S, N_local, D] -> [B, S_local, N, D]   the inverse; a round trip is bit-exact

    The counts of every member are known to all (a pure function of sizes), so nothing but activations travels. A
    member may own zero tokens, zero heads, or both; every member of the group makes the same calls in the same order.
    With one member both are the identity and no group is needed.

    Source: DeepSpeed-Ulysses (arXiv 2309.14509), generalised to arbitrary counts as PipeDiT (arXiv 2511.12056)
    needs for its attention co-processing.
    """

    def __init__(self, group: dist.ProcessGroup | None, partition: Partition, member: int) -> None:
        if group is None and partition.members != 1:
            raise ValueError(f"group=None needs a partition of one member, not {partition.members}")
        self.group = group
        self.partition = partition
        self.member = member

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
        shapes = [(B, s, N_local, D) for s in p.token_counts]
        return self._start(x, outgoing, shapes, dim=1)

    def start_to_tokens(self, x: Tensor) -> PendingExchange:
        """Begin `to_tokens`; the transfer goes on while the caller computes."""
        p = self.partition
        B, S, N_local, D = x.shape
        assert (S, N_local) == (p.num_tokens, p.head_counts[self.member]), (x.shape, p)
        S_local = p.token_counts[self.member]
        outgoing = x.split(p.token_counts, dim=1)
        shapes = [(B, S_local, n, D) for n in p.head_counts]
        return self._start(x, outgoing, shapes, dim=2)

    def _start(
        self, x: Tensor, outgoing: Sequence[Tensor], shapes: Sequence[tuple[int, int, int, int]], dim: int
    ) -> PendingExchange:
        if self.group is None:
            return PendingExchange(None, x, x, [tuple(x.shape)], dim)
        # rank-major blocks; a split along tokens with B = 1 is already laid out like that and is sent without a copy
        contiguous = x.is_contiguous() and x.shape[0] == 1 and dim == 2
        sent = x.view(-1) if contiguous else torch.cat([part.reshape(-1) for part in outgoing])
        received = x.new_empty(sum(_numel(shape) for shape in shapes))
        work = dist.all_to_all_single(
            received,
            sent,
            output_split_sizes=[_numel(shape) for shape in shapes],
            input_split_sizes=[part.numel() for part in outgoing],
            group=self.group,
            async_op=True,
        )
        return PendingExchange(work, received, sent, shapes, dim)


def start_gather_tokens(
    x: Tensor, token_counts: Sequence[int], group: dist.ProcessGroup | None, member: int, dim: int = 1
) -> PendingExchange:
    """Begin to make a sharded tensor whole on every member.

    Args:
        x: this member's shard; size `token_counts[member]` along `dim`.
        token_counts: tokens of each member; may differ, may be zero.
        group: None for one member.
    Returns:
        What will be the whole tensor, size sum(token_counts) along `dim`, shards in member order.
    """
    assert x.shape[dim] == token_counts[member], (x.shape, dim, token_counts, member)
    shapes = [(*x.shape[:dim], count, *x.shape[dim + 1 :]) for count in token_counts]
    if group is None:
        return PendingExchange(None, x, x, shapes, dim)
    # an all-to-all in which everybody gets the same: gloo rejects an uneven all_gather, and is slower at an even one
    sent = x.reshape(-1).repeat(len(token_counts))
    received = x.new_empty(sum(_numel(shape) for shape in shapes))
    work = dist.all_to_all_single(
        received,
        sent,
        output_split_sizes=[_numel(shape) for shape in shapes],
        input_split_sizes=[x.numel()] * len(token_counts),
        group=group,
        async_op=True,
    )
    return PendingExchange(work, received, sent, shapes, dim)


def gather_tokens(
    x: Tensor, token_counts: Sequence[int], group: dist.ProcessGroup | None, member: int, dim: int = 1
) -> Tensor:
    """As `start_gather_tokens`, blocking; with one member the tensor itself."""
    if group is None:
        return x
    return start_gather_tokens(x, token_counts, group, member, dim).wait()


def exchange_tokens(
    x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], group: dist.ProcessGroup | None
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
    sent = torch.cat([part.reshape(-1) for part in x.split(list(send_counts), dim=1)])
    received = x.new_empty(sum(_numel(shape) for shape in shapes))
    work = dist.all_to_all_single(
        received,
        sent,
        output_split_sizes=[_numel(shape) for shape in shapes],
        input_split_sizes=[B * count * C for count in send_counts],
        group=group,
        async_op=True,
    )
    return PendingExchange(work, received, sent, shapes, 1).wait()


def start_take_from_previous(
    x: Tensor, num_tokens: int, group: dist.ProcessGroup, member: int, members: int
) -> PendingExchange:
    """Begin one turn of a ring: give a block to the next member and take the previous one's.

    Args:
        x: [B, S_block, N, D], what this member hands on; may have no tokens.
        num_tokens: tokens of the block that arrives; every member knows all counts, so nothing else travels.
    Returns:
        What will be the previous member's block, [B, num_tokens, N, D].
    """
    assert members > 1, members
    shape = (x.shape[0], num_tokens, *x.shape[2:])
    sent = x.reshape(-1)
    received = x.new_empty(_numel(shape))
    following, previous = (member + 1) % members, (member - 1) % members
    # an all-to-all that is empty but for the neighbours: one primitive for all moves, and no order of sends to agree on
    work = dist.all_to_all_single(
        received,
        sent,
        output_split_sizes=[received.numel() if peer == previous else 0 for peer in range(members)],
        input_split_sizes=[sent.numel() if peer == following else 0 for peer in range(members)],
        group=group,
        async_op=True,
    )
    return PendingExchange(work, received, sent, [shape], 1)


def _concatenate(flat: Tensor, shapes: Sequence[Sequence[int]], dim: int) -> Tensor:
    """Blocks laid one after the other in `flat`, joined along `dim`."""
    if len(shapes) == 1:
        return flat.reshape(*shapes[0])
    if dim == 1 and shapes[0][0] == 1:  # [1, s_0, n, D], [1, s_1, n, D], ... already lie as [1, S, n, D]
        return flat.view(1, sum(shape[1] for shape in shapes), *shapes[0][2:])
    blocks = flat.split([_numel(shape) for shape in shapes])
    return torch.cat([block.view(*shape) for block, shape in zip(blocks, shapes, strict=True)], dim=dim)


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
