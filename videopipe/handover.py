"""Finished frames from a rank to the engine on the same host: a file in shared memory that is mapped, not copied."""

import mmap
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def make_run_directory(min_free_bytes: int = 1 << 30) -> Path:
    """A private directory for one run's sockets and frames: in shared memory where that has room, else on disk."""
    shared = Path("/dev/shm")
    if shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free >= min_free_bytes:
        return Path(tempfile.mkdtemp(prefix="videopipe-", dir=shared))
    return Path(tempfile.mkdtemp(prefix="videopipe-"))


def publish(array: NDArray[np.generic], path: Path) -> None:
    """Write an array's bytes under a temporary name, then rename: a reader never sees half of them.

    Raises:
        OSError: no space left, and the like; nothing is left behind.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(np.ascontiguousarray(array).data)
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def claim(path: Path, shape: tuple[int, ...], dtype: str) -> NDArray[np.generic]:
    """Map what `publish` wrote and unlink it: the memory is freed when the array is.

    The array is writable, and private to this process.
    """
    array = attach(path, shape, dtype)
    path.unlink()
    return array


def attach(path: Path, shape: tuple[int, ...], dtype: str) -> NDArray[np.generic]:
    """Map what `publish` wrote; it stays until somebody unlinks it. The array is writable, private to this process.

    Raises:
        ValueError: the file has another size.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return np.frombuffer(mapped, dtype=np.dtype(dtype)).reshape(shape)
