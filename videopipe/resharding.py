"""Between frames and space: activations [B, T, S, C] of factorised attention, sharded along one axis or the other.

Spatial attention looks within a frame, temporal attention along a place: each is local if its own axis is whole. The
one exchange turns the sharding, with frames in the place of tokens and places in the place of heads.

Source: dynamic sequence parallelism, DSP (arXiv 2403.10266), here for any counts.
"""

import torch.distributed as dist
from torch import Tensor

from videopipe.exchange import Exchange, PendingExchange
from videopipe.partition import Partition


class Resharding:
    """Turns activations of one group between the frame view and the space view; a round trip is bit-exact.

    to_space : [B, T_local, S, C] -> [B, T, S_local, C]   give away places, collect all frames
    to_frames: [B, T, S_local, C] -> [B, T_local, S, C]   the inverse

    Args:
        frame_counts, place_counts: T and S of each member; may differ, may be zero. Every member knows all of them.
        group: None for one member.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        frame_counts: tuple[int, ...],
        place_counts: tuple[int, ...],
        member: int,
    ) -> None:
        self.partition = Partition(frame_counts, place_counts)
        self._exchange = Exchange(group, self.partition, member)

    def to_space(self, x: Tensor) -> Tensor:
        """[B, T_local, S, C] -> [B, T, S_local, C], blocking."""
        return self.start_to_space(x).wait()

    def to_frames(self, x: Tensor) -> Tensor:
        """[B, T, S_local, C] -> [B, T_local, S, C], blocking."""
        return self.start_to_frames(x).wait()

    def start_to_space(self, x: Tensor) -> PendingExchange:
        """Begin `to_space`; the transfer goes on while the caller computes."""
        return self._exchange.start_to_heads(x)

    def start_to_frames(self, x: Tensor) -> PendingExchange:
        """Begin `to_frames`; the transfer goes on while the caller computes."""
        return self._exchange.start_to_tokens(x)

    def to_space_bytes(self, member: int, batch: int, channels: int, itemsize: int) -> int:
        """Bytes that `member` sends to others in `to_space`."""
        return self.partition.to_heads_bytes(member, batch, channels, itemsize)

    def to_frames_bytes(self, member: int, batch: int, channels: int, itemsize: int) -> int:
        """Bytes that `member` sends to others in `to_frames`."""
        return self.partition.to_tokens_bytes(member, batch, channels, itemsize)
