"""Train the demo model on MovingShapes from scratch: the VAE first, then the DiT with its two text encoders.

    python -m tools.train_demo_model --run out/demo_run --stage all --resume --minutes 60     # again and again
    python -m tools.train_demo_model --run out/demo_run --stage export --export out/demo_model

Everything random is a function of (seed, stage, iteration), so the iteration number is the whole random state and a
run that was stopped and resumed ends in the same weights, bit for bit, as one that was not (same device and threads).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn
from transformers import CLIPTextModel, LlamaModel, PreTrainedTokenizerFast

from tools.demo_model import (
    DIT_SHAPES,
    VAE_SHAPES,
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

# --- the VAE --------------------------------------------------------------------------------------------------------


def moments_of(vae: AutoencoderKLHunyuanVideo, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance [B, C, T', H', W'] float32 of the latents of video [B, 3, T, H, W], not tiled."""
    mean, logvar = vae.quant_conv(vae.encoder(video)).float().chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def _video_of(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:
    video: Tensor = vae.decoder(vae.post_quant_conv(latents))
    return video.float()


def _finish(vae: AutoencoderKLHunyuanVideo, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    fold_whitening(vae, mean, std)
    return vae.state_dict()


def _load(vae: AutoencoderKLHunyuanVideo, state: dict[str, Tensor]) -> AutoencoderKLHunyuanVideo:
    vae.load_state_dict(state)
    return vae


HUNYUAN_VAE = VaeKind(
    build=build_vae,
    moments=moments_of,
    decode=_video_of,
    decoder=lambda vae: {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv},
    finish=_finish,
    load=_load,
)


# --- the DiT and the text encoders ----------------------------------------------------------------------------------


_EARLY = 0.25  # of the noise levels; without them no colour was bound to its side (docs/demo_model.md)


def _caption_or_nothing(scene: Scene, rng: np.random.Generator) -> str:
    """One in ten is empty, for guidance."""
    return "" if rng.random() < 0.1 else caption(scene, rng, omit=0.1)


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
    sigma = noise_levels(len(clean), generator, early=_EARLY)
    return velocity_loss(dit, encode_text(llama, clip, tokens), clean, noise, sigma)


def velocity_loss(
    dit: HunyuanVideoTransformer3DModel,
    encoded: tuple[Tensor, Tensor, Tensor],
    clean: Tensor,
    noise: Tensor,
    sigma: Tensor,
) -> Tensor:
    """The loss of `dit_loss` at the noise levels sigma [B], with text as `encode_text` gives it."""
    text, mask, pooled = encoded
    s = sigma.view(-1, 1, 1, 1, 1)
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

    def pipeline(self, vae: AutoencoderKLHunyuanVideo) -> HunyuanVideoPipeline:
        """All of it as diffusers' pipeline."""
        return build_pipeline(
            vae=vae,
            transformer=self.dit,
            llama=self.llama,
            clip=self.clip,
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer_2,
        )


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


def _averaged_parts(run: Path, recipe: Recipe, compute: Compute, averages: dict[str, Tensor]) -> _Parts:
    parts = _build_parts(run, recipe, compute)
    load_averages(parts.modules(), averages)
    return parts


def train_dit(run: Path, recipe: Recipe, compute: Compute, accept_vae: bool) -> bool:
    """Train the DiT and text encoders on a finished VAE's latents; True when the total is reached."""
    vae = finish_vae(HUNYUAN_VAE, run, recipe, compute, accept=accept_vae)
    parts = _build_parts(run, recipe, compute)
    if compute.device.type == "cpu":
        for block in (*parts.dit.transformer_blocks, *parts.dit.single_transformer_blocks):
            block.attn.set_processor(PlainAttention())
            if compute.compile_blocks:
                block.compile(dynamic=False)

    tokenizers = {"tokenizer": parts.tokenizer, "tokenizer_2": parts.tokenizer_2}
    return train_on_latents(
        run,
        recipe,
        compute,
        modules=parts.modules(),
        not_muon=("embed", "proj_out", "norm_out"),
        latents=cache_latents(HUNYUAN_VAE, vae, run, recipe, compute),
        make=DitBatches(
            recipe, _caption_or_nothing, partial(tokenize, **tokenizers, same_length=compute.compile_blocks)
        ),
        loss_of=lambda clean, tokens, generator: dit_loss(parts.dit, parts.llama, parts.clip, clean, tokens, generator),
        renderer_of=lambda averages: partial(
            render, _averaged_parts(run, recipe, compute, averages).pipeline(vae), recipe
        ),
    )


def render(pipe: HunyuanVideoPipeline, recipe: Recipe, texts: list[str]) -> Iterator[np.ndarray[Any, Any]]:
    """Clips float32 [T, H, W, 3] of 16 steps without guidance, 16 at a time."""
    for first in range(0, len(texts), 16):
        some = texts[first : first + 16]
        yield from pipe(
            prompt=some,
            height=recipe.height,
            width=recipe.width,
            num_frames=recipe.num_frames,
            num_inference_steps=16,
            generator=[torch.Generator().manual_seed(first + i) for i in range(len(some))],
            output_type="np",
        ).frames


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
    averages, training = trained(run, recipe, compute)
    vae = finish_vae(HUNYUAN_VAE, run, recipe, compute, accept=True)
    parts = _averaged_parts(run, recipe, compute, averages)
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
        vae_iterations=training["vae"]["iteration"],
        dit_iterations=training["dit"]["iteration"],
        seed=recipe.seed,
    )
    return export_pipeline(parts.pipeline(vae), out, dtype, card, training)


def _averages_of(exported: Path) -> dict[str, Tensor]:
    folders = {"dit": "transformer", "llama": "text_encoder", "clip": "text_encoder_2"}
    return {
        f"{name}.{key}": value
        for name, folder in folders.items()
        for key, value in weights_in(exported / folder).items()
    }


PROGRAM = Program(
    description=__doc__,
    vae=HUNYUAN_VAE,
    vae_shapes=VAE_SHAPES,
    dit_shapes=DIT_SHAPES,
    train_dit=train_dit,
    export=export,
    averages_of=_averages_of,
    vae_of=lambda exported: weights_in(exported / "vae"),
    tokenizers=("tokenizer", "tokenizer_2"),
    vae_iterations=4200,
    dit_iterations=12400,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, resume or export, as the arguments say."""
    return run_program(PROGRAM, argv)


if __name__ == "__main__":
    raise SystemExit(main())
