"""Open-Sora-Plan 1.3, step by step: prompt to text context, noise to latents, latents to frames. No ranks, no engine.

Each function does one thing that some rank does for a clip, so an engine can call them where it likes; `render_frames`
calls them in order in one process and is the reference for every other way.

Shapes: R rows of the batch (negative prompt, then prompt; only the prompt without guidance), L text tokens, B = 1 clip,
C latent channels, T' H' W' latent frames, rows, cols, T H W frames, rows, cols in px.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from pipelines.models.open_sora_plan import OpenSoraPlanTransformer3DModel, TextContext
from pipelines.models.open_sora_plan_layout import check_steps, find_folders
from pipelines.models.open_sora_plan_loading import load_text_encoder, load_tokenizer, load_transformer, load_vae
from pipelines.models.wf_vae import WFVAEModel
from pipelines.models.zero_snr_scheduler import ZeroSNREulerAncestralScheduler, make_scheduler
from pipelines.open_sora_plan_family import GEOMETRY
from videopipe.geometry import VideoSpec

PROMPT_TEMPLATE = "\n    high quality, high aesthetic, {prompt}\n    "
NEGATIVE_PROMPT = (
    "\n    nsfw, lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, "
    "worst quality, \n    low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry.\n    "
)
MAX_SEQUENCE_LENGTH = 512
DEFAULT_STEPS = 100
DEFAULT_GUIDANCE_SCALE = 7.5
DEFAULT_SPEC = VideoSpec(height=352, width=640, num_frames=93, fps=18.0)


@dataclass(frozen=True, kw_only=True)
class OpenSoraPlanParts:
    """The loaded models of a checkpoint, each on its device and in its dtype."""

    tokenizer: Any
    text_encoder: Any
    transformer: OpenSoraPlanTransformer3DModel
    vae: WFVAEModel


def load_parts(
    weights: Path,
    *,
    text_encoder: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> OpenSoraPlanParts:
    """Every part of a checkpoint, official or converted, on one device.

    Args:
        weights: folder of the checkpoint.
        text_encoder: folder of mT5 where it lies elsewhere.
        dtype: of the weights; the sampler's state is fp32 regardless.
        device: where all parts go.
    Raises:
        ValueError: a part is not there, or its tensors do not fit the model; names every one.
    """
    folders = find_folders(weights, text_encoder)
    return OpenSoraPlanParts(
        tokenizer=load_tokenizer(folders.tokenizer),
        text_encoder=load_text_encoder(folders.text_encoder, dtype, device),
        transformer=load_transformer(folders.transformer, dtype, device),
        vae=load_vae(folders.vae, dtype, device),
    )


@dataclass(frozen=True, kw_only=True)
class PromptEmbeds:
    """What the text encoder makes of a prompt: `embeds` [R, 1, L, width] and `mask` [R, 1, L], 1 for a real token."""

    embeds: Tensor
    mask: Tensor


def check_request(spec: VideoSpec, num_inference_steps: int, where: str = "") -> None:
    """Refuse what this model cannot render: sizes not multiples of 16 px, frames not 1 + 4k, steps outside 1 to 285.

    The model was trained on multiples of 32 px and on 93, 77, 61, 45, 29 and 1 frames.

    Raises:
        ValueError: names the field, the value and the nearest valid value.
    """
    GEOMETRY.check(spec, where)
    check_steps(num_inference_steps, where)


def prompt_rows(prompt: str, negative_prompt: str | None = None, guidance_scale: float = 7.5) -> list[str]:
    """The texts to encode, in the order of the batch: the negative one first, and only when guidance is on (> 1).

    `negative_prompt=None` stands for upstream's long list of faults, which its sampling always uses; "" for no text.
    """
    rows = [PROMPT_TEMPLATE.format(prompt=prompt)]
    if guidance_scale > 1:
        rows.insert(0, NEGATIVE_PROMPT if negative_prompt is None else negative_prompt)
    return rows


def encode_prompt(
    tokenizer: Any, text_encoder: Any, rows: list[str], max_sequence_length: int = MAX_SEQUENCE_LENGTH
) -> PromptEmbeds:
    """Encode texts, padded or cut to `max_sequence_length` tokens.

    Args:
        tokenizer: transformers tokenizer that appends the end token.
        text_encoder: transformers mT5 encoder.
        rows: texts, as `prompt_rows` gives them.
        max_sequence_length: tokens per text; upstream's value is 512.
    """
    tokens = tokenizer(rows, padding="max_length", max_length=max_sequence_length, truncation=True, return_tensors="pt")
    ids, mask = tokens["input_ids"].to(text_encoder.device), tokens["attention_mask"].to(text_encoder.device)
    embeds = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return PromptEmbeds(embeds=embeds[:, None], mask=mask[:, None])


def trim_text(text: PromptEmbeds) -> PromptEmbeds:
    """Drop the columns that no row of the batch uses: masked tokens have no weight, but they cost as much as others."""
    used = text.mask.bool().any(dim=0).flatten().nonzero()
    length = int(used.max()) + 1 if bool(text.mask.any(dim=-1).all()) else text.mask.shape[-1]
    return PromptEmbeds(embeds=text.embeds[:, :, :length], mask=text.mask[:, :, :length])


def text_context(transformer: OpenSoraPlanTransformer3DModel, text: PromptEmbeds) -> TextContext:
    """The prompt as every denoising step of the clip uses it: keys and values of all cross-attentions."""
    embeds = text.embeds.to(device=transformer.device, dtype=transformer.dtype)
    return transformer.encode_text(embeds, text.mask.to(transformer.device))


def start_scheduler(
    num_inference_steps: int, device: str | torch.device | None = None
) -> ZeroSNREulerAncestralScheduler:
    """A scheduler for one clip, its timesteps in fp32 on `device`.

    Raises:
        ValueError: steps outside 1 to 285.
    """
    scheduler = make_scheduler()
    scheduler.set_timesteps(num_inference_steps, device=device)
    return scheduler


def initial_latents(
    spec: VideoSpec,
    scheduler: ZeroSNREulerAncestralScheduler,
    generator: torch.Generator,
    channels: int = GEOMETRY.channels,
) -> Tensor:
    """Noise of the first step, [1, C, T', H', W'] fp32 on the generator's device, about 4096 times normal.

    Only this and `denoise_step` draw from the generator, in the order of the steps.
    """
    shape = msgspec.structs.replace(GEOMETRY, channels=channels).latent_shape(spec)
    noise = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    return noise * scheduler.init_noise_sigma.to(noise.device)


def predict(
    transformer: OpenSoraPlanTransformer3DModel,
    scheduler: ZeroSNREulerAncestralScheduler,
    latents: Tensor,
    t: Tensor,
    text: TextContext,
) -> Tensor:
    """v [R, C, T', H', W'] in fp32 for each row of the text.

    Args:
        latents: state [1, C, T', H', W'] in fp32.
        t: one of the scheduler's timesteps, fp32.
        text: all rows, or `TextContext.select` of one where each rank computes one row.
    """
    x = scheduler.scale_model_input(latents, t).to(transformer.dtype)
    rows = text.keys[0].shape[0]
    return transformer(x.expand(rows, -1, -1, -1, -1), t, text=text).sample.float()


def guide(v: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance on v: [2, ...] (negative, positive) or [1, ...] to [1, ...].

    Source: Classifier-Free Diffusion Guidance (arXiv 2207.12598).
    """
    if v.shape[0] == 1:
        return v
    negative, positive = v.chunk(2)
    return negative + guidance_scale * (positive - negative)


def denoise_step(
    scheduler: ZeroSNREulerAncestralScheduler, latents: Tensor, v: Tensor, t: Tensor, generator: torch.Generator
) -> Tensor:
    """The state after one step, [1, C, T', H', W'] fp32. Draws fresh noise from `generator`, in the last step too."""
    (after,) = scheduler.step(v.float(), t, latents, generator=generator, return_dict=False)[:1]
    return after


class FiniteCheck:
    """Whether all that the denoiser gave for a clip was finite, asked once: an answer after each step halts a GPU."""

    def __init__(self) -> None:
        self._finite: list[tuple[Tensor, Tensor]] = []

    def note(self, v: Tensor, t: Tensor) -> None:
        """What the denoiser gave at timestep `t`; waits for nothing."""
        self._finite.append((torch.isfinite(v).all(), t))

    def finish(self, latents: Tensor) -> Tensor:
        """The latents after the steps so far, if they and all that was noted are finite.

        Raises:
            FloatingPointError: names the first timestep at which the denoiser gave NaN or infinity.
        """
        finite = torch.stack([flag for flag, _ in self._finite] + [torch.isfinite(latents).all()]).tolist()
        if not all(finite):
            first = min(finite.index(False), len(self._finite) - 1)  # latents alone: of another rank, in the last step
            raise FloatingPointError(f"the denoiser gave NaN or infinity at timestep {float(self._finite[first][1]):g}")
        return latents


def denoise(
    transformer: OpenSoraPlanTransformer3DModel,
    text: TextContext,
    spec: VideoSpec,
    *,
    num_inference_steps: int = DEFAULT_STEPS,
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE,
    generator: torch.Generator,
) -> Tensor:
    """All steps of one clip: latents [1, C, T', H', W'] in fp32, as the denoiser sees them (scaled).

    Raises:
        ValueError: a size or number of steps that cannot be rendered.
        FloatingPointError: the denoiser's output is not finite.
    """
    check_request(spec, num_inference_steps)
    scheduler = start_scheduler(num_inference_steps, transformer.device)
    latents = initial_latents(spec, scheduler, generator, transformer.config.in_channels).to(transformer.device)
    check = FiniteCheck()
    for t in scheduler.timesteps:
        v = guide(predict(transformer, scheduler, latents, t, text), guidance_scale)
        check.note(v, t)
        latents = denoise_step(scheduler, latents, v, t, generator)
    return check.finish(latents)


def decode_pixels(vae: WFVAEModel, latents: Tensor, chunk: int | None = None) -> Iterator[Tensor]:
    """Frames [t, H, W, 3] fp32 in 0..1 on the VAE's device, piece by piece in order, of latents [1, C, T', H', W'].

    Args:
        chunk: latent frames decoded at a time; None for the whole clip. The frames are the same.
    """
    for video in vae.decode_stream(vae_latents(vae, latents), chunk):
        yield to_pixels(video)


def decode_frames(vae: WFVAEModel, latents: Tensor, chunk: int | None = None) -> Iterator[Tensor]:
    """As `decode_pixels`, uint8: cut off, not rounded, as upstream."""
    for pixels in decode_pixels(vae, latents, chunk):
        yield to_bytes(pixels)


def vae_latents(vae: WFVAEModel, latents: Tensor) -> Tensor:
    """The denoiser's latents [1, C, T', H', W'] as the VAE takes them, on its device."""
    return vae.unscale_latents(latents.float()).to(device=vae.device, dtype=vae.dtype)


def to_pixels(video: Tensor) -> Tensor:
    """What the VAE gives [1, 3, t, h, W] -> [t, h, W, 3] fp32 in 0..1."""
    return (video.float() / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 3, 0)


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in 0..1 -> uint8, cut off."""
    return (pixels * 255).to(torch.uint8)


@torch.no_grad()
def render_frames(
    parts: OpenSoraPlanParts,
    prompt: str,
    *,
    negative_prompt: str | None = None,
    spec: VideoSpec = DEFAULT_SPEC,
    num_inference_steps: int = DEFAULT_STEPS,
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE,
    seed: int = 0,
    max_sequence_length: int = MAX_SEQUENCE_LENGTH,
    decode_chunk: int | None = None,
) -> Tensor:
    """One clip in one process: frames [T, H, W, 3] uint8 on the CPU.

    The noise comes from a CPU generator seeded with `seed`, whatever the device.

    Raises:
        ValueError: a size or number of steps that cannot be rendered.
        FloatingPointError: the denoiser's output is not finite.
    """
    check_request(spec, num_inference_steps)
    rows = prompt_rows(prompt, negative_prompt, guidance_scale)
    embeds = encode_prompt(parts.tokenizer, parts.text_encoder, rows, max_sequence_length)
    latents = denoise(
        parts.transformer,
        text_context(parts.transformer, trim_text(embeds)),
        spec,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator("cpu").manual_seed(seed),
    )
    return torch.cat([frames.cpu() for frames in decode_frames(parts.vae, latents, decode_chunk)])
