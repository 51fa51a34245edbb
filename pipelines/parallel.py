"""What every family's parts need to take their place among the ranks."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from dit_group.assist import Assistant
from dit_group.attention import Branch, SequenceParallel
from vae_group.team import Team
from videopipe.arrangement import Guidance, Shape
from videopipe.config import Config
from videopipe.partition import Mesh
from videopipe.runtime import Runtime

P = TypeVar("P", bound=SequenceParallel)


def sequence_parallel(
    config: Config,
    runtime: Runtime,
    num_heads: int,
    make: Callable[..., P] = SequenceParallel,  # type: ignore[assignment]
) -> P:
    """This rank's place in the DiT group, or beside it as a helper; `make` where a family has a place of its own."""
    return make(
        group=runtime.exchange_group,
        member=runtime.dit_member,
        members=len(runtime.dit_ranks),
        rank=runtime.rank,
        assist_groups=runtime.assist_groups,
        **_attention(config, num_heads, len(runtime.dit_ranks)),
    )


def half_parallel(
    config: Config,
    runtime: Runtime,
    num_heads: int,
    half: int,
    make: Callable[..., P] = SequenceParallel,  # type: ignore[assignment]
) -> P:
    """This rank's place in one half of the DiT group, which evaluates one branch of guidance, or beside it."""
    assert runtime.branches is not None, "this run has no halves"
    groups, pair = runtime.branches.halves[half], runtime.branches.pair
    return make(
        group=groups.group,
        member=groups.ranks.index(runtime.rank) if runtime.rank in groups.ranks else None,
        members=len(groups.ranks),
        rank=runtime.rank,
        assist_groups=groups.assist_groups,
        branch=None if pair is None else Branch(half, pair),
        **_attention(config, num_heads, len(groups.ranks)),
    )


def _attention(config: Config, num_heads: int, members: int) -> dict[str, Any]:
    """How q, k and v travel among so many members, as far as the configuration says."""
    a = config.attention
    mesh = None
    if a.strategy == "usp":
        mesh = Mesh.choose(members, num_heads, a.ulysses_degree, a.mesh_inside)
    return {
        "num_heads": num_heads,
        "strategy": a.strategy,
        "kernel": config.model.attention_kernel,
        "heads_per_chunk": a.fixed_heads_per_chunk,
        "balance": a.fixed_balance,
        "ping_pong": a.ping_pong == "on",
        "mesh": mesh,
    }


def both_halves(
    config: Config,
    runtime: Runtime,
    num_heads: int,
    make: Callable[..., P] = SequenceParallel,  # type: ignore[assignment]
) -> list[P]:
    """A helper's view of the two halves of the DiT group; empty where the group is not halved."""
    if runtime.branches is None:
        return []
    return [half_parallel(config, runtime, num_heads, half, make) for half in range(2)]


def own_half(
    config: Config,
    runtime: Runtime,
    num_heads: int,
    make: Callable[..., P] = SequenceParallel,  # type: ignore[assignment]
) -> P | None:
    """A DiT rank's place in its half, where branches of guidance are evaluated side by side; else None."""
    if runtime.branches is None:
        return None
    assert runtime.dit_member is not None, runtime.rank
    half = runtime.dit_member // len(runtime.branches.halves[0].ranks)
    return half_parallel(config, runtime, num_heads, half, make)


def decode_team(runtime: Runtime) -> Team:
    """This rank's place among the ranks that decode a clip together."""
    members = runtime.decode_team
    return Team(group=runtime.decode_group, member=members.index(runtime.rank), members=len(members))


class LentRank:
    """A VAE rank that helps in denoising steps; its family adds `prepare`, what the sequences of a request are."""

    def __init__(self, assistant: Assistant) -> None:
        self._assistant = assistant

    def step(self, request: str, helpers: tuple[int, ...]) -> None:
        """Take part in one step."""
        self._assistant.step(request, helpers)

    @property
    def parallel(self) -> SequenceParallel:
        """This rank's place beside the DiT group."""
        return self._assistant.parallel

    @property
    def branches_as_rows(self) -> bool:
        """As on DiT ranks."""
        return self._assistant.branches_as_rows

    def views(self, guidance: Guidance) -> Sequence[SequenceParallel]:
        """The DiT group, or both halves of it."""
        return self._assistant.views(guidance)

    @property
    def layer_kinds(self) -> tuple[tuple[int, int], ...]:
        """Those of the leader."""
        return ()

    def layer(self, index: int, shape: Shape) -> Callable[[], object]:
        """Prepare to take part in attention layer `index` alone."""
        return self._assistant.layer(index, shape.rows)

    def forget(self, request: str) -> None:
        """No step of this request will come any more."""
        self._assistant.forget(request)
