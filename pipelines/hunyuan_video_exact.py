"""HunyuanVideo's causal VAE over a team, equal to the untiled decode and encode of diffusers.

The layers are diffusers' own, called in its order with what the untiled run would give them: rows are sharded over the
team (halos inside, repeated rows at the clip's border), frames come in slabs, norm statistics and the mid-block's
attention are those of the whole clip. The VAE itself is not changed.

Source: HunyuanVideo (arXiv 2412.03603) as implemented by diffusers' `AutoencoderKLHunyuanVideo`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import ceil
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from pipelines.hunyuan_video_exact_plan import ExactPlan, Level, plan_decode, plan_encode
from vae_group.causal_conv import CausalConv, Rows
from vae_group.frame_attention import FramePrefix
from vae_group.group_norm import GroupNorm, measure
from vae_group.halo import gather_rows
from vae_group.retry import together
from vae_group.slabs import Clip, Held, Lazy, Resized, Step
from vae_group.team import Part, PartDecoder, Team
from videopipe.partition import offsets, split_evenly


def hunyuan_exact(vae: AutoencoderKLHunyuanVideo, memory_bytes: int | None = None) -> PartDecoder:
    """Decodes with a team as `vae.decode` does alone, without tiles in space or time.

    Args:
        vae: in evaluation mode, on its device; stays as it is.
        memory_bytes: room for activations on each rank; None for all that the fastest way takes. In less room more is
            computed twice (`plan_decode`).
    Raises:
        ValueError: by the call, for a clip that cannot be decoded in that room.
    """
    return partial(exact_decode, vae, memory_bytes=memory_bytes)


@torch.no_grad()
def exact_decode(
    vae: AutoencoderKLHunyuanVideo,
    latents: Tensor,
    team: Team,
    *,
    memory_bytes: int | None = None,
    plan: ExactPlan | None = None,
) -> Iterator[Part]:
    """Latents [1, C, T', H', W'] as the VAE takes them -> this member's rows of the video, slab by slab in time.

    Every member gives the same latents and exhausts the iterator. `plan` stands in for the one that `memory_bytes` asks
    for; it must be the same on every member.
    """
    model: Any = vae
    B, C, frames, height, width = latents.shape
    if plan is None:
        plan = plan_decode(
            model.config, (frames, height, width), team.members, latents.element_size(), memory_bytes=memory_bytes
        )
    rows = Rows(team=team, counts=split_evenly(height, team.members))
    own = latents.narrow(3, offsets(rows.counts)[team.member], rows.own)
    network = _Network(team, plan)
    x: Clip = Lazy(Held([own]), lambda: CausalConv(model.post_quant_conv, rows).step)
    x, rows = network.run(x, rows, _decoder_stages(model.decoder))
    first_frame, first_row = 0, offsets(rows.counts)[team.member]
    for video in network.head(x, rows, model.decoder):
        part = Part(video=video, first_frame=first_frame, first_row=first_row)
        first_frame += video.shape[2]
        del video  # the caller decides how long a part lives
        yield part
        del part


@torch.no_grad()
def exact_encode(
    vae: AutoencoderKLHunyuanVideo,
    video: Tensor,
    team: Team,
    *,
    memory_bytes: int | None = None,
    plan: ExactPlan | None = None,
) -> Tensor:
    """The parameters of the latents' distribution, as `vae.encode` gives them without tiles in space or time.

    Args:
        video: [1, 3, T, H, W] in -1..1, the same on every member; any sizes.
        team, memory_bytes, plan: as in `exact_decode`.
    Returns:
        [1, 2 C, T', H', W'], mean and log variance, whole on every member: `latent_dist.parameters` of diffusers.
    Raises:
        TeamOutOfMemoryError: on every member, where one of them ran out of memory.
    """
    model: Any = vae
    B, C, frames, height, width = video.shape
    if plan is None:
        plan = plan_encode(
            model.config, (frames, height, width), team.members, video.element_size(), memory_bytes=memory_bytes
        )
    stride = model.spatial_compression_ratio
    bounds = [min(start * stride, height) for start in offsets(split_evenly(ceil(height / stride), team.members))]
    rows = Rows(team=team, counts=tuple(end - start for start, end in pairwise(bounds)))
    own, network = video.narrow(3, bounds[team.member], rows.own), _Network(team, plan)
    return together(team, video.device, partial(_encode, model, own, rows, network))


def _encode(model: Any, own: Tensor, rows: Rows, network: "_Network") -> Tensor:
    """From this member's rows of the pixels to the whole of the distribution's parameters."""
    x, rows = network.run(Held([own]), rows, _encoder_stages(model.encoder))
    out = CausalConv(model.quant_conv, rows)
    moments = torch.cat([out.step(slab) for slab in network.head(x, rows, model.encoder)], dim=2)
    return gather_rows(moments, rows.team, rows.counts)


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """What happens at one resolution: a convolution that enters it, then resnets and attentions."""

    entry: nn.Conv3d
    repeat: tuple[int, int, int] = (1, 1, 1)
    blocks: Sequence[nn.Module] = ()


def _decoder_stages(decoder: Any) -> list[_Stage]:
    stages: list[_Stage] = []
    entry, repeat, blocks = decoder.conv_in, (1, 1, 1), _mid_blocks(decoder.mid_block)
    for block in decoder.up_blocks:
        blocks.extend(block.resnets)
        for upsampler in block.upsamplers or ():
            stages.append(_Stage(entry=_convolution(entry), repeat=repeat, blocks=blocks))
            in_time, in_rows, in_cols = upsampler.upsample_factor
            entry, repeat, blocks = upsampler.conv, (in_time, in_rows, in_cols), []
    return [*stages, _Stage(entry=_convolution(entry), repeat=repeat, blocks=blocks)]


def _encoder_stages(encoder: Any) -> list[_Stage]:
    stages: list[_Stage] = []
    entry, blocks = encoder.conv_in, []
    for block in encoder.down_blocks:
        blocks.extend(block.resnets)
        for downsampler in block.downsamplers or ():
            stages.append(_Stage(entry=_convolution(entry), blocks=blocks))
            entry, blocks = downsampler.conv, []
    return [*stages, _Stage(entry=_convolution(entry), blocks=[*blocks, *_mid_blocks(encoder.mid_block)])]


def _mid_blocks(mid: Any) -> list[nn.Module]:
    blocks = [mid.resnets[0]]
    for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
        blocks.extend([resnet] if attention is None else [attention, resnet])
    return blocks


def _convolution(causal: Any) -> nn.Conv3d:
    """The convolution inside of diffusers' causal one, which pads as `CausalConv` does."""
    if causal.pad_mode != "replicate":
        raise ValueError(f"pad_mode={causal.pad_mode!r} has no exact decode over several ranks, need 'replicate'")
    return causal.conv


class _Network:
    """Runs stages over a clip, as the plan says."""

    def __init__(self, team: Team, plan: ExactPlan) -> None:
        self._team = team
        self._plan = plan

    def run(self, x: Clip, rows: Rows, stages: Sequence[_Stage]) -> tuple[Clip, Rows]:
        """All stages; gives what the head takes, and how its rows are sharded."""
        for stage, planned in zip(stages, self._plan.stages, strict=True):
            x = Lazy(Resized(x, planned.frames), partial(_begin_entry, stage, rows))
            rows = rows.upsampled(stage.repeat[1]).downsampled(stage.entry.stride[1])
            if planned.level == Level.HOLD:
                x = Held(x.drain())
            for block in stage.blocks:
                if isinstance(block, Attention):
                    x = self._attention(x, block, rows)
                else:
                    x = self._resnet(x, block, rows, planned.level)
        return x, rows

    def head(self, x: Clip, rows: Rows, network: Any) -> Iterator[Tensor]:
        """The last norm and convolution; the clip is drained."""
        norm = GroupNorm(network.conv_norm_out, measure(x.slabs()), self._team)
        return map(_begin_normed(norm, network.conv_act, network.conv_out, rows), x.drain())

    def _resnet(self, x: Clip, block: Any, rows: Rows, level: Level) -> Clip:
        norm1 = GroupNorm(block.norm1, measure(x.slabs()), self._team)
        begin_inner = partial(_begin_normed, norm1, block.nonlinearity, block.conv1, rows)
        inner: Clip = Lazy(x, begin_inner)
        if level <= Level.ENTER_AGAIN:
            inner = Held(inner.slabs())
        norm2 = GroupNorm(block.norm2, measure(inner.slabs()), self._team)
        begin_outer = partial(_begin_outer, block, norm2, rows)
        if isinstance(inner, Held):
            return Held(map(begin_outer(), x.drain(), inner.drain()))
        out = Lazy(x, partial(_begin_resnet, begin_inner, begin_outer))
        return out if level == Level.STREAM else Held(out.drain())

    def _attention(self, x: Clip, attention: Any, rows: Rows) -> Clip:
        """Self-attention of the mid-block; its input and result are held."""
        held = x if isinstance(x, Held) else Held(x.drain())
        norm = GroupNorm(attention.group_norm, measure(held.slabs()), self._team)
        prefix: FramePrefix | None = None
        for slab in held.slabs():
            for frame in norm.step(slab).unbind(2):
                if prefix is None:
                    counts = tuple(count * frame.shape[3] for count in rows.counts)
                    prefix = FramePrefix(held.frames, counts, self._team)
                tokens = _tokens(frame)
                prefix.append(attention.to_k(tokens), attention.to_v(tokens))
        assert prefix is not None
        return Held(map(_begin_attention(attention, norm, prefix), held.drain()))


def _begin_entry(stage: _Stage, rows: Rows) -> Step:
    return CausalConv(stage.entry, rows, stage.repeat).step


def _begin_normed(norm: GroupNorm, activation: Callable[[Tensor], Tensor], causal: Any, rows: Rows) -> Step:
    conv = CausalConv(_convolution(causal), rows)
    return lambda x: conv.step(activation(norm.step(x)))


def _begin_outer(block: Any, norm2: GroupNorm, rows: Rows) -> Callable[[Tensor, Tensor], Tensor]:
    """The second half of a resnet, from its input and its inner activations."""
    second = _begin_normed(norm2, block.nonlinearity, block.conv2, rows)
    shortcut = None if block.conv_shortcut is None else CausalConv(_convolution(block.conv_shortcut), rows)

    def step(x: Tensor, inner: Tensor) -> Tensor:
        out = second(inner)
        return out.add_(x if shortcut is None else shortcut.step(x))

    return step


def _begin_resnet(
    begin_inner: Callable[[], Step], begin_outer: Callable[[], Callable[[Tensor, Tensor], Tensor]]
) -> Step:
    inner, outer = begin_inner(), begin_outer()
    return lambda x: outer(x, inner(x))


def _begin_attention(attention: Any, norm: GroupNorm, prefix: FramePrefix) -> Step:
    frame = 0

    def step(x: Tensor) -> Tensor:
        nonlocal frame
        out = torch.empty_like(x)
        for i, tokens in enumerate(_tokens(f) for f in norm.step(x).unbind(2)):
            attended = prefix.attend(attention.to_q(tokens), frame, attention.heads)
            projected = attention.to_out[0](attended).transpose(1, 2).unflatten(2, x.shape[3:])
            out[:, :, i] = (projected + x[:, :, i]) / attention.rescale_output_factor
            frame += 1
        return out

    return step


def _tokens(frame: Tensor) -> Tensor:
    """[B, C, h, W] -> [B, h*W, C]."""
    return frame.flatten(2).transpose(1, 2)
