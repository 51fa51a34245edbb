"""Attention over a sharded sequence. How q, k, v travel (strategy) and what computes them (kernel) are two choices."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from dit_group.call import AttentionCall, run_call
from dit_group.kernels import KERNELS, Kernel
from dit_group.ping_pong import CallInTurns, Keeper, Turns
from dit_group.ring import Ring
from dit_group.ulysses import Ulysses
from dit_group.usp import Usp
from dit_group.xfuser import Xfuser
from videopipe.arrangement import Arrangement, Balance, Guidance
from videopipe.exchange import Buffers
from videopipe.partition import JointSequence, Mesh

T = TypeVar("T")


class Strategy(Protocol):
    """Attention over one laid-out sequence: how q, k and v travel."""

    def begin(self, kernel: Kernel | None = None) -> AttentionCall:
        """The attention of one layer; `kernel` in place of the strategy's own, where layers differ."""


STRATEGIES: dict[str, Callable[..., Strategy]] = {"ulysses": Ulysses, "ring": Ring, "usp": Usp, "xfuser": Xfuser}
MERGING = ("ring", "usp")  # they merge partial results, so the kernel must have a log-sum-exp form


@dataclass(frozen=True)
class Branch:
    """Which of guidance's two branches this half of the DiT group evaluates; `pair` joins a member and its twin.

    The twin owns the same tokens in the other half.
    """

    index: int
    pair: dist.ProcessGroup


@dataclass(frozen=True)
class Layout:
    """How one sequence lies over the members of a group, and the attention over all of it.

    `group` joins the members, None for one; `member` is this rank's place among them, None for a helper. `branch` is
    there where the members are one half of the DiT group and evaluate one branch of guidance. `order` has the index in
    the sequence of each video token in the order of the members, None where each member owns a run of them. `in_turns`:
    two evaluations of such sequences take turns.
    """

    sequence: JointSequence
    attention: Strategy
    group: dist.ProcessGroup | None
    member: int | None
    branch: Branch | None = None
    order: Tensor | None = None
    in_turns: bool = False

    @property
    def own(self) -> slice | Tensor:
        """Where this member's video tokens are in the sequence: an index of one axis."""
        assert self.member is not None, "a helper owns no tokens"
        own = self.sequence.video_of(self.member)
        return own if self.order is None else self.order[own]

    def in_sequence(self, tokens: Tensor) -> Tensor:
        """All members' video tokens [B, S, C], one member after the other, in the order of the sequence."""
        return tokens if self.order is None else torch.empty_like(tokens).index_copy_(1, self.order, tokens)


class SequenceParallel:
    """One rank's place in the DiT group; hooks and attention processors hold it. `member` is None for a helper.

    `lay_out` prepares a sequence once (it may look at a mask's values), `use` makes it the current one at no cost: also
    one that another `SequenceParallel` of this rank has laid out over fewer members.
    `mesh` has the two axes that `usp` needs, `branch` says what a half of the DiT group evaluates, `ping_pong` whether
    a pair of evaluations takes turns where nothing else is arranged.
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
        mesh: Mesh | None = None,
        branch: Branch | None = None,
        ping_pong: bool = False,
    ) -> None:
        self._group = group
        self.members = members
        self._member = member
        self._rank = rank
        self._assist_groups = assist_groups or {}
        self.num_heads = num_heads
        self._strategy = STRATEGIES[strategy]
        self._kernel = KERNELS[kernel]
        self._given = Arrangement(heads_per_chunk=heads_per_chunk, balance=balance)
        self._ping_pong = ping_pong
        self._turns: Turns[Any] | None = None
        self._chosen: dict[tuple[int, Guidance], dict[tuple[int, ...], Arrangement]] = {}
        self._more: dict[str, Any] = {"mesh": mesh} if strategy == "usp" else {}
        self.branch = branch
        self._current: Layout | None = None
        self._buffers: weakref.ref[Buffers] | None = None  # lives as long as some layout does

    def arrange(self, num_video: int, arrangements: Iterable[Arrangement], guidance: Guidance = "none") -> None:
        """Lay out sequences of so many video tokens in these ways from now on, each for its set of helpers.

        All members and helpers are told the same at the same point of their commands.
        """
        self._chosen[num_video, guidance] = {arrangement.helpers: arrangement for arrangement in arrangements}

    def arrangement(self, num_video: int, helpers: tuple[int, ...] = (), guidance: Guidance = "none") -> Arrangement:
        """How a sequence of so many video tokens is laid out over the members and these helpers."""
        in_turns = self._ping_pong and guidance == "pair"
        given = msgspec.structs.replace(self._given, helpers=helpers, in_turns=in_turns)
        return self._chosen.get((num_video, guidance), {}).get(helpers, given)

    def lay_out(
        self,
        num_video: int,
        num_text: int,
        text_mask: Tensor | None = None,
        helpers: tuple[int, ...] = (),
        guidance: Guidance = "none",
    ) -> Layout:
        """Split a sequence of video and text tokens over the members, and its heads over members and helpers.

        Args:
            text_mask: bool [B, num_text], False for padded tokens; None where all are valid.
            helpers: VAE ranks that own no token and take their share of the heads; the key of one of `assist_groups`.
            guidance: how the evaluation that it is for goes together with that of the other branch.
        """
        return self.lay_out_as(self.arrangement(num_video, helpers, guidance), num_video, num_text, text_mask)

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
            group=self._assist_groups[helpers] if helpers else self._group,
            member=self._member if self._member is not None else self.members + helpers.index(self._rank),
            token_counts=(*sequence.counts, *(0 for _ in helpers)),
            num_heads=self.num_heads,
            kernel=self._kernel,
            key_mask=key_mask,
            heads_per_chunk=arrangement.heads_per_chunk,
            balance=arrangement.balance,
            head_counts=arrangement.head_counts,
            buffers=self._shared_buffers(),
            **self._more,
            **({"helpers_first": True} if arrangement.helpers_first else {}),
            **({"early_chunks": arrangement.early_chunks} if arrangement.early_chunks is not None else {}),
        )
        return Layout(sequence, attention, self._group, self._member, self.branch, in_turns=arrangement.in_turns)

    def _shared_buffers(self) -> Buffers:
        """Memory for the exchanges of all layouts, which take turns."""
        buffers = None if self._buffers is None else self._buffers()
        if buffers is None:
            buffers = Buffers()
            self._buffers = weakref.ref(buffers)
        return buffers

    def use(self, layout: Layout) -> None:
        """The model is about to be called with this sequence."""
        self._current = layout

    @property
    def layout(self) -> Layout:
        """The current sequence."""
        assert self._current is not None, "no layout in use"
        return self._current

    @property
    def sequence(self) -> JointSequence:
        """Who owns which video and text tokens of the current sequence."""
        return self.layout.sequence

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Joins the members of the current sequence; None for one member."""
        return self.layout.group

    @property
    def member(self) -> int:
        """This rank's place among the members of the current sequence."""
        assert self.layout.member is not None, "a helper owns no tokens"
        return self.layout.member

    def begin(self, kernel: Kernel | None = None) -> AttentionCall:
        """The attention of one layer, step by step, so that the caller computes while tensors travel.

        Args:
            kernel: computes this layer's attention in place of the configured kernel, where layers differ.
        """
        call = self.layout.attention.begin(kernel)
        return call if self._turns is None else CallInTurns(call, self._turns)

    def in_turns(
        self, evaluations: Sequence[Callable[[], T]], keepers: Sequence[Keeper], device: torch.device
    ) -> list[T]:
        """Two evaluations whose attention goes through here, each with a layout that it takes into use, in turns.

        Args:
            keepers: what else the model holds for the evaluation that runs.
        """
        first, second = evaluations
        self._turns = Turns((self, *keepers), device)
        try:
            return list(self._turns.run(first, second))
        finally:
            self._turns = None

    def leave(self) -> Any:
        """What is current, for an evaluation that pauses."""
        return self._current

    def resume(self, state: Any) -> None:
        """Make that current again."""
        self._current = state

    def attention(self, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel | None = None) -> Tensor:
        """Joint attention: this member's [video | text] tokens of all heads in and out, [B, S_local, N, D]."""
        return run_call(self.begin(kernel), q, k, v)
