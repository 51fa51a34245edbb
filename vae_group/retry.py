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


def all_ready(team: Team, device: torch.device, *, failed: bool = False) -> None:
    """To be called before each collective of a decode, when the memory for it is there, and with `failed` in place of
    it where there was none: a very small collective of its own.

    Without this agreement the others would wait in the collective for a member that never comes. It comes to `together`
    instead, whose own call meets this one.

    Raises:
        TeamOutOfMemoryError: on every member, if any of them has failed.
    """
    if team.group is None and not failed:
        return
    count = torch.tensor([int(failed)], device=device)
    if team.group is not None:
        dist.all_reduce(count, group=team.group)
    if int(count):
        raise TeamOutOfMemoryError(f"{int(count)} of {team.members} ranks ran out of memory while decoding")


def together(team: Team, device: torch.device, work: Callable[[], T]) -> T:
    """Do one step's work; if any member has no memory for it, all of them raise.

    `work` either needs no other member, or calls `all_ready` before each of its collectives. It should allocate
    whatever the collective after it needs.

    Raises:
        TeamOutOfMemoryError: on every member.
    """
    done = _attempt(work)
    if not done and device.type == "cuda":
        torch.cuda.empty_cache()
    all_ready(team, device, failed=not done)
    return done[0]


def _attempt(work: Callable[[], T]) -> list[T]:
    """The result as a list of one; empty where there was no memory."""
    try:
        return [work()]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return []  # the error's traceback, which holds tensors, is gone by then


def is_out_of_memory(error: Exception) -> bool:
    """Whether this process had no memory: on the device, in Python, in torch's allocator on the CPU, in a library."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


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
    """A decoder that knows no other beginning; its collectives are preceded by `all_ready`, where it has any."""

    def decode(latents: Tensor, team: Team, first_frame: int = 0) -> Iterator[Part]:
        parts = decoder(latents, team)
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
