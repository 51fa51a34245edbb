"""The patterns of skip-sparse attention: which tokens of a block attend to each other.

Source: Skiparse attention, Open-Sora Plan (arXiv 2412.00131).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["dense", "single", "group"]

FIRST_SPARSE_BLOCK = 2  # by absolute index, whatever the number of blocks
FIRST_DENSE_TAIL_BLOCK = 30


@dataclass(frozen=True, kw_only=True)
class SkipSparse:
    """Which tokens of one block attend to each other: all ("dense"), or each of `k` groups within itself.

    Token n is in group n mod k ("single": every k-th token) or (n div k) mod k ("group": every k-th run of k tokens).
    """

    kind: Kind
    k: int = 1

    @property
    def groups(self) -> int:
        """Number of groups that attend within themselves."""
        return 1 if self.kind == "dense" else self.k

    def padded(self, tokens: int) -> int:
        """`tokens` filled up to whole groups."""
        unit = 1 if self.kind == "dense" else self.k * self.k
        return -(-tokens // unit) * unit

    def group_of(self, tokens: Tensor) -> Tensor:
        """The group of each token, by its index in the sequence."""
        if self.kind == "dense":
            return torch.zeros_like(tokens)
        return tokens % self.k if self.kind == "single" else tokens // self.k % self.k


DENSE = SkipSparse(kind="dense")


def block_sparsity(index: int, sparse1d: bool, sparse_n: int) -> SkipSparse:
    """The pattern of block `index` (from 0): blocks 2 to 29 are sparse, even ones "single", odd ones "group"."""
    if not sparse1d or sparse_n == 1 or not FIRST_SPARSE_BLOCK <= index < FIRST_DENSE_TAIL_BLOCK:
        return DENSE
    return SkipSparse(kind="single" if index % 2 == 0 else "group", k=sparse_n)
