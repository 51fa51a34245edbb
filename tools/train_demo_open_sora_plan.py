"""Train the second demo model on MovingShapes from scratch: WF-VAE first, then the DiT with its mT5 encoder.

    python -m tools.train_demo_open_sora_plan --run out/plan_run --stage all --resume --minutes 60   # again and again
    python -m tools.train_demo_open_sora_plan --run out/plan_run --stage export --export out/demo_open_sora_plan

The classes are Open-Sora-Plan 1.3's: skip-sparse attention, v-prediction from zero terminal SNR, classifier-free
guidance with a negative prompt. Everything else, from the scenes to checkpoints and curves, is the first demo model's
(`tools/demo_training.py`), and so is its promise: a stopped and resumed run ends in the same weights, bit for bit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MT5EncoderModel, PreTrainedTokenizerBase

from pipelines.models.open_sora_plan import (
    OpenSoraPlanTransformer3DModel,
    SelfAttnProcessor,
    TextContext,
    from_groups,
    to_groups,
)
from pipelines.models.open_sora_plan_loading import TEXT_ALIAS, load_tokenizer
from pipelines.models.skip_sparse import SkipSparse
from pipelines.models.wf_vae import WFVAEModel
from pipelines.models.zero_snr_scheduler import make_scheduler
from pipelines.open_sora_plan import NEGATIVE_PROMPT, OpenSoraPlanParts, prompt_rows, render_frames
from tools.demo_model import num_parameters
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
from tools.demo_training import Compute, Recipe, load_averages
from tools.demo_training_program import Program, run_program, trained, weights_in
from tools.demo_training_stages import (
    DitBatches,
    VaeKind,
    cache_latents,
    finish_vae,
    noise_levels,
)
from tools.demo_training_stages import train_dit as train_on_latents
from tools.moving_shapes import Scene, caption, scene_at
from videopipe.geometry import VideoSpec

GUIDANCE_SCALE = 4.0  # of evaluations: enough for a model this small

# --- the VAE --------------------------------------------------------------------------------------------------------

_MEAN, _STD = "whitening.mean", "whitening.std"


def _finish(vae: WFVAEModel, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    return {**vae.state_dict(), _MEAN: mean.float(), _STD: std.float()}


def _load(vae: WFVAEModel, state: dict[str, Tensor]) -> WFVAEModel:
    weights = dict(state)
    mean, std = weights.pop(_MEAN), weights.pop(_STD)
    vae.load_state_dict(weights)
    return with_whitening(vae, mean.cpu(), std.cpu())


WF_VAE = VaeKind(
    build=build_vae,
    moments=moments_of,
    decode=video_of,
    decoder=lambda vae: {"decoder": vae.decoder},
    finish=_finish,
    load=_load,
)


# --- the DiT and the text encoder -----------------------------------------------------------------------------------


def _prompt_or_nothing(scene: Scene, rng: np.random.Generator) -> str:
    """One in ten is the unconditional side of guidance: no words, or the negative prompt that stands in by default."""
    coin = rng.random()
    if coin < 0.1:
        return "" if coin < 0.05 else NEGATIVE_PROMPT
    return prompt_rows(caption(scene, rng, omit=0.1), guidance_scale=1.0)[0]


def timesteps(count: int, alphas_cumprod: Tensor, generator: torch.Generator) -> Tensor:
    """Timesteps int64 [count] of 0 to 999: half of them uniform, half with the first model's signal-to-noise ratios.

    A uniform draw alone spends more than half of the training on almost pure noise; without it the first steps of
    sampling, from pure noise, would hardly be trained.
    """
    uniform = torch.randint(len(alphas_cumprod), (count,), generator=generator, device=generator.device)
    chosen = timestep_of(noise_levels(count, generator), alphas_cumprod)
    coin = torch.rand(count, generator=generator, device=generator.device)
    return torch.where(coin < 0.5, uniform, chosen)


def timestep_of(level: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Timesteps int64 of the signal-to-noise ratios of (1 - level) * clean + level * noise, for levels of 0 to 1."""
    snr = alphas_cumprod / (1 - alphas_cumprod)  # falls with t
    return torch.searchsorted(-snr.log(), -2 * torch.log((1 - level) / level)).clamp(max=len(snr) - 1)


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
    return v_loss(dit, encode_text(dit, text_encoder, tokens), clean, noise, t, alphas_cumprod)


def encode_text(
    dit: OpenSoraPlanTransformer3DModel, text_encoder: MT5EncoderModel, tokens: dict[str, Tensor]
) -> TextContext:
    """What the DiT reads of the tokens that `tokenize` gives."""
    embeds = text_encoder(input_ids=tokens["ids"], attention_mask=tokens["mask"]).last_hidden_state
    return dit.encode_text(embeds[:, None], tokens["mask"][:, None])


def v_loss(
    dit: OpenSoraPlanTransformer3DModel,
    text: TextContext,
    clean: Tensor,
    noise: Tensor,
    t: Tensor,
    alphas_cumprod: Tensor,
) -> Tensor:
    """The loss of `dit_loss` at the timesteps t int64 [B], with text as `encode_text` gives it."""
    a = alphas_cumprod[t].view(-1, 1, 1, 1, 1)
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


def _averaged_parts(
    run: Path, recipe: Recipe, compute: Compute, averages: dict[str, Tensor], vae: WFVAEModel
) -> OpenSoraPlanParts:
    """The whole model with averaged weights, ready to render."""
    parts = _build_parts(run, recipe, compute)
    load_averages(parts.modules(), averages)
    return OpenSoraPlanParts(tokenizer=parts.tokenizer, text_encoder=parts.text_encoder, transformer=parts.dit, vae=vae)


def train_dit(run: Path, recipe: Recipe, compute: Compute, accept_vae: bool) -> bool:
    """Train the DiT and text encoder on a finished VAE's latents; True when the total is reached."""
    vae = finish_vae(WF_VAE, run, recipe, compute, accept=accept_vae)
    parts = _build_parts(run, recipe, compute)
    if compute.device.type == "cpu":
        prepare_for_cpu(parts.dit, recipe, compile_blocks=compute.compile_blocks)
    alphas_cumprod = make_scheduler().alphas_cumprod.to(compute.device)

    def loss_of(clean: Tensor, tokens: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        whitened = vae.scale_latents(clean)
        return dit_loss(parts.dit, parts.text_encoder, whitened, tokens, alphas_cumprod, generator)

    return train_on_latents(
        run,
        recipe,
        compute,
        modules=parts.modules(),
        not_muon=("embed", "shared", "relative_attention_bias", "table", "proj_out"),
        latents=cache_latents(WF_VAE, vae, run, recipe, compute),
        make=DitBatches(
            recipe,
            _prompt_or_nothing,
            partial(tokenize, tokenizer=parts.tokenizer, same_length=compute.compile_blocks),
        ),
        loss_of=loss_of,
        renderer_of=lambda averages: partial(render, _averaged_parts(run, recipe, compute, averages, vae), recipe),
    )


def render(parts: OpenSoraPlanParts, recipe: Recipe, texts: list[str]) -> Iterator[np.ndarray[Any, Any]]:
    """Clips uint8 [T, H, W, 3] of 25 steps with guidance, one at a time."""
    spec = VideoSpec(height=recipe.height, width=recipe.width, num_frames=recipe.num_frames)
    for seed, text in enumerate(texts):
        yield render_frames(
            parts,
            text,
            spec=spec,
            num_inference_steps=25,
            guidance_scale=GUIDANCE_SCALE,
            seed=seed,
            max_sequence_length=TEXT_TOKENS,
        ).numpy()


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
    averages, training = trained(run, recipe, compute)
    vae = finish_vae(WF_VAE, run, recipe, compute, accept=True)
    parts = _averaged_parts(run, recipe, compute, averages, vae)
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
        vae_iterations=training["vae"]["iteration"],
        dit_iterations=training["dit"]["iteration"],
        seed=recipe.seed,
    )
    return export_parts(parts, run / "tokenizer" / "spiece.model", out, dtype, card, training)


def _averages_of(exported: Path) -> dict[str, Tensor]:
    text = weights_in(exported / "text_encoder")
    text[TEXT_ALIAS] = text["shared.weight"]  # one weight, saved once
    parts = {"dit": weights_in(exported / "transformer"), "text_encoder": text}
    return {f"{name}.{key}": value for name, state in parts.items() for key, value in state.items()}


def _vae_of(exported: Path) -> dict[str, Tensor]:
    config = WFVAEModel.load_config(exported / "vae")
    mean, scale = torch.tensor(config["shift"]), torch.tensor(config["scale"])
    return {**weights_in(exported / "vae"), _MEAN: mean, _STD: 1 / scale}


PROGRAM = Program(
    description=__doc__,
    vae=WF_VAE,
    vae_shapes=VAE_SHAPES,
    dit_shapes=DIT_SHAPES,
    train_dit=train_dit,
    export=export,
    averages_of=_averages_of,
    vae_of=_vae_of,
    tokenizers=("tokenizer",),
    vae_iterations=4000,
    dit_iterations=10000,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, resume or export, as the arguments say."""
    return run_program(PROGRAM, argv)


if __name__ == "__main__":
    raise SystemExit(main())
