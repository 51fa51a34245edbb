"""From a configuration to an engine with ranks: what this machine can run, and ranks of its own or torchrun's."""

import os
import secrets
import signal
import socket
from dataclasses import dataclass
from typing import ClassVar

import msgspec
import torch
import torch.distributed as dist

from dit_group.attention import MERGING
from dit_group.kernels import check_kernel
from dit_group.xfuser import check_xfuser
from pipelines.engine import Engine, Progress
from pipelines.families import ModelFacts, load_family
from pipelines.launch import LocalLauncher, RankSpec
from videopipe.config import Config, ConfigError
from videopipe.control import ControlServer
from videopipe.handover import make_run_directory
from videopipe.partition import Mesh
from videopipe.runtime import DTYPES


def resolve_device(config: Config) -> str:
    """`cuda` or `cpu`.

    Raises:
        ConfigError: CUDA asked for and absent.
    """
    if config.runtime.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("runtime.device='cuda' but torch sees no CUDA device, nearest is 'cpu'")
    if config.runtime.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.runtime.device


def check_attention(config: Config, facts: ModelFacts, device: str) -> None:
    """Refuse an attention kernel or a mesh of ranks that cannot be had, before any rank is started.

    Raises:
        ConfigError: says what is missing and how to get it, or the nearest valid value.
    """
    a = config.attention
    try:
        check_kernel(
            config.model.attention_kernel,
            torch.device(device),
            DTYPES[config.model.dtype],
            with_lse=a.strategy in MERGING,
            look_at_device=False,
        )
        if a.strategy == "usp":
            Mesh.choose(config.groups.dit_ranks, facts.num_heads, a.ulysses_degree, a.mesh_inside)
        if a.strategy == "xfuser":
            check_xfuser(facts.num_heads, config.groups.dit_ranks)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_devices(config: Config, device: str, torchrun_world_size: int | None) -> None:
    """Refuse groups that need more GPUs than there are, or another number of ranks than torchrun started.

    Raises:
        ConfigError: names the group sizes and the nearest ones that fit.
    """
    g = config.groups
    available, source = torchrun_world_size, "torchrun started"
    if torchrun_world_size is None:
        if device != "cuda":
            return
        available, source = torch.cuda.device_count(), "this machine has GPUs for"
        if config.world_size <= available:
            return
    assert available is not None
    if config.world_size == available:
        return
    vae = min(g.vae_ranks, max(available - 1, 0))
    raise ConfigError(
        f"groups.dit_ranks={g.dit_ranks} and groups.vae_ranks={g.vae_ranks} need {config.world_size} ranks but "
        f"{source} {available}, nearest is dit_ranks={available - vae} vae_ranks={vae}"
    )


def _threads_per_rank(config: Config, ranks_here: int) -> int:
    return config.runtime.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // ranks_here)


def start_engine(
    config: Config,
    facts: ModelFacts,
    device: str,
    torchrun: "Torchrun | None",
    progress: Progress | None,
    given_launcher: LocalLauncher | None,
) -> Engine:
    """An engine whose ranks have loaded their parts: processes of this host, or those that torchrun has started.

    Args:
        device: `cuda` or `cpu`.
        given_launcher: starts the ranks; None for one that ends with the engine.
    Raises:
        RankError: a rank did not come up.
    """
    own_launcher = LocalLauncher(load_family(config.model.family).preload) if given_launcher is None else None
    starter = own_launcher or given_launcher
    assert starter is not None
    run_directory = make_run_directory()
    token = secrets.token_hex(16)
    launcher = starter.ranks_of(token)
    one_host = torchrun is None or torchrun.local_world_size == torchrun.world_size
    address = f"ipc://{run_directory}/control" if one_host else f"tcp://{_own_address()}:0"
    server = ControlServer(address, token)
    threads = _threads_per_rank(config, torchrun.local_world_size if torchrun else config.world_size)
    store: dist.TCPStore | None = None
    store_address = None
    if torchrun is not None:
        store = torchrun.store()
        store_address = torchrun.store_address
    elif config.world_size > 1:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store_address = f"127.0.0.1:{store.port}"
    engine = Engine(
        config,
        facts,
        server=server,
        launcher=launcher,
        run_directory=run_directory,
        progress=progress,
        rendezvous=store,
    )
    if own_launcher is not None:
        engine.close_with(own_launcher)
    spec = RankSpec(
        rank=0,
        local_rank=0,
        world_size=config.world_size,
        threads=threads,
        device=device,
        endpoint=server.endpoint,
        token=token,
        run_directory=str(run_directory),
        store_address=store_address,
        store_prefix=f"videopipe/{token}",
        config=config,
    )
    if torchrun is not None:
        assert store is not None
        store.set(Torchrun.KEY, msgspec.json.encode(spec).decode())
        launcher.start(msgspec.structs.replace(spec, local_rank=torchrun.local_rank))
    else:
        for rank in range(config.world_size):
            launcher.start(msgspec.structs.replace(spec, rank=rank, local_rank=rank))
    try:
        engine.start()
    except BaseException:
        engine.close()
        raise
    return engine


def _own_address() -> str:
    """The address by which other hosts of the run reach this one: the one that routes to the rendezvous host."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        return str(probe.getsockname()[0])


@dataclass(frozen=True)
class Torchrun:
    """What torchrun told this process through its environment variables."""

    KEY: ClassVar[str] = "videopipe/run"

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int
    agent_store: bool

    @classmethod
    def detect(cls) -> "Torchrun | None":
        """None in a process that torchrun (or a launcher with the same variables) did not start."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        env = os.environ
        if not all(name in env for name in names):
            return None
        return cls(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_rank=int(env["LOCAL_RANK"]),
            local_world_size=int(env["LOCAL_WORLD_SIZE"]),
            master_address=env["MASTER_ADDR"],
            master_port=int(env["MASTER_PORT"]),
            agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE", "False") == "True",
        )

    @property
    def store_address(self) -> str:
        """host:port of the rendezvous store."""
        return f"{self.master_address}:{self.master_port}"

    def store(self) -> dist.TCPStore:
        """The rendezvous store: the agent's where it has one, else rank 0's own."""
        is_master = self.rank == 0 and not self.agent_store
        return dist.TCPStore(self.master_address, self.master_port, is_master=is_master, wait_for_workers=False)

    def serve(self) -> int:
        """Be a rank for the pipeline of rank 0 until that closes; the exit code."""
        from pipelines.rank import run_rank  # brings diffusers, which only ranks need

        raw = self.store().get(self.KEY)
        spec = msgspec.json.decode(raw, type=RankSpec)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return run_rank(msgspec.structs.replace(spec, rank=self.rank, local_rank=self.local_rank))
