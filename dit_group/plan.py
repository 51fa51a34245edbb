"""Sequence parallelism as data: where tokens are sharded and gathered, applied to an innocent model through hooks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dit_group.attention import SequenceParallel
from videopipe.exchange import gather_tokens

Stream = Literal["video", "text"]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Keep only this member's tokens of the output of `module` along `dim` (each tensor, if it is a tuple)."""

    module: str
    dim: int
    stream: Stream


@dataclass(frozen=True, kw_only=True)
class Gather:
    """Make the output of `module` whole again along `dim`, on every member."""

    module: str
    dim: int
    stream: Stream


Plan = Sequence[Shard | Gather]


def apply_plan(model: nn.Module, plan: Plan, parallel: SequenceParallel) -> list[RemovableHandle]:
    """Hook the named submodules of `model`; removing the handles gives back the plain model.

    Raises:
        AttributeError: the model has no submodule of that name.
    """
    handles = []
    for entry in plan:
        hook = _shard_hook(entry, parallel) if isinstance(entry, Shard) else _gather_hook(entry, parallel)
        handles.append(model.get_submodule(entry.module).register_forward_hook(hook))
    return handles


def _shard_hook(entry: Shard, parallel: SequenceParallel) -> Any:
    def shard(
        module: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]
    ) -> Tensor | tuple[Tensor, ...]:
        sequence = parallel.sequence
        own = (sequence.video_of if entry.stream == "video" else sequence.text_of)(parallel.member)
        if isinstance(output, tuple):
            return tuple(x.narrow(entry.dim, own.start, own.stop - own.start) for x in output)
        return output.narrow(entry.dim, own.start, own.stop - own.start)

    return shard


def _gather_hook(entry: Gather, parallel: SequenceParallel) -> Any:
    def gather(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        sequence = parallel.sequence
        counts = sequence.video_counts if entry.stream == "video" else sequence.text_counts
        return gather_tokens(output, counts, parallel.group, parallel.member, dim=entry.dim)

    return gather
