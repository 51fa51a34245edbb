"""Schedules as policies of the scheduler: when a request may enter the DiT group, when a latent may be decoded."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from videopipe.scheduler import Scheduler


class Policy(Protocol):
    """Two questions that the scheduler asks at every boundary. Answers depend on its state alone."""

    def may_begin(self, state: "Scheduler") -> bool:
        """Whether the DiT group may take the next request now."""

    def may_decode(self, state: "Scheduler") -> bool:
        """Whether an idle team may take a waiting latent now."""


class Decoupled:
    """DeDiVAE: the two groups work independently, decode k overlaps denoise k + 1 (PipeDiT, arXiv 2511.12056)."""

    def may_begin(self, state: "Scheduler") -> bool:
        """Always: only a full queue holds the DiT group back, and the scheduler sees to that itself."""
        return True

    def may_decode(self, state: "Scheduler") -> bool:
        """Always."""
        return True


class Colocated:
    """The same ranks denoise together, then decode: in waves of as many clips as can be decoded side by side."""

    def may_begin(self, state: "Scheduler") -> bool:
        """While nothing decodes and the wave has room."""
        return state.decoding == 0 and state.queue.waiting + state.denoising < _wave(state)

    def may_decode(self, state: "Scheduler") -> bool:
        """When nothing denoises and the wave is full, cannot grow, or is being decoded already."""
        if state.denoising:
            return False
        full = state.queue.waiting >= _wave(state) or state.put_blocked
        return full or state.to_denoise == 0 or state.decoding > 0


def _wave(state: "Scheduler") -> int:
    return min(len(state.topology.decode_teams), state.queue.capacity)


POLICIES: dict[str, Policy] = {"colocated": Colocated(), "decoupled": Decoupled()}
