"""Out of memory in the middle of a decode: a team finds out together, and tries once more with a smaller setting."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vae_group.team import Part, PartDecoder, Team

log = logging.getLogger(__name__)
T = TypeVar("T")


class TeamOutOfMemoryError(RuntimeError):
    """Some member of the team ran out of memory, and all members know."""


class RestartableDecoder(Protocol):
    """A `PartDecoder` that can begin later in the clip: parts that end by `first_frame` may be left out."""

    def __call__(self, latents: Tensor, team: Team, first_frame: int = 0) -> Iterator[Part]:
        """Latents [1, C, T', H', W'] -> this member's parts, in the order of time."""


def together(team: Team, device: torch.device, work: Callable[[], T]) -> T:
    """Do one step's work that needs no other member; if any member has no memory for it, all of them raise.

    Without this agreement the others would wait in the next collective for a member that never comes. `work` should
    allocate whatever that collective needs.

    Raises:
        TeamOutOfMemoryError: on every member.
    """
    done = _attempt(work)
    if not done and device.type == "cuda":
        torch.cuda.empty_cache()
    count = torch.tensor([1 - len(done)], device=device)
    if team.group is not None:
        dist.all_reduce(count, group=team.group)
    if int(count):
        raise TeamOutOfMemoryError(f"{int(count)} of {team.members} ranks ran out of memory while decoding")
    return done[0]


def _attempt(work: Callable[[], T]) -> list[T]:
    """The result as a list of one; empty where there was no memory."""
    try:
        return [work()]
    except torch.OutOfMemoryError:  # its traceback, which holds tensors, is gone once this function returns
        return []


def with_retry(first: RestartableDecoder, second: RestartableDecoder, what: str) -> RestartableDecoder:
    """A decoder that goes on with `second` when `first` runs out of memory.

    Parts that were given cannot be taken back, so `second` begins with the first frame that is missing; what it gives
    of earlier frames is cut off. Every member of a team gets to the same frame, since they fail in the same step.

    Args:
        what: the change in words, for the log, such as "tiles of 192x192 px instead of 256x256".
    Raises:
        TeamOutOfMemoryError: neither has enough memory.
    """

    def decode(latents: Tensor, team: Team, first_frame: int = 0) -> Iterator[Part]:
        frame = first_frame
        try:
            for part in _from(first(latents, team, frame), frame):
                yield part
                frame = part.first_frame + part.video.shape[2]
            return
        except TeamOutOfMemoryError as error:
            log.warning("%s: from frame %d on, %s", error, frame, what)
        yield from _from(second(latents, team, frame), frame)

    return decode


def from_the_start(decoder: PartDecoder) -> RestartableDecoder:
    """A decoder that knows no other beginning, whose lack of memory is found on a team of one only.

    Where a decoder of several members exchanges rows in every layer, they cannot agree in the middle of one.
    """

    def decode(latents: Tensor, team: Team, first_frame: int = 0) -> Iterator[Part]:
        parts = decoder(latents, team)
        if team.members > 1:
            yield from parts
            return
        while (part := together(team, latents.device, lambda: next(parts, None))) is not None:
            yield part
            del part

    return decode


def _from(parts: Iterator[Part], frame: int) -> Iterator[Part]:
    for part in parts:
        missing = frame - part.first_frame
        if missing <= 0:
            yield part
        elif missing < part.video.shape[2]:
            yield replace(part, video=part.video[:, :, missing:], first_frame=frame)
