"""The bounded queue: never above capacity by a put, first in first out, nothing lost, nothing doubled."""

from collections import deque

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from videopipe.queue import BoundedQueue, Ticket

CAPACITY, CAPACITY_BYTES = 3, 100


class QueueMachine(RuleBasedStateMachine):
    """Drives a queue beside the simplest model of it: a list of what waits, and who holds the rest."""

    make: type[BoundedQueue] = BoundedQueue

    def __init__(self) -> None:
        super().__init__()
        self.queue = self.make(CAPACITY, CAPACITY_BYTES)
        self.waiting: deque[tuple[str, int]] = deque()
        self.taken: dict[int, Ticket] = {}
        self.old: list[int] = [0, 10_000]  # sequence numbers that mean nothing any more, or never did
        self.received: list[str] = []
        self.put_in: list[str] = []
        self.discarded: list[str] = []

    @rule(nbytes=st.integers(0, 60))
    def put(self, nbytes: int) -> None:
        item = f"clip-{len(self.put_in)}"
        room = len(self.waiting) < CAPACITY and sum(size for _, size in self.waiting) + nbytes <= CAPACITY_BYTES
        assert self.queue.has_room(nbytes) == room
        if room:
            self.queue.put(item, nbytes)
            self.waiting.append((item, nbytes))
            self.put_in.append(item)
            assert self.queue.waiting <= CAPACITY
            assert self.queue.waiting_bytes <= CAPACITY_BYTES
        else:
            with pytest.raises(RuntimeError, match="queue is full"):
                self.queue.put(item, nbytes)

    @rule()
    def put_what_can_never_fit(self) -> None:
        assert not self.queue.has_room(CAPACITY_BYTES + 1)
        with pytest.raises(ValueError, match="capacity_bytes=100 cannot hold 101 bytes, nearest is 101"):
            self.queue.put("giant", CAPACITY_BYTES + 1)

    @rule()
    def take(self) -> None:
        if not self.waiting:
            with pytest.raises(IndexError):
                self.queue.take()
            return
        ticket = self.queue.take()
        assert (ticket.item, ticket.nbytes) == self.waiting.popleft()
        assert ticket.sequence not in self.taken
        assert ticket.sequence not in self.old
        self.taken[ticket.sequence] = ticket

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.taken)))
        ticket = self.queue.acknowledge(sequence)
        assert ticket == self.taken.pop(sequence)
        self.received.append(ticket.item)
        self.old.append(sequence)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.taken)))
        ticket = self.queue.give_back(sequence)
        assert ticket == self.taken.pop(sequence)
        self.waiting.appendleft((ticket.item, ticket.nbytes))
        self.old.append(sequence)

    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """A message that comes twice, or after its hand-over failed, does nothing."""
        sequence = data.draw(st.sampled_from(self.old))
        assert self.queue.acknowledge(sequence) is None
        assert self.queue.give_back(sequence) is None

    @precondition(lambda self: self.put_in)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(self.put_in))
        entry = next((entry for entry in self.waiting if entry[0] == item), None)
        assert self.queue.discard(item) == (entry is not None)
        if entry is not None:
            self.waiting.remove(entry)
            self.discarded.append(item)

    @invariant()
    def counts_agree(self) -> None:
        assert self.queue.waiting == len(self.waiting)
        assert self.queue.waiting_bytes == sum(size for _, size in self.waiting)
        assert self.queue.unacknowledged == len(self.taken)

    def teardown(self) -> None:
        """Every item that was put is received or discarded, once."""
        for sequence in list(self.taken):
            assert self.queue.give_back(sequence) is not None
        while self.queue.waiting:
            ticket = self.queue.take()
            assert self.queue.acknowledge(ticket.sequence) == ticket
            self.received.append(ticket.item)
        assert sorted(self.received + self.discarded) == sorted(self.put_in)


class DropsWhenFull(BoundedQueue):
    def has_room(self, nbytes: int) -> bool:
        return nbytes <= self.capacity_bytes

    def put(self, item: str, nbytes: int) -> None:
        if super().has_room(nbytes):
            super().put(item, nbytes)


class DropsSilently(BoundedQueue):
    """Says that it is full, and takes the item all the same, in place of the oldest."""

    def put(self, item: str, nbytes: int) -> None:
        while self._waiting and not self.has_room(nbytes):
            self._waiting.popleft()
        super().put(item, nbytes)


class NeverFull(BoundedQueue):
    def has_room(self, nbytes: int) -> bool:
        return nbytes <= self.capacity_bytes


class LastInFirstOut(BoundedQueue):
    def take(self) -> Ticket:
        self._waiting.rotate(1)
        return super().take()


class CreditsEveryRepeat(BoundedQueue):
    """Takes a repeated acknowledgement for a new one."""

    def acknowledge(self, sequence: int) -> Ticket | None:
        return super().acknowledge(sequence) or Ticket(item="again", nbytes=0, sequence=sequence)


class LosesWhatComesBack(BoundedQueue):
    def give_back(self, sequence: int) -> Ticket | None:
        return self._taken.pop(sequence, None)


def run(queue: type[BoundedQueue], examples: int) -> None:
    machine = type("Machine", (QueueMachine,), {"make": queue})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
        ),
    )


def test_queue_keeps_its_promises() -> None:
    run(BoundedQueue, 150)


@pytest.mark.parametrize(
    "twin", [DropsWhenFull, DropsSilently, NeverFull, LastInFirstOut, CreditsEveryRepeat, LosesWhatComesBack]
)
def test_a_queue_that_breaks_a_promise_is_caught(twin: type[BoundedQueue]) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run(twin, 150)


@pytest.mark.parametrize(("capacity", "nbytes", "message"), [(0, 1, "capacity=0"), (1, 0, "capacity_bytes=0")])
def test_impossible_capacities_are_refused(capacity: int, nbytes: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} must be at least 1, nearest is 1"):
        BoundedQueue(capacity, nbytes)


def test_more_than_the_capacity_may_come_back_since_refusing_it_would_lose_it() -> None:
    queue = BoundedQueue(1, 10)
    queue.put("a", 10)
    ticket = queue.take()
    queue.put("b", 10)
    assert queue.give_back(ticket.sequence) == ticket
    assert (queue.waiting, queue.has_room(0)) == (2, False)
    again = queue.take()
    assert again.item == "a"
    assert again.sequence > ticket.sequence
    assert queue.acknowledge(ticket.sequence) is None  # the first attempt is stale
    assert queue.take().item == "b"
