"""Attention over a sharded sequence. How q, k, v travel (strategy) and what computes them (kernel) are two choices."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from dit_group.call import AttentionCall, run_call
from dit_group.kernels import KERNELS, Kernel
from dit_group.ring import Ring
from dit_group.ulysses import Ulysses
from dit_group.usp import Usp
from videopipe.arrangement import Arrangement, Balance
from videopipe.partition import JointSequence
from videopipe.runtime import MeshGroups


class Strategy(Protocol):
    """Attention over one laid-out sequence: how q, k and v travel."""

    def begin(self, kernel: Kernel | None = None) -> AttentionCall:
        """The attention of one layer; `kernel` in place of the strategy's own, where layers differ."""


STRATEGIES: dict[str, Callable[..., Strategy]] = {"ulysses": Ulysses, "ring": Ring, "usp": Usp}
MERGING = ("ring", "usp")  # they merge partial results, so the kernel must have a log-sum-exp form


@dataclass(frozen=True)
class Layout:
    """How one sequence lies over the members, and the attention over all of it."""

    sequence: JointSequence
    attention: Strategy


class SequenceParallel:
    """One rank's place in the DiT group; hooks and attention processors hold it. `member` is None for a helper.

    `lay_out` prepares a sequence once (it may look at a mask's values), `use` makes it the current one at no cost.
    `mesh` has the subgroups that `usp` needs.
    """

    def __init__(
        self,
        *,
        group: dist.ProcessGroup | None,
        member: int | None,
        members: int,
        num_heads: int,
        strategy: str = "ulysses",
        kernel: str = "sdpa",
        heads_per_chunk: int | None = None,
        balance: Balance = "heads",
        rank: int = 0,
        assist_groups: Mapping[tuple[int, ...], dist.ProcessGroup] | None = None,
        mesh: MeshGroups | None = None,
    ) -> None:
        self.group = group
        self.members = members
        self._member = member
        self._rank = rank
        self._assist_groups = assist_groups or {}
        self.num_heads = num_heads
        self._strategy = STRATEGIES[strategy]
        self._kernel = KERNELS[kernel]
        self._given = Arrangement(heads_per_chunk=heads_per_chunk, balance=balance)
        self._chosen: dict[int, dict[tuple[int, ...], Arrangement]] = {}
        self._more: dict[str, Any] = {"mesh": mesh} if strategy == "usp" else {}
        self._current: Layout | None = None

    @property
    def member(self) -> int:
        """This member's place among the DiT ranks."""
        assert self._member is not None, "a helper owns no tokens"
        return self._member

    def arrange(self, num_video: int, arrangements: Iterable[Arrangement]) -> None:
        """Lay out sequences of so many video tokens in these ways from now on, each for its set of helpers.

        All members and helpers are told the same at the same point of their commands.
        """
        self._chosen[num_video] = {arrangement.helpers: arrangement for arrangement in arrangements}

    def arrangement(self, num_video: int, helpers: tuple[int, ...] = ()) -> Arrangement:
        """How a sequence of so many video tokens is laid out over the members and these helpers."""
        given = msgspec.structs.replace(self._given, helpers=helpers)
        return self._chosen.get(num_video, {}).get(helpers, given)

    def lay_out(
        self, num_video: int, num_text: int, text_mask: Tensor | None = None, helpers: tuple[int, ...] = ()
    ) -> Layout:
        """Split a sequence of video and text tokens over the members, and its heads over members and helpers.

        Args:
            text_mask: bool [B, num_text], False for padded tokens; None where all are valid.
            helpers: VAE ranks that own no token and take their share of the heads; the key of one of `assist_groups`.
        """
        return self.lay_out_as(self.arrangement(num_video, helpers), num_video, num_text, text_mask)

    def lay_out_as(
        self, arrangement: Arrangement, num_video: int, num_text: int, text_mask: Tensor | None = None
    ) -> Layout:
        """As `lay_out`, in a given way."""
        helpers = arrangement.helpers
        sequence = JointSequence.even(num_video, num_text, self.members)
        key_mask = None
        if text_mask is not None and not bool(text_mask.all()):
            visible = text_mask.new_ones((text_mask.shape[0], num_video))
            key_mask = torch.cat([visible, text_mask], dim=1)[:, sequence.order()]
        attention = self._strategy(
            group=self._assist_groups[helpers] if helpers else self.group,
            member=self._member if self._member is not None else self.members + helpers.index(self._rank),
            token_counts=(*sequence.counts, *(0 for _ in helpers)),
            num_heads=self.num_heads,
            kernel=self._kernel,
            key_mask=key_mask,
            heads_per_chunk=arrangement.heads_per_chunk,
            balance=arrangement.balance,
            head_counts=arrangement.head_counts,
            **self._more,
            **({"helpers_first": True} if arrangement.helpers_first else {}),
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

    def begin(self, kernel: Kernel | None = None) -> AttentionCall:
        """The attention of one layer, step by step, so that the caller computes while tensors travel.

        Args:
            kernel: computes this layer's attention in place of the configured kernel, where layers differ.
        """
        assert self._current is not None, "no layout in use"
        return self._current.attention.begin(kernel)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel | None = None) -> Tensor:
        """Joint attention: this member's [video | text] tokens of all heads in and out, [B, S_local, N, D]."""
        return run_call(self.begin(kernel), q, k, v)
