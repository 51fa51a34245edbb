"""Opening what may be compared: video files, frame folders, npy and safetensors frames, latents, output directories.

A clip says what it is (`ClipInfo`) and yields its frames one at a time, so that an hour needs no more memory than a
second. Frames are [H, W, 3], uint8, or float32 on the scale 0..255 where the source holds more than 8 bits.
"""

import importlib.util
import io
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

Kind = Literal["video", "folder", "npy", "safetensors"]
Decoder = Literal["auto", "decord", "av"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".gif", ".y4m"})
ARRAY_SUFFIXES = frozenset({".npy", ".safetensors"})
DECORD_BYTES = 64 * 2**20  # decord reads the packets of a whole file ahead: larger ones would not stream
_HDR_TRANSFERS = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}


class ClipInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a clip before its frames are read.

    `times` are presentation times in seconds, in order of display, where the source has them. `latents` clips hold
    [.., H', W'] arrays of any number of channels; their `height` and `width` are latent rows and columns.
    `bit_depth` is bits per channel, 32 for float; `transfer` names an HDR transfer curve.
    """

    path: str
    kind: Kind
    latents: bool
    num_frames: int
    height: int
    width: int
    fps: float | None = None
    times: tuple[float, ...] | None = None
    pixel_format: str | None = None
    bit_depth: int = 8
    transfer: str | None = None
    decoder: str | None = None

    @property
    def variable_fps(self) -> bool:
        """Whether the time between frames varies by more than a tenth."""
        low, high = self.interval_ms
        return high > 1.1 * low and high - low > 2.0  # a container that rounds to 1 ms is not variable

    @property
    def interval_ms(self) -> tuple[float, float]:
        """Shortest and longest time between two frames in ms; (0, 0) where unknown."""
        if self.times is None or len(self.times) < 2:
            return 0.0, 0.0
        steps = np.diff(np.asarray(self.times)) * 1000.0
        return float(steps.min()), float(steps.max())


class Clip(Protocol):
    """A source of frames that can be read more than once."""

    info: ClipInfo

    def frames(self) -> Iterator[NDArray[Any]]:
        """Yield every frame in order: [H, W, 3] uint8 or float32 in 0..255, or one latent frame.

        Raises:
            ValueError: a frame cannot be read, has another size, or fewer frames come than promised.
        """
        ...


def open_clip(path: Path | str, decoder: Decoder = "auto") -> Clip:
    """The clip at `path`, told by its suffix and content.

    Args:
        path: a video file, a folder of images, or an npy or safetensors file of frames or latents.
        decoder: for video files. "auto" takes decord where it is installed and can read the file, up to 64 MiB, else
            PyAV, which gives the same frames.
    Raises:
        ValueError: nothing there, empty, damaged, or not something that holds frames; the message names the path.
    """
    path = Path(path)
    if decoder not in get_args(Decoder):
        raise ValueError(f"decoder={decoder!r} must be one of {', '.join(get_args(Decoder))}, nearest is 'auto'")
    if path.is_dir():
        return FolderClip(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes)")
    if path.suffix == ".npy":
        return NpyClip(path)
    if path.suffix == ".safetensors":
        return SafetensorsClip(path)
    return VideoClip(path, decoder)


class VideoClip:
    """A video file, decoded with decord or PyAV."""

    def __init__(self, path: Path, decoder: Decoder = "auto", *, decord_bytes: int = DECORD_BYTES) -> None:
        """Look at the container; with "auto", files above `decord_bytes` go to PyAV.

        Raises:
            ValueError: not a readable video, or decord was asked for by name and cannot read it.
        """
        self._path = path
        self.info = _probe(path)
        self._decoder: Literal["decord", "av"] = "av"
        if decoder == "decord" and not self._decord_can():
            raise ValueError(f"decoder='decord' is not installed or cannot read {path}, nearest is 'av'")
        streams = path.stat().st_size <= decord_bytes
        if decoder == "decord" or (decoder == "auto" and streams and self._decord_can()):
            self._decoder = "decord"
        self.info = msgspec.structs.replace(self.info, decoder=self._decoder)

    def use(self, decoder: Literal["decord", "av"]) -> None:
        """Read with this decoder from now on, so that both sides of a comparison share one."""
        self._decoder = decoder
        self.info = msgspec.structs.replace(self.info, decoder=decoder)

    def _decord_can(self) -> bool:
        """Whether decord is installed, opens the file and counts the same frames; it has no AV1 and gives 8 bits."""
        if importlib.util.find_spec("decord") is None or self.info.bit_depth > 8:
            return False
        import decord

        try:
            count = len(decord.VideoReader(str(self._path)))
        except decord.DECORDError:
            return False
        return bool(count == self.info.num_frames)

    def frames(self) -> Iterator[NDArray[Any]]:
        """Yield frames [H, W, 3]: uint8, or float32 in 0..255 for more than 8 bits per channel."""
        count = 0
        for frame in self._decord_frames() if self._decoder == "decord" else self._av_frames():
            if frame.shape[:2] != (self.info.height, self.info.width):
                raise ValueError(
                    f"{self._path}: frame {count} is {frame.shape[1]}x{frame.shape[0]}, "
                    f"the first is {self.info.width}x{self.info.height}"
                )
            yield frame
            count += 1
        if count != self.info.num_frames:
            raise ValueError(self._stops_after(count))

    def _stops_after(self, count: int) -> str:
        """Decoders work ahead on threads, so the damage lies at this frame or a little after it."""
        return f"{self._path}: damaged: decoding stops after {count} of {self.info.num_frames} frames"

    def _decord_frames(self) -> Iterator[NDArray[Any]]:
        import decord

        done = 0
        try:
            reader = decord.VideoReader(str(self._path))
            for _ in range(len(reader)):
                yield reader.next().asnumpy()
                done += 1
        except decord.DECORDError as error:
            raise ValueError(self._stops_after(done)) from error

    def _av_frames(self) -> Iterator[NDArray[Any]]:
        import av

        done = 0
        try:
            with av.open(str(self._path)) as container:
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                for frame in container.decode(stream):
                    if frame.is_corrupt:
                        raise ValueError(f"{self._path}: damaged: frame {done} is incomplete")
                    yield _rgb(frame, self.info.bit_depth)
                    done += 1
        except av.FFmpegError as error:
            raise ValueError(f"{self._stops_after(done)} ({error.strerror})") from error


class FolderClip:
    """A folder of image files, in the natural order of their names."""

    def __init__(self, path: Path) -> None:
        self._files = image_files(path)
        if not self._files:
            raise ValueError(f"{path}: the folder holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
        first, pixel_format, depth = _read_image(self._files[0])
        self.info = ClipInfo(
            path=str(path),
            kind="folder",
            latents=False,
            num_frames=len(self._files),
            height=first.shape[0],
            width=first.shape[1],
            fps=_side_car_fps(path),
            pixel_format=pixel_format,
            bit_depth=depth,
        )

    def frames(self) -> Iterator[NDArray[Any]]:
        """Yield frames [H, W, 3], one file each."""
        for file in self._files:
            frame, _, depth = _read_image(file)
            if frame.shape[:2] != (self.info.height, self.info.width) or depth != self.info.bit_depth:
                raise ValueError(
                    f"{file}: is {frame.shape[1]}x{frame.shape[0]} with {depth} bits, "
                    f"the first frame is {self.info.width}x{self.info.height} with {self.info.bit_depth} bits"
                )
            yield frame


class NpyClip:
    """Frames [T, H, W, 3] or latents [C, T', H', W'] of an npy file, mapped rather than loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{path}: not a readable npy file ({error})") from error
        self._array = array
        self.info = _array_info(path, "npy", array.shape, str(array.dtype))

    def frames(self) -> Iterator[NDArray[Any]]:
        """Yield frames [H, W, 3] or latent frames [B, C, H', W']."""
        for t in range(self.info.num_frames):
            yield _array_frame(self._path, t, np.asarray(self._array[_time_index(self._array.shape, t)]), self.info)


class SafetensorsClip:
    """Frames or latents of a safetensors file: the tensor named `frames` or `latents`, or the only one."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._path = path
        try:
            with safe_open(str(path), framework="pt") as file:
                names = list(file.keys())
                known = [name for name in ("frames", "latents") if name in names]
                if not known and len(names) != 1:
                    raise ValueError(f"{path}: tensors are {', '.join(names) or 'none'}; need `frames` or `latents`")
                self._name = (known or names)[0]
                view = file.get_slice(self._name)
                shape, dtype = tuple(view.get_shape()), view.get_dtype()
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
        self._shape = shape
        latents = True if self._name == "latents" else None
        self.info = _array_info(path, "safetensors", shape, {"U8": "uint8"}.get(dtype, dtype.lower()), latents)

    def frames(self) -> Iterator[NDArray[Any]]:
        """Yield frames [H, W, 3] or latent frames [B, C, H', W']."""
        from safetensors import safe_open

        with safe_open(str(self._path), framework="pt") as file:
            view = file.get_slice(self._name)
            for t in range(self.info.num_frames):
                tensor = view[_time_index(self._shape, t, latents=self.info.latents)]
                if self.info.bit_depth != 8:
                    tensor = tensor.float()  # numpy has no bfloat16
                yield _array_frame(self._path, t, tensor.numpy(), self.info)


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, `frame_2.png` before `frame_10.png`."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
    return sorted(files, key=lambda file: [int(part) if part.isdigit() else part for part in _split(file.name)])


def clips_in(folder: Path) -> dict[str, list[Path]]:
    """The clips of an output directory by request id, which is the file's stem; lossless forms first.

    Raises:
        ValueError: the folder holds no clip.
    """
    found: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):  # a clip that is being written
            continue
        if entry.is_dir():
            if image_files(entry):
                found.setdefault(entry.name, []).append(entry)
        elif entry.suffix.lower() in VIDEO_SUFFIXES | ARRAY_SUFFIXES:
            found.setdefault(entry.stem, []).append(entry)
    if not found:
        suffixes = ", ".join(sorted(VIDEO_SUFFIXES | ARRAY_SUFFIXES))
        raise ValueError(f"{folder}: holds neither images nor clips ({suffixes})")
    order = {".npy": 0, ".safetensors": 1, "": 2}
    return {stem: sorted(paths, key=lambda path: order.get(form_of(path), 3)) for stem, paths in found.items()}


def form_of(clip: Path) -> str:
    """The suffix that tells a clip's form, "" for a folder of images, whose name may hold a dot."""
    return "" if clip.is_dir() else clip.suffix.lower()


def is_output_directory(path: Path) -> bool:
    """Whether `path` is a folder of clips rather than of one clip's images."""
    return path.is_dir() and not image_files(path)


def side_car_path(clip: Path) -> Path:
    """Where the side-car JSON of a clip lies: `<id>.json` beside it."""
    return clip.parent / f"{clip.name if clip.is_dir() else clip.stem}.json"


def read_side_car(clip: Path) -> dict[str, Any] | None:
    """The side-car of a clip as plain values, None where there is none.

    Raises:
        ValueError: the file is there but not a JSON object.
    """
    path = side_car_path(clip)
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path}: not a side-car file ({error})") from error


def _side_car_fps(clip: Path) -> float | None:
    side_car = read_side_car(clip) or {}
    request = side_car.get("request")
    spec = request.get("spec") if isinstance(request, dict) else None
    fps = spec.get("fps") if isinstance(spec, dict) else None
    return float(fps) if isinstance(fps, int | float) and fps > 0 else None


def _split(name: str) -> list[str]:
    return re.split(r"(\d+)", name)  # text and digits alternate, so names compare part by part


def _probe(path: Path) -> ClipInfo:
    """Everything the container tells, and the times of all frames, without decoding any but the first."""
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: holds no video stream")
            stream = container.streams.video[0]
            promised = stream.frames
            base = stream.time_base or Fraction(1, 1)
            count = 0
            stamps: list[int] = []
            for packet in container.demux(stream):  # not kept: together they are the whole file
                if packet.size and not packet.is_discard:
                    count += 1
                    if packet.pts is not None:
                        stamps.append(packet.pts)
            stamps.sort()
            times = tuple(float((stamp - stamps[0]) * base) for stamp in stamps) if len(stamps) == count else None
            if not count:
                raise ValueError(f"{path}: has no frames")
            if promised and promised != count:
                raise ValueError(f"{path}: cut short: its header says {promised} frames, {count} are there")
            context = stream.codec_context
            layout = av.VideoFormat(context.pix_fmt) if context.pix_fmt else None
            return ClipInfo(
                path=str(path),
                kind="video",
                latents=False,
                num_frames=count,
                height=context.height,
                width=context.width,
                fps=float(stream.average_rate) if stream.average_rate else None,
                times=times,
                pixel_format=context.pix_fmt,
                bit_depth=max((part.bits for part in layout.components), default=8) if layout else 8,
                transfer=_HDR_TRANSFERS.get(int(context.color_trc)),
            )
    except av.FFmpegError as error:
        raise ValueError(f"{path}: not a readable video ({error.strerror})") from error


def _rgb(frame: Any, bit_depth: int) -> NDArray[Any]:
    """An av frame as [H, W, 3]: uint8, or float32 in 0..255 from 16-bit RGB."""
    if bit_depth <= 8:
        return np.asarray(frame.to_ndarray(format="rgb24"))
    return np.asarray(frame.to_ndarray(format="rgb48le"), dtype=np.float32) * np.float32(255 / 65535)


def _read_image(path: Path) -> tuple[NDArray[Any], str, int]:
    """One image [H, W, 3], its pixel format and bits per channel."""
    import av

    try:
        with av.open(io.BytesIO(path.read_bytes())) as container:
            for frame in container.decode(video=0):
                depth = max(part.bits for part in frame.format.components)
                return _rgb(frame, depth), frame.format.name, depth
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error
    raise ValueError(f"{path}: holds no image")


def _array_info(path: Path, kind: Kind, shape: tuple[int, ...], dtype: str, latents: bool | None = None) -> ClipInfo:
    """Tell frames [T, H, W, 3] or [1, T, H, W, 3] from latents [C, T', H', W'] or [B, C, T', H', W']."""
    if len(shape) not in (4, 5) or 0 in shape:
        raise ValueError(f"{path}: shape {list(shape)} is neither frames [T, H, W, 3] nor latents [B, C, T', H', W']")
    if latents is None:
        latents = shape[-1] != 3
    if not latents and (shape[-1] != 3 or (len(shape) == 5 and shape[0] != 1)):
        raise ValueError(f"{path}: shape {list(shape)} holds several clips or no RGB, need [T, H, W, 3]")
    if not latents and dtype not in ("uint8", "float16", "float32", "float64", "f16", "f32", "f64", "bf16", "bfloat16"):
        raise ValueError(f"{path}: dtype {dtype} is not one for frames, need uint8 or float in 0..1")
    time_axis, row_axis = (-3, -2) if latents else (-4, -3)
    return ClipInfo(
        path=str(path),
        kind=kind,
        latents=latents,
        num_frames=shape[time_axis],
        height=shape[row_axis],
        width=shape[row_axis + 1],
        fps=_side_car_fps(path),
        pixel_format=f"{dtype} {'x'.join(map(str, shape))}" if latents else dtype,
        bit_depth=8 if dtype == "uint8" and not latents else 32,
    )


def _time_index(shape: tuple[int, ...], t: int, latents: bool | None = None) -> tuple[Any, ...]:
    """The index that takes frame t out of an array of `_array_info`'s shapes."""
    if latents is None:
        latents = shape[-1] != 3
    if latents:
        return (..., t, slice(None), slice(None))
    return (0, t) if len(shape) == 5 else (t,)


def _array_frame(path: Path, t: int, frame: NDArray[Any], info: ClipInfo) -> NDArray[Any]:
    """Frame t as it is compared; float frames in 0..1 go to 0..255."""
    if frame.dtype == np.uint8 and not info.latents:
        return frame
    frame = frame.astype(np.float32)
    if not np.isfinite(frame).all():
        raise ValueError(f"{path}: frame {t} holds NaN or infinity")
    if info.latents:
        return frame
    low, high = float(frame.min()), float(frame.max())
    if low < -0.01 or high > 1.01:
        raise ValueError(f"{path}: frame {t} has values in {low:g}..{high:g}; float frames must lie in 0..1")
    return frame * np.float32(255.0)
