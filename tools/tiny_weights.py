"""Random weights of tiny checkpoints: the same bytes on every machine, of a scale that keeps every branch audible."""

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging

Scale = tuple[float, float]
"""Mean and standard deviation of a parameter."""


def fill(model: nn.Module, component: str, seed: int, scale: Callable[[str, Tensor], Scale]) -> None:
    """Overwrite every parameter with uniform noise of the mean and deviation that `scale(name, parameter)` gives.

    Uniform, because that only scales integers: the bytes are the same on every CPU, which the logarithms and cosines
    behind normal noise do not promise. Each parameter has a stream of its own, so that adding a block leaves the
    other blocks as they were. NumPy's streams, because torch's CPU generator uses the low 32 bits of a seed only.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, std = scale(name, parameter)
            stream = zlib.crc32(f"{component}.{name}".encode())
            noise = np.random.default_rng([seed, stream]).random(tuple(parameter.shape), dtype=np.float32)
            parameter.copy_(torch.from_numpy(noise).sub_(0.5).mul_(math.sqrt(12.0) * std).add_(mean))


def fan_in(weight: Tensor) -> int:
    """Inputs that one output of a linear or convolution weight sums over."""
    return weight[0].numel()


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Saving a few megabytes needs no bars; afterwards they are as they were."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
