"""Attention over a sharded sequence. How q, k, v travel (strategy) and what computes them (kernel) are two choices."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dit_group.kernels import KERNELS
from dit_group.ulysses import Balance, Ulysses
from videopipe.partition import JointSequence


class AttentionCall(Protocol):
    """One layer's attention, step by step, so that the caller computes while tensors travel."""

    def value(self, v: Tensor) -> None:
        """Send v [B, S_local, N, D] on its way, as soon as it is projected."""

    def key(self, k: Tensor) -> None:
        """Send k [B, S_local, N, D] on its way."""

    def query(self, q: Tensor) -> None:
        """Send q [B, S_local, N, D] on its way."""

    def attend(self) -> None:
        """Compute; the output begins to travel."""

    def output(self) -> Tensor:
        """The attention of this member's tokens, all heads: [B, S_local, N, D]."""


class Strategy(Protocol):
    """Attention over one laid-out sequence: how q, k and v travel."""

    def begin(self) -> AttentionCall:
        """The attention of one layer."""


STRATEGIES = {"ulysses": Ulysses}


@dataclass(frozen=True)
class Layout:
    """How one sequence lies over the members, and the attention over all of it."""

    sequence: JointSequence
    attention: Strategy


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
        heads_per_chunk: int | None = None,
        balance: Balance = "heads",
    ) -> None:
        self.group = group
        self.member = member
        self.members = members
        self.num_heads = num_heads
        self._strategy = STRATEGIES[strategy]
        self._kernel = KERNELS[kernel]
        self._heads_per_chunk = heads_per_chunk
        self._balance: Balance = balance
        self._current: Layout | None = None

    def lay_out(self, num_video: int, num_text: int, text_mask: Tensor | None = None) -> Layout:
        """Split a sequence of video and text tokens over the members.

        Args:
            text_mask: bool [B, num_text], False for padded tokens; None where all are valid.
        """
        sequence = JointSequence.even(num_video, num_text, self.members)
        key_mask = None
        if text_mask is not None and not bool(text_mask.all()):
            visible = text_mask.new_ones((text_mask.shape[0], num_video))
            key_mask = torch.cat([visible, text_mask], dim=1)[:, sequence.order()]
        attention = self._strategy(
            group=self.group,
            member=self.member,
            token_counts=sequence.counts,
            num_heads=self.num_heads,
            kernel=self._kernel,
            key_mask=key_mask,
            heads_per_chunk=self._heads_per_chunk,
            balance=self._balance,
        )
        return Layout(sequence, attention)

    def use(self, layout: Layout) -> None:
        """The model is about to be called with this sequence."""
        self._current = layout

    @property
    def sequence(self) -> JointSequence:
        """Who owns which video and text tokens of the current sequence."""
        assert self._current is not None, "no layout in use"
        return self._current.sequence

    def begin(self) -> AttentionCall:
        """The attention of one layer, step by step, so that the caller computes while tensors travel."""
        assert self._current is not None, "no layout in use"
        return self._current.attention.begin()

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Joint attention: this member's [video | text] tokens of all heads in and out, [B, S_local, N, D]."""
        call = self.begin()
        call.value(v)
        call.key(k)
        call.query(q)
        call.attend()
        return call.output()
