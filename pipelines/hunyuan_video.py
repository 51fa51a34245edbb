"""HunyuanVideo: what its checkpoints are like, and the pipeline that renders with them.

The parts that ranks load (diffusers and transformers) are in `pipelines.hunyuan_video_parts`, so that checking a
configuration needs neither.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from dit_group.worker import Denoiser
from pipelines.checkpoint import Checkpoint, CheckpointError
from pipelines.decode_choices import Choice, Latent, hunyuan_exact_choices, hunyuan_settings, hunyuan_tile_choices
from pipelines.families import (
    Assistant,
    FamilyLayout,
    ModelFacts,
    PublishedModel,
    TextEncoder,
    count_parameters,
    part_dtype,
)
from pipelines.pipeline import VideoPipeline
from vae_group.tiles import TileSettings
from vae_group.worker import Decoder
from videopipe.config import Config, ConfigError
from videopipe.geometry import LatentGeometry
from videopipe.records import VideoRequest
from videopipe.runtime import Runtime

DIT_CONFIG = "transformer/config.json"


class HunyuanVideoPipeline(VideoPipeline):
    """Text to video with HunyuanVideo; the call and its defaults follow diffusers' class of the same name."""

    family = "hunyuan-video"


def latent_geometry(checkpoint: Checkpoint) -> LatentGeometry:
    """Strides and patches from the config files; absent keys have diffusers' defaults."""
    dit, vae = checkpoint.json(DIT_CONFIG), checkpoint.json("vae/config.json")
    return LatentGeometry(
        channels=dit.get("in_channels", 16),
        stride_t=vae.get("temporal_compression_ratio", 4),
        stride_s=vae.get("spatial_compression_ratio", 8),
        patch_t=dit.get("patch_size_t", 1),
        patch_s=dit.get("patch_size", 2),
    )


def modulation_parameters(dit: Mapping[str, Any]) -> int:
    """Parameters of the layers that make shift, scale and gate, by transformer/config.json or diffusers' defaults."""
    width = dit.get("num_attention_heads", 24) * dit.get("attention_head_dim", 128)
    # six vectors for each stream of a dual block, three for a single block, two at the end
    vectors = 12 * dit.get("num_layers", 20) + 3 * dit.get("num_single_layers", 40) + 2
    return vectors * (width * width + width)


def has_second_branch(request: VideoRequest) -> bool:
    """Whether each step evaluates the DiT for a negative prompt as well (diffusers' rule)."""
    return request.true_cfg_scale > 1 and request.negative_prompt is not None


class HunyuanVideo:
    """The family; see `pipelines.families.Family`."""

    name = "hunyuan-video"
    preload = ("pipelines.hunyuan_video_parts",)
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text_encoder": ("text_encoder", "text_encoder_2"),
        "denoiser": ("transformer",),
        "decoder": ("vae",),
    }
    # diffusers' and transformers' classes at the sizes of arXiv 2412.03603, Llama-3-8B and CLIP ViT-L/14
    published = PublishedModel(
        location="hunyuanvideo-community/HunyuanVideo",
        facts=ModelFacts(
            family=name,
            geometry=LatentGeometry(channels=16, stride_t=4, stride_s=8, patch_t=1, patch_s=2),
            num_heads=24,
            head_dim=128,
            attention_layers=60,
            text_tokens=256,
            text_dim=4096,
            pooled_dim=768,
        ),
        parameters={
            "text_encoder": 7_505_186_816,
            "text_encoder_2": 123_060_480,
            "transformer": 12_821_012_544,
            "vae": 246_478_803,
        },
    )

    def facts(self, checkpoint: Checkpoint) -> ModelFacts:
        """Sizes from transformer/config.json and vae/config.json; absent keys have diffusers' defaults."""
        dit, vae = checkpoint.json(DIT_CONFIG), checkpoint.json("vae/config.json")
        for part, config, expected in (
            ("transformer", dit, "HunyuanVideoTransformer3DModel"),
            ("vae", vae, "AutoencoderKLHunyuanVideo"),
        ):
            if config.get("_class_name") != expected:
                raise CheckpointError(
                    f"model.weights={checkpoint.location!r}: {part} is a {config.get('_class_name')}, "
                    f"but model.family='hunyuan-video' needs {expected}"
                )
        if dit.get("image_condition_type") is not None:
            raise CheckpointError(
                f"model.weights={checkpoint.location!r}: an image-to-video transformer "
                f"(image_condition_type={dit['image_condition_type']!r}); text-to-video needs one without"
            )
        return ModelFacts(
            family=self.name,
            geometry=latent_geometry(checkpoint),
            num_heads=dit.get("num_attention_heads", 24),
            head_dim=dit.get("attention_head_dim", 128),
            attention_layers=dit.get("num_layers", 20) + dit.get("num_single_layers", 40),
            text_tokens=256,
            text_dim=dit.get("text_embed_dim", 4096),
            pooled_dim=dit.get("pooled_projection_dim", 768),
        )

    def check_request(self, request: VideoRequest, facts: ModelFacts, where: str = "") -> None:
        """Sizes, steps, seed and id; raises ValueError with the nearest valid value."""
        request.check(where)
        facts.geometry.check(request.spec, where)

    def check_config(self, config: Config) -> None:
        """Every option of the configuration is for this family; but tiles must meet."""
        geometry = self.published.facts.geometry
        tiles = hunyuan_settings(TileSettings(spatial=False), config.decode, geometry.stride_t, geometry.stride_s)
        try:
            tiles.check(geometry.stride_t, geometry.stride_s)
        except ValueError as error:
            raise ConfigError(f"decode.{error}") from None

    def evaluations(self, request: VideoRequest) -> int:
        """2 with a negative prompt and true_cfg_scale above 1, else 1."""
        return 2 if has_second_branch(request) else 1

    def weight_bytes(self, config: Config, checkpoint: Checkpoint | None) -> tuple[dict[str, int | None], str]:
        """By parameter counts; without the layers that `memory.precompute_modulation` keeps in host memory."""
        counts, source = count_parameters(self.published, self.parts, checkpoint)
        if config.memory.precompute_modulation and counts["denoiser"] is not None:
            counts["denoiser"] -= modulation_parameters({} if checkpoint is None else checkpoint.json(DIT_CONFIG))
        sizes = {p: None if n is None else n * part_dtype(config, p).itemsize for p, n in counts.items()}
        return sizes, source

    def decode_choices(
        self, vae: Mapping[str, Any], config: Config, members: int, latent: Latent
    ) -> Iterator[Choice[Any]]:
        """In tiles, or by plans of the exact decode."""
        item_bytes = part_dtype(config, "decoder").itemsize
        if config.decode.exact:
            return hunyuan_exact_choices(vae, latent, members, item_bytes)
        strides = (vae["temporal_compression_ratio"], vae["spatial_compression_ratio"])
        wanted = hunyuan_settings(TileSettings(**vae["tiles"]), config.decode, *strides)
        return hunyuan_tile_choices(vae, wanted, latent, members, item_bytes)

    def layout(self, facts: ModelFacts, num_video: int, members: int) -> FamilyLayout | None:
        """None: every layer exchanges by the strategy."""
        return None

    def load_text_encoder(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> TextEncoder:
        """Llama and CLIP with their tokenizers."""
        from pipelines.hunyuan_video_parts import HunyuanVideoTextEncoder

        return HunyuanVideoTextEncoder(checkpoint, config, runtime)

    def load_denoiser(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> Denoiser:
        """The DiT, sharded over the DiT group."""
        from pipelines.hunyuan_video_parts import HunyuanVideoDenoiser

        return HunyuanVideoDenoiser(checkpoint, config, runtime)

    def load_assistant(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> Assistant:
        """This rank's share of the heads, when it is lent to the DiT group."""
        from pipelines.hunyuan_video_parts import HunyuanVideoAssistant

        return HunyuanVideoAssistant(self.facts(checkpoint), config, runtime)

    def load_decoder(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> Decoder:
        """The VAE."""
        from pipelines.hunyuan_video_parts import HunyuanVideoDecoder

        return HunyuanVideoDecoder(checkpoint, config, runtime)
