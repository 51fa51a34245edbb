"""One layer's attention as steps: what every strategy gives, and how to take them one after the other."""

from typing import Protocol

from torch import Tensor


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
