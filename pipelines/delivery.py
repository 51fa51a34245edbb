"""Clips between a decoding rank and the disk: given to writers, and rescued as latents where they cannot be written."""

import select
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.batch import Batch, Finished, Job
from pipelines.writers import WriterPool
from videopipe.config import Config
from videopipe.messages import EndDelivery, LatentsReturned, ToRank
from videopipe.records import SideCar
from videopipe.trace import Span
from videopipe.writer import ChunkWritten, ClipFailed, ClipWritten


class Delivery:
    """A clip on its way to a file. `rank` keeps its latents until it has arrived."""

    def __init__(self, clip: int, job: Job, batch: Batch, rank: int) -> None:
        self.clip = clip  # the pool's number
        self.job = job
        self.batch = batch
        self.rank = rank
        self.side_car: SideCar | None = None  # when all frames have been decoded
        self.failure: ClipFailed | None = None

    @property
    def request(self) -> str:
        """The request's id."""
        return self.job.request.id


class Deliveries:
    """See the module. Owned by the engine's thread, and like it never waits for a disk.

    A clip that is to be written goes through `begin`, `add` as often as frames are there, and `end` when the scheduler
    knows that it is decoded. Its file grows meanwhile.

    Args:
        send: a message to a rank.
        delivered: the clip of a request needs no room any more: the scheduler may have another one decoded.
        note_spans: for the trace.
    """

    def __init__(
        self,
        config: Config,
        *,
        send: Callable[[int, ToRank], object],
        delivered: Callable[[str], None],
        note_spans: Callable[[tuple[Span, ...]], None],
    ) -> None:
        self._output = config.output
        self._send = send
        self._delivered = delivered
        self._note_spans = note_spans
        self._pool = WriterPool(
            config.output.writers,
            silent_after_s=config.faults.heartbeat_timeout_s,
            start_timeout_s=config.faults.start_timeout_s,
        )
        self._writing: dict[str, Delivery] = {}  # by request; some have failed, their frames are still being decoded
        self._rescuing: dict[str, Delivery] = {}  # by request: its rank returns the latents
        self._ranks_are_gone = False

    @property
    def pids(self) -> list[int]:
        """Process ids of the writers."""
        return self._pool.pids

    @property
    def batches(self) -> list[Batch]:
        """Whose clips are on their way."""
        return [delivery.batch for delivery in (*self._writing.values(), *self._rescuing.values())]

    def fileno(self) -> int:
        """Readable when `look` has something to do."""
        return self._pool.fileno()

    def prepare(self) -> None:
        """Clips will come: have the writers running."""
        self._pool.start()

    def begin(self, job: Job, batch: Batch, rank: int, memory: Path, shape: tuple[int, ...]) -> None:
        """A clip will come in the file `memory`, uint8 of `shape` [T, H, W, 3]; `rank` has its latents."""
        assert job.save_to is not None, job
        request = job.request
        T, H, W, channels = shape
        clip = self._pool.open(
            job.save_to / request.id, (T, H, W, channels), request.spec.fps, self._output, request.id, memory
        )
        self._writing[request.id] = Delivery(clip, job, batch, rank)

    def add(self, request: str, frames: range) -> None:
        """These frames are in memory, the next ones in the order of time."""
        self._pool.frames(self._writing[request].clip, frames.start, len(frames))

    def end(self, request: str, side_car: SideCar) -> None:
        """All frames have been added, and the scheduler knows that the clip is decoded."""
        delivery = self._writing[request]
        delivery.side_car = side_car
        if delivery.failure is None:
            self._pool.close_clip(delivery.clip, side_car)
        else:
            self._rescue(delivery)

    def cancel(self, request: str, batch: Batch) -> None:
        """Nobody waits for this clip of this batch any more; nothing to do for one that has arrived."""
        delivery = self._writing.get(request) or self._rescuing.get(request)
        if delivery is None or delivery.batch is not batch:
            return
        if request in self._writing:
            self._pool.drop(delivery.clip)
            self._send(delivery.rank, EndDelivery(request=request))
            del self._writing[request]
        else:
            del self._rescuing[request]
        if delivery.side_car is not None:
            self._delivered(request)

    def look(self, now: float) -> None:
        """Take the writers' news; several times a second, and when `fileno` is readable."""
        for news in self._pool.news(now):
            self._note_spans(news.spans)
            if isinstance(news, ChunkWritten):
                continue
            (delivery,) = [delivery for delivery in self._writing.values() if delivery.clip == news.clip]
            if isinstance(news, ClipWritten):
                del self._writing[delivery.request]
                self._send(delivery.rank, EndDelivery(request=delivery.request))
                self._finish(delivery, Finished(job=delivery.job, side_car=news.side_car, path=news.path))
            else:
                delivery.failure = news
                if delivery.side_car is not None:
                    self._rescue(delivery)

    def returned(self, message: LatentsReturned, payload: bytes) -> None:
        """The latents of a clip that could not be written have come back."""
        delivery = self._rescuing.pop(message.request, None)
        if delivery is not None:  # else cancelled in the meantime
            self._give_up(delivery, np.frombuffer(payload, dtype=np.float32).reshape(message.shape).copy())

    def outlive_ranks(self, wanted: Callable[[], bool]) -> None:
        """The ranks are lost: let the writers finish the clips that have been decoded, as long as it is `wanted`."""
        self._ranks_are_gone = True
        for delivery in list(self._rescuing.values()):
            self._give_up(delivery, None)
        self._rescuing.clear()
        for delivery in [delivery for delivery in self._writing.values() if delivery.side_car is None]:
            self._pool.drop(delivery.clip)
            del self._writing[delivery.request]
        while self._writing and wanted():
            select.select([self._pool.fileno()], [], [], 0.1)
            self.look(time.monotonic())

    def close(self) -> None:
        """End the writers; what they have not finished is dropped."""
        self._pool.close()

    def _rescue(self, delivery: Delivery) -> None:
        del self._writing[delivery.request]
        if self._ranks_are_gone:
            self._give_up(delivery, None)
            return
        self._rescuing[delivery.request] = delivery
        self._send(delivery.rank, EndDelivery(request=delivery.request, return_latents=True))

    def _give_up(self, delivery: Delivery, latents: NDArray[np.float32] | None) -> None:
        assert delivery.side_car is not None, delivery.request
        failed = Finished(job=delivery.job, side_car=delivery.side_car, array=latents, failure=delivery.failure)
        self._finish(delivery, failed)

    def _finish(self, delivery: Delivery, finished: Finished) -> None:
        if not self._ranks_are_gone:
            self._delivered(delivery.request)
        delivery.batch.put(finished)
