"""What exact decode and encode of HunyuanVideo's VAE cost, and which activations to hold: plain arithmetic.

A norm needs the statistics of the whole clip, so what comes before it is either held in memory or computed again. Each
resolution (stage) of the network has its own level of holding; the fastest levels that fit the room are chosen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import product
from math import ceil, log2
from typing import Any

from vae_group.group_norm import PIECE
from videopipe.partition import split_evenly

SLAB_BYTES = (2**28, 2**26, 0)
"""Sizes of the widest slab that are tried, the largest first; 0 is one frame at a time."""
STATISTICS_BYTES = 2**16
"""Room for the moments and scales of norms."""


class Level(IntEnum):
    """What of a stage is held over the whole clip; each level holds less and computes more than the one before."""

    HOLD = 0
    """Everything that is needed again."""
    ENTER_AGAIN = 1
    """All but the result of the convolution that enters the stage (in the decoder, the upsampler's)."""
    INSIDE_AGAIN = 2
    """Nor what lies between the two convolutions of a resnet."""
    STREAM = 3
    """Nothing: every statistic takes a run through the whole stage."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage's level, and the frames of its input that it takes at a time."""

    level: Level
    frames: int


@dataclass(frozen=True, kw_only=True)
class ExactPlan:
    """How a clip is decoded or encoded, and what that costs the rank with the most rows.

    `peak_bytes` are activations: without weights, without the clip that is given and the result that is taken, and
    without what a kernel allocates for itself. `at_work_bytes` are the most that one convolution or attention reads and
    writes. `flops` count two for each multiplication of convolutions and attention.
    """

    stages: tuple[StagePlan, ...]
    peak_bytes: int
    flops: int
    at_work_bytes: int = 0

    def describe(self) -> str:
        """In words: each stage's level, and how many frames of its input it takes at a time."""
        levels = " ".join(str(int(stage.level)) for stage in self.stages)
        frames = " ".join(str(stage.frames) for stage in self.stages)
        return f"exact, levels {levels}, slabs of {frames} frames"


@dataclass(frozen=True, kw_only=True)
class StageShape:
    """One resolution of the network: an entering convolution, resnets, maybe attention. Sizes are [frames, rows, cols].

    `size` and `source` are those of the rank with the most rows; `height` the rows of all ranks.
    """

    entry: tuple[int, int]
    resnets: tuple[tuple[int, int], ...]
    repeat: tuple[int, int, int] = (1, 1, 1)
    stride: tuple[int, int, int] = (1, 1, 1)
    attention: bool = False
    source: tuple[int, int, int] = (0, 0, 0)
    size: tuple[int, int, int] = (0, 0, 0)
    height: int = 0

    def sized(self, source: tuple[int, int, int], height: int) -> "StageShape":
        """With its own size, from that of its input."""
        (T, h, W), up, down = source, self.repeat, self.stride
        seen = (1 + (T - 1) * up[0], h * up[1], W * up[2])
        T, h, W = (ceil(n / s) for n, s in zip(seen, down, strict=True))
        return replace(self, source=source, size=(T, h, W), height=ceil(height * up[1] / down[1]))


def plan_decode(
    config: Mapping[str, Any],
    latents: tuple[int, int, int],
    members: int,
    itemsize: int,
    *,
    memory_bytes: int | None = None,
    levels: Sequence[Level] | None = None,
) -> ExactPlan:
    """How to decode a clip exactly.

    Args:
        config: of diffusers' `AutoencoderKLHunyuanVideo`.
        latents: (T', H', W').
        members: ranks that share the rows.
        itemsize: bytes of one activation.
        memory_bytes: room for activations on each rank; None for as much as the fastest way takes.
        levels: one for each stage, to ask what they cost.
    Raises:
        ValueError: nothing fits into the room; the least that is needed is named.
    """
    stages = _decoded(config, latents, members)
    return _plan("decode", stages, config["out_channels"], members, itemsize, memory_bytes, levels)


def decode_plans(
    config: Mapping[str, Any], latents: tuple[int, int, int], members: int, itemsize: int
) -> list[ExactPlan]:
    """All plans of a clip that are worth taking: the fastest, then ever slower ones that need ever less.

    The first of them that fits into some room is the one that `plan_decode` would choose for it.
    """
    stages = _decoded(config, latents, members)
    plans = _plans(stages, config["out_channels"], members, itemsize, None)
    worth: list[ExactPlan] = []
    for plan in sorted(plans, key=lambda plan: plan.flops):  # stable: among equals those with the largest slabs first
        if not worth or plan.peak_bytes < worth[-1].peak_bytes:
            worth.append(plan)
    return worth


def plan_encode(
    config: Mapping[str, Any],
    video: tuple[int, int, int],
    members: int,
    itemsize: int,
    *,
    memory_bytes: int | None = None,
    levels: Sequence[Level] | None = None,
) -> ExactPlan:
    """How to encode a clip of (T, H, W) pixels exactly; otherwise as `plan_decode`."""
    T, H, W = video
    stride = config["spatial_compression_ratio"]
    rows = min(H, split_evenly(ceil(H / stride), members)[0] * stride)  # whole latent rows
    stages = _sized(encoder_stages(config), (T, rows, W), H)
    return _plan("encode", stages, 2 * config["latent_channels"], members, itemsize, memory_bytes, levels)


def decoder_stages(config: Mapping[str, Any]) -> list[StageShape]:
    """The decoder's resolutions, without sizes."""
    widths = list(reversed(config["block_out_channels"]))
    in_space, in_time = (int(log2(config[f"{axis}_compression_ratio"])) for axis in ("spatial", "temporal"))
    stages, width = [], widths[0]
    entry, repeat, resnets = (config["latent_channels"], width), (1, 1, 1), [(width, width)] * 2
    attention = config["mid_block_add_attention"]
    for i, channels in enumerate(widths):
        resnets += [(width, channels)] + [(channels, channels)] * config["layers_per_block"]
        width = channels
        space = 2 if i < in_space else 1
        time = 2 if len(widths) - 1 - in_time <= i < len(widths) - 1 else 1
        if space * time > 1:
            stages.append(StageShape(entry=entry, repeat=repeat, resnets=tuple(resnets), attention=attention))
            entry, repeat, resnets, attention = (width, width), (time, space, space), [], False
    return [*stages, StageShape(entry=entry, repeat=repeat, resnets=tuple(resnets), attention=attention)]


def encoder_stages(config: Mapping[str, Any]) -> list[StageShape]:
    """The encoder's resolutions, without sizes."""
    widths = list(config["block_out_channels"])
    in_space, in_time = (int(log2(config[f"{axis}_compression_ratio"])) for axis in ("spatial", "temporal"))
    stages, width = [], widths[0]
    entry, stride, resnets = (config["in_channels"], width), (1, 1, 1), []
    for i, channels in enumerate(widths):
        resnets += [(width, channels)] + [(channels, channels)] * (config["layers_per_block"] - 1)
        width = channels
        space = 2 if i < in_space else 1
        late = len(widths) - 1 - in_time <= i < len(widths) - 1
        time = 2 if (i < in_time if in_time == 3 else late) else 1
        if space * time > 1:
            stages.append(StageShape(entry=entry, stride=stride, resnets=tuple(resnets)))
            entry, stride, resnets = (width, width), (time, space, space), []
    last = (*resnets, (width, width), (width, width))
    attention = config["mid_block_add_attention"]
    return [*stages, StageShape(entry=entry, stride=stride, resnets=last, attention=attention)]


def _decoded(config: Mapping[str, Any], latents: tuple[int, int, int], members: int) -> list[StageShape]:
    """The decoder's resolutions for the rank with the most rows."""
    T, H, W = latents
    return _sized(decoder_stages(config), (T, split_evenly(H, members)[0], W), H)


def _sized(shapes: Sequence[StageShape], source: tuple[int, int, int], height: int) -> list[StageShape]:
    stages = []
    for shape in shapes:
        stages.append(shape.sized(source, height))
        source, height = stages[-1].size, stages[-1].height
    return stages


def _plan(
    name: str,
    stages: Sequence[StageShape],
    out: int,
    members: int,
    itemsize: int,
    memory_bytes: int | None,
    levels: Sequence[Level] | None,
) -> ExactPlan:
    plans = _plans(stages, out, members, itemsize, levels)
    fitting = [plan for plan in plans if memory_bytes is None or plan.peak_bytes <= memory_bytes]
    if not fitting:
        least = min(plan.peak_bytes for plan in plans)
        raise ValueError(
            f"memory_bytes={memory_bytes} is too little to {name} this clip exactly on {members} ranks, "
            f"nearest is {least}"
        )
    return min(fitting, key=lambda plan: plan.flops)  # among equals the first, with the largest slabs


def _plans(
    stages: Sequence[StageShape], out: int, members: int, itemsize: int, levels: Sequence[Level] | None
) -> list[ExactPlan]:
    """A plan for each size of slab and each choice of levels, or for these levels."""
    plans = []
    choices = list(product(*([Level.HOLD] if stage.attention else list(Level) for stage in stages)))
    for slab_bytes in SLAB_BYTES:
        frames = [_slab_frames(stage, slab_bytes, itemsize) for stage in stages]
        for chosen in choices if levels is None else [tuple(levels)]:
            plans.append(
                ExactPlan(
                    stages=tuple(StagePlan(level=lv, frames=f) for lv, f in zip(chosen, frames, strict=True)),
                    peak_bytes=_peak_bytes(stages, chosen, frames, out, members, itemsize),
                    flops=_flops(stages, chosen, out),
                    at_work_bytes=_at_work(stages, frames, out) * itemsize,
                )
            )
    return plans


def _slab_frames(stage: StageShape, slab_bytes: int, itemsize: int) -> int:
    T, h, W = stage.size
    widest = max(stage.entry[1], *(max(pair) for pair in stage.resnets))
    frame = max(1, widest * h * W * itemsize * stage.repeat[0] // stage.stride[0])
    least = stage.stride[0]  # fewer would give slabs without a frame
    return min(max(slab_bytes // frame, least), max(stage.source[0], least))


class _Memory:
    """Elements of one stage's tensors on the rank with the most rows."""

    def __init__(self, stage: StageShape, frames: int) -> None:
        self._stage = stage
        T, h, W = stage.size
        self.clip = T * h * W
        self.frames = min(T, ceil(frames * stage.repeat[0] / stage.stride[0]))
        self._row = h * W
        self._bordered = (h + 2) * (W + 2)

    def slab(self, channels: int) -> int:
        return channels * self.frames * self._row

    def past(self, channels: int) -> int:
        return channels * 2 * self._bordered

    def seen(self, channels: int) -> int:
        return channels * (self.frames + 2) * self._bordered

    def normed(self, channels: int, out: int) -> int:
        """While a norm, an activation and a convolution work on a slab that is counted elsewhere."""
        return max(
            2 * self.slab(channels),
            self.slab(channels) + self.seen(channels),
            self.seen(channels) + max(self.past(channels), self.slab(out)),
        )

    def outer(self, channels: int, out: int) -> int:
        """While the second half of a resnet works, its two inputs counted elsewhere."""
        return max(self.normed(out, out), (2 if channels != out else 1) * self.slab(out))

    def resnet(self, channels: int, out: int) -> int:
        """While a whole resnet works on a slab."""
        return self.slab(channels) + max(self.normed(channels, out), self.slab(out) + self.outer(channels, out))

    @property
    def source(self) -> int:
        """A slab of the stage's input."""
        (_, h, W), up = self._stage.source, self._stage.repeat
        return self._stage.entry[0] * ceil(self.frames * self._stage.stride[0] / up[0]) * h * W

    def entry(self) -> tuple[int, int]:
        """The past that the entering convolution keeps, and what it needs while it works on a slab."""
        past, seen = self._entering
        return past, self.source + seen + max(past, self.slab(self._stage.entry[1]))

    @property
    def _entering(self) -> tuple[int, int]:
        """The past that the entering convolution keeps, and all that it sees of a slab."""
        stage, up = self._stage, self._stage.repeat
        _, h, W = stage.source
        bordered = stage.entry[0] * (h * up[1] + 2) * (W * up[2] + 2)
        past = bordered * (1 + stage.stride[0])
        return past, past + bordered * ceil(self.frames * stage.stride[0] / up[0]) * up[0]

    def at_work(self, channels: int, out: int) -> int:
        """What a convolution reads and writes of a slab."""
        return self.seen(channels) + self.slab(out)

    @property
    def most_at_work(self) -> int:
        """The same, of the stage's largest convolution, or of the attention of its last frame."""
        stage = self._stage
        pairs = [pair for channels, out in stage.resnets for pair in ((channels, out), (out, out))]
        most = max(self._entering[1] + self.slab(stage.entry[1]), *(self.at_work(*pair) for pair in pairs))
        if not stage.attention:
            return most
        T, h, W = stage.size
        channels = stage.resnets[-1][1]
        return max(most, 2 * channels * (T * stage.height + h) * W)

    def attention(self, members: int) -> tuple[int, int]:
        """All keys and values, and what is needed to collect them."""
        T, h, W = self._stage.size
        channels = self._stage.resnets[-1][1]
        own, whole = channels * h * W, channels * self._stage.height * W
        return 2 * T * whole, self.slab(channels) + (6 + 2 * members) * own + 2 * whole


def _peak_bytes(
    stages: Sequence[StageShape],
    levels: Sequence[Level],
    frames: Sequence[int],
    out: int,
    members: int,
    itemsize: int,
) -> int:
    peak = held = 0  # elements; held: the input of the stage
    kept = busy = 0  # of the layers that make this input, where it is not held: their past, and at work
    for stage, level, slab_frames in zip(stages, levels, frames, strict=True):
        memory = _Memory(stage, slab_frames)
        past, entering = memory.entry()
        waiting = memory.source if busy else 0  # slabs of a source that is not held, to be joined
        kept, busy = kept + past, max(busy, entering) + waiting
        channels = stage.entry[1]
        if level == Level.HOLD:
            x = channels * memory.clip
            peak = max(peak, max(held, x) + kept + busy)
            held, kept, busy = x, 0, 0
        for i, (channels, width) in enumerate(stage.resnets):
            inner, result = width * memory.clip, width * memory.clip
            both = memory.past(channels) + memory.past(width)
            first, second = memory.normed(channels, width), memory.outer(channels, width)
            if level == Level.STREAM:
                kept, busy = kept + both, max(busy, memory.resnet(channels, width))
                continue
            if level == Level.INSIDE_AGAIN:
                peak = max(peak, max(held, result) + kept + both + max(busy, memory.resnet(channels, width)))
            else:
                x = memory.slab(channels) if busy else 0
                peak = max(peak, held + inner + kept + memory.past(channels) + max(busy, x + first))
                peak = max(peak, held + inner + kept + memory.past(width) + max(busy, x + second))
            held, kept, busy = result, 0, 0
            if stage.attention and i == _attention_after(stage):
                pairs, collecting = memory.attention(members)
                peak = max(peak, held + pairs + collecting)
        if level == Level.STREAM:
            busy = max(busy, memory.slab(width))
    head = memory.past(width) + max(busy, (memory.slab(width) if busy else 0) + memory.normed(width, out))
    widened = 0 if itemsize >= 4 else 4 * min(PIECE, max(s.size[1] * s.size[2] * s.entry[1] for s in stages))
    head += memory.slab(out)  # the part that was given away last, until the next one is asked for
    return max(peak, held + kept + head) * itemsize + widened + STATISTICS_BYTES


def _at_work(stages: Sequence[StageShape], frames: Sequence[int], out: int) -> int:
    """Elements that the largest single operation reads and writes."""
    memories = [_Memory(stage, slab_frames) for stage, slab_frames in zip(stages, frames, strict=True)]
    head = memories[-1].at_work(stages[-1].resnets[-1][1], out)
    return max(head, *(memory.most_at_work for memory in memories))


def _attention_after(stage: StageShape) -> int:
    """The resnet that the attention follows: the mid-block is first in the decoder, last in the encoder."""
    return 0 if stage.stride == (1, 1, 1) else len(stage.resnets) - 2


def _flops(stages: Sequence[StageShape], levels: Sequence[Level], out: int) -> int:
    total = before = 0  # before: what it takes to make the stage's input once more
    for stage, level in zip(stages, levels, strict=True):
        T, h, W = stage.size
        conv = 2 * 27 * T * h * W
        enter = before + conv * stage.entry[0] * stage.entry[1]
        pairs = [(conv * a * b, conv * b * b + (conv * a * b // 27 if a != b else 0)) for a, b in stage.resnets]
        if level == Level.STREAM:
            for inner, outer in pairs:
                total += enter + enter + inner
                enter += inner + outer
            before = enter
            continue
        total += enter * (1 if level == Level.HOLD else 3)
        total += sum(inner * (2 if level == Level.INSIDE_AGAIN else 1) + outer for inner, outer in pairs)
        before = 0
        if stage.attention:
            total += _attention_flops(stage)
    T, h, W = stages[-1].size
    head = 2 * 27 * T * h * W * stages[-1].resnets[-1][1] * out
    return total + 2 * before + head


def _attention_flops(stage: StageShape) -> int:
    """Four projections, scores and values; frame f sees f + 1 frames of keys."""
    T, h, W = stage.size
    channels, whole = stage.resnets[-1][1], stage.height * W
    return 8 * T * h * W * channels**2 + 4 * channels * h * W * whole * T * (T + 1) // 2
