"""A checkpoint in diffusers' layout, on disk or on the hub: its small config files without loading any weight."""

import json
from pathlib import Path
from typing import Any

import msgspec


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or of another kind. The message is one line."""


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
            raise CheckpointError(
                f"model.weights={self.location!r} is no directory, and the hub gave no {name}: {reason}"
            ) from None
