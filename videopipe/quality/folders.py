"""Two output directories compared, clip by clip, matched by request id (the file's stem)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from videopipe.quality.clips import clips_in, form_of
from videopipe.quality.compare import METRICS, Comparison


class FolderComparison(msgspec.Struct, frozen=True, kw_only=True):
    """All clips of two directories by request id; `problems` names those that could not be compared, and why."""

    clips: dict[str, Comparison]
    problems: dict[str, str]

    @property
    def identical(self) -> bool:
        """Whether the same clips are on both sides and all frames are equal."""
        return not self.problems and all(comparison.identical for comparison in self.clips.values())

    def as_json(self) -> dict[str, Any]:
        """The keys of one comparison over all clips, with `worst_clip`, and under `clips` each clip's own."""
        first = next(((i, c) for i, c in self.clips.items() if c.first_different_frame is not None), None)
        data: dict[str, Any] = {
            "num_frames": sum(comparison.num_frames for comparison in self.clips.values()),
            "identical": self.identical,
            "first_different_clip": first[0] if first else None,
            "first_different_frame": first[1].first_different_frame if first else None,
            "problems": self.problems,
        }
        for name in METRICS:
            having = {i: c.series[name] for i, c in self.clips.items() if name in c.series}
            if not having:
                continue
            pick = min if METRICS[name].higher_is_better else max
            worst = pick(having, key=lambda i: having[i].worst)
            finite = [series.mean for series in having.values() if series.mean != float("inf")]
            equal = self.clips[worst].first_different_frame is None
            data[name] = {
                "mean": sum(finite) / len(finite) if finite else float("inf"),
                "worst": having[worst].worst,
                "worst_clip": None if equal else worst,
                "worst_frame": None if equal else having[worst].worst_frame,
            }
        data["clips"] = {i: comparison.as_json() for i, comparison in self.clips.items()}
        return data


def match_clips(ref: Path, cand: Path) -> tuple[dict[str, tuple[Path, Path]], dict[str, str]]:
    """Pairs of clips by request id, and why the others have no partner.

    Where an id has several forms (mp4 and npy), the first lossless form that both sides have is taken.

    Raises:
        ValueError: a folder without clips.
    """
    left, right = clips_in(ref), clips_in(cand)
    pairs: dict[str, tuple[Path, Path]] = {}
    problems: dict[str, str] = {}
    for stem in sorted({*left, *right}):
        if stem not in left or stem not in right:
            missing, there = ("CAND", left) if stem in left else ("REF", right)
            problems[stem] = f"{there[stem][0]} has no partner: {stem!r} is missing in {missing}"
            continue
        forms = {form_of(path): path for path in right[stem]}
        shared = next((path for path in left[stem] if form_of(path) in forms), None)
        pairs[stem] = (shared, forms[form_of(shared)]) if shared else (left[stem][0], right[stem][0])
    return pairs, problems


def compare_folders(ref: Path, cand: Path, compare: Callable[[str, Path, Path], Comparison]) -> FolderComparison:
    """Compare every pair of `match_clips`; a pair that cannot be compared is a problem of its own, the rest goes on.

    Args:
        ref: the directory taken as right.
        cand: the directory to judge.
        compare: (request id, REF's clip, CAND's clip) to a comparison.
    Raises:
        ValueError: a folder without clips.
    """
    pairs, problems = match_clips(ref, cand)
    clips: dict[str, Comparison] = {}
    for stem, (left, right) in pairs.items():
        try:
            clips[stem] = compare(stem, left, right)
        except ValueError as error:
            problems[stem] = str(error)
    return FolderComparison(clips=clips, problems=problems)
