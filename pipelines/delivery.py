"""Clips between a decoding rank and the disk: given to writers, and rescued as latents where they cannot be written."""

import select
import time
from collections.abc import Callable

import numpy as np

from pipelines.batch import Batch, Finished, Job
from pipelines.writers import WriterPool
from videopipe.config import Config
from videopipe.handover import ArrivingClip
from videopipe.messages import EndDelivery, LatentsReturned, ToRank
from videopipe.records import SideCar
from videopipe.trace import Span
from videopipe.writer import ClipFailed, ClipWritten


class Delivery:
    """A clip on its way, from its first frames on: `rank` keeps its latents until it has arrived.

    `side_car` comes when all of it is decoded. If writing fails before that, `failure` waits for it.
    """

    def __init__(self, job: Job, batch: Batch, rank: int, clip: ArrivingClip) -> None:
        self.job = job
        self.batch = batch
        self.rank = rank
        self.clip = clip
        self.side_car: SideCar | None = None
        self.failure: ClipFailed | None = None


class Deliveries:
    """See the module. Owned by the engine's thread, and like it never waits for a disk.

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
        self._writing: dict[int, Delivery] = {}  # by the pool's number
        self._rescuing: dict[str, tuple[Delivery, ClipFailed]] = {}  # by request: its rank returns the latents
        self._ranks_are_gone = False

    @property
    def pids(self) -> list[int]:
        """Process ids of the writers."""
        return self._pool.pids

    @property
    def batches(self) -> list[Batch]:
        """Whose clips are on their way."""
        return [d.batch for d in (*self._writing.values(), *(delivery for delivery, _ in self._rescuing.values()))]

    def fileno(self) -> int:
        """Readable when `look` has something to do."""
        return self._pool.fileno()

    def prepare(self) -> None:
        """Clips will come: have the writers running."""
        self._pool.start()

    def begin(self, delivery: Delivery) -> None:
        """A clip has its first frames: choose a writer."""
        assert delivery.job.save_to is not None, delivery.job
        request = delivery.job.request
        num_frames, height, width, channels = delivery.clip.shape
        stem = delivery.job.save_to / request.id
        number = self._pool.open(
            stem, (num_frames, height, width, channels), request.spec.fps, self._output, request.id
        )
        self._writing[number] = delivery

    def frames(self, request: str, frames: range) -> None:
        """These frames of a clip are there, in the shared memory in which they came."""
        number = self._number(request)
        self._pool.frames(number, frames.start, len(frames), self._writing[number].clip.path, shared=True)

    def end(self, request: str, side_car: SideCar) -> None:
        """All frames of a clip have been given."""
        number = self._number(request)
        delivery = self._writing[number]
        assert delivery.clip.complete, request
        delivery.side_car = side_car
        if delivery.failure is None:
            self._pool.close_clip(number, side_car)
        else:
            self._give_up(self._writing.pop(number), delivery.failure)

    def drop(self, request: str) -> None:
        """A clip that was cancelled before all of it was decoded, begun or not; its memory is the caller's."""
        for number, delivery in list(self._writing.items()):
            if delivery.job.request.id == request:
                del self._writing[number]
                self._pool.drop(number)

    def cancel(self, request: str, batch: Batch) -> None:
        """Nobody waits for this clip of this batch any more; nothing to do for one that has arrived."""
        for number, delivery in list(self._writing.items()):
            if delivery.job.request.id == request and delivery.batch is batch:
                del self._writing[number]
                self._pool.drop(number)
                delivery.clip.discard()
                self._send(delivery.rank, EndDelivery(request=request))
                self._delivered(request)
        if request in self._rescuing and self._rescuing[request][0].batch is batch:
            del self._rescuing[request]
            self._delivered(request)

    def _number(self, request: str) -> int:
        (number,) = [number for number, delivery in self._writing.items() if delivery.job.request.id == request]
        return number

    def look(self, now: float) -> None:
        """Take the writers' news; several times a second, and when `fileno` is readable."""
        for news in self._pool.news(now):
            self._note_spans(news.spans)
            match news:
                case ClipWritten():
                    delivery = self._writing.pop(news.clip)
                    delivery.clip.discard()
                    self._send(delivery.rank, EndDelivery(request=delivery.job.request.id))
                    self._finish(delivery, Finished(job=delivery.job, side_car=news.side_car, path=news.path))
                case ClipFailed() if self._writing[news.clip].side_car is None:
                    self._writing[news.clip].failure = news  # the ranks still write into its memory
                case ClipFailed():
                    self._give_up(self._writing.pop(news.clip), news)

    def returned(self, message: LatentsReturned, payload: bytes) -> None:
        """The latents of a clip that could not be written have come back."""
        if message.request not in self._rescuing:  # cancelled in the meantime
            return
        delivery, failure = self._rescuing.pop(message.request)
        assert delivery.side_car is not None, message
        latents = np.frombuffer(payload, dtype=np.float32).reshape(message.shape).copy()
        self._finish(delivery, Finished(job=delivery.job, side_car=delivery.side_car, array=latents, failure=failure))

    def outlive_ranks(self, wanted: Callable[[], bool]) -> None:
        """The ranks are lost: let the writers finish what they have been given, as long as it is `wanted`."""
        self._ranks_are_gone = True
        for delivery, failure in self._rescuing.values():
            self._rescue(delivery, failure)
        self._rescuing.clear()
        for delivery in list(self._writing.values()):
            if delivery.side_car is None:  # its last frames will never come
                self.drop(delivery.job.request.id)
        while self._writing and wanted():
            select.select([self._pool.fileno()], [], [], 0.1)
            self.look(time.monotonic())

    def close(self) -> None:
        """End the writers; what they have not finished is dropped."""
        self._pool.close()

    def _give_up(self, delivery: Delivery, failure: ClipFailed) -> None:
        delivery.clip.discard()
        self._rescue(delivery, failure)

    def _rescue(self, delivery: Delivery, failure: ClipFailed) -> None:
        request = delivery.job.request.id
        assert delivery.side_car is not None, request
        if self._ranks_are_gone:
            self._finish(delivery, Finished(job=delivery.job, side_car=delivery.side_car, failure=failure))
            return
        self._rescuing[request] = delivery, failure
        self._send(delivery.rank, EndDelivery(request=request, return_latents=True))

    def _finish(self, delivery: Delivery, finished: Finished) -> None:
        if not self._ranks_are_gone:
            self._delivered(delivery.job.request.id)
        delivery.batch.put(finished)
