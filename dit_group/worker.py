"""What a DiT rank does with the commands of the engine: begin, step, finish, hand over."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import safetensors.torch
import torch
from torch import Tensor

from dit_group.calibrate import Part
from dit_group.denoise import Denoising, draw_noise
from dit_group.record import Keep, StepRecording
from videopipe.messages import BeginDenoise, RunStep, SendLatents
from videopipe.records import VideoRequest
from videopipe.runtime import PeerLink, Runtime


class Denoiser(Part, Protocol):
    """A model family's denoising part, loaded on this rank and sharded over the DiT group."""

    def latent_shape(self, request: VideoRequest) -> tuple[int, ...]:
        """[1, C, T', H', W'] of a request."""

    def begin(self, request: VideoRequest, conditioning: Mapping[str, Tensor], noise: Tensor) -> Denoising:
        """Prepare a request; every DiT rank calls it with the same arguments."""

    def take_help(self, helpers: tuple[int, ...]) -> None:
        """From now on these VAE ranks take a share of the attention; empty for none."""

    def observe(self, keep: Keep, num_blocks: int) -> AbstractContextManager[None]:
        """Within the block, steps hand whole tensors to `keep`, see `dit_group.record.observing`."""


class DitWorker:
    """Holds the requests under way on one DiT rank, and on the leader the latents that wait to be decoded."""

    def __init__(self, runtime: Runtime, link: PeerLink, denoiser: Denoiser) -> None:
        self._runtime = runtime
        self._link = link
        self._denoiser = denoiser
        self._runs: dict[str, Denoising] = {}
        self._recordings: dict[str, StepRecording] = {}
        self._latents: dict[str, Tensor] = {}
        self._transfers: dict[str, int] = {}

    def begin(self, message: BeginDenoise, payload: bytes | None) -> None:
        """Receive the conditioning and make the noise."""
        packed = self._link.receive((message.nbytes,), torch.uint8, message.source, message.transfer)
        conditioning = safetensors.torch.load(packed.numpy().tobytes())
        request = message.request
        if payload is None:
            noise = draw_noise(self._denoiser.latent_shape(request), request.seed)
        else:
            noise = safetensors.torch.load(payload)["latents"]
        on_device = {name: tensor.to(self._runtime.device) for name, tensor in conditioning.items()}
        self._runs[request.id] = self._denoiser.begin(request, on_device, noise.to(self._runtime.device))
        if message.record_to is not None:
            self._recordings[request.id] = StepRecording(
                Path(message.record_to), message.record_blocks, writes=self._runtime.is_leader
            )

    def step(self, message: RunStep) -> None:
        """Run one step; on CUDA this returns when its kernels are queued, or, if it is recorded, when it is written."""
        self._denoiser.take_help(message.helpers)
        run, recording = self._runs[message.request], self._recordings.get(message.request)
        if recording is None:
            run.step(message.step)
        else:
            recording.step(self._denoiser, run, message.step)

    def finish(self, request: str) -> None:
        """Free the state; the leader keeps the latents in host memory."""
        run = self._runs.pop(request)
        self._recordings.pop(request, None)
        assert run.next_step == run.num_steps, (request, run.next_step, run.num_steps)
        if self._runtime.is_leader:
            self._latents[request] = run.latents.to("cpu", torch.float32).contiguous()

    def send(self, message: SendLatents) -> None:
        """Begin to send finished latents; they stay here until `release`."""
        self._transfers[message.request] = message.transfer
        self._link.send(self._latents[message.request], message.to, message.transfer)

    def release(self, request: str) -> None:
        """A decoding rank has the latents (or nobody wants them): forget them."""
        self._latents.pop(request, None)
        transfer = self._transfers.pop(request, None)
        if transfer is not None:
            self._link.forget(transfer)

    def abandon(self, request: str) -> None:
        """Forget a cancelled request that has not finished; steps recorded so far stay."""
        self._runs.pop(request, None)
        self._recordings.pop(request, None)
