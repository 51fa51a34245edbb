"""Clips for the tests of `videopipe.quality`: a moving picture, ways to spoil it, and ways to write it."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from videopipe.media import scheduled_as_before

Frames = NDArray[np.uint8]


def moving_picture(num_frames: int = 24, height: int = 96, width: int = 128) -> Frames:
    """Blocks and soft waves that move 2 px to the left per frame [T, H, W, 3]."""
    rng = np.random.default_rng(7)
    span = width + 2 * num_frames
    blocks = rng.integers(30, 226, (height // 4 + 1, span // 4 + 1, 3)).repeat(4, 0).repeat(4, 1)[:height, :span]
    wave = 20 * np.sin(np.arange(span) / 9.0)[None, :, None]
    wide = np.clip(blocks + wave, 0, 255).astype(np.uint8)
    return np.stack([wide[:, 2 * t : 2 * t + width] for t in range(num_frames)])


def noisy(frames: Frames, levels: int = 3, seed: int = 0) -> Frames:
    """Independent noise of up to `levels` on every value."""
    noise = np.random.default_rng(seed).integers(-levels, levels + 1, frames.shape)
    return np.clip(frames.astype(np.int16) + noise, 0, 255).astype(np.uint8)


def brighter(frames: Frames, levels: int) -> Frames:
    """`levels` added to every value."""
    return np.clip(frames.astype(np.int16) + levels, 0, 255).astype(np.uint8)


def write_video(
    path: Path,
    frames: Frames,
    *,
    codec: str = "libx264rgb",
    pix_fmt: str = "rgb24",
    crf: str = "0",
    fps: int = 24,
    times: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Encode [T, H, W, 3]; exact by default. `times` are presentation times in ms for a variable frame rate."""
    with scheduled_as_before(), av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"crf": crf, **(options or {})})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        stream.thread_count = 1
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for t, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[t], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_images(folder: Path, frames: Frames) -> Path:
    """One PNG per frame, numbered without leading zeros."""
    folder.mkdir()
    for t, picture in enumerate(frames):
        write_image(folder / f"frame_{t}.png", picture)
    return folder


def write_image(path: Path, picture: Frames) -> None:
    """One PNG [H, W, 3]."""
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = picture.shape[0], picture.shape[1], "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
