"""The bounded queue between the DiT group and the VAE group: pure bookkeeping, no tensors, no threads.

It never drops. `put` is refused (the producer waits) when clips or bytes are at capacity; an item that was taken stays
on record until it is acknowledged, so that a decoder that dies costs a second decode and never a second denoise.
"""

from collections import deque

import msgspec


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """One hand-over attempt. A repeat of the same item gets a new sequence number; an old one is then stale."""

    item: str
    nbytes: int
    sequence: int


class BoundedQueue:
    """First in, first out; bounded in items and bytes; acknowledged.

    An item is waiting (counts against both capacities), then taken (in flight to a receiver), then acknowledged
    (the receiver holds it, the sender may forget it).
    """

    def __init__(self, capacity: int, capacity_bytes: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity} must be at least 1, nearest is 1")
        if capacity_bytes < 1:
            raise ValueError(f"capacity_bytes={capacity_bytes} must be at least 1, nearest is 1")
        self.capacity = capacity
        self.capacity_bytes = capacity_bytes
        self._waiting: deque[tuple[str, int]] = deque()
        self._taken: dict[int, Ticket] = {}
        self._sequence = 0

    @property
    def waiting(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the items that wait."""
        return sum(nbytes for _, nbytes in self._waiting)

    @property
    def unacknowledged(self) -> int:
        """Items taken and not yet acknowledged."""
        return len(self._taken)

    def has_room(self, nbytes: int) -> bool:
        """Whether `put` of an item of this size would be accepted now."""
        return len(self._waiting) < self.capacity and self.waiting_bytes + nbytes <= self.capacity_bytes

    def put(self, item: str, nbytes: int) -> None:
        """Append an item.

        Raises:
            ValueError: the item alone is larger than the queue will ever hold.
            RuntimeError: no room now; ask `has_room` first and wait.
        """
        if nbytes > self.capacity_bytes:
            raise ValueError(f"capacity_bytes={self.capacity_bytes} cannot hold {nbytes} bytes, nearest is {nbytes}")
        if not self.has_room(nbytes):
            raise RuntimeError(f"queue is full: {self.waiting} items, {self.waiting_bytes} bytes")
        self._waiting.append((item, nbytes))

    def take(self) -> Ticket:
        """Hand out the oldest item; it stays on record until `acknowledge`.

        Raises:
            IndexError: nothing waits.
        """
        item, nbytes = self._waiting.popleft()
        self._sequence += 1
        ticket = Ticket(item=item, nbytes=nbytes, sequence=self._sequence)
        self._taken[ticket.sequence] = ticket
        return ticket

    def acknowledge(self, sequence: int) -> Ticket | None:
        """The receiver holds the item. Repeats and stale sequence numbers do nothing and return None."""
        return self._taken.pop(sequence, None)

    def give_back(self, sequence: int) -> Ticket | None:
        """The hand-over failed: the item waits again, before all others. None for an unknown or stale sequence.

        The capacity may be exceeded by items that come back, since refusing them would lose them.
        """
        ticket = self._taken.pop(sequence, None)
        if ticket is not None:
            self._waiting.appendleft((ticket.item, ticket.nbytes))
        return ticket

    def discard(self, item: str) -> bool:
        """Forget a waiting item (a cancelled request). False where it does not wait."""
        for entry in self._waiting:
            if entry[0] == item:
                self._waiting.remove(entry)
                return True
        return False
