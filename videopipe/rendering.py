"""A finished clip in the caller's hands: frames, latents or a file, how it came about, and how to write it down."""

import shlex
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from numpy.typing import NDArray

from videopipe import media
from videopipe.clip_file import write_frames
from videopipe.config import OutputConfig
from videopipe.geometry import VideoSpec
from videopipe.records import OutputFormat, SideCar

if TYPE_CHECKING:
    from torch import Tensor


class WriteError(RuntimeError):
    """A clip could not be written; its latents were kept where that was possible.

    Attributes:
        path: the file in question.
        cause: one line.
        latents: where its latents are kept, None where they are not.
        command: decodes them again.
    """

    def __init__(self, path: Path, cause: str, latents: Path | None, not_kept: str = "") -> None:
        self.path = path
        self.cause = cause
        self.latents = latents
        self.command = None
        kept = not_kept
        if latents is not None:
            self.command = f"videopipe decode {shlex.quote(str(latents))} -o {shlex.quote(str(path.parent))}"
            kept = f"its latents are kept in {latents}, to decode them: {self.command}"
        super().__init__(f"{path} could not be written: {cause}; {kept}")


class RenderResult(msgspec.Struct, frozen=True, kw_only=True):
    """One finished clip.

    `frames`: uint8 [T, H, W, 3], None for latent output; `latents`: float32 [1, C, T', H', W'] as the DiT left them,
    None otherwise. `side_car` tells how it was made; `save` completes it with the name and the hash of what it wrote.
    Of a clip that was rendered into a folder, `path` is the file, there are no frames, and `side_car` is complete.
    Where it could not be written, `path` is None, `error` tells why, and `latents` are here, if they were not lost.
    """

    request_id: str
    frames: Any  # NDArray[np.uint8] | None
    latents: Any  # Tensor | None
    side_car: SideCar
    output: OutputConfig
    path: Path | None = None
    error: WriteError | None = None

    def save(self, path: str | Path) -> Path:
        """Write the clip and its side-car under `path`, whose suffix chooses the format.

        `.mp4` a video, `.npy` uint8 [T, H, W, 3], `.safetensors` the latents, no suffix a folder of PNG files. The
        side-car lies beside it as `<stem>.json`. Both appear whole or not at all.

        Returns:
            The path of the clip.
        Raises:
            ValueError: a suffix without a format, or frames asked for where there are latents (or the reverse).
            OSError: disk full and the like; nothing is left behind.
        """
        path = Path(path)
        formats: dict[str, OutputFormat] = {".mp4": "mp4", ".npy": "npy", ".safetensors": "latent", "": "png"}
        if path.suffix not in formats:
            raise ValueError(
                f"path={str(path)!r} must end in .mp4, .npy, .safetensors or nothing (PNG folder), nearest is .mp4"
            )
        return self._write(path.with_suffix("") if path.suffix else path, formats[path.suffix])[0]

    def save_to(self, directory: str | Path) -> Path:
        """Write `<id>.<ext>` and `<id>.json` into `directory`, in the configured format. Otherwise as `save`."""
        return self._write(Path(directory) / self.request_id, self.output.format)[0]

    def saved_to(self, directory: Path) -> "RenderResult":
        """Write latents as `save_to`; the result as one that was rendered into that folder, or its `error`."""
        try:
            path, side_car = self._write(directory / self.request_id, "latent")
        except OSError as error:
            return self.rescued(_latents_path(directory / self.request_id), _one_line(error))
        return msgspec.structs.replace(self, path=path, side_car=side_car)

    def rescued(self, path: Path, cause: str) -> "RenderResult":
        """Keep the latents since `path` could not be written: beside it, or else in a new folder of
        `output.rescue_directory`.

        Returns:
            The result with the error that tells where, or why not; nothing is raised.
        """
        if self.latents is None:
            error = WriteError(path, cause, None, "its latents were lost with their rank")
            return msgspec.structs.replace(self, error=error)
        problems = []
        directories: tuple[Callable[[], Path], ...] = (lambda: path.parent, self._make_rescue_directory)
        for make_directory in directories:
            try:
                latents = self._keep_latents(make_directory())
            except OSError as problem:
                problems.append(_one_line(problem))
            else:
                return msgspec.structs.replace(self, error=WriteError(path, cause, latents))
        where = f"its latents are only in memory, they could not be written either ({'; '.join(problems)})"
        return msgspec.structs.replace(self, error=WriteError(path, cause, None, where))

    def _keep_latents(self, directory: Path) -> Path:
        stem = directory / f"{self.request_id}.rescued"
        try:
            return self._write(stem, "latent")[0]
        except OSError:
            _latents_path(stem).unlink(missing_ok=True)  # without its side-car it cannot be decoded
            raise

    def _make_rescue_directory(self) -> Path:
        parent = Path(self.output.rescue_directory or tempfile.gettempdir())
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="videopipe-rescued-", dir=parent))  # clips of other runs have the same ids

    def _write(self, stem: Path, form: OutputFormat) -> tuple[Path, SideCar]:
        stem.parent.mkdir(parents=True, exist_ok=True)
        side_car = self.side_car
        begin = time.monotonic()
        if form == "latent":
            if self.latents is None:
                raise ValueError("format='latent' needs latents but this result holds frames, nearest is 'mp4'")
            tensor: Tensor = self.latents
            path = media.write_latents(tensor, stem, {"request_id": self.request_id, "prompt": side_car.request.prompt})
            sha256 = media.latents_hash(tensor)
        else:
            if self.frames is None and self.path is not None:
                raise ValueError(f"this clip is in {self.path} already, its frames are not here")
            if self.frames is None:
                raise ValueError(f"format={form!r} needs frames but this result holds latents, nearest is 'latent'")
            frames: NDArray[Any] = self.frames
            out = self.output
            path = write_frames(
                frames,
                stem,
                form,
                fps=side_car.request.spec.fps,
                codec=out.codec,
                crf=out.crf,
                pixel_format=out.pixel_format,
            )
            sha256 = media.frames_hash(frames)
        return path, media.finish_side_car(side_car, path, stem, form, time.monotonic() - begin, sha256)


def check_output(output: OutputConfig, spec: VideoSpec, where: str = "") -> None:
    """Refuse a size that no file of the configured format can hold; `where` is put before the field's name.

    Raises:
        ValueError: names the field, the value and the nearest valid value.
    """
    if output.format == "mp4":
        media.check_video(
            height=spec.height,
            width=spec.width,
            fps=spec.fps,
            codec=output.codec,
            crf=output.crf,
            pixel_format=output.pixel_format,
            where=where,
        )


def _one_line(error: OSError) -> str:
    name = "" if error.filename is None else f": {error.filename}"
    return f"{error.strerror}{name}" if error.strerror else str(error)


def _latents_path(stem: Path) -> Path:
    return stem.with_name(stem.name + ".safetensors")
