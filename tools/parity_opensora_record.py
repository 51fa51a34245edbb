"""Runs the official Open-Sora-Plan models and writes what they give; started by tools/parity_opensora.py.

    python tools/parity_opensora_record.py JOB

JOB is a folder with `job.json` (part, config, case names), `weights.safetensors` and `inputs.safetensors`; this program
adds `outputs.safetensors`. It runs under the interpreter that has upstream's package, whose pinned diffusers and
transformers differ from ours, so it imports nothing of this repository.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file


def main(job: Path) -> None:
    """Run every case of a job."""
    task = json.loads((job / "job.json").read_text())
    device = task["device"]
    weights, inputs = load_file(job / "weights.safetensors"), load_file(job / "inputs.safetensors")
    model = build(task["part"], task["config"])
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [key for key in missing if "wavelet" not in key]
    if missing or unexpected:
        raise ValueError(f"the official model misses {missing} and does not know {unexpected}")
    model = model.to(device).eval()
    outputs: dict[str, torch.Tensor] = {}
    for case in task["cases"]:
        given = {k[len(case) + 1 :]: v.to(device) for k, v in inputs.items() if k.startswith(case + "/")}
        with torch.no_grad(), any_kernel(device):
            found = run_denoiser(model, given) if task["part"] == "denoiser" else run_vae(model, given)
        outputs |= {f"{case}/{name}": value.cpu().contiguous().clone() for name, value in found.items()}
    save_file(outputs, job / "outputs.safetensors")


def build(part: str, config: dict[str, Any]) -> Any:
    """The official class of a part, with random weights."""
    if part == "vae":
        from opensora.models.causalvideovae.model.vae.modeling_wfvae import WFVAEModel

        return WFVAEModel(**config)
    if "vae_scale_factor_t" in config:
        from opensora.models.diffusion.opensora_v1_3.modeling_inpaint import OpenSoraInpaint_v1_3

        return OpenSoraInpaint_v1_3(**config)
    from opensora.models.diffusion.opensora_v1_3.modeling_opensora import OpenSoraT2V_v1_3

    return OpenSoraT2V_v1_3(**config)


def any_kernel(device: str) -> contextlib.AbstractContextManager[Any]:
    """Let attention run on a CPU: the official code allows one CUDA kernel alone, for the time of this call not so."""
    if device != "cpu":
        return contextlib.nullcontext()
    return mock.patch.object(torch.backends.cuda, "sdp_kernel", return_value=contextlib.nullcontext())


def run_denoiser(model: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`sample`, and the output of each block and of its attentions as [B, S, width] (there: [S, B, width])."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: found.__setitem__(name, out.transpose(0, 1)))
        for i, block in enumerate(model.transformer_blocks)
        for name, module in (
            (f"transformer_blocks.{i}.attn1", block.attn1),
            (f"transformer_blocks.{i}.attn2", block.attn2),
            (f"transformer_blocks.{i}", block),
        )
    ]
    found["sample"] = model(**given, return_dict=False)[0]
    for handle in handles:
        handle.remove()
    return found


def run_vae(model: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Moments of `video` and pixels of `latents`, each in one piece."""
    found = {}
    if "video" in given:
        posterior = model.encode(given["video"])
        found["moments"] = getattr(posterior, "latent_dist", posterior).parameters
    if "latents" in given:
        pixels = model.decode(given["latents"])
        found["pixels"] = pixels if isinstance(pixels, torch.Tensor) else pixels.sample
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
