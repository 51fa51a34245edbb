"""The writer processes of a run: started, fed, replaced when one dies, ended with the run."""

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from pipelines.launch import describe_exit, module_environment
from videopipe.clip_file import clip_path
from videopipe.config import OutputConfig
from videopipe.files import remove_parts
from videopipe.media import side_car_path
from videopipe.records import SideCar
from videopipe.writer import (
    Alive,
    ChunkWritten,
    ClipFailed,
    ClipWritten,
    CloseClip,
    DropClip,
    FromWriter,
    OpenClip,
    ToWriter,
    WriteFrames,
)

WRITER = (sys.executable, "-m", "videopipe.writer")
ATTEMPTS = 2  # a clip whose writers die this often is given up: it may be the clip that kills them

News = ChunkWritten | ClipWritten | ClipFailed


class _Clip:
    """All that was said about one clip, so that it can be said again to another writer."""

    def __init__(self, message: OpenClip, writer: "_Writer", memory: Path) -> None:
        self.open = message
        self.writer = writer
        self.memory = memory
        self.chunks: list[WriteFrames] = []
        self.close: CloseClip | None = None
        self.attempts = 1

    @property
    def path(self) -> Path:
        return clip_path(Path(self.open.stem), self.open.format)

    def free(self) -> None:
        """Free its memory."""
        self.memory.unlink(missing_ok=True)


class _Writer:
    """One process and what is on its way to and from it."""

    def __init__(self, command: Sequence[str], now: float) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=module_environment(),
            start_new_session=True,  # Ctrl-C in a terminal reaches the engine alone
            bufsize=0,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.input, self.output = self.process.stdin, self.process.stdout
        os.set_blocking(self.input.fileno(), False)
        self.heard_at = now
        self._unsent = bytearray()
        self._unread = b""

    def send(self, messages: Iterable[ToWriter]) -> None:
        """Queue messages; a process that is gone is told by `read`."""
        for message in messages:
            self._unsent += msgspec.json.encode(message) + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what the pipe takes now."""
        try:
            while self._unsent:
                del self._unsent[: os.write(self.input.fileno(), self._unsent)]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._unsent.clear()

    def read(self, decoder: "msgspec.json.Decoder[FromWriter]") -> list[FromWriter] | None:
        """What it has said, None when it is gone. To be called when there is something."""
        data = os.read(self.output.fileno(), 1 << 16)
        if not data:
            return None
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [decoder.decode(line) for line in lines]

    def end(self) -> None:
        """Close the pipes, when the process has ended."""
        self.input.close()
        self.output.close()


class WriterPool:
    """Writer processes that take clips in chunks of frames. Not thread-safe: one thread owns it; no call blocks.

    A clip is `open`ed, gets its `frames` in order, and is closed; `news` tells what became of it. Its frames lie in one
    file in shared memory, which belongs to the pool from then on and is freed with the clip; a part of it is given as
    soon as it is there. Until then a clip is whole in memory, and is given to another writer if its own dies. Clips go
    to the writer with the fewest.

    Args:
        writers: processes; they start with the first clip, or with `start`.
        silent_after_s: a writer without a sign of life for this long is killed, which `news` tells as its death.
        start_timeout_s: likewise, before its first one.
        command: what to start.
    """

    def __init__(
        self,
        writers: int = 1,
        *,
        silent_after_s: float = 8.0,
        start_timeout_s: float = 120.0,
        command: Sequence[str] = WRITER,
    ) -> None:
        self._size = writers
        self._silent_after_s = silent_after_s
        self._start_timeout_s = start_timeout_s
        self._command = command
        self._writers: dict[int, _Writer] = {}  # by the descriptor that tells what they say
        self._clips: dict[int, _Clip] = {}
        self._next_clip = 0
        self._decoder: msgspec.json.Decoder[FromWriter] = msgspec.json.Decoder(FromWriter)
        self._epoll = select.epoll()
        self._greeted: set[_Writer] = set()
        self._last_look = time.monotonic()

    def start(self) -> None:
        """Have all processes running, so that they import while nothing waits for them."""
        while len(self._writers) < self._size:
            self._new_writer()

    @property
    def pids(self) -> list[int]:
        """Process ids of the running writers."""
        return [writer.process.pid for writer in self._writers.values()]

    def fileno(self) -> int:
        """Readable when there are `news`."""
        return self._epoll.fileno()

    def open(
        self,
        stem: Path,
        shape: tuple[int, int, int, int],
        fps: float,
        output: OutputConfig,
        request: str,
        memory: Path,
    ) -> int:
        """Begin a clip of [T, H, W, 3] uint8 under `stem`; the number by which it is known from now on.

        Args:
            stem: folder and name without extension; the folder exists.
            output: format (not `latent`), codec, crf and pixel format.
            request: names the spans of the trace.
            memory: the file of all frames.
        """
        assert output.format != "latent", output
        self.start()
        clip = self._next_clip
        self._next_clip += 1
        message = OpenClip(
            clip=clip,
            request=request,
            stem=str(stem.absolute()),
            format=output.format,
            shape=shape,
            fps=fps,
            codec=output.codec,
            crf=output.crf,
            pixel_format=output.pixel_format,
        )
        self._clips[clip] = _Clip(message, self._least_busy(), memory)
        self._clips[clip].writer.send([message])
        return clip

    def frames(self, clip: int, first_frame: int, num_frames: int) -> None:
        """The next frames lie at their place in the clip's file."""
        if clip not in self._clips or not num_frames:  # has failed, as `news` tells or has told
            return
        told = self._clips[clip]
        message = WriteFrames(clip=clip, first_frame=first_frame, num_frames=num_frames, path=str(told.memory))
        told.chunks.append(message)
        told.writer.send([message])

    def close_clip(self, clip: int, side_car: SideCar) -> None:
        """All frames have been given: the clip gets its name, and its side-car, completed, beside it."""
        if clip in self._clips:
            self._clips[clip].close = CloseClip(clip=clip, side_car=side_car)
            self._clips[clip].writer.send([CloseClip(clip=clip, side_car=side_car)])

    def drop(self, clip: int) -> None:
        """Nobody wants this clip any more: nothing of it stays, and no news will come."""
        if clip in self._clips:
            self._clips[clip].writer.send([DropClip(clip=clip)])
            self._clips.pop(clip).free()

    def news(self, now: float) -> list[News]:
        """What has happened since the last call; to be called when `fileno` is readable, and several times a second.

        Args:
            now: time.monotonic().
        """
        found: list[News] = []
        for descriptor, _ in self._epoll.poll(0):
            writer = self._writers[descriptor]
            messages = writer.read(self._decoder)
            if messages is None:
                found += self._replace(writer)
                continue
            writer.heard_at = now
            self._greeted.add(writer)
            found += [message for message in messages if not isinstance(message, Alive) and self._note(message)]
        for writer in self._writers.values():
            writer.flush()
        self._look_for_silence(now)
        return found

    def close(self, grace_s: float = 2.0) -> None:
        """End the writers; what they have not finished is dropped, and nothing of it stays."""
        for writer in self._writers.values():
            writer.input.close()
        deadline = time.monotonic() + grace_s
        for writer in self._writers.values():
            try:
                writer.process.wait(max(deadline - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                writer.process.kill()
                writer.process.wait()
            self._remove_parts(writer)
            writer.end()
        for clip in self._clips.values():
            clip.free()
        self._writers.clear()
        self._clips.clear()
        if not self._epoll.closed:
            self._epoll.close()

    # -- processes

    def _new_writer(self) -> _Writer:
        writer = _Writer(self._command, time.monotonic())
        self._writers[writer.output.fileno()] = writer
        self._epoll.register(writer.output.fileno(), select.EPOLLIN)
        return writer

    def _least_busy(self) -> _Writer:
        clips = [clip.writer for clip in self._clips.values()]
        return min(self._writers.values(), key=clips.count)

    def _note(self, message: News) -> bool:
        """Keep the books; whether it is still of interest."""
        clip = self._clips.get(message.clip)
        if clip is None:  # dropped in the meantime
            return False
        if not isinstance(message, ChunkWritten):
            self._clips.pop(message.clip).free()
        return True

    def _replace(self, dead: _Writer) -> list[News]:
        """A writer has died: give its clips to another one."""
        del self._writers[dead.output.fileno()]
        self._epoll.unregister(dead.output.fileno())
        code = dead.process.wait()
        self._remove_parts(dead)
        dead.end()
        clips = [(number, clip) for number, clip in self._clips.items() if clip.writer is dead]
        if clips:
            clips[0][1].attempts += 1  # the one that it was most probably at
        lost: list[News] = []
        for number, clip in clips:
            if clip.attempts > ATTEMPTS:
                cause = f"the writer process {describe_exit(code)}, {ATTEMPTS} times while it wrote this clip"
                lost.append(ClipFailed(clip=number, kind="lost", path=str(clip.path), cause=cause))
                self._clips.pop(number).free()
            else:
                self._write_again(clip)
        return lost

    def _write_again(self, clip: _Clip) -> None:
        if len(self._writers) < self._size:
            self._new_writer()
        clip.writer = self._least_busy()
        close = [] if clip.close is None else [clip.close]
        clip.writer.send([clip.open, *clip.chunks, *close])

    def _remove_parts(self, writer: _Writer) -> None:
        """What a writer was at when it was killed; one that ended in order has left nothing."""
        for clip in self._clips.values():
            if clip.writer is writer:
                remove_parts(clip.path, writer.process.pid)
                remove_parts(side_car_path(Path(clip.open.stem)), writer.process.pid)

    def _look_for_silence(self, now: float) -> None:
        if now - self._last_look > 2.0:  # we were stopped ourselves for a while: nobody's silence counts
            for writer in self._writers.values():
                writer.heard_at = now
        self._last_look = now
        for writer in self._writers.values():
            limit = self._silent_after_s if writer in self._greeted else self._start_timeout_s
            if now - writer.heard_at > limit:
                writer.process.kill()
                writer.heard_at = now
