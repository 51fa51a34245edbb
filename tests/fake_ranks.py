"""Ranks without tensors under a clock without time: they drive the real scheduler with random delays and check it.

Each rank executes its commands one after the other in the order in which they come. Begin, Step and Finish are
rendezvous of all DiT ranks, and of the VAE ranks that are lent to a step, so a wrong order anywhere ends in a
deadlock. A hand-over is a send at the leader, which waits for nobody and begins as soon as the leader is between two
operations, a receive at each member of a team, which does wait, and a decode, which is a rendezvous of the team; its
members end it at different times.
Messages between the scheduler and a rank take random times and keep their order.
"""

import heapq
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from videopipe.scheduler import (
    Abandon,
    Begin,
    Cancelled,
    Command,
    Decoded,
    Delivered,
    Denoised,
    Encode,
    Encoded,
    Event,
    Finish,
    HandOver,
    LatentsReceived,
    Release,
    Scheduler,
    Step,
    StepDone,
    Submitted,
)


class BrokenPromiseError(AssertionError):
    """The scheduler broke a promise."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """How long things take; each is asked anew for every use."""

    encode: Callable[[], float]
    step: Callable[[], float]
    decode: Callable[[], float]
    consume: Callable[[], float]
    message: Callable[[], float]

    @classmethod
    def fixed(cls, *, encode: float = 0, step: float = 1, decode: float = 1, consume: float = 0) -> "Times":
        """The same every time, and messages that take none."""
        return cls(
            encode=lambda: encode,
            step=lambda: step,
            decode=lambda: decode,
            consume=lambda: consume,
            message=lambda: 0.0,
        )

    @classmethod
    def drawn(cls, rng: random.Random) -> "Times":
        """Mean times of a random machine, and random times around them."""

        def around(mean: float) -> Callable[[], float]:
            return lambda: rng.expovariate(1 / mean) if mean else 0.0

        return cls(
            encode=around(rng.choice([0, 0.1, 1, 5])),
            step=around(rng.choice([0.1, 1, 2])),
            decode=around(rng.choice([0.1, 2, 20])),
            consume=around(rng.choice([0, 0.1, 5, 40])),
            message=around(rng.choice([0, 0.01, 0.5])),
        )


@dataclass
class Op:
    """One thing that a rank does; the ops of one rendezvous share `key`."""

    kind: str
    request: str
    step: int = -1
    partner: int = -1
    sequence: int = -1
    members: tuple[int, ...] = ()


@dataclass
class Rank:
    """One rank: what it has been told and not begun, and what it holds."""

    todo: deque[Op] = field(default_factory=deque)
    busy: Op | None = None
    last_arrival: float = 0.0
    last_report: float = 0.0
    states: set[str] = field(default_factory=set)  # requests that it denoises
    next_step: dict[str, int] = field(default_factory=dict)
    latents: set[str] = field(default_factory=set)  # the leader: finished latents
    sent: set[int] = field(default_factory=set)  # the leader: hand-overs begun, by sequence number


@dataclass(frozen=True)
class Interval:
    """A rank was in one operation from `start` to `end`."""

    kind: str
    request: str
    rank: int
    start: float
    end: float


class FakeRanks:
    """Drives one scheduler to the end of its work, and checks every promise at every event."""

    def __init__(
        self,
        scheduler: Scheduler,
        times: Times,
        *,
        max_waiting: int,
        max_waiting_bytes: int,
        max_undelivered: int,
        steps_in_flight: int = 2,
        colocated: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.times = times
        self.topology = scheduler.topology
        self.max_waiting = max_waiting
        self.max_waiting_bytes = max_waiting_bytes
        self.max_undelivered = max_undelivered
        self.steps_in_flight = steps_in_flight
        self.colocated = colocated
        self.now = 0.0
        self.ranks = {
            r: Rank() for r in {*self.topology.dit_ranks, *self.topology.vae_ranks, self.topology.encoder_rank}
        }
        self.events: list[Event] = []
        self.commands: list[list[Command]] = []
        self.intervals: list[Interval] = []
        self.bytes: dict[str, int] = {}
        self.cancelled: set[str] = set()
        self.outcome: dict[str, str] = {}
        self.denoised: list[str] = []
        self.decode_order: list[str] = []
        self.most_waiting = 0
        self.steps_with_help = 0
        self.longest_block = 0
        self._consuming = False
        self._finished: deque[str] = deque()  # clips that the caller has not taken
        self._steps_out = 0
        self._denoising: set[str] = set()
        self._waiting: dict[str, int] = {}  # our own count of the latents that no rank has been given yet
        self._given: dict[str, tuple[int, ...]] = {}  # request -> team, until all of its members have ended the decode
        self._at_it: set[tuple[str, int]] = set()  # request and rank: shares of decodes that have not ended
        self._unacknowledged: set[tuple[str, int]] = set()  # request and rank
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._counter = 0

    # -- the caller

    def submit(self, request: str, num_steps: int, latent_bytes: int, at: float = 0.0) -> None:
        """Submit a request at a time."""
        self.bytes[request] = latent_bytes
        self._at(at, lambda: self.tell(Submitted(request=request, num_steps=num_steps, latent_bytes=latent_bytes)))

    def cancel(self, request: str, at: float) -> None:
        """Cancel a request at a time, whatever has become of it by then."""
        self._at(at, lambda: self._cancel(request))

    def run(self, max_events: int = 100_000) -> None:
        """Until nothing happens any more; then everything must have come to its end."""
        while self._agenda:
            self.now, _, action = heapq.heappop(self._agenda)
            action()
            max_events -= 1
            if not max_events:
                raise BrokenPromiseError("it goes on for ever")
        self._check_the_end()

    def _cancel(self, request: str) -> None:
        if self.outcome.get(request) == "delivered":
            return
        self.cancelled.add(request)
        self.outcome[request] = "cancelled"
        with_caller = request in self._finished
        if with_caller:
            self._finished.remove(request)
        self._waiting.pop(request, None)
        self.tell(Cancelled(request=request))

    def _consume(self) -> None:
        """A caller who takes clips one at a time, and says so when done with each."""
        if self._consuming or not self._finished:
            return
        self._consuming = True

        def taken() -> None:
            self._consuming = False
            if self._finished:  # else cancelled meanwhile
                request = self._finished.popleft()
                self.outcome[request] = "delivered"
                self.tell(Delivered(request=request))
            self._consume()

        self._at(self.now + self.times.consume(), taken)

    # -- the scheduler

    def tell(self, event: Event) -> None:
        """Give the scheduler one event, check its commands, send them to the ranks."""
        self.events.append(event)
        commands = self.scheduler.on(event)
        self.commands.append(commands)
        for command in commands:
            self._check_command(command)
            for rank, op in self.ops(command):
                self._send(rank, op)
        self._check_bounds()

    def ops(self, command: Command) -> list[tuple[int, Op]]:
        """What each rank is told, in the order of sending."""
        match command:
            case Encode():
                return [(command.rank, Op("encode", command.request))]
            case Begin():
                return [(r, Op("begin", command.request, members=command.ranks)) for r in command.ranks]
            case Step():
                together = (*command.ranks, *command.helpers)
                return [(r, Op("step", command.request, command.step, members=together)) for r in together]
            case Finish():
                return [(r, Op("finish", command.request, members=command.ranks)) for r in command.ranks]
            case Abandon():
                return [(r, Op("abandon", command.request)) for r in command.ranks]
            case HandOver():
                send = Op("send", command.request, sequence=command.sequence)
                receive = Op("receive", command.request, partner=command.leader, sequence=command.sequence)
                decode = Op("decode", command.request, members=command.ranks)
                return [(command.leader, send), *((r, op) for r in command.ranks for op in (receive, decode))]
            case Release():
                return [(command.rank, Op("release", command.request))]

    def _check_command(self, command: Command) -> None:
        if self.colocated:  # the ranks have one thing to do at a time: no decode waits behind a step, or before one
            if isinstance(command, HandOver):
                self._expect(not self._denoising, "a decode during a denoise", command, self._denoising)
            elif isinstance(command, Begin | Step):
                self._expect(not self._given, "a denoise during a decode", command, self._given)
        match command:
            case Begin() | Finish():
                if isinstance(command, Begin):
                    self._denoising.add(command.request)
                self._expect(command.ranks == self.topology.dit_ranks, "a group command misses members", command)
            case Step():
                self._steps_out += 1
                self._expect(self._steps_out <= self.steps_in_flight, "too many steps queued", command)
                self._expect(command.ranks == self.topology.dit_ranks, "a group command misses members", command)
                lent = set(command.helpers)
                self._expect(lent <= set(self.topology.vae_ranks), "a rank is lent that is no VAE rank", command)
                self._expect(not lent & self._decoding(), "a rank that decodes is lent", command)
                self.steps_with_help += bool(lent)
            case HandOver():
                self._expect(
                    command.ranks in self.topology.decode_teams, "a clip goes to ranks that are no team", command
                )
                busy = self._decoding() & set(command.ranks)
                self._expect(not busy, "a team gets a clip while it has one", command)
                self._expect(command.request in self._waiting, "a clip is handed over that does not wait", command)
                oldest = next(iter(self._waiting), None)
                self._expect(command.request == oldest, f"not first in, first out: {oldest} waits longer", command)
                del self._waiting[command.request]
                self._given[command.request] = command.ranks
                shares = {(command.request, rank) for rank in command.ranks}
                self._at_it |= shares
                self._unacknowledged |= shares
            case Abandon():
                self._denoising.discard(command.request)
            case Release():
                waiting = [rank for request, rank in self._unacknowledged if request == command.request]
                self._expect(not waiting, "latents released before acknowledgement", command, waiting)

    def _check_bounds(self) -> None:
        blocked = self.scheduler.put_blocked
        waiting = list(self._waiting.values())
        queued = waiting[:-1] if blocked else waiting  # the last one is denoised, but not in the queue
        self.most_waiting = max(self.most_waiting, len(queued))
        self._expect(len(queued) <= self.max_waiting, "queue above its capacity", queued)
        self._expect(sum(queued) <= self.max_waiting_bytes, "queue above its capacity in bytes", queued)
        in_memory = len(self._given) + len([r for r in self.outcome if self.outcome[r] == "decoded"])
        self._expect(in_memory <= self.max_undelivered, "too many clips decoded or being decoded", in_memory)

    def _decoding(self) -> set[int]:
        """All members of teams that have a clip, those that have ended their share of it included."""
        return {rank for team in self._given.values() for rank in team}

    @staticmethod
    def _expect(holds: bool, what: str, *details: object) -> None:
        if not holds:
            raise BrokenPromiseError(f"{what}: {details}")

    # -- the ranks

    def _send(self, rank: int, op: Op) -> None:
        state = self.ranks[rank]
        state.last_arrival = max(state.last_arrival, self.now + self.times.message())

        def arrive() -> None:
            self._queue(state, op)
            self._go_on()

        self._at(state.last_arrival, arrive)

    def _queue(self, state: Rank, op: Op) -> None:
        """In order; but a hand-over does not wait for steps that the leader was given before."""
        if op.kind == "send":
            state.todo.appendleft(op)
        else:
            state.todo.append(op)

    def _report(self, rank: int, event: Event) -> None:
        state = self.ranks[rank]
        state.last_report = max(state.last_report, self.now + self.times.message())
        self._at(state.last_report, lambda: self._hear(event))

    def _hear(self, event: Event) -> None:
        match event:
            case StepDone():
                self._steps_out -= 1
            case Denoised():
                self.denoised.append(event.request)
                self._denoising.discard(event.request)
                if event.request not in self.cancelled:
                    self._waiting[event.request] = self.bytes[event.request]
            case LatentsReceived():
                self._unacknowledged.discard((event.request, event.rank))
            case Decoded():
                self._at_it.remove((event.request, event.rank))
                if not any(request == event.request for request, _ in self._at_it):
                    self.decode_order.append(event.request)
                    del self._given[event.request]
                if event.request not in self.cancelled and event.request not in self._given:
                    self._expect(event.request not in self.outcome, "decoded twice", event)
                    self.outcome[event.request] = "decoded"
                    self._finished.append(event.request)
        self.tell(event)
        self._consume()

    def _go_on(self) -> None:
        """Begin everything that can begin: a rendezvous once all members are there, a receive once it was sent."""
        moved = True
        while moved:
            moved = False
            for rank, state in self.ranks.items():
                if state.busy is None and state.todo and self._ready(rank, state.todo[0]):
                    self._begin(state.todo[0], rank)
                    moved = True

    def _ready(self, rank: int, op: Op) -> bool:
        if op.kind == "receive":
            return op.sequence in self.ranks[op.partner].sent
        for member in op.members:
            other = self.ranks[member]
            if other.busy is not None or not other.todo:
                return False
            there = other.todo[0]
            if (there.kind, there.request, there.step, there.members) != (op.kind, op.request, op.step, op.members):
                return False
        return True

    def _begin(self, op: Op, rank: int) -> None:
        members = op.members or (rank,)
        for member in members:
            self.ranks[member].busy = self.ranks[member].todo.popleft()
        if op.kind == "decode":
            for member in members:
                self._run(op, member, (member,), self.times.decode())
            return
        duration = {"encode": self.times.encode, "step": self.times.step}
        self._run(op, rank, members, duration[op.kind]() if op.kind in duration else 0.0)

    def _run(self, op: Op, rank: int, members: tuple[int, ...], seconds: float) -> None:
        """`members` are busy for a time."""
        start = self.now

        def end() -> None:
            for member in members:
                self.ranks[member].busy = None
                self.intervals.append(Interval(op.kind, op.request, member, start, self.now))
            self._ended(op, rank, members)
            self._go_on()

        if seconds:
            self._at(self.now + seconds, end)
        else:
            for member in members:
                self.ranks[member].busy = None
            self._ended(op, rank, members)

    def _ended(self, op: Op, rank: int, members: tuple[int, ...]) -> None:
        leader = self.topology.leader
        match op.kind:
            case "encode":
                self._report(rank, Encoded(request=op.request))
            case "begin":
                for member in members:
                    self._expect(op.request not in self.ranks[member].states, "begun twice", op)
                    self.ranks[member].states.add(op.request)
                    self.ranks[member].next_step[op.request] = 0
            case "step":
                for member in self.topology.dit_ranks:
                    state = self.ranks[member]
                    self._expect(op.request in state.states, "a step of a request that was not begun", op)
                    self._expect(state.next_step[op.request] == op.step, "a step out of order", op)
                    state.next_step[op.request] += 1
                self._report(leader, StepDone(request=op.request, step=op.step))
            case "finish":
                for member in members:
                    self.ranks[member].states.remove(op.request)
                self.ranks[leader].latents.add(op.request)
                self._report(leader, Denoised(request=op.request))
            case "abandon":
                self.ranks[rank].states.discard(op.request)
            case "send":
                self._expect(op.request in self.ranks[rank].latents, "latents sent that are not there", op)
                self.ranks[rank].sent.add(op.sequence)
            case "receive":
                self._report(rank, LatentsReceived(request=op.request, rank=rank, sequence=op.sequence))
            case "decode":
                self._report(rank, Decoded(request=op.request, rank=rank))
            case "release":
                self._expect(op.request in self.ranks[rank].latents, "latents released that are not there", op)
                self.ranks[rank].latents.remove(op.request)

    def _at(self, time: float, action: Callable[[], None]) -> None:
        self._counter += 1
        heapq.heappush(self._agenda, (time, self._counter, action))

    # -- the end

    def _check_the_end(self) -> None:
        stuck = {rank: (state.busy, list(state.todo)) for rank, state in self.ranks.items() if state.busy or state.todo}
        self._expect(not stuck, "deadlock, ranks wait for ever", stuck)
        left = {request for request in self.bytes if self.outcome.get(request) not in ("delivered", "cancelled")}
        self._expect(not left, "never finished", left)
        self._expect(self.scheduler.idle, "the scheduler is not idle at the end")
        for request in self.bytes:
            self._expect(not self.scheduler.knows(request), "not forgotten by the scheduler", request)
        decodes = Counter(self.decode_order)
        self._expect(not decodes or max(decodes.values()) == 1, "decoded twice", decodes)
        for rank, state in self.ranks.items():
            self._expect(not state.states, "a request's state stays on a rank", rank, state.states)
            self._expect(not state.latents, "latents stay on a rank", rank, state.latents)

    def spans(self, kind: str) -> dict[str, tuple[float, float]]:
        """First start and last end of all operations of a kind, by request."""
        found: defaultdict[str, list[Interval]] = defaultdict(list)
        for interval in self.intervals:
            if interval.kind == kind:
                found[interval.request].append(interval)
        return {r: (min(i.start for i in part), max(i.end for i in part)) for r, part in found.items()}
