"""xfuser's Ulysses: heads for tokens through the exchange of yunchang, the package that xfuser's own attention calls.

It takes equal numbers of tokens and of heads for each member only, sends v, k and q one after the other and waits for
each. Here it stands for comparison: the kernel is the one that every other strategy has. xfuser's own attention class
holds a flash kernel, process-wide groups and CUDA; its ring is not used.

Source: xDiT (arXiv 2411.01738) and yunchang, the packages `xfuser` and `yunchang`.
"""

import importlib
import importlib.util
from typing import cast

import torch.distributed as dist
from torch import Tensor

from dit_group.call import run_call
from dit_group.kernels import Kernel
from dit_group.ulysses import refuse_divided_heads
from videopipe.arrangement import Balance
from videopipe.exchange import Buffers


def check_xfuser(num_heads: int, members: int) -> None:
    """Refuse what this strategy cannot run.

    Raises:
        ValueError: yunchang is not installed, or heads do not divide by members; says how to get it or what fits.
    """
    if importlib.util.find_spec("yunchang") is None:
        raise ValueError(
            "attention.strategy='xfuser' needs the package yunchang (pip install yunchang, or xfuser, which brings "
            "it), nearest is 'ulysses'"
        )
    if num_heads % members:
        near = max(count for count in range(1, members + 1) if num_heads % count == 0)
        raise ValueError(
            f"groups.dit_ranks={members} must divide {num_heads} heads for attention.strategy='xfuser', nearest is "
            f"{near}"
        )


def check_xfuser_tokens(num_video: int, num_text: int, members: int, field: str) -> None:
    """Refuse a sequence whose tokens members cannot share equally.

    Args:
        num_text: text tokens, padded ones included; every member has at least one.
        field: the name of the setting that says how many these are.
    Raises:
        ValueError: names the field, the value and the nearest valid value.
    """
    text = max(num_text, members)
    over = (num_video + text) % members
    if over:
        near = text - over if text - over >= members else text - over + members
        raise ValueError(
            f"{field}={num_text}: so many text and {num_video} video tokens do not divide by "
            f"groups.dit_ranks={members}, as attention.strategy='xfuser' needs; nearest is {near}"
        )


class Xfuser:
    """Attention over one laid-out sequence.

    Args:
        token_counts: tokens of each member, all equal.
        num_heads: heads of the layer (N), divisible by the members.
        kernel, key_mask: as for `Ulysses`.
        heads_per_chunk, balance, head_counts: as for `Ulysses`; here only the defaults.
        buffers: not used, yunchang has memory of its own.
    Raises:
        ValueError: yunchang is missing, or sizes that it cannot divide.
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
    ) -> None:
        refuse_divided_heads("xfuser's exchange", heads_per_chunk, balance, head_counts)
        members = len(token_counts)
        check_xfuser(num_heads, members)
        if len(set(token_counts)) > 1:
            near = sum(token_counts) // members * members
            raise ValueError(
                f"{sum(token_counts)} tokens do not divide by {members} members, which attention.strategy='xfuser' "
                f"needs; nearest is {near}, or strategy 'ulysses'"
            )
        self.group = group
        self.kernel = kernel
        self.key_mask = key_mask
        self._exchange = importlib.import_module("yunchang.comm.all_to_all").SeqAllToAll4D

    def begin(self, kernel: Kernel | None = None) -> "XfuserCall":
        """The attention of one layer, computed by `kernel` in place of the plan's own if given."""
        return XfuserCall(self, self.kernel if kernel is None else kernel)

    def to_heads(self, x: Tensor) -> Tensor:
        """[B, S_local, N, D] -> [B, S, N_local, D], blocking."""
        return x if self.group is None else cast(Tensor, self._exchange.apply(self.group, x, 2, 1, False))

    def to_tokens(self, x: Tensor) -> Tensor:
        """[B, S, N_local, D] -> [B, S_local, N, D], blocking."""
        return x if self.group is None else cast(Tensor, self._exchange.apply(self.group, x, 1, 2, False))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Local tokens of all heads in, the same out: [B, S_local, N, D]."""
        return run_call(self.begin(), q, k, v)


class XfuserCall:
    """One layer's attention, step by step; every step but `output` waits for its exchange."""

    def __init__(self, plan: Xfuser, kernel: Kernel) -> None:
        self._plan = plan
        self._kernel = kernel
        self._arrived: list[Tensor] = []  # v, k, q
        self._output: Tensor | None = None

    def value(self, v: Tensor) -> None:
        """Exchange v [B, S_local, N, D]."""
        self._arrived.append(self._plan.to_heads(v))

    def key(self, k: Tensor) -> None:
        """Exchange k."""
        self._arrived.append(self._plan.to_heads(k))

    def query(self, q: Tensor) -> None:
        """Exchange q."""
        self._arrived.append(self._plan.to_heads(q))

    def attend(self) -> None:
        """Compute the attention of this member's heads, and exchange it."""
        v, k, q = self._arrived
        self._output = self._plan.to_tokens(self._kernel(q, k, v, self._plan.key_mask))

    def output(self) -> Tensor:
        """The attention of this member's tokens, all heads: [B, S_local, N, D]."""
        assert self._output is not None, "attend comes first"
        return self._output
