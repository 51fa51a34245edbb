"""The parts of HunyuanVideo that ranks load: diffusers' own text encoders, DiT, VAE and scheduler.

Source: HunyuanVideo (arXiv 2412.03603) as implemented by diffusers' `HunyuanVideoPipeline`; the steps below are the
same, divided between the ranks that own each part.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoTransformer3DModel,
)
from diffusers import HunyuanVideoPipeline as DiffusersHunyuanVideoPipeline
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoSingleTransformerBlock
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, LlamaModel, PreTrainedTokenizerFast

from dit_group.assist import Assistant
from dit_group.attention import MERGING, Layout, SequenceParallel
from dit_group.call import AttentionCall
from dit_group.denoise import Denoising
from dit_group.kernels import check_kernel
from dit_group.modulation import ModulationTable, PrecomputedModulation
from dit_group.plan import Place, Shard, apply_plan
from dit_group.record import Keep, observing
from dit_group.shards import exchange_branches, gather_latents
from pipelines.checkpoint import Checkpoint, CheckpointError
from pipelines.decode_choices import HUNYUAN_KEYS
from pipelines.decode_memory import hunyuan_exactly_within, hunyuan_within
from pipelines.families import ModelFacts
from pipelines.hunyuan_video import has_second_branch, latent_geometry
from pipelines.hunyuan_video_tiles import tile_settings
from pipelines.parallel import LentRank, both_halves, decode_team, own_half, sequence_parallel
from vae_group.decode import to_frames
from vae_group.team import Part, PartDecoder
from videopipe.arrangement import Guidance, Shape
from videopipe.config import Config, DecodeConfig
from videopipe.records import VideoRequest
from videopipe.runtime import DTYPES, Runtime

PLAN = (
    Shard(module="x_embedder", dim=1, stream="video"),
    Shard(module="rope", dim=0, stream="video"),
    Shard(module="context_embedder", dim=1, stream="text"),
    Place(module="proj_out", dim=1, stream="video"),
)
"""Where the tokens of diffusers' HunyuanVideo DiT are sharded: after the embedders, until the end of the request.

A member's prediction is whole in shape and right in its own tokens. Guidance and the scheduler act on each token alone,
and so does the patch embedding of the next step, so nothing is gathered until the latents are finished.

The token refiner (two blocks over at most 256 text tokens) runs on every member; its output is sharded.
"""


class HunyuanVideoTextEncoder:
    """Prompt to conditioning through diffusers' own `encode_prompt`."""

    def __init__(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> None:
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
            tokenizer_2=_clip_tokenizer_class(checkpoint).from_pretrained(source, subfolder="tokenizer_2", **options),
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

    def text_masks(self, conditioning: Mapping[str, Tensor]) -> list[bytes]:
        """0 and 1 for each text token of the prompt, and of the negative prompt where there is one."""
        names = [prefix + "prompt_attention_mask" for prefix in ("", "negative_")]
        return [bytes(conditioning[name][0].bool().tolist()) for name in names if name in conditioning]

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


def _clip_tokenizer_class(checkpoint: Checkpoint) -> type[CLIPTokenizer] | type[PreTrainedTokenizerFast]:
    """CLIP's own, which cuts words as CLIP does, unless the checkpoint names the class that keeps the file's rules."""
    name = checkpoint.json("model_index.json").get("tokenizer_2", (None, None))[1]
    return PreTrainedTokenizerFast if name == "PreTrainedTokenizerFast" else CLIPTokenizer


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
        call = begin_attention(self._parallel, attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        call.attend()
        out = call.output().flatten(2, 3)
        video, text = out[:, :num_video], out[:, num_video:]
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text


def begin_attention(
    parallel: SequenceParallel,
    attn: Attention,
    video: Tensor,
    text: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
) -> AttentionCall:
    """Project local tokens to v, k and q, and send each as soon as it is ready.

    Args:
        video, text: normalised tokens of this member, [B, S_local, N*D] each.
        rotary: cosines and sines [S_video_local, D] for the video tokens.
    """
    dual_stream = attn.add_q_proj is not None

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(2, (attn.heads, -1))  # [B, S, N*D] -> [B, S, N, D]

    text_q, text_k, text_v = (
        (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj) if dual_stream else (attn.to_q, attn.to_k, attn.to_v)
    )
    norm_text_q, norm_text_k = (attn.norm_added_q, attn.norm_added_k) if dual_stream else (attn.norm_q, attn.norm_k)
    call = parallel.begin()
    # v needs neither norm nor RoPE, so it leaves first and travels under the projections of k and q
    call.value(torch.cat([heads(attn.to_v(video)), heads(text_v(text))], dim=1))
    k_video = _rotate(_norm(attn.norm_k, heads(attn.to_k(video))), rotary)
    call.key(torch.cat([k_video, _norm(norm_text_k, heads(text_k(text)))], dim=1))
    q_video = _rotate(_norm(attn.norm_q, heads(attn.to_q(video))), rotary)
    call.query(torch.cat([q_video, _norm(norm_text_q, heads(text_q(text)))], dim=1))
    return call


class OverlappedSingleBlock(torch.nn.Module):
    """diffusers' single-stream block with its MLP half under the exchanges; it takes the block's place in the model.

    The MLP does not depend on the attention: its first matrix product runs while q, k and v travel, its second one
    while the attention's output travels. No cutting of the attention into chunks is needed for that. The output
    projection is split by columns, so its sums are in another order (1e-6 in float32).

    Source: the block is that of HunyuanVideo (arXiv 2412.03603) in diffusers; the overlap goes beyond PipeDiT.
    """

    def __init__(self, block: HunyuanVideoSingleTransformerBlock, parallel: SequenceParallel) -> None:
        super().__init__()
        self.block = block
        self._parallel = parallel

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        *args: Any,
    ) -> tuple[Tensor, Tensor]:
        """Local video and text tokens in, [B, S_local, N*D] each, and out."""
        block, num_video = self.block, hidden_states.shape[1]
        tokens = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        normed, gate = block.norm(tokens, emb=temb)
        video, text = normed[:, :num_video], normed[:, num_video:]
        call = begin_attention(self._parallel, block.attn, video, text, image_rotary_emb)
        mlp = block.act_mlp(block.proj_mlp(normed))
        call.attend()
        width = tokens.shape[2]
        out = F.linear(mlp, block.proj_out.weight[:, width:], block.proj_out.bias)
        out = out + F.linear(call.output().flatten(2, 3), block.proj_out.weight[:, :width])
        tokens = tokens + gate.unsqueeze(1) * out
        return tokens[:, :num_video], tokens[:, num_video:]


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    return x if rotary is None else apply_rotary_emb(x, rotary, sequence_dim=1)


def _norm(norm: torch.nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def parallelize(
    transformer: HunyuanVideoTransformer3DModel, parallel: SequenceParallel, overlap_mlp: bool = False
) -> None:
    """Shard diffusers' HunyuanVideo DiT over the members of `parallel`: its attention and the plan's hooks.

    Args:
        overlap_mlp: run the MLP of single-stream blocks while tensors travel.
    """
    processor = JointAttentionProcessor(parallel)
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.attn.set_processor(processor)
    if overlap_mlp:
        blocks = [OverlappedSingleBlock(block, parallel) for block in transformer.single_transformer_blocks]
        transformer.single_transformer_blocks = torch.nn.ModuleList(blocks)
    if parallel.members > 1:
        apply_plan(transformer, PLAN, parallel)


def modulation_layers(transformer: HunyuanVideoTransformer3DModel) -> list[str]:
    """Names of the linear layers that make shift, scale and gate from the embedding of timestep and prompt."""
    names = []
    for index in range(len(transformer.transformer_blocks)):
        names += [f"transformer_blocks.{index}.{norm}.linear" for norm in ("norm1", "norm1_context")]
    names += [f"single_transformer_blocks.{index}.norm.linear" for index in range(transformer.config.num_single_layers)]
    return [*names, "norm_out.linear"]


class HunyuanVideoDenoiser:
    """The DiT of one rank and the arithmetic of one request's steps."""

    def __init__(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> None:
        assert runtime.dit_member is not None, runtime.rank
        check_kernel(
            config.model.attention_kernel,
            runtime.device,
            DTYPES[config.model.dtype],
            with_lse=config.attention.strategy in MERGING,
        )
        source, options = checkpoint.location, {"revision": checkpoint.revision}
        self.transformer = HunyuanVideoTransformer3DModel.from_pretrained(
            source, subfolder="transformer", torch_dtype=DTYPES[config.model.dtype], **options
        )
        self._modulation: PrecomputedModulation | None = None
        if config.memory.precompute_modulation:
            self._modulation = PrecomputedModulation(self.transformer, modulation_layers(self.transformer))
        self.transformer.to(runtime.device).eval()
        self._geometry = latent_geometry(checkpoint)
        self._scheduler_config = FlowMatchEulerDiscreteScheduler.load_config(source, subfolder="scheduler", **options)
        self._device = runtime.device
        self._trimmed = config.text_trimmed
        members = len(runtime.dit_ranks)
        self._parallel: SequenceParallel | None = None
        self._half: SequenceParallel | None = None
        self._helpers: tuple[int, ...] = ()
        own_attention = members > 1 or self._trimmed or config.model.attention_kernel != "sdpa"
        if own_attention or config.helper_sets:
            num_heads = self.transformer.config.num_attention_heads
            self._parallel = sequence_parallel(config, runtime, num_heads)
            parallelize(self.transformer, self._parallel, config.attention.overlap_mlp and members > 1)
            self._half = own_half(config, runtime, num_heads)
        self._config = config
        self._observed = False

    def latent_shape(self, request: VideoRequest) -> tuple[int, ...]:
        """[1, 16, T', H', W']."""
        return self._geometry.latent_shape(request.spec)

    @torch.no_grad()
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
        prefixes, parallel, layout = branch_prefixes(request), self._parallel, None
        way = self._config.guidance(len(prefixes))
        halved = way == "halves"
        if halved:  # this half of the DiT group evaluates one branch
            parallel = self._half
            assert parallel is not None and parallel.branch is not None
            prefixes = (prefixes[parallel.branch.index],)
        branches = [self._branch(conditioning, prefix, parallel, way) for prefix in prefixes]
        if parallel is not None:
            layout = branches[0].layout(parallel, num_video)
        guided = guidance if self.transformer.config.guidance_embeds else None
        steps = iter(range(len(scheduler.timesteps)))
        if self._modulation is not None:
            for branch in branches:
                branch.modulation = self._modulation.compute(
                    [
                        F.silu(self.transformer.time_text_embed(t.expand(1).to(noise.dtype), branch.pooled, guided)[0])
                        for t in scheduler.timesteps
                    ]
                )

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            step = next(steps)

            def evaluate(branch: _Branch) -> Tensor:
                if self._modulation is not None and branch.modulation is not None:
                    self._modulation.use(branch.modulation, step)
                if self._parallel is not None and parallel is not None:
                    self._parallel.use(branch.layout(parallel, num_video, self._helpers))
                prediction: Tensor = self.transformer(
                    hidden_states=latents.to(dtype),
                    timestep=timestep.expand(latents.shape[0]).to(latents.dtype),
                    encoder_hidden_states=branch.embeds,
                    encoder_attention_mask=branch.mask,
                    pooled_projections=branch.pooled,
                    guidance=guided,
                    return_dict=False,
                )[0]
                return prediction

            evaluations = [partial(evaluate, branch) for branch in branches]
            if self._takes_turns(branches, num_video):
                assert self._parallel is not None
                keepers = () if self._modulation is None else (self._modulation,)
                predictions = self._parallel.in_turns(evaluations, keepers, self._device)
            else:
                predictions = [run() for run in evaluations]
            if halved:
                assert layout is not None
                predictions = list(exchange_branches(predictions[0], layout, self._geometry))
            if len(predictions) == 1:
                return predictions[0]
            conditional, unconditional = predictions
            return unconditional + request.true_cfg_scale * (conditional - unconditional)

        def advance(prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
            return scheduler.step(prediction, timestep, latents, return_dict=False)[0]

        def gather(latents: Tensor) -> Tensor:
            return latents if layout is None else gather_latents(latents, layout, self._geometry)

        return Denoising(predict, advance, noise, scheduler.timesteps, gather)

    def _takes_turns(self, branches: Sequence["_Branch"], num_video: int) -> bool:
        """Whether a step's evaluations do; those that are recorded follow each other, and give the same."""
        if len(branches) != 2 or self._parallel is None or self._observed:
            return False
        return branches[0].layout(self._parallel, num_video, self._helpers).in_turns

    def take_help(self, helpers: tuple[int, ...]) -> None:
        """From the next step on these VAE ranks take a share of the attention."""
        self._helpers = helpers

    @property
    def parallel(self) -> SequenceParallel | None:
        """This rank's place in the DiT group; None where attention is not divided."""
        return self._parallel

    @property
    def branches_as_rows(self) -> bool:
        """Two evaluations follow each other."""
        return False

    def views(self, guidance: Guidance) -> Sequence[SequenceParallel]:
        """The DiT group, or this rank's half of it."""
        view = self._half if guidance == "halves" else self._parallel
        assert view is not None, "attention is not divided here"
        return (view,)

    @property
    def layer_kinds(self) -> tuple[tuple[int, int], ...]:
        """The first dual-stream and the first single-stream block, and how many there are of each."""
        dual, single = len(self.transformer.transformer_blocks), len(self.transformer.single_transformer_blocks)
        return tuple(kind for kind in ((0, dual), (dual, single)) if kind[1])

    def layer(self, index: int, shape: Shape) -> Callable[[], object]:
        """Prepare to run block `index` on random tokens of this member, in the layout then in use."""
        assert self._parallel is not None
        dtype, device, config = self.transformer.dtype, self._device, self.transformer.config
        member, sequence, dim = self._parallel.member, self._parallel.sequence, config.attention_head_dim
        num_video, num_text = sequence.video_counts[member], sequence.text_counts[member]
        width = config.num_attention_heads * dim
        tokens = torch.randn((shape.rows, num_video + num_text + 1, width), device=device).to(dtype)
        angles = torch.rand((num_video, dim), device=device)
        block = (*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks)[index]
        blank = None if self._modulation is None else self._modulation.blank(device)

        def run() -> object:
            if self._modulation is not None and blank is not None:
                self._modulation.use(blank, 0)
            video, text, embedding = tokens.split((num_video, num_text, 1), dim=1)
            return block(video, text, embedding[:, 0], None, (angles.cos(), angles.sin()))

        return run

    @contextmanager
    def observe(self, keep: Keep, num_blocks: int) -> Iterator[None]:
        """Within the block, steps hand whole tensors to `keep`; on every member of the DiT group."""
        self._observed = True
        try:
            with observing(self.transformer, self._parallel, self._geometry, keep, num_blocks):
                yield
        finally:
            self._observed = False

    def _branch(
        self, conditioning: Mapping[str, Tensor], prefix: str, parallel: SequenceParallel | None, guidance: Guidance
    ) -> "_Branch":
        dtype = self.transformer.dtype
        embeds = conditioning[prefix + "prompt_embeds"].to(dtype)
        mask = conditioning[prefix + "prompt_attention_mask"]
        if parallel is not None:
            mask = kept_text(mask, parallel.members, self._trimmed)
            embeds = F.pad(embeds, (0, 0, 0, max(mask.shape[1] - embeds.shape[1], 0)))[:, : mask.shape[1]]
        return _Branch(embeds, mask.to(dtype), conditioning[prefix + "pooled_prompt_embeds"].to(dtype), guidance)


@dataclass
class _Branch:
    """The text conditioning of one evaluation of the DiT, and how its tokens lie over members and helpers."""

    embeds: Tensor
    mask: Tensor
    pooled: Tensor
    guidance: Guidance
    layouts: dict[tuple[int, ...], Layout] = field(default_factory=dict)
    modulation: ModulationTable | None = None

    def layout(self, parallel: SequenceParallel, num_video: int, helpers: tuple[int, ...] = ()) -> Layout:
        """Laid out once for each set of helpers."""
        if helpers not in self.layouts:
            mask = self.mask.bool()
            self.layouts[helpers] = parallel.lay_out(num_video, mask.shape[1], mask, helpers, self.guidance)
        return self.layouts[helpers]


def kept_text(mask: Tensor, members: int, trimmed: bool) -> Tensor:
    """The mask [1, L'] of the text tokens that take part, from that of all text tokens [1, L].

    Trimming keeps those up to the last valid one. Each member gets at least one, padded if need be, since diffusers'
    single-stream blocks cut their text off with `[:-length]`.
    """
    if trimmed:
        valid = mask[0].nonzero()
        mask = mask[:, : max(int(valid[-1]) + 1 if len(valid) else 0, members)]
    return F.pad(mask, (0, max(members - mask.shape[1], 0)))


class HunyuanVideoAssistant(LentRank):
    """A VAE rank's help in denoising steps of HunyuanVideo."""

    def __init__(self, facts: ModelFacts, config: Config, runtime: Runtime) -> None:
        self._geometry = facts.geometry
        self._device = runtime.device
        assistant = Assistant(
            sequence_parallel(config, runtime, facts.num_heads),
            kernels=[None] * facts.attention_layers,
            head_dim=facts.head_dim,
            dtype=DTYPES[config.model.dtype],
            device=runtime.device,
            halves=both_halves(config, runtime, facts.num_heads),
        )
        super().__init__(assistant)
        self._config = config

    def prepare(self, request: VideoRequest, text_masks: Sequence[bytes], recorded: bool) -> None:
        """Sizes of a request, laid out as the DiT ranks do."""
        masks = [torch.tensor([list(mask)], dtype=torch.bool, device=self._device) for mask in text_masks]
        guidance = self._config.guidance(len(masks))
        kept = [kept_text(mask, self._config.members(guidance), self._config.text_trimmed) for mask in masks]
        num_video = self._geometry.token_grid(request.spec).video
        self._assistant.prepare(request.id, num_video, kept, guidance=guidance, recorded=recorded)


def branch_prefixes(request: VideoRequest) -> tuple[str, ...]:
    """Names of the evaluations of each step, as prefixes of the conditioning's tensors."""
    return ("", "negative_") if has_second_branch(request) else ("",)


class HunyuanVideoDecoder:
    """The VAE of one rank, and how its team decodes with it."""

    def __init__(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> None:
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
        self._team = decode_team(runtime)
        self._decode = part_decoder(self.vae, config.decode, fixed=config.schedule.mode == "deterministic")

    @torch.no_grad()
    def parts(self, latents: Tensor) -> Iterator[Part]:
        """Latents [1, C, T', H', W'] float32 on the host -> this member's parts of the clip."""
        scaled = latents.to(self._device).to(self.vae.dtype) / self.vae.config.scaling_factor
        yield from self._decode(scaled, self._team)

    def memory_facts(self) -> dict[str, Any]:
        """Of the VAE's configuration `HUNYUAN_KEYS`, and its own `tiles`."""
        return {key: self.vae.config[key] for key in HUNYUAN_KEYS} | {"tiles": asdict(tile_settings(self.vae))}

    def to_frames(self, video: Tensor, dtype: torch.dtype) -> Tensor:
        """A part's video [1, 3, t, h, W] -> frames [t, h, W, 3], uint8 or float32 in 0..1."""
        return to_frames(video, dtype)


def part_decoder(vae: AutoencoderKLHunyuanVideo, decode: DecodeConfig, *, fixed: bool = False) -> PartDecoder:
    """What decodes a clip in the configured way; without `exact` with the numbers of `vae.decode` in every mode."""
    return (hunyuan_exactly_within if decode.exact else hunyuan_within)(vae, decode, fixed=fixed)
