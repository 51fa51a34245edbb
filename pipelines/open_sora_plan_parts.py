"""The parts of Open-Sora-Plan 1.3 that ranks load: mT5, DiT, WF-VAE.

The steps are those of `pipelines.open_sora_plan`, divided between the ranks that own each part.

Source: Open-Sora Plan (arXiv 2412.00131); the exchange of heads is DeepSpeed-Ulysses (arXiv 2309.14509).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_group.assist import Assistant
from dit_group.attention import Layout
from dit_group.denoise import Denoising
from dit_group.record import Keep, observing
from dit_group.shards import exchange_branches, gather_latents
from pipelines.checkpoint import Checkpoint
from pipelines.decode_choices import WF_VAE_KEYS
from pipelines.decode_memory import wfvae_within
from pipelines.families import ModelFacts
from pipelines.models.open_sora_plan import TextContext
from pipelines.models.open_sora_plan_layout import find_folders
from pipelines.models.open_sora_plan_loading import (
    empty_transformer,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
)
from pipelines.models.wf_vae import WFVAEModel
from pipelines.open_sora_plan import (
    FiniteCheck,
    PromptEmbeds,
    denoise_step,
    encode_prompt,
    guide,
    predict,
    prompt_rows,
    start_scheduler,
    text_context,
    to_bytes,
    to_pixels,
    trim_text,
    vae_latents,
)
from pipelines.open_sora_plan_attention import GroupParallel, layer_kernels, parallelize
from pipelines.open_sora_plan_decode import wfvae_exact
from pipelines.parallel import LentRank, both_halves, decode_team, own_half, sequence_parallel
from vae_group.team import Part, PartDecoder, Team
from videopipe.arrangement import Guidance, Shape
from videopipe.config import Config, DecodeConfig
from videopipe.records import VideoRequest
from videopipe.runtime import DTYPES, Runtime


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


class OpenSoraPlanDenoiser:
    """The DiT of one rank and the arithmetic of one request's steps."""

    def __init__(self, checkpoint: Checkpoint, config: Config, runtime: Runtime, facts: ModelFacts) -> None:
        assert runtime.dit_member is not None, runtime.rank
        folder = find_folders(Path(checkpoint.location)).transformer
        self.transformer = load_transformer(folder, DTYPES[config.model.dtype], runtime.device).eval()
        self._geometry = facts.geometry
        self._device = runtime.device
        self._helpers: tuple[int, ...] = ()
        self._parallel: GroupParallel | None = None
        self._half: GroupParallel | None = None
        if len(runtime.dit_ranks) > 1 or config.helper_sets:
            kernels = layer_kernels([block.sparse for block in self.transformer.blocks()])
            make = partial(GroupParallel, kernels=kernels, device=runtime.device)
            self._parallel = sequence_parallel(config, runtime, facts.num_heads, make)
            parallelize(self.transformer, self._parallel)
            self._half = own_half(config, runtime, facts.num_heads, make)
        self._config = config
        self._text_tokens = facts.text_tokens
        self._observed = False

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
        embeds = PromptEmbeds(embeds=conditioning["prompt_embeds"], mask=conditioning["prompt_mask"])
        text = text_context(self.transformer, embeds)
        num_video = self._geometry.token_grid(request.spec).video
        parallel = self._parallel
        guidance = self._config.guidance(text.keys[0].shape[0])
        halved = guidance == "halves"
        if halved:  # this half of the DiT group evaluates one row
            parallel = self._half
            assert parallel is not None and parallel.branch is not None
            text = text.select(slice(parallel.branch.index, parallel.branch.index + 1))
        layouts: dict[tuple[int, ...], Layout] = {}

        def layout(helpers: tuple[int, ...]) -> Layout:
            assert parallel is not None
            if helpers not in layouts:
                layouts[helpers] = parallel.lay_out(num_video, 0, None, helpers, guidance)
            return layouts[helpers]

        def evaluate(latents: Tensor, timestep: Tensor, rows: TextContext) -> Tensor:
            if self._parallel is not None:
                self._parallel.use(layout(self._helpers))
            return predict(self.transformer, scheduler, latents, timestep, rows)

        def predict_v(latents: Tensor, timestep: Tensor) -> Tensor:
            if self._parallel is not None and layout(self._helpers).in_turns and not self._observed:
                each = [partial(evaluate, latents, timestep, text.select(slice(row, row + 1))) for row in range(2)]
                v = torch.cat(self._parallel.in_turns(each, (), self._device))
            else:
                v = evaluate(latents, timestep, text)
            if halved:  # in the model's own precision, which v had
                v = torch.cat(exchange_branches(v.to(self.transformer.dtype), layout(()), self._geometry)).float()
            return guide(v, request.guidance_scale)

        check = FiniteCheck()

        def advance(v: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
            check.note(v, timestep)
            return denoise_step(scheduler, latents, v, timestep, generator)

        start = noise * scheduler.init_noise_sigma.to(noise.device)

        def gather(latents: Tensor) -> Tensor:
            return check.finish(latents if parallel is None else gather_latents(latents, layout(()), self._geometry))

        return Denoising(predict_v, advance, start, scheduler.timesteps, gather)

    def take_help(self, helpers: tuple[int, ...]) -> None:
        """From the next step on these VAE ranks take a share of the attention."""
        self._helpers = helpers

    @property
    def parallel(self) -> GroupParallel | None:
        """This rank's place in the DiT group; None where attention is not divided."""
        return self._parallel

    @property
    def branches_as_rows(self) -> bool:
        """One evaluation of two rows, where they do not take turns."""
        return True

    def views(self, guidance: Guidance) -> Sequence[GroupParallel]:
        """The DiT group, or this rank's half of it."""
        view = self._half if guidance == "halves" else self._parallel
        assert view is not None, "attention is not divided here"
        return (view,)

    @property
    def layer_kinds(self) -> tuple[tuple[int, int], ...]:
        """The first block of each pattern and layout of its tokens, and how many there are of each."""
        kernels = () if self._parallel is None else self._parallel.kernels
        return tuple((kernels.index(kernel), count) for kernel, count in Counter(kernels).items())

    def layer(self, index: int, shape: Shape) -> Callable[[], object]:
        """Prepare to run block `index` on random tokens of this member, in the layout then in use."""
        parallel, block = self._parallel, self.transformer.blocks()[index]
        assert parallel is not None
        held, config = parallel.kernels[index].held, self.transformer.config
        heads, head_dim = config.num_attention_heads, config.attention_head_dim
        parallel.now = held
        num_video = parallel.sequence.video_counts[parallel.member]

        def random(*size: int) -> Tensor:
            return torch.randn((shape.rows, *size), device=self._device).to(self.transformer.dtype)

        tokens, modulation = random(num_video, heads * head_dim), random(6, heads * head_dim)
        text = (random(self._text_tokens, heads, head_dim), random(self._text_tokens, heads, head_dim))
        angles = self.transformer.rotary(
            shape.num_video, 1, 1, device=self._device
        )  # from which each layout takes its own

        def run() -> object:
            parallel.now = held  # as behind a block whose tokens lie like this
            return block(tokens, modulation, angles, text)

        return run

    @contextmanager
    def observe(self, keep: Keep, num_blocks: int) -> Iterator[None]:
        """Within the block, steps hand whole tensors to `keep`; on every member of the DiT group."""
        self._observed = True
        try:
            with observing(self.transformer, self._parallel, self._geometry, keep, num_blocks, branches_as_rows=True):
                yield
        finally:
            self._observed = False


class OpenSoraPlanAssistant(LentRank):
    """A VAE rank's help in denoising steps of Open-Sora-Plan."""

    def __init__(self, checkpoint: Checkpoint, config: Config, runtime: Runtime, facts: ModelFacts) -> None:
        self._geometry = facts.geometry
        # patterns and sizes of the blocks; on the meta device it holds no weights
        skeleton = empty_transformer(find_folders(Path(checkpoint.location)).transformer)
        kernels = layer_kernels([block.sparse for block in skeleton.blocks()])
        make = partial(GroupParallel, kernels=kernels, device=runtime.device)
        assistant = Assistant(
            sequence_parallel(config, runtime, facts.num_heads, make),
            kernels=kernels,
            head_dim=facts.head_dim,
            dtype=DTYPES[config.model.dtype],
            device=runtime.device,
            halves=both_halves(config, runtime, facts.num_heads, make),
            branches_as_rows=True,
        )
        super().__init__(assistant)
        self._config = config

    def prepare(self, request: VideoRequest, text_masks: Sequence[bytes], recorded: bool) -> None:
        """Sizes of a request, laid out as the DiT ranks do."""
        no_text = torch.ones((1, 0), dtype=torch.bool)
        rows = len(prompt_rows(request.prompt, request.negative_prompt, request.guidance_scale))
        guidance = self._config.guidance(rows)
        masks, rows = ([no_text], rows) if guidance == "none" else ([no_text, no_text], 1)
        num_video = self._geometry.token_grid(request.spec).video
        self._assistant.prepare(request.id, num_video, masks, rows, guidance, recorded)


class OpenSoraPlanDecoder:
    """The VAE of one rank, and how its team decodes with it; chunks of time give the same result as the whole clip."""

    def __init__(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> None:
        folder = find_folders(Path(checkpoint.location)).vae
        dtype = DTYPES[config.model.vae_dtype or config.model.dtype]
        self.vae = load_vae(folder, dtype, runtime.device).eval()
        self._device = runtime.device
        self._team = decode_team(runtime)
        self._decode = part_decoder(self.vae, config.decode, fixed=config.schedule.mode == "deterministic")

    @torch.no_grad()
    def parts(self, latents: Tensor) -> Iterator[Part]:
        """Latents [1, C, T', H', W'] float32 on the host -> this member's parts of the clip."""
        yield from self._decode(vae_latents(self.vae, latents.to(self._device)), self._team)

    def memory_facts(self) -> dict[str, Any]:
        """Of the VAE's configuration `WF_VAE_KEYS`."""
        return {key: self.vae.config[key] for key in WF_VAE_KEYS}

    def to_frames(self, video: Tensor, dtype: torch.dtype) -> Tensor:
        """A part's video [1, 3, t, h, W] -> frames [t, h, W, 3], uint8 (cut off) or float32 in 0..1."""
        pixels = to_pixels(video)
        return (to_bytes(pixels) if dtype == torch.uint8 else pixels).contiguous()


def part_decoder(vae: WFVAEModel, decode: DecodeConfig, *, fixed: bool = False) -> PartDecoder:
    """What decodes a clip in the configured way; the frames are those of the whole clip in every mode.

    Raises:
        ValueError: several ranks for one clip of a model whose norms look at all of it.
    """
    if decode.mode != "clip" and vae.config.norm_type != "layernorm":
        raise ValueError(
            f"decode.mode={decode.mode!r} needs a VAE whose norms look at single pixels, but norm_type="
            f"{vae.config.norm_type!r} has the statistics of the whole clip, nearest is 'clip'"
        )

    def whole_clip(latents: Tensor, team: Team) -> Iterator[Part]:
        assert team.members == 1, team
        yield Part(video=torch.cat(list(vae.decode_stream(latents, None)), dim=2))

    def in_chunks(chunk: int | None) -> PartDecoder:
        return whole_clip if chunk is None else wfvae_exact(vae, chunk)

    return wfvae_within(vae, decode, in_chunks, fixed=fixed)
