"""Chooses how large a piece of a clip is decoded at once: the largest whose peak fits the memory at hand."""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from vae_group.retry import RestartableDecoder, with_retry
from vae_group.team import Part, Team

log = logging.getLogger(__name__)

WORKSPACE = 1.0
"""Memory that kernels take for themselves on a GPU, as a multiple of the tensors at work: kernels that want channels
last copy what they read and write. An assumption, not yet measured."""

UNUSABLE = 0.05
"""Share of a GPU's free memory that the allocator loses to fragments."""


SMALLER = 0.75
"""Once memory has run out, at most this share of it is tried: a little less would run out as well."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to decode a clip: in words, the most bytes of tensors alive at once (weights aside), the decoder.

    `at_work_bytes`: the most that a single kernel reads and writes of them, None for all of them.
    """

    name: str
    peak_bytes: int
    decoder: RestartableDecoder
    at_work_bytes: int | None = None

    def needs(self, device: torch.device) -> int:
        """Bytes that must be free on a device."""
        return bytes_needed(self.peak_bytes, device, self.at_work_bytes)


def bytes_needed(tensor_bytes: int, device: torch.device, at_work_bytes: int | None = None) -> int:
    """What must be free on a device so that so many bytes of tensors can be alive in a decode.

    Args:
        at_work_bytes: as in `Setting`.
    """
    if device.type != "cuda":
        return tensor_bytes
    return tensor_bytes + int(WORKSPACE * (tensor_bytes if at_work_bytes is None else at_work_bytes))


def bytes_at_hand(device: torch.device, limit: int, team: Team) -> int:
    """Bytes that every member of a team has for a decode, the same number on all of them.

    Args:
        limit: bytes that a decode may take on a device; 0 for all that is free, which on the CPU is not looked at.
    """
    room = limit or sys.maxsize
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        room = min(room, int((free + cached) * (1 - UNUSABLE)))
    if team.group is None:
        return room
    least = torch.tensor([room], device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=team.group)
    return int(least)


def choose(settings: Sequence[Setting], room: int, device: torch.device) -> int:
    """Which setting to use: the first that fits into `room` bytes.

    Raises:
        ValueError: none fits.
    """
    for i, setting in enumerate(settings):
        if setting.needs(device) <= room:
            return i
    least = min(settings, key=lambda s: s.needs(device))
    need = least.needs(device)
    raise ValueError(
        f"decode.memory_limit: {room} bytes are too few to decode this clip, nearest is {need} bytes, for {least.name}"
    )


def smaller(settings: Sequence[Setting], chosen: int) -> Setting | None:
    """What to go on with when memory has run out: the first that needs much less, else the least; None for nothing."""
    had = settings[chosen].peak_bytes
    less = [setting for setting in settings[chosen + 1 :] if setting.peak_bytes < had]
    much_less = [setting for setting in less if setting.peak_bytes <= SMALLER * had]
    return much_less[0] if much_less else min(less, key=lambda s: s.peak_bytes, default=None)


def decode_within(
    settings: Sequence[Setting], latents: Tensor, team: Team, limit: int, *, fixed: bool = False
) -> Iterator[Part]:
    """Decode with the first setting that fits, and once more with a smaller one if memory runs out all the same.

    Whenever it is not the first, a warning in the log says so. Each part tells the setting it comes from. Where none
    fits into what is free, the least is tried: what is known beforehand is an estimate, and other clips are under way.
    Whether a clip can be decoded at all is asked before it is rendered.

    Args:
        settings: the one that is wanted, then ever smaller ones; the same on every member.
        limit: as for `bytes_at_hand`.
        fixed: the same numbers in every run. The setting is the first that `limit` allows, whatever is free, and it is
            not changed on the way.
    Raises:
        ValueError: `limit` allows for no setting.
        TeamOutOfMemoryError: memory ran out twice, with the smallest setting, or once with a `fixed` one.
    """
    device = latents.device
    room = bytes_at_hand(device, limit, team)
    needs = [setting.needs(device) for setting in settings]
    chosen = choose(settings, limit or sys.maxsize, device)
    if not fixed:
        chosen = next((i for i, need in enumerate(needs) if need <= room), needs.index(min(needs)))
    if chosen or needs[chosen] > room:
        log.warning(
            "decoding in %s, which needs %.2f GB: %s would need %.2f GB, there are %.2f GB",
            settings[chosen].name,
            needs[chosen] / 1e9,
            settings[0].name,
            needs[0] / 1e9,
            room / 1e9,
        )
    decoder = _telling(settings[chosen])
    second = None if fixed else smaller(settings, chosen)
    if second is not None:
        decoder = with_retry(decoder, _telling(second), f"{second.name} instead of {settings[chosen].name}")
    yield from decoder(latents, team)


def _telling(setting: Setting) -> RestartableDecoder:
    """Its decoder, whose parts say how they were decoded."""

    def decode(latents: Tensor, team: Team, first_frame: int = 0) -> Iterator[Part]:
        for part in setting.decoder(latents, team, first_frame):
            told = replace(part, setting=setting.name)
            del part  # whoever takes it decides how long its video lives
            yield told
            del told

    return decode
