"""Calibrations on disk: measured times hold for one model, one machine and one version of torch, named in each file."""

import hashlib
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import msgspec
import torch

from pipelines.families import ModelFacts
from videopipe.arrangement import Calibration, Shape
from videopipe.config import Config
from videopipe.files import write_bytes

VERSION = 2


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What times depend on besides the shape."""

    family: str
    num_heads: int
    head_dim: int
    layers: int
    dtype: str
    kernel: str
    attention: dict[str, str | int | bool]
    dit_ranks: int
    vae_ranks: int
    hosts: int
    devices: tuple[str, ...]
    threads: int
    torch: str


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the cache."""

    version: int
    setup: Setup
    calibration: Calibration


class CalibrationCache:
    """Calibrations on disk, one JSON file for each setup and shape, so that writers never meet in one file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, config: Config) -> "CalibrationCache":
        """In the configured folder, or in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
        if config.attention.calibration_cache is not None:
            return cls(Path(config.attention.calibration_cache).expanduser())
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return cls(Path(base) / "videopipe" / "calibration")

    def get(self, setup: Setup, shape: Shape) -> Calibration | None:
        """What is stored for it, None for nothing; a file that cannot be used is told of and counts as nothing."""
        found = self._read(self.path(setup, shape), setup)
        return found if found is not None and found.shape == shape else None

    def all(self, setup: Setup) -> list[Calibration]:
        """Everything stored for this setup."""
        found = (self._read(path, setup) for path in sorted(self.folder.glob(f"{_digest(setup)}-*.json")))
        return [calibration for calibration in found if calibration is not None]

    def put(self, setup: Setup, calibration: Calibration) -> None:
        """Store, replacing what is there. A folder that cannot be written is told of: the next run measures again."""
        stored = Stored(version=VERSION, setup=setup, calibration=calibration)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_bytes(
                self.path(setup, calibration.shape), msgspec.json.format(msgspec.json.encode(stored), indent=1) + b"\n"
            )
        except OSError as error:
            warnings.warn(f"calibration is not kept: attention.calibration_cache={self.folder}: {error}", stacklevel=2)

    def path(self, setup: Setup, shape: Shape) -> Path:
        """Where a calibration is stored."""
        name = f"{_digest(setup)}-{shape.num_video}v-{shape.num_text}t-{shape.rows}b"
        return self.folder / (name + ("" if shape.guidance == "none" else f"-{shape.guidance}") + ".json")

    def _read(self, path: Path, setup: Setup) -> Calibration | None:
        try:
            stored = msgspec.json.decode(path.read_bytes(), type=Stored)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            warnings.warn(f"calibration {path} cannot be read and will be measured again: {error}", stacklevel=2)
            return None
        if (stored.version, stored.setup) != (VERSION, setup):
            warnings.warn(f"calibration {path} is for something else and will be measured again", stacklevel=2)
            return None
        return stored.calibration


def setup_of(config: Config, facts: ModelFacts, devices: Iterable[str], hosts: int) -> Setup:
    """What the times of a run depend on.

    Args:
        devices: models of the ranks' devices.
        hosts: how many machines they are in.
    """
    a = config.attention
    return Setup(
        family=facts.family,
        num_heads=facts.num_heads,
        head_dim=facts.head_dim,
        layers=facts.attention_layers,
        dtype=config.model.dtype,
        kernel=config.model.attention_kernel,
        attention={
            "strategy": a.strategy,
            "ulysses_degree": a.ulysses_degree,
            "mesh_inside": a.mesh_inside,
            "heads_per_chunk": a.heads_per_chunk,
            "balance": a.balance,
            "co_processing": a.co_processing,
            "ping_pong": a.ping_pong,
            "overlap_mlp": a.overlap_mlp,
        },
        dit_ranks=config.groups.dit_ranks,
        vae_ranks=config.groups.vae_ranks,
        hosts=hosts,
        devices=tuple(devices),
        threads=config.runtime.threads_per_rank,
        torch=str(torch.__version__),
    )


def _digest(setup: Setup) -> str:
    return hashlib.sha256(msgspec.json.encode(setup, order="sorted")).hexdigest()[:16]
