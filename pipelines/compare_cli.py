"""`videopipe compare REF CAND`: the command line over `videopipe.quality`."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from pipelines.bundled import find_config
from pipelines.compare_run import FloorJob, Job, run_job, run_noise_floor
from pipelines.noise_floor import (
    RankLayout,
)
from videopipe.config import load_config
from videopipe.quality.align import parse_align
from videopipe.quality.clips import Decoder
from videopipe.quality.compare import parse_metrics
from videopipe.quality.lpips import Lpips
from videopipe.quality.thresholds import Expectation, parse_thresholds
from videopipe.quality.vmaf import find_ffmpeg

app = typer.Typer(add_completion=False)


@app.command()
def compare(
    ref: Annotated[
        Path | None, typer.Argument(metavar="REF", help="The clip, or directory of clips, taken as right.")
    ] = None,
    cand: Annotated[
        Path | None, typer.Argument(metavar="CAND", help="The clip, or directory of clips, to judge.")
    ] = None,
    *,
    metrics: Annotated[
        str | None, typer.Option(help="max_abs, mae, psnr, ssim, ms_ssim, flicker; all that apply by default.")
    ] = None,
    fail_under: Annotated[
        str | None, typer.Option(help="Limits on the worst frame, psnr=45,ssim=0.99; psnr.mean=45 for the mean.")
    ] = None,
    expect: Annotated[
        str | None, typer.Option(help="identical, or within-floor (with --rerun or --noise-floor).")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every number to this file.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write one HTML page that opens from disk.")] = None,
    align: Annotated[str, typer.Option(help="For clips that do not match: length, index, time, depth.")] = "",
    resize: Annotated[bool, typer.Option("--resize", help="Scale CAND to the size of REF.")] = False,
    seams: Annotated[str, typer.Option(help="First frames of the segments after the first, 61,121.")] = "",
    rerun: Annotated[
        list[Path] | None, typer.Option(help="Another render of REF's request; repeatable. Measures the noise floor.")
    ] = None,
    noise_floor: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG",
            help="Render REF's request with this configuration to measure the noise floor; REF may be left out.",
        ),
    ] = None,
    runs: Annotated[int | None, typer.Option(help="With --noise-floor: renders as configured, 2 by default.")] = None,
    layouts: Annotated[
        str | None,
        typer.Option(help="With --noise-floor: also on 1+0,2+1 ranks; by default 1+0 and one DiT rank more."),
    ] = None,
    kernels: Annotated[
        str | None, typer.Option(help="With --noise-floor: attention kernels; CAND is judged by the first one's floor.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="With --noise-floor: what to render where REF does not tell.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="With --noise-floor: override a key of CONFIG; repeatable."),
    ] = None,
    slack: Annotated[float, typer.Option(help="Errors up to this many times the noise floor are within it.")] = 1.5,
    trace_tolerance: Annotated[
        float, typer.Option(help="Largest relative L2 difference that passes in recorded steps.")
    ] = 0.0,
    vmaf: Annotated[bool, typer.Option("--vmaf", help="Also VMAF, through an ffmpeg that has libvmaf.")] = False,
    ffmpeg: Annotated[Path | None, typer.Option(help="The ffmpeg for --vmaf; found by itself if left out.")] = None,
    lpips_backbone: Annotated[
        Path | None, typer.Option(help="Also LPIPS: AlexNet's weights on disk (torchvision's names).")
    ] = None,
    lpips_heads: Annotated[Path | None, typer.Option(help="The LPIPS authors' heads for AlexNet, version 0.1.")] = None,
    decoder: Annotated[str, typer.Option(help="auto, decord or av.")] = "auto",
    workers: Annotated[int | None, typer.Option(help="Frames measured at a time; one per core by default.")] = None,
    report_frames: Annotated[int, typer.Option(help="Frames with pictures in the report.")] = 160,
    report_width: Annotated[int, typer.Option(help="Widest picture in the report in px.")] = 480,
) -> None:
    """Compare two clips frame by frame, or two directories clip by clip.

    With --noise-floor, render one request several times, and judge CAND by how far these are apart.

    Exit code 0: compared, and every limit holds. 1: a limit does not hold. 2: wrong usage, or clips that cannot be
    read or do not match.
    """
    console, errors = Console(), Console(stderr=True)
    try:
        job = Job(
            metrics=None if metrics is None else parse_metrics(metrics),
            align=parse_align(align),
            resize=resize,
            seams=_parse_seams(seams),
            decoder=_parse_decoder(decoder),
            workers=workers,
            thresholds=parse_thresholds(fail_under or ""),
            expect=_parse_expect(expect, has_floor=bool(rerun) or noise_floor is not None),
            reruns=tuple(rerun or ()),
            slack=slack,
            tolerance=trace_tolerance,
            vmaf=find_ffmpeg(ffmpeg) if vmaf else None,
            lpips=_load_lpips(lpips_backbone, lpips_heads),
            noise_floor=_parse_noise_floor(noise_floor, runs, layouts, kernels, prompt, overrides),
            json=json_file,
            report=report,
            report_frames=report_frames,
            report_width=report_width,
        )
        _check_outputs(job)
        if job.noise_floor is not None:
            code = run_noise_floor(ref, cand, job, job.noise_floor, console, errors)
        elif ref is None or cand is None:
            raise ValueError("need REF and CAND, or --noise-floor CONFIG")
        else:
            code = run_job(ref, cand, job, console, errors)
    except (ValueError, OSError) as error:
        _usage_error(errors, str(error))
    if code:
        raise typer.Exit(code)


def _check_outputs(job: Job) -> None:
    for path in (job.json, job.report):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path}: the folder {path.parent} does not exist")


def _load_lpips(backbone: Path | None, heads: Path | None) -> Lpips | None:
    if backbone is None and heads is None:
        return None
    if backbone is None or heads is None:
        given, missing = ("heads", "backbone") if backbone is None else ("backbone", "heads")
        raise ValueError(f"--lpips-{given} needs --lpips-{missing} as well: LPIPS takes both files of weights")
    return Lpips(backbone, heads)


def _parse_seams(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if not word.isdigit():
            raise ValueError(f"seams={word!r} must be a frame number, nearest is '1'")
    return tuple(sorted({int(word) for word in words}))


def _parse_decoder(text: str) -> Decoder:
    if text == "auto":
        return "auto"
    if text == "decord":
        return "decord"
    if text == "av":
        return "av"
    raise ValueError(f"decoder={text!r} must be auto, decord or av, nearest is 'auto'")


def _parse_noise_floor(
    name: str | None,
    runs: int | None,
    layouts: str | None,
    kernels: str | None,
    prompt: str | None,
    overrides: list[str] | None,
) -> FloorJob | None:
    if name is None:
        options = {"--runs": runs, "--layouts": layouts, "--kernels": kernels, "--prompt": prompt, "--set": overrides}
        for option, value in options.items():
            if value is not None:
                raise ValueError(f"{option} goes with --noise-floor CONFIG, which is not given")
        return None
    path, changes = find_config(name), overrides or []
    words = [None] if kernels is None else [word.strip() for word in kernels.split(",") if word.strip()]
    if not words:
        raise ValueError(f"kernels={kernels!r} names none, nearest is 'sdpa'")
    return FloorJob(
        configs=tuple(
            load_config(path, changes if word is None else [*changes, f"model.attention_kernel={word}"])
            for word in dict.fromkeys(words)
        ),
        layouts=None if layouts is None else tuple(RankLayout.parse(word) for word in layouts.split(",")),
        num_runs=2 if runs is None else runs,
        prompt=prompt,
    )


def _parse_expect(text: str | None, *, has_floor: bool) -> Expectation | None:
    if text is None:
        return None
    if text == "identical":
        return "identical"
    if text == "within-floor":
        if not has_floor:
            raise ValueError(
                "expect='within-floor' needs the noise floor: pass --rerun with another render of REF's request, or "
                "--noise-floor"
            )
        return "within-floor"
    raise ValueError(f"expect={text!r} must be identical or within-floor, nearest is 'identical'")


def _usage_error(errors: Console, message: str) -> NoReturn:
    errors.print(f"[red]error:[/red] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(2)


def main() -> None:
    """Run the command on its own: `python -m pipelines.compare_cli REF CAND`."""
    app(prog_name="videopipe compare", args=sys.argv[1:])


if __name__ == "__main__":
    main()
