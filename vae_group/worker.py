"""What a decoding rank does with the commands of the engine: receive, acknowledge, decode, publish."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from vae_group.decode import to_host
from vae_group.team import Part
from videopipe.handover import write_rows
from videopipe.messages import (
    DecodeLatents,
    EndDelivery,
    FramesReady,
    FromRank,
    LatentsArrived,
    LatentsReturned,
    ResultReady,
)
from videopipe.runtime import PeerLink, Runtime, synchronize
from videopipe.trace import SpanRecorder


class Decoder(Protocol):
    """A model family's VAE, loaded on this rank, as a member of the rank's team."""

    def parts(self, latents: Tensor) -> Iterator[Part]:
        """Latents [1, C, T', H', W'] float32 on the host -> this member's parts, see `vae_group.team.PartDecoder`."""

    def memory_facts(self) -> dict[str, Any]:
        """What of the VAE tells how much memory a decode takes, in plain values: `families.Family.decode_choices`."""

    def to_frames(self, video: Tensor, dtype: torch.dtype) -> Tensor:
        """The video [1, 3, t, h, W] of a part -> frames [t, h, W, 3] of `dtype`, uint8 or float32, on its device."""


class VaeWorker:
    """Decodes clips, or its team's share of them, one after the other.

    `report` sends a message and maybe a payload to the engine.
    """

    def __init__(
        self,
        runtime: Runtime,
        link: PeerLink,
        decoder: Decoder,
        recorder: SpanRecorder,
        report: Callable[[FromRank, memoryview | None], None],
    ) -> None:
        self._runtime = runtime
        self._link = link
        self._decoder = decoder
        self._recorder = recorder
        self._report = report
        self._kept: dict[str, Tensor] = {}  # by request: latents of clips that are being written

    def decode(self, message: DecodeLatents) -> None:
        """One clip, from the latents' arrival to this member's rows of the frames in shared memory."""
        request = message.request.id
        with self._recorder.span("receive", request=request):
            latents = self._link.receive(message.shape, torch.float32, message.source, message.transfer)
        self._report(LatentsArrived(request=request, sequence=message.sequence), None)
        if message.keep_latents:
            self._kept[request] = latents
        settings: tuple[str, ...] = ()
        if message.result == "latents":
            if self._runtime.rank == self._runtime.decode_team[0]:
                self._publish(message, latents.numpy(), 0, 0, latents.shape[1])
        else:
            settings = self._decode(message, latents, getattr(torch, message.result))
        self._report(ResultReady(request=request, settings=settings), None)

    def _decode(self, message: DecodeLatents, latents: Tensor, dtype: torch.dtype) -> tuple[str, ...]:
        """Gives the settings that the clip was decoded with, in words."""
        request, settings = message.request, dict[str, None]()
        parts = self._decoder.parts(latents)
        while True:
            with self._recorder.span("decode", request=request.id):
                part = next(parts, None)
                if part is None:
                    synchronize(self._runtime.device)  # the others of the team may still wait for this one's data
                    return tuple(settings)
                if part.setting:
                    settings[part.setting] = None
                first_frame, first_row = part.first_frame, part.first_row
                frames = to_host(self._decoder.to_frames(part.video, dtype)).numpy()
                del part  # its video need not be there while the next part is decoded
            self._publish(message, frames, first_frame, first_row, request.spec.height)

    def _publish(
        self, message: DecodeLatents, frames: NDArray[Any], first_frame: int, first_row: int, height: int
    ) -> None:
        """Bring rows of some frames to their place, and tell; `height` as in `write_rows`."""
        if frames.size == 0:
            return
        request = message.request.id
        if message.path is not None:
            with self._recorder.span("publish", request=request):
                write_rows(Path(message.path), frames, first_frame, first_row, height)
        ready = FramesReady(
            request=request,
            first_frame=first_frame,
            count=frames.shape[0],
            first_row=first_row,
            rows=frames.shape[1],
        )
        self._report(ready, None if message.path is not None else frames.data.cast("B"))

    def end_delivery(self, message: EndDelivery) -> None:
        """Forget the latents of a clip, or give them back since it cannot be written."""
        latents = self._kept.pop(message.request)
        if message.return_latents:
            array = latents.numpy()
            returned = LatentsReturned(request=message.request, shape=tuple(array.shape))
            self._report(returned, array.data.cast("B"))
