"""`make demo`: clips of the bundled model through one DiT rank and one VAE rank, and what is seen in them.

The prompts are held-out combinations of MovingShapes, which the model never saw in training. Every attribute that a
prompt names is read back from the frames of the finished file by a detector that has no network.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from pipelines.cli_errors import CommandError
from pipelines.cli_render import check_everything, render_all, resolve_config
from pipelines.launch import LocalLauncher
from tools.moving_shapes import Detector, Reading, Scene, caption, scene_at
from tools.prompt_sheet import SheetRow, prompt_sheet
from videopipe.config import Config
from videopipe.records import VideoRequest, default_id

CONFIG = "moving_shapes_cpu"
CLIPS = 8
_OF_OBJECTS = ("size", "colour", "shape", "motion")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="folder for clips, trace and contact sheet")] = Path("out/demo"),
    clips: Annotated[int, typer.Option(min=1, help="how many clips")] = CLIPS,
    config: Annotated[str, typer.Option(help="name or file of the configuration")] = CONFIG,
    weights: Annotated[str | None, typer.Option(help="another pipeline directory trained on MovingShapes")] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps")] = None,
    dit_ranks: Annotated[int, typer.Option(help="ranks that denoise")] = 1,
    vae_ranks: Annotated[int, typer.Option(help="ranks that decode; 0: the DiT ranks do")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="another seed: other prompts, other noise")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="paths only")] = False,
) -> None:
    """Render prompts with the bundled model, and say which of their words can be read back from the frames."""
    flags = {
        "model.weights": weights,
        "request.num_inference_steps": steps,
        "groups.dit_ranks": dit_ranks,
        "groups.vae_ranks": vae_ranks,
    }
    try:
        run_demo(output, config=resolve_config(config, (), flags), clips=clips, seed=seed, quiet=quiet)
    except CommandError as error:
        print(f"demo: {error}", file=sys.stderr)
        raise typer.Exit(error.code) from None
    except (ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def run_demo(
    output: Path,
    *,
    config: Config,
    clips: int,
    seed: int,
    quiet: bool = False,
    launcher: LocalLauncher | None = None,
) -> list[Path]:
    """Render, read the files back, draw a contact sheet and tell what was seen; the paths of the clips.

    Raises:
        ValueError, OSError: what was asked for cannot be rendered or written; nothing was started.
        CommandError: the run failed.
    """
    scenes = [scene_at(seed, index, split="held_out") for index in range(clips)]
    prompts = [caption(scene, np.random.default_rng([seed, index])) for index, scene in enumerate(scenes)]
    requests = [_request(config, index, prompt, seed + index) for index, prompt in enumerate(prompts)]
    trace = output / "trace.json"
    check_everything(config, requests, output, trace)
    paths = sorted(render_all(config, requests, output, trace=trace, quiet=quiet, launcher=launcher))

    from videopipe.media import read_video

    rows, findings = [], []
    detector = Detector()
    for path, scene, prompt in zip(paths, scenes, prompts, strict=True):
        frames = read_video(path)
        found = compare(scene, detector(frames))
        findings.append(found)
        remark = f"seen: {found.seen}. {found.verdict}"
        rows.append(SheetRow(frames=frames, prompt=prompt, remark=remark, good=not found.missing))
    sheet = prompt_sheet(rows, output / "contact_sheet.png")
    if not quiet:
        lines = ["", "Asked for, and seen in the frames of the files by tools.moving_shapes.Detector:"]
        for prompt, found in zip(prompts, findings, strict=True):
            lines += [f"  {prompt}", f"      seen: {found.seen}. {found.verdict}"]
        right, total = sum(f.right for f in findings), sum(f.total for f in findings)
        lines += [
            f"{right} of {total} attributes are as the prompts say, of combinations that were never trained on.",
            "",
            f"clips and their side-car files: {output}/*.mp4, *.json",
            f"prompts beside their frames:    {sheet}",
            f"who did what when:              {trace}",
        ]
        print("\n".join(lines), file=sys.stderr)
    return paths


def _request(config: Config, index: int, prompt: str, seed: int) -> VideoRequest:
    r = config.request
    return VideoRequest(
        id=default_id(index, prompt, seed),
        prompt=prompt,
        negative_prompt=r.negative_prompt,
        spec=config.spec(),
        num_inference_steps=r.num_inference_steps,
        guidance_scale=r.guidance_scale,
        true_cfg_scale=r.true_cfg_scale,
        seed=seed,
        max_sequence_length=r.max_sequence_length,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a clip shows of its scene: `seen` in words, `right` of `total` attributes, and what is `missing` by name."""

    seen: str
    right: int
    total: int
    missing: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """`8 of 9 attributes: not the shape of the left object.`"""
        missing = f": not {', '.join(self.missing)}" if self.missing else ""
        return f"{self.right} of {self.total} attributes{missing}."


def compare(scene: Scene, reading: Reading) -> Finding:
    """Which attributes of a scene were read: four of each object and the background; an abstention is wrong.

    With another number of objects than the scene has, nothing can be said of any of them.
    """
    missing = []
    count = len(scene.objects)
    right = total = len(_OF_OBJECTS) * count + 1
    if len(reading.objects) != count:
        missing.append("the object" if count == 1 else f"the {count} objects")
        right -= len(_OF_OBJECTS) * count
    else:
        for i, thing in enumerate(scene.objects):
            whose = "" if count == 1 else (" of the left object", " of the right object")[i]
            for name in _OF_OBJECTS:
                if getattr(reading.objects[i], name) != getattr(thing, name):
                    missing.append(f"the {name}{whose}")
                    right -= 1
    if reading.background != scene.background:
        missing.append("the background")
        right -= 1
    things = [" ".join(getattr(thing, name) or "?" for name in _OF_OBJECTS) for thing in reading.objects]
    seen = f"{' and '.join(things) or 'no object'} on {reading.background or '?'}"
    return Finding(seen=seen, right=right, total=total, missing=tuple(missing))


if __name__ == "__main__":
    app()
