"""Train the second demo model on MovingShapes from scratch: WF-VAE first, then the DiT with its mT5 encoder.

    python -m tools.train_demo_open_sora_plan --run out/plan_run --stage all --resume --minutes 60   # again and again
    python -m tools.train_demo_open_sora_plan --run out/plan_run --stage export --export out/demo_open_sora_plan

The classes are Open-Sora-Plan 1.3's: skip-sparse attention, v-prediction from zero terminal SNR, classifier-free
guidance with a negative prompt. Everything else, from the scenes to checkpoints and curves, is the first demo model's
(`tools/train_demo_model.py`), and so is its promise: a stopped and resumed run ends in the same weights, bit for bit.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import MT5EncoderModel, PreTrainedTokenizerBase

from pipelines.models.open_sora_plan import (
    OpenSoraPlanTransformer3DModel,
    SelfAttnProcessor,
    from_groups,
    to_groups,
)
from pipelines.models.open_sora_plan_loading import load_tokenizer
from pipelines.models.skip_sparse import SkipSparse
from pipelines.models.wf_vae import WFVAEModel
from pipelines.models.zero_snr_scheduler import make_scheduler
from pipelines.open_sora_plan import NEGATIVE_PROMPT, OpenSoraPlanParts, prompt_rows, render_frames
from tools import train_demo_model as first
from tools.demo_model import DitSize, VaeSize, num_parameters
from tools.demo_open_sora_plan import (
    DIT_SHAPES,
    TEXT_TOKENS,
    VAE_SHAPES,
    build_text_encoder,
    build_transformer,
    build_vae,
    export_parts,
    moments_of,
    tokenize,
    video_of,
    with_whitening,
    write_tokenizer,
)
from tools.moving_shapes import ATTRIBUTES, Detector, Split, caption, scene_at, score
from tools.train_demo_model import Compute, Ema, Recipe, Trainer
from videopipe.geometry import VideoSpec

GUIDANCE_SCALE = 4.0  # of evaluations: enough for a model this small


def check_recipe(recipe: Recipe) -> None:
    """Refuse what cannot train.

    Raises:
        ValueError: names the field, the value and the nearest valid value.
    """
    recipe.check()
    for name, value, sizes in (("vae", recipe.vae, set(VAE_SHAPES)), ("dit", recipe.dit, set(DIT_SHAPES))):
        if value not in sizes:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(sorted(sizes))}, nearest is {min(sizes)!r}")


# --- stage 1: the VAE -----------------------------------------------------------------------------------------------


def vae_loss(vae: WFVAEModel, video: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Edge-weighted L1 + MSE and a small KL of the reconstruction of video [B, 3, T, H, W] in [-1, 1]."""
    return first.loss_with_kl(partial(video_of, vae), video, *moments_of(vae, video), generator)


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
        with compute.autocast(), _trainable_attention():
            return vae_loss(vae, video, first._generator(compute, recipe.seed, first._VAE, iteration, 1))

    def evaluate() -> dict[str, Any]:
        averaged = _vae_of(trainer.ema.state_of("vae"), recipe, compute)
        return first.evaluate_vae(averaged, recipe, compute.eval_prompts)

    trainer.log({"iteration": trainer.iteration, "recipe": asdict(recipe), "device": str(compute.device)})
    done = trainer.train(first._VaeBatches(recipe), loss_of, evaluate)
    trainer.log({"iteration": trainer.iteration, "evaluation": evaluate()})
    return done


def _trainable_attention() -> Any:
    """torch's fused attention has a backward on CPUs that is several times slower at heads this small."""
    return sdpa_kernel(SDPBackend.MATH)


def _vae_of(state: dict[str, Tensor], recipe: Recipe, compute: Compute) -> WFVAEModel:
    vae = build_vae(recipe.vae).to(compute.device)
    vae.load_state_dict(state)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def finish_vae(run: Path, recipe: Recipe, compute: Compute, *, accept: bool) -> WFVAEModel:
    """The VAE that the DiT is trained on: averaged weights and whitened latents, saved once as vae.safetensors.

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
        ema = torch.load(checkpoint, map_location=compute.device, weights_only=True)["ema"]
        vae = _vae_of({key.removeprefix("vae."): value for key, value in ema.items()}, recipe, compute)
        scores = first.evaluate_vae(vae, recipe, compute.eval_prompts)
        low = scores["psnr_db"] < first.MIN_PSNR_DB or scores["shape"] < first.MIN_SHAPE_SCORE
        if low and not accept:
            raise ValueError(
                f"psnr_db={scores['psnr_db']}, shape={scores['shape']} of the VAE: need {first.MIN_PSNR_DB} dB and "
                f"{first.MIN_SHAPE_SCORE}; train it longer, or pass --accept-vae"
            )
        mean, std = first.aggregate_moments(partial(moments_of, vae), recipe, compute.device)
        spread = {"mean": mean.float(), "std": std.float()}
        first._save_tensors({f"vae.{k}": v for k, v in vae.state_dict().items()} | spread, file)
    state = load_file(file, device=str(compute.device))
    mean, std = state.pop("mean"), state.pop("std")
    vae = _vae_of({key.removeprefix("vae."): value for key, value in state.items()}, recipe, compute)
    return with_whitening(vae, mean.cpu(), std.cpu())


# --- stage 2: the DiT and the text encoder --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _DitBatches:
    """Indices into the cache and fresh captions for DiT iteration i.

    One in ten is the unconditional side of guidance: no words, or the negative prompt that stands in by default.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    same_length: bool = False

    def __call__(self, iteration: int) -> dict[str, Tensor]:
        r = self.recipe
        rng = np.random.default_rng([r.seed, first._DIT, iteration])
        batch = (64 if first._images_only(r, iteration) else 32) * r.batch_scale
        index = rng.integers(r.cached_clips, size=max(1, round(batch)))
        return {
            "index": torch.from_numpy(index),
            **tokenize([self._text(rng, int(i)) for i in index], self.tokenizer, same_length=self.same_length),
        }

    def _text(self, rng: np.random.Generator, index: int) -> str:
        coin = rng.random()
        if coin < 0.1:
            return "" if coin < 0.05 else NEGATIVE_PROMPT
        return prompt_rows(caption(first._cached_scene(self.recipe, index), rng, omit=0.1), guidance_scale=1.0)[0]


def timesteps(count: int, alphas_cumprod: Tensor, generator: torch.Generator) -> Tensor:
    """Timesteps int64 [count] of 0 to 999: half of them uniform, half with the first model's signal-to-noise ratios.

    A uniform draw alone spends more than half of the training on almost pure noise; without it the first steps of
    sampling, from pure noise, would hardly be trained.
    """
    uniform = torch.randint(len(alphas_cumprod), (count,), generator=generator, device=generator.device)
    level = first.noise_levels(count, generator)  # of x = (1 - s) * clean + s * noise
    snr = alphas_cumprod / (1 - alphas_cumprod)  # falls with t
    chosen = torch.searchsorted(-snr.log(), -2 * torch.log((1 - level) / level)).clamp(max=len(snr) - 1)
    coin = torch.rand(count, generator=generator, device=generator.device)
    return torch.where(coin < 0.5, uniform, chosen)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, *, sparse: SkipSparse, key_bias: Tensor | None) -> Tensor:
    """Skip-sparse self-attention by two matrix products, for training on a CPU; see `skip_sparse_attention`.

    The clips fill whole groups and nothing is masked, so there is no bias to add.
    """
    assert key_bias is None, key_bias
    tokens = q.shape[1]
    assert sparse.padded(tokens) == tokens, (sparse, tokens)
    q, k, v = (to_groups(x, sparse).transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))  # [G*B, N, S/G, D]
    out = torch.matmul(torch.matmul(q, k.transpose(-1, -2)).softmax(-1), v)
    return from_groups(out.transpose(1, 2), sparse, tokens)


def prepare_for_cpu(dit: OpenSoraPlanTransformer3DModel, recipe: Recipe, *, compile_blocks: bool) -> None:
    """Quicker training on a CPU: plain attention where the clips fill whole groups, blocks compiled if asked for."""
    per_frame = recipe.height * recipe.width // 16**2
    counts = (per_frame, per_frame * ((recipe.num_frames - 1) // 4 + 1))  # of one frame, and of the clip
    for block in dit.blocks():
        if all(block.sparse.padded(count) == count for count in counts):
            block.attn1.set_processor(SelfAttnProcessor(block.sparse, plain_attention))
        if compile_blocks:
            block.compile(dynamic=False)


def dit_loss(
    dit: OpenSoraPlanTransformer3DModel,
    text_encoder: MT5EncoderModel,
    clean: Tensor,
    tokens: dict[str, Tensor],
    alphas_cumprod: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Mean square error of v = sqrt(a) * noise - sqrt(1 - a) * clean, for clean [B, C, T', H', W'] fp32.

    Source: v-prediction, Progressive Distillation (arXiv 2202.00512), appendix D.
    """
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    t = timesteps(len(clean), alphas_cumprod, generator)
    a = alphas_cumprod[t].view(-1, 1, 1, 1, 1)
    embeds = text_encoder(input_ids=tokens["ids"], attention_mask=tokens["mask"]).last_hidden_state
    text = dit.encode_text(embeds[:, None], tokens["mask"][:, None])
    v = dit(a.sqrt() * clean + (1 - a).sqrt() * noise, t.float(), text=text, return_dict=False)[0]
    return F.mse_loss(v.float(), a.sqrt() * noise - (1 - a).sqrt() * clean)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parts:
    """Everything that the second stage trains, and its tokenizer."""

    dit: OpenSoraPlanTransformer3DModel
    text_encoder: MT5EncoderModel
    tokenizer: PreTrainedTokenizerBase

    def modules(self) -> dict[str, nn.Module]:
        return {"dit": self.dit, "text_encoder": self.text_encoder}


def _build_parts(run: Path, recipe: Recipe, compute: Compute) -> _Parts:
    """Fresh modules; the tokenizer is kept with the run, so that every later call has the same."""
    folder = run / "tokenizer"
    if not (folder / "spiece.model").exists():
        write_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(recipe.seed)
    dit = build_transformer(recipe.dit, VAE_SHAPES[recipe.vae].latent_channels).to(compute.device)
    text_encoder = build_text_encoder(recipe.dit, len(tokenizer)).to(compute.device)
    return _Parts(dit=dit, text_encoder=text_encoder, tokenizer=tokenizer)


def train_dit(run: Path, recipe: Recipe, compute: Compute, *, accept_vae: bool) -> bool:
    """Train the DiT and text encoder on a finished VAE's latents; True when the total is reached."""
    vae = finish_vae(run, recipe, compute, accept=accept_vae)
    latents = first.cache_latents(partial(moments_of, vae), run, recipe, compute)
    latents = latents.to(compute.device) if compute.device.type == "cuda" else latents
    parts = _build_parts(run, recipe, compute)
    if compute.device.type == "cpu":
        prepare_for_cpu(parts.dit, recipe, compile_blocks=compute.compile_blocks)
    alphas_cumprod = make_scheduler().alphas_cumprod.to(compute.device)
    trainer = Trainer(
        stage="dit",
        run=run,
        modules=parts.modules(),
        total=recipe.dit_iterations,
        lr=recipe.dit_lr,
        decay_from=0.6,
        ema_decay=0.999,
        not_muon=("embed", "shared", "relative_attention_bias", "table", "proj_out"),
        compute=compute,
    )

    def loss_of(batch: dict[str, Tensor], iteration: int) -> tuple[Tensor, dict[str, Tensor]]:
        clean = vae.scale_latents(latents[batch.pop("index").to(latents.device)].to(compute.device).float())
        if first._images_only(recipe, iteration):
            clean = clean[:, :, :1]  # first what things look like, then how they move
        tokens = {k: v.to(compute.device, non_blocking=True) for k, v in batch.items()}
        generator = first._generator(compute, recipe.seed, first._DIT, iteration, 1)
        with compute.autocast(), _trainable_attention():
            return dit_loss(parts.dit, parts.text_encoder, clean, tokens, alphas_cumprod, generator), {}

    def evaluate() -> dict[str, Any]:
        averaged = averaged_parts(run, recipe, compute, trainer.ema, vae)
        splits: tuple[Split, ...] = ("train", "held_out")
        return {split: evaluate_prompts(averaged, recipe, compute, split=split, steps=25) for split in splits}

    trainer.log({"iteration": trainer.iteration, "recipe": asdict(recipe), "device": str(compute.device)})
    batches = _DitBatches(recipe, parts.tokenizer, same_length=compute.compile_blocks)
    done = trainer.train(batches, loss_of, evaluate)
    trainer.log({"iteration": trainer.iteration, "evaluation": evaluate()})
    return done


def averaged_parts(run: Path, recipe: Recipe, compute: Compute, ema: Ema, vae: WFVAEModel) -> OpenSoraPlanParts:
    """The whole model with averaged weights, ready to render."""
    parts = _build_parts(run, recipe, compute)
    for name, module in parts.modules().items():
        module.load_state_dict(ema.state_of(name))
        module.eval().requires_grad_(False)
    return OpenSoraPlanParts(tokenizer=parts.tokenizer, text_encoder=parts.text_encoder, transformer=parts.dit, vae=vae)


def evaluate_prompts(
    parts: OpenSoraPlanParts, recipe: Recipe, compute: Compute, *, split: Split, steps: int
) -> dict[str, float]:
    """Share of objects whose attributes the detector finds in clips rendered from fresh captions, with guidance."""
    detector = Detector()
    rights: list[dict[str, bool]] = []
    for i in range(compute.eval_prompts):
        scene = scene_at(recipe.seed + 2_000_003, i, split=split)
        frames = render_frames(
            parts,
            caption(scene, np.random.default_rng([recipe.seed, first._EVAL, i])),
            spec=VideoSpec(height=recipe.height, width=recipe.width, num_frames=recipe.num_frames),
            num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE,
            seed=i,
            max_sequence_length=TEXT_TOKENS,
        )
        rights += score(scene, detector(frames.numpy()))
    return {name: round(sum(r[name] for r in rights) / len(rights), 4) for name in (*ATTRIBUTES, "all")}


# --- export ---------------------------------------------------------------------------------------------------------

_CARD = """---
license: apache-2.0
pipeline_tag: text-to-video
---
# MovingShapes demo model of Open-Sora-Plan's architecture

{parameters:,} parameters ({vae:,} WF-VAE, {dit:,} DiT, {text:,} mT5 encoder; {heads} heads of {head_dim}, {blocks}
blocks, skip-sparse from the third on), trained from scratch on the procedural world of `tools/moving_shapes.py` and on
nothing else: no pictures, no captions and no weights from anywhere else. It draws one or two coloured shapes that move
over a neutral background.

```python
from pipelines import OpenSoraPlanPipeline

with OpenSoraPlanPipeline.from_pretrained("path/to/this/directory") as pipe:
    video = pipe("{example}", height={height}, width={width}, num_frames={num_frames},
                 num_inference_steps=50, guidance_scale={guidance}).frames[0]
```
- One clip is {num_frames} frames of {height}x{width}; other sizes run but were not trained.
- Guidance: a tenth of the captions were left out in training, in equal parts for no words (`negative_prompt=""`) and
  for the negative prompt that stands in by default.
- Weights: {dtype}, moving averages, after {vae_iterations:,} VAE and {dit_iterations:,} DiT iterations, seed {seed}.
- It knows nothing but MovingShapes; other prompts give some MovingShapes clip.
"""


def export(run: Path, out: Path, recipe: Recipe, compute: Compute, dtype: torch.dtype) -> int:
    """Write the pipeline directory from the finished VAE and the averaged DiT checkpoint; return its bytes.

    Raises:
        ValueError: the run has no finished VAE or no DiT checkpoint yet.
    """
    for name in ("vae.safetensors", "dit.ckpt"):
        if not (run / name).exists():
            raise ValueError(f"run={str(run)!r} holds no {name}: train with --stage dit first")
    vae = finish_vae(run, recipe, compute, accept=True)
    state = torch.load(run / "dit.ckpt", map_location=compute.device, weights_only=True)
    fresh = _build_parts(run, recipe, compute)
    ema = Ema(fresh.modules(), 0.0)
    ema.values = state["ema"]
    parts = averaged_parts(run, recipe, compute, ema, vae)
    shape = DIT_SHAPES[recipe.dit]
    card = _CARD.format(
        parameters=num_parameters(vae, parts.transformer, parts.text_encoder),
        vae=num_parameters(vae),
        dit=num_parameters(parts.transformer),
        text=num_parameters(parts.text_encoder),
        heads=shape.heads,
        head_dim=shape.head_dim,
        blocks=shape.blocks,
        example=caption(scene_at(0, 0, num_objects=1)),
        height=recipe.height,
        width=recipe.width,
        num_frames=recipe.num_frames,
        guidance=f"{GUIDANCE_SCALE:g}",
        dtype=str(dtype).removeprefix("torch."),
        vae_iterations=torch.load(run / "vae.ckpt", map_location="cpu", weights_only=True)["iteration"],
        dit_iterations=state["iteration"],
        seed=recipe.seed,
    )
    return export_parts(parts, run / "tokenizer" / "spiece.model", out, dtype, card)


# --- command line ---------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="directory of checkpoints and curves")
    parser.add_argument("--resume", action="store_true", help="continue the run that the directory holds, if any")
    parser.add_argument("--stage", choices=("vae", "dit", "all", "evaluate-vae", "export"), required=True)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop, with a checkpoint, after so long")
    parser.add_argument("--anneal", action="store_true", help="decay the learning rate over this call's minutes")
    parser.add_argument("--vae-minutes", type=float, default=math.inf, help="--stage all: then go on to the DiT")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="the DiT's blocks, on a CPU: minutes, then quicker")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    parser.add_argument("--workers", type=int, default=0, help="processes that render batches ahead (0: in this one)")
    parser.add_argument("--accept-vae", action="store_true", help="train the DiT on a VAE that misses its targets")
    parser.add_argument("--export", type=Path, help="pipeline directory to write after the chosen stage")
    parser.add_argument("--export-dtype", choices=("bfloat16", "float16"), default="bfloat16")
    recipe = parser.add_argument_group("recipe", "see tools/train_demo_model.py")
    recipe.add_argument("--vae", choices=get_args(VaeSize), default="small")
    recipe.add_argument("--dit", choices=get_args(DitSize), default="base")
    for name, kind, default in (
        ("seed", int, 0),
        ("frames", int, 17),
        ("height", int, 64),
        ("width", int, 64),
        ("vae-iterations", int, 8000),
        ("dit-iterations", int, 14000),
        ("batch-scale", float, 1.0),
        ("vae-lr", float, 1.2e-3),
        ("dit-lr", float, 1e-3),
        ("cached-clips", int, 8192),
    ):
        recipe.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0)
    parser.add_argument("--eval-minutes", type=float, default=20.0)
    parser.add_argument("--eval-prompts", type=int, default=48)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train, resume or export, as the arguments say."""
    args = _parser().parse_args(argv)
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
    check_recipe(recipe)
    trains = args.stage in ("vae", "dit", "all")
    if args.anneal and math.isinf(args.minutes):
        raise ValueError("anneal=True needs --minutes: the time over which to decay")
    if args.stage == "export" and args.export is None:
        raise ValueError(f"stage={args.stage!r} needs --export DIRECTORY")
    if trains and not args.resume and (args.run / "recipe.json").exists():
        raise ValueError(f"run={str(args.run)!r} already holds a run: pass --resume to continue it")
    if args.threads:
        torch.set_num_threads(args.threads)
    first.keep_freed_memory()
    begun = time.monotonic()
    compute = Compute(
        device=torch.device(args.device),
        workers=args.workers,
        deadline=begun + 60 * args.minutes,
        checkpoint_s=60 * args.checkpoint_minutes,
        eval_s=60 * args.eval_minutes,
        eval_prompts=args.eval_prompts,
        anneal=args.anneal,
        compile_blocks=args.compile,
    )
    if trains:
        first.open_run(args.run, recipe)
    else:  # look at a run: its own recipe, whatever the other arguments
        recipe = Recipe(**json.loads((args.run / "recipe.json").read_text()))
    if args.stage == "evaluate-vae":
        state = torch.load(args.run / "vae.ckpt", map_location=compute.device, weights_only=True)
        vae = _vae_of({key.removeprefix("vae."): value for key, value in state["ema"].items()}, recipe, compute)
        scores = first.evaluate_vae(vae, recipe, args.eval_prompts)
        sys.stdout.write(json.dumps({"iteration": state["iteration"], **scores}) + "\n")
    if args.stage in ("vae", "all"):
        sooner = min(compute.deadline, begun + 60 * args.vae_minutes)
        done = train_vae(args.run, recipe, replace(compute, deadline=sooner))
        if args.stage == "all" and not done and time.monotonic() > compute.deadline:
            return 0
    if args.stage in ("dit", "all"):
        train_dit(args.run, recipe, compute, accept_vae=args.accept_vae)
    if args.export is not None:
        size = export(args.run, args.export, recipe, compute, getattr(torch, args.export_dtype))
        sys.stdout.write(f"{args.export}: {size} bytes\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
