"""What a side-car tells of a clip's making: who did what under which policy, settings, versions."""

import contextlib
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from videopipe import scheduler as plan
from videopipe.config import Config


def describe_plan(config: Config, topology: plan.Topology) -> dict[str, Any]:
    """Which ranks do what under which policy, for side-car files and `videopipe explain`."""
    return {
        "policy": config.policy,
        "mode": config.schedule.mode,
        "dit_ranks": list(topology.dit_ranks),
        "vae_ranks": list(topology.vae_ranks),
        "decode_ranks": list(topology.decode_ranks),
        "decode_teams": [list(team) for team in topology.decode_teams],
        "decode": config.decode.mode,
        "decode_exact": config.decode.exact,
        "text_encoder_rank": topology.encoder_rank,
        "strategy": config.attention.strategy if len(topology.dit_ranks) > 1 else "none",
        "heads_per_chunk": config.attention.heads_per_chunk,
        "balance": config.attention.balance,
        "co_processing": config.attention.co_processing,
        "cfg_parallel": config.attention.cfg_parallel,
        "ping_pong": config.attention.ping_pong,
        "text": "trimmed" if config.text_trimmed else "padded",
        "queue_capacity": config.queue.capacity,
    }


def decoded_in(settings: Iterable[str]) -> dict[str, Any]:
    """What a side-car's plan tells of the tiles or chunks that a clip was decoded in, where there was a choice."""
    used = list(dict.fromkeys(settings))
    return {"decoded_in": used} if used else {}


def versions() -> dict[str, str]:
    """Versions of what computed a clip."""
    names = ("videopipe", "torch", "diffusers", "transformers", "numpy", "av")
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if "videopipe" not in found:
        from videopipe import __version__

        found["videopipe"] = __version__
    return found
