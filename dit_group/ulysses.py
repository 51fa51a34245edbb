"""Ulysses and PipeSP: each member attends for its own heads over all tokens, chunk of heads by chunk of heads.

Source: DeepSpeed-Ulysses (arXiv 2309.14509) with any token and head counts; PipeSP from PipeDiT (arXiv 2511.12056),
generalised from one head to chunks of heads. The paper repairs the order of heads after its exchanges; here heads are
cut into chunks in global order before the exchange, so the results concatenate in the right order by themselves.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from dit_group.call import run_call
from dit_group.kernels import Kernel
from videopipe.arrangement import Balance
from videopipe.exchange import Exchange, PendingExchange, start_gather_tokens
from videopipe.partition import Partition, split_evenly


class Ulysses:
    """Attention over one laid-out sequence.

    Args:
        token_counts: tokens of each member; zero for a member that only helps.
        num_heads: heads of the layer (N).
        kernel: computes the attention of some heads over all tokens.
        key_mask: bool [B, S] in the joint order, or None.
        heads_per_chunk: heads of each member that travel and compute together; None for all at once (the plain path).
        balance: `heads` splits whole heads, 24 on 7 as 4, 4, 4, 3, 3, 3, 3. `rows` gives each member N // n whole
            heads, and of the N % n heads left over each member computes its own query rows: their keys and values are
            gathered, their queries and outputs do not travel, and all members do the same amount of work.
        head_counts: whole heads of each member, where they shall not be equal; zero for members that only bring tokens.
            With `rows` they may leave heads over, which are divided by query rows.
        helpers_first: the heads of members without tokens travel and compute as the first chunk, so that those members
            begin while the others still exchange among themselves.
    """

    def __init__(
        self,
        *,
        group: dist.ProcessGroup | None,
        member: int,
        token_counts: tuple[int, ...],
        num_heads: int,
        kernel: Kernel,
        key_mask: Tensor | None,
        heads_per_chunk: int | None = None,
        balance: Balance = "heads",
        head_counts: tuple[int, ...] | None = None,
        helpers_first: bool = False,
    ) -> None:
        members = len(token_counts)
        self.group = group
        self.member = member
        self.token_counts = token_counts
        self.kernel = kernel
        self.key_mask = key_mask
        whole = num_heads if balance == "heads" else num_heads // members * members
        left = split_evenly(whole, members) if head_counts is None else head_counts
        whole = sum(left)
        assert whole <= num_heads if balance == "rows" else whole == num_heads, (left, num_heads, balance)
        self.shared_heads = slice(whole, num_heads)
        self.chunks: list[tuple[slice, Exchange]] = []
        start = 0
        while start < whole:
            counts = left if heads_per_chunk is None else tuple(min(heads_per_chunk, n) for n in left)
            if helpers_first and not start:
                first = tuple(n if tokens == 0 else 0 for n, tokens in zip(left, token_counts, strict=True))
                counts = first if any(first) else counts
            left = tuple(n - taken for n, taken in zip(left, counts, strict=True))
            heads = slice(start, start + sum(counts))
            self.chunks.append((heads, Exchange(group, Partition(token_counts, counts), member)))
            start = heads.stop

    @property
    def has_shared_heads(self) -> bool:
        """Whether some heads are computed by query rows."""
        return self.shared_heads.stop > self.shared_heads.start

    def begin(self, kernel: Kernel | None = None) -> "UlyssesCall":
        """The attention of one layer, computed by `kernel` in place of the plan's own if given.

        A kernel that needs the rows of all queries, as sparse ones do, cannot go with `balance="rows"`.
        """
        return UlyssesCall(self, self.kernel if kernel is None else kernel)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Local tokens of all heads in, the same out: [B, S_local, N, D]."""
        return run_call(self.begin(), q, k, v)


class UlyssesCall:
    """One layer's attention, step by step, so that the caller computes while tensors travel.

    `value` may be called as soon as v is projected, then `key` and `query`; `attend` computes, and each chunk's output
    leaves as soon as it is ready; `output` waits for what has not arrived.
    """

    def __init__(self, plan: Ulysses, kernel: Kernel) -> None:
        self._plan = plan
        self._kernel = kernel
        self._values: list[PendingExchange] = []
        self._keys: list[PendingExchange] = []
        self._queries: list[PendingExchange] = []
        self._outputs: list[PendingExchange] = []
        self._shared: list[PendingExchange] = []  # values, keys
        self._shared_query: Tensor | None = None
        self._shared_output: Tensor | None = None

    def value(self, v: Tensor) -> None:
        """Send v [B, S_local, N, D] on its way."""
        self._values = self._send(v)
        self._gather_shared(v)

    def key(self, k: Tensor) -> None:
        """Send k on its way."""
        self._keys = self._send(k)
        self._gather_shared(k)

    def query(self, q: Tensor) -> None:
        """Send q on its way."""
        self._queries = self._send(q)
        if self._plan.has_shared_heads:
            self._shared_query = q[:, :, self._plan.shared_heads]

    def attend(self) -> None:
        """Compute the attention of this member's heads, chunk by chunk; the outputs begin to travel."""
        plan = self._plan
        for (_, exchange), v, k, q in zip(plan.chunks, self._values, self._keys, self._queries, strict=True):
            values, keys, queries = v.wait(), k.wait(), q.wait()  # [B, S, N_local, D]
            out = self._kernel(queries, keys, values, plan.key_mask) if queries.shape[2] else queries
            self._outputs.append(exchange.start_to_tokens(out))
        if self._shared_query is not None:  # last: it computes while the last chunk's output travels
            values, keys = (pending.wait() for pending in self._shared)
            # called with no rows as well: a kernel may itself be shared with other members (usp)
            self._shared_output = self._kernel(self._shared_query, keys, values, plan.key_mask)

    def output(self) -> Tensor:
        """The attention of this member's tokens, all heads: [B, S_local, N, D]."""
        parts = [pending.wait() for pending in self._outputs]
        if self._shared_output is not None:
            parts.append(self._shared_output)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _send(self, x: Tensor) -> list[PendingExchange]:
        return [exchange.start_to_heads(x[:, :, heads]) for heads, exchange in self._plan.chunks]

    def _gather_shared(self, x: Tensor) -> None:
        plan = self._plan
        if plan.has_shared_heads:
            part = x[:, :, plan.shared_heads]
            self._shared.append(start_gather_tokens(part, plan.token_counts, plan.group, plan.member))
