"""One layer's attention as steps: what every strategy gives, and how to take them one after the other."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from dit_group.kernels import Kernel


class AttentionCall(Protocol):
    """One layer's attention, step by step, so that the caller computes while tensors travel."""

    def value(self, v: Tensor) -> None:
        """Send v [B, S_local, N, D] on its way, as soon as it is projected."""

    def key(self, k: Tensor) -> None:
        """Send k [B, S_local, N, D] on its way."""

    def query(self, q: Tensor) -> None:
        """Send q [B, S_local, N, D] on its way."""

    def attend(self) -> None:
        """Compute; the output begins to travel."""

    def output(self) -> Tensor:
        """The attention of this member's tokens, all heads: [B, S_local, N, D]."""


def run_call(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All steps at once, for a caller that has q, k and v [B, S_local, N, D] already and nothing else to compute."""
    call.value(v)
    call.key(k)
    call.query(q)
    call.attend()
    return call.output()


@dataclass(frozen=True, kw_only=True)
class Work:
    """One call of a kernel: so many heads, keys and query rows."""

    kernel: Kernel
    heads: int
    keys: int
    rows: int


@runtime_checkable
class TakenApart(Protocol):
    """A strategy whose transfers and kernels can be run by themselves, to be timed (`dit_group.workload`).

    `kernel` is that of the layer, None for the strategy's own.
    """

    def own_work(self, kernel: Kernel | None) -> list[Work]:
        """The calls by which this member computes its share of a layer."""

    def work_of(self, heads: int, kernel: Kernel | None) -> list[Work]:
        """Those by which one member would compute so many heads of a layer over all tokens."""

    def transfers(self, kernel: Kernel | None) -> AttentionCall:
        """A call in which everything travels and nothing is computed."""


def give_back_query(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """A kernel that computes nothing."""
    return q
