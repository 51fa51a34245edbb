"""The groups of a run: all are connected when a rank has joined, in one order on all ranks."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import FileStore

from tests.ranks import leave, run_ranks
from videopipe.runtime import Runtime, start_runtime
from videopipe.scheduler import helper_sets

DIT_RANKS, VAE_RANKS = (0, 1, 2, 3), (4, 5)
OTHERS = ("all_reduce", "all_to_all_single")


def start_watched(runtime: Runtime, folder: str, lazy: bool) -> tuple[list[list[int]], dict[str, list[list[int]]]]:
    """Join a run with every kind of group anew: the groups that were made, and those in which something travelled."""
    leave(runtime)
    made: list[list[int]] = []
    used: dict[str, list[list[int]]] = {name: [] for name in OTHERS}
    new_group = dist.new_group

    def making(ranks: list[int], **more: Any) -> Any:
        made.append(list(ranks))
        return new_group(ranks, **more)

    def using(name: str) -> Any:
        plain = getattr(dist, name)

        def noted(*args: Any, group: dist.ProcessGroup, **more: Any) -> Any:
            used[name].append(dist.get_process_group_ranks(group))
            return plain(*args, group=group, **more)

        return noted

    with pytest.MonkeyPatch.context() as patch:  # a test may look where the code may not
        patch.setattr(dist, "new_group", making)
        for name in OTHERS:
            patch.setattr(dist, name, using(name))
        joined = start_runtime(
            rank=runtime.rank,
            world_size=runtime.world_size,
            dit_ranks=DIT_RANKS,
            device=torch.device("cpu"),
            store=FileStore(os.path.join(folder, "again"), runtime.world_size),
            helper_sets=helper_sets(VAE_RANKS),
            timeout_s=60,
            halved=True,
            decode_teams=(VAE_RANKS,),
        )
        if lazy:  # the twin: connected when something is first sent
            dist.new_group([0, 1])
    leave(joined)
    return made, used


@pytest.mark.parametrize("lazy", [False, True])
def test_every_group_is_connected_at_start_in_one_order(tmp_path: Path, lazy: bool) -> None:
    found = run_ranks(start_watched, 6, str(tmp_path), lazy)
    made = found[0][0]
    assert all(groups == made for groups, _ in found)
    peers, *groups = made
    assert peers == list(range(6))  # gloo, which connects when it is made
    halves = [[0, 1], *([0, 1, *helpers] for helpers in ((4,), (5,), (4, 5)))]
    halves += [[2, 3], *([2, 3, *helpers] for helpers in ((4,), (5,), (4, 5)))]
    expected = [[0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5], *halves, [0, 2], [1, 3], [4, 5]]
    assert groups == [*expected, *([[0, 1]] if lazy else [])]
    for rank, (_, used) in enumerate(found):
        mine = [group for group in groups if rank in group]
        for name in OTHERS:
            assert (used[name] == mine) != (lazy and rank < 2), (name, rank, used[name])
