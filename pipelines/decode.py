"""Decodes latents from a file in this process: what was kept of a clip that could not be written, or latent output."""

import datetime
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from pipelines.checkpoint import open_checkpoint
from pipelines.decode_room import DecodeRoom
from pipelines.families import load_family
from pipelines.side_car import decoded_in, versions
from pipelines.start import resolve_device
from vae_group.decode import to_host
from vae_group.memory import bytes_at_hand
from vae_group.team import Team
from videopipe.config import load_config
from videopipe.media import latents_hash, read_latents, read_side_car, side_car_path
from videopipe.records import StageTime
from videopipe.rendering import RenderResult, check_output
from videopipe.runtime import start_runtime


def decode_latents(path: Path, overrides: Iterable[str] = ()) -> RenderResult:
    """The clip of `<stem>.safetensors`, as `<stem>.json` beside it tells to decode it: the same VAE and settings.

    Loads the VAE alone and starts no ranks.

    Args:
        overrides: `path=value` strings that change the configuration of the side-car, such as `model.weights` where
            the checkpoint has moved; latent output becomes mp4 where they do not say otherwise.
    Returns:
        Frames, to be saved.
    Raises:
        ValueError: the file is not what its side-car tells, the configuration cannot run here, there is no room for the
            clip, or the format asked for cannot hold it.
        OSError: a file cannot be read.
    """
    side_car = read_side_car(side_car_path(path.with_suffix("")))
    latents, _ = read_latents(path)
    if latents_hash(latents) != side_car.latents_sha256:
        raise ValueError(f"{path}: not the latents that its side-car tells of, their hash differs")
    config = load_config(side_car.config, overrides)
    if config.output.format == "latent":
        config = load_config(side_car.config, [*overrides, "output.format=mp4"])
    check_output(config.output, side_car.request.spec)
    device = torch.device(resolve_device(config))
    runtime = start_runtime(rank=0, world_size=1, dit_ranks=(0,), device=device, store=None, decode_teams=((0,),))
    checkpoint = open_checkpoint(config.model)
    family = load_family(config.model.family)
    decoder = family.load_decoder(checkpoint, config, runtime)
    choices = partial(family.decode_choices, decoder.memory_facts(), config, 1)
    rooms = {0: bytes_at_hand(device, 0, Team())}
    DecodeRoom(config, family.facts(checkpoint).geometry, choices, rooms, device).check(side_car.request)
    begin = time.monotonic()
    parts, settings = list[Tensor](), list[str]()
    for part in decoder.parts(latents):
        parts.append(to_host(decoder.to_frames(part.video, torch.uint8)))
        settings.append(part.setting)
        del part  # its video need not be there while the next part is decoded
    decode = StageTime(stage="decode", rank=0, seconds=round(time.monotonic() - begin, 6))
    stages = (*(stage for stage in side_car.stages if stage.stage not in ("decode", "write")), decode)
    decoded = msgspec.structs.replace(
        side_car,
        versions=versions(),
        plan=side_car.plan | decoded_in(filter(None, settings)),
        config=msgspec.to_builtins(config),
        stages=stages,
        finished_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    frames = torch.cat(parts).numpy()
    return RenderResult(
        request_id=side_car.request.id, frames=frames, latents=None, side_car=decoded, output=config.output
    )
