"""Frame-causal attention of a clip: the queries of a frame see the keys of its own and all earlier frames.

The mask is never made: frame after frame, the queries meet a prefix of the keys, in a fused kernel that keeps no
scores. Memory is that of the keys and values, which every member of a team collects; it keeps its own queries.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vae_group.retry import all_ready
from vae_group.team import Team
from videopipe.exchange import gather_tokens

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""Kernels whose memory is linear in tokens; where none of them can run, PyTorch raises a RuntimeError."""


class FramePrefix:
    """Keys and values of a clip, appended frame after frame, of which each frame's queries see a prefix.

    Args:
        frames: T of the clip.
        token_counts: tokens of one frame that each member has; may be zero.
    """

    def __init__(self, frames: int, token_counts: tuple[int, ...], team: Team) -> None:
        self._frames = frames
        self._token_counts = token_counts
        self._team = team
        self._filled = 0
        self._pairs: Tensor | None = None  # [B, T, S, 2, N*D]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Keys and values [B, S_local, N*D] of this member's tokens of the next frame; one collective."""
        own, team = torch.stack([k, v], dim=2), self._team
        ready = partial(all_ready, team, own.device)
        pair = gather_tokens(own, self._token_counts, team.group, team.member, ready=ready)
        if self._pairs is None:  # all frames at once: growing would copy
            self._pairs = pair.new_empty(pair.shape[0], self._frames, *pair.shape[1:])
        self._pairs[:, self._filled] = pair
        self._filled += 1

    def attend(self, q: Tensor, frame: int, heads: int) -> Tensor:
        """What the queries [B, S_local, N*D] of a frame collect from frames 0..frame; the same shape."""
        assert self._pairs is not None and frame < self._filled, (frame, self._filled)
        if not q.shape[1]:
            return q
        k, v = self._pairs[:, : frame + 1].flatten(1, 2).unbind(2)  # [B, (frame + 1) * S, N*D] each
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(FUSED):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
