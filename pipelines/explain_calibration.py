"""The part of `videopipe explain` about measured times: what is stored, or what `--calibrate` measures."""

from collections.abc import Sequence

import torch

from pipelines.calibration import Calibrations, Choice
from pipelines.calibration_cache import setup_of
from pipelines.families import ModelFacts
from pipelines.pipeline import VideoPipeline
from pipelines.start import resolve_device
from videopipe.arrangement import Calibration, Timing
from videopipe.config import Config, ConfigError
from videopipe.records import VideoRequest
from videopipe.runtime import device_name

BUDGET_S = 32.0
"""About how long `--calibrate` measures where layers take 50 ms: longer than before a clip, since somebody asked."""


def stored(config: Config, facts: ModelFacts, request: VideoRequest) -> tuple[Choice, Calibration | None] | None:
    """What a run on this machine would choose for the request, and the measurement of its size if there is one.

    Returns:
        None where the configuration leaves nothing to measure.
    """
    if not config.calibrates:
        return None
    kind = resolve_device(config)
    devices = [device_name(torch.device(kind, rank if kind == "cuda" else 0)) for rank in range(config.world_size)]
    known = Calibrations(config, facts, setup_of(config, facts, devices, hosts=1))
    choice = known.choose(request)
    return choice, None if choice.shape is None else known.get(choice.shape)


def measure(config: Config, request: VideoRequest) -> Calibration:
    """Start the ranks, measure for the request whatever is stored, and store the result.

    Raises:
        ConfigError: the configuration cannot run here, or leaves nothing to measure.
        RankError: a rank was lost.
    """
    if not config.calibrates:
        raise ConfigError(
            "--calibrate has nothing to measure: of attention.heads_per_chunk, attention.balance, "
            "attention.co_processing and attention.ping_pong none is 'auto' where several ranks could share heads and "
            "schedule.mode is 'fast'; "
            "nearest is --set attention.heads_per_chunk=auto"
        )
    with VideoPipeline.start(config) as pipe:
        return pipe.engine.calibrate(request, BUDGET_S)


def render(choice: Choice, calibration: Calibration | None) -> list[str]:
    """For people: the ways that were timed, and what is chosen."""
    lines = ["", "# how heads travel"]
    if calibration is None:
        lines.append(
            "times         none are stored for this size: the first clip measures them, or `videopipe explain "
            "CONFIG --calibrate`"
        )
    else:
        shape = calibration.shape
        guidance = {"none": "", "halves": ", a branch on each half", "pair": ", two branches"}[shape.guidance]
        near = ", the nearest size that was measured" if choice.source == "nearest" else ""
        lines += [
            (
                f"times         of {shape.num_video:,} video and {shape.num_text} text tokens, batch {shape.rows}"
                f"{guidance}{near}; measured in {calibration.seconds:.1f} s"
            ),
            f"linear        {_ms(calibration.linear_s)}: a layer without attention and exchange",
            "",
            *_table(calibration.timings),
            "",
        ]
    lines.append(f"chosen        {choice.ways[0].describe()}")
    lent = [way for way in choice.ways if way.helpers]
    lines += [f"lent          {way.describe()}" for way in lent] or ["lent          no VAE rank"]
    return lines


def _table(timings: Sequence[Timing]) -> list[str]:
    rows = [["way", "attention", "exchange", "assist", "layer", "to plain", "p10-p90", "runs"]]
    for timing in timings:
        seconds, ratios = sorted(timing.layer_s), sorted(timing.ratios)
        low, high = (ratios[round(share * (len(ratios) - 1))] for share in (0.1, 0.9))
        parts = [_ms(part) for part in (timing.attention_s, timing.exchange_s, timing.assist_s)]
        rows.append(
            [
                timing.arrangement.describe(),
                *parts,
                _ms(seconds[len(seconds) // 2]),
                f"{timing.ratio:.2f}",
                f"{low:.2f}-{high:.2f}",
                str(len(ratios)),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3g} ms"
