"""Ring attention: queries stay, blocks of keys and values travel from neighbour to neighbour, partial results merge.

Every member keeps its own query rows and all heads, so heads need not divide by anything and there may be more members
than heads. A member sends each block on before it computes with it: the next one travels meanwhile. Partial results
over different keys merge exactly by their log-sum-exp.

Bytes that a member sends in one layer: those of k and v of all tokens but the ones that its next neighbour brings,
2 * B * (S - S_next) * N * D * itemsize, whatever the number of members; Ulysses sends about 4 / n of B * S * N * D.

Source: Ring Attention with Blockwise Transformers (arXiv 2310.01889), without a causal mask.
"""

import torch
from torch import Tensor

from dit_group.call import run_call
from dit_group.kernels import Kernel, KernelWithLse, kernel_with_lse, merge_partial
from dit_group.ulysses import refuse_divided_heads
from videopipe.arrangement import Balance
from videopipe.exchange import Buffers, Group, PendingExchange, start_take_from_previous
from videopipe.partition import offsets


class Ring:
    """Attention over one laid-out sequence.

    Args:
        token_counts: tokens of each member; may differ, may be zero.
        num_heads: heads of the layer (N); every member computes all of them.
        kernel: one with a log-sum-exp form (`kernels.WITH_LSE`).
        key_mask: bool [B, S] in the joint order, or None. It is known everywhere and does not travel.
        heads_per_chunk, balance, head_counts: as for `Ulysses`; here heads are not divided, so only the defaults.
        buffers: memory for what travels, shared with other layouts; None for memory of its own.
    Raises:
        ValueError: a kernel without log-sum-exp, or a division of heads.
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
        buffers: Buffers | None = None,
    ) -> None:
        refuse_divided_heads("a ring", heads_per_chunk, balance, head_counts)
        if group is None and len(token_counts) != 1:
            raise ValueError(f"group=None needs token_counts of one member, not {len(token_counts)}")
        self.group = group
        self.member = member
        self.token_counts = token_counts
        self.num_heads = num_heads
        self.kernel = kernel_with_lse(kernel)
        self.buffers = Buffers() if buffers is None else buffers
        start = offsets(token_counts)
        self.blocks = [_Block(key_mask, slice(start[i], start[i + 1])) for i in range(len(token_counts))]

    def begin(self, kernel: Kernel | None = None) -> "RingCall":
        """The attention of one layer; every layer has the kernel of the plan, whose log-sum-exp form it needs."""
        assert kernel is None, "a ring merges partial results: a layer cannot bring a kernel of its own"
        return RingCall(self)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Local tokens of all heads in, the same out: [B, S_local, N, D].

        Where heads are divided by somebody else, N may be any number, and q may have any rows, none included.
        """
        return run_call(self.begin(), q, k, v)


class _Block:
    """The keys of one member: how many, and which may be seen. Looks at the mask once, outside of the steps.

    Where all samples see the same keys, those are picked and no mask is left, so that kernels without masks run, and
    nothing waits for the device inside a layer.
    """

    def __init__(self, key_mask: Tensor | None, tokens: slice) -> None:
        self.num_tokens = tokens.stop - tokens.start
        self.is_visible = self.num_tokens > 0
        self.mask: Tensor | None = None
        self.picked: Tensor | None = None
        if key_mask is None or self.num_tokens == 0 or bool(key_mask[:, tokens].all()):
            return
        mask = key_mask[:, tokens]
        self.is_visible = bool(mask.any())
        if bool((mask == mask[:1]).all()):
            self.picked = mask[0].nonzero().squeeze(1)
        else:
            self.mask = mask

    def attend(self, kernel: KernelWithLse, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The attention of q over the visible keys of this block, and its log-sum-exp."""
        if self.picked is not None:
            k, v = k.index_select(1, self.picked), v.index_select(1, self.picked)
        return kernel(q, k, v, self.mask)


class RingCall:
    """One layer's attention, step by step; `value` and `key` set the first turn of the ring going."""

    def __init__(self, plan: Ring) -> None:
        self._plan = plan
        self._value: Tensor | None = None
        self._key: Tensor | None = None
        self._query: Tensor | None = None
        self._output: Tensor | None = None
        self._arriving: list[PendingExchange] = []  # the next values, the next keys

    def value(self, v: Tensor) -> None:
        """Send v [B, S_local, N, D] to the next member."""
        assert v.shape[1] == self._plan.token_counts[self._plan.member], (v.shape, self._plan.token_counts)
        self._value = v
        self._hand_on(v, 0)

    def key(self, k: Tensor) -> None:
        """Send k to the next member."""
        self._key = k
        self._hand_on(k, 0)

    def query(self, q: Tensor) -> None:
        """Queries stay here."""
        self._query = q

    def attend(self) -> None:
        """Compute with each block as it comes round."""
        plan, q, k, v = self._plan, self._query, self._key, self._value
        assert q is not None and k is not None and v is not None, "value, key and query come first"
        members = len(plan.token_counts)
        out = lse = None
        in_hand: list[PendingExchange] = []
        for turn in range(members):
            if turn:
                v, k = (pending.wait() for pending in self._arriving)
                for pending in in_hand:  # computed with in the last turn, and by now handed on
                    pending.done()
                in_hand, self._arriving = self._arriving, []
                self._hand_on(v, turn)
                self._hand_on(k, turn)
            block = plan.blocks[(plan.member - turn) % members]
            if not block.is_visible or not q.numel():
                continue
            part, part_lse = block.attend(plan.kernel, q, k, v)
            if out is None or lse is None:
                out, lse = part.to(part_lse.dtype), part_lse
            else:
                out, lse = merge_partial(out, lse, part, part_lse)
        for pending in in_hand:
            pending.done()
        self._output = torch.zeros_like(q) if out is None else out.to(q.dtype)

    def output(self) -> Tensor:
        """The attention of this member's tokens, all heads: [B, S_local, N, D]."""
        assert self._output is not None, "attend comes first"
        return self._output

    def _hand_on(self, x: Tensor, turn: int) -> None:
        """Start turn + 1, unless the block in hand has been everywhere."""
        plan = self._plan
        members = len(plan.token_counts)
        if turn + 1 < members:
            assert plan.group is not None
            arriving = plan.token_counts[(plan.member - turn - 1) % members]
            self._arriving.append(start_take_from_previous(x, arriving, plan.group, plan.member, members, plan.buffers))
