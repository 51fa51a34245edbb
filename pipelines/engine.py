"""The engine: drives the scheduler with real ranks. One thread owns the control link; callers submit and receive.

The ranks never talk to the scheduler, and the scheduler never sees a tensor: the engine turns its commands into
messages, and the ranks' reports into its events.
"""

import contextlib
import datetime
import math
import os
import queue
import select
import shutil
import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec
import safetensors.torch
import torch
import zmq
from torch import Tensor

from pipelines import faults
from pipelines.batch import Batch, FramesListener, Job
from pipelines.calibration import BUDGET_S, Answer, Calibrations, Choice, Measuring, shape_of
from pipelines.calibration_cache import setup_of
from pipelines.decode_room import DecodeRoom
from pipelines.decodings import Decodings
from pipelines.delivery import Deliveries
from pipelines.families import ModelFacts, load_family
from pipelines.launch import Launcher
from pipelines.side_car import decoded_in, describe_plan, versions
from videopipe import messages as wire
from videopipe import scheduler as plan
from videopipe.arrangement import Calibration, Shape
from videopipe.config import Config
from videopipe.control import ControlServer
from videopipe.queue import BoundedQueue
from videopipe.records import SideCar, StageTime, VideoRequest
from videopipe.trace import Span, Trace

TICK_MS = 100
MAX_TRACE_SPANS = 400_000


class Progress(Protocol):
    """Is told what happens, from the engine's thread. All methods return at once."""

    def loaded(self, rank: int, world_size: int) -> None:
        """A rank has loaded its parts."""

    def step(self, request: str, step: int, num_steps: int) -> None:
        """A denoising step has completed."""

    def stage(self, request: str, stage: str) -> None:
        """A request has entered a stage."""


class Closable(Protocol):
    """Anything with `close`."""

    def close(self) -> None:
        """Free it."""


class _Record:
    """What the engine notes about one request under way."""

    def __init__(self, job: Job, batch: Batch, choice: Choice | None, now: float) -> None:
        self.job = job
        self.batch = batch
        self.choice = choice
        self.submitted = now
        self.denoised = now
        self.queue_wait_s = 0.0
        self.conditioning_bytes = 0
        self.text_masks: tuple[bytes, ...] = ()
        self.conditioning_transfer = 0
        self.cancelled = False
        self.seconds: defaultdict[tuple[str, int], float] = defaultdict(float)  # by stage and rank


class Engine:
    """See the module. `close` is safe to call at any time, more than once, from any thread."""

    def __init__(
        self,
        config: Config,
        facts: ModelFacts,
        *,
        server: ControlServer,
        launcher: Launcher,
        run_directory: Path,
        progress: Progress | None = None,
        rendezvous: object = None,
    ) -> None:
        self._rendezvous = rendezvous  # the store that process groups may look at until they end
        self.config = config
        self.facts = facts
        self.topology = make_topology(config)
        self._scheduler = plan.Scheduler(
            self.topology,
            config.policy,
            BoundedQueue(config.queue.capacity, config.queue.capacity_bytes),
            max_undelivered=config.queue.max_undelivered,
            helper_sets=config.helper_sets,
        )
        self.trace = Trace({rank: self.role(rank) for rank in range(config.world_size)})
        self._server = server
        self._launcher = launcher
        self._run_directory = run_directory
        self._progress = progress
        self._records: dict[str, _Record] = {}
        self._deliveries = Deliveries(config, send=server.send, delivered=self._on_disk, note_spans=self._note_spans)
        self._hosts: dict[int, str] = {}
        self._decodings = Decodings(
            facts.geometry, run_directory, self._hosts, send=server.send, deliveries=self._deliveries
        )
        self._decoders: dict[int, wire.LoadedDecoder] = {}
        self._decode_room: DecodeRoom | None = None  # from the start on
        self._devices: dict[int, str] = {}
        self._device = torch.device("cpu")  # of the ranks
        self._measuring: Measuring | None = None  # where the configuration leaves something to measure
        self._held: deque[tuple[str, Any]] = deque()  # what callers said and is not done, the first being done
        self._clock_offset_ns: dict[int, int] = {}
        self._peaks: dict[int, int] = {}
        self._weights: dict[int, dict[str, int]] = {}
        self._to_load: list[int] = []
        self._loading: set[int] = set()
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._transfer = 0
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        # a caller's iterator that is collected while its thread is here tells the engine too
        self._wake_lock = threading.RLock()
        self._wake_closed = False
        self._faults = faults.FaultDetector(config.faults, tuple(range(config.world_size)), time.monotonic())
        self._thread = threading.Thread(target=self._run, name="videopipe-engine", daemon=True)
        self._kept: list[Closable] = []
        self._listeners: list[Callable[[str, int], None]] = []
        self._close_lock = threading.Lock()
        self._closed = False

    # -- for callers, from any thread

    def role(self, rank: int) -> str:
        """`dit`, `vae`, or `dit+vae` where the groups are colocated."""
        if rank in self.topology.vae_ranks:
            return "vae"
        return "dit" if self.topology.vae_ranks else "dit+vae"

    def start(self) -> None:
        """Begin to serve; wait until every rank has loaded its parts.

        Raises:
            RankError: a rank did not come up.
        """
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def submit(self, jobs: Iterable[Job], on_frames: FramesListener | None = None) -> Batch:
        """Queue requests; iterate over the answer for the results.

        Args:
            on_frames: is given the frames of every clip as they are decoded, before the clip itself; of requests whose
                result is latents there are none.
        Raises:
            ValueError: an id that is under way, latents that the queue cannot hold, or a clip that no decoding rank has
                the memory for; nothing of this submission is rendered, what was submitted before goes on.
            RankError: the run has failed before.
            RuntimeError: the engine is closed.
        """
        todo = list(jobs)
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise RuntimeError("this pipeline is closed")
        self._check(todo)
        batch = Batch(self.tell, todo, on_frames)
        self.tell("submit", (batch, todo))
        return batch

    def _check(self, jobs: list[Job]) -> None:
        seen = set(self._records)
        for index, job in enumerate(jobs):
            request = job.request
            if request.id in seen:
                raise ValueError(
                    f"requests[{index}].id={request.id!r} is already under way, give each request its own id"
                )
            seen.add(request.id)
            latent_bytes = self._latent_bytes(request)
            if latent_bytes > self.config.queue.capacity_bytes:
                raise ValueError(
                    f"queue.capacity_bytes={self.config.queue.capacity_bytes} cannot hold the latents of "
                    f"{request.id!r}, nearest is {latent_bytes}"
                )
            if job.result != "latents" and self._decode_room is not None:
                self._decode_room.check(request, f"requests[{index}].")

    def _latent_bytes(self, request: VideoRequest) -> int:
        return 4 * math.prod(self.facts.geometry.latent_shape(request.spec))  # float32

    def calibrate(self, request: VideoRequest, budget_s: float = BUDGET_S) -> Calibration:
        """Measure the ways of moving heads for this request's size, whatever is known, and keep the result.

        Args:
            budget_s: about how long, see `dit_group.calibrate.calibrate`.
        Raises:
            RankError: a rank was lost.
            RuntimeError: the engine is closed, or the ranks are at work.
            ValueError: the configuration leaves nothing to choose.
        """
        shape = shape_of(self.config, self.facts, request)
        if self._measuring is None or not self._measuring.calibrations.rules(shape.guidance).is_open:
            raise ValueError("the configuration leaves nothing to measure, nearest is attention.heads_per_chunk='auto'")
        answer: Answer = queue.SimpleQueue()
        if self._failure is not None:
            raise self._failure
        self.tell("calibrate", (shape, budget_s, answer))
        result = answer.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def tell(self, what: str, argument: Any = None) -> None:
        """Hand something to the engine's thread."""
        self._inbox.put((what, argument))
        with self._wake_lock:
            if not self._wake_closed:  # else its number may belong to another file by now
                with contextlib.suppress(BlockingIOError):  # full: it will wake up anyway
                    os.write(self._wake_write, b"x")

    def close_with(self, resource: Closable) -> None:
        """Close something when the engine has ended, such as the launcher."""
        self._kept.append(resource)

    @contextlib.contextmanager
    def listening(self, listener: Callable[[str, int], None] | None) -> Iterator[None]:
        """Call `listener(request, step)` for every completed step, from the engine's thread, within the block."""
        if listener is not None:
            self._listeners.append(listener)
        try:
            yield
        finally:
            if listener is not None:
                self._listeners.remove(listener)

    @property
    def pids(self) -> dict[int, int]:
        """Process ids of the ranks that this host started."""
        return self._launcher.pids()

    @property
    def writer_pids(self) -> list[int]:
        """Process ids of the writers."""
        return self._deliveries.pids

    @property
    def weight_bytes(self) -> dict[int, dict[str, int]]:
        """Bytes of weights by rank and part."""
        return self._weights

    @property
    def peak_memory_bytes(self) -> dict[int, int]:
        """Peak memory by rank: device memory on CUDA, resident host memory on CPU."""
        return dict(self._peaks)

    def close(self) -> None:
        """End the ranks: at once where they work, in order where they are idle. No process is left behind."""
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
            if self._thread.is_alive():
                self.tell("close")
                self._thread.join()
            self._launcher.end()
            self._launcher.close()
            self._server.close()
            self._deliveries.close()
            for resource in self._kept:
                resource.close()
            shutil.rmtree(self._run_directory, ignore_errors=True)
            with self._wake_lock:
                self._wake_closed = True
                os.close(self._wake_read)
                os.close(self._wake_write)
            if self._failure is None:
                self._end_batches(RuntimeError("this pipeline is closed"))

    # -- the engine's thread

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:
            self._fail(error)
        finally:
            self._ready.set()

    def _loop(self) -> None:
        poller = zmq.Poller()
        poller.register(self._server.socket, zmq.POLLIN)
        poller.register(self._launcher.fileno(), zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        poller.register(self._deliveries.fileno(), zmq.POLLIN)
        next_check = 0.0
        while True:
            poller.poll(TICK_MS)
            if select.select([self._wake_read], [], [], 0)[0]:
                os.read(self._wake_read, 4096)
            for rank, envelope, payload in self._server.receive():
                self._take(rank, envelope, payload)
            while not self._inbox.empty():
                what, argument = self._inbox.get()
                if what == "close":
                    self._say_goodbye()
                    return
                self._held.append((what, argument))  # an error finds it there
                self._hear_held()
            now = time.monotonic()
            self._deliveries.look(now)
            for news in self._launcher.ended():
                self._faults.ended(news, self.doing(news.rank), now)
            if now < next_check:
                continue
            next_check = now + TICK_MS / 1000
            sign = self._faults.check(now, {rank: self.doing(rank) for rank in range(self.config.world_size)})
            if sign is not None:
                raise faults.RankError(sign.rank, self.role(sign.rank), sign.kind, sign.what, sign.doing, sign.details)

    def _say_goodbye(self) -> None:
        """Idle ranks leave in order; ranks at work are ended by the launcher right after."""
        if not self._scheduler.idle or self._measures or not self._ready.is_set():
            return
        for rank in range(self.config.world_size):
            self._server.send(rank, wire.StopRank())
        deadline = time.monotonic() + 1.5
        while self._launcher.pids() and time.monotonic() < deadline:
            select.select([self._launcher.fileno()], [], [], 0.05)
            self._launcher.ended()
            self._server.receive()

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._launcher.end()  # at once: what still runs may be stuck in a transfer with the lost rank
        try:
            self._deliveries.outlive_ranks(wanted=lambda: not self._closed)
        finally:
            self._end_batches(error)

    def _end_batches(self, error: Exception) -> None:
        """Whoever waits for a result gets the clips that are finished, then the error."""
        batches = {id(record.batch): record.batch for record in self._records.values()}
        batches |= {id(batch): batch for batch in self._deliveries.batches}
        while not self._inbox.empty():
            self._held.append(self._inbox.get())
        for what, argument in self._held:
            if what in ("submit", "admit"):
                batches[id(argument[0])] = argument[0]
            elif what == "calibrate":
                argument[-1].put(error)
        if self._measuring is not None:
            self._measuring.fail(error)
        for batch in batches.values():
            batch.put(error)

    def _hear_held(self) -> None:
        """Take what callers said, in order; not while ranks measure."""
        while self._held and not self._measures:
            self._hear(*self._held[0])
            self._held.popleft()

    def _hear(self, what: str, argument: Any) -> None:
        match what:
            case "submit" if shapes := self._new_shapes(argument[1]):
                assert self._measuring is not None
                self._held.insert(1, ("admit", argument))
                self._measuring.begin(shapes)
            case "submit" | "admit":
                self._admit(*argument)
            case "calibrate":
                shape, budget_s, answer = argument
                assert self._measuring is not None
                if self._scheduler.idle:
                    self._measuring.begin([shape], budget_s, answer)
                else:
                    answer.put(RuntimeError("the ranks are at work; calibrate before requests or after them"))
            case "delivered":
                self._on(plan.Delivered(request=argument))
            case "cancel":
                job, batch = argument
                record = self._records.get(job.request.id)
                if record is not None and record.batch is batch:
                    record.cancelled = True
                    self._on(plan.Cancelled(request=job.request.id))
                    self._forget_cancelled()
                elif job.is_written:
                    self._deliveries.cancel(job.request.id, batch)
                else:  # finished, and nobody took it
                    self._on(plan.Delivered(request=job.request.id))

    def _admit(self, batch: Batch, jobs: list[Job]) -> None:
        known = [job.request.id for job in jobs if self._scheduler.knows(job.request.id)]
        if known:
            batch.put(ValueError(f"id={known[0]!r} is already under way, give each request its own id"))
            return
        if any(job.is_written for job in jobs):
            self._deliveries.prepare()
        for job in jobs:
            choice = None if self._measuring is None else self._measuring.calibrations.choose(job.request)
            self._records[job.request.id] = _Record(job, batch, choice, time.monotonic())
            self._on(
                plan.Submitted(
                    request=job.request.id,
                    num_steps=job.request.num_inference_steps,
                    latent_bytes=self._latent_bytes(job.request),
                    helper_sets=None if choice is None else choice.helper_sets,
                )
            )

    def _new_shapes(self, jobs: list[Job]) -> list[Shape]:
        """Shapes to measure before these jobs: none while ranks are at work."""
        if self._measuring is None or not self._scheduler.idle:
            return []
        return self._measuring.calibrations.to_measure(job.request for job in jobs)

    def _tell_attending(self, message: wire.ToRank) -> None:
        for rank in self._attending:
            self._server.send(rank, message)

    def _forget_cancelled(self) -> None:
        """Drop the records of cancelled requests that no rank will report about any more."""
        for request, record in list(self._records.items()):
            if record.cancelled and not self._scheduler.knows(request):
                del self._records[request]

    def _take(self, rank: int, envelope: wire.Envelope, payload: bytes | None) -> None:
        now = time.monotonic()
        message = envelope.message
        self._peaks[rank] = max(self._peaks.get(rank, 0), envelope.peak_memory_bytes)
        offset = self._clock_offset_ns.get(rank, 0)
        spans = envelope.spans
        if offset:
            spans = tuple(
                msgspec.structs.replace(s, start_ns=s.start_ns + offset, end_ns=s.end_ns + offset) for s in spans
            )
        self._note_spans(spans)
        if isinstance(message, wire.Heartbeat):
            self._faults.alive(rank, now, message)
            return
        self._faults.alive(rank, now)
        match message:
            case wire.RankFailed():
                self._faults.raised(rank, message, now)
            case wire.Hello():
                self._greet(rank, message)
            case wire.PartsLoaded():
                self._weights[rank] = dict(message.weight_bytes)
                if message.decoder is not None:
                    self._decoders[rank] = message.decoder
                self._loading.discard(rank)
                self._note("loaded", rank, self.config.world_size)
                self._load_next()
            case wire.PromptEncoded():
                record = self._records[message.request]
                record.conditioning_bytes = message.nbytes
                record.text_masks = message.text_masks
                self._on(plan.Encoded(request=message.request))
            case wire.StepCompleted():
                if message.step == 0:  # every DiT rank is past `begin`
                    release = wire.Release(request=message.request, what="conditioning")
                    self._server.send(self.topology.encoder_rank, release)
                record = self._records[message.request]
                self._note("step", message.request, message.step, record.job.request.num_inference_steps)
                for listener in list(self._listeners):
                    listener(message.request, message.step)
                self._on(plan.StepDone(request=message.request, step=message.step))
            case wire.Calibrated():
                assert self._measuring is not None
                self._measuring.take(message.calibration)
                self._hear_held()
            case wire.LatentsReady():
                self._records[message.request].denoised = now
                self._on(plan.Denoised(request=message.request))
            case wire.LatentsArrived():
                self._on(plan.LatentsReceived(request=message.request, rank=rank, sequence=message.sequence))
            case wire.FramesReady():
                self._decodings.add(message, payload, wanted=not self._records[message.request].cancelled)
            case wire.ResultReady():
                self._end_decode(rank, message, now)
            case wire.LatentsReturned():
                assert payload is not None, message
                self._deliveries.returned(message, payload)
        self._forget_cancelled()

    def _note_spans(self, spans: tuple[Span, ...]) -> None:
        self.trace.add(spans)
        if len(self.trace.spans) > MAX_TRACE_SPANS:  # memory stays flat over batches of any length
            del self.trace.spans[: MAX_TRACE_SPANS // 2]
        for span in spans:
            record = None if span.request is None else self._records.get(span.request)
            if record is not None:
                record.seconds[span.stage, span.rank] += (span.end_ns - span.start_ns) / 1e9

    def _greet(self, rank: int, hello: wire.Hello) -> None:
        self._hosts[rank] = hello.host
        self._devices[rank] = hello.device_name
        self._device = torch.device(hello.device)
        if hello.host != socket.gethostname():
            self._clock_offset_ns[rank] = time.monotonic_ns() - hello.clock_ns
        if len(self._hosts) == self.config.world_size:
            if self.config.calibrates:
                devices = [self._devices[rank] for rank in sorted(self._devices)]
                setup = setup_of(self.config, self.facts, devices, len(set(self._hosts.values())))
                self._measuring = Measuring(Calibrations(self.config, self.facts, setup), self._tell_attending)
            self._to_load = list(range(self.config.world_size))
            self._load_next()

    def _load_next(self) -> None:
        """Let the next rank of each host load: n ranks must not need n copies in host memory."""
        busy = {self._hosts[rank] for rank in self._loading}
        for rank in list(self._to_load):
            if self._hosts[rank] in busy:
                continue
            busy.add(self._hosts[rank])
            self._to_load.remove(rank)
            self._loading.add(rank)
            parts = wire.LoadParts(
                text_encoder=rank == self.topology.encoder_rank,
                denoiser=rank in self.topology.dit_ranks,
                decoder=rank in self.topology.decode_ranks,
            )
            self._server.send(rank, parts)
        if not self._to_load and not self._loading:
            self._decode_room = self._make_decode_room()
            self._ready.set()

    def _make_decode_room(self) -> DecodeRoom:
        """Of all decoding ranks, which have the same VAE."""
        family = load_family(self.config.model.family)
        vae = next(iter(self._decoders.values())).vae
        rooms = {rank: decoder.room_bytes for rank, decoder in self._decoders.items()}
        choices = partial(family.decode_choices, vae, self.config, len(self.config.decode_teams[0]))
        return DecodeRoom(self.config, self.facts.geometry, choices, rooms, self._device)

    def _end_decode(self, rank: int, message: wire.ResultReady, now: float) -> None:
        """A rank has ended its share of a decode; with the last one of its team the clip is finished."""
        request = message.request
        self._decodings.share_ended(message)
        self._on(plan.Decoded(request=request, rank=rank))
        if self._scheduler.is_decoding(request):
            return
        record = self._records.pop(request)
        if record.cancelled:
            self._decodings.drop(request)
            return
        side_car = self._side_car(record, now)
        self._note("stage", request, "write" if record.job.is_written else "done")
        self._decodings.finish(request, side_car)

    def _on_disk(self, request: str) -> None:
        """A clip that writers had needs no room any more."""
        self._note("stage", request, "done")
        self._on(plan.Delivered(request=request))

    def _side_car(self, record: _Record, now: float) -> SideCar:
        request = record.job.request
        seconds = sorted(record.seconds.items())
        chosen = {} if record.choice is None else {"chosen": record.choice.describe()}
        settings = self._decodings.settings(request.id)
        return SideCar(
            request=request,
            output="",
            format="latent" if record.job.result == "latents" else "mp4",
            frames_sha256=None,
            versions=versions(),
            plan=describe_plan(self.config, self.topology) | chosen | decoded_in(settings),
            config=msgspec.to_builtins(self.config),
            stages=tuple(StageTime(stage=s, rank=r, seconds=round(t, 6)) for (s, r), t in seconds),
            queue_wait_s=round(record.queue_wait_s, 6),
            total_s=round(now - record.submitted, 6),
            peak_memory_bytes={str(rank): peak for rank, peak in sorted(self._peaks.items())},
            finished_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )

    # -- from the scheduler's commands to messages

    def _on(self, event: plan.Event) -> None:
        for command in self._scheduler.on(event):
            self._execute(command)

    def _execute(self, command: plan.Command) -> None:
        record = self._records.get(command.request)
        match command:
            case plan.Encode():
                assert record is not None
                record.conditioning_transfer = self._next_transfer()
                message = wire.EncodePrompt(
                    request=record.job.request,
                    dit_ranks=self.topology.dit_ranks,
                    transfer=record.conditioning_transfer,
                )
                self._server.send(command.rank, message, _pack(record.job.conditioning))
                self._note("stage", command.request, "encode")
            case plan.Begin():
                assert record is not None
                if self._measuring is not None and record.choice is not None:
                    shape = shape_of(self.config, self.facts, record.job.request)
                    self._measuring.arrange(shape, record.choice.ways)
                begin = wire.BeginDenoise(
                    request=record.job.request,
                    source=self.topology.encoder_rank,
                    nbytes=record.conditioning_bytes,
                    transfer=record.conditioning_transfer,
                    record_to=None if record.job.record_to is None else str(record.job.record_to.absolute()),
                    record_blocks=self.config.output.record_blocks,
                )
                noise = None if record.job.noise is None else _pack({"latents": record.job.noise})
                for rank in command.ranks:
                    self._server.send(rank, begin, noise)
                for rank in self._assistants:
                    prepare = wire.PrepareAssist(
                        request=record.job.request,
                        text_masks=record.text_masks,
                        recorded=record.job.record_to is not None,
                    )
                    self._server.send(rank, prepare)
                self._note("stage", command.request, "denoise")
            case plan.Step():
                run = wire.RunStep(request=command.request, step=command.step, helpers=command.helpers)
                assist = wire.AssistStep(request=command.request, step=command.step, helpers=command.helpers)
                for rank in command.ranks:
                    self._server.send(rank, run)
                for rank in command.helpers:
                    self._server.send(rank, assist)
            case plan.Finish():
                for rank in command.ranks:
                    self._server.send(rank, wire.FinishDenoise(request=command.request))
                for rank in self._assistants:
                    self._server.send(rank, wire.AbandonRequest(request=command.request))
            case plan.Abandon():
                for rank in dict.fromkeys((*command.ranks, *self._assistants)):
                    self._server.send(rank, wire.AbandonRequest(request=command.request))
            case plan.HandOver():
                assert record is not None
                record.queue_wait_s = time.monotonic() - record.denoised
                self._decodings.hand_over(command, record.job, record.batch, self._next_transfer())
                self._note("stage", command.request, "decode")
            case plan.Release():
                self._server.send(command.rank, wire.Release(request=command.request, what="latents"))

    @property
    def _assistants(self) -> tuple[int, ...]:
        """VAE ranks that may be lent to denoising steps."""
        return self.topology.vae_ranks if self.config.helper_sets else ()

    @property
    def _attending(self) -> tuple[int, ...]:
        """All ranks that may take part in denoising steps."""
        return (*self.topology.dit_ranks, *self._assistants)

    @property
    def _measures(self) -> bool:
        """Whether ranks measure, and nothing else may run."""
        return self._measuring is not None and self._measuring.running

    def _next_transfer(self) -> int:
        self._transfer += 1
        return self._transfer

    # -- what is going on

    def doing(self, rank: int) -> faults.Doing:
        """What a rank is at, as far as the engine can tell from what it has been told to do."""
        if rank not in self._hosts:
            return faults.Doing("start")
        if rank in self._loading:
            return faults.Doing("load")
        if self._measures:
            return faults.Doing("calibrate" if rank in self._attending else "idle")
        decoding = self._scheduler.decoding_on(rank)
        if decoding is not None:
            return faults.Doing("decode", decoding)
        if rank in self.topology.dit_ranks:
            step = self._scheduler.current_step
            if step is not None:
                return faults.Doing("denoise", *step)
        if rank in self._scheduler.current_helpers:
            step = self._scheduler.current_step
            return faults.Doing("assist", *step) if step is not None else faults.Doing("idle")
        if rank == self.topology.encoder_rank and self._scheduler.encoding is not None:
            return faults.Doing("encode", self._scheduler.encoding)
        return faults.Doing("idle")

    def _note(self, what: str, *arguments: Any) -> None:
        if self._progress is not None:
            getattr(self._progress, what)(*arguments)


def _pack(tensors: Mapping[str, Tensor] | None) -> bytes | None:
    return None if tensors is None else safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()})


def make_topology(config: Config) -> plan.Topology:
    """Which ranks form which group: the DiT ranks come first."""
    dit = tuple(range(config.groups.dit_ranks))
    vae = tuple(range(len(dit), config.world_size))
    encoder = dit[0] if config.groups.text_encoder == "dit" else vae[0]
    return plan.Topology(dit_ranks=dit, vae_ranks=vae, encoder_rank=encoder, teams=config.decode_teams)
