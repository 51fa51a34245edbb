"""Skip-sparse attention over ranks that hold whole groups of tokens where they can.

What each rank holds, and what travels, is worked out in `pipelines.skip_sparse_layout`; here the model is made to
follow it from outside: processors for self-attention, hooks where tokens are taken, change hands and are gathered.

Source: Skiparse attention, Open-Sora Plan (arXiv 2412.00131); within a shared group DeepSpeed-Ulysses
(arXiv 2309.14509), and attention co-processing of PipeDiT (arXiv 2511.12056).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from dit_group.attention import Layout, SequenceParallel
from dit_group.call import AttentionCall, Work
from dit_group.kernels import Kernel
from dit_group.ulysses import Ulysses
from pipelines.models.open_sora_plan import PADDED, OpenSoraPlanTransformer3DModel, rotate, skip_sparse_attention
from pipelines.models.skip_sparse import DENSE, SkipSparse
from pipelines.skip_sparse_layout import Held, Move, head_counts, held_patterns, held_tokens, move_between
from videopipe.arrangement import Arrangement
from videopipe.exchange import exchange_tokens
from videopipe.partition import JointSequence


@dataclass(frozen=True, kw_only=True)
class LayerKernel:
    """The attention of one layer: within a group (`pattern`), of tokens that lie over the ranks by `held`.

    For a group of one sequence: `order` sorts its tokens where several ranks bring them, None where they come sorted,
    and it is filled up to `fill_to` keys with such that count for nothing, None where no group of the sequence needs
    it. Both as the model does it with whole sequences: the same arithmetic gives the same bits on any number of ranks.
    """

    pattern: SkipSparse
    held: SkipSparse
    fill_to: int | None = None
    order: Tensor | None = field(default=None, compare=False)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """All tokens of one group, some heads: [B, S_g, N, D]; a clip of few tokens may leave a group empty."""
        assert key_mask is None, "video tokens are never masked here"
        B, S, _, _ = q.shape
        if not q.numel():
            return q
        if self.order is not None:
            q, k, v = (x[:, self.order] for x in (q, k, v))
        bias = None
        if self.fill_to is not None:
            fill = self.fill_to - S
            bias = F.pad(q.new_zeros(B, S), (0, fill), value=PADDED)
            q, k, v = (F.pad(x, (0, 0, 0, 0, 0, fill)) for x in (q, k, v))
        out = skip_sparse_attention(q, k, v, sparse=DENSE, key_bias=bias)[:, :S]
        return out.contiguous() if self.order is None else torch.empty_like(out).index_copy_(1, self.order, out)

    def for_group(self, tokens: Tensor, num_tokens: int) -> "LayerKernel":
        """The same for a group whose `tokens` arrive in this order, in a sequence of `num_tokens`."""
        padded = self.pattern.padded(num_tokens)
        order = tokens.argsort()
        return replace(
            self,
            fill_to=None if padded == num_tokens else padded // self.pattern.groups,
            order=None if torch.equal(order, torch.arange(len(order), device=order.device)) else order,
        )


def layer_kernels(patterns: Sequence[SkipSparse]) -> tuple[LayerKernel, ...]:
    """One for each block, from the blocks' patterns."""
    held = held_patterns(patterns)
    return tuple(LayerKernel(pattern=p, held=h) for p, h in zip(patterns, held, strict=True))


class GroupsCall:
    """One layer's attention in groups that never meet, step by step; see `dit_group.call.AttentionCall`.

    `shares` are the rows of each group that this member holds, `alone` the groups that no other takes part in: those
    compute while the others' tensors travel.
    """

    def __init__(self, shares: Sequence[slice], calls: Sequence[AttentionCall], alone: Sequence[bool]) -> None:
        self._parts = list(zip(shares, calls, strict=True))
        order = sorted(range(len(calls)), key=lambda i: not alone[i])
        self._in_order = [calls[i] for i in order]

    def value(self, v: Tensor) -> None:
        """Send v [B, S_local, N, D] on its way."""
        for rows, call in self._parts:
            call.value(v[:, rows])

    def key(self, k: Tensor) -> None:
        """Send k on its way."""
        for rows, call in self._parts:
            call.key(k[:, rows])

    def query(self, q: Tensor) -> None:
        """Send q on its way."""
        for rows, call in self._parts:
            call.query(q[:, rows])

    def attend(self) -> None:
        """Compute group by group; the outputs begin to travel."""
        for call in self._in_order:
            call.attend()

    def output(self) -> Tensor:
        """The attention of this member's tokens, all heads: [B, S_local, N, D]."""
        return torch.cat([call.output() for _, call in self._parts], dim=1)


class GroupedAttention:
    """The attention of all layers over one laid-out sequence: a strategy, see `dit_group.attention.Strategy`.

    Args:
        plans: for each kind of layer and each group, the rows of this member and how its heads are exchanged; groups
            that this member has no part in are left out.
    """

    def __init__(self, plans: Mapping[LayerKernel, Sequence[tuple[slice, Ulysses]]]) -> None:
        self._plans = plans

    def begin(self, kernel: Kernel | None = None) -> AttentionCall:
        """The attention of a layer of this `LayerKernel`."""
        plans = self._plans_of(kernel)
        return self._call(plans, [ulysses.begin() for _, ulysses in plans])

    def own_work(self, kernel: Kernel | None) -> list[Work]:
        """The calls by which this member computes its share of a layer of this `LayerKernel`."""
        return [work for _, ulysses in self._plans_of(kernel) for work in ulysses.own_work(None)]

    def work_of(self, heads: int, kernel: Kernel | None) -> list[Work]:
        """Those by which one member would compute so many heads of all groups of the layer."""
        assert isinstance(kernel, LayerKernel), kernel
        plans = self._plans_of(kernel)
        return plans[0][1].work_of(heads, None) * kernel.pattern.groups if plans else []

    def transfers(self, kernel: Kernel | None) -> AttentionCall:
        """A layer of this `LayerKernel` in which everything travels and nothing is computed."""
        plans = self._plans_of(kernel)
        return self._call(plans, [ulysses.transfers(None) for _, ulysses in plans])

    def _plans_of(self, kernel: Kernel | None) -> Sequence[tuple[slice, Ulysses]]:
        assert isinstance(kernel, LayerKernel), kernel
        return self._plans[kernel]

    def _call(self, plans: Sequence[tuple[slice, Ulysses]], calls: Sequence[AttentionCall]) -> GroupsCall:
        return GroupsCall([rows for rows, _ in plans], calls, [ulysses.group is None for _, ulysses in plans])


@dataclass(frozen=True)
class GroupLayout(Layout):
    """How one sequence lies in its first block, and what changes in others.

    `by_pattern`: the layouts by the pattern that tokens lie by. `moves`: how this rank gets from where they lie by one
    pattern to where they lie by another; none for a helper.
    """

    by_pattern: Mapping[SkipSparse, Layout] = field(default_factory=dict)
    moves: Mapping[tuple[SkipSparse, SkipSparse], Move] = field(default_factory=dict)


class GroupParallel(SequenceParallel):
    """One rank's place in a DiT group whose sequences are laid out by groups of tokens.

    Args:
        kernels: the model's layers in order, from `layer_kernels`.
        device: of the activations.
        place: as for `SequenceParallel`.
    """

    def __init__(self, *, kernels: Sequence[LayerKernel], device: torch.device, **place: Any) -> None:
        super().__init__(**place)
        self.kernels = tuple(kernels)
        self.now = self.kernels[0].held  # by which pattern the tokens between blocks lie at the moment
        self._device = device

    def lay_out_as(
        self, arrangement: Arrangement, num_video: int, num_text: int, text_mask: Tensor | None = None
    ) -> Layout:
        """Deal tokens and heads of each group out to members and helpers; no text takes part in self-attention.

        The layout is that of the first block, in which an evaluation begins and ends.
        """
        assert num_text == 0, num_text
        assert arrangement.balance == "heads", "a sparse layer's kernel needs the rows of whole groups"
        lies = [kernel.held for kernel in self.kernels]
        held = {pattern: held_tokens(pattern, num_video, self.members) for pattern in dict.fromkeys(lies)}
        plans = {kernel: self._plans(kernel, held[kernel.held], arrangement) for kernel in dict.fromkeys(self.kernels)}
        moves = {}
        if self._member is not None:
            for before, after in dict.fromkeys([*pairwise(lies), (lies[-1], lies[0])]):
                moves[before, after] = move_between(held[before], held[after], self._member).to(self._device)
        attention = GroupedAttention(plans)

        def lying_by(pattern: SkipSparse, **more: Any) -> GroupLayout:
            return GroupLayout(
                sequence=JointSequence(held[pattern].totals, (0,) * self.members),
                attention=attention,
                group=self._group,
                member=self._member,
                branch=self.branch,
                order=torch.cat(held[pattern].tokens).to(self._device),
                in_turns=arrangement.in_turns,
                **more,
            )

        return lying_by(lies[0], by_pattern={pattern: lying_by(pattern) for pattern in held}, moves=moves)

    def use(self, layout: Layout) -> None:
        """The model is about to be called with this sequence."""
        super().use(layout)
        self.now = self.kernels[0].held

    def leave(self) -> Any:
        """What is current, for an evaluation that pauses."""
        return super().leave(), self.now

    def resume(self, state: Any) -> None:
        """Make that current again."""
        current, self.now = state
        super().resume(current)

    @property
    def layout(self) -> Layout:
        """The current sequence, as its tokens lie at the moment."""
        layout = self._whole
        return replace(layout.by_pattern[self.now], attention=layout.attention)

    @property
    def _whole(self) -> GroupLayout:
        layout = super().layout
        assert isinstance(layout, GroupLayout), layout
        return layout

    def move(self, x: Tensor, held: SkipSparse) -> Tensor:
        """The tokens [B, S_local, C] that this rank shall hold where they lie by `held`, from now on."""
        if held == self.now:
            return x
        move = self._whole.moves[self.now, held]
        self.now = held
        received = exchange_tokens(x[:, move.send_order], move.send_counts, move.receive_counts, self.group)
        return received[:, move.receive_order]

    def _plans(self, kernel: LayerKernel, held: Held, way: Arrangement) -> list[tuple[slice, Ulysses]]:
        helpers = way.helpers
        member = self._member if self._member is not None else self.members + helpers.index(self._rank)
        order = torch.cat(held.tokens)
        groups = kernel.pattern.group_of(order)
        tokens = (held.totals,) if kernel.pattern.kind == "dense" else held.counts
        heads = head_counts(kernel.pattern, self.num_heads, self.members, helper_shares(way, self.members))
        plans, start = [], 0
        for group, (token_counts, counts) in enumerate(zip(tokens, heads, strict=True)):
            token_counts = (*token_counts, *(0 for _ in helpers))
            rows = slice(start, start + token_counts[member])
            start = rows.stop
            computed = kernel.for_group(order[groups == group].to(self._device), len(order))
            # whoever has all tokens and all heads of a group needs nobody, nor does anybody need him
            everything = (sum(token_counts), self.num_heads)
            if everything == (token_counts[member], counts[member]):
                plans.append((rows, self._ulysses(way, computed, None, 0, token_counts[member : member + 1], None)))
            elif everything not in zip(token_counts, counts, strict=True):
                exchange = self._assist_groups[helpers] if helpers else self._group
                plans.append((rows, self._ulysses(way, computed, exchange, member, token_counts, counts)))
        return plans

    def _ulysses(
        self,
        way: Arrangement,
        kernel: Kernel,
        group: dist.ProcessGroup | None,
        member: int,
        token_counts: tuple[int, ...],
        heads: tuple[int, ...] | None,
    ) -> Ulysses:
        return Ulysses(
            group=group,
            member=member,
            token_counts=token_counts,
            num_heads=self.num_heads,
            kernel=kernel,
            key_mask=None,
            heads_per_chunk=way.heads_per_chunk,
            head_counts=heads,
            helpers_first=way.helpers_first,
            early_chunks=way.early_chunks,
            buffers=self._shared_buffers(),
        )


def helper_shares(way: Arrangement, members: int) -> tuple[Fraction, ...]:
    """The share of each helper in every group, where that of a DiT rank is 1."""
    if way.head_counts is None:
        return (Fraction(1),) * len(way.helpers)
    own = max(sum(way.head_counts[:members]), 1)
    return tuple(Fraction(count * members, own) for count in way.head_counts[members:])


class GroupedSelfAttention:
    """Self-attention of one block over the tokens of all ranks; takes the place of the model's own processor."""

    def __init__(self, parallel: GroupParallel, kernel: LayerKernel) -> None:
        self._parallel = parallel
        self.kernel = kernel

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """This rank's tokens [B, S_local, N*D] in and out; `image_rotary_emb` cos and sin [S_local, D] of them."""
        assert attention_mask is None and image_rotary_emb is not None
        call = self._parallel.begin(self.kernel)
        # v needs no RoPE, so it leaves first and travels under the projections of k and q
        call.value(attn.to_v(hidden_states).unflatten(2, (attn.heads, -1)))
        call.key(rotate(attn.to_k(hidden_states).unflatten(2, (attn.heads, -1)), *image_rotary_emb))
        call.query(rotate(attn.to_q(hidden_states).unflatten(2, (attn.heads, -1)), *image_rotary_emb))
        call.attend()
        return attn.to_out[1](attn.to_out[0](call.output().flatten(2)))


def parallelize(transformer: OpenSoraPlanTransformer3DModel, parallel: GroupParallel) -> None:
    """Shard the DiT over the members of `parallel`: after the patch embedding, until the end of the request.

    Each rank takes its tokens, and their angles, of what all of them compute; before a block whose tokens lie
    differently than those of the block before it they change hands, and at the end once more, as projected. A rank's
    prediction is whole in shape and right in the tokens that it took: guidance, the scheduler and the patch embedding
    of the next step act on each token alone. The text stays whole on every rank.
    """
    followers = _Followers(parallel)
    for block, kernel in zip(transformer.blocks(), parallel.kernels, strict=True):
        block.attn1.set_processor(GroupedSelfAttention(parallel, kernel))
        block.register_forward_pre_hook(followers.before(kernel.held))
    transformer.pos_embed.register_forward_hook(followers.take_tokens)
    transformer.rotary.register_forward_hook(followers.keep_angles)
    transformer.proj_out.register_forward_hook(followers.place)


class _Followers:
    """The hooks, and what they hand on to each other within one evaluation of the model.

    Two evaluations that take turns are of the same clip, so its angles are those of both.
    """

    def __init__(self, parallel: GroupParallel) -> None:
        self._parallel = parallel
        self._angles: tuple[Tensor, ...] = ()  # of all tokens
        self._own_angles: dict[SkipSparse, tuple[Tensor, ...]] = {}

    def take_tokens(self, module: nn.Module, args: Any, tokens: Tensor) -> Tensor:
        return tokens[:, self._parallel.layout.own]

    def keep_angles(self, module: nn.Module, args: Any, angles: tuple[Tensor, ...]) -> None:
        self._angles = angles
        self._own_angles = {}

    def before(self, held: SkipSparse) -> Any:
        def follow(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, modulation, _, *more = args
            x = self._parallel.move(x, held)
            if held not in self._own_angles:
                self._own_angles[held] = tuple(table[self._parallel.layout.own] for table in self._angles)
            return (x, modulation, self._own_angles[held], *more)

        return follow

    def place(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = self._parallel.move(output, self._parallel.kernels[0].held)
        layout = self._parallel.layout
        whole = output.new_zeros(output.shape[0], sum(layout.sequence.video_counts), output.shape[2])
        whole[:, layout.own] = output
        return whole
