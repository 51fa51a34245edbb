"""Train the demo model on MovingShapes from scratch: the VAE first, then the DiT with its two text encoders.

    python -m tools.train_demo_model --run out/demo_run --stage all --resume --minutes 60     # again and again
    python -m tools.train_demo_model --run out/demo_run --stage export --export out/demo_model

Everything random is a function of (seed, stage, iteration), so the iteration number is the whole random state and a
run that was stopped and resumed ends in the same weights, bit for bit, as one that was not (same device and threads).
"""

import argparse
import ctypes
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextModel, LlamaModel, PreTrainedTokenizerFast

from tools.demo_model import (
    DIT_SHAPES,
    SHIFT,
    TRAINING,
    VAE_SHAPES,
    DitSize,
    VaeSize,
    build_pipeline,
    build_text_encoders,
    build_tokenizers,
    build_transformer,
    build_vae,
    encode_text,
    export_pipeline,
    fold_whitening,
    num_parameters,
    tokenize,
)
from tools.moving_shapes import ATTRIBUTES, Detector, Scene, caption, render, scene_at, score

Log = Callable[[dict[str, Any]], None]

KL_WEIGHT = 1e-3
MIN_PSNR_DB = 30.0
MIN_SHAPE_SCORE = 0.97
_VAE, _CACHE, _DIT, _EVAL = range(4)  # first words of the random keys
_VAE_IMAGES_FIRST = 2000  # iterations; less where the total is small
_DIT_IMAGES_FIRST = 500
_FIXED = ("seed", "vae", "dit", "num_frames", "height", "width")  # of the recipe, in one run


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that decides the weights. What `_FIXED` does not name may change between calls of one run."""

    seed: int
    vae: VaeSize
    dit: DitSize
    num_frames: int
    height: int
    width: int
    vae_iterations: int
    dit_iterations: int
    batch_scale: float
    vae_lr: float
    dit_lr: float
    cached_clips: int

    def check(self) -> None:
        """Refuse what cannot train.

        Raises:
            ValueError: names the field, the value and the nearest valid value.
        """
        if self.vae not in VAE_SHAPES:
            raise ValueError(f"vae={self.vae!r} must be one of {', '.join(VAE_SHAPES)}")
        if self.dit not in DIT_SHAPES:
            raise ValueError(f"dit={self.dit!r} must be one of {', '.join(DIT_SHAPES)}")
        if self.num_frames < 5 or self.num_frames % 4 != 1:
            near = max(5, 4 * round((self.num_frames - 1) / 4) + 1)
            raise ValueError(f"num_frames={self.num_frames} must be 1 + 4*k and at least 5, nearest is {near}")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value < 32 or value % 16:
                near = max(32, 16 * round(value / 16))
                raise ValueError(f"{name}={value} must be a multiple of 16, at least 32, nearest is {near}")
        for name in ("vae_iterations", "dit_iterations", "cached_clips", "batch_scale", "vae_lr", "dit_lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """Where and how long: nothing here is meant to change the result (other devices round differently)."""

    device: torch.device
    workers: int
    deadline: float  # of time.monotonic()
    checkpoint_s: float
    eval_s: float
    eval_prompts: int
    compile_blocks: bool = False  # of the DiT: minutes at the start of each call, then quicker
    anneal: bool = False  # decay the learning rate over this call's time instead of by iteration
    stop_after: int | None = None  # iterations of this call, for tests

    def autocast(self) -> torch.autocast:
        """bfloat16 arithmetic over float32 master weights."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


# --- files ----------------------------------------------------------------------------------------------------------


def save_atomic(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that a reader finds the old one or the new one, never half of one."""
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    with temporary.open("rb") as f:
        os.fsync(f.fileno())
    temporary.rename(path)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    temporary = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
    temporary.rename(path)


def _write_json(content: dict[str, Any], file: Path) -> None:
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.rename(file)


def open_run(run: Path, recipe: Recipe) -> None:
    """Create the run directory, or make sure that the recipe goes on with the run that it holds.

    Raises:
        ValueError: a field named in `_FIXED` differs.
    """
    run.mkdir(parents=True, exist_ok=True)
    file = run / "recipe.json"
    if file.exists():
        before = json.loads(file.read_text())
        for name in _FIXED:
            old, new = before[name], getattr(recipe, name)
            if old != new:
                raise ValueError(f"{name}={new!r} differs from {old!r} of this run: begin another directory")
    _write_json(asdict(recipe), file)


def open_log(run: Path, stage: str, iteration: int) -> Log:
    """Append JSON lines to curves.jsonl and to standard output, forgetting what came after the checkpoint."""
    file = run / "curves.jsonl"
    if file.exists():
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        kept = [x for x in lines if x["stage"] != stage or x["iteration"] <= iteration]
        temporary = file.with_suffix(".part")
        temporary.write_text("".join(json.dumps(x) + "\n" for x in kept))
        temporary.rename(file)

    def log(entry: dict[str, Any]) -> None:
        line = json.dumps({"stage": stage, **entry})
        with file.open("a") as f:
            f.write(line + "\n")
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    return log


# --- what both stages share -----------------------------------------------------------------------------------------


class Ema:
    """Exponential moving average of the trainable parameters, quick to forget at first."""

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.modules = modules
        self.values = {
            f"{name}.{key}": value.detach().clone()
            for name, module in modules.items()
            for key, value in module.state_dict().items()
        }

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        live = [v for m in self.modules.values() for v in m.state_dict().values()]
        torch._foreach_lerp_(list(self.values.values()), live, 1 - decay)

    def state_of(self, name: str) -> dict[str, Tensor]:
        """State dict of one module."""
        prefix = f"{name}."
        return {k[len(prefix) :]: v for k, v in self.values.items() if k.startswith(prefix)}


def learning_rate(peak: float, iteration: int, total: int, decay_from: float) -> float:
    """Warm-up over 100 iterations, constant, and from `decay_from` of the total a half cosine to 2 % of the peak."""
    warm = min(1.0, (iteration + 1) / 100)
    late = max(0.0, (iteration / total - decay_from) / (1 - decay_from))
    return peak * warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, late))))


class _Batches(Dataset[Any]):
    """Item i is the whole batch of iteration i: any worker makes it, in any order."""

    def __init__(self, make: Callable[[int], Any], total: int) -> None:
        self.make = make
        self.total = total

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, iteration: int) -> Any:
        return self.make(iteration)


def _batches(make: Callable[[int], Any], start: int, total: int, compute: Compute) -> Iterator[Any]:
    loader: DataLoader[Any] = DataLoader(
        _Batches(make, total),
        batch_size=None,
        sampler=range(start, total),
        num_workers=compute.workers,
        prefetch_factor=4 if compute.workers else None,
        pin_memory=compute.device.type == "cuda",
        multiprocessing_context="forkserver" if compute.workers else None,
    )
    return iter(loader)


class Optimizers:
    """Muon for the matrices inside a network, AdamW for everything else, with one learning rate for both.

    A convolution counts as a matrix of its output channels by everything else. In 300 iterations from scratch on the
    same batches the VAE came to 19.1 dB with it and to 15.1 dB with AdamW alone (`docs/demo_model.md`).

    Source: Jordan et al. 2024, Muon (github.com/KellerJordan/Muon); the common rate, Liu et al. 2025
    (arXiv 2502.16982), section 2.2, in `torch.optim.Muon`.
    """

    def __init__(self, modules: dict[str, nn.Module], lr: float, not_muon: Sequence[str]) -> None:
        """`not_muon`: words in the names of parameters that stay with AdamW: embeddings, ends of the network."""
        named = [
            (f"{name}.{key}", p)
            for name, module in modules.items()
            for key, p in module.named_parameters()
            if p.requires_grad
        ]
        self.matrices = [p for key, p in named if p.ndim >= 2 and not any(word in key for word in not_muon)]
        self.views = [p.detach().flatten(1).requires_grad_() for p in self.matrices]  # the same memory
        inside = {id(p) for p in self.matrices}
        rest = [p for _, p in named if id(p) not in inside]
        self.parts: list[torch.optim.Optimizer] = []
        if self.views:
            self.parts.append(torch.optim.Muon(self.views, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.01},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.parts.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True))

    def step(self, lr: float) -> None:
        """One update with the gradients that the parameters hold."""
        for view, matrix in zip(self.views, self.matrices, strict=True):
            view.grad = None if matrix.grad is None else matrix.grad.flatten(1)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)
        for matrix in self.matrices:
            matrix.grad = None

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of each part."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Take up the state that `state_dict` gave."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


class Trainer:
    """The loop of either stage: optimizer, EMA, checkpoints, curves, and the stop at the deadline."""

    def __init__(
        self,
        *,
        stage: str,
        run: Path,
        modules: dict[str, nn.Module],
        total: int,
        lr: float,
        decay_from: float,
        ema_decay: float,
        not_muon: Sequence[str],
        compute: Compute,
    ) -> None:
        self.stage, self.modules, self.total = stage, modules, total
        self.lr, self.decay_from, self.compute = lr, decay_from, compute
        self.file = run / f"{stage}.ckpt"
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self.optimizer = Optimizers(modules, lr, not_muon)
        self.ema = Ema(modules, ema_decay)
        self.iteration, self.seconds = 0, 0.0
        if self.file.exists():
            state = torch.load(self.file, map_location=compute.device, weights_only=True)
            self.ema.values = {key: state["ema"][key] for key in self.ema.values}  # in the order of the modules
            for name, module in modules.items():
                module.load_state_dict(state["modules"][name] if "modules" in state else self.ema.state_of(name))
            if "optimizer" in state:  # a slim checkpoint has neither: it starts from the average, with fresh moments
                self.optimizer.load_state_dict(state["optimizer"])
            self.iteration, self.seconds = state["iteration"], state["seconds"]
        self.log = open_log(run, stage, self.iteration)

    def save(self) -> None:
        """Write the checkpoint: weights, optimizer, EMA, iteration (which is the random state), seconds so far."""
        save_atomic(
            {
                "modules": {name: module.state_dict() for name, module in self.modules.items()},
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.values,
                "iteration": self.iteration,
                "seconds": self.seconds,
            },
            self.file,
        )

    def train(
        self,
        make: Callable[[int], Any],
        loss_of: Callable[[Any, int], tuple[Tensor, dict[str, Tensor]]],
        evaluate: Callable[[], dict[str, Any]],
    ) -> bool:
        """Train until the total, the deadline or stop_after, and checkpoint; True when the total is reached."""
        compute = self.compute
        first, begun = self.iteration, time.monotonic()
        saved = evaluated = first_moment = begun
        window: list[dict[str, Tensor]] = []
        for batch in _batches(make, self.iteration, self.total, compute):
            stopping = time.monotonic() > compute.deadline
            if stopping or (compute.stop_after is not None and self.iteration - first >= compute.stop_after):
                break
            rate = learning_rate(self.lr, self.iteration, self.total, self.decay_from)
            if compute.anneal:
                passed = (time.monotonic() - first_moment) / (compute.deadline - first_moment)
                rate = min(rate, self.lr * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, passed)))))
            loss, parts = loss_of(batch, self.iteration)
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step(rate)
            self.ema.update(self.iteration)
            self.iteration += 1
            window.append({"loss": loss.detach(), "grad_norm": norm.detach(), **parts})
            now = time.monotonic()
            if self.iteration % 50 == 0:
                entry: dict[str, Any] = {"iteration": self.iteration, "seconds": round(self.seconds + now - begun, 1)}
                for key in window[0]:
                    entry[key] = round(float(torch.stack([w[key] for w in window]).mean()), 5)
                if not math.isfinite(entry["loss"]):
                    raise RuntimeError(f"loss={entry['loss']} at iteration {self.iteration}: resume with a lower rate")
                self.log(entry)
                window = []
            if now - saved > compute.checkpoint_s:
                self.seconds += now - begun
                begun = saved = now
                self.save()
            if now - evaluated > compute.eval_s:
                self.log({"iteration": self.iteration, "evaluation": evaluate()})
                evaluated = time.monotonic()
        self.seconds += time.monotonic() - begun
        self.save()
        return self.iteration >= self.total


# --- stage 1: the VAE -----------------------------------------------------------------------------------------------


def _to_input(frames: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """uint8 [B, T, H, W, 3] -> float32 [B, 3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)


@dataclass(frozen=True, slots=True)
class _VaeBatches:
    """Clips for VAE iteration first + i: images to begin with, since many pictures teach edges and colours."""

    recipe: Recipe
    first: int = 0

    def __call__(self, iteration: int) -> Tensor:
        r, iteration = self.recipe, self.first + iteration
        rng = np.random.default_rng([r.seed, _VAE, iteration])
        images_first = min(_VAE_IMAGES_FIRST, 0.25 * r.vae_iterations)
        coin = rng.random()
        crop = min(32, r.height, r.width)
        middle = min(5, r.num_frames)
        if iteration < images_first:
            shape = (1, crop, 48) if coin < 0.65 else (middle, crop, 12)
        elif coin < 0.10:
            shape = (1, 0, 16)
        elif coin < 0.40:  # whole frames: two objects are hardest, and crops seldom hold both
            shape = (r.num_frames, 0, 3)
        elif coin < 0.65:
            shape = (middle, 0, 8)
        else:
            shape = (r.num_frames, crop, 8)
        frames, side, batch = shape
        return torch.stack([self._clip(rng, frames, side) for _ in range(max(1, round(batch * r.batch_scale)))])

    def _clip(self, rng: np.random.Generator, num_frames: int, side: int) -> Tensor:
        """float32 [3, T, h, w]: consecutive frames of a clip, cut to `side` pixels around the object (0: all)."""
        r = self.recipe
        scene = scene_at(r.seed, int(rng.integers(2**40)), num_objects=1 + int(rng.random() < 0.4))
        first = int(rng.integers(r.num_frames - num_frames + 1))
        moments = np.linspace(0, 1, r.num_frames)[first : first + num_frames]
        frames = render(scene, num_frames, r.height, r.width, times=moments.tolist())
        if side:
            still = frames[num_frames // 2].astype(np.int16)
            rows, cols = np.nonzero(still.max(-1) - still.min(-1) > 60)
            pick = int(rng.integers(len(rows)))
            top = int(np.clip(rows[pick] - rng.integers(side), 0, r.height - side))
            left = int(np.clip(cols[pick] - rng.integers(side), 0, r.width - side))
            frames = frames[:, top : top + side, left : left + side]
        return _to_input(np.ascontiguousarray(frames)[None])[0]


def _edge_weight(video: Tensor) -> Tensor:
    """Weights [B, 1, T, H, W] of mean 1 that count pixels near an edge up to about five times."""
    image = video.transpose(1, 2).flatten(0, 1)  # [B*T, 3, H, W]: pooling images is quicker than pooling clips
    high = F.max_pool2d(image, 3, 1, 1)
    low = -F.max_pool2d(-image, 3, 1, 1)
    weight = 1 + 2 * (high - low).amax(1, keepdim=True)
    weight = weight.unflatten(0, (video.shape[0], -1)).transpose(1, 2)
    return weight / weight.mean()


def moments_of(vae: AutoencoderKLHunyuanVideo, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance [B, C, T', H', W'] float32 of the latents of video [B, 3, T, H, W], not tiled."""
    mean, logvar = vae.quant_conv(vae.encoder(video)).float().chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def vae_loss(
    vae: AutoencoderKLHunyuanVideo, video: Tensor, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Edge-weighted L1 + MSE and a small KL of the reconstruction of video [B, 3, T, H, W] in [-1, 1]."""
    return loss_with_kl(partial(_decoded, vae), video, *moments_of(vae, video), generator)


def _decoded(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:
    video: Tensor = vae.decoder(vae.post_quant_conv(latents))
    return video.float()


def loss_with_kl(
    decode: Callable[[Tensor], Tensor], video: Tensor, mean: Tensor, logvar: Tensor, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of any family's VAE, whose latents have this mean and log-variance and are decoded by `decode`."""
    loss, parts = _reconstruction_loss(decode, video, mean, logvar, generator)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return loss + KL_WEIGHT * kl, {**parts, "kl": kl.detach(), "latent_std": mean.detach().std()}


def _reconstruction_loss(
    decode: Callable[[Tensor], Tensor], video: Tensor, mean: Tensor, logvar: Tensor, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    error = (decode(mean + torch.exp(0.5 * logvar) * noise) - video).abs()
    loss = (_edge_weight(video) * (error + error.square())).mean()
    return loss, {"mse": error.detach().square().mean()}


def reconstruct(vae: AutoencoderKLHunyuanVideo, frames: Tensor) -> Tensor:
    """uint8 [B, T, H, W, 3] through the class's own encode and decode (framewise tiles and all), as shipped."""
    video = (frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1).to(vae.dtype)
    back: Tensor = vae.decode(vae.encode(video).latent_dist.mode()).sample
    frames = ((back.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return frames.permute(0, 2, 3, 4, 1)


@torch.no_grad()
def evaluate_vae(vae: AutoencoderKLHunyuanVideo, recipe: Recipe, num_clips: int) -> dict[str, float]:
    """Mean PSNR (dB, per clip) and the detector's scores on reconstructions of clips of all combinations."""
    detector = Detector()
    psnr: list[float] = []
    rights: list[dict[str, bool]] = []
    for first in range(0, num_clips, 8):
        scenes = [scene_at(recipe.seed + 1_000_003, i, split="any") for i in range(first, min(first + 8, num_clips))]
        frames = np.stack([render(s, recipe.num_frames, recipe.height, recipe.width) for s in scenes])
        back = reconstruct(vae, torch.from_numpy(frames).to(vae.device)).cpu().numpy()
        for scene, real, made in zip(scenes, frames, back, strict=True):
            mse = np.square(real.astype(np.float32) - made.astype(np.float32)).mean() / 255**2
            psnr.append(-10 * math.log10(max(float(mse), 1e-10)))
            rights += score(scene, detector(made))
    result = {"clips": num_clips, "psnr_db": round(float(np.mean(psnr)), 2), "psnr_db_min": round(min(psnr), 2)}
    for name in (*ATTRIBUTES, "all"):
        result[name] = round(sum(r[name] for r in rights) / len(rights), 4)
    return result


def _generator(compute: Compute, *key: int) -> torch.Generator:
    """A generator on the device that only `key` decides."""
    word = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator(compute.device).manual_seed(word % 2**63)


def train_vae(run: Path, recipe: Recipe, compute: Compute) -> bool:
    """Train the VAE until its total or the deadline; True when the total is reached."""
    torch.manual_seed(recipe.seed)
    vae = build_vae(recipe.vae).to(compute.device)
    trainer = Trainer(
        stage="vae",
        run=run,
        modules={"vae": vae},
        total=recipe.vae_iterations,
        lr=recipe.vae_lr,
        decay_from=0.5,
        ema_decay=0.998,
        not_muon=("conv_in", "conv_out"),
        compute=compute,
    )

    def loss_of(video: Tensor, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        video = video.to(compute.device, non_blocking=True)
        with compute.autocast():
            return vae_loss(vae, video, _generator(compute, recipe.seed, _VAE, iteration, 1))

    def evaluate() -> dict[str, Any]:
        return evaluate_vae(_vae_of(trainer.ema.state_of("vae"), recipe, compute), recipe, compute.eval_prompts)

    trainer.log({"iteration": trainer.iteration, "recipe": asdict(recipe), "device": str(compute.device)})
    done = trainer.train(_VaeBatches(recipe), loss_of, evaluate)
    trainer.log({"iteration": trainer.iteration, "evaluation": evaluate()})
    return done


def _vae_of(state: dict[str, Tensor], recipe: Recipe, compute: Compute) -> AutoencoderKLHunyuanVideo:
    vae = build_vae(recipe.vae).to(compute.device)
    vae.load_state_dict(state)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def finish_vae(run: Path, recipe: Recipe, compute: Compute, *, accept: bool) -> AutoencoderKLHunyuanVideo:
    """The VAE that the DiT is trained on: averaged weights, whitened latents, saved once as vae.safetensors.

    Args:
        accept: take it even if it misses the targets.
    Raises:
        ValueError: no VAE checkpoint, or the VAE misses MIN_PSNR_DB or MIN_SHAPE_SCORE and is not accepted.
    """
    file = run / "vae.safetensors"
    if file.exists():
        return _vae_of(load_file(file, device=str(compute.device)), recipe, compute)
    checkpoint = run / "vae.ckpt"
    if not checkpoint.exists():
        raise ValueError(f"run={str(run)!r} holds no vae.ckpt: train with --stage vae first")
    state = torch.load(checkpoint, map_location=compute.device, weights_only=True)
    prefix = "vae."
    vae = _vae_of({k[len(prefix) :]: v for k, v in state["ema"].items()}, recipe, compute)
    scores = evaluate_vae(vae, recipe, compute.eval_prompts)
    if not accept and (scores["psnr_db"] < MIN_PSNR_DB or scores["shape"] < MIN_SHAPE_SCORE):
        raise ValueError(
            f"psnr_db={scores['psnr_db']}, shape={scores['shape']} of the VAE: need {MIN_PSNR_DB} dB and "
            f"{MIN_SHAPE_SCORE}; train it longer, or pass --accept-vae"
        )
    fold_whitening(vae, *aggregate_moments(partial(moments_of, vae), recipe, compute.device))
    about = {"iteration": state["iteration"], "seconds": round(state["seconds"], 1), **scores}
    _write_json(about, run / "vae.json")
    _save_tensors(vae.state_dict(), file)
    return vae


def train_decoder(run: Path, recipe: Recipe, compute: Compute, iterations: int) -> bool:
    """Train the decoder of a finished VAE on, its latents fixed, so that a DiT trained on them stays as it is.

    At the end the run's vae.safetensors has the better decoder; True when `iterations` are done.
    Raises:
        ValueError: the run has no finished VAE.
    """
    file = run / "vae.safetensors"
    if not file.exists():
        raise ValueError(f"run={str(run)!r} holds no vae.safetensors: train with --stage dit first")
    vae = build_vae(recipe.vae).to(compute.device)
    vae.load_state_dict(load_file(file, device=str(compute.device)))
    trainer = Trainer(
        stage="decoder",
        run=run,
        modules={"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv},
        total=iterations,
        lr=recipe.vae_lr,
        decay_from=0.2,
        ema_decay=0.998,
        not_muon=("conv_in", "conv_out"),
        compute=compute,
    )

    def loss_of(video: Tensor, iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        video = video.to(compute.device, non_blocking=True)
        generator = _generator(compute, recipe.seed, _VAE, recipe.vae_iterations + iteration, 1)
        with compute.autocast():
            with torch.no_grad():
                mean, logvar = moments_of(vae, video)
            return _reconstruction_loss(partial(_decoded, vae), video, mean, logvar, generator)

    def better() -> AutoencoderKLHunyuanVideo:
        averaged = vae.state_dict()
        for name in trainer.modules:
            averaged |= {f"{name}.{key}": value for key, value in trainer.ema.state_of(name).items()}
        return _vae_of(averaged, recipe, compute)

    def evaluate() -> dict[str, Any]:
        return evaluate_vae(better(), recipe, compute.eval_prompts)

    trainer.log({"iteration": trainer.iteration, "recipe": asdict(recipe), "device": str(compute.device)})
    done = trainer.train(_VaeBatches(recipe, first=recipe.vae_iterations), loss_of, evaluate)
    scores = evaluate()
    trainer.log({"iteration": trainer.iteration, "evaluation": scores})
    about = json.loads((run / "vae.json").read_text())
    about |= {"decoder_iteration": trainer.iteration, "decoder_seconds": round(trainer.seconds, 1), **scores}
    _save_tensors(better().state_dict(), file)
    _write_json(about, run / "vae.json")
    return done


# --- stage 2: the DiT and the text encoders ---------------------------------------------------------------------------


def _cached_scene(recipe: Recipe, index: int, stage: int = _CACHE) -> Scene:
    return scene_at(recipe.seed * 16 + stage + 1, index)


# Video [B, 3, T, H, W] float32 to mean and log-variance of its latents: a family's VAE as the shared stages see it.
Moments = Callable[[Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def aggregate_moments(
    moments: Moments, recipe: Recipe, device: torch.device, num_clips: int = 256
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] of latents *sampled* for clips that no later stage sees.

    A channel that the VAE hardly uses has means that barely move and a variance near one. Divided by the spread of
    its samples it stays small, and the DiT loses nothing on it; divided by that of its means it would be as loud as
    the channels that say what is in the picture.
    """
    sums = []
    for chunk in range(num_clips // 16):
        mean, logvar = moments(_to_input(_RenderChunks(recipe, 16, _EVAL)(chunk).numpy()).to(device))
        second = mean.double().square() + logvar.double().exp()
        sums.append(torch.stack([mean.double().mean((0, 2, 3, 4)), second.mean((0, 2, 3, 4))]))
    mean, square = torch.stack(sums).mean(0)
    return mean, (square - mean.square()).sqrt()


@dataclass(frozen=True, slots=True)
class _RenderChunks:
    """uint8 [size, T, H, W, 3] of scenes chunk*size and following."""

    recipe: Recipe
    size: int
    stage: int = _CACHE

    def __call__(self, chunk: int) -> Tensor:
        r = self.recipe
        scenes = [_cached_scene(r, chunk * self.size + i, self.stage) for i in range(self.size)]
        return torch.from_numpy(np.stack([render(s, r.num_frames, r.height, r.width) for s in scenes]))


@torch.no_grad()
def cache_latents(moments: Moments, run: Path, recipe: Recipe, compute: Compute) -> Tensor:
    """Latents float16 [N, C, T', H', W'] of the training clips, encoded once and kept in latents.safetensors."""
    file = run / "latents.safetensors"
    if file.exists():
        latents = load_file(file)["latents"]
        if len(latents) == recipe.cached_clips:
            return latents
    size = math.gcd(recipe.cached_clips, 16)
    parts = []
    for frames in _batches(_RenderChunks(recipe, size), 0, recipe.cached_clips // size, compute):
        video = _to_input(frames.numpy()).to(compute.device)
        with compute.autocast():
            parts.append(moments(video)[0].half().cpu())
    latents = torch.cat(parts)
    _save_tensors({"latents": latents}, file)
    return latents


def _images_only(recipe: Recipe, iteration: int) -> bool:
    """Whether this DiT iteration sees only the first latent frame."""
    return iteration < min(_DIT_IMAGES_FIRST, 0.15 * recipe.dit_iterations)


@dataclass(frozen=True, slots=True)
class _DitBatches:
    """Indices into the cache and fresh captions for DiT iteration i; one in ten is empty, for guidance."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerFast
    tokenizer_2: PreTrainedTokenizerFast
    same_length: bool

    def __call__(self, iteration: int) -> dict[str, Tensor]:
        r = self.recipe
        rng = np.random.default_rng([r.seed, _DIT, iteration])
        batch = (64 if _images_only(r, iteration) else 32) * r.batch_scale
        index = rng.integers(r.cached_clips, size=max(1, round(batch)))
        captions = ["" if rng.random() < 0.1 else caption(_cached_scene(r, int(i)), rng, omit=0.1) for i in index]
        tokens = tokenize(captions, self.tokenizer, self.tokenizer_2, same_length=self.same_length)
        return {"index": torch.from_numpy(index), **tokens}


def noise_levels(count: int, generator: torch.Generator) -> Tensor:
    """Sigmas [count] in (0, 1): logistic of N(log SHIFT, 1), a tenth uniform.

    Source: logit-normal sampling, Esser et al. 2024 (arXiv 2403.03206), section 3.1.
    """
    device = generator.device
    sigma = torch.sigmoid(math.log(SHIFT) + torch.randn(count, generator=generator, device=device))
    uniform = torch.rand(count, generator=generator, device=device)
    return torch.where(torch.rand(count, generator=generator, device=device) < 0.1, uniform, sigma)


def kept_scores(compute: Compute) -> AbstractContextManager[None]:
    """Attention of the text encoders in the form that is quick to differentiate on this device."""
    return sdpa_kernel(SDPBackend.MATH) if compute.device.type == "cpu" else nullcontext()


class PlainAttention:
    """HunyuanVideo's joint attention by two matrix products, for training on a CPU.

    torch's CPU kernels for attention keep no scores, and going back through them took 1.1 s of a step's 1.9 s at 12
    heads of 16; here the scores are small and kept.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Video tokens [B, S, N*D] and text tokens [B, L, N*D], in and out; attention_mask bool [B, 1, 1, S + L]."""
        num_video = hidden_states.shape[1]

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)  # [B, S, N*D] -> [B, N, S, D]

        dual = attn.add_q_proj is not None
        text_q, text_k, text_v = (
            (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj) if dual else (attn.to_q, attn.to_k, attn.to_v)
        )
        norm_q, norm_k = (attn.norm_added_q, attn.norm_added_k) if dual else (attn.norm_q, attn.norm_k)
        q = apply_rotary_emb(attn.norm_q(heads(attn.to_q(hidden_states))), image_rotary_emb)
        k = apply_rotary_emb(attn.norm_k(heads(attn.to_k(hidden_states))), image_rotary_emb)
        q = torch.cat([q, norm_q(heads(text_q(encoder_hidden_states)))], dim=2).flatten(0, 1)
        k = torch.cat([k, norm_k(heads(text_k(encoder_hidden_states)))], dim=2).flatten(0, 1)
        v = torch.cat([heads(attn.to_v(hidden_states)), heads(text_v(encoder_hidden_states))], dim=2).flatten(0, 1)
        hidden = attention_mask.logical_not().to(v.dtype) * -30000.0  # [B, 1, 1, S + L]
        bias = hidden.expand(-1, attn.heads, -1, -1).flatten(0, 1)
        scores = torch.baddbmm(bias, q.to(v.dtype), k.to(v.dtype).transpose(1, 2), alpha=q.shape[-1] ** -0.5)
        out = torch.bmm(scores.softmax(dim=-1, dtype=scores.dtype), v)
        out = out.unflatten(0, (-1, attn.heads)).transpose(1, 2).flatten(2)
        video, text = out[:, :num_video], out[:, num_video:]
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[0](video)
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text


def dit_loss(
    dit: HunyuanVideoTransformer3DModel,
    llama: LlamaModel,
    clip: CLIPTextModel,
    clean: Tensor,
    tokens: dict[str, Tensor],
    generator: torch.Generator,
) -> Tensor:
    """Flow matching: mean square of the predicted velocity (noise - clean) of clean [B, C, T', H', W'] float32."""
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    sigma = noise_levels(len(clean), generator)
    s = sigma.view(-1, 1, 1, 1, 1)
    text, mask, pooled = encode_text(llama, clip, tokens)
    velocity = dit(
        hidden_states=(1 - s) * clean + s * noise,
        timestep=sigma * 1000,
        encoder_hidden_states=text,
        encoder_attention_mask=mask,
        pooled_projections=pooled,
        guidance=torch.full_like(sigma, 6000.0),
        return_dict=False,
    )[0]
    return F.mse_loss(velocity.float(), noise - clean)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parts:
    """Everything that the second stage trains, and its tokenizers."""

    dit: HunyuanVideoTransformer3DModel
    llama: LlamaModel
    clip: CLIPTextModel
    tokenizer: PreTrainedTokenizerFast
    tokenizer_2: PreTrainedTokenizerFast

    def modules(self) -> dict[str, nn.Module]:
        return {"dit": self.dit, "llama": self.llama, "clip": self.clip}


def _build_parts(run: Path, recipe: Recipe, compute: Compute) -> _Parts:
    """Fresh modules; the tokenizers are kept with the run, so that every later call has the same."""
    folders = [run / "tokenizer", run / "tokenizer_2"]
    if not folders[1].exists():
        for made, folder in zip(build_tokenizers(), folders, strict=True):
            made.save_pretrained(folder)
    tokenizer, tokenizer_2 = (PreTrainedTokenizerFast.from_pretrained(folder) for folder in folders)
    torch.manual_seed(recipe.seed)
    dit = build_transformer(recipe.dit, VAE_SHAPES[recipe.vae].latent_channels).to(compute.device)
    llama, clip = build_text_encoders(recipe.dit, tokenizer, tokenizer_2)
    llama.to(compute.device)
    clip.to(compute.device)
    return _Parts(dit=dit, llama=llama, clip=clip, tokenizer=tokenizer, tokenizer_2=tokenizer_2)


def train_dit(run: Path, recipe: Recipe, compute: Compute, *, accept_vae: bool) -> bool:
    """Train the DiT and text encoders on a finished VAE's latents; True when the total is reached."""
    vae = finish_vae(run, recipe, compute, accept=accept_vae)
    latents = cache_latents(partial(moments_of, vae), run, recipe, compute)
    latents = latents.to(compute.device) if compute.device.type == "cuda" else latents
    parts = _build_parts(run, recipe, compute)
    if compute.device.type == "cpu":
        for block in (*parts.dit.transformer_blocks, *parts.dit.single_transformer_blocks):
            block.attn.set_processor(PlainAttention())
            if compute.compile_blocks:
                block.compile(dynamic=False)
    trainer = Trainer(
        stage="dit",
        run=run,
        modules=parts.modules(),
        total=recipe.dit_iterations,
        lr=recipe.dit_lr,
        decay_from=0.6,
        ema_decay=0.999,
        not_muon=("embed", "proj_out", "norm_out"),
        compute=compute,
    )

    def loss_of(batch: dict[str, Tensor], iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        clean = latents[batch.pop("index").to(latents.device)].to(compute.device).float()
        if _images_only(recipe, iteration):
            clean = clean[:, :, :1]  # first what things look like, then how they move
        tokens = {k: v.to(compute.device, non_blocking=True) for k, v in batch.items()}
        with compute.autocast(), kept_scores(compute):
            generator = _generator(compute, recipe.seed, _DIT, iteration, 1)
            return dit_loss(parts.dit, parts.llama, parts.clip, clean, tokens, generator), {}

    def evaluate() -> dict[str, Any]:
        averaged = _averaged_parts(run, recipe, compute, trainer.ema)
        return {
            split: evaluate_prompts(averaged, vae, recipe, compute, split=split, steps=16)
            for split in ("train", "held_out")
        }

    trainer.log({"iteration": trainer.iteration, "recipe": asdict(recipe), "device": str(compute.device)})
    batches = _DitBatches(recipe, parts.tokenizer, parts.tokenizer_2, same_length=compute.compile_blocks)
    done = trainer.train(batches, loss_of, evaluate)
    trainer.log({"iteration": trainer.iteration, "evaluation": evaluate()})
    return done


def _averaged_parts(run: Path, recipe: Recipe, compute: Compute, ema: Ema) -> _Parts:
    parts = _build_parts(run, recipe, compute)
    for name, module in parts.modules().items():
        module.load_state_dict(ema.state_of(name))
        module.eval().requires_grad_(False)
    return parts


@torch.no_grad()
def evaluate_prompts(
    parts: _Parts, vae: AutoencoderKLHunyuanVideo, recipe: Recipe, compute: Compute, *, split: Any, steps: int
) -> dict[str, float]:
    """Share of objects whose attributes the detector finds in clips rendered from fresh captions by the pipeline."""
    pipe = build_pipeline(
        vae=vae,
        transformer=parts.dit,
        llama=parts.llama,
        clip=parts.clip,
        tokenizer=parts.tokenizer,
        tokenizer_2=parts.tokenizer_2,
    )
    detector = Detector()
    rights: list[dict[str, bool]] = []
    for first in range(0, compute.eval_prompts, 16):
        numbers = range(first, min(first + 16, compute.eval_prompts))
        scenes = [scene_at(recipe.seed + 2_000_003, i, split=split) for i in numbers]
        wording = [np.random.default_rng([recipe.seed, _EVAL, i]) for i in numbers]
        video = pipe(
            prompt=[caption(s, rng) for s, rng in zip(scenes, wording, strict=True)],
            height=recipe.height,
            width=recipe.width,
            num_frames=recipe.num_frames,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(i) for i in numbers],
            output_type="np",
        ).frames
        for scene, frames in zip(scenes, video, strict=True):
            rights += score(scene, detector(frames))
    return {name: round(sum(r[name] for r in rights) / len(rights), 4) for name in (*ATTRIBUTES, "all")}


# --- export ---------------------------------------------------------------------------------------------------------

_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---
# MovingShapes demo model

A HunyuanVideo pipeline of {parameters:,} parameters ({vae:,} VAE, {dit:,} DiT, {text:,} text encoders; {heads} heads of
{head_dim}), trained from scratch on the procedural world of `tools/moving_shapes.py` and on nothing else: no pictures,
no captions and no weights from anywhere else. It draws one or two coloured shapes that move over a neutral background.

```python
from diffusers import HunyuanVideoPipeline

pipe = HunyuanVideoPipeline.from_pretrained("path/to/this/directory")
video = pipe("{example}", height={height}, width={width}, num_frames={num_frames}).frames[0]
```
Nothing else has to be passed: the default prompt template and any `guidance_scale` work (the embedded guidance is
trained to nothing). `negative_prompt=""` with `true_cfg_scale` above 1 gives classifier-free guidance.

- Words it knows: {words}.
- One clip is {num_frames} frames of {height}x{width}; other sizes run but were not trained.
- Weights: {dtype}, moving averages, after {vae_iterations:,} VAE and {dit_iterations:,} DiT iterations, seed {seed}.
- It knows nothing but MovingShapes; other prompts give some MovingShapes clip.
"""


def export(run: Path, out: Path, recipe: Recipe, compute: Compute, dtype: torch.dtype) -> int:
    """Write the pipeline directory from the finished VAE and the averaged DiT checkpoint; return its bytes.

    Raises:
        ValueError: the run has no finished VAE or no DiT checkpoint yet.
    """
    for name, hint in (("vae.safetensors", "--stage dit"), ("dit.ckpt", "--stage dit")):
        if not (run / name).exists():
            raise ValueError(f"run={str(run)!r} holds no {name}: train with {hint} first")
    vae = _vae_of(load_file(run / "vae.safetensors", device=str(compute.device)), recipe, compute)
    state = torch.load(run / "dit.ckpt", map_location=compute.device, weights_only=True)
    parts = _build_parts(run, recipe, compute)
    ema = Ema(parts.modules(), 0.0)
    ema.values = state["ema"]
    parts = _averaged_parts(run, recipe, compute, ema)
    about_vae = json.loads((run / "vae.json").read_text())
    pipe = build_pipeline(
        vae=vae,
        transformer=parts.dit,
        llama=parts.llama,
        clip=parts.clip,
        tokenizer=parts.tokenizer,
        tokenizer_2=parts.tokenizer_2,
    )
    shape = DIT_SHAPES[recipe.dit]
    scenes = [scene_at(0, i, num_objects=1) for i in range(400)]
    words = sorted({w for s in scenes for w in caption(s).split()})
    card = _CARD.format(
        parameters=num_parameters(vae, *parts.modules().values()),
        vae=num_parameters(vae),
        dit=num_parameters(parts.dit),
        text=num_parameters(parts.llama, parts.clip),
        heads=shape.heads,
        head_dim=shape.head_dim,
        example=caption(scenes[0]),
        height=recipe.height,
        width=recipe.width,
        num_frames=recipe.num_frames,
        words=", ".join(words),
        dtype=str(dtype).removeprefix("torch."),
        vae_iterations=about_vae["iteration"],
        dit_iterations=state["iteration"],
        seed=recipe.seed,
    )
    training = {
        "recipe": asdict(recipe),
        "vae": about_vae,
        "dit": {"iteration": state["iteration"], "seconds": round(state["seconds"], 1)},
    }
    return export_pipeline(pipe, out, dtype, card, training)


def start_from(exported: Path, run: Path, recipe: Recipe) -> None:
    """Begin a run with the weights of an exported pipeline: its VAE is finished, its DiT goes on with fresh moments.

    Raises:
        ValueError: not an exported pipeline, `run` holds a run already, or a field named in `_FIXED` differs.
    """
    if not (exported / TRAINING).is_file():
        raise ValueError(f"start_from={str(exported)!r} holds no {TRAINING}: name a directory that --export wrote")
    if (run / "recipe.json").exists():
        raise ValueError(f"run={str(run)!r} already holds a run: leave out --start-from to go on with it")
    training = json.loads((exported / TRAINING).read_text())
    run.mkdir(parents=True, exist_ok=True)
    _write_json(training["recipe"], run / "recipe.json")
    open_run(run, recipe)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(exported / name, run / name, dirs_exist_ok=True)
    folders = {"dit": "transformer", "llama": "text_encoder", "clip": "text_encoder_2"}
    average = {
        f"{name}.{key}": value.float()
        for name, folder in folders.items()
        for file in sorted((exported / folder).glob("*.safetensors"))
        for key, value in load_file(file).items()
    }
    save_atomic({"ema": average, **training["dit"]}, run / "dit.ckpt")
    _write_json(training["vae"], run / "vae.json")
    (vae_file,) = (exported / "vae").glob("*.safetensors")
    _save_tensors({key: value.float() for key, value in load_file(vae_file).items()}, run / "vae.safetensors")


def slim(run: Path, out: Path) -> None:
    """Copy a run without optimizer state and cached latents: about an eighth of the bytes, enough to go on from.

    Training resumed from the copy starts at the averaged weights with a fresh optimizer.
    """
    out.mkdir(parents=True, exist_ok=True)
    for stage in ("vae", "dit"):
        if (run / f"{stage}.ckpt").exists():
            state = torch.load(run / f"{stage}.ckpt", map_location="cpu", weights_only=True)
            save_atomic({key: state[key] for key in ("ema", "iteration", "seconds")}, out / f"{stage}.ckpt")
    for name in ("recipe.json", "curves.jsonl", "vae.safetensors", "vae.json"):
        if (run / name).exists():
            shutil.copyfile(run / name, out / name)
    for name in ("tokenizer", "tokenizer_2"):
        if (run / name).exists():
            shutil.copytree(run / name, out / name, dirs_exist_ok=True)


# --- command line ---------------------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Tell glibc to keep big freed blocks: a training step else spends most of its time on page faults.

    No effect, and no error, where the C library is not glibc.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # from <malloc.h>
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, resume or export, as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="directory of checkpoints and curves")
    parser.add_argument("--resume", action="store_true", help="continue the run that the directory holds, if any")
    parser.add_argument("--start-from", type=Path, help="begin the run with the weights of an exported pipeline")
    parser.add_argument(
        "--stage", choices=("vae", "dit", "all", "decoder", "evaluate-vae", "export", "slim"), required=True
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop, with a checkpoint, after so long")
    parser.add_argument(
        "--anneal",
        action="store_true",
        help="decay the learning rate over the minutes of this call, where nobody knows how many iterations fit; "
        "not repeatable bit for bit",
    )
    parser.add_argument("--vae-minutes", type=float, default=math.inf, help="--stage all: then go on to the DiT")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    parser.add_argument("--workers", type=int, default=0, help="processes that render batches ahead (0: in this one)")
    parser.add_argument("--compile", action="store_true", help="the DiT's blocks, on a CPU: minutes, then quicker")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae", choices=get_args(VaeSize), default="small")
    parser.add_argument("--dit", choices=get_args(DitSize), default="base")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--vae-iterations", type=int, default=6000)
    parser.add_argument("--dit-iterations", type=int, default=20000)
    parser.add_argument("--decoder-iterations", type=int, default=1500, help="of --stage decoder")
    parser.add_argument("--batch-scale", type=float, default=1.0, help="multiplies every batch size")
    parser.add_argument("--vae-lr", type=float, default=1.2e-3)
    parser.add_argument("--dit-lr", type=float, default=1e-3)
    parser.add_argument("--cached-clips", type=int, default=8192)
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0)
    parser.add_argument("--eval-minutes", type=float, default=20.0)
    parser.add_argument("--eval-prompts", type=int, default=64)
    parser.add_argument("--accept-vae", action="store_true", help="train the DiT on a VAE that misses its targets")
    parser.add_argument("--export", type=Path, help="pipeline directory to write after the chosen stage")
    parser.add_argument("--export-dtype", choices=("bfloat16", "float16"), default="bfloat16")
    args = parser.parse_args(argv)
    recipe = Recipe(
        seed=args.seed,
        vae=args.vae,
        dit=args.dit,
        num_frames=args.frames,
        height=args.height,
        width=args.width,
        vae_iterations=args.vae_iterations,
        dit_iterations=args.dit_iterations,
        batch_scale=args.batch_scale,
        vae_lr=args.vae_lr,
        dit_lr=args.dit_lr,
        cached_clips=args.cached_clips,
    )
    recipe.check()
    if args.anneal and math.isinf(args.minutes):
        raise ValueError("anneal=True needs --minutes: the time over which to decay")
    if args.stage in ("export", "slim") and args.export is None:
        raise ValueError(f"stage={args.stage!r} needs --export DIRECTORY")
    if args.stage in ("vae", "dit", "all") and not args.resume and (args.run / "recipe.json").exists():
        raise ValueError(f"run={str(args.run)!r} already holds a run: pass --resume to continue it")
    if args.stage == "slim":
        slim(args.run, args.export)
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    begun = time.monotonic()
    compute = Compute(
        device=torch.device(args.device),
        workers=args.workers,
        deadline=begun + 60 * args.minutes,
        checkpoint_s=60 * args.checkpoint_minutes,
        eval_s=60 * args.eval_minutes,
        eval_prompts=args.eval_prompts,
        compile_blocks=args.compile,
        anneal=args.anneal,
    )
    if args.start_from is not None:
        start_from(args.start_from, args.run, recipe)
    if args.stage in ("vae", "dit", "all", "decoder"):
        open_run(args.run, recipe)
    else:  # look at a run: its own recipe, whatever the other arguments
        recipe = Recipe(**json.loads((args.run / "recipe.json").read_text()))
    if args.stage == "evaluate-vae":
        state = torch.load(args.run / "vae.ckpt", map_location=compute.device, weights_only=True)
        vae = _vae_of({k.removeprefix("vae."): v for k, v in state["ema"].items()}, recipe, compute)
        scores = evaluate_vae(vae, recipe, args.eval_prompts)
        sys.stdout.write(json.dumps({"iteration": state["iteration"], **scores}) + "\n")
    if args.stage in ("vae", "all"):
        sooner = min(compute.deadline, begun + 60 * args.vae_minutes)
        done = train_vae(args.run, recipe, replace(compute, deadline=sooner))
        if args.stage == "all" and not done and time.monotonic() > compute.deadline:
            return 0
    if args.stage == "decoder":
        train_decoder(args.run, recipe, compute, args.decoder_iterations)
    if args.stage in ("dit", "all"):
        train_dit(args.run, recipe, compute, accept_vae=args.accept_vae)
    if args.export is not None:
        size = export(args.run, args.export, recipe, compute, getattr(torch, args.export_dtype))
        sys.stdout.write(f"{args.export}: {size} bytes\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
