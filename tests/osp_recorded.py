"""What the official Open-Sora-Plan code gave for tiny models (see tests/data/open_sora_plan/README.md)."""

import gzip
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

DATA = Path(__file__).parent / "data" / "open_sora_plan"


class Recorded:
    """One recorded file: `config`, `metadata`, and tensors by case and by role ("inputs", "outputs")."""

    def __init__(self, name: str) -> None:
        with safe_open(DATA / f"{name}.safetensors", framework="pt") as file:
            self.metadata: dict[str, str] = file.metadata()
            self.tensors = {key: file.get_tensor(key) for key in list(file.keys())}
        self.config: dict[str, Any] = json.loads(self.metadata["config"])
        self.seed = int(self.metadata.get("weights_seed", -1))

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below `prefix`, under the rest of their names."""
        return {key[len(prefix) + 1 :]: value for key, value in self.tensors.items() if key.startswith(prefix + "/")}


def draw(shapes: Mapping[str, torch.Size], seed: int, scale: Callable[[str], float]) -> dict[str, Tensor]:
    """The recorder's random weights: matrices by fan-in and `scale(name)`, vectors around 0 or, of norms, 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name in sorted(shapes):
        noise = torch.randn(shapes[name], generator=generator)
        if name.endswith("scale_shift_table"):
            weights[name] = noise * 0.3
        elif noise.ndim > 1:
            weights[name] = noise * (scale(name) / math.sqrt(math.prod(noise.shape[1:])))
        elif name.endswith("weight"):
            weights[name] = 1 + noise * 0.2
        else:
            weights[name] = noise * 0.1
    return weights


def dit_scale(name: str) -> float:
    """The recorder's scale of the denoiser's matrices: sharper attention than usual, so that masks bite."""
    return 1.6 if "to_q" in name or "to_k" in name else 1.0


def vae_scale(name: str) -> float:
    """The recorder's scale of WF-VAE's kernels."""
    return 1.1


def manifest(name: str) -> dict[str, Any]:
    """Names and shapes of a released model: "dit_2B", "wfvae_8ch" or "mt5xxl_encoder"."""
    content: dict[str, Any] = json.loads(gzip.decompress((DATA / "manifests.json.gz").read_bytes()))[name]
    return content
