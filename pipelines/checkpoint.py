"""A checkpoint in diffusers' layout, on disk or on the hub: its small config files without loading any weight."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import msgspec

from pipelines.bundled import find_weights
from videopipe.config import ModelConfig

_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or of another kind. The message is one line."""


class CheckpointUnreachableError(CheckpointError):
    """The hub did not answer, or does not have it, and neither does its local cache."""


class Checkpoint(msgspec.Struct, frozen=True):
    """A directory or a hub id, and a hub revision."""

    location: str
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether `location` is a directory."""
        return Path(self.location).is_dir()

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the checkpoint, such as `transformer/config.json`.

        Raises:
            CheckpointError: no such directory, hub id or file; names `model.weights`.
        """
        path = self._file(name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"model.weights={self.location!r} has no {name}: not in diffusers' layout") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"model.weights={self.location!r}: {name} cannot be read: {error}") from None

    def is_cached(self, name: str) -> bool:
        """Whether a file of a hub checkpoint lies in the hub's local cache; asks nobody."""
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            return isinstance(try_to_load_from_cache(self.location, name, revision=self.revision), str)
        except HFValidationError:
            return False

    def num_parameters(self, folder: str) -> int | None:
        """Parameters of one folder by the headers of its safetensors files, without reading a weight.

        Returns:
            None where the checkpoint is not a directory, or the folder holds no safetensors file.
        Raises:
            CheckpointError: a file that is no safetensors file.
        """
        root = Path(self.location) / folder
        if not self.is_local:
            return None
        indexes = sorted(root.glob("*.safetensors.index.json"), key=lambda path: len(path.name))
        if indexes:  # shards; the shortest name is the one without a variant such as fp16
            files = {root / name for name in self.json(f"{folder}/{indexes[0].name}")["weight_map"].values()}
        else:
            files = set(sorted(root.glob("*.safetensors"), key=lambda path: len(path.name))[:1])
        return sum(self._header_parameters(file) for file in files) if files else None

    def _header_parameters(self, file: Path) -> int:
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                if length > _LONGEST_HEADER:
                    raise ValueError(f"header of {length} bytes")
                header = json.loads(stream.read(length))
            tensors = [entry for name, entry in header.items() if name != "__metadata__"]
            return sum(math.prod(entry["shape"]) for entry in tensors if entry["dtype"][0] in "FB")
        except (OSError, ValueError, KeyError, struct.error) as error:
            raise CheckpointError(
                f"model.weights={self.location!r}: {file.name} is no safetensors file: {error}"
            ) from None

    def _file(self, name: str) -> Path:
        local = Path(self.location)
        if local.is_dir():
            return local / name
        if local.is_absolute() or self.location.startswith(".") or self.location.count("/") != 1:
            raise CheckpointError(
                f"model.weights={self.location!r} is neither a directory nor a hub id like 'owner/name'"
            )
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.location, name, revision=self.revision))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointUnreachableError(
                f"model.weights={self.location!r} is no directory, and the hub gave no {name}: {reason}"
            ) from None


def open_checkpoint(model: ModelConfig) -> Checkpoint:
    """The checkpoint that `model.weights` names: a directory, a hub id, or `bundled:<name>`.

    Raises:
        ConfigError: no bundled model of that name.
    """
    return Checkpoint(find_weights(model.weights), model.revision)
