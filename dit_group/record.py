"""Recording what the DiT group computes, step by step, as whole tensors, whatever the number of ranks."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dit_group.attention import Layout, SequenceParallel
from dit_group.denoise import Denoising
from dit_group.shards import gather_latents
from videopipe.exchange import gather_tokens
from videopipe.geometry import LatentGeometry
from videopipe.quality.recorder import block_modules
from videopipe.quality.trace import recorded_steps, write_step

Keep = Callable[[str, Tensor], None]
"""Takes the name and the value of a whole tensor."""


class Observable(Protocol):
    """A denoiser whose evaluations can be looked at."""

    def observe(self, keep: Keep, num_blocks: int) -> AbstractContextManager[None]:
        """Within the block every evaluation hands its tensors to `keep`; every DiT rank takes part."""


def evenly_chosen(names: Sequence[str], count: int) -> list[str]:
    """At most `count` of `names`, the first among them: every index that ceil(len(names) / count) divides.

    Raises:
        ValueError: `count` is negative.
    """
    if count < 0:
        raise ValueError(f"record_blocks={count} must be at least 0, nearest is 0")
    return list(names[:: math.ceil(len(names) / count)]) if count and names else []


@contextmanager
def observing(
    model: nn.Module,
    parallel: SequenceParallel | None,
    geometry: LatentGeometry,
    keep: Keep,
    num_blocks: int,
    *,
    branches_as_rows: bool = False,
) -> Iterator[None]:
    """Within the block, hand whole tensors of every evaluation of `model` to `keep`, in the order they come to be.

    Names are those of `videopipe.quality.trace`. Blocks are the members of the model's own module lists named
    `...blocks`, in order; those chosen by `evenly_chosen` give their outputs, [B, S, C] video tokens and [B, L, C] text
    tokens, gathered over the DiT group. Hooks observe and change nothing. Every DiT rank enters with the same
    `num_blocks`: the gathers are collective.

    Args:
        parallel: how the tokens are sharded; None where they are whole.
        geometry: how tokens lie in a prediction.
        num_blocks: blocks to record, 0 for predictions alone.
        branches_as_rows: the model evaluates both branches of guidance as rows of one batch, so two halves of the DiT
            group that evaluate one each are recorded as such; else as two passes.
    """
    passes = 0

    def keep_all(name: str, tensors: Sequence[Tensor]) -> None:
        for index, tensor in enumerate([torch.cat(list(tensors))] if branches_as_rows else tensors):
            keep(f"pass.{passes + index}/{name}", tensor)

    def after_model(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal passes
        prediction = output[0] if isinstance(output, (tuple, Mapping)) else output
        found: Sequence[Tensor] = [prediction]
        if parallel is not None:
            found = _of_branches(gather_latents(prediction, parallel.layout, geometry), parallel.layout)
        keep_all("prediction", found)
        passes += 1 if branches_as_rows else len(found)

    def after_block(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            streams = output if isinstance(output, tuple) else (output,)
            for index, tensor in enumerate(streams):
                found = [tensor] if parallel is None else _whole(tensor, index, parallel.layout)
                keep_all(f"{name}/{index}", found)

        return hook

    blocks = block_modules(model)
    handles: list[RemovableHandle] = [model.register_forward_hook(after_model)]
    handles += [
        blocks[name].register_forward_hook(after_block(name)) for name in evenly_chosen(list(blocks), num_blocks)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _whole(tensor: Tensor, index: int, layout: Layout) -> Sequence[Tensor]:
    """[B, S_local, C] -> [B, S, C] of each branch; a block's first output is the video stream, its second one the text.

    The text of two branches may differ in length.
    """
    assert layout.member is not None, "a helper owns no tokens"
    counts = (layout.sequence.video_counts, layout.sequence.text_counts)[index]
    whole = gather_tokens(tensor, counts, layout.group, layout.member)
    return _of_branches(whole if index else layout.in_sequence(whole), layout)


def _of_branches(whole: Tensor, layout: Layout) -> Sequence[Tensor]:
    """This tensor and, where the other half of the DiT group has its own, that too, in order of the halves.

    They may differ in size along dim 1.
    """
    branch = layout.branch
    if branch is None:
        return [whole]
    sizes = torch.zeros(2, dtype=torch.int64, device=whole.device)
    sizes[branch.index] = whole.shape[1]
    dist.all_reduce(sizes, group=branch.pair)
    counts = sizes.tolist()
    return gather_tokens(whole, counts, branch.pair, branch.index).split(counts, dim=1)


class StepRecording:
    """The recording of one request: `<folder>/step_NNNN.safetensors` after each step, written by the group's leader.

    Steps that lie in the folder from an earlier run are removed.

    Args:
        folder: `<id>.steps`.
        num_blocks: blocks whose outputs are recorded too, see `observing`.
        writes: whether this rank is the one that writes; the others take part in the gathers.
    """

    def __init__(self, folder: Path, num_blocks: int, *, writes: bool) -> None:
        self._folder = folder
        self._num_blocks = num_blocks
        self._writes = writes
        self._tensors: dict[str, Tensor] = {}
        if writes and any(folder.glob("step_*.safetensors")):
            for path in recorded_steps(folder).values():
                path.unlink()

    def step(self, denoiser: Observable, run: Denoising, index: int) -> None:
        """Run step `index` and write what it computed; waits for the device.

        Raises:
            OSError: the file cannot be written.
        """
        with denoiser.observe(self._keep, self._num_blocks):
            run.step(index)
        latents = run.latents()
        if self._writes:
            write_step(self._folder, index, {**self._tensors, "latents": latents})
            self._tensors.clear()

    def _keep(self, name: str, tensor: Tensor) -> None:
        if self._writes:
            self._tensors[name] = tensor.detach().to("cpu", copy=True)
