"""`make demo`: short clips through one DiT rank and one VAE rank (or more) on any CPU, in about half a minute."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli_errors import CommandError
from pipelines.cli_render import check_everything, render_all, resolve_config
from pipelines.launch import LocalLauncher
from pipelines.prompts import RequestDefaults
from videopipe.geometry import VideoSpec
from videopipe.records import VideoRequest, default_id

PROMPTS = (
    "a red fox crosses fresh snow",
    "a small blue boat on a stormy sea",
    "white clouds drift over a quiet city at night",
    "two green circles move left",
    "a black cat sleeps on an orange sofa",
    "an old man walks up a narrow street in the rain",
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="folder for clips, trace and checkpoint")] = Path("out/demo"),
    clips: Annotated[int, typer.Option(min=1, help="how many clips")] = len(PROMPTS),
    height: Annotated[int, typer.Option(help="rows, px")] = 128,
    width: Annotated[int, typer.Option(help="columns, px")] = 192,
    num_frames: Annotated[int, typer.Option(help="frames of a clip")] = 17,
    steps: Annotated[int, typer.Option(help="denoising steps; the default takes about as long as decoding")] = 48,
    dit_ranks: Annotated[int, typer.Option(help="ranks that denoise")] = 1,
    vae_ranks: Annotated[int, typer.Option(help="ranks that decode; 0: the DiT ranks do")] = 1,
    seed: Annotated[int, typer.Option(help="seed of the first clip")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="paths only")] = False,
) -> None:
    """Render clips with a tiny HunyuanVideo of random weights: everything is real except what it has learned."""
    try:
        run_demo(
            output,
            prompts=[PROMPTS[index % len(PROMPTS)] for index in range(clips)],
            spec=VideoSpec(height=height, width=width, num_frames=num_frames),
            steps=steps,
            dit_ranks=dit_ranks,
            vae_ranks=vae_ranks,
            seed=seed,
            quiet=quiet,
        )
    except CommandError as error:
        print(f"demo: {error}", file=sys.stderr)
        raise typer.Exit(error.code) from None
    except (ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def run_demo(
    output: Path,
    *,
    prompts: list[str],
    spec: VideoSpec,
    steps: int,
    dit_ranks: int,
    vae_ranks: int,
    seed: int,
    quiet: bool = False,
    launcher: LocalLauncher | None = None,
) -> list[Path]:
    """Make the checkpoint if it is not there, render, draw a contact sheet; the paths of the clips.

    Raises:
        ValueError, OSError: what was asked for cannot be rendered or written; nothing was started.
        CommandError: the run failed.
    """
    checkpoint = output / "checkpoint"
    flags = {
        "model.weights": str(checkpoint),
        "groups.dit_ranks": dit_ranks,
        "groups.vae_ranks": vae_ranks,
        "output.fps": spec.fps,
    }
    config = resolve_config("hunyuan_tiny_cpu", (), flags)
    defaults = RequestDefaults(height=spec.height, width=spec.width, num_frames=spec.num_frames)
    requests = [
        VideoRequest(
            id=default_id(index, prompt, seed + index),
            prompt=prompt,
            spec=spec,
            num_inference_steps=steps,
            guidance_scale=defaults.guidance_scale,
            seed=seed + index,
        )
        for index, prompt in enumerate(prompts)
    ]
    if not (checkpoint / "model_index.json").is_file():
        from tools.make_tiny_checkpoint import make_hunyuan_video

        if not quiet:
            print(f"writing a tiny random checkpoint: {checkpoint}", file=sys.stderr)
        make_hunyuan_video(checkpoint)
    trace = output / "trace.json"
    check_everything(config, requests, output, trace)
    paths = render_all(config, requests, output, trace=trace, quiet=quiet, launcher=launcher)

    from videopipe.media import contact_sheet, read_video

    sheet = contact_sheet([read_video(path) for path in sorted(paths)], output / "contact_sheet.png")
    if not quiet:
        print(
            f"\nclips and their side-car files: {output}/*.mp4, *.json\n"
            f"frames of all clips:            {sheet}\n"
            f"who did what when:              {trace}\n"
            "The weights are random: expect moving texture, not pictures of the prompts. All else is the real thing:\n"
            "text encoders, DiT, VAE, queue and files, on the ranks of the table above.",
            file=sys.stderr,
        )
    return paths


if __name__ == "__main__":
    app()
