"""What every family's parts need to take their place among the ranks."""

from dit_group.attention import SequenceParallel
from videopipe.config import Config
from videopipe.runtime import Runtime


def sequence_parallel(config: Config, runtime: Runtime, num_heads: int) -> SequenceParallel:
    """This rank's place in the DiT group, or beside it as a helper."""
    return SequenceParallel(
        group=runtime.exchange_group,
        member=runtime.dit_member,
        members=len(runtime.dit_ranks),
        num_heads=num_heads,
        strategy=config.attention.strategy,
        kernel=config.model.attention_kernel,
        heads_per_chunk=config.attention.fixed_heads_per_chunk,
        balance=config.attention.fixed_balance,
        rank=runtime.rank,
        assist_groups=runtime.assist_groups,
        mesh=runtime.mesh,
    )
