"""WF-VAE over a team: each member has some rows of every frame, and chunks of time follow one another.

The model runs as it is on its rows. Hooks give it what lies beyond them: a row at either side for convolutions and
interpolation, the keys and values of all rows for the attention within a frame. Norms look at single pixels and
wavelets at pairs of rows, so neither needs anybody. In time the model's own causal cache makes chunks exact.

Source: WF-VAE (arXiv 2411.17459); rows with halos as in DistVAE of xDiT (arXiv 2411.01738), here without tiles.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.models.open_sora_plan_layout import STRIDE_S
from pipelines.models.wf_vae import WFVAEModel
from pipelines.models.wf_vae_layers import Downsample, Interpolate, SpatialAttention, TimeDownsample
from vae_group.halo import gather_rows, neighbour_rows
from vae_group.retry import together
from vae_group.team import Part, PartDecoder, Team
from videopipe.partition import offsets, split_evenly


def wfvae_exact(vae: WFVAEModel, chunk_frames: int) -> PartDecoder:
    """Decodes with a team as `vae.decode` does alone: within 1e-5 in float32, for every length and number of rows.

    Args:
        vae: in evaluation mode, on its device; between the pieces it is as it was.
        chunk_frames: latent frames that are decoded at a time; each gives a piece of the video.
    Raises:
        ValueError: a chunk below 1, or a model whose norms look at more than single pixels.
    """
    vae.check_chunk("chunk_frames", chunk_frames)
    return partial(exact_decode, vae, chunk_frames=chunk_frames)


@torch.no_grad()
def exact_decode(vae: WFVAEModel, latents: Tensor, team: Team, *, chunk_frames: int) -> Iterator[Part]:
    """Latents [1, C, T', H', W'] of the VAE -> this member's rows of the video, chunk by chunk; see `wfvae_exact`."""
    rows = _Rows(team, split_evenly(latents.shape[3], team.members))
    first_frame = 0
    pieces = vae.decode_stream(rows.take(latents, 1), chunk_frames)
    while (video := rows.next_piece(vae.decoder, pieces)) is not None:
        own = video[:, :, :, : rows.own * STRIDE_S]
        yield Part(video=own, first_frame=first_frame, first_row=rows.start * STRIDE_S)
        first_frame += video.shape[2]


@torch.no_grad()
def exact_encode(vae: WFVAEModel, pixels: Tensor, team: Team, *, chunk_frames: int) -> Tensor:
    """The moments of a clip, encoded with a team as `vae.encode` does alone.

    Args:
        vae: as for `wfvae_exact`.
        pixels: [B, 3, T, H, W] in -1..1, the same on every member.
        chunk_frames: latent frames that are encoded at a time.
    Returns:
        [B, 2C, T', H', W'], means and log variances, whole on every member: `latent_dist.parameters` of the model.
    Raises:
        ValueError: as `WFVAEModel.encode_stream`.
        TeamOutOfMemoryError: on every member, where one of them ran out of memory.
    """
    rows = _Rows(team, split_evenly(pixels.shape[3] // STRIDE_S, team.members))
    pieces = vae.encode_stream(rows.take(pixels, STRIDE_S), chunk_frames)

    def encode() -> Tensor:
        own = []
        while (moments := rows.next_piece(vae.encoder, pieces)) is not None:
            own.append(moments[:, :, :, : rows.own])
        return gather_rows(torch.cat(own, dim=2), team, rows.counts)

    return together(team, pixels.device, encode)


class _Rows:
    """One pass over a clip whose rows are sharded; `counts` are latent rows of each member.

    A member without rows computes a row of its own that nobody sees, so that it makes the same calls as the others.
    """

    def __init__(self, team: Team, counts: tuple[int, ...]) -> None:
        self.team = team
        self.counts = counts
        self.own = counts[team.member]
        self.start = offsets(counts)[team.member]

    def take(self, x: Tensor, scale: int) -> Tensor:
        """This member's rows of a whole tensor with `scale` rows for each latent row."""
        start = self.start if self.own else 0
        return x[:, :, :, start * scale : (start + max(1, self.own)) * scale]

    def next_piece(self, coder: nn.Module, pieces: Iterator[Tensor]) -> Tensor | None:
        """The next piece of `coder`'s work; beside it the model is free for anybody."""
        if self.team.members == 1:
            return next(pieces, None)
        with self._hooked(coder):
            return next(pieces, None)

    @contextmanager
    def _hooked(self, coder: nn.Module) -> Iterator[None]:
        handles = []
        for module in coder.modules():
            hooks: list[_Halo] = []
            if isinstance(module, nn.Conv2d | nn.Conv3d) and module.padding[-2]:
                hooks = [_Halo(self, above=1, below=1, scale=1)]
            elif isinstance(module, Interpolate):
                hooks = [_Halo(self, above=1, below=1, scale=2)]
            elif isinstance(module, Downsample | TimeDownsample):
                hooks = [_Halo(self, above=0, below=1, scale=None)]
            elif isinstance(module, SpatialAttention):
                handles += [layer.register_forward_hook(self._gather) for layer in (module.k, module.v)]
            for hook in hooks:
                handles += [
                    module.register_forward_pre_hook(hook.attach),
                    module.register_forward_hook(hook.cut),
                ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def at(self, height: int) -> tuple[int, ...]:
        """Rows of each member at the resolution at which this one has so many."""
        return tuple(count * (height // max(1, self.own)) for count in self.counts)

    def _gather(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        counts = self.at(output.shape[3])
        return gather_rows(output[:, :, :, : counts[self.team.member]], self.team, counts)


class _Halo:
    """Hooks of one layer: neighbours' rows come with its input, and what it makes of them is cut off.

    `scale` rows come out for each one that goes in; None where nothing is to be cut, since the layer itself leaves out
    what it has only begun: half the rows, from an even number and one more.
    """

    def __init__(self, rows: _Rows, *, above: int, below: int, scale: int | None) -> None:
        self._rows = rows
        self._above = above
        self._below = below
        self._scale = scale
        self._cut = slice(None)

    def attach(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        clip = x if x.ndim == 5 else x[:, :, None]  # [B, C, T, h, W], or [B*T, C, h, W] of single frames
        counts = self._rows.at(clip.shape[3])
        own = clip[:, :, :, : counts[self._rows.team.member]]
        upper, lower = neighbour_rows(own, self._above, self._below, self._rows.team, counts)
        if self._scale is not None:
            first = upper.shape[3] * self._scale
            self._cut = slice(first, first + clip.shape[3] * self._scale)
        clip = torch.cat((upper, clip, lower), dim=3)
        return (clip if x.ndim == 5 else clip[:, :, 0], *args[1:])

    def cut(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output[..., self._cut, :]
