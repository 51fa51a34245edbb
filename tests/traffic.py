"""What ranks send to each other while something runs: every collective, and the bytes of exchanges."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

OTHERS = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "gather",
    "irecv",
    "isend",
    "recv",
    "reduce_scatter_tensor",
    "scatter",
    "send",
)


@dataclass
class Traffic:
    """`exchanges` by the ranks of their group and the bytes that this rank sent to others; `calls` of anything else."""

    exchanges: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def sent(self, *ranks: int) -> int:
        """Bytes sent to others in exchanges of the group of these ranks; of all groups where none are given."""
        return sum(size for group, size in self.exchanges if not ranks or group == ranks)


@contextmanager
def watched() -> Iterator[Traffic]:
    """Within the block, note what this rank sends (a test may look where the code may not)."""
    traffic, exchange, me = Traffic(), dist.all_to_all_single, dist.get_rank()

    def noted(received: Tensor, x: Tensor, *args: Any, **more: Any) -> dist.Work | None:
        sizes, ranks = more["input_split_sizes"], tuple(dist.get_process_group_ranks(more["group"]))
        foreign = sum(size for rank, size in zip(ranks, sizes, strict=True) if rank != me)
        traffic.exchanges.append((ranks, foreign * x.element_size()))
        return exchange(received, x, *args, **more)

    def counting(name: str) -> Any:
        plain = getattr(dist, name)

        def counted(*args: Any, **more: Any) -> Any:
            traffic.calls.append(name)
            return plain(*args, **more)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", noted)
        for name in OTHERS:
            patch.setattr(dist, name, counting(name))
        yield traffic
