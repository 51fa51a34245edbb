"""A finished clip in the caller's hands: frames or latents, how it came about, and how to write it down."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from numpy.typing import NDArray

from videopipe import media
from videopipe.clip_file import write_frames
from videopipe.config import OutputConfig
from videopipe.records import OutputFormat, SideCar

if TYPE_CHECKING:
    from torch import Tensor


class RenderResult(msgspec.Struct, frozen=True, kw_only=True):
    """One finished clip.

    `frames`: uint8 [T, H, W, 3], None for latent output; `latents`: float32 [1, C, T', H', W'] as the DiT left them,
    None otherwise. `side_car` tells how it was made; `save` completes it with the name and the hash of what it wrote.
    """

    request_id: str
    frames: Any  # NDArray[np.uint8] | None
    latents: Any  # Tensor | None
    side_car: SideCar
    output: OutputConfig

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
        return self._write(path.with_suffix("") if path.suffix else path, formats[path.suffix])

    def save_to(self, directory: str | Path) -> Path:
        """Write `<id>.<ext>` and `<id>.json` into `directory`, in the configured format. Otherwise as `save`."""
        return self._write(Path(directory) / self.request_id, self.output.format)

    def _write(self, stem: Path, form: OutputFormat) -> Path:
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
        media.finish_side_car(side_car, path, stem, form, time.monotonic() - begin, sha256)
        return path
