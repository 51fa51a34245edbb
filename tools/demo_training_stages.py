"""The two stages of a demo model's training, as every family has them: its VAE, then a DiT on that VAE's latents."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tools.demo_model import SHIFT, VaeSize
from tools.demo_training import Compute, Losses, Recipe, Trainer, batches, save_tensors, state_of, write_json
from tools.moving_shapes import ATTRIBUTES, Detector, Scene, Split, caption, render, scene_at, score

KL_WEIGHT = 1e-3
MIN_PSNR_DB = 30.0
MIN_SHAPE_SCORE = 0.97
EARLY_SHIFT = 12.0
VAE_DRAWS, CACHE_DRAWS, DIT_DRAWS, EVAL_DRAWS, PAIR_DRAWS = range(5)  # first words of the random keys
_VAE_IMAGES_FIRST = 2000  # iterations; less where the total is small
_DIT_IMAGES_FIRST = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeKind:
    """A family's VAE as the stages see it. Its latents are raw in here: what whitens them is added at the end."""

    build: Callable[[VaeSize], Any]
    moments: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    """(vae, video fp32 [B, 3, T, H, W] in [-1, 1]) to mean and log-variance fp32 [B, C, T', H', W']; has gradients."""
    decode: Callable[[Any, Tensor], Tensor]
    """(vae, latents [B, C, T', H', W']) to video fp32 [B, 3, T, H, W]; has gradients."""
    decoder: Callable[[Any], dict[str, nn.Module]]
    """Everything behind the latents, by its name in the state dict."""
    finish: Callable[[Any, Tensor, Tensor], dict[str, Tensor]]
    """(vae, mean [C], std [C]) to what is kept of a finished VAE, whose latents these numbers whiten."""
    load: Callable[[Any, dict[str, Tensor]], Any]
    """(fresh vae, what is kept) to the finished VAE."""

    def from_state(self, state: dict[str, Tensor], recipe: Recipe, compute: Compute) -> Any:
        """A VAE to look at: its weights do not change."""
        vae = self.build(recipe.vae).to(compute.device)
        vae.load_state_dict(state)
        return vae.eval().requires_grad_(False)

    def finished(self, state: dict[str, Tensor], recipe: Recipe, compute: Compute) -> Any:
        """The VAE of which `state` was kept."""
        return self.load(self.build(recipe.vae).to(compute.device), state).eval().requires_grad_(False)


# --- stage 1: the VAE -----------------------------------------------------------------------------------------------


def to_input(frames: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """uint8 [B, T, H, W, 3] -> float32 [B, 3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)


@dataclass(frozen=True, slots=True)
class VaeBatches:
    """Clips for VAE iteration first + i: images to begin with, since many pictures teach edges and colours."""

    recipe: Recipe
    first: int = 0

    def __call__(self, iteration: int) -> Tensor:
        r, iteration = self.recipe, self.first + iteration
        rng = np.random.default_rng([r.seed, VAE_DRAWS, iteration])
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
        return to_input(np.ascontiguousarray(frames)[None])[0]


def _edge_weight(video: Tensor) -> Tensor:
    """Weights [B, 1, T, H, W] of mean 1 that count pixels near an edge up to about five times."""
    image = video.transpose(1, 2).flatten(0, 1)  # [B*T, 3, H, W]: pooling images is quicker than pooling clips
    high = F.max_pool2d(image, 3, 1, 1)
    low = -F.max_pool2d(-image, 3, 1, 1)
    weight = 1 + 2 * (high - low).amax(1, keepdim=True)
    weight = weight.unflatten(0, (video.shape[0], -1)).transpose(1, 2)
    return weight / weight.mean()


def vae_loss(kind: VaeKind, vae: nn.Module, video: Tensor, generator: torch.Generator) -> Losses:
    """Edge-weighted L1 + MSE and a small KL of the reconstruction of video [B, 3, T, H, W] in [-1, 1]."""
    mean, logvar = kind.moments(vae, video)
    loss, parts = _reconstruction_loss(kind, vae, video, mean, logvar, generator)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return loss + KL_WEIGHT * kl, {**parts, "kl": kl.detach(), "latent_std": mean.detach().std()}


def _reconstruction_loss(
    kind: VaeKind,
    vae: nn.Module,
    video: Tensor,
    mean: Tensor,
    logvar: Tensor,
    generator: torch.Generator,
    latent_noise: float = 0.0,
) -> Losses:
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    std = torch.exp(0.5 * logvar)
    if latent_noise:
        level = torch.rand(len(mean), 1, 1, 1, 1, generator=generator, device=mean.device) * latent_noise
        std = torch.hypot(std, level * mean.std((0, 2, 3, 4), keepdim=True))
    error = (kind.decode(vae, mean + std * noise) - video).abs()
    loss = (_edge_weight(video) * (error + error.square())).mean()
    return loss, {"mse": error.detach().square().mean()}


def train_vae(kind: VaeKind, run: Path, recipe: Recipe, compute: Compute) -> bool:
    """Train the VAE until its total or the deadline; True when the total is reached."""
    torch.manual_seed(recipe.seed)
    vae = kind.build(recipe.vae).to(compute.device)
    trainer = Trainer(
        stage="vae",
        run=run,
        recipe=recipe,
        modules={"vae": vae},
        total=recipe.vae_iterations,
        lr=recipe.vae_lr,
        decay_from=0.5,
        ema_decay=0.998,
        not_muon=("conv_in", "conv_out"),
        compute=compute,
    )

    def loss_of(video: Tensor, iteration: int) -> Losses:
        video = video.to(compute.device, non_blocking=True)
        with compute.autocast(), compute.kept_scores():
            return vae_loss(kind, vae, video, compute.generator(recipe.seed, VAE_DRAWS, iteration, 1))

    def evaluate() -> dict[str, Any]:
        averaged = kind.from_state(trainer.ema.state_of("vae"), recipe, compute)
        return evaluate_vae(averaged, recipe, compute.eval_prompts)

    return trainer.train(VaeBatches(recipe), loss_of, evaluate)


def reconstruct(vae: Any, frames: Tensor) -> Tensor:
    """uint8 [B, T, H, W, 3] through the class's own encode and decode (framewise tiles and all), as shipped."""
    video = (frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1).to(vae.dtype)
    back: Tensor = vae.decode(vae.encode(video).latent_dist.mode()).sample
    frames = ((back.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return frames.permute(0, 2, 3, 4, 1)


@torch.no_grad()
def evaluate_vae(vae: Any, recipe: Recipe, num_clips: int) -> dict[str, float]:
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
    return result | _shares(rights)


def _shares(rights: list[dict[str, bool]]) -> dict[str, float]:
    """Per attribute, and for all of them, the share of objects of which the detector read it rightly."""
    return {name: round(sum(r[name] for r in rights) / len(rights), 4) for name in (*ATTRIBUTES, "all")}


@torch.no_grad()
def finish_vae(kind: VaeKind, run: Path, recipe: Recipe, compute: Compute, *, accept: bool) -> Any:
    """The VAE that the DiT is trained on: averaged weights, whitened latents, saved once as vae.safetensors.

    Args:
        accept: take it even if it misses the targets.
    Raises:
        ValueError: no VAE checkpoint, or the VAE misses MIN_PSNR_DB or MIN_SHAPE_SCORE and is not accepted.
    """
    file = run / "vae.safetensors"
    if not file.exists():
        checkpoint = run / "vae.ckpt"
        if not checkpoint.exists():
            raise ValueError(f"run={str(run)!r} holds no vae.ckpt: train with --stage vae first")
        state = torch.load(checkpoint, map_location=compute.device, weights_only=True)
        vae = kind.from_state(state_of(state["ema"], "vae"), recipe, compute)
        scores = evaluate_vae(vae, recipe, compute.eval_prompts)
        if not accept and (scores["psnr_db"] < MIN_PSNR_DB or scores["shape"] < MIN_SHAPE_SCORE):
            raise ValueError(
                f"psnr_db={scores['psnr_db']}, shape={scores['shape']} of the VAE: need {MIN_PSNR_DB} dB and "
                f"{MIN_SHAPE_SCORE}; train it longer, or pass --accept-vae"
            )
        kept = kind.finish(vae, *aggregate_moments(kind, vae, recipe, compute.device))
        write_json({"iteration": state["iteration"], "seconds": round(state["seconds"], 1), **scores}, run / "vae.json")
        save_tensors(kept, file)
    return kind.finished(load_file(file, device=str(compute.device)), recipe, compute)


def train_decoder(
    kind: VaeKind, run: Path, recipe: Recipe, compute: Compute, iterations: int, *, latent_noise: float = 0.0
) -> bool:
    """Train the decoder of a finished VAE on, its latents fixed, so that a DiT trained on them stays as it is.

    At the end the run's vae.safetensors has the better decoder; True when `iterations` are done.

    Args:
        latent_noise: noise of up to this many standard deviations is added to the latents, another amount for each
            clip, so that the decoder also learns to draw from latents that a DiT gets not quite right.
    Raises:
        ValueError: the run has no finished VAE.

    Source of the noise: noise-augmented decoding, RAE, Zheng et al. 2025 (arXiv 2510.11690).
    """
    file = run / "vae.safetensors"
    if not file.exists():
        raise ValueError(f"run={str(run)!r} holds no vae.safetensors: train with --stage dit first")
    kept = load_file(file, device=str(compute.device))
    vae = kind.finished(kept, recipe, compute)
    decoder = {name: module.train().requires_grad_() for name, module in kind.decoder(vae).items()}
    trainer = Trainer(
        stage="decoder",
        run=run,
        recipe=recipe,
        modules=decoder,
        total=iterations,
        lr=recipe.vae_lr,
        decay_from=0.2,
        ema_decay=0.998,
        not_muon=("conv_in", "conv_out"),
        compute=compute,
    )

    def loss_of(video: Tensor, iteration: int) -> Losses:
        video = video.to(compute.device, non_blocking=True)
        generator = compute.generator(recipe.seed, VAE_DRAWS, recipe.vae_iterations + iteration, 1)
        with compute.autocast(), compute.kept_scores():
            with torch.no_grad():
                mean, logvar = kind.moments(vae, video)
            return _reconstruction_loss(kind, vae, video, mean, logvar, generator, latent_noise)

    def better() -> dict[str, Tensor]:
        changed = ((name, trainer.ema.state_of(name)) for name in decoder)
        return kept | {f"{name}.{key}": value for name, state in changed for key, value in state.items()}

    def evaluate() -> dict[str, Any]:
        return evaluate_vae(kind.finished(better(), recipe, compute), recipe, compute.eval_prompts)

    done = trainer.train(VaeBatches(recipe, first=recipe.vae_iterations), loss_of, evaluate)
    about = json.loads((run / "vae.json").read_text())
    about |= {"decoder_iteration": trainer.iteration, "decoder_seconds": round(trainer.seconds, 1)} | trainer.evaluation
    save_tensors(better(), file)
    write_json(about, run / "vae.json")
    return done


# --- between the stages: latents ------------------------------------------------------------------------------------


def cached_scene(recipe: Recipe, index: int, stage: int = CACHE_DRAWS) -> Scene:
    """The scene of a training clip: as the world draws them, and behind those the pairs."""
    seed = recipe.seed * 16 + stage + 1
    if stage != CACHE_DRAWS or index < recipe.cached_clips:
        return scene_at(seed, index)
    return scene_at(recipe.seed * 16 + PAIR_DRAWS + 1, index - recipe.cached_clips, num_objects=2)


@dataclass(frozen=True, slots=True)
class _RenderChunks:
    """uint8 [size, T, H, W, 3] of scenes first + chunk*size and following."""

    recipe: Recipe
    size: int
    stage: int = CACHE_DRAWS
    first: int = 0

    def __call__(self, chunk: int) -> Tensor:
        r = self.recipe
        scenes = [cached_scene(r, self.first + chunk * self.size + i, self.stage) for i in range(self.size)]
        return torch.from_numpy(np.stack([render(s, r.num_frames, r.height, r.width) for s in scenes]))


@torch.no_grad()
def aggregate_moments(
    kind: VaeKind, vae: nn.Module, recipe: Recipe, device: torch.device, num_clips: int = 256
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] of latents *sampled* for clips that no later stage sees.

    A channel that the VAE hardly uses has means that barely move and a variance near one. Divided by the spread of
    its samples it stays small, and the DiT loses nothing on it; divided by that of its means it would be as loud as
    the channels that say what is in the picture.
    """
    sums = []
    for chunk in range(num_clips // 16):
        video = to_input(_RenderChunks(recipe, 16, EVAL_DRAWS)(chunk).numpy()).to(device)
        mean, logvar = kind.moments(vae, video)
        second = mean.double().square() + logvar.double().exp()
        sums.append(torch.stack([mean.double().mean((0, 2, 3, 4)), second.mean((0, 2, 3, 4))]))
    mean, square = torch.stack(sums).mean(0)
    return mean, (square - mean.square()).sqrt()


@torch.no_grad()
def cache_latents(kind: VaeKind, vae: nn.Module, run: Path, recipe: Recipe, compute: Compute) -> Tensor:
    """Latents float16 [N, C, T', H', W'] of the training clips, encoded once and kept in latents.safetensors.

    N is cached_clips + cached_pairs. A cache of fewer clips or pairs is added to, one of more is cut.
    """
    file = run / "latents.safetensors"
    kept = load_file(file) if file.exists() else {}
    total = recipe.cached_clips + recipe.cached_pairs
    parts: list[Tensor] = []
    for name, first, end in (("latents", 0, recipe.cached_clips), ("pairs", recipe.cached_clips, total)):
        old = [kept[name][: end - first]] if name in kept else []
        have = sum(len(part) for part in old)
        size = math.gcd(end - first, have, 16)
        new = []
        for frames in batches(_RenderChunks(recipe, size, first=first), have // size, (end - first) // size, compute):
            with compute.autocast():
                new.append(kind.moments(vae, to_input(frames.numpy()).to(compute.device))[0].half().cpu())
        if new:
            kept[name] = torch.cat([*old, *new])
            save_tensors(kept, file)
            old = [kept[name]]
        parts += old
    latents = torch.cat(parts)
    return latents.to(compute.device) if compute.device.type == "cuda" else latents


# --- stage 2: the DiT and its text encoders -------------------------------------------------------------------------

# Captions to the frames [T, H, W, 3] of a clip each, with noise of seed i for caption i.
Render = Callable[[list[str]], Iterable[np.ndarray[Any, Any]]]


def images_only(recipe: Recipe, iteration: int) -> bool:
    """Whether this DiT iteration sees only the first latent frame."""
    return iteration < min(_DIT_IMAGES_FIRST, 0.15 * recipe.dit_iterations)


@dataclass(frozen=True, slots=True)
class DitBatches:
    """Indices into the cache and tokens of fresh captions for DiT iteration i."""

    recipe: Recipe
    text_of: Callable[[Scene, np.random.Generator], str]
    tokens_of: Callable[[list[str]], dict[str, Tensor]]

    def __call__(self, iteration: int) -> dict[str, Tensor]:
        r = self.recipe
        rng = np.random.default_rng([r.seed, DIT_DRAWS, iteration])
        batch = (64 if images_only(r, iteration) else 32) * r.batch_scale
        index = rng.integers(r.cached_clips + r.cached_pairs, size=max(1, round(batch)))
        texts = [self.text_of(cached_scene(r, int(i)), rng) for i in index]
        return {"index": torch.from_numpy(index), **self.tokens_of(texts)}


def noise_levels(count: int, generator: torch.Generator, *, early: float = 0.0) -> Tensor:
    """Sigmas [count] in (0, 1): logistic of N(log SHIFT, 1), a tenth uniform.

    Where a thing is and which colour it has is settled early in sampling, between 0.9 and 1, and only 1.6 % of these
    levels lie above 0.95.

    Args:
        early: share of levels that are the logistic of N(log EARLY_SHIFT, 1) instead.

    Source: logit-normal sampling, Esser et al. 2024 (arXiv 2403.03206), section 3.1.
    """
    device = generator.device
    normal = torch.randn(count, generator=generator, device=device)
    uniform = torch.rand(count, generator=generator, device=device)
    coin = torch.rand(count, generator=generator, device=device)
    shift = torch.where(coin >= 1 - early, math.log(EARLY_SHIFT), math.log(SHIFT))
    return torch.where(coin < 0.1, uniform, torch.sigmoid(shift + normal))


def train_dit(
    run: Path,
    recipe: Recipe,
    compute: Compute,
    *,
    modules: dict[str, nn.Module],
    not_muon: tuple[str, ...],
    latents: Tensor,
    make: DitBatches,
    loss_of: Callable[[Tensor, dict[str, Tensor], torch.Generator], Tensor],
    renderer_of: Callable[[dict[str, Tensor]], Render],
) -> bool:
    """Train modules together on cached latents until the total or the deadline; True when the total is reached.

    Args:
        latents: [N, C, T', H', W'] of `cache_latents`.
        loss_of: of clean latents fp32 [B, C, T', H', W'], the tokens of their captions and a generator for the noise.
        renderer_of: averaged weights, as `Ema.values` names them, to what renders with them.
    """
    trainer = Trainer(
        stage="dit",
        run=run,
        recipe=recipe,
        modules=modules,
        total=recipe.dit_iterations,
        lr=recipe.dit_lr,
        decay_from=0.6,
        ema_decay=0.999,
        not_muon=not_muon,
        compute=compute,
    )

    def batch_loss(batch: dict[str, Tensor], iteration: int) -> Losses:
        clean = latents[batch.pop("index").to(latents.device)].to(compute.device).float()
        if images_only(recipe, iteration):
            clean = clean[:, :, :1]  # first what things look like, then how they move
        tokens = {k: v.to(compute.device, non_blocking=True) for k, v in batch.items()}
        generator = compute.generator(recipe.seed, DIT_DRAWS, iteration, 1)
        with compute.autocast(), compute.kept_scores():
            return loss_of(clean, tokens, generator), {}

    def evaluate() -> dict[str, Any]:
        render = renderer_of(trainer.ema.values)
        splits: tuple[Split, ...] = ("train", "held_out")
        return {split: _evaluate_prompts(render, recipe, compute.eval_prompts, split) for split in splits}

    return trainer.train(make, batch_loss, evaluate)


@torch.no_grad()
def _evaluate_prompts(render: Render, recipe: Recipe, count: int, split: Split) -> dict[str, float]:
    """Share of objects whose attributes the detector finds in clips rendered from fresh captions."""
    detector = Detector()
    scenes = [scene_at(recipe.seed + 2_000_003, i, split=split) for i in range(count)]
    texts = [caption(s, np.random.default_rng([recipe.seed, EVAL_DRAWS, i])) for i, s in enumerate(scenes)]
    rights: list[dict[str, bool]] = []
    for scene, frames in zip(scenes, render(texts), strict=True):
        rights += score(scene, detector(frames))
    return _shares(rights)
