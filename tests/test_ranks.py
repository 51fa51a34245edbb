"""The helper of the multi-rank tests: values come back in order, a failure or a hang says where."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RanksError, run_ranks
from videopipe.runtime import Runtime


def add_up(runtime: Runtime, start: int) -> tuple[int, int, int]:
    total = torch.tensor(start + runtime.rank)
    dist.all_reduce(total, group=runtime.exchange_group)
    return runtime.rank, int(total), torch.get_num_threads()


def one_raises(runtime: Runtime) -> None:
    if runtime.rank == 1:
        raise ValueError("only rank 1 is wrong")
    dist.barrier(group=runtime.peers)


def one_hangs(runtime: Runtime) -> None:
    if runtime.rank == 0:
        sleep_in_a_named_place()
    dist.barrier(group=runtime.peers)


def sleep_in_a_named_place() -> None:
    time.sleep(60)


def one_dies(runtime: Runtime) -> None:
    if runtime.rank == 0:
        os._exit(7)
    dist.barrier(group=runtime.peers)


def test_values_come_back_in_rank_order_and_each_rank_has_one_thread() -> None:
    assert run_ranks(add_up, 3, 10) == [(0, 33, 1), (1, 33, 1), (2, 33, 1)]


def test_a_failing_rank_fails_the_test_with_its_own_traceback() -> None:
    with pytest.raises(RanksError, match=r"(?s)rank 1: .*in one_raises.*only rank 1 is wrong"):
        run_ranks(one_raises, 2)


def test_a_hang_ends_with_the_stack_of_every_rank() -> None:
    with pytest.raises(RanksError, match=r"(?s)rank 0:.*sleep_in_a_named_place.*rank 1:.*one_hangs"):
        run_ranks(one_hangs, 2, timeout=1.0)


def test_a_rank_that_dies_is_named_with_its_exit_code() -> None:
    with pytest.raises(RanksError, match="rank 0: ended without an answer, exit code 7"):
        run_ranks(one_dies, 2)
