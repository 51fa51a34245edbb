"""How much a demo model's loss rises when its caption is wrong, by noise level: does the text say which is which?

    python -m tools.caption_gain bundled:moving_shapes --clips 64

Clips of two objects, and four captions each: the right one, and those in which the two objects have exchanged their
colours, shapes or motions. Where a model knows from its text which object is which, an exchanged caption costs it
something; where it costs nothing the model has not learnt to bind that attribute to its side.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from diffusers import HunyuanVideoPipeline
from torch import Tensor

from pipelines.bundled import find_weights
from pipelines.models.zero_snr_scheduler import make_scheduler
from pipelines.open_sora_plan import OpenSoraPlanParts, load_parts, prompt_rows
from tools import demo_open_sora_plan as plan
from tools import train_demo_model as moving
from tools import train_demo_open_sora_plan as train_plan
from tools.bench_quality import family_of
from tools.demo_model import encode_text, tokenize
from tools.demo_training_stages import to_input
from tools.moving_shapes import Scene, caption, render, scene_at

EXCHANGED = ("colour", "shape", "motion")
SIGMAS = (1.0, 0.98, 0.95, 0.9, 0.8, 0.6, 0.4)


def exchange(scene: Scene, attribute: str) -> Scene:
    """The scene with one attribute of its two objects exchanged."""
    left, right = scene.objects
    swapped = (
        replace(left, **{attribute: getattr(right, attribute)}),
        replace(right, **{attribute: getattr(left, attribute)}),
    )
    return replace(scene, objects=swapped)


def _can_exchange(scene: Scene) -> bool:
    """Whether every exchange gives another scene of this world."""
    left, right = scene.objects
    if any(getattr(left, name) == getattr(right, name) for name in EXCHANGED):
        return False
    circle = "circle" in (left.shape, right.shape)
    return not (circle and "rotate" in (left.motion, right.motion))


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoModel:
    """What is asked of a model of either family.

    `latents`: clean latents [B, C, T', H', W'] of video [B, 3, T, H, W]. `loss_with`: for texts [B], which it encodes
    once, the loss of training over clean latents, noise of their shape and one noise level, the s of
    (1 - s) * clean + s * noise.
    """

    latents: Callable[[Tensor], Tensor]
    loss_with: Callable[[list[str]], Callable[[Tensor, Tensor, float], float]]


def first_model(pipe: HunyuanVideoPipeline) -> DemoModel:
    """HunyuanVideo's architecture: flow matching."""

    def loss_with(texts: list[str]) -> Callable[[Tensor, Tensor, float], float]:
        tokens = tokenize(texts, pipe.tokenizer, pipe.tokenizer_2)
        text = encode_text(pipe.text_encoder, pipe.text_encoder_2, tokens)
        return lambda clean, noise, level: moving.velocity_loss(
            pipe.transformer, text, clean, noise, torch.full((len(clean),), level)
        ).item()

    return DemoModel(latents=lambda video: moving.moments_of(pipe.vae, video)[0], loss_with=loss_with)


def second_model(parts: OpenSoraPlanParts) -> DemoModel:
    """Open-Sora-Plan's architecture: v-prediction, at the timestep with the level's signal-to-noise ratio."""
    alphas_cumprod = make_scheduler().alphas_cumprod

    def loss_with(texts: list[str]) -> Callable[[Tensor, Tensor, float], float]:
        rows = [prompt_rows(text, guidance_scale=1.0)[0] if text else "" for text in texts]
        text = train_plan.encode_text(parts.transformer, parts.text_encoder, plan.tokenize(rows, parts.tokenizer))

        def loss(clean: Tensor, noise: Tensor, level: float) -> float:
            t = train_plan.timestep_of(torch.full((len(clean),), level), alphas_cumprod)
            return train_plan.v_loss(parts.transformer, text, clean, noise, t, alphas_cumprod).item()

        return loss

    return DemoModel(
        latents=lambda video: parts.vae.scale_latents(plan.moments_of(parts.vae, video)[0]), loss_with=loss_with
    )


@torch.no_grad()
def caption_gains(
    model: DemoModel, num_clips: int, *, seed: int, sigmas: Sequence[float] = SIGMAS
) -> dict[float, dict[str, float]]:
    """By sigma the training's loss with the right caption ("right") and what every wrong one adds.

    Args:
        model: one that draws 17 frames of 64x64.
        num_clips: clips of two trained combinations that differ in all that is exchanged.
    """
    scenes = list(islice(filter(_can_exchange, (scene_at(seed, i, num_objects=2) for i in count())), num_clips))
    captions = {"right": [caption(s) for s in scenes]}
    captions |= {name: [caption(exchange(s, name)) for s in scenes] for name in EXCHANGED}
    captions["none"] = [""] * num_clips
    totals = {sigma: dict.fromkeys(captions, 0.0) for sigma in sigmas}
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, num_clips, 16):
        some = slice(first, first + 16)
        clean = model.latents(to_input(np.stack([render(s, 17, 64, 64) for s in scenes[some]])))
        noises = [torch.randn(clean.shape, generator=generator) for _ in sigmas]
        for name, texts in captions.items():
            loss = model.loss_with(texts[some])
            for sigma, noise in zip(sigmas, noises, strict=True):
                totals[sigma][name] += loss(clean, noise, sigma) * len(clean) / num_clips
    return {
        sigma: {name: value if name == "right" else value - of["right"] for name, value in of.items()}
        for sigma, of in totals.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line per noise level."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an exported directory of either demo model, or bundled:NAME")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--seed", type=int, default=777)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = Path(find_weights(args.model))
    if family_of(folder) == "open-sora-plan":
        model = second_model(load_parts(folder))
    else:
        model = first_model(HunyuanVideoPipeline.from_pretrained(folder, torch_dtype=torch.float32))
    sys.stdout.write(f"{'sigma':>6}{'loss':>9}" + "".join(f"{'+' + name:>10}" for name in (*EXCHANGED, "none")) + "\n")
    for sigma, gains in caption_gains(model, args.clips, seed=args.seed).items():
        rest = "".join(f"{gains[name]:10.4f}" for name in (*EXCHANGED, "none"))
        sys.stdout.write(f"{sigma:6.2f}{gains['right']:9.4f}{rest}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
