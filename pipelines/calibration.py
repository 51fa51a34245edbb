"""Which way of moving heads each request gets: from this run's measurements, from those on disk, or the plain way."""

import queue
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import msgspec

from pipelines.calibration_cache import CalibrationCache, Setup
from pipelines.families import ModelFacts, load_family
from videopipe.arrangement import Arrangement, Calibration, Guidance, Rules, Shape
from videopipe.config import Config
from videopipe.messages import Arrange, Calibrate, ToRank
from videopipe.partition import Mesh
from videopipe.records import VideoRequest

BUDGET_S = 8.0
"""About how long the ranks measure before the first clip of a size, for layers of 50 ms: it goes with their length."""

MAX_SHAPES = 3
"""So many new sizes of one submission are measured; the others take the choice for the nearest one."""


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
        self._config = config
        self._facts = facts
        self._setup = setup
        self._cache = CalibrationCache.of(config)
        self._known: dict[Shape, tuple[Calibration, Literal["measured", "cache"]]] = {}

    def rules(self, guidance: Guidance) -> Rules:
        """What is open where branches of guidance are evaluated so."""
        return rules_of(self._config, self._facts, guidance)

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
        shapes = dict.fromkeys(shape_of(self._config, self._facts, request) for request in requests)
        is_open = {shape: self.rules(shape.guidance).is_open for shape in shapes}
        return [shape for shape in shapes if is_open[shape] and self.get(shape) is None][:MAX_SHAPES]

    def choose(self, request: VideoRequest) -> Choice:
        """The ways of a request."""
        shape = shape_of(self._config, self._facts, request)
        rules = self.rules(shape.guidance)
        if not rules.is_open:
            return Choice(ways=rules.without_choice(), source="not measured")
        if self.get(shape) is not None:
            calibration, source = self._known[shape]
            return Choice(ways=calibration.chosen, source=source, shape=shape)
        for other in self._cache.all(self._setup):
            self._known.setdefault(other.shape, (other, "cache"))
        alike = [known for known in self._known if known.guidance == shape.guidance]
        if not alike:
            return Choice(ways=rules.without_choice(), source="not measured")
        near = min(alike, key=lambda known: abs(known.num_tokens - shape.num_tokens))
        return Choice(ways=self._known[near][0].chosen, source="nearest", shape=near)


Answer = queue.SimpleQueue[Calibration | BaseException]


class Measuring:
    """When the ranks measure, and what they were told. One thread owns it.

    Args:
        tell: sends a message to all ranks that take part in denoising steps.
    """

    def __init__(self, calibrations: Calibrations, tell: Callable[[ToRank], None]) -> None:
        self.calibrations = calibrations
        self._tell = tell
        self._shapes: deque[Shape] = deque()
        self._budget_s = BUDGET_S
        self._answer: Answer | None = None
        self._arranged: dict[tuple[int, Guidance], tuple[Arrangement, ...]] = {}
        self.running = False

    def begin(self, shapes: Sequence[Shape], budget_s: float = BUDGET_S, answer: Answer | None = None) -> None:
        """Measure these shapes one after the other; nothing else may run until `running` is false again.

        Args:
            budget_s: about how long each may take.
            answer: gets the result of one shape, or the error that ends the run.
        """
        self._shapes.extend(shapes)
        self._budget_s = budget_s
        self._answer = answer
        self._next()

    def take(self, calibration: Calibration) -> None:
        """The leader has reported."""
        self.calibrations.take(calibration)
        if self._answer is not None:
            self._answer.put(calibration)
            self._answer = None
        self._next()

    def fail(self, error: BaseException) -> None:
        """The run has ended."""
        if self._answer is not None:
            self._answer.put(error)
            self._answer = None

    def arrange(self, shape: Shape, ways: tuple[Arrangement, ...]) -> None:
        """Tell the ranks how to lay out such sequences, unless they do so already."""
        key = (shape.num_video, shape.guidance)
        if self._arranged.get(key) != ways:
            self._arranged[key] = ways
            self._tell(Arrange(num_video=shape.num_video, guidance=shape.guidance, arrangements=ways))

    def _next(self) -> None:
        self.running = bool(self._shapes)
        if self.running:
            shape = self._shapes.popleft()
            rules = self.calibrations.rules(shape.guidance)
            self._tell(Calibrate(shape=shape, rules=rules, budget_s=self._budget_s))


def rules_of(config: Config, facts: ModelFacts, guidance: Guidance = "none") -> Rules:
    """What the configuration leaves open for evaluations that are guided so, of what the model's attention can do."""
    a, members = config.attention, config.members(guidance)
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
        in_turns=False if guidance != "pair" else True if a.ping_pong == "on" else None,
        groups=facts.sparse_n,
    )


def shape_of(config: Config, facts: ModelFacts, request: VideoRequest) -> Shape:
    """The shape that is measured for a request: its size, and the longest prompt it may have."""
    evaluations = load_family(facts.family).evaluations(request)
    guidance = config.guidance(evaluations)
    text = min(request.max_sequence_length, facts.text_tokens)
    grid = facts.geometry.token_grid(request.spec, max(text, config.members(guidance)) if facts.joint_text else 0)
    rows = evaluations if facts.branches_as_rows and guidance == "none" else 1
    return Shape(num_video=grid.video, num_text=grid.text, rows=rows, guidance=guidance)
