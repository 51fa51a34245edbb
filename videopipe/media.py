"""Finished clips on disk: video, frames, latents and what is written beside them.

PyAV, torch and safetensors are imported where they are used, so that this module loads without them.
"""

import difflib
import functools
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from videopipe.files import commit, part_path, remove, replacing, write_bytes
from videopipe.records import OutputFormat, SideCar, StageTime
from videopipe.trace import ENGINE_RANK

if TYPE_CHECKING:
    import torch

Frames = npt.NDArray[np.uint8]
FrameFormat = Literal["mp4", "png", "npy"]

HIGHEST_FPS = 1000
CONTAINERS = {".mp4": "mp4", ".mkv": "matroska"}


class _Codec(NamedTuple):
    highest_crf: int
    options: dict[str, str]


# One thread each: x265 and SVT-AV1 size their pools by the machine, and x265's output depends on that.
CODECS = {
    "libx264": _Codec(51, {}),
    "libx264rgb": _Codec(51, {}),
    "libx265": _Codec(51, {"x265-params": "pools=none:frame-threads=1:log-level=error"}),
    "libsvtav1": _Codec(63, {"svtav1-params": "lp=1"}),
}

_MPEG_RANGE = 1  # AVCOL_RANGE_MPEG
_BT709 = 1  # AVCOL_SPC_BT709, AVCOL_PRI_BT709 and AVCOL_TRC_BT709 share this number


class VideoInfo(NamedTuple):
    """What `probe` finds: height and width in px, number of frames, mean frames per second, FFmpeg's decoder name."""

    height: int
    width: int
    num_frames: int
    fps: float
    codec: str


class VideoWriter:
    """Encodes frames into a video file that appears under its name only when it is complete.

    ```
    with VideoWriter(path, height=480, width=832, fps=24) as writer:
        for frames in decoded:                       # uint8 [T, H, W, 3], any number of times
            writer.write(frames)
    ```
    Colour: RGB is converted with the BT.709 matrix to limited range, and the stream is tagged so. Without a tag a
    player guesses the matrix from the picture size (BT.601 below 720 rows), and the same clip changes colour between
    players and sizes; with it PyAV, decord and browsers agree. RGB pixel formats (libx264rgb) carry no matrix.
    The same frames give the same bytes: one encoder thread, no time stamp in the header. The index of an mp4 lies at
    its front, so that playing can begin before the download ends.

    Args:
        path: `.mp4`, or `.mkv`; its folder must exist.
        height: rows, px.
        width: columns, px.
        fps: frames per second; 23.976, 29.97, 59.94 and the like mean n*1000/1001.
        codec: one of `CODECS`, FFmpeg's encoder name.
        crf: constant rate factor, 0 (best) to the codec's highest.
        pixel_format: FFmpeg's name; subsampled ones such as yuv420p need even sizes.
    Raises:
        ValueError: names the field, the value and the nearest valid value, before a file is opened.
        OSError: the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        height: int,
        width: int,
        fps: float,
        codec: str = "libx264",
        crf: int = 18,
        pixel_format: str = "yuv420p",
    ) -> None:
        check_video(
            height=height,
            width=width,
            fps=fps,
            codec=codec,
            crf=crf,
            pixel_format=pixel_format,
            container=path.suffix.lower(),
        )
        import av

        self.path = path
        self.num_frames = 0
        self._shape = (height, width, 3)
        self._pixel_format = pixel_format
        self._is_rgb = av.VideoFormat(pixel_format).is_rgb
        self._rate = frame_rate(fps)
        self._part = part_path(path)
        self._closed = False
        kind = CONTAINERS[path.suffix.lower()]
        # bitexact keeps the random segment id out of Matroska; an mp4 is the same with or without it
        options = {"movflags": "+faststart"} if kind == "mp4" else {"fflags": "+bitexact"}
        self._container = av.open(str(self._part), "w", format=kind, options=options)
        stream = self._container.add_stream(codec, rate=self._rate, options={"crf": str(crf), **_options(codec)})
        stream.height, stream.width, stream.pix_fmt = height, width, pixel_format
        context = stream.codec_context
        context.thread_count = 1
        context.color_primaries = context.color_trc = _BT709
        if not self._is_rgb:
            context.colorspace, context.color_range = _BT709, _MPEG_RANGE
        self._stream = stream

    def write(self, frames: Frames) -> None:
        """Append frames, uint8 [T, H, W, 3], T may be 0.

        Raises:
            ValueError: shape or dtype is not what this file holds.
            OSError: the disk is full or the file cannot be written.
        """
        import av

        if self._closed:
            raise ValueError(f"{self.path}: already closed")
        check_frames(frames)
        if frames.shape[1:] != self._shape:
            raise ValueError(f"frames of {list(frames.shape)} do not fit this file of [T, {str(list(self._shape))[1:]}")
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if self._is_rgb:
                frame = frame.reformat(format=self._pixel_format)
            else:
                frame = frame.reformat(format=self._pixel_format, dst_colorspace=_BT709, dst_color_range=_MPEG_RANGE)
            frame.pts, frame.time_base = self.num_frames, 1 / self._rate
            with nullcontext() if self.num_frames else scheduled_as_before():  # the first one opens the encoder
                packets = self._stream.encode(frame)
            self._container.mux(packets)
            self.num_frames += 1

    def close(self) -> None:
        """Finish the file, bring it to disk and give it its name. A second call does nothing.

        Raises:
            ValueError: no frame was written.
            OSError: the file cannot be written; nothing is left behind.
        """
        if self._closed:
            return
        if not self.num_frames:
            self.abort()
            raise ValueError(f"{self.path}: num_frames=0, nearest is 1")
        try:
            self._container.mux(self._stream.encode(None))
            self._container.close()
            commit(self._part, self.path)
            self._closed = True
        finally:
            self.abort()  # does nothing after a good end

    def abort(self) -> None:
        """Drop what was written; the file never appears."""
        import av

        if self._closed:
            return
        self._closed = True
        try:
            self._container.close()
        except av.FFmpegError:
            pass  # on a full disk the trailer of a file nobody wants cannot be written either
        finally:
            remove(self._part)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


@contextmanager
def scheduled_as_before() -> Iterator[None]:
    """The calling thread, and threads begun meanwhile, leave under the scheduling policy that it entered with (Linux).

    SVT-AV1 4.1, where it may (as root), makes the thread that opens it real-time, of the highest priority, and its own
    threads with it. Processes forked from such a thread are real-time too: a rank of gloo that polls then keeps its
    core from the very thread it waits for, and stands still for minutes.
    """
    if not hasattr(os, "sched_setscheduler"):
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    threads = Path("/proc/self/task")
    others = {thread.name for thread in threads.iterdir()}
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)
        for thread in threads.iterdir():
            if thread.name not in others:
                with suppress(ProcessLookupError):  # it has ended
                    os.sched_setscheduler(int(thread.name), policy, parameters)


def _options(codec: str) -> dict[str, str]:
    """What makes an encoder give the same bytes for the same frames every time: x264's code for AVX-512 does not."""
    options = CODECS[codec].options
    if codec in ("libx264", "libx264rgb") and _has_avx512():
        options = {**options, "x264-params": "asm=avx2"}
    return options


@functools.cache
def _has_avx512() -> bool:
    cpus = Path("/proc/cpuinfo")
    return cpus.exists() and "avx512f" in cpus.read_text()


def check_video(
    *,
    height: int,
    width: int,
    fps: float,
    codec: str = "libx264",
    crf: int = 18,
    pixel_format: str = "yuv420p",
    container: str = ".mp4",
    where: str = "",
) -> None:
    """Refuse what no file can hold, before anything is rendered; `where` is put before the field's name.

    Raises:
        ValueError: names the field, the value and the nearest valid value.
    """
    check_choice(f"{where}container", container, CONTAINERS)
    check_choice(f"{where}codec", codec, CODECS)
    highest = CODECS[codec].highest_crf
    if not 0 <= crf <= highest:
        near = min(max(crf, 0), highest)
        raise ValueError(f"{where}crf={crf} must be between 0 and {highest} for {codec}, nearest is {near}")
    if not (math.isfinite(fps) and 0 < fps <= HIGHEST_FPS):
        near = HIGHEST_FPS if fps > 0 else 24
        raise ValueError(f"{where}fps={fps:g} must be above 0 and at most {HIGHEST_FPS}, nearest is {near}")
    import av

    check_choice(f"{where}codec", codec, [name for name in CODECS if name in av.codecs_available], " in this FFmpeg")
    # yuvj* would mean full range, which the tag of this writer contradicts
    formats = [f.name for f in av.Codec(codec, "w").video_formats if not f.name.startswith("yuvj")]
    check_choice(f"{where}pixel_format", pixel_format, formats, f" for {codec}")
    layout = av.VideoFormat(pixel_format)
    for field, value, multiple in (
        ("height", height, 4 // layout.chroma_height(4)),
        ("width", width, 4 // layout.chroma_width(4)),
    ):
        if value < 1 or value % multiple:
            near = max(1, -(-value // multiple)) * multiple
            rule = f"must be a positive multiple of {multiple} for {pixel_format}"
            raise ValueError(f"{where}{field}={value} {rule}, nearest is {near}")


def frame_rate(fps: float) -> Fraction:
    """Frames per second as a fraction; 23.976, 29.97, 59.94 and other rounded NTSC rates become n*1000/1001."""
    if fps != round(fps):
        ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
        if abs(float(ntsc) - fps) < 5e-4:
            return ntsc
    return Fraction(fps).limit_denominator(1001)


def read_video(path: Path) -> Frames:
    """All frames of a video, uint8 [T, H, W, 3]; the matrix and range of the stream's own tags are used.

    Raises:
        ValueError: not a video, or fewer frames than its header promises (a cut-off file).
        OSError: the file cannot be read.
    """
    import av

    info = probe(path)
    frames: Frames = np.empty((info.num_frames, info.height, info.width, 3), np.uint8)
    count = 0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                if count < info.num_frames:
                    frames[count] = frame.to_ndarray(format="rgb24")
                count += 1
    except av.InvalidDataError as error:
        raise ValueError(f"{path}: broken video data after {count} of {info.num_frames} frames") from error
    if count != info.num_frames:
        raise ValueError(f"{path}: {count} frames, its header promises {info.num_frames}")
    return frames


def probe(path: Path) -> VideoInfo:
    """Size, length, rate and codec of a video without decoding it.

    Raises:
        ValueError: not a video.
        OSError: the file cannot be read.
    """
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: holds no video stream")
            stream = container.streams.video[0]
            # Matroska has no frame count in its header: count the packets
            count = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
            rate = stream.average_rate or stream.guessed_rate or Fraction(0)
            return VideoInfo(stream.height, stream.width, count, float(rate), stream.codec_context.name)
    except av.InvalidDataError as error:
        raise ValueError(f"{path}: not a video that can be read") from error


def write_latents(latents: "torch.Tensor", path_stem: Path, metadata: dict[str, str]) -> Path:
    """Write latents [B, C, T', H', W'] of any dtype to `<stem>.safetensors` under the key `latents`.

    Args:
        latents: on any device.
        path_stem: folder and name without extension.
        metadata: stored in the header, text to text.
    Raises:
        ValueError: latents are not five-dimensional, or metadata is not text.
        OSError: cannot be written; nothing is left behind.
    """
    import safetensors.torch

    if latents.dim() != 5:
        raise ValueError(f"latents of {list(latents.shape)} have {latents.dim()} dims, need 5: [B, C, T', H', W']")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise ValueError(f"metadata[{key!r}]={value!r} must be text, nearest is {str(value)!r}")
    path = path_stem.with_name(f"{path_stem.name}.safetensors")
    tensors = {"latents": latents.detach().cpu().contiguous()}
    with replacing(path) as part:
        part.write_bytes(safetensors.torch.save(tensors, metadata=metadata))
    return path


def read_latents(path: Path) -> tuple["torch.Tensor", dict[str, str]]:
    """The latents [B, C, T', H', W'] that `write_latents` wrote, on the CPU, and their metadata.

    Raises:
        ValueError: the file has no key `latents`.
    """
    import safetensors

    with safetensors.safe_open(path, framework="pt") as file:
        if "latents" not in file.keys():  # noqa: SIM118 (safe_open has no __contains__)
            raise ValueError(f"{path}: no key 'latents', it holds {', '.join(file.keys())}")
        return file.get_tensor("latents"), dict(file.metadata() or {})


def finish_side_car(
    side_car: SideCar, path: Path, stem: Path, form: OutputFormat, seconds: float, sha256: str
) -> SideCar:
    """Complete the side-car of a clip that has been written, and write it as `<stem>.json`.

    Args:
        path: the clip.
        form: its format; `sha256` is the hash of its latents or its frames accordingly.
        seconds: how long writing took.
    Returns:
        What was written.
    """
    write = StageTime(stage="write", rank=ENGINE_RANK, seconds=round(seconds, 6))
    latent = form == "latent"
    complete = msgspec.structs.replace(
        side_car,
        output=path.name,
        format=form,
        stages=(*side_car.stages, write),
        frames_sha256=None if latent else sha256,
        latents_sha256=sha256 if latent else None,
    )
    write_side_car(complete, side_car_path(stem))
    return complete


def side_car_path(stem: Path) -> Path:
    """Where the side-car of the clip `<stem>.<ext>` lies; a dot in the name is kept."""
    return stem.with_name(stem.name + ".json")


def write_side_car(side_car: SideCar, path: Path) -> Path:
    """Write the side-car as indented JSON, replacing an earlier one."""
    write_bytes(path, msgspec.json.format(msgspec.json.encode(side_car), indent=2) + b"\n")
    return path


def read_side_car(path: Path) -> SideCar:
    """Read a side-car back, refusing unknown keys and wrong types.

    Raises:
        ValueError: names the file and the path of the field.
    """
    data = path.read_bytes()
    try:
        side_car = msgspec.json.decode(data, type=SideCar)
    except msgspec.DecodeError as error:  # also of wrong types: ValidationError is one
        raise ValueError(f"{path}: {error}") from error
    _refuse_unknown_keys(msgspec.json.decode(data), side_car, f"{path}: $")
    return side_car


class FramesHash:
    """`frames_hash` of a clip that comes in chunks; `shape` is that of the whole clip, [T, H, W, 3]."""

    def __init__(self, shape: Sequence[int], dtype: npt.DTypeLike = np.uint8) -> None:
        self._digest = hashlib.sha256(_hash_header("frames", np.dtype(dtype).str, shape))

    def update(self, frames: Frames) -> None:
        """The next frames."""
        for picture in frames:
            self._digest.update(np.ascontiguousarray(picture).data)

    def hexdigest(self) -> str:
        """What `frames_hash` gives, once all frames have come."""
        return self._digest.hexdigest()


def frames_hash(frames: Frames) -> str:
    """SHA-256 in hex over dtype, shape and bytes (in C order, whatever the strides) of [T, H, W, 3]."""
    digest = FramesHash(frames.shape, frames.dtype)
    digest.update(frames)
    return digest.hexdigest()


def latents_hash(latents: "torch.Tensor") -> str:
    """SHA-256 in hex over dtype, shape and bytes of latents of any dtype, on any device."""
    import torch

    digest = hashlib.sha256(_hash_header("latents", str(latents.dtype).removeprefix("torch."), latents.shape))
    digest.update(latents.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_choice(field: str, value: str, valid: Iterable[str], condition: str = "") -> None:
    """Refuse a value that is none of `valid`.

    Raises:
        ValueError: names the field, the value and the nearest valid value.
    """
    names = list(valid)
    if value not in names:
        rule = f"must be one of {', '.join(names)}{condition}"
        raise ValueError(f"{field}={value!r} {rule}, nearest is {_nearest(value, names)!r}")


def _nearest(name: str, valid: Sequence[str]) -> str:
    """The entry of `valid` that `name` is closest to in spelling, the first one when none is close."""
    return (difflib.get_close_matches(name, valid, n=1, cutoff=0.4) or valid)[0]


def check_frames(frames: Frames) -> None:
    """Refuse what is not uint8 [T, H, W, 3].

    Raises:
        ValueError: tells dtype and shape.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames of {frames.dtype} {list(frames.shape)}, need uint8 [T, H, W, 3]")


def png_files(frames: Frames) -> Iterable[bytes]:
    """PNG files of frames [T, H, W, 3], by FFmpeg's encoder: PyAV is a dependency of ours already, Pillow is not."""
    import av

    context = av.CodecContext.create("png", "w")
    context.height, context.width, context.pix_fmt = frames.shape[1], frames.shape[2], "rgb24"
    context.time_base = Fraction(1, 24)
    context.thread_count = 1  # one packet for one frame, at once
    for index, picture in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame.pts = index
        (packet,) = context.encode(frame)
        yield bytes(packet)


def _hash_header(kind: str, dtype: str, shape: Iterable[int]) -> bytes:
    return f"{kind} {dtype} {list(shape)}\n".encode()


def _refuse_unknown_keys(raw: Any, decoded: Any, where: str) -> None:
    if isinstance(decoded, msgspec.Struct):
        fields = decoded.__struct_fields__
        for key in raw:
            if key not in fields:
                raise ValueError(f"{where}.{key} is not a field, nearest is {_nearest(key, fields)!r}")
        for field in fields:
            if field in raw:
                _refuse_unknown_keys(raw[field], getattr(decoded, field), f"{where}.{field}")
    elif isinstance(decoded, tuple):
        for index, (raw_item, item) in enumerate(zip(raw, decoded, strict=True)):
            _refuse_unknown_keys(raw_item, item, f"{where}[{index}]")
