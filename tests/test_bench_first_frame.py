"""The benchmark of the first frame on disk: what it watches for, and one clip in each mode at a tiny size."""

import time
from pathlib import Path

import pytest

from pipelines.launch import LocalLauncher
from tools.bench_first_frame import MOMENTS, Watch, measure, start
from tools.tiny_open_sora_plan import make_open_sora_plan
from videopipe.files import part_path
from videopipe.geometry import VideoSpec
from videopipe.records import VideoRequest


def test_the_first_frame_is_noticed_while_its_file_has_no_name(tmp_path: Path) -> None:
    watch = Watch(tmp_path, 10)
    watch.start()
    part = part_path(tmp_path / "clip.npy")
    part.write_bytes(b"header")
    time.sleep(0.05)
    assert not watch.seen_ns, "six bytes are not ten"
    before = time.monotonic_ns()
    part.write_bytes(b"header and more")
    watch.join(5)
    after = time.monotonic_ns()
    assert before < watch.end() < after


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_open_sora_plan(tmp_path_factory.mktemp("osp") / "tiny")


@pytest.mark.parametrize("mode", ["stream", "clip"])
def test_a_stream_has_frames_long_before_a_clip_is_decoded(
    checkpoint: Path, launcher: LocalLauncher, mode: str
) -> None:
    spec = VideoSpec(height=32, width=32, num_frames=93)
    request = VideoRequest(id="clip", prompt="a fox", spec=spec, num_inference_steps=1)
    with start("open-sora-plan", checkpoint, mode, launcher=launcher) as pipe:
        moments = measure(pipe, request, by_writer=True)
    assert tuple(moments) == MOMENTS
    assert 0 < moments["first decoded"] < moments["on disk"] < moments["complete"]
    at_once = moments["first decoded"] > 0.8 * moments["all decoded"]
    assert at_once == (mode == "clip"), moments
