"""The parts of Open-Sora-Plan 1.3 that ranks load: mT5, DiT, WF-VAE.

The steps are those of `pipelines.open_sora_plan`, divided between the ranks that own each part.

Source: Open-Sora Plan (arXiv 2412.00131); the exchange of heads is DeepSpeed-Ulysses (arXiv 2309.14509).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from dit_group.assist import Assistant
from dit_group.attention import Layout, SequenceParallel
from dit_group.denoise import Denoising
from dit_group.kernels import Kernel
from dit_group.plan import Gather, Shard, apply_plan
from dit_group.record import Keep, observing
from pipelines.checkpoint import Checkpoint
from pipelines.families import ModelFacts
from pipelines.models.open_sora_plan import (
    OpenSoraPlanTransformer3DModel,
    SkipSparse,
    TextContext,
    rotate,
    skip_sparse_attention,
)
from pipelines.models.open_sora_plan_layout import find_folders
from pipelines.models.open_sora_plan_loading import (
    empty_transformer,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
)
from pipelines.models.wf_vae import DEFAULT_DECODE_CHUNK
from pipelines.open_sora_plan import (
    PromptEmbeds,
    decode_frames,
    decode_pixels,
    denoise_step,
    encode_prompt,
    guide,
    predict,
    prompt_rows,
    start_scheduler,
    trim_text,
)
from pipelines.parallel import sequence_parallel
from videopipe.arrangement import Shape
from videopipe.config import Config
from videopipe.records import VideoRequest
from videopipe.runtime import DTYPES, Runtime

PLAN = (
    Shard(module="pos_embed", dim=1, stream="video"),
    Shard(module="rotary", dim=0, stream="video"),
    Gather(module="proj_out", dim=1, stream="video"),
)
"""Where the video tokens are sharded: after the patch embedding, until the last projection. The text stays whole."""


class OpenSoraPlanTextEncoder:
    """Prompt, and with guidance the negative one, to conditioning."""

    def __init__(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> None:
        folders = find_folders(Path(checkpoint.location))
        dtype = DTYPES[config.model.text_encoder_dtype or config.model.dtype]
        self.tokenizer = load_tokenizer(folders.tokenizer)
        self.text_encoder = load_text_encoder(folders.text_encoder, dtype, runtime.device).eval()
        self._trimmed = config.text_trimmed

    @torch.no_grad()
    def encode(self, request: VideoRequest, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Conditioning of one request, columns that no row uses left out unless `attention.text = "padded"`.

        Returns:
            prompt_embeds [R, 1, L, width] and prompt_mask [R, 1, L] on the host; R = 2 rows with guidance, the
            negative prompt first.
        """
        assert not given, "the pipeline refuses conditioning in place of a prompt"
        rows = prompt_rows(request.prompt, request.negative_prompt, request.guidance_scale)
        text = encode_prompt(self.tokenizer, self.text_encoder, rows, request.max_sequence_length)
        text = trim_text(text) if self._trimmed else text
        tensors = {"prompt_embeds": text.embeds, "prompt_mask": text.mask}
        return {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}

    def text_masks(self, conditioning: Mapping[str, Tensor]) -> list[bytes]:
        """One, empty: a step evaluates the DiT once, and no text token is in its self-attention."""
        return [b""]


def skip_sparse_kernel(sparse: SkipSparse) -> Kernel:
    """The attention kernel of a layer with this pattern, over whole sequences and any heads."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        assert key_mask is None, "video tokens are never masked here"
        return skip_sparse_attention(q, k, v, sparse=sparse, key_bias=None)

    return kernel


class ShardedSelfAttention:
    """Self-attention of one block over the tokens of all ranks; takes the place of the model's own processor.

    After the exchange a rank holds some heads of the whole sequence, which is all that skip-sparse attention asks for.
    """

    def __init__(self, parallel: SequenceParallel, sparse: SkipSparse) -> None:
        self._parallel = parallel
        self._kernel = skip_sparse_kernel(sparse)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """This rank's tokens [B, S_local, N*D] in and out; `image_rotary_emb` cos and sin [S_local, D] of them."""
        assert attention_mask is None and image_rotary_emb is not None
        call = self._parallel.begin(self._kernel)
        # v needs no RoPE, so it leaves first and travels under the projections of k and q
        call.value(attn.to_v(hidden_states).unflatten(2, (attn.heads, -1)))
        call.key(rotate(attn.to_k(hidden_states).unflatten(2, (attn.heads, -1)), *image_rotary_emb))
        call.query(rotate(attn.to_q(hidden_states).unflatten(2, (attn.heads, -1)), *image_rotary_emb))
        call.attend()
        return attn.to_out[1](attn.to_out[0](call.output().flatten(2)))


def parallelize(transformer: OpenSoraPlanTransformer3DModel, parallel: SequenceParallel) -> None:
    """Shard the DiT over the members of `parallel`: its self-attention and the plan's hooks."""
    for block in transformer.blocks():
        block.attn1.set_processor(ShardedSelfAttention(parallel, block.sparse))
    if parallel.members > 1:
        apply_plan(transformer, PLAN, parallel)


class OpenSoraPlanDenoiser:
    """The DiT of one rank and the arithmetic of one request's steps."""

    def __init__(self, checkpoint: Checkpoint, config: Config, runtime: Runtime, facts: ModelFacts) -> None:
        assert runtime.dit_member is not None, runtime.rank
        folder = find_folders(Path(checkpoint.location)).transformer
        self.transformer = load_transformer(folder, DTYPES[config.model.dtype], runtime.device).eval()
        self._geometry = facts.geometry
        self._text_tokens = facts.text_tokens
        self._device = runtime.device
        self._helpers: tuple[int, ...] = ()
        self._parallel: SequenceParallel | None = None
        if len(runtime.dit_ranks) > 1 or config.helper_sets:
            self._parallel = sequence_parallel(config, runtime, facts.num_heads)
            parallelize(self.transformer, self._parallel)

    def latent_shape(self, request: VideoRequest) -> tuple[int, ...]:
        """[1, C, T', H', W']."""
        return self._geometry.latent_shape(request.spec)

    @torch.no_grad()
    def begin(self, request: VideoRequest, conditioning: Mapping[str, Tensor], noise: Tensor) -> Denoising:
        """Everything of a request that does not change from step to step.

        The noise of the steps is what follows the initial noise in the request's generator, whoever gave that: the
        same on all ranks.
        """
        shape = self.latent_shape(request)
        scheduler = start_scheduler(request.num_inference_steps, self._device)
        generator = torch.Generator("cpu").manual_seed(request.seed)
        torch.randn(shape, generator=generator, dtype=torch.float32)
        text = self._text(conditioning)
        num_video = self._geometry.token_grid(request.spec).video
        layouts: dict[tuple[int, ...], Layout] = {}

        def predict_v(latents: Tensor, timestep: Tensor) -> Tensor:
            if self._parallel is not None:
                if self._helpers not in layouts:
                    layouts[self._helpers] = self._parallel.lay_out(num_video, 0, None, self._helpers)
                self._parallel.use(layouts[self._helpers])
            return guide(predict(self.transformer, scheduler, latents, timestep, text), request.guidance_scale)

        def advance(v: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
            return denoise_step(scheduler, latents, v, timestep, generator)

        start = noise * scheduler.init_noise_sigma.to(noise.device)
        return Denoising(predict_v, advance, start, scheduler.timesteps)

    def take_help(self, helpers: tuple[int, ...]) -> None:
        """From the next step on these VAE ranks take a share of the attention."""
        self._helpers = helpers

    @property
    def parallel(self) -> SequenceParallel | None:
        """This rank's place in the DiT group; None where attention is not divided."""
        return self._parallel

    @property
    def layer_kinds(self) -> tuple[tuple[int, int], ...]:
        """The first block with each pattern of attention, and how many there are with it."""
        patterns = [block.sparse for block in self.transformer.blocks()]
        return tuple((patterns.index(pattern), count) for pattern, count in Counter(patterns).items())

    def layer(self, index: int, shape: Shape) -> Callable[[], object]:
        """Prepare to run block `index` on random tokens of this member, in the layout then in use."""
        assert self._parallel is not None
        config, dtype = self.transformer.config, self.transformer.dtype
        heads, dim = config.num_attention_heads, config.attention_head_dim
        num_video = self._parallel.sequence.video_counts[self._parallel.member]

        def random(*sizes: int) -> Tensor:
            return torch.randn(sizes, device=self._device)

        tokens, modulation = (random(shape.rows, size, heads * dim).to(dtype) for size in (num_video, 6))
        keys = random(shape.rows, self._text_tokens, heads, dim).to(dtype)
        angles = random(num_video, dim)
        block = self.transformer.blocks()[index]
        return lambda: block(tokens, modulation, (angles.cos(), angles.sin()), (keys, keys))

    def observe(self, keep: Keep, num_blocks: int) -> AbstractContextManager[None]:
        """Within the block, steps hand whole tensors to `keep`; on every member of the DiT group."""
        return observing(self.transformer, self._parallel, keep, num_blocks)

    def _text(self, conditioning: Mapping[str, Tensor]) -> TextContext:
        text = PromptEmbeds(embeds=conditioning["prompt_embeds"], mask=conditioning["prompt_mask"])
        embeds = text.embeds.to(device=self._device, dtype=self.transformer.dtype)
        return self.transformer.encode_text(embeds, text.mask.to(self._device))


class OpenSoraPlanAssistant:
    """A VAE rank's help in denoising steps."""

    def __init__(self, checkpoint: Checkpoint, config: Config, runtime: Runtime, facts: ModelFacts) -> None:
        self._geometry = facts.geometry
        # patterns and sizes of the blocks; on the meta device it holds no weights
        skeleton = empty_transformer(find_folders(Path(checkpoint.location)).transformer)
        self._assistant = Assistant(
            sequence_parallel(config, runtime, facts.num_heads),
            kernels=[skip_sparse_kernel(block.sparse) for block in skeleton.blocks()],
            head_dim=facts.head_dim,
            dtype=DTYPES[config.model.dtype],
            device=runtime.device,
        )

    def prepare(self, request: VideoRequest, text_masks: Sequence[bytes]) -> None:
        """Sizes of a request, laid out as the DiT ranks do."""
        no_text = torch.ones((1, 0), dtype=torch.bool)
        rows = len(prompt_rows(request.prompt, request.negative_prompt, request.guidance_scale))
        num_video = self._geometry.token_grid(request.spec).video
        self._assistant.prepare(request.id, num_video, [no_text for _ in text_masks], rows)

    def step(self, request: str, helpers: tuple[int, ...]) -> None:
        """Take part in one step."""
        self._assistant.step(request, helpers)

    @property
    def parallel(self) -> SequenceParallel:
        """This rank's place beside the DiT group."""
        return self._assistant.parallel

    @property
    def layer_kinds(self) -> tuple[tuple[int, int], ...]:
        """Those of the leader."""
        return ()

    def layer(self, index: int, shape: Shape) -> Callable[[], object]:
        """Prepare to take part in attention layer `index` alone."""
        return self._assistant.layer(index, shape.rows)

    def forget(self, request: str) -> None:
        """No step of this request will come any more."""
        self._assistant.forget(request)


class OpenSoraPlanDecoder:
    """The VAE of one rank; `decode.tiling` decodes in chunks of time, with the same result."""

    def __init__(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> None:
        folder = find_folders(Path(checkpoint.location)).vae
        dtype = DTYPES[config.model.vae_dtype or config.model.dtype]
        self.vae = load_vae(folder, dtype, runtime.device).eval()
        self._chunk = DEFAULT_DECODE_CHUNK if config.decode.tiling else None
        self._device = runtime.device

    @torch.no_grad()
    def decode(self, latents: Tensor, dtype: torch.dtype) -> Tensor:
        """Latents [1, C, T', H', W'] -> frames [T, H, W, 3] on the host, uint8 (cut off) or float32 in 0..1."""
        frames = decode_frames if dtype == torch.uint8 else decode_pixels
        pieces = [piece.cpu() for piece in frames(self.vae, latents.to(self._device), self._chunk)]
        return torch.cat(pieces).contiguous()
