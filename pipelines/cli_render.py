"""`videopipe render`: prompts to files. Everything is checked before a weight is read or a rank is started."""

import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from pipelines.bundled import find_config
from pipelines.cli_errors import CommandError
from pipelines.prompts import RequestDefaults, read_prompt_file
from videopipe.config import Config, load_config
from videopipe.records import OutputFormat, VideoRequest, default_id

if TYPE_CHECKING:
    from pipelines.display import Display
    from pipelines.launch import LocalLauncher

SUFFIXES: dict[OutputFormat, str] = {"mp4": ".mp4", "png": "", "npy": ".npy", "latent": ".safetensors"}

ConfigOption = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE|NAME", help="TOML file, or the name of a bundled configuration."),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "--model-path", metavar="DIR|HUB_ID", help="Checkpoint in diffusers' layout."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override any key of the configuration; may be repeated."),
]
HeightOption = Annotated[int | None, typer.Option("--height", help="Rows, px.")]
WidthOption = Annotated[int | None, typer.Option("--width", help="Columns, px.")]
FramesOption = Annotated[int | None, typer.Option("--num-frames", "--video-length", help="Frames of a clip.")]
StepsOption = Annotated[
    int | None, typer.Option("--num-inference-steps", "--infer-steps", "--num-sampling-steps", help="Denoising steps.")
]
DitRanksOption = Annotated[int | None, typer.Option("--dit-ranks", "--dit-gpus", help="Ranks that denoise.")]
VaeRanksOption = Annotated[
    int | None, typer.Option("--vae-ranks", "--vae-gpus", help="Ranks that decode; 0 decodes on the DiT ranks.")
]


def render(
    prompt_words: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="What to render.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="The same as PROMPT.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", "--prompt-path", help="Many prompts: .txt, .csv or .jsonl.")
    ] = None,
    model: ModelOption = None,
    config: ConfigOption = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise; prompt k of a file gets SEED + k.")] = None,
    height: HeightOption = None,
    width: WidthOption = None,
    num_frames: FramesOption = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second of the file.")] = None,
    num_inference_steps: StepsOption = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", "--embedded-cfg-scale", help="Guidance of distilled models.")
    ] = None,
    true_cfg_scale: Annotated[
        float | None, typer.Option(help="Above 1, with a negative prompt: a second evaluation for each step.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the clip should not show.")] = None,
    dit_ranks: DitRanksOption = None,
    vae_ranks: VaeRanksOption = None,
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", "--output-path", "--save-path", help="Where the clips go.")
    ] = Path("out"),
    output_format: Annotated[str | None, typer.Option(help="mp4, png, npy or latent.")] = None,
    overrides: SetOption = None,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace of every rank.")] = None,
    record_latents: Annotated[
        bool, typer.Option("--record-latents", help="Also <id>.steps: prediction and latents of every denoising step.")
    ] = False,
    record_blocks: Annotated[
        int | None, typer.Option(help="In these also the outputs of N blocks, evenly chosen; --record-latents with it.")
    ] = None,
    request_id: Annotated[str | None, typer.Option("--id", help="Name of the files of a single prompt.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no summary.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="With an error: the traceback of the rank.")] = False,
) -> None:
    """Render one prompt, or a file of prompts, into OUTPUT_DIR: <id>.mp4 and <id>.json for each.

    Built-in defaults < --config < --set < the other flags < what a line of the prompt file says of its own request.
    Options may be written with _ in place of -. Finished files of the same name are replaced. The paths of finished
    clips go to standard output, progress and summary to standard error.
    """
    flags = {
        "model.weights": model,
        "request.seed": seed,
        "request.height": height,
        "request.width": width,
        "request.num_frames": num_frames,
        "output.fps": fps,
        "request.num_inference_steps": num_inference_steps,
        "request.guidance_scale": guidance_scale,
        "request.true_cfg_scale": true_cfg_scale,
        "request.negative_prompt": negative_prompt,
        "groups.dit_ranks": dit_ranks,
        "groups.vae_ranks": vae_ranks,
        "output.format": output_format,
        "output.record_latents": record_latents or None,
        "output.record_blocks": record_blocks,
    }
    try:
        resolved = resolve_config(config, overrides or (), flags)
        if serves_under_torchrun():
            from pipelines.pipeline import VideoPipeline

            VideoPipeline.start(resolved)  # a rank of rank 0's run: never returns
            raise AssertionError("a serving rank does not come back")
        requests = gather_requests(resolved, prompt_words, prompt, prompt_file, request_id)
        check_everything(resolved, requests, output_dir, trace)
    except (ValueError, OSError) as error:
        raise CommandError(one_line(error), 2) from error
    render_all(resolved, requests, output_dir, trace=trace, quiet=quiet, verbose=verbose)


def resolve_config(name: str | None, overrides: Sequence[str], flags: Mapping[str, Any]) -> Config:
    """The configuration from file, `--set` and flags; flags that were not given are None.

    Raises:
        ConfigError: names the path, the value and the nearest valid value.
    """
    return load_config(None if name is None else find_config(name), [*overrides, *flags_as_overrides(flags)])


def flags_as_overrides(flags: Mapping[str, Any]) -> list[str]:
    """`path=value` for each flag that was given; those that were not are None."""
    return [f"{path}={msgspec.json.encode(value).decode()}" for path, value in flags.items() if value is not None]


def serves_under_torchrun() -> bool:
    """Whether torchrun started this process as another rank than 0."""
    return "LOCAL_RANK" in os.environ and os.environ.get("RANK", "0") != "0"


def gather_requests(
    config: Config, prompt_words: str | None, prompt: str | None, prompt_file: Path | None, request_id: str | None
) -> list[VideoRequest]:
    """The requests of the one place that prompts come from.

    Raises:
        ValueError: none or several such places, an empty prompt, or a mistake in the file, named with its line.
        OSError: the file cannot be read.
    """
    given = [
        name
        for name, value in (("PROMPT", prompt_words), ("--prompt", prompt), ("--prompt-file", prompt_file))
        if value is not None
    ]
    if len(given) != 1:
        what = f"{' and '.join(given)} are given" if given else "no prompt is given"
        raise ValueError(f"{what}, need exactly one of PROMPT, --prompt and --prompt-file")
    r = config.request
    if prompt_file is not None:
        if request_id is not None:
            raise ValueError(f"--id {request_id!r} names a single prompt; in a prompt file give each line its own id")
        defaults = RequestDefaults(**msgspec.structs.asdict(r), fps=config.output.fps)
        return read_prompt_file(prompt_file, defaults)
    text = prompt_words if prompt_words is not None else prompt
    assert text is not None
    if not text.strip():
        raise ValueError(f"prompt={text!r} is empty")
    request = VideoRequest(
        id=default_id(0, text, r.seed) if request_id is None else request_id,
        prompt=text,
        negative_prompt=r.negative_prompt,
        spec=config.spec(),
        num_inference_steps=r.num_inference_steps,
        guidance_scale=r.guidance_scale,
        true_cfg_scale=r.true_cfg_scale,
        seed=r.seed,
        max_sequence_length=r.max_sequence_length,
    )
    request.check()
    return [request]


def check_everything(config: Config, requests: Sequence[VideoRequest], output_dir: Path, trace: Path | None) -> None:
    """Refuse what could not be rendered or written, before a weight is read or a rank is started.

    Raises:
        ValueError: names the field, the value and the nearest valid value.
        OSError: the output cannot be written there.
    """
    check_file_names(config.output.format, requests, output_dir, trace, steps=config.output.records_steps)
    check_writable(output_dir)
    if trace is not None:
        check_writable(trace.parent)

    from pipelines.checkpoint import open_checkpoint
    from pipelines.checks import check_request
    from pipelines.families import load_family
    from pipelines.start import check_attention, check_devices, resolve_device
    from videopipe.rendering import check_output

    family = load_family(config.model.family)
    family.check_config(config)
    facts = family.facts(open_checkpoint(config.model))
    for request in requests:
        where = f"{request.id}: " if len(requests) > 1 else ""
        check_request(family, config, facts, request, where)
        check_output(config.output, request.spec, where)
        latent_bytes = 4 * math.prod(facts.geometry.latent_shape(request.spec))
        if latent_bytes > config.queue.capacity_bytes:
            raise ValueError(
                f"{where}queue.capacity_bytes={config.queue.capacity_bytes} cannot hold the latents, "
                f"nearest is {latent_bytes}"
            )
    check_attention(config, facts, resolve_device(config))
    if "LOCAL_RANK" not in os.environ:  # torchrun's number of ranks is checked where the ranks join
        check_devices(config, resolve_device(config), None)


def check_file_names(
    form: OutputFormat,
    requests: Sequence[VideoRequest],
    output_dir: Path,
    trace: Path | None,
    *,
    steps: bool = False,
) -> None:
    """Refuse requests that would overwrite each other's files, or the trace.

    Raises:
        ValueError: names the request and the file.
    """
    owners: dict[Path, str] = {} if trace is None else {trace.absolute(): "--trace"}
    for request in requests:
        for suffix in (SUFFIXES[form], ".json", *((".steps",) if steps else ())):
            path = (output_dir / (request.id + suffix)).absolute()
            if path in owners:
                raise ValueError(f"id={request.id!r} would write {path.name}, as {owners[path]!r} does")
            owners[path] = request.id


def check_writable(folder: Path) -> None:
    """Create the folder and a file in it, which is removed again.

    Raises:
        OSError: cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".videopipe-"):
        pass


def render_all(
    config: Config,
    requests: Sequence[VideoRequest],
    output_dir: Path,
    *,
    trace: Path | None = None,
    quiet: bool = False,
    verbose: bool = False,
    launcher: "LocalLauncher | None" = None,
) -> list[Path]:
    """Start the ranks, render, write; the paths of the clips in the order in which they finished.

    Args:
        trace: where to write a Chrome trace, also when the run fails.
        quiet: no progress and no summary.
        verbose: an error brings the traceback of its rank.
        launcher: starts the ranks, see `VideoPipeline.from_pretrained`.

    Raises:
        CommandError: the ranks could not start (2), a rank was lost or a clip could not be written (1), Ctrl-C (130);
            clips that were finished before are not touched.
    """
    from pipelines.display import make_display
    from pipelines.faults import RankError

    paths: list[Path] = []
    with make_display(requests, quiet=quiet) as display:
        try:
            summary = _render_into(config, requests, output_dir, trace, display, paths, launcher)
        except RankError as error:
            details = error.details if verbose else ""
            raise CommandError(f"{error}; {_finished(paths, requests, output_dir)}", 1, details) from error
        except ValueError as error:  # devices and the like, from the pipeline's own checks
            raise CommandError(one_line(error), 2) from error
        except OSError as error:
            raise CommandError(f"{one_line(error)}; {_finished(paths, requests, output_dir)}", 1) from error
        except KeyboardInterrupt:
            raise CommandError(f"interrupted; {_finished(paths, requests, output_dir)}", 130) from None
    if not quiet:
        print(summary, file=sys.stderr)
    if len(paths) < len(requests):
        raise CommandError(f"{_finished(paths, requests, output_dir)}, the others could not be written", 1)
    return paths


def _render_into(
    config: Config,
    requests: Sequence[VideoRequest],
    output_dir: Path,
    trace: Path | None,
    display: "Display",
    paths: list[Path],
    launcher: "LocalLauncher | None",
) -> str:
    """Render and write; appends to `paths` as clips finish. What to tell the user at the end."""
    from pipelines.pipeline import VideoPipeline
    from videopipe.trace import ENGINE_RANK, Trace

    begin = time.monotonic()
    record_to = output_dir if config.output.records_steps else None
    with VideoPipeline.start(config, progress=display, launcher=launcher) as pipe:
        ready = time.monotonic()
        pipe.trace.rank_names[ENGINE_RANK] = "files"
        try:
            for result in pipe.render(requests, save_to=output_dir, record_to=record_to):
                if result.path is None:
                    display.failed(result.request_id, f"videopipe: {result.error}")
                else:
                    paths.append(result.path)
                    display.written(result.request_id, result.path, result.side_car.total_s)
        finally:
            if trace is not None:
                pipe.trace.write_chrome(trace)
        end = time.monotonic()
    lines = [
        f"{_finished(paths, requests, output_dir)}: {end - ready:.1f} s, after {ready - begin:.1f} s to start the ranks"
    ]
    if trace is not None:
        lines.append(f"trace: {trace} (open it at https://ui.perfetto.dev)")
    rendering = Trace(pipe.trace.rank_names)  # starting and loading would drown what the groups did
    rendering.add(span for span in pipe.trace.spans if span.stage not in ("start", "load", "calibrate"))
    lines.append(rendering.summary().render_text())
    return "\n".join(lines)


def _finished(paths: Sequence[Path], requests: Sequence[VideoRequest], output_dir: Path) -> str:
    return f"{len(paths)} of {len(requests)} clips are finished in {output_dir}"


def one_line(error: Exception) -> str:
    """An error of the operating system without its number: `Permission denied: out`."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    return str(error)
