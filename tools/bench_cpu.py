"""Throughput on CPU: diffusers' pipeline in a loop on all cores against videopipe 1+1 on the same cores.

Both sides run in one session, each in a process of its own, and render the same prompts in alternating order; while
one renders, the other waits. Model loading and one warm-up clip per case are not counted. The result of a case is the
ratio of the two times (above 1: videopipe is faster) over all repetitions.
"""

import json
import os
import platform
import re
import select
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import typer
from rich.console import Console

from videopipe.geometry import VideoSpec
from videopipe.records import VideoRequest

Against = Literal["videopipe", "diffusers", "nothing"]

PROMPTS = (
    "A red fox crosses a frozen river at dawn",
    "Two blue boats drift on a stormy sea",
    "An old man walks up a narrow street in the rain",
    "A black cat sleeps on a warm orange sofa, slow zoom in",
    "White clouds over a quiet city at night",
    "A yellow square moves right while green circles move left",
    "Close shot of a purple flower opening, realistic",
    "A train leaves a small station in heavy snow",
)

CASES = ("64x64x17:4", "64x64x17:40", "96x96x17:4", "96x96x17:100")


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the result: size in px, frames and denoising steps; `steps` None asks for a balanced number."""

    height: int
    width: int
    num_frames: int
    steps: int | None

    @property
    def shape(self) -> str:
        """`HxWxF`."""
        return f"{self.height}x{self.width}x{self.num_frames}"


class Stages(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one clip in diffusers' pipeline by stage, on `threads` threads."""

    threads: int
    encode_s: float
    denoise_s: float
    decode_s: float

    @property
    def total_s(self) -> float:
        """All stages, one after the other."""
        return self.encode_s + self.denoise_s + self.decode_s


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Median and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.p10:.2f}-{self.p90:.2f})"


class CaseResult(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured for one case; the fields of the other side are None when there was none.

    `reference_stages` are on the threads of the diffusers side, `shared_stages` on half of the cores;
    `ratio` is diffusers' time over the other side's, repetition by repetition; `ideal_ratio` what two stages that
    overlap perfectly on half the threads each would reach; `max_abs_diff` is over all uint8 frames of all clips.
    """

    case: Case
    balanced: bool
    clips: int
    reference_stages: Stages
    shared_stages: Stages
    ideal_ratio: float
    diffusers_s: tuple[float, ...]
    other_s: tuple[float, ...] | None = None
    ratio: Spread | None = None
    max_abs_diff: int | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All cases of one run and what is needed to run it again."""

    command: str
    commit: str | None
    against: Against
    diffusers_threads: int
    overrides: tuple[str, ...]
    machine: dict[str, Any]
    load_before: float
    load_after: float
    results: tuple[CaseResult, ...]


# --- arithmetic ------------------------------------------------------------------------------------------------------


def parse_case(text: str) -> Case:
    """`HxWxF:STEPS`, STEPS a number or `auto`.

    Raises:
        ValueError: another form, or a size that HunyuanVideo cannot render.
    """
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+):(\d+|auto)", text)
    if match is None:
        raise ValueError(
            f"case={text!r} must be HEIGHTxWIDTHxFRAMES:STEPS, for example '64x64x17:4' or '64x64x17:auto'"
        )
    height, width, num_frames = (int(match[i]) for i in (1, 2, 3))
    for name, value in (("height", height), ("width", width)):
        if value < 16 or value % 16:
            raise ValueError(f"case={text!r}: {name}={value} must be a multiple of 16, nearest is {_near(value, 16)}")
    if num_frames < 1 or (num_frames - 1) % 4:
        near = 1 + 4 * max(0, round((num_frames - 1) / 4))
        raise ValueError(f"case={text!r}: num_frames={num_frames} must be 1 + k*4, nearest is {near}")
    steps = None if match[4] == "auto" else int(match[4])
    if steps == 0:
        raise ValueError(f"case={text!r}: steps=0 must be at least 1, nearest is 1")
    return Case(height=height, width=width, num_frames=num_frames, steps=steps)


def _near(value: int, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)


def balanced_steps(few: tuple[int, float], many: tuple[int, float], decode_s: float) -> int:
    """Number of steps at which denoising takes about as long as decoding.

    Args:
        few: a small number of steps and the seconds to denoise one clip with it.
        many: a larger number of steps and its seconds.
        decode_s: seconds to decode one clip.
    Returns:
        At least 1.
    Raises:
        ValueError: `many` has no more steps than `few`.
    """
    if many[0] <= few[0]:
        raise ValueError(f"many={many[0]} steps must be more than few={few[0]}, nearest is {few[0] + 1}")
    step_s = max((many[1] - few[1]) / (many[0] - few[0]), 1e-9)
    fixed_s = few[1] - few[0] * step_s
    return max(1, round((decode_s - fixed_s) / step_s))


def ideal_ratio(reference: Stages, shared: Stages, clips: int) -> float:
    """Speed-up of two perfectly overlapping stages on half the threads each over one stage after the other on all.

    Args:
        reference: stage times of the side that runs them one after the other.
        shared: stage times on the threads of one of the two overlapping sides.
        clips: number of clips in a row.
    Returns:
        Seconds of the former over seconds of the latter.

    Text is encoded in whichever stage is shorter. The first clip's denoising and the last one's decoding overlap
    with nothing, so few clips reach less than many.
    """
    short, long = sorted((shared.denoise_s, shared.decode_s))
    short += shared.encode_s
    pipelined_s = short + long + (clips - 1) * max(short, long)
    return clips * reference.total_s / pipelined_s


def spread(values: Sequence[float]) -> Spread:
    """Median and 10th to 90th percentile of at least one value."""
    p10, median, p90 = (float(p) for p in np.percentile(values, (10, 50, 90)))
    return Spread(median=median, p10=p10, p90=p90)


def max_abs_diff(left: Path, right: Path) -> int:
    """Largest difference of the uint8 clips `*.npy` [T, H, W, 3] of two directories, value by value.

    Raises:
        ValueError: the directories hold other clips, or a clip has another shape or type.
    """
    names = sorted(file.name for file in left.glob("*.npy"))
    others = sorted(file.name for file in right.glob("*.npy"))
    if names != others or not names:
        raise ValueError(f"clips differ: {names} and {others}")
    largest = 0
    for name in names:
        ours, other = np.load(left / name), np.load(right / name)
        if ours.dtype != np.uint8 or other.dtype != np.uint8 or ours.shape != other.shape:
            raise ValueError(f"{name}: {ours.shape} {ours.dtype} and {other.shape} {other.dtype}, both must be uint8")
        largest = max(largest, int(np.abs(ours.astype(np.int16) - other).max()))
    return largest


def markdown(report: Report) -> str:
    """The report as a table, the command first."""
    machine = report.machine
    columns = ["shape", "steps", "denoise s", "decode s", "denoise/decode", "clips", "diffusers s", "other s"]
    columns += ["ratio", "ideal", "diff"]
    head = (
        f"`{report.command}` at commit {report.commit or 'unknown'}, {machine['cpu']}, {machine['cores']} cores, "
        f"torch {machine['torch']}, diffusers {machine['diffusers']}; "
        f"load average {report.load_before:.2f} before, {report.load_after:.2f} after."
    )
    legend = (
        f"Stage times are diffusers' own per clip, on {report.diffusers_threads} threads / on half the cores. Ideal: "
        "what perfect overlap of the two stages on half the cores each would give."
    )
    if report.against != "nothing":
        legend += (
            f" Ratio: seconds of diffusers on {report.diffusers_threads} threads over seconds of {report.against} "
            "(above 1: the latter is faster), median (p10-p90); diff: largest difference of a uint8 value."
        )
    lines = [head, "", legend, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in report.results:
        everywhere, shared = row.reference_stages, row.shared_stages
        cells = [
            row.case.shape,
            f"{row.case.steps}{' (balanced)' if row.balanced else ''}",
            f"{everywhere.denoise_s:.3f} / {shared.denoise_s:.3f}",
            f"{everywhere.decode_s:.3f} / {shared.decode_s:.3f}",
            f"{shared.denoise_s / shared.decode_s:.2f}",
            str(row.clips),
            f"{statistics.median(row.diffusers_s):.2f}",
            "-" if row.other_s is None else f"{statistics.median(row.other_s):.2f}",
            "-" if row.ratio is None else str(row.ratio),
            f"{row.ideal_ratio:.2f}",
            "-" if row.max_abs_diff is None else str(row.max_abs_diff),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    slower = [row for row in report.results if _threads_cost(row)]
    if slower:
        names = ", ".join(f"{row.case.shape} at {row.case.steps} steps" for row in slower)
        note = (
            f"At {names}, diffusers is slower on {report.diffusers_threads} threads than on half of the cores: the "
            "machine was busy, or the work is too small for threads. There the ratio shows more than overlap; compare "
            "with `--diffusers-threads`."
        )
        lines += ["", note]
    return "\n".join(lines) + "\n"


def _threads_cost(row: CaseResult) -> bool:
    reference, shared = row.reference_stages, row.shared_stages
    return reference.threads > shared.threads and reference.total_s > shared.total_s


# --- the two sides ---------------------------------------------------------------------------------------------------


class Worker:
    """A side of the benchmark in its own process (`tools.bench_cpu_worker`)."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], timeout_s: float) -> None:
        self.name = name
        self.process = process
        self.timeout_s = timeout_s

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """Send one command and wait for its answer.

        Raises:
            RuntimeError: the worker ended.
            TimeoutError: no answer within `timeout_s`.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
        except BrokenPipeError as error:
            raise self._ended() from error
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for one answer; errors as in `ask`."""
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], self.timeout_s)
        if not readable:
            raise TimeoutError(f"side={self.name} gave no answer within {self.timeout_s} s")
        line = self.process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> RuntimeError:
        status = self.process.wait()
        return RuntimeError(f"side={self.name} ended with exit status {status}; its error is above")

    def render(self, requests: Sequence[VideoRequest], frames_dir: Path | None = None) -> float:
        """Seconds to render `requests`; the frames go to `frames_dir` afterwards."""
        directory = None if frames_dir is None else str(frames_dir)
        answer = self.ask({"op": "render", "requests": msgspec.to_builtins(list(requests)), "frames_dir": directory})
        return float(answer["seconds"])

    def stages(self, request: VideoRequest, threads: int, repetitions: int) -> Stages:
        """Seconds by stage of one clip."""
        command = {"op": "stages", "threads": threads, "repetitions": repetitions}
        return msgspec.convert(self.ask(command | {"request": msgspec.to_builtins(request)}), Stages)


@contextmanager
def start_worker(
    side: Literal["videopipe", "diffusers"], model: Path, threads: int, overrides: Sequence[str], timeout_s: float
) -> Iterator[Worker]:
    """Start a side and wait until its model is loaded; end it at the end.

    `OMP_NUM_THREADS` is taken out of its environment: the number of threads is part of what is compared.
    """
    command = [sys.executable, "-m", "tools.bench_cpu_worker", f"--side={side}", f"--model={model}"]
    command += [f"--threads={threads}", *(f"--set={override}" for override in overrides)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env=environment,
        cwd=Path(__file__).resolve().parents[1],
    )
    assert process.stdin is not None
    try:
        worker = Worker(side, process, timeout_s)
        worker.answer()
        yield worker
    finally:
        process.stdin.close()  # the end of its input: the worker leaves its loop and videopipe ends its ranks
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()


# --- the run ---------------------------------------------------------------------------------------------------------


def make_requests(case: Case, steps: int, prompts: int) -> list[VideoRequest]:
    """The same `prompts` requests for both sides, a seed each."""
    spec = VideoSpec(height=case.height, width=case.width, num_frames=case.num_frames)
    return [
        VideoRequest(id=f"clip{i}", prompt=PROMPTS[i % len(PROMPTS)], spec=spec, num_inference_steps=steps, seed=i)
        for i in range(prompts)
    ]


def choose_steps(reference: Worker, case: Case, threads: int, repetitions: int) -> int:
    """Measure two step counts of a shape and return the one at which both stages take about the same time."""
    few, many = 2, 10
    first = reference.stages(make_requests(case, few, 1)[0], threads, repetitions)
    second = reference.stages(make_requests(case, many, 1)[0], threads, repetitions)
    decode_s = statistics.median([first.decode_s, second.decode_s])
    return balanced_steps((few, first.denoise_s), (many, second.denoise_s), decode_s)


def run_case(
    reference: Worker,
    other: Worker | None,
    case: Case,
    *,
    prompts: int,
    repetitions: int,
    threads: int,
    cores: int,
    scratch: Path,
) -> CaseResult:
    """Measure one case. `other` may be None: then only the stages and diffusers' own times are measured."""
    shared = max(1, cores // 2)
    stage_repetitions = min(repetitions, 3)
    steps = case.steps if case.steps is not None else choose_steps(reference, case, shared, stage_repetitions)
    requests = make_requests(case, steps, prompts)
    reference_stages = reference.stages(requests[0], threads, stage_repetitions)
    shared_stages = reference.stages(requests[0], shared, stage_repetitions)
    sides = [reference] if other is None else [reference, other]
    for side in sides:
        side.render(requests[:1])

    times: list[list[float]] = [[] for _ in sides]
    directories = [scratch / f"{case.shape}-{steps}-{i}" for i in range(len(sides))]
    for directory in directories:
        directory.mkdir(exist_ok=True)
    for repetition in range(repetitions):
        order = range(len(sides)) if repetition % 2 == 0 else reversed(range(len(sides)))
        for i in order:
            times[i].append(sides[i].render(requests, directories[i] if repetition == 0 else None))

    result = CaseResult(
        case=msgspec.structs.replace(case, steps=steps),
        balanced=case.steps is None,
        clips=prompts,
        reference_stages=reference_stages,
        shared_stages=shared_stages,
        ideal_ratio=ideal_ratio(reference_stages, shared_stages, prompts),
        diffusers_s=tuple(times[0]),
    )
    if other is None:
        return result
    return msgspec.structs.replace(
        result,
        other_s=tuple(times[1]),
        ratio=spread([a / b for a, b in zip(times[0], times[1], strict=True)]),
        max_abs_diff=max_abs_diff(*directories),
    )


def _machine(cores: int) -> dict[str, Any]:
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": cores,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "diffusers", "transformers", "numpy")},
    }


def _commit() -> str | None:
    """Short commit of this checkout with `-dirty` where files differ; None outside a git checkout."""
    root = Path(__file__).resolve().parents[1]
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=root, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text)
    os.replace(part, path)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="directory for bench_cpu.md and bench_cpu.json")] = Path("out/bench_cpu"),
    model: Annotated[Path | None, typer.Option(help="checkpoint; default: the tiny HunyuanVideo of seed 0")] = None,
    case: Annotated[list[str] | None, typer.Option(help=f"HxWxF:STEPS or :auto, repeated; default {CASES}")] = None,
    auto_balance: Annotated[bool, typer.Option(help="add for each shape a case with denoise = decode time")] = True,
    prompts: Annotated[int, typer.Option(min=1, help="clips in one repetition")] = 8,
    repetitions: Annotated[int, typer.Option(min=1, help="timed repetitions on each side")] = 10,
    against: Annotated[
        Against, typer.Option(help="the other side; 'diffusers' is a control whose ratio must be 1, 'nothing' none")
    ] = "videopipe",
    diffusers_threads: Annotated[int | None, typer.Option(min=1, help="default: one per core")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="PATH=VALUE of videopipe's config, repeated")
    ] = None,
    timeout_s: Annotated[float, typer.Option(help="longest wait for one answer of a side")] = 1800.0,
) -> None:
    """Compare diffusers' pipeline in a loop with videopipe 1+1 on this machine's cores."""
    try:
        cases = [parse_case(text) for text in case or CASES]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--case") from error
    if auto_balance:
        balanced = (msgspec.structs.replace(one, steps=None) for one in cases)
        cases = list(dict.fromkeys((*cases, *balanced)))
    cases.sort(key=lambda one: (one.height * one.width * one.num_frames, one.shape))

    console = Console()
    cores = len(os.sched_getaffinity(0))
    threads = diffusers_threads or cores
    load_before = os.getloadavg()[0]
    results: list[CaseResult] = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_cpu-")))
        if model is None:
            from tools.make_tiny_checkpoint import make_hunyuan_video  # seconds of imports that --help needs not

            model = make_hunyuan_video(scratch / "model", seed=0)
        model = model.resolve()
        reference = stack.enter_context(start_worker("diffusers", model, threads, (), timeout_s))
        other = None
        if against != "nothing":
            other = stack.enter_context(start_worker(against, model, threads, overrides or (), timeout_s))
        for one in cases:
            start = time.perf_counter()
            result = run_case(
                reference,
                other,
                one,
                prompts=prompts,
                repetitions=repetitions,
                threads=threads,
                cores=cores,
                scratch=scratch,
            )
            results.append(result)
            ratio = "" if result.ratio is None else f" ratio {result.ratio}, ideal {result.ideal_ratio:.2f},"
            took = time.perf_counter() - start
            console.print(f"{one.shape} {result.case.steps} steps:{ratio} {took:.0f} s", highlight=False)

    report = Report(
        command=shlex.join(["python", "-m", "tools.bench_cpu", *sys.argv[1:]]),
        commit=_commit(),
        against=against,
        diffusers_threads=threads,
        overrides=tuple(overrides or ()),
        machine=_machine(cores),
        load_before=load_before,
        load_after=os.getloadavg()[0],
        results=tuple(results),
    )
    output.mkdir(parents=True, exist_ok=True)
    _write(output / "bench_cpu.json", msgspec.json.format(msgspec.json.encode(report)).decode() + "\n")
    _write(output / "bench_cpu.md", markdown(report))
    typer.echo(markdown(report))


if __name__ == "__main__":
    app()
