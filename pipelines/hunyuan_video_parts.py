"""The parts of HunyuanVideo that ranks load: diffusers' own text encoders, DiT, VAE and scheduler.

Source: HunyuanVideo (arXiv 2412.03603) as implemented by diffusers' `HunyuanVideoPipeline`; the steps below are the
same, divided between the ranks that own each part.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoTransformer3DModel,
)
from diffusers import HunyuanVideoPipeline as DiffusersHunyuanVideoPipeline
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, LlamaModel, PreTrainedTokenizerFast

from dit_group.attention import Layout, SequenceParallel
from dit_group.denoise import Denoising
from dit_group.plan import Gather, Shard, apply_plan
from pipelines.checkpoint import Checkpoint, CheckpointError
from pipelines.hunyuan_video import latent_geometry
from vae_group.decode import to_frames
from videopipe.config import Config
from videopipe.records import VideoRequest
from videopipe.runtime import DTYPES, Runtime

PLAN = (
    Shard(module="x_embedder", dim=1, stream="video"),
    Shard(module="rope", dim=0, stream="video"),
    Shard(module="context_embedder", dim=1, stream="text"),
    Gather(module="proj_out", dim=1, stream="video"),
)
"""Where the tokens of diffusers' HunyuanVideo DiT are sharded: after the embedders, until the last projection.

The token refiner (two blocks over at most 256 text tokens) runs on every member; its output is sharded.
"""


class HunyuanVideoTextEncoder:
    """Prompt to conditioning through diffusers' own `encode_prompt`."""

    def __init__(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> None:
        _quiet_loading()
        source, options = checkpoint.location, {"revision": checkpoint.revision}
        dtype = DTYPES[config.model.text_encoder_dtype or config.model.dtype]
        # PreTrainedTokenizerFast keeps the file's own pre-tokenizer, which transformers 5's LlamaTokenizer replaces
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source, subfolder="tokenizer", **options)
        prefix, _ = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")
        length = len(tokenizer(prefix).input_ids)
        if length != DEFAULT_PROMPT_TEMPLATE["crop_start"] or tokenizer.padding_side != "right":
            raise CheckpointError(
                f"model.weights={source!r}: the tokenizer gives {length} tokens for the prompt template's prefix and "
                f"pads {tokenizer.padding_side}; HunyuanVideo needs {DEFAULT_PROMPT_TEMPLATE['crop_start']} and right"
            )
        self.llama = LlamaModel.from_pretrained(source, subfolder="text_encoder", dtype=dtype, **options)
        self.clip = CLIPTextModel.from_pretrained(source, subfolder="text_encoder_2", dtype=dtype, **options)
        self.llama.to(runtime.device).eval()
        self.clip.to(runtime.device).eval()
        self._device = runtime.device
        self._pipeline = DiffusersHunyuanVideoPipeline(
            text_encoder=self.llama,
            tokenizer=tokenizer,
            transformer=None,
            vae=None,
            scheduler=None,
            text_encoder_2=self.clip,
            tokenizer_2=CLIPTokenizer.from_pretrained(source, subfolder="tokenizer_2", **options),
        )

    @torch.no_grad()
    def encode(self, request: VideoRequest, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Conditioning of one request.

        Returns:
            prompt_embeds [1, L, 4096], pooled_prompt_embeds [1, 768] and prompt_attention_mask [1, L], and the same
            with the prefix `negative_` where the request has a second branch; on the host.
        """
        tensors = self._encode(request.prompt, request.max_sequence_length, given, "")
        if has_second_branch(request):
            tensors |= self._encode(request.negative_prompt or "", request.max_sequence_length, given, "negative_")
        return {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}

    def _encode(self, prompt: str, length: int, given: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        names = [prefix + name for name in ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")]
        embeds, pooled, mask = self._pipeline.encode_prompt(
            prompt=prompt,
            prompt_embeds=given.get(names[0]),
            pooled_prompt_embeds=given.get(names[1]),
            prompt_attention_mask=given.get(names[2]),
            device=self._device,
            max_sequence_length=length,
        )
        return dict(zip(names, (embeds, pooled, mask), strict=True))


def _quiet_loading() -> None:
    """No progress bars from the libraries of this rank: they would run through those of the engine."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def has_second_branch(request: VideoRequest) -> bool:
    """Whether each step evaluates the DiT for a negative prompt as well (diffusers' rule)."""
    return request.true_cfg_scale > 1 and request.negative_prompt is not None


class JointAttentionProcessor:
    """diffusers' HunyuanVideo attention with this member's [video | text] tokens, over the whole sequence.

    Takes the place of `HunyuanVideoAttnProcessor2_0` through `Attention.set_processor`, in dual-stream blocks
    (the text has projections of its own) and single-stream blocks (it shares the video's).
    """

    def __init__(self, parallel: SequenceParallel) -> None:
        self._parallel = parallel

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Local video and text tokens in, [B, S_local, N*D] each, and out.

        `attention_mask` is what the model makes of its local sizes; the key mask of the whole sequence that
        `SequenceParallel` holds stands in for it.
        """
        num_video = hidden_states.shape[1]
        dual_stream = attn.add_q_proj is not None

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1))  # [B, S, N*D] -> [B, S, N, D]

        text_q, text_k, text_v = (
            (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj) if dual_stream else (attn.to_q, attn.to_k, attn.to_v)
        )
        norm_text_q, norm_text_k = (attn.norm_added_q, attn.norm_added_k) if dual_stream else (attn.norm_q, attn.norm_k)
        call = self._parallel.begin()
        # v needs neither norm nor RoPE, so it leaves first and travels under the projections of k and q
        call.value(torch.cat([heads(attn.to_v(hidden_states)), heads(text_v(encoder_hidden_states))], dim=1))
        k_video = _rotate(_norm(attn.norm_k, heads(attn.to_k(hidden_states))), image_rotary_emb)
        call.key(torch.cat([k_video, _norm(norm_text_k, heads(text_k(encoder_hidden_states)))], dim=1))
        q_video = _rotate(_norm(attn.norm_q, heads(attn.to_q(hidden_states))), image_rotary_emb)
        call.query(torch.cat([q_video, _norm(norm_text_q, heads(text_q(encoder_hidden_states)))], dim=1))
        call.attend()
        out = call.output().flatten(2, 3)
        video, text = out[:, :num_video], out[:, num_video:]
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    return x if rotary is None else apply_rotary_emb(x, rotary, sequence_dim=1)


def _norm(norm: torch.nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def parallelize(transformer: HunyuanVideoTransformer3DModel, parallel: SequenceParallel) -> None:
    """Shard diffusers' HunyuanVideo DiT over the members of `parallel`: its attention and the plan's hooks."""
    processor = JointAttentionProcessor(parallel)
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.attn.set_processor(processor)
    if parallel.members > 1:
        apply_plan(transformer, PLAN, parallel)


class HunyuanVideoDenoiser:
    """The DiT of one rank and the arithmetic of one request's steps."""

    def __init__(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> None:
        assert runtime.dit_member is not None, runtime.rank
        _quiet_loading()
        source, options = checkpoint.location, {"revision": checkpoint.revision}
        self.transformer = HunyuanVideoTransformer3DModel.from_pretrained(
            source, subfolder="transformer", torch_dtype=DTYPES[config.model.dtype], **options
        )
        self.transformer.to(runtime.device).eval()
        self._geometry = latent_geometry(checkpoint)
        self._scheduler_config = FlowMatchEulerDiscreteScheduler.load_config(source, subfolder="scheduler", **options)
        self._device = runtime.device
        self._trimmed = config.text_trimmed
        members = len(runtime.dit_ranks)
        self._parallel: SequenceParallel | None = None
        if members > 1 or self._trimmed or config.model.attention_kernel != "sdpa":
            self._parallel = SequenceParallel(
                group=runtime.exchange_group,
                member=runtime.dit_member,
                members=members,
                num_heads=self.transformer.config.num_attention_heads,
                strategy=config.attention.strategy,
                kernel=config.model.attention_kernel,
                heads_per_chunk=config.attention.fixed_heads_per_chunk,
                balance=config.attention.balance,
            )
            parallelize(self.transformer, self._parallel)

    def latent_shape(self, request: VideoRequest) -> tuple[int, ...]:
        """[1, 16, T', H', W']."""
        return self._geometry.latent_shape(request.spec)

    def begin(self, request: VideoRequest, conditioning: Mapping[str, Tensor], noise: Tensor) -> Denoising:
        """Everything of a request that does not change from step to step."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self._scheduler_config)
        # the official schedule: sigmas from 1 to 1/n, shifted by the scheduler's own `shift`
        sigmas = np.linspace(1.0, 0.0, request.num_inference_steps + 1)[:-1]
        scheduler.set_timesteps(sigmas=sigmas, device=self._device)
        scheduler.set_begin_index(0)
        dtype = self.transformer.dtype
        guidance = torch.tensor([request.guidance_scale], dtype=dtype, device=self._device) * 1000.0
        num_video = self._geometry.token_grid(request.spec).video
        branches = [self._branch(conditioning, prefix, num_video) for prefix in branch_prefixes(request)]

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            predictions = []
            for branch in branches:
                if self._parallel is not None and branch.layout is not None:
                    self._parallel.use(branch.layout)
                predictions.append(
                    self.transformer(
                        hidden_states=latents.to(dtype),
                        timestep=timestep.expand(latents.shape[0]).to(latents.dtype),
                        encoder_hidden_states=branch.embeds,
                        encoder_attention_mask=branch.mask,
                        pooled_projections=branch.pooled,
                        guidance=guidance if self.transformer.config.guidance_embeds else None,
                        return_dict=False,
                    )[0]
                )
            if len(predictions) == 1:
                return predictions[0]
            conditional, unconditional = predictions
            return unconditional + request.true_cfg_scale * (conditional - unconditional)

        def advance(prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
            return scheduler.step(prediction, timestep, latents, return_dict=False)[0]

        return Denoising(predict, advance, noise, scheduler.timesteps)

    def _branch(self, conditioning: Mapping[str, Tensor], prefix: str, num_video: int) -> "_Branch":
        dtype = self.transformer.dtype
        embeds = conditioning[prefix + "prompt_embeds"].to(dtype)
        mask = conditioning[prefix + "prompt_attention_mask"]
        layout = None
        if self._parallel is not None:
            members = self._parallel.members
            if self._trimmed:
                # each member needs one text token: diffusers' single-stream blocks cut them off with [:-length]
                keep = max(int(mask.sum(dim=1).max()), members)
                embeds, mask = embeds[:, :keep], mask[:, :keep]
            missing = members - embeds.shape[1]
            if missing > 0:
                embeds, mask = F.pad(embeds, (0, 0, 0, missing)), F.pad(mask, (0, missing))
            layout = self._parallel.lay_out(num_video, embeds.shape[1], mask.bool())
        return _Branch(embeds, mask.to(dtype), conditioning[prefix + "pooled_prompt_embeds"].to(dtype), layout)


@dataclass(frozen=True)
class _Branch:
    """The text conditioning of one evaluation of the DiT, and how its tokens lie over the members."""

    embeds: Tensor
    mask: Tensor
    pooled: Tensor
    layout: Layout | None


def branch_prefixes(request: VideoRequest) -> tuple[str, ...]:
    """Names of the evaluations of each step, as prefixes of the conditioning's tensors."""
    return ("", "negative_") if has_second_branch(request) else ("",)


class HunyuanVideoDecoder:
    """The VAE of one rank."""

    def __init__(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> None:
        _quiet_loading()
        options: dict[str, Any] = {"revision": checkpoint.revision}
        self.vae = AutoencoderKLHunyuanVideo.from_pretrained(
            checkpoint.location,
            subfolder="vae",
            torch_dtype=DTYPES[config.model.vae_dtype or config.model.dtype],
            **options,
        )
        self.vae.to(runtime.device).eval()
        if config.decode.tiling:
            self.vae.enable_tiling()
        self._device = runtime.device

    @torch.no_grad()
    def decode(self, latents: Tensor, dtype: torch.dtype) -> Tensor:
        """Latents [1, C, T', H', W'] -> frames [T, H, W, 3] on the host, uint8 or float32 in 0..1."""
        scaled = latents.to(self._device).to(self.vae.dtype) / self.vae.config.scaling_factor
        video = self.vae.decode(scaled, return_dict=False)[0]  # [1, 3, T, H, W] in -1..1
        return to_frames(video, dtype).to("cpu")
