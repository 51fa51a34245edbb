"""One clip's file or folder, written chunk by chunk: video, PNG files or npy, under its name only when complete."""

from pathlib import Path
from types import TracebackType
from typing import Protocol, get_args

import numpy as np

from videopipe.files import commit, part_path, remove
from videopipe.media import FrameFormat, Frames, FramesHash, VideoWriter, check_choice, check_frames, png_files


class FrameSink(Protocol):
    """What takes the frames of one clip in one format."""

    def write(self, frames: Frames) -> None:
        """Append frames, uint8 [T, H, W, 3]."""

    def close(self) -> None:
        """Bring everything to disk and give it its name."""

    def abort(self) -> None:
        """Leave nothing behind; does nothing after `close`."""


class ClipFile:
    """A clip that grows chunk by chunk and gets its name, whole, at `close`; `write_frames` in pieces, the same bytes.

    ```
    with ClipFile(Path("out/fox"), "mp4", shape=(129, 720, 1280, 3)) as file:
        for first_frame, frames in decoded:
            file.write(first_frame, frames)
    ```
    Args:
        path_stem: folder and name without extension; a dot in the name is kept.
        format: "mp4" -> `<stem>.mp4`; "npy" -> `<stem>.npy`, uint8 [T, H, W, 3];
            "png" -> the folder `<stem>` with `00000.png`, `00001.png`, ...
        shape: of the whole clip, [T, H, W, 3], T at least 1.
        fps, codec, crf, pixel_format: for "mp4", see `VideoWriter`.
    Attributes:
        path: the file or folder.
        num_frames: frames written so far.
    Raises:
        ValueError: names the field, the value and the nearest valid value.
        OSError: cannot be written.
    """

    def __init__(
        self,
        path_stem: Path,
        format: FrameFormat,
        *,
        shape: tuple[int, int, int, int],
        fps: float = 24.0,
        codec: str = "libx264",
        crf: int = 18,
        pixel_format: str = "yuv420p",
    ) -> None:
        check_choice("format", format, get_args(FrameFormat))
        if shape[0] < 1:
            raise ValueError(f"num_frames={shape[0]}, nearest is 1")
        self.path = clip_path(path_stem, format)
        self.num_frames = 0
        self._shape = shape
        self._hash = FramesHash(shape)
        self._sink: FrameSink
        if format == "png":
            self._sink = _PngFolder(self.path)
        elif format == "npy":
            self._sink = _NpyFile(self.path, shape)
        else:
            self._sink = VideoWriter(
                self.path, height=shape[1], width=shape[2], fps=fps, codec=codec, crf=crf, pixel_format=pixel_format
            )

    def write(self, first_frame: int, frames: Frames) -> None:
        """Append a chunk, uint8 [t, H, W, 3], that begins at frame `first_frame` of the clip.

        Raises:
            ValueError: not the next frames (the missing or repeated ones are named), more than the clip has, or of
                another size or dtype.
            OSError: the disk is full or the file cannot be written.
        """
        check_frames(frames)
        if frames.shape[1:] != self._shape[1:]:
            raise ValueError(f"{self.path}: frames of {list(frames.shape)} do not fit a clip of {list(self._shape)}")
        if first_frame > self.num_frames:
            raise ValueError(f"{self.path}: {_frames(self.num_frames, first_frame)} missing")
        end = first_frame + len(frames)
        if first_frame < self.num_frames:
            raise ValueError(f"{self.path}: {_frames(first_frame, min(end, self.num_frames))} written twice")
        if end > self._shape[0]:
            raise ValueError(f"{self.path}: frames up to {end - 1} do not fit a clip of {self._shape[0]}")
        self._sink.write(frames)
        self._hash.update(frames)
        self.num_frames = end

    def close(self) -> Path:
        """Give the clip its name.

        Raises:
            ValueError: frames are missing, they are named; nothing is left behind.
            OSError: the disk is full or the file cannot be written; nothing is left behind.
        """
        if self.num_frames < self._shape[0]:
            self.abort()
            raise ValueError(f"{self.path}: {_frames(self.num_frames, self._shape[0])} missing")
        self._sink.close()
        return self.path

    def abort(self) -> None:
        """Drop what was written; the clip never appears. Does nothing after `close`."""
        self._sink.abort()

    @property
    def frames_sha256(self) -> str:
        """`media.frames_hash` of the clip, once all frames have been written."""
        return self._hash.hexdigest()

    def __enter__(self) -> "ClipFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def write_frames(
    frames: Frames,
    path_stem: Path,
    format: FrameFormat,
    fps: float = 24.0,
    codec: str = "libx264",
    crf: int = 18,
    pixel_format: str = "yuv420p",
) -> Path:
    """Write one clip in the format asked for, replacing an earlier one of the same name.

    Args:
        frames: uint8 [T, H, W, 3], T at least 1.
        path_stem, format, fps, codec, crf, pixel_format: see `ClipFile`.
    Returns:
        The path of the file or folder.
    Raises:
        ValueError: names the field, the value and the nearest valid value.
        OSError: cannot be written; nothing new is left behind.
    """
    check_frames(frames)
    shape = (frames.shape[0], frames.shape[1], frames.shape[2], 3)
    with ClipFile(path_stem, format, shape=shape, fps=fps, codec=codec, crf=crf, pixel_format=pixel_format) as clip:
        clip.write(0, frames)
    return clip.path


def clip_path(path_stem: Path, format: FrameFormat) -> Path:
    """The file or folder of a clip in that format."""
    return path_stem if format == "png" else path_stem.with_name(f"{path_stem.name}.{format}")


def _frames(begin: int, end: int) -> str:
    return f"frame {begin} is" if end - begin == 1 else f"frames {begin} to {end - 1} are"


class _PngFolder:
    """PNG files by number in a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = part_path(path)
        self._part.mkdir()
        self._num_frames = 0

    def write(self, frames: Frames) -> None:
        for data in png_files(frames):
            (self._part / f"{self._num_frames:05d}.png").write_bytes(data)
            self._num_frames += 1

    def close(self) -> None:
        try:
            commit(self._part, self._path)
        finally:
            self.abort()

    def abort(self) -> None:
        remove(self._part)


class _NpyFile:
    """NumPy's file of a C-contiguous array whose shape is known before its bytes."""

    def __init__(self, path: Path, shape: tuple[int, int, int, int]) -> None:
        self._path = path
        self._part = part_path(path)
        self._file = self._part.open("wb", buffering=0)
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
        try:
            np.lib.format.write_array_header_1_0(self._file, header)
        except OSError:
            self.abort()
            raise

    def write(self, frames: Frames) -> None:
        rest = np.ascontiguousarray(frames).reshape(-1).data
        while rest:  # a disk that fills up takes a part first
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        try:
            self._file.close()
            commit(self._part, self._path)
        finally:
            self.abort()

    def abort(self) -> None:
        self._file.close()
        remove(self._part)
