"""What a caller hands to the engine and gets back: jobs, batches of them, finished clips."""

import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
from numpy.typing import NDArray

from videopipe.records import SideCar, VideoRequest
from videopipe.writer import ClipFailed


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A request with what the caller gave besides: noise, conditioning, and the kind of result wanted."""

    request: VideoRequest
    result: Literal["uint8", "float32", "latents"] = "uint8"
    noise: Any = None  # Tensor [1, C, T', H', W'] float32
    conditioning: Any = None  # dict of Tensor by name
    record_to: Path | None = None  # the folder <id>.steps of its recorded steps
    save_to: Path | None = None  # the folder for its clip: uint8 frames then go to a writer, not to the caller

    @property
    def is_written(self) -> bool:
        """Whether a writer process takes the frames."""
        return self.save_to is not None and self.result == "uint8"


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """A finished clip.

    In host memory as `array`: frames [T, H, W, 3] uint8 or float32, or latents [1, C, T', H', W'] float32. Or as a file
    that a writer has written, at `path`. Or neither: `failure` says why it could not be written, and `array` holds
    the latents, None where they were lost as well. Paths are absolute.
    """

    job: Job
    side_car: SideCar
    array: Any = None
    path: str | None = None
    failure: ClipFailed | None = None


FramesListener = Callable[[str, int, NDArray[Any]], None]
"""`listener(request, first_frame, frames)`: frames [t, H, W, 3] of a clip, each frame once and in the order of time.

Called from the engine's thread, so it must return at once. The array is read-only and not copied: it is the memory that
the ranks write, and lasts while somebody holds it.
"""


class Batch:
    """The results of one submission, in the order in which they finish.

    `tell` reaches the engine's thread, which gives frames to `on_frames` as they come.
    """

    def __init__(
        self, tell: Callable[[str, Any], None], jobs: list[Job], on_frames: FramesListener | None = None
    ) -> None:
        self.on_frames = on_frames
        self._tell = tell
        self._results: queue.SimpleQueue[Finished | BaseException] = queue.SimpleQueue()
        self._left = {job.request.id: job for job in jobs}

    def put(self, result: Finished | BaseException) -> None:
        """Called by the engine's thread."""
        self._results.put(result)

    def __iter__(self) -> Iterator[Finished]:
        """Clips as they finish. One in host memory counts as taken away when the next clip is asked for.

        Raises:
            RankError: a rank was lost; clips that were finished before have been given out already.
        """
        try:
            while self._left:
                result = self._results.get()
                if isinstance(result, BaseException):
                    self._left.clear()
                    raise result
                del self._left[result.job.request.id]
                if not self._left:  # nobody may ask for the next one
                    self._delivered(result.job)
                    yield result
                    return
                try:
                    yield result
                finally:
                    self._delivered(result.job)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Nobody asks for the rest any more: cancel it."""
        left, self._left = self._left, {}
        for job in left.values():
            self._tell("cancel", (job, self))

    def _delivered(self, job: Job) -> None:
        if not job.is_written:  # those are delivered when they are on disk
            self._tell("delivered", job.request.id)
