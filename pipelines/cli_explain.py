"""`videopipe explain`: what a configuration means, before anything is started or loaded."""

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
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object in place of text.")] = False,
) -> None:
    """Resolved configuration, rank map, tokens and heads of each rank, traffic in bytes, weights; starts nothing."""
    flags = {
        "model.weights": model,
        "request.height": height,
        "request.width": width,
        "request.num_frames": num_frames,
        "request.num_inference_steps": num_inference_steps,
        "groups.dit_ranks": dit_ranks,
        "groups.vae_ranks": vae_ranks,
    }
    try:
        resolved = resolve_config(config, overrides or (), flags)
        from pipelines.explain import explain_config

        explanation = explain_config(resolved)
    except (ValueError, OSError) as error:
        raise CommandError(str(error), 2) from error
    typer.echo(explanation.to_json() if as_json else explanation.render_text())
