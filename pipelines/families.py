"""What a model family must offer, and the table of families. Adding a model is one file and one line here."""

import importlib
from collections.abc import Mapping
from typing import Protocol

import msgspec
from torch import Tensor

from dit_group.worker import Denoiser
from pipelines.checkpoint import Checkpoint
from vae_group.worker import Decoder
from videopipe.config import Config
from videopipe.geometry import LatentGeometry
from videopipe.records import VideoRequest
from videopipe.runtime import Runtime


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the checkpoint's config files alone tell, before any weight is read.

    `attention_layers` self-attention layers that exchange q, k, v and the output; `text_tokens` the longest prompt,
    in tokens; `text_dim` and `pooled_dim` the widths of the conditioning, 0 where there is none.
    """

    family: str
    geometry: LatentGeometry
    num_heads: int
    head_dim: int
    attention_layers: int
    text_tokens: int
    text_dim: int = 0
    pooled_dim: int = 0


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

    def load_text_encoder(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> TextEncoder:
        """Load the text encoders onto the rank's device."""

    def load_denoiser(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> Denoiser:
        """Load the DiT onto the rank's device, sharded over the DiT group."""

    def load_decoder(self, checkpoint: Checkpoint, config: Config, runtime: Runtime) -> Decoder:
        """Load the VAE onto the rank's device."""


FAMILIES = {"hunyuan-video": "pipelines.hunyuan_video:HunyuanVideo"}


def load_family(name: str) -> Family:
    """The family of that name from the table."""
    module, attribute = FAMILIES[name].split(":")
    return getattr(importlib.import_module(module), attribute)()
