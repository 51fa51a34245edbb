"""Which frame of one clip is compared with which of the other, and what is refused without being asked for by name."""

from collections.abc import Collection, Iterator
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from videopipe.quality.clips import Clip, ClipInfo

Align = Literal["length", "index", "time", "depth"]
ALIGN_HELP = {
    "length": "compare the frames that both have",
    "index": "frame k with frame k, whatever the frame rates say",
    "time": "each frame of REF with the frame of CAND shown nearest in time",
    "depth": "bring both to 8 bits and ignore HDR transfer curves",
}


def parse_align(text: str) -> frozenset[Align]:
    """`"length,depth"` as a set.

    Raises:
        ValueError: an unknown rule, or both `index` and `time`.
    """
    rules: set[Align] = set()
    for word in filter(None, (part.strip() for part in text.split(","))):
        known = [rule for rule in get_args(Align) if rule == word]
        if not known:
            raise ValueError(f"align={word!r} must be among {', '.join(get_args(Align))}, nearest is 'length'")
        rules.update(known)
    if {"index", "time"} <= rules:
        raise ValueError("align=index,time: frames pair either by index or by time, nearest is 'time'")
    return frozenset(rules)


def check_pair(ref: ClipInfo, cand: ClipInfo, align: Collection[Align] = (), *, resize: bool = False) -> list[str]:
    """Refuse two clips that do not match, unless a rule says what to do about it.

    Returns:
        What was done about each mismatch, in words.
    Raises:
        ValueError: names both values and the option that would compare them all the same.
    """
    notes: list[str] = []
    if ref.latents != cand.latents:
        what = ["latents" if info.latents else "frames" for info in (ref, cand)]
        raise ValueError(f"kind differs: REF ({ref.path}) holds {what[0]}, CAND ({cand.path}) holds {what[1]}")
    sizes = f"{ref.width}x{ref.height}", f"{cand.width}x{cand.height}"
    if sizes[0] != sizes[1]:
        if ref.latents or not resize:
            advice = "latents cannot be resized" if ref.latents else f"pass --resize to scale CAND to {sizes[0]}"
            raise ValueError(f"size differs: REF is {sizes[0]}, CAND is {sizes[1]}; {advice}")
        notes.append(f"CAND scaled from {sizes[1]} to {sizes[0]} (bicubic)")
    if ref.bit_depth != cand.bit_depth or ref.transfer != cand.transfer:
        formats = _format(ref), _format(cand)
        if "depth" not in align:
            differs = f"pixel format differs: REF is {formats[0]}, CAND is {formats[1]}"
            raise ValueError(f"{differs}; pass --align depth to compare both as 8-bit RGB")
        notes.append(f"compared as 8-bit RGB: REF is {formats[0]}, CAND is {formats[1]}")
    notes += _check_rates(ref, cand, align)
    if ref.num_frames != cand.num_frames and "time" not in align:
        common = min(ref.num_frames, cand.num_frames)
        lengths = f"REF has {ref.num_frames} frames, CAND has {cand.num_frames}"
        if "length" not in align:
            raise ValueError(f"length differs: {lengths}; pass --align length to compare the first {common}")
        notes.append(f"first {common} frames compared: {lengths}")
    return notes


def _check_rates(ref: ClipInfo, cand: ClipInfo, align: Collection[Align]) -> list[str]:
    """Frame rates and irregular frame times."""
    if "time" in align:
        for name, info in (("REF", ref), ("CAND", cand)):
            if info.times is None and info.fps is None:
                raise ValueError(f"align=time: {name} ({info.path}) has no frame times, nearest is --align index")
        return ["frames paired by time"]
    if ref.fps is None or cand.fps is None:
        return []
    if ref.variable_fps or cand.variable_fps:
        same = ref.times is not None and cand.times is not None and ref.num_frames == cand.num_frames
        if same and np.allclose(ref.times or (), cand.times or (), atol=2e-3):
            return []
        what = f"frame times differ: REF has {_rate(ref)}, CAND has {_rate(cand)}"
    elif abs(ref.fps - cand.fps) > 1e-3 * ref.fps:
        what = f"frame rate differs: REF has {_rate(ref)}, CAND has {_rate(cand)}"
    else:
        return []
    if "index" not in align:
        advice = "pass --align time to pair frames by time, or --align index to pair frame k with frame k"
        raise ValueError(f"{what}; {advice}")
    return [f"frame k paired with frame k: {what}"]


def paired_frames(
    ref: Clip, cand: Clip, align: Collection[Align] = (), *, resize: bool = False
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Yield the pairs of frames to compare, after `check_pair`; nothing but the current pair is held."""
    as_bytes = "depth" in align and not ref.info.latents
    pairs = _by_time(ref, cand) if "time" in align else zip(ref.frames(), cand.frames(), strict=False)
    for a, b in pairs:
        if as_bytes:
            a, b = to_bytes(a), to_bytes(b)
        if not ref.info.latents and a.shape != b.shape and resize:
            b = resized(b, a.shape[0], a.shape[1])
        yield a, b


def _by_time(ref: Clip, cand: Clip) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Each frame of REF with CAND's nearest in time; REF's frames after CAND's last are left out."""
    ref_times, cand_times = _times(ref.info), _times(cand.info)
    end = cand_times[-1] + _typical_step(cand_times)
    source = cand.frames()
    current, at = next(source), 0
    for frame, when in zip(ref.frames(), ref_times, strict=True):
        if when >= end:
            return
        while at + 1 < len(cand_times) and abs(cand_times[at + 1] - when) < abs(cand_times[at] - when):
            current, at = next(source), at + 1
        yield frame, current


def to_bytes(frame: NDArray[Any]) -> NDArray[np.uint8]:
    """A frame on the scale 0..255 as uint8."""
    if frame.dtype == np.uint8:
        return frame
    return np.clip(np.rint(frame), 0, 255).astype(np.uint8)


def resized(frame: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """A frame [H, W, 3] at another size, bicubic; float frames keep 16 bits."""
    import av

    if frame.dtype == np.uint8:
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        return np.asarray(picture.reformat(width, height, interpolation="BICUBIC").to_ndarray())
    words = np.clip(np.rint(frame * np.float32(65535 / 255)), 0, 65535).astype(np.uint16)
    picture = av.VideoFrame.from_ndarray(words, format="rgb48le")
    scaled = picture.reformat(width, height, interpolation="BICUBIC").to_ndarray()
    return np.asarray(scaled, dtype=np.float32) * np.float32(255 / 65535)


def _times(info: ClipInfo) -> tuple[float, ...]:
    if info.times is not None:
        return info.times
    assert info.fps is not None, info
    return tuple(t / info.fps for t in range(info.num_frames))


def _typical_step(times: tuple[float, ...]) -> float:
    return float(np.median(np.diff(np.asarray(times)))) if len(times) > 1 else 1.0


def _rate(info: ClipInfo) -> str:
    if info.variable_fps:
        low, high = info.interval_ms
        return f"variable frame rate ({low:.1f} to {high:.1f} ms between frames)"
    return f"{info.fps:.5g} fps"


def _format(info: ClipInfo) -> str:
    depth = "float" if info.bit_depth == 32 else f"{info.bit_depth} bits"
    return f"{info.pixel_format} ({depth}{', ' + info.transfer if info.transfer else ''})"
