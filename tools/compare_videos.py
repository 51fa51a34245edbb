"""Whole folders of videos against one reference folder: one line per clip and folder, and FVD between the sets.

    python -m tools.compare_videos out/reference out/ulysses out/ring --csv table.csv
    python -m tools.compare_videos out/reference out/ring --fvd-weights i3d_pretrained_400.pt

Clips are matched by request id, the file's stem. `videopipe compare REF CAND` says more about two folders: reports,
limits, exit codes for CI.
"""

import csv
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from videopipe.files import replacing
from videopipe.quality.align import parse_align
from videopipe.quality.clips import Clip, clips_in, open_clip
from videopipe.quality.compare import Comparison, MetricName, compare_clips, parse_metrics
from videopipe.quality.folders import compare_folders
from videopipe.quality.fvd import I3D, clip_features, frechet_distance
from videopipe.quality.terminal import number


def main(
    ref: Annotated[Path, typer.Argument(help="The folder taken as right.")],
    cands: Annotated[list[Path], typer.Argument(metavar="CAND...", help="Folders to compare with it.")],
    metrics: Annotated[str, typer.Option(help="Columns of the table.")] = "psnr,ssim,mae",
    align: Annotated[str, typer.Option(help="length, index, time, depth: see `videopipe compare --help`.")] = "",
    resize: Annotated[bool, typer.Option("--resize", help="Scale clips to the reference's size.")] = False,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the table to this file.")] = None,
    fvd_weights: Annotated[Path | None, typer.Option(help="I3D weights on disk: adds FVD per folder.")] = None,
    fvd_frames: Annotated[int, typer.Option(help="Frames of each clip that FVD looks at.")] = 16,
) -> None:
    """Compare folders of clips with a reference folder. Exit code 2 if any clip could not be compared."""
    console, errors = Console(), Console(stderr=True)
    try:
        names, rules = parse_metrics(metrics), parse_align(align)
        model = I3D(fvd_weights) if fvd_weights is not None else None
        wanted = clip_features(model, _open_all(ref), fvd_frames) if model is not None else None
        rows: list[dict[str, str]] = []
        problems = 0
        for cand in cands:

            def pair(stem: str, left: Path, right: Path) -> Comparison:
                return compare_clips(open_clip(left), open_clip(right), metrics=names, align=rules, resize=resize)

            result = compare_folders(ref, cand, pair)
            rows += [_row(cand, stem, comparison, names) for stem, comparison in result.clips.items()]
            for problem in result.problems.values():
                errors.print(f"{cand}: {problem}", highlight=False, markup=False, soft_wrap=True)
            problems += len(result.problems)
            if model is not None and wanted is not None:
                distance = frechet_distance(wanted, clip_features(model, _open_all(cand), fvd_frames))
                console.print(f"FVD {cand}: {number(distance)} ({len(wanted)} clips)", highlight=False, soft_wrap=True)
        if csv_file is not None:
            _write(csv_file, rows)
        _print(console, rows)
    except ValueError as error:
        errors.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    if problems:
        raise typer.Exit(2)


def _open_all(folder: Path) -> list[Clip]:
    return [open_clip(paths[0]) for paths in clips_in(folder).values()]


def _row(folder: Path, stem: str, comparison: Comparison, names: tuple[MetricName, ...]) -> dict[str, str]:
    first = comparison.first_different_frame
    row = {"folder": str(folder), "clip": stem, "frames": str(comparison.num_frames)}
    row["first different"] = "identical" if first is None else str(first)
    for name in names:
        series = comparison.series[name]
        row[name] = number(series.mean)
        row[f"worst {name}"] = number(series.worst)
    return row


def _print(console: Console, rows: list[dict[str, str]]) -> None:
    if not rows:
        return
    table = Table(header_style="bold")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("folder", "clip") else "right")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, fieldnames=list(rows[0]) if rows else ["folder", "clip"])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    typer.run(main)
