"""Writers that differ from ours on purpose: `python -m tests.writer_twins KIND`, for the tests of what feeds them."""

import os
import sys
import time
from pathlib import Path

from videopipe.clip_file import ClipFile
from videopipe.media import Frames
from videopipe.writer import serve


class Slow(ClipFile):
    """A slow encoder or disk: 20 ms for each frame."""

    def write(self, first_frame: int, frames: Frames) -> None:
        time.sleep(0.02 * len(frames))
        super().write(first_frame, frames)


class NamedTooEarly(Slow):
    """Gives the file its name before it is complete."""

    def write(self, first_frame: int, frames: Frames) -> None:
        super().write(first_frame, frames)
        for part in self.path.parent.glob(f".{self.path.name}.{os.getpid()}.*"):
            if not self.path.exists():
                os.link(part, self.path)


class DropsAFrame(ClipFile):
    """Loses the third frame and says nothing."""

    def write(self, first_frame: int, frames: Frames) -> None:
        super().write(first_frame, frames if first_frame != 2 else frames * 0)


class Dies(ClipFile):
    """Takes the process with it, as an encoder's bug would."""

    def write(self, first_frame: int, frames: Frames) -> None:
        super().write(first_frame, frames)
        if Path(self.path).name.startswith("deadly"):
            os.abort()


KINDS: dict[str, type[ClipFile]] = {
    "slow-disk": Slow,
    "named-too-early": NamedTooEarly,
    "drops-a-frame": DropsAFrame,
    "dies": Dies,
}

if __name__ == "__main__":
    serve(KINDS[sys.argv[1]])
    os._exit(0)
