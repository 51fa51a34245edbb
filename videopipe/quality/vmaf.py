"""VMAF per frame, measured by an ffmpeg program that was built with libvmaf."""

import importlib
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from videopipe.quality.align import to_bytes


class _Metrics(msgspec.Struct):
    vmaf: float


class _Frame(msgspec.Struct):
    metrics: _Metrics


class _Log(msgspec.Struct):
    frames: list[_Frame]


def find_ffmpeg(program: Path | None = None) -> Path:
    """An ffmpeg with libvmaf: the one given, else `ffmpeg` on the path, else that of the package imageio-ffmpeg.

    Raises:
        ValueError: none has libvmaf; names those looked at.
    """
    looked = []
    for candidate in [program] if program is not None else _installed():
        looked.append(str(candidate))
        if _has_libvmaf(candidate):
            return candidate
    where = ", ".join(looked) or "no ffmpeg is installed"
    raise ValueError(f"vmaf needs an ffmpeg built with libvmaf, not found in: {where}; nearest is imageio-ffmpeg's")


def vmaf(pairs: Iterable[tuple[NDArray[Any], NDArray[Any]]], ffmpeg: Path) -> list[float]:
    """VMAF (0 to 100, libvmaf's own default model) of each pair of frames REF, CAND [H, W, 3], streamed.

    Raises:
        ValueError: no pair, sizes that change, or ffmpeg fails; carries the last line it printed.
    Source: Netflix, "Toward a practical perceptual video quality metric", 2016; libvmaf.
    """
    source = iter(pairs)
    first = next(source, None)
    if first is None:
        raise ValueError("vmaf: no frames to compare")
    height, width = first[0].shape[:2]
    with tempfile.TemporaryDirectory(prefix="videopipe-vmaf-") as scratch:
        # Both pictures travel in one stream, one above the other: two pipes could wait for each other.
        top, low = f"crop={width}:{height}:0:0", f"crop={width}:{height}:0:{height}"
        crops = f"split[a][b];[a]{top},format=yuv444p[cand];[b]{low},format=yuv444p[ref]"
        command = [str(ffmpeg), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
        command += ["-s", f"{width}x{2 * height}", "-r", "24", "-i", "pipe:0"]
        command += ["-lavfi", f"{crops};[cand][ref]libvmaf=log_fmt=json:log_path=log.json", "-f", "null", "-"]
        with open(f"{scratch}/errors", "w+", encoding="utf-8", errors="replace") as errors:
            process = subprocess.Popen(command, cwd=scratch, stdin=subprocess.PIPE, stdout=errors, stderr=errors)
            assert process.stdin is not None
            try:
                count = _feed(process.stdin, first, source)
                process.stdin.close()
            except BrokenPipeError:
                count = -1  # ffmpeg gave up; its message follows
            finally:
                if process.poll() is None and not process.stdin.closed:
                    process.kill()
                process.wait()
            errors.seek(0)
            lines = errors.read().strip().splitlines()
        log = Path(scratch) / "log.json"
        if process.returncode != 0 or count < 0 or not log.exists():
            raise ValueError(f"vmaf: {ffmpeg} failed ({process.returncode}): {lines[-1] if lines else 'no message'}")
        values = [frame.metrics.vmaf for frame in msgspec.json.decode(log.read_bytes(), type=_Log).frames]
    if len(values) != count:
        raise ValueError(f"vmaf: {ffmpeg} measured {len(values)} of {count} frames")
    return values


def _feed(
    pipe: Any, first: tuple[NDArray[Any], NDArray[Any]], rest: Iterable[tuple[NDArray[Any], NDArray[Any]]]
) -> int:
    count = 0
    for ref, cand in [first]:
        pipe.write(np.concatenate([to_bytes(cand), to_bytes(ref)]).tobytes())
        count += 1
    for ref, cand in rest:
        if ref.shape != first[0].shape or cand.shape != first[0].shape:
            raise ValueError(f"vmaf: frame {count} is {list(cand.shape)}, the first is {list(first[0].shape)}")
        pipe.write(np.concatenate([to_bytes(cand), to_bytes(ref)]).tobytes())
        count += 1
    return count


def _installed() -> list[Path]:
    found = []
    on_path = shutil.which("ffmpeg")
    if on_path is not None:
        found.append(Path(on_path))
    if importlib.util.find_spec("imageio_ffmpeg") is not None:
        found.append(Path(importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()))
    return found


def _has_libvmaf(program: Path) -> bool:
    try:
        listing = subprocess.run(
            [str(program), "-hide_banner", "-filters"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise ValueError(f"ffmpeg={program} cannot be started ({error.strerror})") from error
    return " libvmaf " in listing.stdout
