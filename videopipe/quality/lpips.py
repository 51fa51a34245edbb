"""LPIPS with weights the user has on disk: AlexNet's convolutions and the five learned heads.

Nothing is downloaded. The backbone is a state dict with torchvision's names (`features.0.weight` and on, the
ImageNet AlexNet), the heads are those of the LPIPS authors, version 0.1 (`lin0.model.1.weight` and on).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from videopipe.quality.weights import load_state, take

if TYPE_CHECKING:
    from torch import Tensor

# (name in `features`, output channels, input channels, kernel, stride, padding, pooled before)
_LAYERS = (
    (0, 64, 3, 11, 4, 2, False),
    (3, 192, 64, 5, 1, 2, True),
    (6, 384, 192, 3, 1, 1, True),
    (8, 256, 384, 3, 1, 1, False),
    (10, 256, 256, 3, 1, 1, False),
)
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
MIN_SIDE = 31  # below this the second pooling has nothing to pool


class Lpips:
    """The learned perceptual distance between two frames: 0 for equal ones, about 1 for unrelated ones.

    Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric".
    """

    def __init__(self, backbone: Path, heads: Path) -> None:
        """Read the weights.

        Args:
            backbone: AlexNet's state dict, .pth or .safetensors; only its convolutions are used.
            heads: the state dict of the five 1x1 heads.
        Raises:
            ValueError: a file that cannot be read, or lacks a weight of the right shape.
        """
        convolutions, linear = load_state(backbone), load_state(heads)
        self._convolutions = []
        self._heads = []
        for i, (name, out, channels, kernel, *_) in enumerate(_LAYERS):
            weight = take(backbone, convolutions, f"features.{name}.weight", (out, channels, kernel, kernel))
            bias = take(backbone, convolutions, f"features.{name}.bias", (out,))
            self._convolutions.append((weight, bias))
            self._heads.append(take(heads, linear, f"lin{i}.model.1.weight", (1, out, 1, 1)))

    def frame(self, ref: NDArray[Any], cand: NDArray[Any]) -> float:
        """The distance of one pair of frames [H, W, 3] on the scale 0..255.

        Raises:
            ValueError: shapes differ, or a side is below 31 px.
        """
        import torch

        if ref.shape != cand.shape or ref.ndim != 3 or min(ref.shape[:2]) < MIN_SIDE:
            shapes = f"{list(ref.shape)} and {list(cand.shape)}"
            raise ValueError(f"lpips needs frames [H, W, 3] of one shape, sides at least {MIN_SIDE} px, got {shapes}")
        with torch.inference_mode():
            both = torch.from_numpy(np.stack([ref, cand]).astype(np.float32)).permute(0, 3, 1, 2)
            both = both / 127.5 - 1
            both = (both - both.new_tensor(_SHIFT).view(1, 3, 1, 1)) / both.new_tensor(_SCALE).view(1, 3, 1, 1)
            distance = 0.0
            for features, head in zip(self._features(both), self._heads, strict=True):
                unit = features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
                apart = (unit[0] - unit[1]).square()  # [C, H', W']
                distance += float((apart * head[0]).sum(dim=0).mean())
            return distance

    def values(self, pairs: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> list[float]:
        """The distance of each pair of frames REF, CAND, one pair held at a time."""
        return [self.frame(ref, cand) for ref, cand in pairs]

    def _features(self, x: "Tensor") -> list["Tensor"]:
        import torch.nn.functional as F

        found = []
        for (weight, bias), (_, _, _, _, stride, padding, pooled) in zip(self._convolutions, _LAYERS, strict=True):
            if pooled:
                x = F.max_pool2d(x, kernel_size=3, stride=2)
            x = F.relu(F.conv2d(x, weight, bias, stride=stride, padding=padding))
            found.append(x)
        return found
