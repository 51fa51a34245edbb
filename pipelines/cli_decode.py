"""`videopipe decode`: latents that lie on disk to a clip."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli_errors import CommandError
from pipelines.cli_render import ModelOption, SetOption, check_writable, flags_as_overrides, one_line


def decode(
    latents: Annotated[Path, typer.Argument(metavar="LATENTS", help="<name>.safetensors, with <name>.json beside it.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Where the clip goes.")] = Path("out"),
    output_format: Annotated[str | None, typer.Option(help="mp4, png or npy.")] = None,
    model: ModelOption = None,
    overrides: SetOption = None,
) -> None:
    """Decode latents that were kept because a clip could not be written, or that are latent output.

    The side-car beside them says how: model, precision, tiling, format. Needs the VAE alone; starts no ranks.
    """
    from pipelines.decode import decode_latents

    flags = {"model.weights": model, "output.format": output_format}
    try:
        check_writable(output_dir)
        result = decode_latents(latents, [*(overrides or ()), *flags_as_overrides(flags)])
    except (ValueError, OSError) as error:
        raise CommandError(one_line(error), 2) from error
    try:
        typer.echo(result.save_to(output_dir))
    except OSError as error:
        raise CommandError(one_line(error), 1) from error
