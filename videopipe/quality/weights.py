"""Files of weights that the user has on disk."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def load_state(path: Path) -> dict[str, "Tensor"]:
    """The state dict of a .safetensors or torch file; nothing in it is executed.

    Raises:
        ValueError: not a readable file of weights.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path}: not a readable file of weights ({error})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, need a state dict")
    return state


def take(path: Path, state: dict[str, "Tensor"], name: str, shape: tuple[int, ...]) -> "Tensor":
    """One weight as float32.

    Raises:
        ValueError: it is missing or has another shape.
    """
    tensor = state.get(name)
    if tensor is None or tuple(tensor.shape) != shape:
        found = "nothing" if tensor is None else str(list(tensor.shape))
        raise ValueError(f"{path}: {name} must have shape {list(shape)}, found {found}")
    return tensor.float()
