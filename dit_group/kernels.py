"""Attention kernels: what computes softmax(q k^T) v, apart from how q, k and v got there."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """torch's scaled dot product attention, whichever backend it picks.

    Args:
        q: [B, S_q, N, D]; k, v: [B, S, N, D].
        key_mask: bool [B, S], False for keys that nobody may see; None where all are visible.
    Returns:
        [B, S_q, N, D], contiguous.
    """
    mask = None if key_mask is None else key_mask[:, None, None, :]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2).contiguous()


def math(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """The textbook formula in float64, for reference: slow, and quadratic in memory. Shapes as `sdpa`."""
    q64, k64, v64 = (x.to(torch.float64).transpose(1, 2) for x in (q, k, v))  # [B, N, S, D]
    scores = q64 @ k64.transpose(-1, -2) / q.shape[-1] ** 0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    return (scores.softmax(dim=-1) @ v64).transpose(1, 2).to(q.dtype).contiguous()


KERNELS: dict[str, Kernel] = {"sdpa": sdpa, "math": math}
