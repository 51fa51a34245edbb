"""What a user sees while clips are rendered: bars on a terminal, plain lines elsewhere, always on standard error."""

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from pipelines.engine import Progress
from videopipe.records import VideoRequest

if TYPE_CHECKING:
    from rich.progress import TaskID

STEP_LINE_EVERY_S = 5.0


class Display(Progress, Protocol):
    """A progress display: entered before ranks start, told by the engine's thread, left when all is written."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *details: object) -> None: ...

    def written(self, request: str, path: Path, seconds: float) -> None:
        """A clip lies on disk; `seconds` since it was submitted. From the caller's thread."""

    def failed(self, request: str, line: str) -> None:
        """A clip could not be written; `line` tells why, also where progress is not shown."""


def make_display(requests: Sequence[VideoRequest], *, quiet: bool) -> Display:
    """Bars where standard error is a terminal, lines where it is not, nothing where `quiet`."""
    if quiet:
        return SilentDisplay()
    if sys.stderr.isatty():
        return BarDisplay(len(requests))
    return LineDisplay(len(requests), sys.stderr)


class Stages:
    """Which request is in which stage: what every display keeps. `waiting` is what the queue holds."""

    def __init__(self) -> None:
        self._stage: dict[str, str] = {}

    def enter(self, request: str, stage: str) -> None:
        """A request enters a stage; after its last step it is `waiting` until `decode`."""
        self._stage[request] = stage

    @property
    def waiting(self) -> int:
        """Requests that are denoised and not yet taken by a decoding rank."""
        return sum(stage == "waiting" for stage in self._stage.values())


class SilentDisplay:
    """Says nothing on standard error; paths of clips go to standard output all the same."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        return None

    def loaded(self, rank: int, world_size: int) -> None:
        """See `Progress`."""

    def step(self, request: str, step: int, num_steps: int) -> None:
        """See `Progress`."""

    def stage(self, request: str, stage: str) -> None:
        """See `Progress`."""

    def written(self, request: str, path: Path, seconds: float) -> None:
        """See `Display`."""
        print(path, flush=True)

    def failed(self, request: str, line: str) -> None:
        """See `Display`."""
        print(line, file=sys.stderr, flush=True)


class LineDisplay:
    """One line for each event that matters, with the seconds since the start; steps at most every few seconds."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self._total = total
        self._stream = stream
        self._begin = time.monotonic()
        self._stages = Stages()
        self._loaded = 0
        self._written = 0
        self._denoise_begin: dict[str, float] = {}
        self._last_step_line = self._begin
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._say("starting")
        return self

    def __exit__(self, *details: object) -> None:
        return None

    def loaded(self, rank: int, world_size: int) -> None:
        """See `Progress`."""
        self._loaded += 1
        self._say(f"rank {rank} has loaded its parts ({self._loaded} of {world_size})")

    def step(self, request: str, step: int, num_steps: int) -> None:
        """See `Progress`."""
        now = time.monotonic()
        done = step + 1
        if done == num_steps:
            self._stages.enter(request, "waiting")
            self._say(f"{request}: denoised, {self._stages.waiting} in the queue")
        elif now - self._last_step_line >= STEP_LINE_EVERY_S:
            self._last_step_line = now
            left = (now - self._denoise_begin[request]) / done * (num_steps - done)
            self._say(f"{request}: step {done} of {num_steps}, {left:.0f} s left")

    def stage(self, request: str, stage: str) -> None:
        """See `Progress`."""
        self._stages.enter(request, stage)
        if stage == "denoise":
            self._denoise_begin[request] = time.monotonic()
        if stage != "done":
            self._say(f"{request}: {stage}")

    def written(self, request: str, path: Path, seconds: float) -> None:
        """See `Display`."""
        self._written += 1
        self._say(f"{request}: finished after {seconds:.1f} s ({self._written} of {self._total})")
        print(path, flush=True)

    def failed(self, request: str, line: str) -> None:
        """See `Display`."""
        with self._lock:
            print(line, file=self._stream, flush=True)

    def _say(self, text: str) -> None:
        with self._lock:
            print(f"[{time.monotonic() - self._begin:7.1f} s] {text}", file=self._stream, flush=True)


class BarDisplay:
    """A bar for the ranks that load, one for all clips with the queue, and one for each clip under way."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[what]}", markup=False),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self._console,
            transient=True,
            redirect_stdout=False,
        )
        self._stages = Stages()
        self._loaded = 0
        self._loading = self._bars.add_task("ranks", total=None, what="starting")
        self._clips = self._bars.add_task("clips", total=total, what="", visible=False)
        self._tasks: dict[str, TaskID] = {}  # by request

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._bars.stop()

    def loaded(self, rank: int, world_size: int) -> None:
        """See `Progress`."""
        self._loaded += 1
        self._bars.update(self._loading, total=world_size, completed=self._loaded, what="loaded")
        if self._loaded == world_size:
            self._bars.update(self._loading, visible=False)
            self._bars.update(self._clips, visible=True)

    def step(self, request: str, step: int, num_steps: int) -> None:
        """See `Progress`."""
        if step + 1 == num_steps:
            self._stages.enter(request, "waiting")
            self._bars.update(self._tasks[request], what="waits in the queue")
            self._show_queue()
        if request in self._tasks:
            self._bars.update(self._tasks[request], total=num_steps, completed=step + 1)

    def stage(self, request: str, stage: str) -> None:
        """See `Progress`."""
        self._stages.enter(request, stage)
        if stage == "done":
            if request in self._tasks:
                self._bars.remove_task(self._tasks.pop(request))
        elif request not in self._tasks:
            self._tasks[request] = self._bars.add_task(_short(request), total=None, what=stage)
        else:
            self._bars.update(self._tasks[request], what=stage)
        self._show_queue()

    def written(self, request: str, path: Path, seconds: float) -> None:
        """See `Display`."""
        self._bars.update(self._clips, advance=1)
        if sys.stdout.isatty():  # the terminal of the bars
            self._console.print(f"{path}  {seconds:.1f} s", markup=False, highlight=False, soft_wrap=True)
        else:
            print(path, flush=True)

    def failed(self, request: str, line: str) -> None:
        """See `Display`."""
        self._bars.update(self._clips, advance=1)
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _show_queue(self) -> None:
        waiting = self._stages.waiting
        self._bars.update(self._clips, what=f"{waiting} in the queue" if waiting else "")


def _short(name: str, limit: int = 32) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"
