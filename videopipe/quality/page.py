"""A comparison as one HTML page that opens from disk: player, difference heat map, curves, parameters."""

import base64
import importlib.resources
import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from videopipe.files import replacing
from videopipe.quality.align import Align, paired_frames, resized, to_bytes
from videopipe.quality.clips import Clip, read_side_car
from videopipe.quality.compare import METRICS, Comparison, to_json

_MEASURED = ("finished_at", "output", "peak_memory_bytes", "queue_wait_s", "stages", "total_s")  # keys of a side-car
_LOSSLESS_PX = 256 * 256  # pictures up to this size are kept exactly


def write_page(
    path: Path,
    comparison: Comparison,
    ref: Clip,
    cand: Clip,
    *,
    align: Collection[Align] = (),
    resize: bool = False,
    max_frames: int = 160,
    max_width: int = 480,
    trace: Sequence[str] = (),
) -> None:
    """Write the report of one comparison; the clips are read a second time for their pictures.

    Args:
        path: where the page goes; it is written beside and then renamed.
        comparison: what `compare_clips` gave for these clips with the same `align` and `resize`.
        ref: the clip taken as right.
        cand: the clip judged.
        align: as for `compare_clips`.
        resize: as for `compare_clips`.
        max_frames: frames with pictures; more are thinned out, see `shown_frames`.
        max_width: widest picture in px, larger frames are scaled down.
        trace: lines on the first differing step and block, if recorded.
    Raises:
        ValueError: `max_frames` or `max_width` below 1.
    """
    for name, value in (("max_frames", max_frames), ("max_width", max_width)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1, nearest is 1")
    template = importlib.resources.files("videopipe.quality").joinpath("page.html").read_text(encoding="utf-8")
    before, rest = template.split("<!--SHOTS-->")
    between, after = rest.split("<!--DATA-->")
    chosen = set() if ref.info.latents else set(shown_frames(comparison, max_frames))
    data = page_data(comparison, ref, cand, max_width=max_width, trace=trace)
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as out:
        out.write(before)
        if chosen:
            last = max(chosen)
            for t, (a, b) in zip(range(last + 1), paired_frames(ref, cand, align, resize=resize), strict=False):
                if t in chosen:
                    out.write(_shot(t, a, b, max_width))
        out.write(between)
        out.write(to_json(data).decode().replace("<", "\\u003c"))
        out.write(after)


def page_data(
    comparison: Comparison, ref: Clip, cand: Clip, *, max_width: int = 480, trace: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything in the page but the pictures, as plain values."""
    names = list(comparison.series)
    known = {name: METRICS[series.name] for name, series in comparison.series.items()}
    first = comparison.first_different_frame
    share = f"{comparison.num_different_frames} of {comparison.num_frames} frames differ"
    equal = f"all {comparison.num_frames} frames compared are equal"
    return {
        "title": f"{Path(comparison.ref.path).name} and {Path(comparison.cand.path).name}",
        "verdict": equal if first is None else f"first different frame: {first}; {share}",
        "comparison": comparison.as_json(),
        "metrics": names,
        "units": {name: info.unit for name, info in known.items()},
        "meanings": {name: info.meaning for name, info in known.items()},
        "higher_is_better": {name: info.higher_is_better for name, info in known.items()},
        "worst": {
            name: list(series.worst_frames(5)) if first is not None else []
            for name, series in comparison.series.items()
        },
        "fps": ref.info.fps,
        "width": max_width,
        "start": first,
        "trace": list(trace),
        "parameters": parameter_rows(read_side_car(Path(ref.info.path)), read_side_car(Path(cand.info.path))),
    }


def shown_frames(comparison: Comparison, limit: int) -> list[int]:
    """The frames worth a picture: first difference, worst of each metric with neighbours, the rest spread evenly."""
    count = comparison.num_frames
    if count <= limit:
        return list(range(count))
    wanted: dict[int, None] = {}  # in order of importance
    if comparison.first_different_frame is not None:
        wanted[comparison.first_different_frame] = None
        for rank in range(5):
            for series in comparison.series.values():
                wanted.update(dict.fromkeys(series.worst_frames(5)[rank : rank + 1]))
    for reach in (1, 2):
        for t in list(wanted):
            wanted.update(dict.fromkeys(n for n in (t - reach, t + reach) if 0 <= n < count))
    chosen = list(wanted)[: max(1, limit // 2)] if wanted else []
    spread = limit - len(chosen)
    chosen += [count * i // spread for i in range(spread)]
    return sorted(set(chosen))


def parameter_rows(
    ref: dict[str, Any] | None, cand: dict[str, Any] | None
) -> list[tuple[str, str | None, str | None, bool]]:
    """(dotted key, REF's value, CAND's value, measured) of two side-cars; None where a side has none.

    What was asked for comes first, and of that what differs; then what was measured, such as seconds and memory, which
    is never quite the same twice.
    """
    left, right = _flat(_stages_by_name(ref or {})), _flat(_stages_by_name(cand or {}))
    keys = dict.fromkeys([*left, *right])
    rows = [(key, left.get(key), right.get(key), key.split(".")[0].split("[")[0] in _MEASURED) for key in keys]
    return sorted(rows, key=lambda row: (row[3], row[1] == row[2]))


def _stages_by_name(side_car: dict[str, Any]) -> dict[str, Any]:
    """The side-car with its list of stage times as seconds by stage and rank: the order of events varies."""
    stages = side_car.get("stages")
    if not isinstance(stages, list):
        return side_car
    seconds: dict[str, float] = {}
    for entry in stages:
        if not isinstance(entry, dict) or not isinstance(entry.get("seconds"), int | float):
            return side_car
        name = f"{entry.get('stage')}, rank {entry.get('rank')} [s]"
        seconds[name] = seconds.get(name, 0.0) + entry["seconds"]
    return {**side_car, "stages": dict(sorted(seconds.items()))}


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        items = [(f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        items = [(f"{prefix}[{i}]", item) for i, item in enumerate(value)]
    else:
        return {prefix: value if isinstance(value, str) else to_json_text(value)} if prefix else {}
    flat: dict[str, str] = {}
    for key, item in items:
        flat.update(_flat(item, key))
    return flat


def to_json_text(value: Any) -> str:
    """A plain value as JSON text on one line."""
    return to_json({"v": value}).decode().strip()[len('{"v":') : -1]


def _shot(t: int, ref: NDArray[Any], cand: NDArray[Any], max_width: int) -> str:
    """The script line that adds the pictures of one frame to the page."""
    equal = np.array_equal(ref, cand)
    pictures = [_picture(ref, max_width), "" if equal else _picture(cand, max_width)]
    pictures.append("" if equal else _heat(ref, cand, max_width))
    return "<script>shot({}, {})</script>\n".format(t, ", ".join(f'"{url}"' for url in pictures))


def _picture(frame: NDArray[Any], max_width: int) -> str:
    frame = to_bytes(frame)
    height, width = _scaled(frame.shape[0], frame.shape[1], max_width)
    if (height, width) != frame.shape[:2]:
        frame = resized(frame, height, width)
    return _data_url(frame, "png" if height * width <= _LOSSLESS_PX else "jpeg")


def _heat(ref: NDArray[Any], cand: NDArray[Any], max_width: int) -> str:
    """Largest difference of the channels [H, W]; where scaled down, the largest of the pixels below: none is lost."""
    difference = np.abs(cand.astype(np.float32) - ref.astype(np.float32)).max(axis=2)
    height, width = _scaled(difference.shape[0], difference.shape[1], max_width)
    if (height, width) != difference.shape:
        rows = np.linspace(0, difference.shape[0], height + 1).astype(int)[:-1]
        cols = np.linspace(0, difference.shape[1], width + 1).astype(int)[:-1]
        difference = np.maximum.reduceat(np.maximum.reduceat(difference, rows, axis=0), cols, axis=1)
    return _data_url(np.ceil(difference).clip(0, 255).astype(np.uint8), "png")


def _scaled(height: int, width: int, max_width: int) -> tuple[int, int]:
    if width <= max_width:
        return height, width
    return max(1, round(height * max_width / width)), max_width


def _data_url(picture: NDArray[np.uint8], form: str) -> str:
    """A picture [H, W] or [H, W, 3] as a data URL."""
    import av

    grey = picture.ndim == 2
    source = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="gray" if grey else "rgb24")
    target = io.BytesIO()
    codec, layout = ("png", "gray" if grey else "rgb24") if form == "png" else ("mjpeg", "yuvj444p")
    with av.open(target, "w", format="image2pipe") as container:
        stream = container.add_stream(codec, rate=1)
        stream.width, stream.height, stream.pix_fmt = picture.shape[1], picture.shape[0], layout
        if form == "jpeg":
            stream.options = {"qmin": "3", "qmax": "3"}
        for packet in (*stream.encode(source.reformat(format=layout)), *stream.encode()):
            container.mux(packet)
    return f"data:image/{form};base64,{base64.b64encode(target.getvalue()).decode()}"
