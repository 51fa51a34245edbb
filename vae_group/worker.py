"""What a decoding rank does with the commands of the engine: receive, acknowledge, decode, publish."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from videopipe.handover import publish
from videopipe.messages import DecodeLatents, EndDelivery, FromRank, LatentsArrived, LatentsReturned, ResultReady
from videopipe.runtime import PeerLink
from videopipe.trace import SpanRecorder


class Decoder(Protocol):
    """A model family's VAE, loaded on this rank."""

    def decode(self, latents: Tensor, dtype: torch.dtype) -> Tensor:
        """Latents [1, C, T', H', W'] float32 on the host -> frames [T, H, W, 3] of `dtype` on the host."""


class VaeWorker:
    """Decodes whole clips, one after the other. `report` sends a message and maybe a payload to the engine."""

    def __init__(
        self,
        link: PeerLink,
        decoder: Decoder,
        recorder: SpanRecorder,
        run_directory: Path,
        report: Callable[[FromRank, memoryview | None], None],
    ) -> None:
        self._link = link
        self._decoder = decoder
        self._recorder = recorder
        self._run_directory = run_directory
        self._report = report
        self._kept: dict[str, Tensor] = {}  # by request: latents of clips that are being written

    def decode(self, message: DecodeLatents) -> None:
        """One clip, from the latents' arrival to the frames in shared memory."""
        request = message.request.id
        with self._recorder.span("receive", request=request):
            latents = self._link.receive(message.shape, torch.float32, message.source, message.transfer)
        self._report(LatentsArrived(request=request, sequence=message.sequence), None)
        if message.keep_latents:
            self._kept[request] = latents
        if message.result == "latents":
            result = latents
        else:
            with self._recorder.span("decode", request=request):
                result = self._decoder.decode(latents, getattr(torch, message.result))
        array = result.numpy()
        path = None
        if not message.by_wire:
            path = self._run_directory / f"{request}-{message.sequence}.frames"
            with self._recorder.span("publish", request=request):
                publish(array, path)
        ready = ResultReady(
            request=request, path=None if path is None else str(path), shape=tuple(array.shape), dtype=str(array.dtype)
        )
        self._report(ready, array.data.cast("B") if message.by_wire else None)

    def end_delivery(self, message: EndDelivery) -> None:
        """Forget the latents of a clip, or give them back since it cannot be written."""
        latents = self._kept.pop(message.request)
        if message.return_latents:
            array = latents.numpy()
            returned = LatentsReturned(request=message.request, shape=tuple(array.shape))
            self._report(returned, array.data.cast("B"))
