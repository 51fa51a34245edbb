"""A clip's activations in slabs along time, held in memory or computed anew whenever they are asked for.

A network of causal layers can run slab by slab, since each layer needs only the frames before. What cannot is a norm
over the whole clip: it needs a pass over everything that comes before it. Between two such passes activations are
either held (`Held`) or recomputed (`Lazy`): bytes against operations, chosen for each of them.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

Step = Callable[[Tensor], Tensor]
"""A layer on its way through a clip: takes the slabs [B, C, t, h, W] in order, keeps the past that it needs."""


class Clip(Protocol):
    """Activations of one clip, this member's rows."""

    def slabs(self) -> Iterator[Tensor]:
        """All slabs [B, C, t, h, W] in order; may be called again."""

    def drain(self) -> Iterator[Tensor]:
        """All slabs for the last time: held ones are freed behind the iterator."""


class Held:
    """Slabs in memory."""

    def __init__(self, slabs: Iterable[Tensor]) -> None:
        self._slabs = deque(slabs)

    def slabs(self) -> Iterator[Tensor]:
        """All slabs in order."""
        return iter(self._slabs)

    def drain(self) -> Iterator[Tensor]:
        """All slabs in order, each let go when it is handed out."""
        while self._slabs:
            yield self._slabs.popleft()

    @property
    def frames(self) -> int:
        """Frames of all slabs."""
        return sum(slab.shape[2] for slab in self._slabs)


class Lazy:
    """What a layer makes of another clip, computed at every iteration. `start` begins the layer at the first frame."""

    def __init__(self, source: Clip, start: Callable[[], Step]) -> None:
        self._source = source
        self._start = start

    def slabs(self) -> Iterator[Tensor]:
        """All slabs in order."""
        return map(self._start(), self._source.slabs())

    def drain(self) -> Iterator[Tensor]:
        """All slabs in order; the source is drained."""
        return map(self._start(), self._source.drain())


class Resized:
    """The same clip in slabs of at most `frames` frames, for a layer that needs more or less room for each frame."""

    def __init__(self, source: Clip, frames: int) -> None:
        self._source = source
        self._frames = frames

    def slabs(self) -> Iterator[Tensor]:
        """All slabs in order."""
        return resized(self._source.slabs(), self._frames)

    def drain(self) -> Iterator[Tensor]:
        """All slabs in order; the source is drained."""
        return resized(self._source.drain(), self._frames)


def resized(slabs: Iterable[Tensor], frames: int) -> Iterator[Tensor]:
    """Slabs cut and joined to at most `frames` frames each."""
    waiting: list[Tensor] = []
    for slab in slabs:
        for piece in slab.split(frames, dim=2):
            if waiting and sum(x.shape[2] for x in waiting) + piece.shape[2] > frames:
                yield _joined(waiting)
            waiting.append(piece)
        del slab, piece
    if waiting:
        yield _joined(waiting)


def _joined(waiting: list[Tensor]) -> Tensor:
    """One slab of all that wait, who then wait no more."""
    whole = waiting[0] if len(waiting) == 1 else torch.cat(waiting, dim=2)
    waiting.clear()
    return whole
