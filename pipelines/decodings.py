"""Clips on decoding ranks: from the hand-over of their latents until all rows of all frames are in shared memory."""

import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from pipelines.batch import Batch, Finished, Job
from pipelines.delivery import Deliveries
from videopipe import scheduler as plan
from videopipe.geometry import LatentGeometry
from videopipe.handover import ArrivingClip, write_rows
from videopipe.messages import DecodeLatents, FramesReady, ResultReady, SendLatents, ToRank
from videopipe.records import SideCar


class _Decoding:
    """One clip under way, and how it has been decoded so far: settings in words, in order."""

    def __init__(self, job: Job, batch: Batch, clip: ArrivingClip) -> None:
        self.job = job
        self.batch = batch
        self.clip = clip
        self.settings: dict[str, None] = {}


class Decodings:
    """See the module. Owned by the engine's thread.

    A clip goes through `hand_over`, `add` as often as ranks have rows of it, `share_ended` for each member of its team,
    and then `finish` or `drop`.

    Args:
        directory: for the clips, in shared memory.
        hosts: of the ranks; those of other hosts send their rows.
        send: a message to a rank.
        deliveries: take the clips that are to be written, part by part.
    """

    def __init__(
        self,
        geometry: LatentGeometry,
        directory: Path,
        hosts: Mapping[int, str],
        *,
        send: Callable[[int, ToRank], object],
        deliveries: Deliveries,
    ) -> None:
        self._geometry = geometry
        self._directory = directory
        self._hosts = hosts
        self._send = send
        self._deliveries = deliveries
        self._under_way: dict[str, _Decoding] = {}  # by request

    def hand_over(self, command: plan.HandOver, job: Job, batch: Batch, transfer: int) -> None:
        """Make room for a clip; tell the leader to send its latents, and a team to decode them."""
        request, result = job.request, job.result
        spec = request.spec
        latent_shape = self._geometry.latent_shape(spec)
        path = self._directory / f"{request.id}-{command.sequence}.decoding"
        shape = latent_shape if result == "latents" else (spec.num_frames, spec.height, spec.width, 3)
        clip = ArrivingClip(path, shape, "float32" if result == "latents" else result)
        self._under_way[request.id] = _Decoding(job, batch, clip)
        if job.is_written:
            memory = clip.link(path.with_suffix(".frames"))
            self._deliveries.begin(job, batch, command.ranks[0], memory, shape)
        self._send(command.leader, SendLatents(request=request.id, to=command.ranks, transfer=transfer))
        for rank in command.ranks:
            decode = DecodeLatents(
                request=request,
                source=command.leader,
                shape=latent_shape,
                sequence=command.sequence,
                transfer=transfer,
                result=result,
                path=str(path) if self._hosts[rank] == socket.gethostname() else None,
                keep_latents=job.is_written and rank == command.ranks[0],
            )
            self._send(rank, decode)

    def add(self, message: FramesReady, payload: bytes | None, *, wanted: bool) -> None:
        """A rank has rows; frames that are whole by now go to the listener and to a writer, where they are `wanted`."""
        decoding = self._under_way[message.request]
        clip, job, on_frames = decoding.clip, decoding.job, decoding.batch.on_frames
        if payload is not None:  # from a rank of another host
            rows = np.frombuffer(payload, clip.dtype).reshape(message.count, message.rows, *clip.shape[2:])
            write_rows(clip.path, rows, message.first_frame, message.first_row, clip.shape[1])
        whole = clip.arrived(message.first_frame, message.count, message.rows)
        if not whole or job.result == "latents" or not wanted:
            return
        if on_frames is not None:
            on_frames(message.request, whole.start, clip.look_at(whole))
        if job.is_written:
            self._deliveries.add(message.request, whole)

    def share_ended(self, message: ResultReady) -> None:
        """A rank has ended its share."""
        self._under_way[message.request].settings |= dict.fromkeys(message.settings)

    def settings(self, request: str) -> list[str]:
        """How a clip was decoded, in words."""
        return list(self._under_way[request].settings)

    def finish(self, request: str, side_car: SideCar) -> None:
        """All shares have ended: a clip that is not written is the caller's."""
        decoding = self._under_way.pop(request)
        if decoding.job.is_written:
            decoding.clip.discard()  # the writers have a name of their own for this memory
            self._deliveries.end(request, side_car)
        else:
            decoding.batch.put(Finished(job=decoding.job, array=decoding.clip.claim(), side_car=side_car))

    def drop(self, request: str) -> None:
        """All shares have ended, of a clip that was cancelled meanwhile."""
        decoding = self._under_way.pop(request)
        decoding.clip.discard()
        if decoding.job.is_written:
            self._deliveries.cancel(request, decoding.batch)
