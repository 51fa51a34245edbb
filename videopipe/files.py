"""Files and folders that appear under their final name whole, or not at all."""

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART_SUFFIX = ".part"


def part_path(path: Path) -> Path:
    """An unused temporary name beside `path`: hidden, ends with `.part`, on the same file system, so a rename works."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{PART_SUFFIX}")


def remove_parts(path: Path, pid: int) -> None:
    """Remove the temporary files beside `path` that a process left which was killed while it wrote `path`."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.{pid}.*{PART_SUFFIX}"):
        remove(part)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write a file or a folder under; it becomes `path` when the block ends well.

    A block that raises leaves `path` as it was and nothing else behind. A process killed inside the block leaves `path`
    as it was and the temporary file.

    Raises:
        OSError: writing or renaming failed.
    """
    part = part_path(path)
    try:
        yield part
        commit(part, path)
    finally:
        remove(part)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, replacing what is there."""
    with replacing(path) as part:
        part.write_bytes(data)


def commit(part: Path, path: Path) -> None:
    """Bring the finished `part` (a file or a flat folder) to disk and rename it to `path`, replacing what is there.

    A file is replaced in one step. A folder cannot be: the old one is renamed away first, so for a moment `path` may be
    missing, never half written.
    """
    if part.is_dir():
        for entry in part.iterdir():
            _fsync(entry)
    _fsync(part)
    if part.is_dir() and path.is_dir():
        old = part_path(path)
        path.rename(old)
        part.rename(path)
        shutil.rmtree(old)
    else:
        part.replace(path)
    _fsync(path.parent)


def remove(part: Path) -> None:
    """Remove a temporary file or folder if it is there."""
    if part.is_dir():
        shutil.rmtree(part)
    else:
        part.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
