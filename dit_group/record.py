"""Recording what the DiT group computes, step by step, as whole tensors, whatever the number of ranks."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dit_group.attention import SequenceParallel
from dit_group.denoise import Denoising
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
def observing(model: nn.Module, parallel: SequenceParallel | None, keep: Keep, num_blocks: int) -> Iterator[None]:
    """Within the block, hand whole tensors of every evaluation of `model` to `keep`, in the order they come to be.

    Names are those of `videopipe.quality.trace`. Blocks are the members of the model's own module lists named
    `...blocks`, in order; those chosen by `evenly_chosen` give their outputs, [B, S, C] video tokens and [B, L, C] text
    tokens, gathered over the DiT group. Hooks observe and change nothing. Every DiT rank enters with the same
    `num_blocks`: the gathers are collective.

    Args:
        parallel: how the tokens between blocks are sharded; None where they are whole.
        num_blocks: blocks to record, 0 for predictions alone.
    """
    passes = 0

    def after_model(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal passes
        keep(f"pass.{passes}/prediction", output[0] if isinstance(output, tuple) else output)
        passes += 1

    def after_block(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            streams = output if isinstance(output, tuple) else (output,)
            for index, tensor in enumerate(streams):
                keep(f"pass.{passes}/{name}/{index}", tensor if parallel is None else parallel.whole(tensor, index))

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
        if self._writes:
            write_step(self._folder, index, {**self._tensors, "latents": run.latents})
            self._tensors.clear()

    def _keep(self, name: str, tensor: Tensor) -> None:
        if self._writes:
            self._tensors[name] = tensor.detach().to("cpu", copy=True)
