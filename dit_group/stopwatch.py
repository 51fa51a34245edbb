"""Times what several ranks run together, so that each of them knows everybody's seconds."""

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from videopipe.runtime import synchronize

Run = Callable[[], object]


class Stopwatch:
    """Times runs of all members in turn: every member knows every member's seconds afterwards.

    Args:
        group: all members; None for one alone.
        members: how many they are.
    """

    def __init__(self, group: dist.ProcessGroup | None, members: int, device: torch.device) -> None:
        self._group = group
        self._members = members
        self._device = device

    def time(self, runs: Sequence[Sequence[Run | None]], rounds: int) -> Tensor:
        """Run everything `rounds` times, in turn and in alternating order, all members together.

        Args:
            runs: by way and kind of layer; None where this member takes no part.
        Returns:
            Seconds, float64 [members, rounds, ways, kinds]; 0 where a member took no part.
        """
        seconds = torch.zeros((rounds, len(runs), len(runs[0])), dtype=torch.float64)
        for turn in range(rounds):
            order = list(enumerate(runs))
            for way, kinds in reversed(order) if turn % 2 else order:
                for kind, run in enumerate(kinds):
                    self._meet()
                    if run is None:
                        continue
                    synchronize(self._device)
                    begin = time.perf_counter()
                    run()
                    synchronize(self._device)
                    seconds[turn, way, kind] = time.perf_counter() - begin
        return self._share(seconds)

    def agree(self, seconds: float) -> float:
        """The largest of all members' numbers."""
        return float(self._share(torch.tensor([seconds], dtype=torch.float64)).max())

    def follow(self, table: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """The pairs of whole numbers that the first member has."""
        size = int(self._share(torch.tensor([len(table)]))[0])
        mine = torch.tensor(list(table) or [(0, 0)] * size)
        return [(int(a), int(b)) for a, b in self._share(mine)[0]]

    def _meet(self) -> None:
        if self._group is not None:
            dist.all_reduce(torch.zeros(1), group=self._group)  # on the host, also beside NCCL

    def _share(self, x: Tensor) -> Tensor:
        """[members, ...] of what each member has."""
        if self._group is None:
            return x.unsqueeze(0)
        parts = [torch.empty_like(x) for _ in range(self._members)]
        dist.all_gather(parts, x, group=self._group)
        return torch.stack(parts)
