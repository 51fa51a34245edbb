"""Runs the official Open-Sora-Plan code and ours on the same weights and inputs and prints the differences per block.

    python -m tools.parity_opensora                                   # tiny random models, many shapes and masks
    python -m tools.parity_opensora --weights Open-Sora-Plan-v1.3.0   # the released weights, one small clip

The official code needs an interpreter of its own, given by `--python`, because it pins other versions of diffusers and
transformers than this project.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.models.open_sora_plan import OpenSoraPlanTransformer3DModel
from pipelines.models.open_sora_plan_layout import TRANSFORMER_FOLDERS, VAE_FOLDERS
from pipelines.models.open_sora_plan_loading import load_transformer, load_vae
from pipelines.models.wf_vae import WFVAEModel

HOW_TO_GET_IT = """The official package `opensora` is not importable by {python}. To get it:

    git clone --branch v1.3.1 https://github.com/PKU-YuanGroup/Open-Sora-Plan
    python3.10 -m venv opensora-env
    opensora-env/bin/pip install -e Open-Sora-Plan        # pins torch 2.1, diffusers 0.30.2, transformers 4.44.2
    python -m tools.parity_opensora --python opensora-env/bin/python

Without installing its pins, `PYTHONPATH=Open-Sora-Plan` before an interpreter with diffusers 0.30.2 and
transformers 4.44.2 is enough. (v1.3.0 cannot be imported: parts of the package are missing from that tag.)
"""

TINY_DENOISER: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 6,
    "cross_attention_dim": 96,
    "attention_bias": True,
    "sample_size_h": 8,
    "sample_size_w": 8,
    "sample_size_t": 3,
    "patch_size": 2,
    "patch_size_t": 1,
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 64,
    "interpolation_scale_h": 1.0,
    "interpolation_scale_w": 1.0,
    "interpolation_scale_t": 1.0,
    "sparse1d": True,
    "sparse_n": 4,
}
TINY_VAE: dict[str, Any] = {
    "latent_dim": 8,
    "base_channels": 8,
    "encoder_energy_flow_hidden_size": 4,
    "decoder_energy_flow_hidden_size": 8,
    "norm_type": "layernorm",
    "t_interpolation": "trilinear",
    "connect_res_layer_num": 2,
}
DENOISER_KEYS = ("hidden_states", "timestep", "encoder_hidden_states", "attention_mask", "encoder_attention_mask")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One model with its cases: `inputs` by case name, then by argument name."""

    name: str
    part: str
    config: dict[str, Any]
    model: nn.Module
    inputs: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far one tensor of ours is from the official one, and how large that is."""

    job: str
    case: str
    name: str
    worst: float
    largest: float


def compare(job: Job, python: str, device: str = "cpu") -> Iterator[Difference]:
    """Run both on every case of a job, the official code under the interpreter `python`.

    Raises:
        subprocess.CalledProcessError: the official code failed; its own message is on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        save_file({k: v.contiguous() for k, v in job.model.state_dict().items()}, path / "weights.safetensors")
        flat = {f"{case}/{k}": v.contiguous() for case, given in job.inputs.items() for k, v in given.items()}
        save_file(flat, path / "inputs.safetensors")
        task = {"part": job.part, "config": job.config, "cases": list(job.inputs), "device": device}
        (path / "job.json").write_text(json.dumps(task))
        script = Path(__file__).with_name("parity_opensora_record.py")
        subprocess.run([python, str(script), folder], check=True)
        theirs = load_file(path / "outputs.safetensors")
    model = job.model.to(device).eval()
    for case, given in job.inputs.items():
        ours = run_ours(model, {k: v.to(device) for k, v in given.items()})
        for name, value in ours.items():
            expected = theirs.pop(f"{case}/{name}")
            if expected.shape != value.shape:
                raise ValueError(f"{job.name} {case} {name}: ours {list(value.shape)}, theirs {list(expected.shape)}")
            worst = float((value.cpu() - expected).abs().max())
            yield Difference(job=job.name, case=case, name=name, worst=worst, largest=float(expected.abs().max()))
    if theirs:
        raise ValueError(f"{job.name}: ours lacks {', '.join(sorted(theirs))}")


@torch.no_grad()
def run_ours(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What parity_opensora_record.py records, of our model."""
    if isinstance(model, WFVAEModel):
        found = {}
        if "video" in given:
            found["moments"] = model.encode(given["video"], return_dict=False)[0].parameters
        if "latents" in given:
            found["pixels"] = model.decode(given["latents"], return_dict=False)[0]
        return found
    assert isinstance(model, OpenSoraPlanTransformer3DModel)
    found = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: found.__setitem__(name, out))
        for name, module in model.named_modules()
        if name.startswith("transformer_blocks.") and (name.count(".") == 1 or name.endswith((".attn1", ".attn2")))
    ]
    found["sample"] = model(**given, return_dict=False)[0]
    for handle in handles:
        handle.remove()
    return found


def tiny_jobs(seed: int = 0) -> Iterator[Job]:
    """Tiny random models: every kind of attention, odd sizes, masks, batches, images, inpainting, clip lengths."""
    g = torch.Generator().manual_seed(seed)
    cases = {
        "video": denoiser_inputs(g, (8, 4, 8, 8), batch=2),
        "odd tokens": denoiser_inputs(g, (8, 3, 10, 14), batch=2),
        "batch of one": denoiser_inputs(g, (8, 2, 6, 6), batch=1),
        "image": denoiser_inputs(g, (8, 1, 6, 4), batch=3),
        "one token": denoiser_inputs(g, (8, 1, 2, 2), batch=2),
        "masked frames": denoiser_inputs(g, (8, 5, 6, 10), batch=2, masked="frames"),
        "masked pixels": denoiser_inputs(g, (8, 3, 10, 6), batch=3, masked="pixels"),
    }
    denoisers: tuple[tuple[str, dict[str, Any]], ...] = (
        ("skip-sparse", {}),
        ("dense", {"sparse_n": 1}),
        ("dense, sparse1d off", {"sparse1d": False, "sparse_n": 1}),
        ("32 blocks", {"num_layers": 32}),
        ("scaled positions", {f"interpolation_scale_{axis}": 2.0 for axis in "thw"}),
    )
    for name, change in denoisers:
        config = TINY_DENOISER | change
        model = random_weights(OpenSoraPlanTransformer3DModel(**config), g)
        yield Job(name=name, part="denoiser", config=config, model=model, inputs=cases)
    config = TINY_DENOISER | {"vae_scale_factor_t": 4}
    model = random_weights(OpenSoraPlanTransformer3DModel(**config), g)
    inpaint = {"video": denoiser_inputs(g, (20, 3, 6, 10), batch=2)}
    yield Job(name="inpainting", part="denoiser", config=config, model=model, inputs=inpaint)

    clips = {
        f"{4 * n - 3} frames": {
            "video": torch.rand(batch, 3, 4 * n - 3, 16, 24, generator=g) * 2 - 1,
            "latents": torch.randn(batch, 8, n, 2, 3, generator=g),
        }
        for n, batch in ((1, 2), (2, 1), (3, 2), (6, 1), (9, 1))
    }
    vaes: tuple[tuple[str, dict[str, Any]], ...] = (
        ("WF-VAE", {}),
        ("WF-VAE, nearest in time", {"t_interpolation": "nearest"}),
        ("WF-VAE, shallow", {"connect_res_layer_num": 1, "encoder_num_resblocks": 1, "decoder_num_resblocks": 3}),
        ("WF-VAE, no attention", {"use_attention": False}),
        (
            "WF-VAE, group norm",
            {
                "norm_type": "groupnorm",
                "base_channels": 32,
                "encoder_energy_flow_hidden_size": 32,
                "decoder_energy_flow_hidden_size": 32,
            },
        ),
    )
    for name, change in vaes:
        config = TINY_VAE | change
        yield Job(name=name, part="vae", config=config, model=random_weights(WFVAEModel(**config), g), inputs=clips)


def released_jobs(weights: Path, seed: int = 0) -> Iterator[Job]:
    """The released weights in fp32 with one small clip each."""
    g = torch.Generator().manual_seed(seed)
    vae = load_vae(next(weights / name for name in VAE_FOLDERS if (weights / name).is_dir()))
    clip = {
        "video": torch.rand(1, 3, 9, 128, 128, generator=g) * 2 - 1,
        "latents": torch.randn(1, 8, 3, 16, 16, generator=g),
    }
    yield Job(name="released WF-VAE", part="vae", config=_options(vae), model=vae, inputs={"9 frames": clip})
    folder = next(weights / name for name in TRANSFORMER_FOLDERS if (weights / name).is_dir())
    model = load_transformer(folder)
    channels = model.config.caption_channels
    inputs = {"3 latent frames": denoiser_inputs(g, (8, 3, 16, 16), batch=2, text=64, width=channels)}
    yield Job(name="released denoiser", part="denoiser", config=_options(model), model=model, inputs=inputs)


def denoiser_inputs(
    g: torch.Generator, latents: tuple[int, ...], *, batch: int, masked: str = "", text: int = 20, width: int = 64
) -> dict[str, Tensor]:
    """Random arguments of the denoiser; the rows of the text have different lengths."""
    mask = torch.ones(batch, *latents[1:])
    if masked == "frames":
        mask[-1, -2:] = 0
    elif masked == "pixels":
        mask = (torch.rand(mask.shape, generator=g) > 0.6).float()
    lengths = torch.tensor([text, 7, 1])[:batch, None]
    values = (
        torch.randn(batch, *latents, generator=g),
        torch.tensor([999.0, 123.0, 0.0])[:batch],
        torch.randn(batch, 1, text, width, generator=g),
        mask,
        (torch.arange(text) < lengths)[:, None].long(),
    )
    return dict(zip(DENOISER_KEYS, values, strict=True))


@torch.no_grad()
def random_weights(model: nn.Module, g: torch.Generator) -> nn.Module:
    """Weights under which every branch counts: matrices by fan-in, sharp queries and keys, norms around 1."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=g)
        if name.endswith("scale_shift_table"):
            parameter.copy_(noise * 0.3)
        elif noise.ndim > 1:
            gain = 1.6 if "to_q" in name or "to_k" in name else 1.0
            parameter.copy_(noise * gain / math.sqrt(noise[0].numel()))
        else:
            parameter.copy_(1 + noise * 0.2 if name.endswith("weight") else noise * 0.1)
    return model


def is_importable(python: str) -> bool:
    """Whether the interpreter finds the official package."""
    check = "import importlib.util, sys; sys.exit(importlib.util.find_spec('opensora') is None)"
    return subprocess.run([python, "-c", check], check=False).returncode == 0


def _options(model: Any) -> dict[str, Any]:
    return {k: v for k, v in model.config.items() if not k.startswith("_") and v is not None}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    python: Annotated[str, typer.Option(help="interpreter that has the official package")] = sys.executable,
    weights: Annotated[Path | None, typer.Option(help="folder of released weights; tiny random ones without")] = None,
    device: Annotated[str, typer.Option(help="where both run")] = "cpu",
    tolerance: Annotated[float, typer.Option(help="of the outputs, relative to the largest value above 1")] = 2e-5,
    every: Annotated[bool, typer.Option(help="print every block, not only the outputs and what differs")] = False,
) -> None:
    """Compare the official code with ours; exit code 1 where they differ, 3 where the official code is absent."""
    if not is_importable(python):
        typer.echo(HOW_TO_GET_IT.format(python=python), err=True)
        raise typer.Exit(3)
    differing = 0
    for job in released_jobs(weights) if weights else tiny_jobs():
        for d in compare(job, python, device):
            bad = not d.worst <= tolerance * max(1.0, d.largest)
            differing += bad
            if bad or every or "." not in d.name:
                mark = "  DIFFERS" if bad else ""
                typer.echo(f"{d.job:24} {d.case:16} {d.name:28} {d.worst:.1e} of {d.largest:6.2f}{mark}")
    typer.echo(f"{differing} differ" if differing else "all agree")
    raise typer.Exit(int(differing > 0))


if __name__ == "__main__":
    app()
