"""Clips through writer processes: the same bytes as in process, bounded memory, and no half file however it ends."""

import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.writers import News, WriterPool
from videopipe import media
from videopipe.clip_file import ClipFile
from videopipe.config import OutputConfig
from videopipe.geometry import VideoSpec
from videopipe.media import Frames
from videopipe.records import SideCar, VideoRequest
from videopipe.rendering import RenderResult
from videopipe.writer import ChunkWritten, ClipFailed, ClipWritten

T, H, W = 11, 48, 64
ROOT = Path(__file__).parents[1]


def moving(num_frames: int = T, height: int = H, width: int = W, seed: int = 0) -> Frames:
    """A picture of 8x8 blocks that moves: compressible, every frame different."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    picture = blocks.repeat(8, 0).repeat(8, 1)[:height, :width]
    return np.stack([np.roll(picture, (shift, 2 * shift), (0, 1)) for shift in range(num_frames)])


def side_car(request: str = "fox", fps: float = 12.0) -> SideCar:
    return SideCar(
        request=VideoRequest(
            id=request, prompt="ein Fuchs 狐", spec=VideoSpec(height=H, width=W, num_frames=T, fps=fps)
        ),
        output="",
        format="mp4",
        frames_sha256=None,
        versions={},
        plan={"dit_ranks": [0]},
        config={"output": {"crf": 18}},
        stages=(),
        queue_wait_s=0.0,
        total_s=1.0,
        peak_memory_bytes={},
        finished_at="2026-01-01T00:00:00+00:00",
    )


class Studio:
    """A pool with the folders that it works in, and a producer."""

    def __init__(self, folder: Path, pool: WriterPool) -> None:
        self.pool = pool
        self.out, self.memory = folder / "out", folder / "memory"
        self.out.mkdir(exist_ok=True)
        self.memory.mkdir(exist_ok=True)
        self.news: list[News] = []
        self.memories: dict[int, Path] = {}  # by clip

    def look(self, timeout_s: float = 0.05) -> None:
        select.select([self.pool.fileno()], [], [], timeout_s)
        self.news += self.pool.news(time.monotonic())

    def wait(self, condition: Callable[[], object], timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.news
            self.look()

    def begin(self, name: str = "fox", shape: tuple[int, ...] = (T, H, W, 3), **output: object) -> int:
        memory = self.memory / str(len(self.memories))
        memory.write_bytes(bytes((shape[0] + 1) * shape[1] * shape[2] * 3))  # a producer may give too much
        clip = self.pool.open(self.out / name, shape, 12.0, OutputConfig(**output), name, memory)  # type: ignore[arg-type]
        self.memories[clip] = memory
        return clip

    def give(self, clip: int, first_frame: int, frames: Frames) -> None:
        if self.memories[clip].exists():  # else the clip has failed
            with self.memories[clip].open("r+b") as file:
                file.seek(first_frame * frames[:1].nbytes)
                file.write(frames.data)
        self.pool.frames(clip, first_frame, len(frames))

    def give_all(self, clip: int, frames: Frames, chunks: Sequence[int]) -> None:
        assert sum(chunks) == len(frames)
        begins = np.cumsum([0, *chunks])
        for begin, count in zip(begins, chunks, strict=False):
            self.give(clip, int(begin), frames[begin : begin + count])

    def outcome(self, clip: int) -> ClipWritten | ClipFailed:
        def known() -> list[ClipWritten | ClipFailed]:
            return [n for n in self.news if n.clip == clip and not isinstance(n, ChunkWritten)]

        self.wait(known)
        (outcome,) = known()
        return outcome

    def write(self, frames: Frames, chunks: Sequence[int], name: str = "fox", **output: object) -> ClipWritten:
        clip = self.begin(name, frames.shape, **output)
        self.give_all(clip, frames, chunks)
        self.pool.close_clip(clip, side_car(name))
        written = self.outcome(clip)
        assert isinstance(written, ClipWritten), written
        return written

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.out.iterdir()}


@pytest.fixture(scope="module")
def shared_pool() -> Iterator[WriterPool]:
    pool = WriterPool()
    yield pool
    pool.close()


@pytest.fixture
def studio(shared_pool: WriterPool, tmp_path: Path) -> Iterator[Studio]:
    studio = Studio(tmp_path, shared_pool)
    yield studio
    assert not list(studio.memory.iterdir()), "shared memory was not freed"


@pytest.fixture
def make_studio(tmp_path: Path) -> Iterator[Callable[..., Studio]]:
    """Studios with pools of their own, of writers that differ: `make_studio("slow-disk", writers=2)`."""
    pools: list[WriterPool] = []

    def make(kind: str | None = None, **options: object) -> Studio:
        if kind is not None:
            options["command"] = (sys.executable, "-m", "tests.writer_twins", kind)
        pools.append(WriterPool(**options))  # type: ignore[arg-type]
        return Studio(tmp_path, pools[-1])

    yield make
    for pool in pools:
        pool.close()


def bytes_of(path: Path) -> dict[str, bytes]:
    """A file, or all files of a folder."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


def in_process(folder: Path, frames: Frames, name: str = "fox", **output: object) -> Path:
    folder.mkdir(exist_ok=True)
    config = OutputConfig(**output)  # type: ignore[arg-type]
    result = RenderResult(request_id=name, frames=frames, latents=None, side_car=side_car(name), output=config)
    return result.save_to(folder)


# -- the same bytes ---------------------------------------------------------------------------------------------------

OUTPUTS: dict[str, dict[str, object]] = {
    "mp4": {},
    "mp4 rgb": {"codec": "libx264rgb", "crf": 0, "pixel_format": "rgb24"},
    "mp4 444": {"codec": "libx264", "crf": 30, "pixel_format": "yuv444p"},
    "hevc": {"codec": "libx265", "crf": 20},
    "png": {"format": "png"},
    "npy": {"format": "npy"},
}


@pytest.mark.parametrize("chunks", [(T,), (1,) * T, (4, 1, 6)], ids=str)
@pytest.mark.parametrize("kind", list(OUTPUTS))
def test_a_written_clip_has_the_bytes_of_one_saved_in_process(
    studio: Studio, kind: str, chunks: tuple[int, ...]
) -> None:
    frames, output = moving(), OUTPUTS[kind]
    expected = in_process(studio.out.parent / "expected", frames, **output)
    written = studio.write(frames, chunks, **output)
    path = Path(written.path)
    assert path == studio.out / expected.name
    assert bytes_of(path) == bytes_of(expected)
    assert studio.files == {path.name, "fox.json"}  # no temporary file
    found, wanted = (media.read_side_car(folder / "fox.json") for folder in (studio.out, expected.parent))
    assert written.side_car == found and found.frames_sha256 == media.frames_hash(frames)
    assert [(stage.stage, stage.rank) for stage in found.stages] == [("write", -1)]
    assert msgspec.structs.replace(found, stages=()) == msgspec.structs.replace(wanted, stages=())
    assert {span.request for news in studio.news for span in news.spans} == {"fox"}


def test_a_writer_that_loses_a_frame_is_noticed(make_studio: Callable[..., Studio]) -> None:
    """The twin: bytes and hash differ."""
    studio, frames = make_studio("drops-a-frame"), moving()
    expected = in_process(studio.out.parent / "expected", frames, format="npy")
    written = studio.write(frames, (4, 7), format="npy")
    assert bytes_of(Path(written.path)) != bytes_of(expected)
    assert written.side_car.frames_sha256 != media.frames_hash(frames)


@settings(max_examples=25, deadline=None)
@given(chunks=st.lists(st.integers(0, 4), min_size=1, max_size=8).filter(any), format=st.sampled_from(["npy", "png"]))
def test_chunks_of_any_sizes_give_the_same_clip(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[int], format: media.FrameFormat
) -> None:
    folder = tmp_path_factory.mktemp("chunks")
    frames = moving(sum(chunks), 16, 24)
    with ClipFile(folder / "fox", format, shape=frames.shape) as clip:
        for count in chunks:
            clip.write(clip.num_frames, frames[clip.num_frames : clip.num_frames + count])
    assert clip.frames_sha256 == media.frames_hash(frames)
    assert bytes_of(clip.path) == bytes_of(in_process(folder / "expected", frames, format=format))


# -- the order of chunks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunks", "cause"),
    [
        ([(0, 4), (5, 6)], "frame 4 is missing"),
        ([(0, 4), (7, 4)], "frames 4 to 6 are missing"),
        ([(4, 4)], "frames 0 to 3 are missing"),
        ([(0, 4)], "frames 4 to 10 are missing"),
        ([(0, 4), (2, 4)], "frame 2 is written twice"),
        ([(0, 8), (8, 4)], "frames up to 11 do not fit a clip of 11"),
    ],
)
def test_a_chunk_that_is_missing_or_wrong_is_named(studio: Studio, chunks: list[tuple[int, int]], cause: str) -> None:
    frames = moving(T + 1)
    clip = studio.begin()
    for first_frame, count in chunks:
        studio.give(clip, first_frame, frames[first_frame : first_frame + count])
    studio.pool.close_clip(clip, side_car())
    failed = studio.outcome(clip)
    assert isinstance(failed, ClipFailed) and failed.kind == "refused"
    assert cause in failed.cause and failed.path == str(studio.out / "fox.mp4")
    assert studio.files == set()
    studio.write(moving(), (T,))  # the writer goes on
    assert studio.files == {"fox.mp4", "fox.json"}


def test_clips_may_come_interleaved(studio: Studio) -> None:
    clips = {name: (studio.begin(name), moving(seed=seed)) for seed, name in enumerate(("a", "b"))}
    for first_frame in range(T):
        for clip, frames in clips.values():
            studio.give(clip, first_frame, frames[first_frame : first_frame + 1])
    for name, (clip, frames) in clips.items():
        studio.pool.close_clip(clip, side_car(name))
        written = studio.outcome(clip)
        assert isinstance(written, ClipWritten) and written.side_car.frames_sha256 == media.frames_hash(frames)


def test_the_file_grows_under_a_temporary_name(studio: Studio) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (120, H, W, 3), dtype=np.uint8)
    clip = studio.begin(shape=frames.shape, crf=0)
    sizes = []
    for first_frame in range(0, 120, 20):
        studio.give(clip, first_frame, frames[first_frame : first_frame + 20])
        studio.wait(lambda given=first_frame // 20 + 1: len(studio.news) == given)
        (part,) = studio.out.iterdir()
        assert part.name.startswith(".fox.mp4.") and part.name.endswith(".part")
        sizes.append(part.stat().st_size)
    assert sizes[-1] > sizes[3] > 100_000  # the encoder looks 40 frames ahead
    studio.pool.close_clip(clip, side_car())
    assert isinstance(studio.outcome(clip), ClipWritten)
    assert media.probe(studio.out / "fox.mp4").num_frames == 120


@pytest.mark.parametrize("killed", [False, True])
def test_frames_may_come_in_one_file_that_fills(make_studio: Callable[..., Studio], killed: bool) -> None:
    """As ranks decode a clip: the memory stays until the end, so that a writer that dies costs nothing."""
    studio, frames = make_studio("slow-disk"), moving(30)
    memory = studio.memory / "whole"
    memory.write_bytes(bytes(frames.nbytes))
    clip = studio.pool.open(studio.out / "fox", frames.shape, 12.0, OutputConfig(), "fox", memory)
    for first_frame, count in ((0, 7), (7, 0), (7, 13), (20, 10)):
        with memory.open("r+b") as file:
            file.seek(frames[:first_frame].nbytes)
            file.write(frames[first_frame : first_frame + count].data)
        studio.pool.frames(clip, first_frame, count)
        if killed and first_frame == 7:
            studio.wait(lambda: studio.news)
            os.kill(studio.pool.pids[0], signal.SIGKILL)
    assert memory.exists()
    studio.pool.close_clip(clip, side_car())
    written = studio.outcome(clip)
    assert isinstance(written, ClipWritten) and written.side_car.frames_sha256 == media.frames_hash(frames)
    assert bytes_of(studio.out / "fox.mp4") == bytes_of(in_process(studio.out.parent / "expected", frames))
    assert not list(studio.memory.iterdir())


# -- several writers --------------------------------------------------------------------------------------------------


def test_clips_are_shared_out_among_writers(make_studio: Callable[..., Studio]) -> None:
    studio = make_studio("slow-disk", writers=2)
    frames = moving(60, 16, 16)
    for round in ("warm-up", "measured"):  # for the second one both are there for certain
        clips = [studio.begin(f"{round}{index}", frames.shape, format="npy") for index in range(4)]
        for clip in clips:
            studio.give(clip, 0, frames)
            studio.pool.close_clip(clip, side_car())
        assert all(isinstance(studio.outcome(clip), ClipWritten) for clip in clips)
    assert len(studio.pool.pids) == 2
    writing = [[span for n in studio.news if n.clip == clip for span in n.spans] for clip in clips]
    first, second = ((spans[0].start_ns, spans[-1].end_ns) for spans in writing[:2])
    assert first[0] < second[1] and second[0] < first[1]  # at the same time


# -- a full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["mp4", "png", "npy"])
def test_a_full_disk_is_told_and_leaves_nothing(make_studio: Callable[..., Studio], format: str) -> None:
    studio = make_studio()
    studio.pool.start()
    (pid,) = studio.pool.pids
    noise = np.random.default_rng(0).integers(0, 256, (30, 96, 96, 3), dtype=np.uint8)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    clip = studio.begin("large", noise.shape, format=format)
    for first_frame in (0, 10, 20):
        studio.give(clip, first_frame, noise[first_frame : first_frame + 10])
    studio.pool.close_clip(clip, side_car("large"))
    failed = studio.outcome(clip)
    assert isinstance(failed, ClipFailed) and failed.kind == "disk"
    assert failed.cause.startswith("File too large after ") and failed.path.startswith(str(studio.out / "large"))
    assert studio.files == set()
    assert not list(studio.memory.iterdir())
    studio.write(moving(2), (2,), "small")  # there is room for this one
    assert studio.files == {"small.mp4", "small.json"}
    assert studio.pool.pids == [pid]


def test_a_side_car_that_cannot_be_written_is_told(studio: Studio) -> None:
    (studio.out / "fox.json").mkdir()
    clip = studio.begin()
    studio.give(clip, 0, moving())
    studio.pool.close_clip(clip, side_car())
    failed = studio.outcome(clip)
    assert isinstance(failed, ClipFailed) and failed.path == str(studio.out / "fox.json")
    assert "Is a directory" in failed.cause


# -- death ------------------------------------------------------------------------------------------------------------


def begin_to_write(studio: Studio, frames: Frames, name: str = "fox", **output: object) -> int:
    """A clip that has been given whole, and of which some frames have been written."""
    clip = studio.begin(name, frames.shape, **output)
    studio.give(clip, 0, frames)
    studio.pool.close_clip(clip, side_car(name))
    studio.wait(lambda: studio.files)
    return clip


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda how: how.name)
def test_a_writer_that_dies_is_replaced_and_its_clips_written_again(
    make_studio: Callable[..., Studio], how: int
) -> None:
    studio = make_studio("slow-disk", silent_after_s=3.0)
    frames = [moving(40, seed=seed) for seed in range(3)]
    clips = [begin_to_write(studio, frames[0], "a")]
    for index, name in ((1, "b"), (2, "c")):
        clips.append(studio.begin(name, (40, H, W, 3)))
        studio.give(clips[-1], 0, frames[index])
        studio.pool.close_clip(clips[-1], side_car(name))
    (pid,) = studio.pool.pids
    os.kill(pid, how)
    since = time.monotonic()
    studio.wait(lambda: studio.pool.pids != [pid])
    assert time.monotonic() - since < 10
    assert not psutil.pid_exists(pid)
    for clip, expected in zip(clips, frames, strict=True):
        written = studio.outcome(clip)
        assert isinstance(written, ClipWritten) and written.side_car.frames_sha256 == media.frames_hash(expected)
    assert studio.files == {f"{name}.{end}" for name in "abc" for end in ("mp4", "json")}
    assert bytes_of(studio.out / "a.mp4") == bytes_of(in_process(studio.out.parent / "expected", frames[0], "a"))
    assert not list(studio.memory.iterdir())


def test_a_clip_that_kills_its_writers_is_given_up_and_others_are_not(make_studio: Callable[..., Studio]) -> None:
    studio = make_studio("dies")
    clips = {name: studio.begin(name) for name in ("deadly", "fox", "bear")}
    for name, clip in clips.items():
        studio.give(clip, 0, moving())
        studio.pool.close_clip(clip, side_car(name))
    outcomes = {name: studio.outcome(clip) for name, clip in clips.items()}
    failed = outcomes["deadly"]
    assert isinstance(failed, ClipFailed)
    assert failed.cause == "the writer process was killed by SIGABRT, 2 times while it wrote this clip"
    assert isinstance(outcomes["fox"], ClipWritten) and isinstance(outcomes["bear"], ClipWritten)
    assert studio.files == {"fox.mp4", "fox.json", "bear.mp4", "bear.json"}


@pytest.mark.parametrize("kind", ["slow-disk", "named-too-early"])
def test_a_killed_writer_leaves_no_half_file(make_studio: Callable[..., Studio], kind: str) -> None:
    """The second case is the twin: it gives the name before the end, and the half file stays."""
    studio = make_studio(kind)
    clip = begin_to_write(studio, moving(200, 16, 16), format="npy")
    if kind == "named-too-early":
        studio.wait(lambda: (studio.out / "fox.npy").exists())
    studio.pool.drop(clip)  # so that it is not written again
    os.kill(studio.pool.pids[0], signal.SIGKILL)
    studio.wait(lambda: not studio.pool.pids)
    assert (studio.out / "fox.npy").exists() == (kind == "named-too-early")


@pytest.mark.parametrize("stopped", [False, True])
def test_closing_in_the_middle_leaves_nothing(make_studio: Callable[..., Studio], stopped: bool) -> None:
    studio = make_studio("slow-disk", writers=2)
    for name in ("a", "b"):
        begin_to_write(studio, moving(400, 16, 16), name)
    pids = studio.pool.pids
    assert len(pids) == 2
    if stopped:  # it cannot clean up after itself
        os.kill(pids[0], signal.SIGSTOP)
    since = time.monotonic()
    studio.pool.close()
    assert time.monotonic() - since < 4
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert studio.files == set() and not list(studio.memory.iterdir())


def test_a_dropped_clip_leaves_nothing(make_studio: Callable[..., Studio]) -> None:
    studio = make_studio("slow-disk")
    clip = begin_to_write(studio, moving(200, 16, 16), "dropped")
    studio.pool.drop(clip)
    assert not list(studio.memory.iterdir())
    studio.write(moving(), (T,))
    assert studio.files == {"fox.mp4", "fox.json"}
    assert clip not in {news.clip for news in studio.news}


PRODUCER = """
import sys, time
from pathlib import Path
from tests.test_writer import Studio, begin_to_write, moving
from pipelines.writers import WriterPool
studio = Studio(Path(sys.argv[1]), WriterPool(command=(sys.executable, "-m", "tests.writer_twins", "slow-disk")))
begin_to_write(studio, moving(400, 16, 16))
print(studio.pool.pids[0], flush=True)
time.sleep(60)
"""


def test_a_writer_ends_and_cleans_up_when_its_producer_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PRODUCER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        writer = psutil.Process(int(process.stdout.readline()))
        assert list((tmp_path / "out").iterdir())
        process.kill()
    writer.wait(timeout=5)
    assert not list((tmp_path / "out").iterdir())
