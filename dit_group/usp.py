"""USP: a mesh of members on which heads are divided along one axis and keys and values pass round along the other.

With n = u * r members, u of them exchange tokens for heads (Ulysses), and each computes its heads over the tokens of
all r such lines by a ring. It needs u heads for any number of members, and the ring carries N / u heads only.

Source: USP, a unified sequence parallelism (arXiv 2405.07719), here for any token and head counts.
"""

import torch.distributed as dist
from torch import Tensor

from dit_group.kernels import Kernel
from dit_group.ring import Ring
from dit_group.ulysses import Ulysses, UlyssesCall
from videopipe.arrangement import Balance
from videopipe.exchange import Buffers, Subset
from videopipe.partition import Mesh, offsets


class Usp:
    """Attention over one laid-out sequence; arguments as for `Ulysses`, where heads are those of a line of the mesh.

    Args:
        group: of all members of the mesh. Both axes use it, since transfers along both are under way at once.
        mesh: the axes; the members of `token_counts` are the members of the mesh.
    Raises:
        ValueError: no mesh, one of another size, or a kernel without log-sum-exp.
    """

    def __init__(
        self,
        *,
        group: dist.ProcessGroup | None,
        member: int,
        token_counts: tuple[int, ...],
        num_heads: int,
        kernel: Kernel,
        key_mask: Tensor | None,
        heads_per_chunk: int | None = None,
        balance: Balance = "heads",
        head_counts: tuple[int, ...] | None = None,
        buffers: Buffers | None = None,
        mesh: Mesh | None,
    ) -> None:
        members = len(token_counts)
        buffers = Buffers() if buffers is None else buffers
        if mesh is None or mesh.members != members:
            found = None if mesh is None else mesh.members
            raise ValueError(f"mesh of {found} members cannot hold {members}: attention.strategy='usp' needs {members}")
        line, ring_line = mesh.ulysses_members(member), mesh.ring_members(member)
        lines = [mesh.ulysses_members(other) for other in ring_line]
        start = offsets(token_counts)
        if key_mask is not None:  # from member order to the order in which lines lie on the ring
            order = [p for others in lines for other in others for p in range(start[other], start[other + 1])]
            key_mask = key_mask[:, order]

        def axis(ends: tuple[int, ...]) -> Subset | None:
            return Subset(group, ends, members) if group is not None and len(ends) > 1 else None

        ring = Ring(
            group=axis(ring_line),
            member=ring_line.index(member),
            token_counts=tuple(sum(token_counts[other] for other in others) for others in lines),
            num_heads=num_heads,
            kernel=kernel,
            key_mask=key_mask,
            buffers=buffers,
        )

        def around_the_ring(q: Tensor, k: Tensor, v: Tensor, line_mask: Tensor | None) -> Tensor:
            """The kernel of the line: some heads of its tokens, over the tokens of all lines."""
            assert line_mask is None, "the ring has the masks of all lines"
            return ring(q, k, v)

        self.ring = ring
        self.line = Ulysses(
            group=axis(line),
            member=line.index(member),
            token_counts=tuple(token_counts[other] for other in line),
            num_heads=num_heads,
            kernel=around_the_ring,
            key_mask=None,
            heads_per_chunk=heads_per_chunk,
            balance=balance,
            head_counts=head_counts,
            buffers=buffers,
            collective_kernel=True,
        )

    def begin(self, kernel: Kernel | None = None) -> UlyssesCall:
        """The attention of one layer."""
        assert kernel is None, "a mesh merges partial results: a layer cannot bring a kernel of its own"
        return self.line.begin()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Local tokens of all heads in, the same out: [B, S_local, N, D]."""
        return self.line(q, k, v)
