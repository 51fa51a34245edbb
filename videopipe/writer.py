"""The process that writes clips: takes chunks of frames through shared memory, encodes them, names the finished file.

`python -m videopipe.writer` reads one JSON object a line from standard input (`ToWriter`) and answers on standard
output (`FromWriter`). It obeys in order; several clips may be open at once. A clip that cannot be written is reported
once, with its cause, and what still comes for it is ignored; other clips go on. When standard input closes, which
happens however the other side dies, it drops what is unfinished, within the time of one frame, and ends.
"""

import contextlib
import os
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from videopipe.clip_file import ClipFile, clip_path
from videopipe.handover import attach
from videopipe.media import FrameFormat, finish_side_car, side_car_path
from videopipe.records import SideCar
from videopipe.trace import ENGINE_RANK, Span, SpanRecorder

ALIVE_EVERY_S = 1.0

# ---- to the writer -------------------------------------------------------------------------------------------------


class OpenClip(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Begin a clip; `clip` is a number of the sender's, the rest as `ClipFile` takes it."""

    clip: int
    request: str
    stem: str
    format: FrameFormat
    shape: tuple[int, int, int, int]
    fps: float
    codec: str
    crf: int
    pixel_format: str


class WriteFrames(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Append `num_frames` frames, raw bytes at their place in a file of the whole clip, which stays the sender's."""

    clip: int
    first_frame: int
    num_frames: int
    path: str


class CloseClip(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """All frames have been sent: give the clip its name and write its side-car, completed."""

    clip: int
    side_car: SideCar


class DropClip(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Nobody wants the clip any more."""

    clip: int


ToWriter = OpenClip | WriteFrames | CloseClip | DropClip

# ---- from the writer -----------------------------------------------------------------------------------------------


class ChunkWritten(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The frames from `first_frame` on have been given to the encoder or the file."""

    clip: int
    first_frame: int
    spans: tuple[Span, ...] = ()


class ClipWritten(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Clip and side-car lie on disk under their names."""

    clip: int
    path: str
    side_car: SideCar
    spans: tuple[Span, ...] = ()


class ClipFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The clip cannot be written, nothing of it is left. `path` is the file in question, `cause` one line.

    `kind`: `disk` the operating system refused, `refused` frames that do not fit this file, `lost` the writer died.
    """

    clip: int
    kind: Literal["disk", "refused", "lost"]
    path: str
    cause: str
    spans: tuple[Span, ...] = ()


class Alive(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A sign of life, every second, from a thread of its own."""


FromWriter = ChunkWritten | ClipWritten | ClipFailed | Alive

# ---- the process ---------------------------------------------------------------------------------------------------


class _OpenFile:
    """A clip under way."""

    def __init__(self, message: OpenClip, file: ClipFile) -> None:
        self.message = message
        self.file = file
        self.target = file.path  # what is being written
        self.seconds = 0.0


class Unwanted:
    """Clips that nobody wants any more: noted as soon as that is heard, so that long work stops at the next frame."""

    def __init__(self) -> None:
        self.everything = False
        self.clips: set[int] = set()

    def __contains__(self, clip: int) -> bool:
        return self.everything or clip in self.clips


class Service:
    """Obeys the messages for one writer.

    Args:
        answer: takes what there is to say.
        unwanted: written by another thread.
        clip_file: makes the file of a clip.
    """

    def __init__(
        self, answer: Callable[[FromWriter], None], unwanted: Unwanted, clip_file: type[ClipFile] = ClipFile
    ) -> None:
        self._answer = answer
        self._unwanted = unwanted
        self._clip_file = clip_file
        self._open: dict[int, _OpenFile] = {}
        self._recorder = SpanRecorder(ENGINE_RANK)

    def obey(self, message: ToWriter) -> None:
        """Do what one message says. A clip that cannot be written is reported and forgotten."""
        from av import FFmpegError

        try:
            if isinstance(message, OpenClip):
                self._begin(message)
            elif isinstance(message, DropClip):
                self._drop(message.clip)
            elif message.clip in self._open and message.clip not in self._unwanted:
                self._go_on(message, self._open[message.clip])
        except (OSError, ValueError, FFmpegError) as error:
            self._fail(message, error)

    def abort(self) -> None:
        """Drop every clip that is open."""
        while self._open:
            self._open.popitem()[1].file.abort()

    def _begin(self, message: OpenClip) -> None:
        file = self._clip_file(
            Path(message.stem),
            message.format,
            shape=message.shape,
            fps=message.fps,
            codec=message.codec,
            crf=message.crf,
            pixel_format=message.pixel_format,
        )
        self._open[message.clip] = _OpenFile(message, file)

    def _go_on(self, message: WriteFrames | CloseClip, clip: _OpenFile) -> None:
        begin = time.monotonic()
        with self._recorder.span("write", request=clip.message.request):
            if isinstance(message, CloseClip):
                path = clip.file.close()
            elif message.num_frames:
                self._write(message, clip)
        clip.seconds += time.monotonic() - begin
        spans = tuple(self._recorder.drain())
        if isinstance(message, WriteFrames):
            if message.clip not in self._unwanted:
                self._answer(ChunkWritten(clip=message.clip, first_frame=message.first_frame, spans=spans))
            return
        out, stem = clip.message, Path(clip.message.stem)
        sha256 = clip.file.frames_sha256
        clip.target = side_car_path(stem)
        side_car = finish_side_car(message.side_car, path, stem, out.format, clip.seconds, sha256)
        del self._open[message.clip]
        self._answer(ClipWritten(clip=message.clip, path=str(path), side_car=side_car, spans=spans))

    def _write(self, message: WriteFrames, clip: _OpenFile) -> None:
        frames = attach(Path(message.path), (-1, *clip.message.shape[1:]), "uint8").astype(np.uint8, copy=False)
        for frame in range(message.first_frame, message.first_frame + message.num_frames):
            if message.clip in self._unwanted:
                return
            clip.file.write(frame, frames[frame : frame + 1])

    def _drop(self, clip: int) -> None:
        if clip in self._open:
            self._open.pop(clip).file.abort()
        self._unwanted.clips.discard(clip)

    def _fail(self, message: ToWriter, error: Exception) -> None:
        clip = self._open.pop(message.clip, None)
        path, written = "", 0
        if clip is not None:
            path, written = str(clip.target), clip.file.num_frames
            with contextlib.suppress(OSError):  # the first error is the one to tell
                clip.file.abort()
        elif isinstance(message, OpenClip):
            path = str(clip_path(Path(message.stem), message.format))
        cause = str(error)
        if isinstance(error, OSError) and error.strerror:
            cause = f"{error.strerror} after {written} frames"
        kind: Literal["disk", "refused"] = "disk" if isinstance(error, OSError) else "refused"
        self._answer(
            ClipFailed(clip=message.clip, kind=kind, path=path, cause=cause, spans=tuple(self._recorder.drain()))
        )


def serve(clip_file: type[ClipFile] = ClipFile) -> None:
    """Be a writer until standard input closes."""
    # whatever a library prints must not look like an answer
    answers = os.dup(1)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's; it ends its writers itself
    lock = threading.Lock()
    encoder = msgspec.json.Encoder()

    def answer(message: FromWriter) -> None:
        data = encoder.encode(message) + b"\n"
        with lock, contextlib.suppress(BrokenPipeError):  # closed standard input ends the process
            while data:
                data = data[os.write(answers, data) :]

    inbox: queue.SimpleQueue[ToWriter | None] = queue.SimpleQueue()
    unwanted = Unwanted()
    threading.Thread(target=_listen, args=(inbox, unwanted, answer), daemon=True).start()
    import av  # noqa: F401 (while nothing waits for it)

    service = Service(answer, unwanted, clip_file)
    while (message := inbox.get()) is not None and not unwanted.everything:
        service.obey(message)
    service.abort()


def _listen(
    inbox: "queue.SimpleQueue[ToWriter | None]", unwanted: Unwanted, answer: Callable[[FromWriter], None]
) -> None:
    """Take messages off standard input until it closes, so that the sender never waits; say that we live."""
    decoder = msgspec.json.Decoder(ToWriter)
    buffer = b""
    said_at = 0.0
    while True:
        readable = select.select([0], [], [], ALIVE_EVERY_S)[0]
        if time.monotonic() - said_at >= ALIVE_EVERY_S:
            said_at = time.monotonic()
            answer(Alive())
        if not readable:
            continue
        data = os.read(0, 1 << 16)
        if not data:
            unwanted.everything = True
            inbox.put(None)
            return
        *lines, buffer = (buffer + data).split(b"\n")
        for message in map(decoder.decode, lines):
            if isinstance(message, DropClip):
                unwanted.clips.add(message.clip)
            inbox.put(message)


if __name__ == "__main__":
    serve()
    sys.stderr.flush()
    os._exit(0)  # the listening thread may sit in a read
