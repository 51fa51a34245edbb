"""Records what a denoiser computes, step by step, through public hooks only.

Works with any `torch.nn.Module` whose blocks lie in module lists, so with diffusers' own transformers and with ours:

    with StepRecorder(folder, pipe.transformer, block_steps={0}) as recorder:
        pipe(..., callback_on_step_end=recorder.on_step_end, callback_on_step_end_tensor_inputs=["latents"])
"""

from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from videopipe.quality.trace import write_step

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


class StepRecorder:
    """Writes `<folder>/step_NNNN.safetensors` after each step, until closed.

    Each file holds the outputs of all blocks (for the steps in `block_steps`), the denoiser's predictions and the
    latents after the step. Hooks observe and change nothing.
    """

    def __init__(self, folder: Path, denoiser: "nn.Module", *, block_steps: Collection[int] = ()) -> None:
        """Register the hooks.

        Args:
            folder: `<id>.steps`; files of an earlier recording there are an error.
            denoiser: the transformer.
            block_steps: steps whose blocks are recorded too. One step of a 13B model at 720p is tens of GB.
        Raises:
            ValueError: the folder holds a recording, a negative step, or blocks asked of a model without any.
        """
        if folder.is_dir() and any(folder.glob("step_*.safetensors")):
            raise ValueError(f"{folder}: holds a recording already, remove it or take another folder")
        if any(step < 0 for step in block_steps):
            raise ValueError(f"block_steps={sorted(block_steps)} must not be negative, nearest is 0")
        self._folder = folder
        self._block_steps = frozenset(block_steps)
        self._step = 0
        self._pass = 0
        self._tensors: dict[str, Tensor] = {}
        blocks = block_modules(denoiser)
        if block_steps and not blocks:
            raise ValueError(f"{type(denoiser).__name__} has no module list of blocks to record")
        self._handles: list[RemovableHandle] = [denoiser.register_forward_hook(self._after_denoiser)]
        if block_steps:
            for name, block in blocks.items():
                self._handles.append(block.register_forward_hook(self._block_hook(name)))

    def __enter__(self) -> "StepRecorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks; what is written stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def on_step_end(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """diffusers' `callback_on_step_end`: write the step. Returns nothing changed.

        Raises:
            ValueError: `latents` is not among the callback's tensors.
        """
        del pipe, timestep
        if "latents" not in tensors:
            raise ValueError("callback_on_step_end_tensor_inputs must hold 'latents'")
        self.end_step(step, tensors["latents"])
        return {}

    def end_step(self, step: int, latents: "Tensor") -> None:
        """Write what was seen since the last step, and the latents after it [B, C, T', H', W']."""
        write_step(self._folder, step, {**self._tensors, "latents": latents})
        self._tensors = {}
        self._step, self._pass = step + 1, 0

    def _after_denoiser(self, module: "nn.Module", args: Any, output: Any) -> None:
        del module, args
        first = next(iter(_tensors_of(output)), None)
        if first is not None:
            self._tensors[f"pass.{self._pass}/prediction"] = first.detach().to("cpu", copy=True)
        self._pass += 1

    def _block_hook(self, name: str) -> Any:
        def after_block(module: "nn.Module", args: Any, output: Any) -> None:
            del module, args
            if self._step in self._block_steps:
                for i, tensor in enumerate(_tensors_of(output)):
                    self._tensors[f"pass.{self._pass}/{name}/{i}"] = tensor.detach().to("cpu", copy=True)

        return after_block


def block_modules(denoiser: "nn.Module") -> dict[str, "nn.Module"]:
    """The blocks of a denoiser by name: the members of its own module lists whose name ends in `blocks`."""
    from torch import nn

    return {
        f"{name}.{i}": block
        for name, child in denoiser.named_children()
        if isinstance(child, nn.ModuleList) and name.endswith("blocks")
        for i, block in enumerate(child)
    }


def _tensors_of(output: Any) -> list["Tensor"]:
    """The tensors of a module's output: a tensor, a tuple, or diffusers' output record."""
    import torch

    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        return [item for item in output if isinstance(item, torch.Tensor)]
    return []
