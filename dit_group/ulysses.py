"""Ulysses and PipeSP: each member attends for its own heads over all tokens, chunk of heads by chunk of heads.

Source: DeepSpeed-Ulysses (arXiv 2309.14509) with any token and head counts; PipeSP from PipeDiT (arXiv 2511.12056),
generalised from one head to chunks of heads. The paper repairs the order of heads after its exchanges; here heads are
cut into chunks in global order before the exchange, so the results concatenate in the right order by themselves.
"""

from torch import Tensor

from dit_group.call import Work, give_back_query, run_call
from dit_group.kernels import Kernel
from videopipe.arrangement import Balance
from videopipe.exchange import Buffers, Exchange, Group, PendingExchange, start_gather_tokens
from videopipe.partition import Partition, split_evenly


def refuse_divided_heads(
    strategy: str, heads_per_chunk: int | None, balance: Balance, head_counts: tuple[int, ...] | None
) -> None:
    """For strategies without these choices.

    Raises:
        ValueError: one of them has another value than its default.
    """
    for name, value, default in (
        ("heads_per_chunk", heads_per_chunk, None),
        ("balance", balance, "heads"),
        ("head_counts", head_counts, None),
    ):
        if value != default:
            raise ValueError(f"{name}={value!r} divides heads, but {strategy} does not; nearest is {default!r}")


def early_chunks(num_chunks: int, projection_s: float, transfer_s: float) -> int:
    """Of how many chunks v and k should leave as soon as they are projected.

    While k and q are projected the link can carry so much; what is more delays the first chunk's k and q, and what is
    less leaves the link idle.

    Args:
        projection_s: seconds to project one of v, k and q.
        transfer_s: seconds in which all chunks of one of them travel.
    Returns:
        Between 1 and num_chunks.
    """
    return max(1, min(num_chunks, round(num_chunks * projection_s / transfer_s))) if transfer_s else num_chunks


class Ulysses:
    """Attention over one laid-out sequence.

    Args:
        token_counts: tokens of each member; zero for a member that only helps.
        num_heads: heads of the layer (N).
        kernel: computes the attention of some heads over all tokens.
        key_mask: bool [B, S] in the joint order, or None.
        heads_per_chunk: at most so many heads of each member travel and compute together, in chunks of nearly equal
            sizes; None for all at once (the plain path).
        balance: `heads` splits whole heads, 24 on 7 as 4, 4, 4, 3, 3, 3, 3. `rows` gives each member N // n whole
            heads, and of the N % n heads left over each member computes its own query rows: their keys and values are
            gathered, their queries and outputs do not travel, and all members do the same amount of work.
        head_counts: whole heads of each member, where they shall not be equal; zero for members that only bring tokens.
            With `rows` they may leave heads over, which are divided by query rows.
        helpers_first: the heads of members without tokens travel and compute as the first chunk, so that those members
            begin while the others still exchange among themselves.
        early_chunks: chunks whose v and k leave as soon as they are projected; the others follow chunk by chunk after
            the early ones' q, so that the first chunk does not wait for all of v and k. None for half of them; see
            `early_chunks`.
        buffers: memory for what travels, shared with other layouts; None for memory of its own.
        collective_kernel: whether the kernel itself exchanges something with other members (usp), so that a member
            calls it even where it has no heads.
    """

    def __init__(
        self,
        *,
        group: Group | None,
        member: int,
        token_counts: tuple[int, ...],
        num_heads: int,
        kernel: Kernel,
        key_mask: Tensor | None,
        heads_per_chunk: int | None = None,
        balance: Balance = "heads",
        head_counts: tuple[int, ...] | None = None,
        helpers_first: bool = False,
        early_chunks: int | None = None,
        buffers: Buffers | None = None,
        collective_kernel: bool = False,
    ) -> None:
        if early_chunks is not None and early_chunks < 1:
            raise ValueError(f"early_chunks={early_chunks} must be at least 1, nearest is 1")
        members = len(token_counts)
        self.group = group
        self.member = member
        self.token_counts = token_counts
        self.kernel = kernel
        self.key_mask = key_mask
        self.collective_kernel = collective_kernel
        self.buffers = Buffers() if buffers is None else buffers
        left = head_counts
        if left is None:
            left = split_evenly(num_heads, members) if balance == "heads" else (num_heads // members,) * members
        whole = sum(left)
        assert whole <= num_heads if balance == "rows" else whole == num_heads, (left, num_heads, balance)
        self.shared_heads = slice(whole, num_heads)
        parts: list[tuple[int, ...]] = []
        if helpers_first:
            parts.append(tuple(0 if tokens else n for n, tokens in zip(left, token_counts, strict=True)))
            left = tuple(n if tokens else 0 for n, tokens in zip(left, token_counts, strict=True))
        num_chunks = min(max(left), 1) if heads_per_chunk is None else -(-max(left) // heads_per_chunk)
        # of nearly equal sizes, the smaller ones first: the sooner the first chunk has come, the less time is idle
        shares = [split_evenly(n, num_chunks)[::-1] for n in left] if num_chunks else []
        parts += zip(*shares, strict=True)
        self.chunks: list[tuple[slice, Exchange]] = []
        start = 0
        for counts in filter(any, parts):
            heads = slice(start, start + sum(counts))
            self.chunks.append((heads, Exchange(group, Partition(token_counts, counts), member, self.buffers)))
            start = heads.stop
        self.num_parts = len(self.chunks) + self.has_shared_heads
        self.early_parts = min(early_chunks or -(-len(self.chunks) // 2), self.num_parts)

    @property
    def has_shared_heads(self) -> bool:
        """Whether some heads are computed by query rows."""
        return self.shared_heads.stop > self.shared_heads.start

    def begin(self, kernel: Kernel | None = None) -> "UlyssesCall":
        """The attention of one layer, computed by `kernel` in place of the plan's own if given.

        A kernel that needs the rows of all queries, as sparse ones do, cannot go with `balance="rows"`.
        """
        return UlyssesCall(self, self.kernel if kernel is None else kernel)

    def own_work(self, kernel: Kernel | None) -> list[Work]:
        """The calls by which this member computes its share of a layer: its heads chunk by chunk, then its rows."""
        tokens, own = sum(self.token_counts), self.token_counts[self.member]
        parts = [(exchange.partition.head_counts[self.member], tokens) for _, exchange in self.chunks]
        parts += [(self.shared_heads.stop - self.shared_heads.start, own)] if self.has_shared_heads else []
        kernel = kernel or self.kernel
        return [Work(kernel=kernel, heads=heads, keys=tokens, rows=rows) for heads, rows in parts if heads and rows]

    def work_of(self, heads: int, kernel: Kernel | None) -> list[Work]:
        """One call: so many heads over all tokens."""
        tokens = sum(self.token_counts)
        return [Work(kernel=kernel or self.kernel, heads=heads, keys=tokens, rows=tokens)]

    def transfers(self, kernel: Kernel | None) -> "UlyssesCall":
        """A call in which everything travels and nothing is computed."""
        return UlyssesCall(self, give_back_query)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Local tokens of all heads in, the same out: [B, S_local, N, D]."""
        return run_call(self.begin(), q, k, v)


class UlyssesCall:
    """One layer's attention, step by step, so that the caller computes while tensors travel.

    `value` may be called as soon as v is projected, then `key` and `query`; `attend` computes, and each chunk's output
    leaves as soon as it is ready; `output` waits for what has not arrived. Every member starts its exchanges in the
    same order, on which a process group insists.

    A part is what travels and computes together: a chunk of whole heads, or at last the heads shared by query rows.
    """

    def __init__(self, plan: Ulysses, kernel: Kernel) -> None:
        self._plan = plan
        self._kernel = kernel
        self._arriving: list[list[PendingExchange]] = [[] for _ in range(plan.num_parts)]  # v, k and q of each part
        self._late: list[Tensor] = []  # v and k, whose later parts have not left yet
        self._query: Tensor | None = None
        self._outputs: list[PendingExchange] = []
        self._shared_output: Tensor | None = None

    def value(self, v: Tensor) -> None:
        """Send v [B, S_local, N, D] on its way."""
        self._send_early(v)

    def key(self, k: Tensor) -> None:
        """Send k on its way."""
        self._send_early(k)

    def query(self, q: Tensor) -> None:
        """Send q on its way, and what has been held back."""
        plan, self._query = self._plan, q
        for part in range(plan.num_parts):
            if part >= plan.early_parts:
                for x in self._late:
                    self._send(x, part)
            if part < len(plan.chunks):  # the queries of shared heads stay
                self._send(q, part)
        self._late = []

    def attend(self) -> None:
        """Compute the attention of this member's heads, chunk by chunk; the outputs begin to travel."""
        plan = self._plan
        for (_, exchange), arriving in zip(plan.chunks, self._arriving, strict=False):
            v, k, q = (pending.wait() for pending in arriving)  # [B, S, N_local, D]
            called = q.shape[2] > 0 or plan.collective_kernel
            out = self._kernel(q, k, v, plan.key_mask) if called else q.new_empty(q.shape)
            for pending in arriving:  # the kernel is their last reader: what it gives is a tensor of its own
                pending.done()
            self._outputs.append(exchange.start_to_tokens(out))
        if plan.has_shared_heads:  # last: it computes while the last chunk's output travels
            assert self._query is not None, "query comes first"
            v, k = (pending.wait() for pending in self._arriving[-1])
            self._shared_output = self._kernel(self._query[:, :, plan.shared_heads], k, v, plan.key_mask)
            for pending in self._arriving[-1]:
                pending.done()

    def output(self) -> Tensor:
        """The attention of this member's tokens, all heads: [B, S_local, N, D]."""
        plan = self._plan
        if plan.num_parts == 1:
            return self._outputs[0].wait() if self._shared_output is None else self._shared_output
        assert self._query is not None, "query comes first"
        whole = self._query.new_empty(self._query.shape)
        for (heads, _), pending in zip(plan.chunks, self._outputs, strict=True):
            pending.wait_into(whole[:, :, heads])
        if self._shared_output is not None:
            whole[:, :, plan.shared_heads] = self._shared_output
        return whole

    def _send_early(self, x: Tensor) -> None:
        for part in range(self._plan.early_parts):
            self._send(x, part)
        self._late.append(x)

    def _send(self, x: Tensor, part: int) -> None:
        plan = self._plan
        if part < len(plan.chunks):
            heads, exchange = plan.chunks[part]
            pending = exchange.start_to_heads(x[:, :, heads])
        else:
            shared = x[:, :, plan.shared_heads]
            pending = start_gather_tokens(shared, plan.token_counts, plan.group, plan.member, buffers=plan.buffers)
        self._arriving[part].append(pending)
