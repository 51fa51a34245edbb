"""Open-Sora-Plan 1.3 as a family: what its checkpoints are like, and the pipeline that renders with them.

The parts that ranks load (diffusers and transformers) are in `pipelines.open_sora_plan_parts`, so that checking a
configuration needs neither.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_group.worker import Denoiser
from pipelines.checkpoint import Checkpoint, CheckpointError, CheckpointUnreachableError
from pipelines.decode_choices import Choice, Latent, wf_vae_choices
from pipelines.families import (
    Assistant,
    FamilyLayout,
    ModelFacts,
    PublishedModel,
    TextEncoder,
    count_parameters,
    part_dtype,
)
from pipelines.models.open_sora_plan_layout import check_steps, find_folders
from pipelines.models.skip_sparse import block_sparsity
from pipelines.pipeline import VideoPipeline
from pipelines.skip_sparse_layout import held_patterns, held_tokens, sent_values
from vae_group.worker import Decoder
from videopipe.config import Config, ConfigError, DecodeConfig
from videopipe.geometry import LatentGeometry
from videopipe.records import VideoRequest
from videopipe.runtime import Runtime

DIT_CLASSES = ("OpenSoraT2V_v1_3", "OpenSoraPlanTransformer3DModel")
"""`_class_name` in the denoiser's config.json: the official checkpoint's, and that of a converted one."""

MT5_FP32_PARAMETERS = 24 * 4096 * 10240
"""Of mT5-xxl's encoder, the `wo` of its MLPs, which stay in fp32 when the rest is fp16."""

BLENDED_TILES = ("tile_height", "tile_width", "tile_overlap_height", "tile_overlap_width", "tile_overlap_frames")
"""Of the `[decode]` table, what only a VAE with overlapping tiles has."""

GEOMETRY = LatentGeometry(channels=8, stride_t=4, stride_s=8, patch_t=1, patch_s=2)


class OpenSoraPlanPipeline(VideoPipeline):
    """Text to video with Open-Sora-Plan 1.3.

    `guidance_scale` is the scale of classifier-free guidance, which is on above 1; without a `negative_prompt` the
    model's own list of faults stands in, "" means none. Each step draws noise, so clips are told apart by `seed`.
    """

    family = "open-sora-plan"

    def _check_given(self, given: Mapping[str, Tensor]) -> None:
        if given:
            raise ValueError(f"{min(given)} is given: Open-Sora-Plan is rendered from prompts, nearest is None")

    def _noise(
        self,
        requests: list[VideoRequest],
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: Tensor | None,
    ) -> Tensor | None:
        if generator is not None:
            first = generator if isinstance(generator, torch.Generator) else next(iter(generator))
            raise ValueError(
                "generator is given: every step of this sampler draws noise, on ranks that do not have it, "
                f"nearest is seed={first.initial_seed()}"
            )
        return super()._noise(requests, None, latents)


class OpenSoraPlan:
    """The family; see `pipelines.families.Family`."""

    name = "open-sora-plan"
    preload = ("pipelines.open_sora_plan_parts",)
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {  # of a converted checkpoint; official ones hold pickles
        "text_encoder": ("text_encoder",),
        "denoiser": ("transformer",),
        "decoder": ("vae",),
    }
    published = PublishedModel(
        location="LanguageBind/Open-Sora-Plan-v1.3.0",
        facts=ModelFacts(
            family=name,
            geometry=GEOMETRY,
            num_heads=24,
            head_dim=96,
            attention_layers=32,
            text_tokens=512,
            joint_text=False,
            sparse_n=4,
            text_dim=4096,
            divides_rows=False,
            branches_as_rows=True,
        ),
        parameters={"text_encoder": 5_655_173_120, "transformer": 2_771_981_600, "vae": 147_347_660},
    )

    def facts(self, checkpoint: Checkpoint) -> ModelFacts:
        """Sizes from the denoiser's config.json, official or converted; every part must be there.

        Raises:
            CheckpointError: not a directory with a text-to-video checkpoint of this family.
        """
        where = f"model.weights={checkpoint.location!r}"
        if not checkpoint.is_local:
            raise CheckpointUnreachableError(
                f"{where} is not a directory: Open-Sora-Plan is read from one that holds the folders of "
                f"{self.published.location} and, as mt5-xxl, those of google/mt5-xxl"
            )
        try:
            folders = find_folders(Path(checkpoint.location))
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from None
        dit = checkpoint.json(f"{folders.transformer.name}/config.json")
        vae = checkpoint.json(f"{folders.vae.name}/config.json")
        if dit.get("_class_name") not in DIT_CLASSES:
            raise CheckpointError(
                f"{where}: {folders.transformer.name} is a {dit.get('_class_name')}, but "
                f"model.family='open-sora-plan' needs {' or '.join(DIT_CLASSES)}"
            )
        if dit.get("vae_scale_factor_t") is not None:
            raise CheckpointError(
                f"{where}: an inpainting transformer (vae_scale_factor_t={dit['vae_scale_factor_t']}); "
                "text-to-video needs one without"
            )
        channels = dit.get("in_channels", GEOMETRY.channels)
        if vae.get("latent_dim", channels) != channels:
            raise CheckpointError(
                f"{where}: the VAE has {vae['latent_dim']} latent channels, the transformer {channels}: must be equal"
            )
        return ModelFacts(
            family=self.name,
            geometry=LatentGeometry(
                channels=channels,
                stride_t=GEOMETRY.stride_t,
                stride_s=GEOMETRY.stride_s,
                patch_t=dit.get("patch_size_t", GEOMETRY.patch_t),
                patch_s=dit.get("patch_size", GEOMETRY.patch_s),
            ),
            num_heads=dit.get("num_attention_heads", 24),
            head_dim=dit.get("attention_head_dim", 96),
            attention_layers=dit.get("num_layers", 32),
            text_tokens=512,
            joint_text=False,
            sparse_n=dit.get("sparse_n", 4) if dit.get("sparse1d", True) else 1,
            text_dim=dit.get("caption_channels", 4096),
            divides_rows=False,
            branches_as_rows=True,
        )

    def check_request(self, request: VideoRequest, facts: ModelFacts, where: str = "") -> None:
        """Sizes, steps (1 to 285), seed, id and guidance; raises ValueError with the nearest valid value."""
        request.check(where)
        facts.geometry.check(request.spec, where)
        check_steps(request.num_inference_steps, where)
        if request.true_cfg_scale != 1:
            raise ValueError(
                f"{where}true_cfg_scale={request.true_cfg_scale:g} must be 1: the scale of Open-Sora-Plan's "
                f"guidance is guidance_scale, nearest is guidance_scale={request.true_cfg_scale:g}"
            )

    def check_config(self, config: Config) -> None:
        """Refuse options that this model does not have.

        Another kernel, leftover heads by rows, overlapping tiles, stored modulation.
        """
        for path, value, valid in (
            ("model.attention_kernel", config.model.attention_kernel, ("sdpa",)),
            ("attention.strategy", config.attention.strategy, ("ulysses",)),  # sparse layers need whole sequences
            ("attention.balance", config.attention.balance, ("heads", "auto")),
        ):
            if value not in valid:
                raise ConfigError(
                    f"{path}={value!r} does not go with the skip-sparse attention of "
                    f"model.family='open-sora-plan', nearest is {valid[0]!r}"
                )
        tiles = [name for name in BLENDED_TILES if getattr(config.decode, name)]
        tiles += ["tile_preset"] if config.decode.tile_preset == "official" else []
        if tiles:
            name, value = tiles[0], getattr(config.decode, tiles[0])
            raise ConfigError(
                f"decode.{name}={value!r} means nothing to model.family='open-sora-plan', whose "
                f"VAE has chunks of time that need no blending; nearest is {getattr(DecodeConfig(), name)!r}"
            )
        if config.memory.precompute_modulation:
            raise ConfigError(
                "memory.precompute_modulation=true: model.family='open-sora-plan' has one small modulation layer for "
                "all blocks, nearest is false"
            )

    def evaluations(self, request: VideoRequest) -> int:
        """2 where guidance is on, as two rows of a batch, else 1."""
        return 2 if request.guidance_scale > 1 else 1

    def weight_bytes(self, config: Config, checkpoint: Checkpoint | None) -> tuple[dict[str, int | None], str]:
        """By the models that the checkpoint's config files describe, whatever its weights are stored in."""
        parts = ("text_encoder", "denoiser", "decoder")
        sizes: dict[str, int | None]
        if checkpoint is None:
            counts, source = count_parameters(self.published, self.parts, None)
            sizes = {part: (counts[part] or 0) * part_dtype(config, part).itemsize for part in parts}
            if part_dtype(config, "text_encoder") == torch.float16:
                sizes["text_encoder"] = 2 * ((counts["text_encoder"] or 0) + MT5_FP32_PARAMETERS)
            return sizes, source
        from pipelines.models.open_sora_plan_loading import loaded_bytes

        dtypes = (part_dtype(config, part) for part in parts)
        found = loaded_bytes(find_folders(Path(checkpoint.location)), *dtypes)
        return dict(zip(parts, found, strict=True)), f"the config files of {checkpoint.location}"

    def decode_choices(
        self, vae: Mapping[str, Any], config: Config, members: int, latent: Latent
    ) -> Iterator[Choice[Any]]:
        """In chunks of time."""
        return wf_vae_choices(vae, config.decode, latent, members, part_dtype(config, "decoder").itemsize)

    def layout(self, facts: ModelFacts, num_video: int, members: int) -> FamilyLayout | None:
        """By groups of skip-sparse attention, see `pipelines.skip_sparse_layout`."""
        patterns = [block_sparsity(i, True, facts.sparse_n) for i in range(facts.attention_layers)]
        return FamilyLayout(
            video_counts=held_tokens(held_patterns(patterns)[0], num_video, members).totals,
            sent_values=tuple(
                sent_values(
                    patterns,
                    num_video,
                    ranks=members,
                    member=member,
                    heads=facts.num_heads,
                    head_dim=facts.head_dim,
                    out_values=facts.geometry.channels * facts.geometry.patch_t * facts.geometry.patch_s**2,
                )
                for member in range(members)
            ),
        )

    def load_text_encoder(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> TextEncoder:
        """mT5 with its tokenizer."""
        from pipelines.open_sora_plan_parts import OpenSoraPlanTextEncoder

        return OpenSoraPlanTextEncoder(checkpoint, config, runtime)

    def load_denoiser(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> Denoiser:
        """The DiT, sharded over the DiT group."""
        from pipelines.open_sora_plan_parts import OpenSoraPlanDenoiser

        return OpenSoraPlanDenoiser(checkpoint, config, runtime, self.facts(checkpoint))

    def load_assistant(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> Assistant:
        """This rank's share of the heads, when it is lent to the DiT group."""
        from pipelines.open_sora_plan_parts import OpenSoraPlanAssistant

        return OpenSoraPlanAssistant(checkpoint, config, runtime, self.facts(checkpoint))

    def load_decoder(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> Decoder:
        """WF-VAE."""
        from pipelines.open_sora_plan_parts import OpenSoraPlanDecoder

        return OpenSoraPlanDecoder(checkpoint, config, runtime)
