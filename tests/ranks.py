"""Runs a function on several real ranks over gloo: forked from a server that has imported everything and run nothing.

A forkserver starts a rank in tens of milliseconds, and is safe where a fork of the test process (which has run OpenMP
code) hangs. A failing rank fails the test with that rank's own traceback; a rank that hangs ends it with every rank's
stack.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from videopipe.runtime import Runtime, end_runtime, start_runtime

PRELOAD = (
    "pytest",
    "hypothesis",
    "numpy",
    "torch",
    "torch.distributed",
    "diffusers",
    "diffusers.models.transformers.transformer_hunyuan_video",
    "pipelines.hunyuan_video_parts",
    "tests.ranks",
)
GRACE_S = 3.0

RankFunction = Callable[..., Any]
"""`fn(runtime, *args)`: a function of a module, since it is found by name in the rank."""


class RanksError(AssertionError):
    """A rank raised, died or hung; the message has the traceback or the stacks."""


def run_ranks(
    fn: RankFunction,
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    dit_ranks: tuple[int, ...] | None = None,
    decode_teams: tuple[tuple[int, ...], ...] = (),
) -> list[Any]:
    """Call `fn(runtime, *args)` on `world_size` ranks of one thread each.

    Args:
        timeout: seconds until all ranks count as hanging.
        dit_ranks: members of `runtime.exchange_group`; None for all ranks.
        decode_teams: the ranks that decode a clip together, joined by `runtime.decode_group`.
    Returns:
        What each rank returned (plain values and NumPy arrays), in rank order.
    Raises:
        RanksError: a rank raised, ended by itself or was still running after `timeout`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    dit = tuple(range(world_size)) if dit_ranks is None else dit_ranks
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_be_rank,
                    args=(rank, world_size, dit, decode_teams, directory, theirs, fn, args),
                    daemon=True,
                )
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            return _collect(processes, pipes, Path(directory), timeout)
        finally:
            for started in processes:
                if started.is_alive():
                    started.kill()
                started.join()
            for pipe in pipes:
                pipe.close()


def _collect(processes: list[BaseProcess], pipes: list[Connection], directory: Path, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}  # in the order in which they came
    deadline = time.monotonic() + timeout
    while len(results) + len(failures) < len(pipes):
        left = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results and rank not in failures}
        ready = wait(list(left), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = left[pipe]
            try:
                ok, value = pipe.recv()
            except EOFError:
                processes[rank].join()
                ok, value = False, f"ended without an answer, exit code {processes[rank].exitcode}"
            if ok:
                results[rank] = value
            else:
                if not failures:  # the others may wait for this rank in a collective: give them little time
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                failures[rank] = value
    if failures:
        raise RanksError("\n".join(f"rank {rank}: {text}" for rank, text in failures.items()))
    if len(results) < len(pipes):
        raise RanksError(_stacks(processes, directory, {r for r in range(len(pipes)) if r not in results}, timeout))
    return [results[rank] for rank in range(len(pipes))]


def _stacks(processes: list[BaseProcess], directory: Path, hanging: set[int], timeout: float) -> str:
    for rank in hanging:
        pid = processes[rank].pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
    time.sleep(0.3)  # the stacks are written by signal handlers
    lines = [f"ranks {sorted(hanging)} of {len(processes)} still ran after {timeout:g} s"]
    for rank in sorted(hanging):
        file = directory / f"stack-{rank}"
        lines += [f"rank {rank}:", file.read_text() if file.exists() else "not started"]
    return "\n".join(lines)


def _be_rank(
    rank: int,
    world_size: int,
    dit_ranks: tuple[int, ...],
    decode_teams: tuple[tuple[int, ...], ...],
    directory: str,
    answer: Connection,
    fn: RankFunction,
    args: tuple[Any, ...],
) -> None:
    with Path(directory, f"stack-{rank}").open("w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
        torch.set_num_threads(1)
        try:
            answer.send((True, fn(_join(rank, world_size, dit_ranks, decode_teams, directory), *args)))
        except BaseException:
            answer.send((False, traceback.format_exc()))
        answer.close()
        os._exit(0)  # waiting for the threads of a broken group would hang


def _join(
    rank: int,
    world_size: int,
    dit_ranks: tuple[int, ...],
    decode_teams: tuple[tuple[int, ...], ...],
    directory: str,
) -> Runtime:
    store = None if world_size == 1 else dist.FileStore(str(Path(directory, "store")), world_size)
    return start_runtime(
        rank=rank,
        world_size=world_size,
        dit_ranks=dit_ranks,
        device=torch.device("cpu"),
        store=store,
        timeout_s=120.0,
        decode_teams=decode_teams,
    )


def leave(runtime: Runtime) -> None:
    """End the process groups once every rank is done with them."""
    if runtime.world_size > 1:
        dist.barrier(group=runtime.peers)
    end_runtime(runtime)
