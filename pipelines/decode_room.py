"""Whether the decoding ranks have the memory for a clip: asked when it is submitted, before anything is rendered."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from pipelines.decode_choices import Choice, Latent
from videopipe.config import Config
from videopipe.geometry import LatentGeometry, VideoSpec, nearest_multiple
from videopipe.records import VideoRequest

SCALES = (7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16)  # of a clip's sides, tried for the nearest that fits


class DecodeRoom:
    """What the decoding ranks can decode, each of them alone or as a team.

    Args:
        choices: the ways to decode latents of (T', H', W'), the wanted one first (`families.Family.decode_choices`).
        room_bytes: free for a decode on each decoding rank, once its parts are loaded.
        device: of the decoding ranks.
    """

    def __init__(
        self,
        config: Config,
        geometry: LatentGeometry,
        choices: Callable[[Latent], Iterable[Choice[Any]]],
        room_bytes: Mapping[int, int],
        device: torch.device,
    ) -> None:
        self._geometry = geometry
        self._choices = choices
        self._device = device
        self._rank = min(room_bytes, key=room_bytes.__getitem__)
        self._free = room_bytes[self._rank]
        self._limit = config.decode.memory_limit or sys.maxsize
        self._fixed = config.schedule.mode == "deterministic"
        self._fitting: set[Latent] = set()  # clips of a batch are mostly of one size

    def check(self, request: VideoRequest, where: str = "") -> None:
        """Refuse a clip that no setting can decode here.

        Args:
            where: prefix of the field's path in the message, such as `"requests[3]."`.
        Raises:
            ValueError: names the field, the value and the nearest valid value.
        """
        spec, latent = request.spec, self._latent(request.spec)
        if latent in self._fitting or self._fits(latent):
            self._fitting.add(latent)
            return
        needs = [(choice.needs(self._device), choice.name) for choice in self._choices(latent)]
        least, name = min(needs)
        clip = f"{request.id!r}, {spec.num_frames} frames of {spec.height}x{spec.width} px"
        if least > self._limit and least <= self._free:
            raise ValueError(
                f"decode.memory_limit={self._limit} bytes are too few to decode {clip}, nearest is {least}, for {name}"
            )
        if least <= min(self._limit, self._free):  # then a setting that is not to be chosen by itself
            allowed, wanted = next((need, name) for need, name in needs if need <= self._limit)
            limit = 0 if self._limit == sys.maxsize else self._limit
            raise ValueError(
                f"decode.memory_limit={limit} allows for {wanted} to decode {clip}, which needs {allowed} bytes, but "
                f"rank {self._rank} has {self._free}; schedule.mode='deterministic' takes nothing smaller by itself, "
                f"nearest is {self._free}"
            )
        room = min(self._limit, self._free)
        raise ValueError(
            f"{where}num_frames={spec.num_frames} at height={spec.height} width={spec.width} cannot be decoded: needs "
            f"{least} bytes at least, for {name}, rank {self._rank} has {room}; nearest is {self._nearest(spec, least)}"
        )

    def _nearest(self, spec: VideoSpec, need: int) -> str:
        """The most frames of this size that fit, or else the largest size for so many frames."""
        g = self._geometry
        counts = [1 + (k * g.patch_t - 1) * g.stride_t for k in range(1, g.latent_frames(spec.num_frames) // g.patch_t)]
        fitting, above = 0, len(counts)
        while fitting < above:  # counts[:fitting] fit
            middle = (fitting + above) // 2
            frames = counts[middle]
            fits = self._fits(self._latent(VideoSpec(height=spec.height, width=spec.width, num_frames=frames)))
            fitting, above = (middle + 1, above) if fits else (fitting, middle)
        if fitting:
            return f"num_frames={counts[fitting - 1]}"
        for height, width in self._smaller(spec):
            if self._fits(self._latent(VideoSpec(height=height, width=width, num_frames=spec.num_frames))):
                return f"height={height} width={width}"
        return f"a device with {need} bytes free"

    def _smaller(self, spec: VideoSpec) -> Iterator[tuple[int, int]]:
        multiple = self._geometry.multiple_s
        for scale in SCALES:
            yield (
                nearest_multiple(int(spec.height * scale), multiple),
                nearest_multiple(int(spec.width * scale), multiple),
            )

    def _latent(self, spec: VideoSpec) -> Latent:
        _, _, frames, rows, cols = self._geometry.latent_shape(spec)
        return frames, rows, cols

    def _fits(self, latent: Latent) -> bool:
        needs = (choice.needs(self._device) for choice in self._choices(latent))
        if self._fixed:
            return next((need <= self._free for need in needs if need <= self._limit), False)
        return any(need <= min(self._limit, self._free) for need in needs)
