"""Frames from ranks to the engine on the same host: a file in shared memory that is mapped, not copied.

The engine makes the file of a clip with its full size. Each rank that decodes a share of the clip writes its rows
straight to their place; frames can be looked at as soon as all their rows are there.
"""

import math
import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def make_run_directory(min_free_bytes: int = 1 << 30) -> Path:
    """A private directory for one run's sockets and frames: in shared memory where that has room, else on disk."""
    shared = Path("/dev/shm")
    if shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free >= min_free_bytes:
        return Path(tempfile.mkdtemp(prefix="videopipe-", dir=shared))
    return Path(tempfile.mkdtemp(prefix="videopipe-"))


def write_rows(path: Path, rows: NDArray[np.generic], first_frame: int, first_row: int, height: int) -> None:
    """Write rows of some frames to their place in the file of a clip.

    Args:
        rows: [t, h, W, 3] of frames `first_frame` on, from row `first_row` on; may be empty.
        height: rows of a whole frame.
    Raises:
        OSError: no space left, and the like.
    """
    num_frames, num_rows = rows.shape[:2]
    assert first_row + num_rows <= height, (first_row, rows.shape, height)
    if rows.size == 0:
        return
    rows = np.ascontiguousarray(rows)
    frame_bytes = rows.nbytes // (num_frames * num_rows) * height
    pieces = [rows] if num_rows == height else rows  # whole frames lie one after the other
    with path.open("r+b") as file:
        assert (first_frame + num_frames) * frame_bytes <= os.fstat(file.fileno()).st_size, (first_frame, rows.shape)
        for index, piece in enumerate(pieces):
            file.seek((first_frame + index) * frame_bytes + first_row * frame_bytes // height)
            file.write(piece.data)


class ArrivingClip:
    """A clip that ranks write, and how much of it is there.

    Args:
        path: the file to make; nothing may be there.
        shape, dtype: of the whole: frames [T, H, W, 3], or latents [1, C, T', H', W'], which count as one frame of C
            rows.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: str) -> None:
        self.path = path
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._rows_there = np.zeros(shape[0], dtype=np.int64)
        self._frames_there = 0
        self._mapped: mmap.mmap | None = None
        with path.open("xb") as file:
            file.truncate(math.prod(shape) * self.dtype.itemsize)

    @property
    def complete(self) -> bool:
        """Whether all of it is there."""
        return self._frames_there == self.shape[0]

    def arrived(self, first_frame: int, count: int, rows: int) -> range:
        """So many rows of `count` frames have been written; the frames that are whole now, in the order of time.

        A frame that is whole before an earlier one is told with that one.
        """
        self._rows_there[first_frame : first_frame + count] += rows
        assert self._rows_there.max() <= self.shape[1], (self.path, first_frame, count, rows)
        before = self._frames_there
        partial = np.flatnonzero(self._rows_there[before:] < self.shape[1])
        self._frames_there = before + int(partial[0]) if len(partial) else self.shape[0]
        return range(before, self._frames_there)

    def look_at(self, frames: range) -> NDArray[np.generic]:
        """Frames that are whole, [t, H, W, 3], not copied and read-only; the memory stays while the array does."""
        assert frames.stop <= self._frames_there, (frames, self._frames_there)
        if self._mapped is None:
            with self.path.open("rb") as file:
                self._mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        whole = np.frombuffer(self._mapped, dtype=self.dtype).reshape(self.shape)
        return whole[frames.start : frames.stop]

    def claim(self) -> NDArray[np.generic]:
        """The whole array, and unlink the file: the memory is freed when the array is.

        The array is writable, and private to this process.
        """
        assert self.complete, (self.path, self._frames_there, self.shape)
        array = attach(self.path, self.shape, self.dtype)
        self.path.unlink()
        return array

    def link(self, path: Path) -> Path:
        """A second name for the memory, so that it stays when the first one goes; the second is the caller's."""
        os.link(self.path, path)
        return path

    def discard(self) -> None:
        """Nobody wants it any more under its own name."""
        self.path.unlink()


def attach(path: Path, shape: tuple[int, ...], dtype: str | np.dtype[Any]) -> NDArray[np.generic]:
    """Map the raw bytes of an array; they stay until somebody unlinks the file.

    The array is writable, and private to this process.

    Raises:
        ValueError: the file has another size.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return np.frombuffer(mapped, dtype=np.dtype(dtype)).reshape(shape)
