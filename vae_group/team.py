"""The ranks that decode one clip together, and the pieces of video that they give."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Team:
    """One rank's place among the ranks that decode a clip together; `group` is None where it is alone."""

    group: dist.ProcessGroup | None = None
    member: int = 0
    members: int = 1


@dataclass(frozen=True, kw_only=True)
class Part:
    """A finished piece of the video: `video` [1, 3, t, h, W] in -1..1, on the device of the VAE.

    It begins at frame `first_frame` and at pixel row `first_row` of the clip. `setting` says in words how it was
    decoded, where there was a choice.
    """

    video: Tensor
    first_frame: int = 0
    first_row: int = 0
    setting: str = ""


class PartDecoder(Protocol):
    """Decodes a clip with a team. Every member calls it with the same latents and exhausts the iterator.

    The parts of all members together cover the clip once. Members yield equally often and in step, and parts come in
    the order of time, so that frames can leave before the last ones are decoded; a part may have no rows.
    """

    def __call__(self, latents: Tensor, team: Team) -> Iterator[Part]:
        """Latents [1, C, T', H', W'], as the VAE takes them, on its device -> this member's parts."""
