"""What a rank is: number, device, groups. A value that is passed in, never a global."""

import datetime
import platform
import re
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class HalfGroups:
    """One half of the DiT group, as one rank sees it: its ranks, and the groups of the half that this rank is in.

    `group` is None outside of the half and where it has one rank; `assist_groups` join the half with each set of VAE
    ranks that may be lent to it.
    """

    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None = None
    assist_groups: Mapping[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BranchGroups:
    """The DiT group in two halves that evaluate one branch of guidance each (CFG parallelism).

    `pair` joins member i of the first half with member i of the second one; None outside of the DiT group.
    """

    halves: tuple[HalfGroups, HalfGroups]
    pair: dist.ProcessGroup | None = None


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One rank of a run.

    `exchange_group` joins the DiT ranks and carries activations on their devices (NCCL, or gloo on CPU); None with
    one DiT rank or on other ranks. `assist_groups` join the DiT ranks with each set of VAE ranks that may be lent to
    them (attention co-processing).
    `branches` are its two halves, where they evaluate the two branches of guidance side by side.
    `decode_team` are the ranks that decode a clip together with this one, joined by `decode_group`; empty on a rank
    that does not decode, and no group for one that decodes alone.
    `peers` joins all ranks and carries conditioning and latents in host memory over gloo: they are small, and a
    transfer that waits for its receiver never holds a GPU stream.
    """

    rank: int
    world_size: int
    device: torch.device
    dit_ranks: tuple[int, ...]
    exchange_group: dist.ProcessGroup | None = None
    peers: dist.ProcessGroup | None = None
    assist_groups: Mapping[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict)
    branches: BranchGroups | None = None
    decode_team: tuple[int, ...] = ()
    decode_group: dist.ProcessGroup | None = None

    @property
    def dit_member(self) -> int | None:
        """This rank's place in the DiT group, None outside of it."""
        return self.dit_ranks.index(self.rank) if self.rank in self.dit_ranks else None

    @property
    def is_leader(self) -> bool:
        """Whether this is the first DiT rank."""
        return self.rank == self.dit_ranks[0]


def start_runtime(
    *,
    rank: int,
    world_size: int,
    dit_ranks: tuple[int, ...],
    device: torch.device,
    store: Store | None,
    helper_sets: Sequence[tuple[int, ...]] = (),
    timeout_s: float = 1800.0,
    halved: bool = False,
    decode_teams: Sequence[tuple[int, ...]] = (),
) -> Runtime:
    """Join the process groups of a run. Collective over all ranks; with one rank there is nothing to join.

    Args:
        store: rendezvous of all ranks; None only where world_size is 1.
        helper_sets: sets of VAE ranks that may be lent to the DiT group.
        timeout_s: when a collective gives up by itself; the engine's own fault detection is much faster.
        halved: the DiT ranks shall also have groups for the two halves that CFG parallelism needs; their number is
            even.
        decode_teams: the ranks that decode a clip together, team by team.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    team = next((team for team in decode_teams if rank in team), ())
    if world_size == 1:
        return Runtime(rank=rank, world_size=1, device=device, dit_ranks=dit_ranks, decode_team=team)
    assert store is not None
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group(_backend(device), store=store, rank=rank, world_size=world_size, timeout=timeout)
    peers = dist.new_group(list(range(world_size)), timeout=timeout, backend="gloo")

    def join(ranks: Sequence[int]) -> dist.ProcessGroup | None:
        return _join(ranks, rank=rank, device=device, timeout_s=timeout_s)

    exchange_group = join(dit_ranks) if len(dit_ranks) > 1 else None
    assist = {helpers: join((*dit_ranks, *helpers)) for helpers in helper_sets}
    branches = None
    if halved:
        branches = start_branches(
            rank=rank, dit_ranks=dit_ranks, device=device, helper_sets=helper_sets, timeout_s=timeout_s
        )
    joined = [join(team) for team in decode_teams if len(team) > 1]
    return Runtime(
        rank=rank,
        world_size=world_size,
        device=device,
        dit_ranks=dit_ranks,
        exchange_group=exchange_group,
        peers=peers,
        assist_groups={helpers: group for helpers, group in assist.items() if group is not None},
        branches=branches,
        decode_team=team,
        decode_group=next((group for group in joined if group is not None), None),
    )


def start_branches(
    *,
    rank: int,
    dit_ranks: tuple[int, ...],
    device: torch.device,
    helper_sets: Sequence[tuple[int, ...]] = (),
    timeout_s: float = 1800.0,
) -> BranchGroups:
    """Join the groups of the two halves of the DiT ranks. Collective over all ranks, those outside included.

    Args:
        dit_ranks: an even number of them; member i of the first half is paired with member i of the second one.
        helper_sets: sets of VAE ranks that may be lent to both halves.
    """
    assert len(dit_ranks) % 2 == 0, dit_ranks
    half = len(dit_ranks) // 2

    def join(ranks: Sequence[int]) -> dist.ProcessGroup | None:
        return _join(ranks, rank=rank, device=device, timeout_s=timeout_s)

    halves = []
    for ranks in (dit_ranks[:half], dit_ranks[half:]):
        group = join(ranks) if half > 1 else None
        assist = {helpers: join((*ranks, *helpers)) for helpers in helper_sets}
        own = {helpers: joined for helpers, joined in assist.items() if joined is not None}
        halves.append(HalfGroups(ranks=ranks, group=group, assist_groups=own))
    pairs = [join((dit_ranks[i], dit_ranks[half + i])) for i in range(half)]
    return BranchGroups(halves=(halves[0], halves[1]), pair=next((pair for pair in pairs if pair is not None), None))


def _join(ranks: Sequence[int], *, rank: int, device: torch.device, timeout_s: float) -> dist.ProcessGroup | None:
    """Join a group of these ranks; every rank makes every group, in the same order. None on ranks outside of it.

    Its connections are built now, those for reductions and those between any two ranks: NCCL builds either when it
    first needs them, and inside a step that could wait for ever for a rank that is in another group's collective.
    """
    group = dist.new_group(list(ranks), timeout=datetime.timedelta(seconds=timeout_s), backend=_backend(device))
    if rank not in ranks:
        return None
    x = torch.zeros(len(ranks), device=device)
    dist.all_reduce(x, group=group)
    dist.all_to_all_single(torch.empty_like(x), x, group=group)
    synchronize(device)
    return group


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def end_runtime(runtime: Runtime) -> None:
    """Leave the process groups."""
    if runtime.world_size > 1 and dist.is_initialized():
        dist.destroy_process_group()


class PeerLink:
    """Transfers of host tensors between two ranks that neither blocks until it must.

    A transfer has a number that both sides know, so order does not matter. What is being sent is kept alive until
    `forget`.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._outgoing: dict[int, list[tuple[dist.Work | None, Tensor]]] = {}
        self._local: dict[int, Tensor] = {}

    def send(self, tensor: Tensor, to: int, transfer: int) -> None:
        """Begin to send a contiguous host tensor; returns at once."""
        assert tensor.device.type == "cpu" and tensor.is_contiguous(), (tensor.device, tensor.stride())
        if to == self._runtime.rank:
            self._local[transfer] = tensor
            return
        work = dist.isend(tensor, dst=to, group=self._runtime.peers, tag=transfer)
        self._outgoing.setdefault(transfer, []).append((work, tensor))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, transfer: int) -> Tensor:
        """Wait for a tensor of known shape and dtype."""
        if source == self._runtime.rank:
            tensor = self._local.pop(transfer)
            assert tuple(tensor.shape) == shape and tensor.dtype == dtype, (tensor.shape, shape)
            return tensor
        tensor = torch.empty(shape, dtype=dtype)
        dist.recv(tensor, src=source, group=self._runtime.peers, tag=transfer)
        return tensor

    def forget(self, transfer: int) -> None:
        """The receiver has the tensor (or never will): stop keeping it alive."""
        self._local.pop(transfer, None)
        self._outgoing.pop(transfer, None)


def peak_memory_bytes(device: torch.device) -> int:
    """The most this process has held: device memory on CUDA, resident host memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device: torch.device) -> str:
    """The model of the device, as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty there
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait for the device's work; nothing on CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
