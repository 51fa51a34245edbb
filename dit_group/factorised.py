"""Models with factorised attention: frames are sharded, and around each temporal layer space is sharded instead."""

from dataclasses import dataclass

import torch.distributed as dist

from videopipe.partition import JointSequence, split_evenly
from videopipe.resharding import Resharding


@dataclass(frozen=True)
class FrameLayout:
    """How the frames and places of one clip lie over the members."""

    sequence: JointSequence
    resharding: Resharding


class FrameParallel:
    """One member's place in the DiT group; the hooks of a plan hold it (`Shard`, `Reshard`, `Place`).

    For `Shard` and `Place` the stream `video` is that of frames. `lay_out` prepares a size once, `use` makes it the
    current one at no cost.
    """

    def __init__(self, *, group: dist.ProcessGroup | None, member: int, members: int) -> None:
        self.group = group
        self.member = member
        self.members = members
        self._current: FrameLayout | None = None

    def lay_out(self, num_frames: int, num_places: int) -> FrameLayout:
        """Split T frames, and for temporal layers S places, as evenly as whole ones allow."""
        frames = split_evenly(num_frames, self.members)
        # larger shares of places to those with fewer frames
        places = split_evenly(num_places, self.members)[::-1]
        return FrameLayout(
            JointSequence(frames, (0,) * self.members), Resharding(self.group, frames, places, self.member)
        )

    def use(self, layout: FrameLayout) -> None:
        """The model is about to be called with this size."""
        self._current = layout

    @property
    def sequence(self) -> JointSequence:
        """Who owns which frames."""
        assert self._current is not None, "no layout in use"
        return self._current.sequence

    @property
    def resharding(self) -> Resharding:
        """The exchange between frames and space."""
        assert self._current is not None, "no layout in use"
        return self._current.resharding
