"""`videopipe explain`: what a configuration means, and with `--calibrate` what its ranks measure."""

from typing import Annotated

import typer

from pipelines.cli_errors import CommandError
from pipelines.cli_render import (
    DitRanksOption,
    FramesOption,
    HeightOption,
    ModelOption,
    SetOption,
    StepsOption,
    VaeRanksOption,
    WidthOption,
    resolve_config,
)


def explain(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="TOML file, or the name of a bundled one.")],
    model: ModelOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    num_frames: FramesOption = None,
    num_inference_steps: StepsOption = None,
    dit_ranks: DitRanksOption = None,
    vae_ranks: VaeRanksOption = None,
    overrides: SetOption = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Start the ranks, measure what is 'auto', keep it, show the times.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object in place of text.")] = False,
) -> None:
    """Resolved configuration, rank map, tokens and heads of each rank, traffic in bytes, weights, stored times.

    Starts nothing without --calibrate.
    """
    flags = {
        "model.weights": model,
        "request.height": height,
        "request.width": width,
        "request.num_frames": num_frames,
        "request.num_inference_steps": num_inference_steps,
        "groups.dit_ranks": dit_ranks,
        "groups.vae_ranks": vae_ranks,
    }
    from pipelines.explain import explain_config
    from pipelines.faults import RankError

    try:
        resolved = resolve_config(config, overrides or (), flags)

        explanation = explain_config(resolved, calibrate)
    except RankError as error:
        raise CommandError(str(error), 1) from error
    except (ValueError, OSError) as error:
        raise CommandError(str(error), 2) from error
    typer.echo(explanation.to_json() if as_json else explanation.render_text())
