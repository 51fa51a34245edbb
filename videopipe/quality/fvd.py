"""Frechet video distance between two sets of clips, with I3D weights the user has on disk.

Nothing is downloaded. The weights are the state dict of the Inception I3D trained on Kinetics-400, 400 classes, with
the names of its common PyTorch port (`Conv3d_1a_7x7.conv3d.weight`, `Mixed_3b.b1a.bn.running_mean`, ...).
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from videopipe.quality.align import resized, to_bytes
from videopipe.quality.clips import Clip
from videopipe.quality.weights import load_state, take

if TYPE_CHECKING:
    from torch import Tensor

SIZE_PX = 224
MIN_FRAMES = 9  # below this nothing is left for the last pooling over time

_STEM = (("Conv3d_1a_7x7", 3, 64, 7, 2), ("Conv3d_2b_1x1", 64, 64, 1, 1), ("Conv3d_2c_3x3", 64, 192, 3, 1))
# name: input channels, then outputs of b0, b1a, b1b, b2a, b2b, b3b
_MIXED = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}
# kernel and stride over time and space of the pooling in front of a stage
_POOLS = {
    "Conv3d_2b_1x1": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}


class I3D:
    """Inception I3D up to its logits, for features of clips.

    Source: Carreira and Zisserman 2017, "Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset".
    """

    def __init__(self, weights: Path) -> None:
        """Read the weights.

        Raises:
            ValueError: a file that cannot be read, or lacks a weight of the right shape.
        """
        state = load_state(weights)
        self._units: dict[str, tuple[Tensor, Tensor, int]] = {}

        def unit(name: str, channels: int, out: int, kernel: int, stride: int = 1) -> None:
            weight = take(weights, state, f"{name}.conv3d.weight", (out, channels, kernel, kernel, kernel))
            scale, shift, mean, variance = (
                take(weights, state, f"{name}.bn.{part}", (out,))
                for part in ("weight", "bias", "running_mean", "running_var")
            )
            gain = scale / (variance + 1e-3).sqrt()  # batch norm folded into the convolution
            self._units[name] = (weight * gain.view(-1, 1, 1, 1, 1), shift - mean * gain, stride)

        for name, channels, out, kernel, stride in _STEM:
            unit(name, channels, out, kernel, stride)
        for name, (channels, b0, b1a, b1b, b2a, b2b, b3b) in _MIXED.items():
            unit(f"{name}.b0", channels, b0, 1)
            unit(f"{name}.b1a", channels, b1a, 1)
            unit(f"{name}.b1b", b1a, b1b, 3)
            unit(f"{name}.b2a", channels, b2a, 1)
            unit(f"{name}.b2b", b2a, b2b, 3)
            unit(f"{name}.b3b", channels, b3b, 1)
        self._logits = take(weights, state, "logits.conv3d.weight", (400, 1024, 1, 1, 1))
        self._bias = take(weights, state, "logits.conv3d.bias", (400,))

    def features(self, clip: "Tensor") -> "Tensor":
        """Logits [B, 400], averaged over time, of clips [B, 3, T, 224, 224] in -1..1 with at least 9 frames.

        Raises:
            ValueError: another shape.
        """
        import torch.nn.functional as F

        if (
            clip.ndim != 5
            or clip.shape[1] != 3
            or clip.shape[2] < MIN_FRAMES
            or tuple(clip.shape[3:]) != (SIZE_PX,) * 2
        ):
            need = f"[B, 3, T, {SIZE_PX}, {SIZE_PX}] with T at least {MIN_FRAMES}"
            raise ValueError(f"clip shape {list(clip.shape)} must be {need}")
        x = clip
        for name in (*(stage[0] for stage in _STEM), *_MIXED):
            if name in _POOLS:
                x = _pool(x, *_POOLS[name])
            x = self._mixed(x, name) if name in _MIXED else self._unit(x, name)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)
        return F.conv3d(x, self._logits, self._bias).mean(dim=(2, 3, 4))

    def _mixed(self, x: "Tensor", name: str) -> "Tensor":
        import torch

        branches = [self._unit(x, f"{name}.b0")]
        branches += [self._unit(self._unit(x, f"{name}.{b}a"), f"{name}.{b}b") for b in ("b1", "b2")]
        branches.append(self._unit(_pool(x, (3, 3, 3), (1, 1, 1)), f"{name}.b3b"))
        return torch.cat(branches, dim=1)

    def _unit(self, x: "Tensor", name: str) -> "Tensor":
        import torch.nn.functional as F

        weight, bias, stride = self._units[name]
        kernel = tuple(weight.shape[2:])
        return F.relu(F.conv3d(_same(x, kernel, (stride,) * 3), weight, bias, stride=stride))


def clip_features(model: I3D, clips: Iterable[Clip], num_frames: int = 16) -> NDArray[np.float64]:
    """Features [N, 400] of clips: `num_frames` frames spread evenly, the middle square scaled to 224 px, bicubic.

    Raises:
        ValueError: a clip of latents, or with fewer frames than asked for.
    """
    import torch

    rows = []
    for clip in clips:
        if clip.info.latents or clip.info.num_frames < max(num_frames, MIN_FRAMES):
            what = "latents" if clip.info.latents else f"{clip.info.num_frames} frames"
            raise ValueError(f"{clip.info.path}: holds {what}, FVD needs at least {max(num_frames, MIN_FRAMES)} frames")
        frames = np.stack(list(_sampled(clip, num_frames)))
        tensor = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1  # [1, 3, T, 224, 224]
        with torch.inference_mode():
            rows.append(model.features(tensor)[0].double().numpy())
    return np.stack(rows) if rows else np.zeros((0, 400))


def frechet_distance(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Distance of two Gaussians fitted to features [N, D] and [M, D]: 0 for equal sets.

    |mean a - mean b|^2 + trace(A + B - 2 (A B)^(1/2)) for the covariances A and B, N - 1 in the denominator.

    Raises:
        ValueError: fewer than two rows on a side, or another number of columns.
    Source: Dowson and Landau 1982; Unterthiner et al. 2018, "Towards Accurate Generative Models of Video", for video.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"features {list(a.shape)} and {list(b.shape)} must be [N, D] and [M, D] with N, M of at least 2"
        )
    # The nonzero eigenvalues of A B are the squared singular values of Xa Xb^T, so no D x D root is needed.
    left, right = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a.astype(np.float64), b.astype(np.float64)))
    shared = np.linalg.svd(left @ right.T, compute_uv=False).sum()
    apart = float(np.square(a.mean(axis=0) - b.mean(axis=0)).sum())
    return max(0.0, apart + float(np.square(left).sum() + np.square(right).sum()) - 2 * float(shared))


def fvd(model: I3D, ref: Sequence[Clip], cand: Sequence[Clip], num_frames: int = 16) -> float:
    """Frechet video distance between two sets of clips; needs two clips a side, and means little below hundreds."""
    return frechet_distance(clip_features(model, ref, num_frames), clip_features(model, cand, num_frames))


def _sampled(clip: Clip, num_frames: int) -> Iterator[NDArray[np.uint8]]:
    wanted = [i * clip.info.num_frames // num_frames for i in range(num_frames)]
    for t, frame in enumerate(clip.frames()):
        if t in wanted:
            side = min(frame.shape[:2])
            top, left = (frame.shape[0] - side) // 2, (frame.shape[1] - side) // 2
            yield resized(to_bytes(frame[top : top + side, left : left + side]), SIZE_PX, SIZE_PX)


def _pool(x: "Tensor", kernel: tuple[int, ...], stride: tuple[int, ...]) -> "Tensor":
    import torch.nn.functional as F

    return F.max_pool3d(_same(x, kernel, stride), kernel, stride)


def _same(x: "Tensor", kernel: tuple[int, ...], stride: tuple[int, ...]) -> "Tensor":
    """Zeros around [B, C, T, H, W] so that the result has ceil(size / stride) entries, the odd one at the end."""
    import torch.nn.functional as F

    pads: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)
