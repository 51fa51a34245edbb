"""Which way of moving heads each request gets: from this run's measurements, from those on disk, or the plain way."""

import hashlib
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from pipelines.families import ModelFacts, load_family
from videopipe.arrangement import Arrangement, Calibration, Rules, Shape
from videopipe.config import Config
from videopipe.files import write_bytes
from videopipe.partition import Mesh
from videopipe.records import VideoRequest

VERSION = 1
BUDGET_S = 4.0
"""About how long the ranks measure before the first clip of a size; a step of such a clip runs many more layers."""

MAX_SHAPES = 3
"""So many new sizes of one submission are measured; the others take the choice for the nearest one."""


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
        return self.folder / f"{_digest(setup)}-{shape.num_video}v-{shape.num_text}t-{shape.rows}b.json"

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


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The ways of one request: without helpers first, then the sets that may be lent, the best first.

    `source` says where they come from; "nearest" is a measurement of another shape, by tokens. `shape` is the measured
    one, None where nothing was measured.
    """

    ways: tuple[Arrangement, ...]
    source: Literal["measured", "cache", "nearest", "not measured"]
    shape: Shape | None = None

    @property
    def helper_sets(self) -> tuple[tuple[int, ...], ...]:
        """The sets of VAE ranks that may be lent."""
        return tuple(way.helpers for way in self.ways if way.helpers)

    def describe(self) -> dict[str, Any]:
        """For side-car files and `videopipe explain`."""
        return {
            "source": self.source,
            "shape": None if self.shape is None else msgspec.to_builtins(self.shape),
            "ways": [{**msgspec.to_builtins(way), "text": way.describe()} for way in self.ways],
        }


class Calibrations:
    """The calibrations of one run of ranks.

    Args:
        setup: what the ranks run on.
    """

    def __init__(self, config: Config, facts: ModelFacts, setup: Setup) -> None:
        self.rules = rules_of(config, facts)
        self._config = config
        self._facts = facts
        self._setup = setup
        self._cache = CalibrationCache.of(config)
        self._known: dict[Shape, tuple[Calibration, Literal["measured", "cache"]]] = {}

    def take(self, calibration: Calibration) -> None:
        """The ranks have measured."""
        self._known[calibration.shape] = (calibration, "measured")
        self._cache.put(self._setup, calibration)

    def get(self, shape: Shape) -> Calibration | None:
        """From this run, else from disk."""
        if shape not in self._known:
            stored = self._cache.get(self._setup, shape)
            if stored is not None:
                self._known[shape] = (stored, "cache")
        return self._known[shape][0] if shape in self._known else None

    def to_measure(self, requests: Iterable[VideoRequest]) -> list[Shape]:
        """Shapes of these requests that nothing is known about, in their order, so many as are worth the time."""
        if not self.rules.is_open:
            return []
        shapes = dict.fromkeys(shape_of(self._config, self._facts, request) for request in requests)
        return [shape for shape in shapes if self.get(shape) is None][:MAX_SHAPES]

    def choose(self, request: VideoRequest) -> Choice:
        """The ways of a request."""
        shape = shape_of(self._config, self._facts, request)
        if not self.rules.is_open:
            return Choice(ways=self.rules.without_choice(), source="not measured")
        if self.get(shape) is not None:
            calibration, source = self._known[shape]
            return Choice(ways=calibration.chosen, source=source, shape=shape)
        for other in self._cache.all(self._setup):
            self._known.setdefault(other.shape, (other, "cache"))
        if not self._known:
            return Choice(ways=self.rules.without_choice(), source="not measured")
        near = min(self._known, key=lambda known: abs(known.num_tokens - shape.num_tokens))
        return Choice(ways=self._known[near][0].chosen, source="nearest", shape=near)


def rules_of(config: Config, facts: ModelFacts) -> Rules:
    """What the configuration leaves open."""
    a, members = config.attention, config.groups.dit_ranks
    if a.strategy == "usp":
        members = Mesh.choose(members, facts.num_heads, a.ulysses_degree, a.mesh_inside).ulysses_degree
    return Rules(
        num_heads=facts.num_heads,
        members=members,
        heads_per_chunk=a.fixed_heads_per_chunk,
        choose_chunks=a.heads_per_chunk == "auto",
        balance=None if a.balance == "auto" and facts.divides_rows else a.fixed_balance,
        helper_sets=config.helper_sets,
        choose_helpers=a.co_processing == "auto",
    )


def shape_of(config: Config, facts: ModelFacts, request: VideoRequest) -> Shape:
    """The shape that is measured for a request: its size, and the longest prompt it may have."""
    text = min(request.max_sequence_length, facts.text_tokens)
    grid = facts.geometry.token_grid(request.spec, max(text, config.groups.dit_ranks) if facts.joint_text else 0)
    rows = load_family(config.model.family).evaluations(request) if facts.branches_in_batch else 1
    return Shape(num_video=grid.video, num_text=grid.text, rows=rows)


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
