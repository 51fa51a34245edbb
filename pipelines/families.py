"""What a model family must offer, and the table of families. Adding a model is one file and one line here."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import torch
from torch import Tensor

from dit_group.worker import Denoiser
from pipelines.checkpoint import Checkpoint
from pipelines.decode_choices import Choice, Latent
from vae_group.worker import Decoder
from videopipe.config import Config
from videopipe.geometry import LatentGeometry
from videopipe.records import VideoRequest
from videopipe.runtime import DTYPES, Runtime


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the checkpoint's config files alone tell, before any weight is read.

    `attention_layers` self-attention layers that exchange q, k, v and the output; `text_tokens` the longest prompt,
    in tokens; `joint_text` whether text tokens are part of the self-attention's sequence, and so of what ranks share,
    or each rank has the whole text; `sparse_n` groups of tokens that sparse layers keep apart; `text_dim` and
    `pooled_dim` the widths of the conditioning, 0 where there is none; `divides_rows` whether leftover heads may be
    computed by query rows; `branches_as_rows` whether both branches of guidance are rows of one evaluation.
    """

    family: str
    geometry: LatentGeometry
    num_heads: int
    head_dim: int
    attention_layers: int
    text_tokens: int
    joint_text: bool = True
    sparse_n: int = 1
    text_dim: int = 0
    pooled_dim: int = 0
    divides_rows: bool = True
    branches_as_rows: bool = False


class FamilyLayout(msgspec.Struct, frozen=True, kw_only=True):
    """How one evaluation of the DiT lies over its members, where a family deals tokens and heads out by itself.

    `sent_values` are what each member sends to others, for one row of the batch.
    """

    video_counts: tuple[int, ...]
    sent_values: tuple[int, ...]


class PublishedModel(msgspec.Struct, frozen=True, kw_only=True):
    """The published checkpoint of a family, so that a plan can be explained where it cannot be reached.

    `parameters` counts by the checkpoint's folder.
    """

    location: str
    facts: ModelFacts
    parameters: dict[str, int]


class TextEncoder(Protocol):
    """A family's text encoders, loaded on this rank."""

    def encode(self, request: VideoRequest, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Conditioning by name, on the host; what the caller gave is not encoded again."""

    def text_masks(self, conditioning: Mapping[str, Tensor]) -> list[bytes]:
        """0 and 1 for each text token, for each evaluation of the DiT in a step."""


class Assistant(Protocol):
    """A VAE rank's help in denoising steps; see `dit_group.assist.Assistant`."""

    def prepare(self, request: VideoRequest, text_masks: Sequence[bytes], recorded: bool) -> None:
        """Steps of this request may want help; masks as `TextEncoder.text_masks` gave them."""

    def step(self, request: str, helpers: tuple[int, ...]) -> None:
        """Take part in one step."""

    def forget(self, request: str) -> None:
        """No step of this request will come any more."""


class Family(Protocol):
    """A model family: how its parts are described, loaded and joined."""

    name: str
    preload: tuple[str, ...]  # modules that every rank needs, imported once before ranks are forked
    parts: Mapping[str, tuple[str, ...]]  # folders of the checkpoint that each part loads
    published: PublishedModel

    def facts(self, checkpoint: Checkpoint) -> ModelFacts:
        """Sizes from the config files.

        Raises:
            ValueError: not a checkpoint of this family.
        """

    def check_request(self, request: VideoRequest, facts: ModelFacts, where: str = "") -> None:
        """Refuse what this model cannot render, naming the nearest valid value."""

    def check_config(self, config: Config) -> None:
        """Refuse options that this model does not have.

        Raises:
            ConfigError: names the path, the value and the nearest valid value.
        """

    def evaluations(self, request: VideoRequest) -> int:
        """How often a step evaluates the DiT for one clip, one after the other or as rows of a batch."""

    def weight_bytes(self, config: Config, checkpoint: Checkpoint | None) -> tuple[dict[str, int | None], str]:
        """Bytes of each part's weights on the device of a rank that loads it, and where the numbers come from.

        Args:
            checkpoint: None for the published one.
        Returns:
            None for a part that nobody knows the size of.
        """

    def decode_choices(
        self, vae: Mapping[str, Any], config: Config, members: int, latent: Latent
    ) -> Iterator[Choice[Any]]:
        """The ways to decode latents of (T', H', W'), the wanted one first.

        Args:
            vae: the decoder's `memory_facts`.
            members: ranks that decode a clip together.
        """

    def layout(self, facts: ModelFacts, num_video: int, members: int) -> FamilyLayout | None:
        """Who has which tokens and sends what; None where each layer exchanges q, k, v and output by the strategy."""

    def load_text_encoder(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> TextEncoder:
        """Load the text encoders onto the rank's device."""

    def load_denoiser(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> Denoiser:
        """Load the DiT onto the rank's device, sharded over the DiT group."""

    def load_assistant(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> Assistant:
        """Prepare to help the DiT group; there are no weights to load."""

    def load_decoder(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> Decoder:
        """Load the VAE onto the rank's device, to decode with the rank's team."""


FAMILIES = {
    "hunyuan-video": "pipelines.hunyuan_video:HunyuanVideo",
    "open-sora-plan": "pipelines.open_sora_plan_family:OpenSoraPlan",
}


def load_family(name: str) -> Family:
    """The family of that name from the table."""
    module, attribute = FAMILIES[name].split(":")
    return getattr(importlib.import_module(module), attribute)()


def count_parameters(
    published: PublishedModel, folders_of: Mapping[str, tuple[str, ...]], checkpoint: Checkpoint | None
) -> tuple[dict[str, int | None], str]:
    """Parameters of each part and where the numbers come from; None where nobody knows.

    Args:
        folders_of: the checkpoint's folders by part.
        checkpoint: whose safetensors headers are read; None for the published counts.
    """
    if checkpoint is None:
        counts: dict[str, int | None] = dict(published.parameters)
        source = f"the published parameter counts of {published.location}"
    else:
        counts = {folder: checkpoint.num_parameters(folder) for folders in folders_of.values() for folder in folders}
        source = f"the safetensors headers of {checkpoint.location}"
        if None in counts.values():
            source = "nowhere: there are no safetensors files to look at on this machine"
    parts: dict[str, int | None] = {}
    for part, folders in folders_of.items():
        known = [count for folder in folders if (count := counts[folder]) is not None]
        parts[part] = sum(known) if len(known) == len(folders) else None
    return parts, source


def part_dtype(config: Config, part: str) -> torch.dtype:
    """The precision that a part's weights are loaded in."""
    m = config.model
    return DTYPES[{"text_encoder": m.text_encoder_dtype, "denoiser": None, "decoder": m.vae_dtype}[part] or m.dtype]
