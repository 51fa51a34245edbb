"""Decides everything: which rank encodes, denoises, decodes, and when a latent may cross. A pure state machine.

`Scheduler.on(event) -> [command]` has no torch, no clock and no I/O in it; it is driven by the engine with real
workers, by tests with a fake clock, and later by a simulator. All decisions fall at denoising-step boundaries. The
commands for one rank form one ordered stream, and every group of ranks gets its shared commands in the same order.

Source: the roles and the protocol follow PipeDiT (arXiv 2511.12056), DeDiVAE, with credits instead of polling.
"""

from collections import deque
from collections.abc import Sequence
from itertools import combinations

import msgspec

from videopipe.policies import POLICIES, Policy
from videopipe.queue import BoundedQueue

# ---- events: what has happened -------------------------------------------------------------------------------------


class Submitted(msgspec.Struct, frozen=True, kw_only=True):
    """A request arrived. `latent_bytes` is the size of its finished latents.

    `helper_sets`: the sets of VAE ranks that may be lent to its steps, the best first; None for those of the scheduler.
    """

    request: str
    num_steps: int
    latent_bytes: int
    helper_sets: tuple[tuple[int, ...], ...] | None = None


class Encoded(msgspec.Struct, frozen=True, kw_only=True):
    """The text encoder has the conditioning of a request ready."""

    request: str


class StepDone(msgspec.Struct, frozen=True, kw_only=True):
    """The DiT group has completed one denoising step (device work included)."""

    request: str
    step: int


class Denoised(msgspec.Struct, frozen=True, kw_only=True):
    """The finished latents of a request lie on the leader of the DiT group."""

    request: str


class LatentsReceived(msgspec.Struct, frozen=True, kw_only=True):
    """A member of a decoding team holds the latents; once all do, the leader may forget them."""

    request: str
    rank: int
    sequence: int


class Decoded(msgspec.Struct, frozen=True, kw_only=True):
    """A rank has finished its share of a decode, its last kernel included.

    Once all members of its team have, the clip is there, and the team has its credit for the next one.
    """

    request: str
    rank: int


class Delivered(msgspec.Struct, frozen=True, kw_only=True):
    """The caller has taken a finished clip out of host memory."""

    request: str


class Cancelled(msgspec.Struct, frozen=True, kw_only=True):
    """The caller no longer wants a request. What already runs for it ends at the next boundary."""

    request: str


Event = Submitted | Encoded | StepDone | Denoised | LatentsReceived | Decoded | Delivered | Cancelled

# ---- commands: what shall be done ----------------------------------------------------------------------------------


class Encode(msgspec.Struct, frozen=True, kw_only=True):
    """`rank` encodes the prompt and sends the conditioning to the DiT ranks."""

    request: str
    rank: int


class Begin(msgspec.Struct, frozen=True, kw_only=True):
    """The DiT ranks take the conditioning and prepare the noise."""

    request: str
    ranks: tuple[int, ...]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """The DiT ranks run one denoising step; `helpers` are idle VAE ranks that take a share of its attention."""

    request: str
    step: int
    ranks: tuple[int, ...]
    helpers: tuple[int, ...] = ()


class Finish(msgspec.Struct, frozen=True, kw_only=True):
    """The DiT ranks hand the finished latents to their leader's host memory and free the request's state."""

    request: str
    ranks: tuple[int, ...]


class Abandon(msgspec.Struct, frozen=True, kw_only=True):
    """The ranks forget a cancelled request."""

    request: str
    ranks: tuple[int, ...]


class HandOver(msgspec.Struct, frozen=True, kw_only=True):
    """The leader sends the latents to each of `ranks`, a team, who acknowledge them and decode them together.

    The send does not wait behind steps that the leader was given before: it begins between two of them.
    """

    request: str
    leader: int
    ranks: tuple[int, ...]
    sequence: int


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """The leader forgets latents that all who decode them have acknowledged."""

    request: str
    rank: int


Command = Encode | Begin | Step | Finish | Abandon | HandOver | Release

# ---- the machine ---------------------------------------------------------------------------------------------------


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    """Which ranks do what. Without a VAE group the DiT ranks decode as well (`decode_ranks`).

    `teams`: which of the decoding ranks decode a clip together, each rank in one of them; empty for each by itself.
    """

    dit_ranks: tuple[int, ...]
    vae_ranks: tuple[int, ...]
    encoder_rank: int
    teams: tuple[tuple[int, ...], ...] = ()

    @property
    def leader(self) -> int:
        """The first DiT rank; finished latents wait in its host memory."""
        return self.dit_ranks[0]

    @property
    def decode_ranks(self) -> tuple[int, ...]:
        """The ranks that can decode."""
        return self.vae_ranks or self.dit_ranks

    @property
    def decode_teams(self) -> tuple[tuple[int, ...], ...]:
        """The ranks that can decode, by the clip that they decode at a time."""
        return self.teams or tuple((rank,) for rank in self.decode_ranks)


def helper_sets(vae_ranks: Sequence[int], limit: int = 4) -> tuple[tuple[int, ...], ...]:
    """Sets of VAE ranks that can be lent together; each needs a communicator with the DiT group.

    All non-empty subsets of up to `limit` ranks; of more, single ranks and those that begin at the first one.
    """
    ranks = tuple(vae_ranks)
    if len(ranks) <= limit:
        return tuple(c for size in range(1, len(ranks) + 1) for c in combinations(ranks, size))
    return (*((rank,) for rank in ranks), *(ranks[:size] for size in range(2, len(ranks) + 1)))


class _Denoising:
    """Progress of one request in the DiT group."""

    def __init__(self, submitted: Submitted, helper_sets: Sequence[tuple[int, ...]]) -> None:
        self.request = submitted.request
        self.num_steps = submitted.num_steps
        self.nbytes = submitted.latent_bytes
        self.helper_sets = helper_sets if submitted.helper_sets is None else submitted.helper_sets
        self.issued = 0
        self.done = 0
        self.finishing = False


class Scheduler:
    """See the module.

    Args:
        encode_ahead: requests that may be encoded before the DiT group takes them.
        steps_ahead: steps that ranks may hold beyond the one they execute.
        max_undelivered: finished clips in host memory, those being decoded included.
        helper_sets: sets of VAE ranks that may be lent to a denoising step together (attention co-processing); empty to
            lend none. The largest one that is idle is lent, or the first idle one of the request's own. Only the
            sequencer creates work for a VAE rank, so one that is idle when a step is issued stays idle until the step:
            no handshake is needed, and since each rank obeys in order, a decode that is issued later waits for the end
            of the steps that the rank was lent to. A member of a team is idle when its team is. Decodes and assisted
            steps reach all who share them in one order, so no two of them can wait for each other.
    """

    def __init__(
        self,
        topology: Topology,
        policy: str | Policy,
        queue: BoundedQueue,
        *,
        encode_ahead: int = 2,
        steps_ahead: int = 1,
        max_undelivered: int = 4,
        helper_sets: Sequence[tuple[int, ...]] = (),
    ) -> None:
        assert all(set(helpers) <= set(topology.vae_ranks) for helpers in helper_sets), (topology, helper_sets)
        members = [rank for team in topology.decode_teams for rank in team]
        assert sorted(members) == sorted(topology.decode_ranks), topology
        self.topology = topology
        self.policy: Policy = POLICIES[policy] if isinstance(policy, str) else policy
        self.queue = queue
        self.max_undelivered = max(max_undelivered, len(topology.decode_teams))
        self._encode_ahead = encode_ahead
        self._steps_in_flight = 1 + steps_ahead
        self._helper_sets = sorted(helper_sets, key=lambda helpers: (-len(helpers), helpers))
        self._requests: dict[str, Submitted] = {}
        self._pending: deque[str] = deque()  # not yet encoded
        self._encoding: deque[str] = deque()
        self._encoded: deque[str] = deque()
        self._active: deque[_Denoising] = deque()  # in the DiT group, oldest first; at most one still issues steps
        self._lent: deque[tuple[int, ...]] = deque()  # helpers of each step issued and not done
        self._blocked: _Denoising | None = None  # denoised, but the queue has no room: `put` waits
        self._decoding: dict[int, str] = {}  # rank -> request: a team's credit is out until none of its members is here
        self._unreceived: dict[int, set[int]] = {}  # sequence -> members that have not acknowledged the latents
        self._undelivered: set[str] = set()
        self._cancelled: set[str] = set()

    # -- what policies and tests may look at

    @property
    def denoising(self) -> int:
        """Requests in the DiT group."""
        return len(self._active)

    @property
    def decoding(self) -> int:
        """Decodes under way."""
        return len(set(self._decoding.values()))

    @property
    def to_denoise(self) -> int:
        """Requests that have not reached the DiT group."""
        return len(self._pending) + len(self._encoding) + len(self._encoded)

    @property
    def put_blocked(self) -> bool:
        """Whether a finished latent waits for room in the queue."""
        return self._blocked is not None

    @property
    def outstanding(self) -> int:
        """Clips between the end of denoising and the end of decoding: 0 tells that the VAE group is idle."""
        return self.queue.waiting + self.decoding + (self._blocked is not None)

    @property
    def encoding(self) -> str | None:
        """The request that the text encoder is at."""
        return self._encoding[0] if self._encoding else None

    @property
    def current_step(self) -> tuple[str, int] | None:
        """The request and step that the DiT group is at, as far as it has reported."""
        for run in self._active:
            if run.done < run.num_steps:
                return run.request, run.done
        return None

    @property
    def current_helpers(self) -> tuple[int, ...]:
        """The VAE ranks that are lent to the current step."""
        return self._lent[0] if self._lent else ()

    def decoding_on(self, rank: int) -> str | None:
        """The request that `rank` decodes, None once its own share of it has ended."""
        return self._decoding.get(rank)

    def is_decoding(self, request: str) -> bool:
        """Whether any rank is at the decode of a request."""
        return request in self._decoding.values()

    def knows(self, request: str) -> bool:
        """Whether a request is under way, or finished and not taken away."""
        return request in self._requests

    @property
    def idle(self) -> bool:
        """Nothing left to do, apart from clips the caller has not taken."""
        return not (self.to_denoise or self._active or self.outstanding or self.queue.unacknowledged)

    # -- events

    def on(self, event: Event) -> list[Command]:
        """Take one event, answer with the commands that follow from it, in order.

        Raises:
            AssertionError: an event that cannot have happened in this state (programmer error).
            ValueError: a submitted request that the queue can never hold, or an id that is already under way.
        """
        commands: list[Command] = []
        match event:
            case Submitted():
                self._submit(event)
            case Encoded():
                assert self._encoding and self._encoding[0] == event.request, (event, self._encoding)
                self._encoding.popleft()
                if event.request in self._cancelled:
                    self._forget(event.request)
                    commands.append(Abandon(request=event.request, ranks=self._encoder_and_dit()))
                else:
                    self._encoded.append(event.request)
            case StepDone():
                run = next(run for run in self._active if run.done < run.num_steps)
                assert (run.request, run.done) == (event.request, event.step), (event, run.request, run.done)
                run.done += 1
                self._lent.popleft()
                if event.request in self._cancelled and run.done == run.issued and not run.finishing:
                    self._active.remove(run)
                    self._forget(event.request)
                    commands.append(Abandon(request=event.request, ranks=self._encoder_and_dit()))
            case Denoised():
                run = self._active.popleft()
                assert run.request == event.request and run.finishing, (event, run.request)
                assert self._blocked is None, (event, self._blocked)
                if event.request in self._cancelled:
                    self._forget(event.request)
                    commands.append(Release(request=event.request, rank=self.topology.leader))
                else:
                    self._blocked = run
            case LatentsReceived():
                if self._received_by_all(event) and self.queue.acknowledge(event.sequence) is not None:
                    commands.append(Release(request=event.request, rank=self.topology.leader))
            case Decoded():
                assert self._decoding.get(event.rank) == event.request, (event, self._decoding)
                del self._decoding[event.rank]
                if self.is_decoding(event.request):
                    pass  # others of its team are
                elif event.request in self._cancelled:
                    self._forget(event.request)
                else:
                    self._undelivered.add(event.request)
            case Delivered():
                self._undelivered.discard(event.request)
                self._forget(event.request)
            case Cancelled():
                commands.extend(self._cancel(event.request))
        self._advance(commands)
        return commands

    def _submit(self, event: Submitted) -> None:
        if event.request in self._requests:
            raise ValueError(f"id={event.request!r} is already under way, give each request its own id")
        if event.latent_bytes > self.queue.capacity_bytes:
            raise ValueError(
                f"queue.capacity_bytes={self.queue.capacity_bytes} cannot hold the latents of {event.request!r}, "
                f"nearest is {event.latent_bytes}"
            )
        assert event.num_steps >= 1, event
        self._requests[event.request] = event
        self._pending.append(event.request)

    def _received_by_all(self, event: LatentsReceived) -> bool:
        left = self._unreceived.get(event.sequence, set())
        left.discard(event.rank)
        if not left:
            self._unreceived.pop(event.sequence, None)
        return not left

    def _cancel(self, request: str) -> list[Command]:
        if request not in self._requests:
            return []
        if request in self._pending:
            self._pending.remove(request)
            self._forget(request)
        elif request in self._encoded:
            self._encoded.remove(request)
            self._forget(request)
            return [Abandon(request=request, ranks=self._encoder_and_dit())]
        elif self.queue.discard(request):
            self._forget(request)
            return [Release(request=request, rank=self.topology.leader)]
        elif self._blocked is not None and self._blocked.request == request:
            self._blocked = None
            self._forget(request)
            return [Release(request=request, rank=self.topology.leader)]
        elif request in self._undelivered:
            self._undelivered.discard(request)
            self._forget(request)
        else:
            self._cancelled.add(request)  # encoding, denoising or decoding: ends at its next boundary
            for run in self._active:
                if run.request == request and run.issued == run.done and not run.finishing:
                    self._active.remove(run)
                    self._forget(request)
                    return [Abandon(request=request, ranks=self._encoder_and_dit())]
        return []

    def _forget(self, request: str) -> None:
        self._requests.pop(request, None)
        self._cancelled.discard(request)

    def _encoder_and_dit(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((self.topology.encoder_rank, *self.topology.dit_ranks)))

    # -- what follows from the state

    def _advance(self, commands: list[Command]) -> None:
        """Issue everything that may start now. Encoding first: it must not wait behind a decode on the same rank."""
        self._encode(commands)
        moved = True
        while moved:  # a decode makes room for a blocked put, a put gives a rank its next decode
            moved = self._put() | self._hand_over(commands)
        self._denoise(commands)

    def _encode(self, commands: list[Command]) -> None:
        while self._pending and len(self._encoding) + len(self._encoded) < self._encode_ahead:
            request = self._pending.popleft()
            self._encoding.append(request)
            commands.append(Encode(request=request, rank=self.topology.encoder_rank))

    def _put(self) -> bool:
        if self._blocked is None or not self.queue.has_room(self._blocked.nbytes):
            return False
        self.queue.put(self._blocked.request, self._blocked.nbytes)
        self._blocked = None
        return True

    def _hand_over(self, commands: list[Command]) -> bool:
        moved = False
        # the leader last: it obeys in order, so what it shall send must not wait behind a decode of its own
        for team in sorted(self.topology.decode_teams, key=lambda team: self.topology.leader in team):
            if self._busy(team) or not self.queue.waiting or not self.policy.may_decode(self):
                continue
            if self.decoding + len(self._undelivered) >= self.max_undelivered:
                break
            ticket = self.queue.take()
            self._decoding |= dict.fromkeys(team, ticket.item)
            self._unreceived[ticket.sequence] = set(team)
            commands.append(
                HandOver(request=ticket.item, leader=self.topology.leader, ranks=team, sequence=ticket.sequence)
            )
            moved = True
        return moved

    def _busy(self, team: tuple[int, ...]) -> bool:
        return any(rank in self._decoding for rank in team)

    def _denoise(self, commands: list[Command]) -> None:
        ranks = self.topology.dit_ranks
        while True:
            run = self._active[-1] if self._active else None
            if run is None or run.finishing:
                if not self._may_begin():
                    return
                submitted = self._requests[self._encoded.popleft()]
                run = _Denoising(submitted, self._helper_sets)
                self._active.append(run)
                commands.append(Begin(request=run.request, ranks=ranks))
            if run.request in self._cancelled:
                return
            while run.issued < run.num_steps:
                if sum(r.issued - r.done for r in self._active) >= self._steps_in_flight:
                    return
                self._lent.append(self._helpers(run))
                commands.append(Step(request=run.request, step=run.issued, ranks=ranks, helpers=self._lent[-1]))
                run.issued += 1
            run.finishing = True
            commands.append(Finish(request=run.request, ranks=ranks))

    def _helpers(self, run: _Denoising) -> tuple[int, ...]:
        """The VAE ranks to lend to the next step of `run`: idle ones, while no latent waits for them."""
        if self.queue.waiting or self._blocked is not None:
            return ()
        busy = {rank for team in self.topology.decode_teams if self._busy(team) for rank in team}
        if self._encoding:
            busy.add(self.topology.encoder_rank)
        return next((helpers for helpers in run.helper_sets if not busy & set(helpers)), ())

    def _may_begin(self) -> bool:
        """A request may enter the DiT group when no earlier one could be stopped by a full queue."""
        if not self._encoded or self._blocked is not None:
            return False
        if sum(r.issued - r.done for r in self._active) >= self._steps_in_flight:
            return False
        if self._active and not self._fits([run.nbytes for run in self._active]):
            return False
        return self.policy.may_begin(self)

    def _fits(self, sizes: Sequence[int]) -> bool:
        q = self.queue
        return q.waiting + len(sizes) <= q.capacity and q.waiting_bytes + sum(sizes) <= q.capacity_bytes
