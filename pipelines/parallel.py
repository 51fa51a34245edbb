"""What every family's parts need to take their place among the ranks."""

from typing import Any

from dit_group.attention import SequenceParallel
from vae_group.team import Team
from videopipe.config import Config
from videopipe.runtime import Runtime


def sequence_parallel(config: Config, runtime: Runtime, num_heads: int) -> SequenceParallel:
    """This rank's place in the DiT group, or beside it as a helper."""
    return SequenceParallel(**place(config, runtime, num_heads))


def place(config: Config, runtime: Runtime, num_heads: int) -> dict[str, Any]:
    """What `SequenceParallel`, or a class derived from it, is to know of this rank."""
    return {
        "group": runtime.exchange_group,
        "member": runtime.dit_member,
        "members": len(runtime.dit_ranks),
        "num_heads": num_heads,
        "strategy": config.attention.strategy,
        "kernel": config.model.attention_kernel,
        "heads_per_chunk": config.attention.fixed_heads_per_chunk,
        "balance": config.attention.balance,
        "rank": runtime.rank,
        "assist_groups": runtime.assist_groups,
        "mesh": runtime.mesh,
    }


def decode_team(runtime: Runtime) -> Team:
    """This rank's place among the ranks that decode a clip together."""
    members = runtime.decode_team
    return Team(group=runtime.decode_group, member=members.index(runtime.rank), members=len(members))
