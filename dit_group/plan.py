"""Sequence parallelism as data: where tokens are sharded and made whole, applied to an innocent model by hooks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dit_group.factorised import FrameParallel
from videopipe.partition import JointSequence

Stream = Literal["video", "text"]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Keep only this member's tokens of the output of `module` along `dim` (each tensor, if it is a tuple)."""

    module: str
    dim: int
    stream: Stream


@dataclass(frozen=True, kw_only=True)
class Place:
    """Put this member's tokens, the output of `module`, where they belong in a whole tensor of zeros along `dim`.

    Nothing travels. What follows must act on each token alone and look at this member's tokens only, as guidance and
    a scheduler's update do, until `dit_group.shards.gather_latents` makes the result whole.
    """

    module: str
    dim: int
    stream: Stream


@dataclass(frozen=True, kw_only=True)
class Reshard:
    """Give `module` its first argument [B, T, S, C] sharded by space; its output is sharded by frames again."""

    module: str


Plan = Sequence[Shard | Reshard | Place]


class Parallel(Protocol):
    """Who owns what of the current sequence: `SequenceParallel` or `FrameParallel`."""

    @property
    def member(self) -> int:
        """This member's place among them."""

    @property
    def sequence(self) -> JointSequence:
        """Who owns which tokens (or frames)."""


def apply_plan(model: nn.Module, plan: Plan, parallel: Parallel) -> list[RemovableHandle]:
    """Hook the named submodules of `model`; removing the handles gives back the plain model.

    Raises:
        AttributeError: the model has no submodule of that name.
        TypeError: `Reshard` with something else than `FrameParallel`.
    """
    handles: list[RemovableHandle] = []
    for entry in plan:
        module = model.get_submodule(entry.module)
        if isinstance(entry, Reshard):
            if not isinstance(parallel, FrameParallel):
                raise TypeError(f"{entry} needs a FrameParallel, not {type(parallel).__name__}")
            handles.append(module.register_forward_pre_hook(_to_space_hook(parallel)))
            handles.append(module.register_forward_hook(_to_frames_hook(parallel)))
        elif isinstance(entry, Shard):
            handles.append(module.register_forward_hook(_shard_hook(entry, parallel)))
        else:
            handles.append(module.register_forward_hook(_place_hook(entry, parallel)))
    return handles


def _to_space_hook(parallel: FrameParallel) -> Any:
    def to_space(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (parallel.resharding.to_space(args[0]), *args[1:])

    return to_space


def _to_frames_hook(parallel: FrameParallel) -> Any:
    def to_frames(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return parallel.resharding.to_frames(output)

    return to_frames


def _shard_hook(entry: Shard, parallel: Parallel) -> Any:
    def shard(
        module: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]
    ) -> Tensor | tuple[Tensor, ...]:
        own = _own(entry, parallel)
        if isinstance(output, tuple):
            return tuple(x.narrow(entry.dim, own.start, own.stop - own.start) for x in output)
        return output.narrow(entry.dim, own.start, own.stop - own.start)

    return shard


def _place_hook(entry: Place, parallel: Parallel) -> Any:
    def place(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        own, shape = _own(entry, parallel), list(output.shape)
        sequence = parallel.sequence
        shape[entry.dim] = sum(sequence.video_counts if entry.stream == "video" else sequence.text_counts)
        whole = output.new_zeros(shape)
        whole.narrow(entry.dim, own.start, own.stop - own.start).copy_(output)
        return whole

    return place


def _own(entry: Shard | Place, parallel: Parallel) -> slice:
    sequence = parallel.sequence
    return (sequence.video_of if entry.stream == "video" else sequence.text_of)(parallel.member)
