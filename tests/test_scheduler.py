"""The scheduler under a fake clock: hundreds of random machines, delays, slow callers and cancellations."""

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from msgspec import structs

from tests.fake_ranks import BrokenPromiseError, FakeRanks, Op, Rank, Times
from videopipe.policies import POLICIES, Colocated, Decoupled, Policy
from videopipe.queue import BoundedQueue
from videopipe.scheduler import (
    Command,
    Decoded,
    Encode,
    Encoded,
    Event,
    HandOver,
    LatentsReceived,
    Release,
    Scheduler,
    Step,
    Submitted,
    Topology,
    _Denoising,
    helper_sets,
)

NUM_SCHEDULES = 500
CLIP = 10  # bytes of the smallest latents


def topology(dit: int, vae: int, encoder: str = "dit", *, teams: int = 0) -> Topology:
    """`teams`: into so many teams the decoding ranks are divided; 0 for each by itself."""
    dit_ranks, vae_ranks = tuple(range(dit)), tuple(range(dit, dit + vae))
    decoding = vae_ranks or dit_ranks
    return Topology(
        dit_ranks=dit_ranks,
        vae_ranks=vae_ranks,
        encoder_rank=decoding[0] if encoder == "vae" else 0,
        teams=tuple(decoding[first::teams] for first in range(min(teams, len(decoding)))),
    )


def random_case(
    policy: str,
    seed: int,
    *,
    scheduler: type[Scheduler] = Scheduler,
    queue: type[BoundedQueue] = BoundedQueue,
    driver: type[FakeRanks] = FakeRanks,
    rule: Policy | None = None,
    steps_ahead: int = 1,
    cancel: bool = True,
) -> FakeRanks:
    """A machine, its requests and its delays, all drawn from one seed."""
    rng = random.Random(f"{policy}-{seed}")
    teams = random.Random(f"teams-{policy}-{seed}").choice([0, 0, 1, 1, 2])
    dit, vae = rng.randint(1, 3), 0 if policy == "colocated" else rng.randint(1, 3)
    ranks = topology(dit, vae, rng.choice(["dit", "vae"]), teams=teams)
    capacity = rng.randint(1, 3)
    capacity_bytes = rng.choice([CLIP * 3, CLIP * 4, CLIP * 100])
    max_undelivered = rng.choice([1, 2, 4])
    lent = helper_sets(ranks.vae_ranks) if random.Random(f"help-{policy}-{seed}").random() < 0.5 else ()
    machine = driver(
        scheduler(
            ranks,
            rule or policy,
            queue(capacity, capacity_bytes),
            encode_ahead=rng.randint(1, 3),
            steps_ahead=steps_ahead,
            max_undelivered=max_undelivered,
            helper_sets=lent,
        ),
        Times.drawn(rng),
        max_waiting=capacity,
        max_waiting_bytes=capacity_bytes,
        max_undelivered=max(max_undelivered, len(ranks.decode_teams)),
        colocated=policy == "colocated",
    )
    for index in range(rng.randint(1, 8)):
        at = rng.choice([0.0, rng.uniform(0, 60)])
        machine.submit(f"clip-{index}", rng.randint(1, 4), rng.randint(1, 3) * CLIP, at)
        if cancel and rng.random() < 0.3:
            machine.cancel(f"clip-{index}", at + rng.choice([0.0, rng.uniform(0, 30)]))
    return machine


def cases(policy: str, count: int = NUM_SCHEDULES, **twin: object) -> Iterator[tuple[int, FakeRanks]]:
    for seed in range(count):
        yield seed, random_case(policy, seed, **twin)  # type: ignore[arg-type]


def caught(policies: tuple[str, ...], **twin: object) -> set[str]:
    """What the checks say about a scheduler, queue, policy or driver that is deliberately wrong."""
    found = set()
    for policy in policies:
        for _, machine in cases(policy, 60, **twin):
            try:
                machine.run()
            except BrokenPromiseError as error:
                found.add(str(error).split(":")[0])
    return found


# -- every promise, on many schedules


@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_request_ends_once_and_every_promise_holds(policy: str) -> None:
    cancelled = delivered = full = helped = together = 0
    for seed, machine in cases(policy):
        try:
            machine.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
        cancelled += list(machine.outcome.values()).count("cancelled")
        delivered += list(machine.outcome.values()).count("delivered")
        full += machine.most_waiting == machine.max_waiting
        helped += machine.steps_with_help
        together += sum(i.kind == "decode" for i in machine.intervals) - len(machine.decode_order)
    assert cancelled > 200  # the cases do reach what they are to test
    assert delivered > 1000
    assert full > 20
    assert together > 300  # decodes by more than one rank, counted by the others
    assert helped > 500 or policy == "colocated"


@pytest.mark.parametrize("policy", list(POLICIES))
def test_the_same_events_give_the_same_commands(policy: str) -> None:
    for seed, machine in cases(policy, 40):
        machine.run()
        again = random_case(policy, seed).scheduler
        assert [again.on(event) for event in machine.events] == machine.commands, f"seed {seed}"


@pytest.mark.parametrize("policy", list(POLICIES))
def test_shared_commands_come_to_all_members_in_one_order(policy: str) -> None:
    shared_by_vae_ranks = 0
    for _, machine in cases(policy, 60):
        machine.run()
        streams: dict[int, list[Op]] = {rank: [] for rank in machine.ranks}
        for command in (command for commands in machine.commands for command in commands):
            for rank, op in machine.ops(command):
                if len(op.members) > 1:
                    streams[rank].append(op)
        for one, other in combinations(streams, 2):
            here = [op for op in streams[one] if other in op.members]
            assert here == [op for op in streams[other] if one in op.members]
            shared_by_vae_ranks += len({op.kind for op in here}) == 2 and one in machine.topology.vae_ranks
    assert shared_by_vae_ranks > 3 or policy == "colocated"  # decodes among assisted steps


# -- what each schedule is for


def steady(
    policy: str,
    dit: int,
    vae: int,
    num_requests: int,
    times: Times,
    *,
    driver: type[FakeRanks] = FakeRanks,
    **limits: int,
) -> FakeRanks:
    """Equal requests that are all there from the start, with nothing random."""
    capacity, undelivered = limits.get("capacity", 2), limits.get("max_undelivered", 4)
    ranks = topology(dit, vae, teams=limits.get("teams", 0))
    machine = driver(
        Scheduler(ranks, policy, BoundedQueue(capacity, 10**9), max_undelivered=undelivered),
        times,
        max_waiting=capacity,
        max_waiting_bytes=10**9,
        max_undelivered=max(undelivered, len(ranks.decode_teams)),
        colocated=policy == "colocated",
    )
    for index in range(num_requests):
        machine.submit(f"clip-{index}", 4, CLIP)
    return machine


def overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0]))


def test_decoupled_decodes_one_clip_while_it_denoises_the_next() -> None:
    machine = steady("decoupled", 2, 1, 5, Times.fixed(step=1, decode=2))
    machine.run()
    decode, denoise = machine.spans("decode"), machine.spans("step")
    for index in range(4):
        assert overlap(decode[f"clip-{index}"], denoise[f"clip-{index + 1}"]) == 2.0
    assert machine.now == 5 * 4 + 2  # nothing but the last decode is left to wait for


class SendsInOrder(FakeRanks):
    """The twin: a hand-over waits until the leader has done what it was told before."""

    def _queue(self, state: Rank, op: Op) -> None:
        state.todo.append(op)


@pytest.mark.parametrize(("driver", "longest_wait"), [(FakeRanks, 1.0), (SendsInOrder, 2.0)])
def test_a_hand_over_waits_for_the_step_that_runs_and_for_no_other(
    driver: type[FakeRanks], longest_wait: float
) -> None:
    machine = steady("decoupled", 2, 1, 5, Times.fixed(step=1, decode=0.5), driver=driver)
    machine.run()
    decode, denoise = machine.spans("decode"), machine.spans("step")
    assert max(decode[clip][0] - denoise[clip][1] for clip in decode) == longest_wait


def test_colocated_never_does() -> None:
    machine = steady("colocated", 2, 0, 5, Times.fixed(step=1, decode=3))
    machine.run()
    decode, denoise = machine.spans("decode"), machine.spans("step")
    assert not any(overlap(d, s) for d in decode.values() for s in denoise.values())


@pytest.mark.parametrize("dit", [1, 2, 3])
def test_colocated_decodes_as_many_clips_side_by_side_as_it_has_ranks(dit: int) -> None:
    machine = steady("colocated", dit, 0, 6, Times.fixed(step=1, decode=3), capacity=3)
    machine.run()
    assert machine.now == 6 * 4 + 6 / dit * 3


def test_steps_follow_each_other_without_a_gap_when_messages_take_time() -> None:
    slow = Times.fixed(step=1, decode=0.1)
    machine = steady("decoupled", 1, 1, 3, Times(**{**vars(slow), "message": lambda: 0.2}))
    machine.run()
    steps = sorted((i.start, i.end) for i in machine.intervals if i.kind == "step")
    gaps = [later[0] - earlier[1] for earlier, later in pairwise(steps)]
    assert max(gaps) == pytest.approx(0)
    without = steady("decoupled", 1, 1, 3, Times(**{**vars(slow), "message": lambda: 0.2}))
    without.scheduler._steps_in_flight = 1  # the twin: told a step only once the last has been reported
    without.run()
    assert without.now > machine.now + 3


def test_a_team_decodes_one_clip_after_the_other_and_ends_with_its_last_member() -> None:
    decodes = iter([1.0, 5.0, 2.0] * 3)
    times = Times(**{**vars(Times.fixed(step=1)), "decode": lambda: next(decodes)})
    machine = steady("decoupled", 1, 3, 3, times, teams=1)
    machine.run()
    spans = machine.spans("decode")
    assert [spans[f"clip-{index}"] for index in range(3)] == [(5.0, 10.0), (11.0, 16.0), (16.0, 21.0)]
    alone = steady("decoupled", 1, 3, 3, Times.fixed(step=1, decode=5))  # the twin: each rank a clip of its own
    alone.run()
    assert [alone.spans("decode")[f"clip-{index}"] for index in range(3)] == [(5.0, 10.0), (9.0, 14.0), (12.0, 17.0)]


def test_a_slow_decoder_stops_the_denoising() -> None:
    machine = steady("decoupled", 1, 1, 8, Times.fixed(step=1, decode=100), capacity=2)
    machine.run()
    assert machine.most_waiting == 2
    decode, denoise = machine.spans("decode"), machine.spans("step")
    # one is decoded, two wait, one is denoised and blocked: the fifth begins when the first decode has ended
    assert denoise["clip-3"][1] < 20
    assert denoise["clip-4"][0] == decode["clip-0"][1] > 100


def test_a_slow_caller_stops_everything() -> None:
    machine = steady("decoupled", 1, 1, 10, Times.fixed(step=1, decode=1, consume=1000), max_undelivered=2, capacity=1)
    machine.run()
    first_delivered = 1000
    begun = [r for r, (start, _) in machine.spans("step").items() if start < first_delivered]
    # two decoded, one waits in the queue, one is denoised and blocked
    assert len(begun) == 4


def test_the_largest_clip_waits_for_room_in_bytes() -> None:
    ranks = topology(1, 1)
    machine = FakeRanks(
        Scheduler(ranks, "decoupled", BoundedQueue(3, 30)),
        Times.fixed(step=1, decode=50),
        max_waiting=3,
        max_waiting_bytes=30,
        max_undelivered=4,
    )
    for index, nbytes in enumerate([10, 20, 20, 10]):
        machine.submit(f"clip-{index}", 1, nbytes)
    machine.run()
    steps, decodes = machine.spans("step"), machine.spans("decode")
    assert steps["clip-2"][1] < 10  # denoised, but 20 + 20 bytes do not fit: put waits
    assert steps["clip-3"][0] == decodes["clip-0"][1] > 50


# -- single answers


def test_a_request_larger_than_the_queue_is_refused_with_the_size_it_needs() -> None:
    scheduler = Scheduler(topology(1, 1), "decoupled", BoundedQueue(1, 100))
    with pytest.raises(ValueError, match="capacity_bytes=100 cannot hold the latents of 'big', nearest is 101"):
        scheduler.on(Submitted(request="big", num_steps=1, latent_bytes=101))
    assert scheduler.idle


def test_an_id_that_is_under_way_is_refused() -> None:
    scheduler = Scheduler(topology(1, 1), "decoupled", BoundedQueue(1, 100))
    scheduler.on(Submitted(request="a", num_steps=1, latent_bytes=1))
    with pytest.raises(ValueError, match="id='a' is already under way"):
        scheduler.on(Submitted(request="a", num_steps=1, latent_bytes=1))


def test_an_event_that_cannot_have_happened_is_an_error() -> None:
    scheduler = Scheduler(topology(1, 1), "decoupled", BoundedQueue(1, 100))
    with pytest.raises(AssertionError):
        scheduler.on(Decoded(request="a", rank=1))
    with pytest.raises(AssertionError):
        scheduler.on(Encoded(request="a"))


def test_what_the_ranks_are_at_can_be_asked() -> None:
    scheduler = Scheduler(topology(2, 1), "decoupled", BoundedQueue(1, 100))
    assert scheduler.on(Submitted(request="a", num_steps=3, latent_bytes=1)) == [Encode(request="a", rank=0)]
    assert (scheduler.encoding, scheduler.current_step) == ("a", None)
    commands = scheduler.on(Encoded(request="a"))
    assert [type(c).__name__ for c in commands] == ["Begin", "Step", "Step"]
    assert (scheduler.encoding, scheduler.current_step, scheduler.decoding_on(2)) == (None, ("a", 0), None)


# -- twins: each breaks one promise


class CreditAtReceipt(Scheduler):
    """Takes a decoding rank for idle once it holds the latents."""

    def on(self, event: Event) -> list[Command]:
        if isinstance(event, LatentsReceived):
            early = {rank: request for rank, request in self._decoding.items() if request == event.request}
            for rank in early:
                del self._decoding[rank]
        elif isinstance(event, Decoded):
            self._decoding[event.rank] = event.request
        return super().on(event)


class CreditOfTheFirstMember(Scheduler):
    """Takes a team for idle once one of its members has ended its share."""

    def _busy(self, team: tuple[int, ...]) -> bool:
        return all(rank in self._decoding for rank in team)


class LendsWhoHasEnded(Scheduler):
    """Takes a member for idle while its team decodes."""

    def _helpers(self, run: _Denoising) -> tuple[int, ...]:
        if self.queue.waiting or self._blocked is not None or self._encoding:
            return ()
        return next((helpers for helpers in run.helper_sets if not set(self._decoding) & set(helpers)), ())


class SkipsOneMember(Scheduler):
    """Hands a clip over to a team without its last member."""

    def on(self, event: Event) -> list[Command]:
        return [
            structs.replace(c, ranks=c.ranks[:-1]) if isinstance(c, HandOver) and len(c.ranks) > 1 else c
            for c in super().on(event)
        ]


class ReleasesAtTheFirstReceipt(Scheduler):
    """Forgets latents as soon as one member of the team has acknowledged them."""

    def _received_by_all(self, event: LatentsReceived) -> bool:
        super()._received_by_all(event)
        return True


class ReleasesAtOnce(Scheduler):
    """Forgets latents as soon as they have been handed over."""

    def on(self, event: Event) -> list[Command]:
        commands = [command for command in super().on(event) if not isinstance(command, Release)]
        released = [Release(request=c.request, rank=c.leader) for c in commands if isinstance(c, HandOver)]
        return [*commands, *released]


class NeverReleases(Scheduler):
    def on(self, event: Event) -> list[Command]:
        return [command for command in super().on(event) if not isinstance(command, Release)]


class DropsWhenFull(Scheduler):
    """A latent that finds no room is gone."""

    def _put(self) -> bool:
        if self._blocked is not None and not self.queue.has_room(self._blocked.nbytes):
            self._forget(self._blocked.request)
            self._blocked = None
        return super()._put()

    def _may_begin(self) -> bool:
        return bool(self._encoded) and self._blocked is None


class ForgetsOneMember(Scheduler):
    def on(self, event: Event) -> list[Command]:
        return [
            Step(request=c.request, step=c.step, ranks=c.ranks[:1]) if isinstance(c, Step) else c
            for c in super().on(event)
        ]


class NewestFirst(Scheduler):
    """Serves the clip that was denoised last."""

    def _hand_over(self, commands: list[Command]) -> bool:
        self.queue._waiting.reverse()
        moved = super()._hand_over(commands)
        self.queue._waiting.reverse()
        return moved


class Unbounded(BoundedQueue):
    def has_room(self, nbytes: int) -> bool:
        return True

    @property
    def waiting(self) -> int:
        return min(super().waiting, 1)


class UnboundedPut(Scheduler):
    """Never waits for room before it begins the next request, nor when it puts."""

    def _fits(self, sizes: object) -> bool:
        return True


class Shuffled(FakeRanks):
    """Sends the commands of one event to the second DiT rank in reverse."""

    def tell(self, event: Event) -> None:
        self._reversed: list[tuple[int, Op]] = []
        super().tell(event)
        for rank, op in reversed(self._reversed):
            super()._send(rank, op)

    def _send(self, rank: int, op: Op) -> None:
        if rank == 1 and op.members:
            self._reversed.append((rank, op))
        else:
            super()._send(rank, op)


class LendsAnyRank(Scheduler):
    """Takes idleness for granted."""

    def _helpers(self, run: _Denoising) -> tuple[int, ...]:
        return run.helper_sets[0] if run.helper_sets else ()


class HelperIsNotTold(FakeRanks):
    def _send(self, rank: int, op: Op) -> None:
        if op.kind != "step" or rank in self.topology.dit_ranks:
            super()._send(rank, op)


class MemberIsNotTold(FakeRanks):
    """One member of a team hears nothing of the decode."""

    def _send(self, rank: int, op: Op) -> None:
        if op.kind != "decode" or len(op.members) < 2 or rank != op.members[-1]:
            super()._send(rank, op)


class DecodeOvertakesAssists(FakeRanks):
    """One member of a team begins a decode before the steps that it was lent to earlier."""

    def _queue(self, state: Rank, op: Op) -> None:
        if op.kind == "decode" and state is self.ranks[max(self.ranks)]:
            waiting = list(state.todo)
            state.todo = deque([receive for receive in waiting if receive.kind == "receive"])
            state.todo.append(op)
            state.todo.extend(other for other in waiting if other.kind != "receive")
        else:
            super()._queue(state, op)


class FollowerDecidesItself(FakeRanks):
    """The second DiT rank looks at the VAE ranks on its own, and sometimes sees another state than the leader did."""

    def _send(self, rank: int, op: Op) -> None:
        if rank == 1 and op.kind == "step" and op.step % 2:
            op = replace(op, members=self.topology.dit_ranks)
        super()._send(rank, op)


class DecodesAnyTime(Colocated):
    def may_decode(self, state: Scheduler) -> bool:
        return True


class DecodesNever(Decoupled):
    def may_decode(self, state: Scheduler) -> bool:
        return False


class WaitsForWholeWaves(Colocated):
    """Never decodes a wave that cannot fill up: the last clips of an odd number, or what a full queue holds back."""

    def may_decode(self, state: Scheduler) -> bool:
        return not state.denoising and state.queue.waiting >= len(state.topology.decode_ranks)


BOTH = ("colocated", "decoupled")


@pytest.mark.parametrize(
    ("promise", "policies", "twin"),
    [
        ("a team gets a clip while it has one", BOTH, {"scheduler": CreditAtReceipt}),
        ("a team gets a clip while it has one", BOTH, {"scheduler": CreditOfTheFirstMember}),
        ("a rank that decodes is lent", ("decoupled",), {"scheduler": LendsWhoHasEnded}),
        ("a clip goes to ranks that are no team", BOTH, {"scheduler": SkipsOneMember}),
        ("latents released before acknowledgement", BOTH, {"scheduler": ReleasesAtTheFirstReceipt}),
        ("deadlock, ranks wait for ever", BOTH, {"driver": MemberIsNotTold}),
        ("deadlock, ranks wait for ever", ("decoupled",), {"driver": DecodeOvertakesAssists}),
        ("latents released before acknowledgement", BOTH, {"scheduler": ReleasesAtOnce}),
        ("latents stay on a rank", BOTH, {"scheduler": NeverReleases}),
        ("queue above its capacity", ("decoupled",), {"scheduler": DropsWhenFull}),  # by what the queue forgot
        ("deadlock, ranks wait for ever", BOTH, {"driver": Shuffled}),
        ("a group command misses members", BOTH, {"scheduler": ForgetsOneMember}),
        ("not first in, first out", ("decoupled",), {"scheduler": NewestFirst}),
        ("queue above its capacity", ("decoupled",), {"scheduler": UnboundedPut, "queue": Unbounded}),
        ("queue above its capacity in bytes", ("decoupled",), {"scheduler": UnboundedPut, "queue": Unbounded}),
        ("too many steps queued", BOTH, {"steps_ahead": 2}),
        ("a rank that decodes is lent", ("decoupled",), {"scheduler": LendsAnyRank}),
        ("deadlock, ranks wait for ever", ("decoupled",), {"driver": HelperIsNotTold}),
        ("deadlock, ranks wait for ever", ("decoupled",), {"driver": FollowerDecidesItself}),
        ("a decode during a denoise", ("colocated",), {"rule": DecodesAnyTime()}),
        ("never finished", ("decoupled",), {"rule": DecodesNever()}),
        ("never finished", ("colocated",), {"rule": WaitsForWholeWaves()}),
    ],
)
def test_a_schedule_that_breaks_a_promise_is_caught(
    promise: str, policies: tuple[str, ...], twin: dict[str, object]
) -> None:
    assert any(said.startswith(promise) for said in caught(policies, **twin))
