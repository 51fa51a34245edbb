"""The life of a rank: join, load, obey the ordered stream of commands, report, end."""

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from types import FrameType
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from dit_group.calibrate import calibrate
from dit_group.ping_pong import THREAD as SECOND_EVALUATION
from dit_group.worker import DitWorker
from dit_group.workload import Part
from pipelines.checkpoint import open_checkpoint
from pipelines.families import Assistant, TextEncoder, load_family
from pipelines.faults import TRANSFERS
from pipelines.launch import RankSpec
from vae_group.memory import bytes_at_hand
from vae_group.retry import TeamOutOfMemoryError, is_out_of_memory
from vae_group.team import Team
from vae_group.worker import VaeWorker
from videopipe.control import ControlClient
from videopipe.messages import (
    AbandonRequest,
    Arrange,
    AssistStep,
    BeginDenoise,
    Calibrate,
    Calibrated,
    DecodeLatents,
    EncodePrompt,
    EndDelivery,
    Envelope,
    FinishDenoise,
    FromRank,
    Heartbeat,
    Hello,
    LatentsReady,
    LoadedDecoder,
    LoadParts,
    PartsLoaded,
    PrepareAssist,
    PromptEncoded,
    RankFailed,
    Release,
    RunStep,
    SendLatents,
    StateFreed,
    StepCompleted,
    StopRank,
    ToRank,
)
from videopipe.runtime import PeerLink, Runtime, device_name, end_runtime, peak_memory_bytes, start_runtime, synchronize
from videopipe.trace import SpanRecorder

HEARTBEAT_S = 0.5


def run_rank(spec: RankSpec) -> int:
    """Be a rank until told to stop; the exit code of the process.

    The outermost loop: whatever is raised below is reported to the engine, with stage, request and step, before the
    process ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's; it ends its ranks itself
    torch.set_num_threads(spec.threads)
    transformers_logging.disable_progress_bar()  # n ranks would draw n bars over each other
    diffusers_logging.disable_progress_bar()
    recorder = SpanRecorder(spec.rank)
    client = ControlClient(spec.endpoint, spec.token, spec.rank)
    device = torch.device(spec.device, spec.local_rank) if spec.device == "cuda" else torch.device("cpu")
    beat = _HeartbeatThread(spec, recorder, device)
    beat.start()
    try:
        with recorder.span("start"):
            runtime = _join(spec, device)
        worker = _Rank(spec, runtime, client, recorder)
        worker.report(
            Hello(
                pid=os.getpid(),
                host=socket.gethostname(),
                device=str(device),
                clock_ns=time.monotonic_ns(),
                device_name=device_name(device),
            )
        )
        worker.obey()
        end_runtime(runtime)
    except Exception as error:
        current = recorder.failed or recorder.current()
        failure = RankFailed(
            kind=type(error).__name__,
            message=str(error),
            traceback=traceback.format_exc(),
            stage="idle" if current is None else current.stage,
            request=None if current is None else current.request,
            step=None if current is None else current.step,
            out_of_memory=isinstance(error, TeamOutOfMemoryError) or is_out_of_memory(error),
        )
        client.send(Envelope(message=failure, spans=tuple(recorder.drain())))
        return 1
    finally:
        beat.stop()
        client.close()
    return 0


def _join(spec: RankSpec, device: torch.device) -> Runtime:
    if spec.config.schedule.mode == "deterministic":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
    store = None
    if spec.store_address is not None:
        host, _, port = spec.store_address.rpartition(":")
        store = dist.PrefixStore(
            spec.store_prefix, dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False)
        )
    return start_runtime(
        rank=spec.rank,
        world_size=spec.world_size,
        dit_ranks=tuple(range(spec.config.groups.dit_ranks)),
        device=device,
        store=store,
        helper_sets=spec.config.helper_sets,
        timeout_s=2 * spec.config.faults.hang_timeout_s + 60,
        halved=spec.config.attention.cfg_parallel == "on",
        decode_teams=spec.config.decode_teams,
    )


class _Rank:
    """Dispatches commands to the parts that this rank holds."""

    def __init__(self, spec: RankSpec, runtime: Runtime, client: ControlClient, recorder: SpanRecorder) -> None:
        self._spec = spec
        self._runtime = runtime
        self._client = client
        self._recorder = recorder
        self._link = PeerLink(runtime)
        self._encoder: TextEncoder | None = None
        self._dit: DitWorker | None = None
        self._vae: VaeWorker | None = None
        self._assistant: Assistant | None = None
        self._part: Part | None = None  # of the two above that which takes part in denoising steps
        self._conditioning_transfers: dict[str, int] = {}
        self._todo: deque[tuple[ToRank, bytes | None]] = deque()
        self._in_flight: deque[tuple[torch.cuda.Event, FromRank]] = deque()  # reports that wait for the device

    def report(self, message: FromRank, payload: memoryview | None = None) -> None:
        """Tell the engine, with all spans that have ended."""
        peak = peak_memory_bytes(self._runtime.device)
        self._client.send(
            Envelope(message=message, spans=tuple(self._recorder.drain()), peak_memory_bytes=peak), payload
        )

    def obey(self) -> None:
        """Take commands until StopRank, in order. One step's kernels may be queued while the last one still runs."""
        while True:
            self._listen(wait=not self._todo and not self._in_flight)
            if not self._todo:
                if self._in_flight:
                    self._report_oldest()
                continue
            message, payload = self._todo.popleft()
            if isinstance(message, StopRank):
                return
            self._execute(message, payload)
            while len(self._in_flight) > 1:
                self._report_oldest()

    def _listen(self, wait: bool) -> None:
        """Queue all commands that have arrived.

        Finished latents leave at once, before steps that were given earlier: the decoding rank waits for them, and to
        begin a send waits for nobody.
        """
        arrived = self._client.receive(None if wait else 0)
        while arrived is not None:
            if isinstance(arrived[0], SendLatents):
                self._execute(*arrived)
            else:
                self._todo.append(arrived)
            arrived = self._client.receive(0)

    def _report_oldest(self) -> None:
        event, message = self._in_flight.popleft()
        event.synchronize()
        self.report(message)

    def _report_when_done(self, message: FromRank) -> None:
        """Report once everything queued on the device so far has completed."""
        if self._runtime.device.type != "cuda":
            self.report(message)
            return
        event = torch.cuda.Event()
        event.record()
        self._in_flight.append((event, message))

    def _execute(self, message: ToRank, payload: bytes | None) -> None:
        match message:
            case LoadParts():
                with self._recorder.span("load"):
                    loaded = self._load(message)
                self.report(loaded)
            case EncodePrompt():
                with self._recorder.span("encode", request=message.request.id):
                    encoded = self._encode(message, payload)
                self.report(encoded)
            case BeginDenoise():
                with self._recorder.span("begin", request=message.request.id):
                    self._dit_worker.begin(message, payload)
            case RunStep():
                with self._recorder.span("denoise", request=message.request, step=message.step):
                    self._dit_worker.step(message)
                if self._runtime.is_leader:
                    self._report_when_done(StepCompleted(request=message.request, step=message.step))
            case PrepareAssist():
                assert self._assistant is not None, "this rank cannot assist"
                self._assistant.prepare(message.request, message.text_masks, message.recorded)
            case AssistStep():
                assert self._assistant is not None, "this rank cannot assist"
                with self._recorder.span("assist", request=message.request, step=message.step):
                    self._assistant.step(message.request, message.helpers)
            case Calibrate():
                assert self._part is not None, "this rank takes no part in denoising steps"
                with self._recorder.span("calibrate"):
                    calibration = calibrate(self._part, self._runtime, message.shape, message.rules, message.budget_s)
                if self._runtime.is_leader:
                    self.report(Calibrated(calibration=calibration))
            case Arrange():
                assert self._part is not None, "this rank takes no part in denoising steps"
                for view in self._part.views(message.guidance):
                    view.arrange(message.num_video, message.arrangements, message.guidance)
            case FinishDenoise():
                with self._recorder.span("finish", request=message.request):
                    self._dit_worker.finish(message.request)
                if self._runtime.is_leader:
                    while self._in_flight:
                        self._report_oldest()
                    self.report(LatentsReady(request=message.request))
                else:
                    self.report(StateFreed(request=message.request))
            case AbandonRequest():
                if self._dit is not None:
                    self._dit.abandon(message.request)
                if self._assistant is not None:
                    self._assistant.forget(message.request)
                    self.report(StateFreed(request=message.request))
                self._release_conditioning(message.request)
            case SendLatents():
                self._dit_worker.send(message)
            case DecodeLatents():
                assert self._vae is not None, "this rank has no VAE"
                self._vae.decode(message)
            case EndDelivery():
                assert self._vae is not None, "this rank has no VAE"
                self._vae.end_delivery(message)
            case Release(what="latents"):
                self._dit_worker.release(message.request)
            case Release():
                self._release_conditioning(message.request)
            case StopRank():
                raise AssertionError("handled by obey")

    @property
    def _dit_worker(self) -> DitWorker:
        assert self._dit is not None, "this rank has no DiT"
        return self._dit

    def _load(self, message: LoadParts) -> PartsLoaded:
        config = self._spec.config
        family = load_family(config.model.family)
        checkpoint = open_checkpoint(config.model)
        sizes = {}
        vae: dict[str, Any] | None = None
        if message.text_encoder:
            self._encoder = family.load_text_encoder(checkpoint, config, self._runtime)
            sizes["text_encoder"] = _weight_bytes(self._encoder)
        if message.denoiser:
            denoiser = family.load_denoiser(checkpoint, config, self._runtime)
            self._part = denoiser if isinstance(denoiser, Part) else None
            self._dit = DitWorker(self._runtime, self._link, denoiser)
            sizes["denoiser"] = _weight_bytes(denoiser)
        if message.decoder:
            decoder = family.load_decoder(checkpoint, config, self._runtime)
            self._vae = VaeWorker(self._runtime, self._link, decoder, self._recorder, self.report)
            sizes["decoder"] = _weight_bytes(decoder)
            vae = decoder.memory_facts()
        if config.helper_sets and not message.denoiser:
            self._assistant = family.load_assistant(checkpoint, config, self._runtime)
            self._part = self._assistant if isinstance(self._assistant, Part) else None
        synchronize(self._runtime.device)
        loaded = None
        if vae is not None:  # with all other parts there
            loaded = LoadedDecoder(room_bytes=bytes_at_hand(self._runtime.device, 0, Team()), vae=vae)
        return PartsLoaded(weight_bytes=sizes, decoder=loaded)

    def _encode(self, message: EncodePrompt, payload: bytes | None) -> PromptEncoded:
        assert self._encoder is not None, "this rank has no text encoder"
        given = {} if payload is None else safetensors.torch.load(payload)
        conditioning = self._encoder.encode(message.request, given)
        packed = torch.frombuffer(bytearray(safetensors.torch.save(conditioning)), dtype=torch.uint8)
        for rank in message.dit_ranks:
            self._link.send(packed, rank, message.transfer)
        self._conditioning_transfers[message.request.id] = message.transfer
        masks = tuple(self._encoder.text_masks(conditioning))
        return PromptEncoded(request=message.request.id, nbytes=packed.numel(), text_masks=masks)

    def _release_conditioning(self, request: str) -> None:
        transfer = self._conditioning_transfers.pop(request, None)
        if transfer is not None:
            self._link.forget(transfer)


def _weight_bytes(part: Any) -> int:
    modules = [value for value in vars(part).values() if isinstance(value, torch.nn.Module)]
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


class _HeartbeatThread(threading.Thread):
    """Tells the engine twice a second that this process lives, and what its main thread is doing."""

    def __init__(self, spec: RankSpec, recorder: SpanRecorder, device: torch.device) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._spec = spec
        self._recorder = recorder
        self._device = device
        self._main = threading.get_ident()
        self._stop_event = threading.Event()

    def run(self) -> None:
        client = ControlClient(self._spec.endpoint, self._spec.token, self._spec.rank, channel="beat")
        while not self._stop_event.wait(HEARTBEAT_S):
            current = self._recorder.current()
            waiting, where = _whereabouts(self._main)
            client.send(
                Envelope(
                    message=Heartbeat(
                        stage=None if current is None else current.stage,
                        request=None if current is None else current.request,
                        step=None if current is None else current.step,
                        seconds=0.0 if current is None else (time.monotonic_ns() - current.since_ns) / 1e9,
                        waiting=waiting,
                        where=where,
                    ),
                    peak_memory_bytes=peak_memory_bytes(self._device),
                )
            )
        client.close()

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stop_event.set()
        self.join()


HANDING_OVER = "dit_group/ping_pong.py"
_OURS = ("videopipe/", "dit_group/", "vae_group/", "pipelines/")


def _whereabouts(main: int) -> tuple[bool, str]:
    """As `_locate`, of this thread, or of the evaluation that runs while this one has handed over."""
    frames = sys._current_frames()
    found = _locate(frames.get(main))
    if found[1].startswith(HANDING_OVER):
        for thread in threading.enumerate():
            if thread.name == SECOND_EVALUATION and thread.ident is not None:
                return _locate(frames.get(thread.ident))
    return found


def _locate(frame: FrameType | None) -> tuple[bool, str]:
    """Whether a stack is inside a transfer between ranks, and its innermost line of our own code."""
    waiting = False
    while frame is not None:
        name = "/".join(frame.f_code.co_filename.split(os.sep)[-2:])
        if name.startswith(_OURS):
            return waiting or name.startswith(TRANSFERS), f"{name}:{frame.f_lineno}"
        waiting = waiting or name.startswith(TRANSFERS)
        frame = frame.f_back
    return False, "outside videopipe"
