"""How much a demo model's loss rises when its caption is wrong, by noise level: does the text say which is which?

    python -m tools.caption_gain bundled:moving_shapes --clips 64

Clips of two objects, and four captions each: the right one, and those in which the two objects have exchanged their
colours, shapes or motions. Where a model knows from its text which object is which, an exchanged caption costs it
something; where it costs nothing the model has not learnt to bind that attribute to its side.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from diffusers import HunyuanVideoPipeline

from pipelines.bundled import find_weights
from tools.demo_model import encode_text, tokenize
from tools.demo_training_stages import to_input
from tools.moving_shapes import Scene, caption, render, scene_at
from tools.train_demo_model import moments_of, velocity_loss

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


@torch.no_grad()
def caption_gains(
    pipe: HunyuanVideoPipeline, num_clips: int, *, seed: int, sigmas: Sequence[float] = SIGMAS
) -> dict[float, dict[str, float]]:
    """By sigma the flow-matching loss with the right caption ("right") and what every wrong one adds.

    Args:
        pipe: a demo pipeline for 17 frames of 64x64.
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
        frames = np.stack([render(s, 17, 64, 64) for s in scenes[some]])
        clean, _ = moments_of(pipe.vae, to_input(frames))
        noises = [torch.randn(clean.shape, generator=generator) for _ in sigmas]
        for name, texts in captions.items():
            text = encode_text(
                pipe.text_encoder, pipe.text_encoder_2, tokenize(texts[some], pipe.tokenizer, pipe.tokenizer_2)
            )
            for sigma, noise in zip(sigmas, noises, strict=True):
                loss = velocity_loss(pipe.transformer, text, clean, noise, torch.full((len(clean),), sigma))
                totals[sigma][name] += loss.item() * len(clean) / num_clips
    return {
        sigma: {name: value if name == "right" else value - of["right"] for name, value in of.items()}
        for sigma, of in totals.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line per noise level."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an exported directory of the first demo model, or bundled:moving_shapes")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--seed", type=int, default=777)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    pipe = HunyuanVideoPipeline.from_pretrained(Path(find_weights(args.model)), torch_dtype=torch.float32)
    sys.stdout.write(f"{'sigma':>6}{'loss':>9}" + "".join(f"{'+' + name:>10}" for name in (*EXCHANGED, "none")) + "\n")
    for sigma, gains in caption_gains(pipe, args.clips, seed=args.seed).items():
        rest = "".join(f"{gains[name]:10.4f}" for name in (*EXCHANGED, "none"))
        sys.stdout.write(f"{sigma:6.2f}{gains['right']:9.4f}{rest}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
