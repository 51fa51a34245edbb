"""What `videopipe compare` does once its options are understood: measures, judges, prints, writes."""

import html
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from pipelines.noise_floor import (
    ConfigFloor,
    RankLayout,
    floor_configs,
    form_of_clip,
    measure_config_floor,
    num_devices,
    print_floors,
    request_for,
    usual_layouts,
)
from videopipe.config import Config
from videopipe.files import replacing
from videopipe.quality.align import Align, paired_frames
from videopipe.quality.clips import Clip, Decoder, clips_in, is_output_directory, open_clip, read_side_car
from videopipe.quality.compare import Comparison, MetricName, Series, compare_clips, to_json
from videopipe.quality.floor import FloorJudgement, NoiseFloor, floor_from, judge
from videopipe.quality.folders import FolderComparison, compare_folders
from videopipe.quality.lpips import Lpips
from videopipe.quality.page import write_page
from videopipe.quality.terminal import number, print_comparison
from videopipe.quality.thresholds import Expectation, Threshold, failures
from videopipe.quality.trace import Trace, steps_folder, trace
from videopipe.quality.vmaf import vmaf as measure_vmaf


class FloorJob(msgspec.Struct, frozen=True, kw_only=True):
    """What `--noise-floor` and its options ask for. `configs`: one for each kernel; the first one's floor judges."""

    configs: tuple[Config, ...]
    layouts: tuple[RankLayout, ...] | None = None
    num_runs: int = 2
    prompt: str | None = None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What the options ask for, checked."""

    metrics: tuple[MetricName, ...] | None
    align: frozenset[Align]
    resize: bool
    seams: tuple[int, ...]
    decoder: Decoder
    workers: int | None
    thresholds: tuple[Threshold, ...]
    expect: Expectation | None
    reruns: tuple[Path, ...]
    slack: float
    tolerance: float
    vmaf: Path | None  # the ffmpeg to measure it with
    lpips: Lpips | None
    noise_floor: FloorJob | None
    json: Path | None
    report: Path | None
    report_frames: int
    report_width: int


class _Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One pair of clips: what was measured, and every reason to fail."""

    comparison: Comparison
    trace: Trace | None
    floor: NoiseFloor | None
    judgement: FloorJudgement | None
    failed: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        data = self.comparison.as_json()
        data["failed"] = list(self.failed)
        if self.trace is not None:
            data["trace"] = _trace_json(self.trace)
        if self.floor is not None and self.judgement is not None:
            data["noise_floor"] = msgspec.to_builtins(self.floor)
            data["verdict"] = self.judgement.verdict
        return data


def run_job(ref: Path, cand: Path, job: Job, console: Console, errors: Console) -> int:
    """Compare two clips, two directories of clips or two recordings; print and write what was found.

    Returns:
        0: compared, and every limit holds; 1: one does not hold; 2: some clips could not be compared.
    Raises:
        ValueError: what is there cannot be compared.
        OSError: a file cannot be read or written.
    """
    if ref.suffix == ".steps" and ref.is_dir() and cand.is_dir():
        return _run_steps(ref, cand, job, console)
    for path in (ref, cand):
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
    folders = is_output_directory(ref), is_output_directory(cand)
    for path, folder in zip((ref, cand), folders, strict=True):
        if folder:
            clips_in(path)  # an empty folder is said to be empty before anything else
    if folders[0] != folders[1]:
        kind = ["a directory of clips" if folder else "one clip" for folder in folders]
        raise ValueError(f"REF ({ref}) is {kind[0]}, CAND ({cand}) is {kind[1]}; need two clips or two directories")
    if folders[0]:
        return _run_folders(ref, cand, job, console, errors)
    outcome = _compare_pair(ref, cand, job, job.report, console)
    if job.json is not None:
        _write_json(job.json, outcome.as_json())
    _print_outcome(console, outcome)
    return 1 if outcome.failed else 0


def _run_folders(ref: Path, cand: Path, job: Job, console: Console, errors: Console) -> int:
    if job.reruns:
        raise ValueError("--rerun goes with two clips, not with directories")
    outcomes: dict[str, _Outcome] = {}

    def pair(stem: str, left: Path, right: Path) -> Comparison:
        page = None
        if job.report is not None:
            pages = job.report.with_suffix("")
            pages.mkdir(exist_ok=True)
            page = pages / f"{stem}.html"
        outcomes[stem] = _compare_pair(left, right, job, page, console)
        _print_outcome(console, outcomes[stem], title=stem)
        return outcomes[stem].comparison

    result = compare_folders(ref, cand, pair)
    for problem in result.problems.values():
        errors.print(f"[red]error:[/red] {escape(problem)}", highlight=False, soft_wrap=True)
    if job.json is not None:
        data = result.as_json()
        data["clips"] = {stem: outcome.as_json() for stem, outcome in outcomes.items()}
        _write_json(job.json, data)
    if job.report is not None:
        _write_index(job.report, result)
    failed = sum(bool(outcome.failed) for outcome in outcomes.values())
    same = sum(comparison.identical for comparison in result.clips.values())
    console.print(
        f"{len(result.clips)} clips compared, {same} identical, {failed} failed, {len(result.problems)} not comparable",
        highlight=False,
    )
    return 2 if result.problems else 1 if failed else 0


def _run_steps(ref: Path, cand: Path, job: Job, console: Console) -> int:
    found = trace(ref, cand, tolerance=job.tolerance, trim="length" in job.align)
    for line in found.lines():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if job.json is not None:
        _write_json(job.json, {"trace": _trace_json(found)})
    return 1 if job.expect == "identical" and found.first is not None else 0


def run_noise_floor(
    ref: Path | None, cand: Path | None, job: Job, asked: FloorJob, console: Console, errors: Console
) -> int:
    """Measure the floor of each kernel; judge CAND against REF, or against the renders where there is no REF.

    Otherwise as `run_job`; a rank that is lost is a ValueError too.
    """
    from pipelines.families import load_family
    from pipelines.faults import RankError
    from pipelines.launch import LocalLauncher

    if cand is None:
        ref, cand = None, ref  # a single clip is the one to judge
    _check_noise_floor(ref, cand, job)
    clips = [path for path in (ref, cand) if path is not None]
    forms = {form_of_clip(open_clip(path, job.decoder).info) for path in clips} or {asked.configs[0].output.format}
    if len(forms) > 1:
        raise ValueError(f"REF and CAND are of different formats, {' and '.join(sorted(forms))}, need the same")
    (form,) = forms
    request = request_for(asked.configs[0], clips, asked.prompt)
    layouts = asked.layouts or usual_layouts(asked.configs[0], num_devices(asked.configs[0]))
    for config in asked.configs:
        floor_configs(config, request, form=form, layouts=layouts, num_runs=asked.num_runs)
    found: list[ConfigFloor] = []
    outcome = None
    launcher = LocalLauncher(load_family(asked.configs[0].model.family).preload)  # one for all renders
    try:
        with tempfile.TemporaryDirectory(prefix="videopipe-floor-") as folder:
            for index, config in enumerate(asked.configs):
                floor, runs = measure_config_floor(
                    config,
                    request,
                    Path(folder, str(index)),
                    lambda a, b: _compare_paths(a, b, job, console),
                    form=form,
                    layouts=layouts,
                    num_runs=asked.num_runs,
                    launcher=launcher,
                    note=lambda line: errors.print(line, highlight=False, markup=False, soft_wrap=True),
                )
                found.append(floor)
                if index == 0 and cand is not None:
                    reference, *others = runs if ref is None else [ref]
                    outcome = _compare_pair(
                        reference, cand, job, job.report, console, measured=floor.floor, others=tuple(others)
                    )
    except RankError as error:
        raise ValueError(f"{error}; --layouts chooses the numbers of ranks") from error
    finally:
        launcher.close()
    print_floors(console, request, found)
    if outcome is not None:
        _print_outcome(console, outcome)
    if job.json is not None:
        data = {"noise_floor": msgspec.to_builtins(found[0].floor)} if outcome is None else outcome.as_json()
        _write_json(job.json, {**data, "noise_floors": {floor.kernel: floor.as_json() for floor in found}})
    return 1 if outcome is not None and outcome.failed else 0


def _check_noise_floor(ref: Path | None, cand: Path | None, job: Job) -> None:
    """Refuse what would be found out after the renders."""
    if job.reruns:
        raise ValueError("--rerun and --noise-floor: both give the noise floor, need one of them")
    if cand is None and (job.expect is not None or job.thresholds or job.report is not None):
        raise ValueError("--expect, --fail-under and --report judge CAND, and none is given")
    for path in (ref, cand):
        if path is not None and is_output_directory(path):
            raise ValueError(f"{path} is a directory of clips, --noise-floor takes one clip of one request")


def _compare_pair(
    ref: Path,
    cand: Path,
    job: Job,
    page: Path | None,
    console: Console,
    *,
    measured: NoiseFloor | None = None,
    others: tuple[Path, ...] = (),
) -> _Outcome:
    """Compare and judge; with a `measured` floor CAND is judged against REF and `others` by it, else by the reruns."""
    left, right = open_clip(ref, job.decoder), open_clip(cand, job.decoder)
    comparison = _with_extras(_measure(left, right, job, console), left, right, job)
    comparison = msgspec.structs.replace(comparison, notes=(*comparison.notes, *_hash_notes(ref, cand)))
    folders = steps_folder(ref), steps_folder(cand)
    found = None
    if all(folder.is_dir() for folder in folders):
        found = trace(*folders, tolerance=job.tolerance, trim="length" in job.align)
    floor, judgement = None, None
    if measured is not None:
        against = [comparison, *(_compare_paths(run, cand, job, console) for run in others)]
        floor, judgement = measured, judge(against, measured, slack=job.slack)
    elif job.reruns:
        floor, judgement = _judge(ref, cand, comparison, job, console)
    failed = list(failures(comparison, job.thresholds))
    if job.expect == "identical" and not comparison.identical:
        first = comparison.first_different_frame
        failed.append(
            "not identical: " + ("lengths differ" if first is None else f"frame {first} is the first to differ")
        )
    if job.expect == "within-floor" and judgement is not None and judgement.verdict == "beyond-floor":
        failed.extend(judgement.reasons)
    if page is not None:
        lines = found.lines() if found is not None else ()
        write_page(
            page,
            comparison,
            left,
            right,
            align=job.align,
            resize=job.resize,
            max_frames=job.report_frames,
            max_width=job.report_width,
            trace=lines,
        )
    return _Outcome(comparison=comparison, trace=found, floor=floor, judgement=judgement, failed=tuple(failed))


def _compare_paths(ref: Path, cand: Path, job: Job, console: Console) -> Comparison:
    left, right = open_clip(ref, job.decoder), open_clip(cand, job.decoder)
    return _with_extras(_measure(left, right, job, console), left, right, job)


def _measure(ref: Clip, cand: Clip, job: Job, console: Console) -> Comparison:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"comparing {Path(cand.info.path).name}", total=ref.info.num_frames)
        return compare_clips(
            ref,
            cand,
            metrics=job.metrics,
            align=job.align,
            resize=job.resize,
            seams=job.seams,
            workers=job.workers,
            on_frame=lambda done: progress.update(bar, completed=done),
        )


def _with_extras(comparison: Comparison, ref: Clip, cand: Clip, job: Job) -> Comparison:
    """The comparison with VMAF and LPIPS added, each in a pass of its own."""
    if job.vmaf is None and job.lpips is None:
        return comparison
    if ref.info.latents:
        raise ValueError(f"vmaf and lpips apply to frames, {ref.info.path} holds latents")

    def pairs() -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        return paired_frames(ref, cand, job.align, resize=job.resize)

    series = dict(comparison.series)
    if job.vmaf is not None:
        series["vmaf"] = Series(name="vmaf", values=tuple(measure_vmaf(pairs(), job.vmaf)))
    if job.lpips is not None:
        series["lpips"] = Series(name="lpips", values=tuple(job.lpips.values(pairs())))
    return msgspec.structs.replace(comparison, series=series)


def _hash_notes(ref: Path, cand: Path) -> list[str]:
    """What the side-cars' hashes say of the frames before they were encoded."""
    left, right = ((read_side_car(clip) or {}).get("frames_sha256") for clip in (ref, cand))
    if left is None or right is None:
        return []
    return [
        f"before encoding the clips were {'equal' if left == right else 'not equal'} (frames_sha256 of the side-cars)"
    ]


def _judge(
    ref: Path, cand: Path, comparison: Comparison, job: Job, console: Console
) -> tuple[NoiseFloor, FloorJudgement]:
    """The noise floor of REF and its reruns, and CAND against it."""
    runs = (ref, *job.reruns)
    floor = floor_from((_compare_paths(a, b, job, console) for a, b in itertools.combinations(runs, 2)), len(runs))
    against = [comparison, *(_compare_paths(run, cand, job, console) for run in job.reruns)]
    return floor, judge(against, floor, slack=job.slack)


def _print_outcome(console: Console, outcome: _Outcome, title: str | None = None) -> None:
    print_comparison(console, outcome.comparison, title=title)
    for line in outcome.trace.lines() if outcome.trace is not None else ():
        console.print(f"  - {line}", highlight=False, markup=False, soft_wrap=True)
    if outcome.floor is not None and outcome.judgement is not None:
        lines = [f"{name} {number(line.mean)}" for name, line in outcome.floor.lines.items()]
        exact = "bit-exact" if outcome.floor.bit_exact else "mean errors " + ", ".join(lines)
        console.print(f"noise floor of {outcome.floor.num_runs} runs: {exact}", highlight=False, soft_wrap=True)
        console.print(f"verdict: {outcome.judgement.verdict}", highlight=False)
        for reason in outcome.judgement.reasons:
            console.print(f"  - {reason}", highlight=False, markup=False, soft_wrap=True)
    for line in outcome.failed:
        console.print(f"[red]failed:[/red] {escape(line)}", highlight=False, soft_wrap=True)


def _trace_json(found: Trace) -> dict[str, Any]:
    first = found.first
    data: dict[str, Any] = {
        "num_steps": found.num_steps,
        "compared": found.compared,
        "tolerance": found.tolerance,
        "first_different_step": first.step if first else None,
        "first_different_tensor": first.name if first else None,
        "first_different_block": first.block if first else None,
    }
    if first is not None:
        data.update({"reason": first.reason, "max_abs": first.max_abs, "rel_l2": first.rel_l2, "detail": first.detail})
    return data


def _write_json(path: Path, data: dict[str, Any]) -> None:
    with replacing(path) as partial:
        partial.write_bytes(to_json(data))


def _write_index(path: Path, result: FolderComparison) -> None:
    """One line per clip, worst first, each with a link to its page beside this one."""
    rows = []
    for stem, comparison in sorted(result.clips.items(), key=lambda item: (item[1].identical, item[0])):
        psnr = comparison.series.get("psnr")
        cells = (
            f'<a href="{html.escape(path.stem)}/{html.escape(stem)}.html">{html.escape(stem)}</a>',
            "identical" if comparison.identical else f"first different frame {comparison.first_different_frame}",
            ""
            if psnr is None
            else f"{number(psnr.mean)} dB, worst {number(psnr.worst)} dB at frame {psnr.worst_frame}",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    rows += [
        f"<tr><td>{html.escape(stem)}</td><td colspan=2>{html.escape(why)}</td></tr>"
        for stem, why in result.problems.items()
    ]
    style = "body{font:14px system-ui;margin:1.5rem}td{padding:.2rem .8rem;border-bottom:1px solid #ccc}"
    page = f'<!doctype html><meta charset="utf-8"><title>videopipe compare</title><style>{style}</style>'
    with replacing(path) as partial:
        partial.write_text(f"{page}<h1>Comparison</h1><table>{''.join(rows)}</table>\n", encoding="utf-8")
