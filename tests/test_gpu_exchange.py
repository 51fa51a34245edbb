"""On a CUDA device: exchanges on their own stream give what one process gives, and no layer waits for the device.

A single device is enough for most of it: a group of one rank sends to itself through NCCL, on NCCL's stream, and two
ranks may share a device over gloo. The first test runs the same checks on the CPU, so that they themselves are tested.
"""

import datetime

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dit_group.kernels import sdpa
from dit_group.ulysses import Ulysses
from tests.ranks import leave, run_ranks
from videopipe.exchange import Buffers
from videopipe.partition import split_evenly
from videopipe.runtime import Runtime

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TOKENS, HEADS, HEAD_DIM = 130, 5, 32


class Poisoned(Buffers):
    """What is given back turns to NaN, in the order of the current stream."""

    def give_back(self, flat: Tensor) -> None:
        flat.fill_(torch.nan)
        super().give_back(flat)


def join(runtime: Runtime, device: str, backend: str) -> tuple[torch.device, dist.ProcessGroup]:
    """A group of all ranks; each on a device of its own with NCCL, all on one with gloo."""
    place = torch.device(device, runtime.rank) if backend == "nccl" else torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if runtime.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    group = dist.new_group(backend=backend, timeout=datetime.timedelta(seconds=60))
    assert isinstance(group, dist.ProcessGroup)
    return place, group


def make(runtime: Runtime, group: dist.ProcessGroup, chunk: int | None, early: int | None, balance: str) -> Ulysses:
    return Ulysses(
        group=group,
        member=runtime.rank,
        token_counts=split_evenly(TOKENS, runtime.world_size),
        num_heads=HEADS,
        kernel=sdpa,
        key_mask=None,
        heads_per_chunk=chunk,
        balance=balance,  # type: ignore[arg-type]
        early_chunks=early,
        buffers=Poisoned(),
    )


def check_layers(runtime: Runtime, device: str, backend: str) -> int:
    """Layers one after the other without a pause: memory is used again while earlier transfers may still run."""
    place, group = join(runtime, device, backend)
    counts = split_evenly(TOKENS, runtime.world_size)
    own, checked = slice(sum(counts[: runtime.rank]), sum(counts[: runtime.rank + 1])), 0
    for chunk, early, balance in ((None, None, "heads"), (1, 1, "heads"), (2, None, "rows"), (1, 9, "rows")):
        ulysses = make(runtime, group, chunk, early, balance)
        generator = torch.Generator().manual_seed(0)
        shape = (3, 1, TOKENS, HEADS, HEAD_DIM)
        layers = [torch.randn(shape, generator=generator).to(place).unbind() for _ in range(6)]
        found = [ulysses(q[:, own], k[:, own], v[:, own]) for q, k, v in layers]
        for (q, k, v), ours in zip(layers, found, strict=True):
            assert float((ours - sdpa(q, k, v, None)[:, own]).abs().max()) < 1e-4, (chunk, early, balance)
            checked += 1
    if runtime.world_size > 1:
        leave(runtime)
    return checked


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_checks_themselves_pass_on_the_cpu(world_size: int) -> None:
    assert set(run_ranks(check_layers, world_size, "cpu", "gloo")) == {24}


@pytest.mark.parametrize(("world_size", "backend"), [(1, "nccl"), (2, "gloo"), (2, "nccl")])
@pytest.mark.gpu
@needs_cuda
def test_layers_on_a_device_equal_one_process(world_size: int, backend: str) -> None:
    if backend == "nccl" and torch.cuda.device_count() < world_size:
        pytest.skip(f"NCCL needs a device for each of {world_size} ranks")
    assert set(run_ranks(check_layers, world_size, "cuda", backend, timeout=120)) == {24}


def check_host_runs_ahead(runtime: Runtime, waits: bool) -> bool:
    """Whether the host is through with a layer while the device has not even begun it."""
    place, group = join(runtime, "cuda", "nccl")
    counts = split_evenly(TOKENS, runtime.world_size)
    ulysses = make(runtime, group, 1, 1, "rows")
    ulysses.buffers = Buffers()
    q, k, v = (torch.randn(1, counts[runtime.rank], HEADS, HEAD_DIM, device=place) for _ in range(3))
    busy = torch.randn(8192, 8192, device=place)
    for _ in range(3):  # builds communicators and kernels
        ulysses(q, k, v)
        busy @ busy
    torch.cuda.synchronize(place)
    torch.cuda.set_sync_debug_mode("error")  # does not see torch.distributed, hence the event
    for _ in range(20):  # far longer than the host needs to start a layer
        busy @ busy
    ulysses(q, k, v)
    done = torch.cuda.Event()
    done.record()
    if waits:  # the twin
        torch.cuda.set_sync_debug_mode("default")
        float(q.sum())
    ahead = not done.query()
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize(place)
    if runtime.world_size > 1:
        leave(runtime)
    return ahead


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.gpu
@needs_cuda
def test_no_layer_waits_for_the_device(world_size: int) -> None:
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"NCCL needs a device for each of {world_size} ranks")
    assert all(run_ranks(check_host_runs_ahead, world_size, False, timeout=120))
    assert not any(run_ranks(check_host_runs_ahead, world_size, True, timeout=120))
