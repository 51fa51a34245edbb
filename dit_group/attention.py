"""Attention over a sharded sequence. How q, k, v travel (strategy) and what computes them (kernel) are two choices."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from videopipe.exchange import Exchange
from videopipe.partition import JointSequence, Partition, split_evenly

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """torch's scaled dot product attention, whichever backend it picks.

    Args:
        q, k, v: [B, S, N, D].
        key_mask: bool [B, S], False for keys that nobody may see; None where all are visible.
    Returns:
        [B, S, N, D], contiguous.
    """
    mask = None if key_mask is None else key_mask[:, None, None, :]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2).contiguous()


def math(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """The textbook formula in float64, for reference: slow, and quadratic in memory. Shapes as `sdpa`."""
    q64, k64, v64 = (x.to(torch.float64).transpose(1, 2) for x in (q, k, v))  # [B, N, S, D]
    scores = q64 @ k64.transpose(-1, -2) / q.shape[-1] ** 0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    return (scores.softmax(dim=-1) @ v64).transpose(1, 2).to(q.dtype).contiguous()


KERNELS: dict[str, Kernel] = {"sdpa": sdpa, "math": math}


class Ulysses:
    """Each member attends for its own heads over all tokens; one exchange before, one after.

    Source: DeepSpeed-Ulysses (arXiv 2309.14509). Uneven token and head counts need no padding.
    """

    def __init__(self, exchange: Exchange, kernel: Kernel, key_mask: Tensor | None) -> None:
        self._exchange = exchange
        self._kernel = kernel
        self._key_mask = key_mask

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Local tokens of all heads in, the same out: [B, S_local, N, D]."""
        moving = [self._exchange.start_to_heads(x) for x in (v, k, q)]
        v_all, k_all, q_all = (x.wait() for x in moving)  # [B, S, N_local, D]
        out = self._kernel(q_all, k_all, v_all, self._key_mask) if q_all.shape[2] else q_all
        return self._exchange.to_tokens(out)


STRATEGIES = {"ulysses": Ulysses}


@dataclass(frozen=True)
class Layout:
    """How one sequence lies over the members, and the attention over all of it."""

    sequence: JointSequence
    attention: Ulysses


class SequenceParallel:
    """One DiT member's place in the group; hooks and attention processors hold it.

    `lay_out` prepares a sequence once (it may look at a mask's values), `use` makes it the current one at no cost.
    """

    def __init__(
        self,
        *,
        group: dist.ProcessGroup | None,
        member: int,
        members: int,
        num_heads: int,
        strategy: str = "ulysses",
        kernel: str = "sdpa",
    ) -> None:
        self.group = group
        self.member = member
        self.members = members
        self.num_heads = num_heads
        self._strategy = STRATEGIES[strategy]
        self._kernel = KERNELS[kernel]
        self._current: Layout | None = None

    def lay_out(self, num_video: int, num_text: int, text_mask: Tensor | None = None) -> Layout:
        """Split a sequence of video and text tokens over the members.

        Args:
            text_mask: bool [B, num_text], False for padded tokens; None where all are valid.
        """
        sequence = JointSequence.even(num_video, num_text, self.members)
        partition = Partition(sequence.counts, split_evenly(self.num_heads, self.members))
        key_mask = None
        if text_mask is not None and not bool(text_mask.all()):
            visible = text_mask.new_ones((text_mask.shape[0], num_video))
            key_mask = torch.cat([visible, text_mask], dim=1)[:, sequence.order()]
        return Layout(sequence, self._strategy(Exchange(self.group, partition, self.member), self._kernel, key_mask))

    def use(self, layout: Layout) -> None:
        """The model is about to be called with this sequence."""
        self._current = layout

    @property
    def sequence(self) -> JointSequence:
        """Who owns which video and text tokens of the current sequence."""
        assert self._current is not None, "no layout in use"
        return self._current.sequence

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Joint attention: this member's [video | text] tokens of all heads in and out, [B, S_local, N, D]."""
        assert self._current is not None, "no layout in use"
        return self._current.attention(q, k, v)
