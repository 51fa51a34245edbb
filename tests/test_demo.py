"""The demo: what `make demo` leaves behind and says of it, with a tiny random model that takes seconds."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pipelines.cli_render import resolve_config
from pipelines.launch import LocalLauncher
from tests.demo_models import tiny_moving_shapes
from tools import demo
from tools.moving_shapes import Detector, MovingObject, Scene, is_held_out, render, scene_at
from tools.prompt_sheet import SheetRow, prompt_sheet
from videopipe import media

LEFT = MovingObject(colour="red", shape="circle", size="small", motion="up")
RIGHT = MovingObject(colour="blue", shape="bar", size="small", motion="rotate")
PAIR = Scene(objects=(LEFT, RIGHT), background="white", placement=3)


def test_the_demo_leaves_clips_a_trace_and_a_contact_sheet(
    tmp_path: Path, launcher: LocalLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {
        "model.weights": str(tiny_moving_shapes(tmp_path / "model")),
        "request.num_frames": 9,
        "request.num_inference_steps": 2,
    }
    config = resolve_config(demo.CONFIG, (), flags)
    out = tmp_path / "demo"
    for _ in range(2):  # the second time finished files are replaced
        paths = demo.run_demo(out, config=config, clips=2, seed=1, launcher=launcher)
    assert all(media.probe(path).num_frames == 9 for path in paths)
    assert [path.suffix for path in paths] == [".mp4"] * 2
    files = {path.with_suffix(suffix).name for path in paths for suffix in (".mp4", ".json")}
    assert {path.name for path in out.iterdir()} == {*files, "trace.json", "contact_sheet.png"}
    assert json.loads((out / "trace.json").read_text())["traceEvents"]
    told = capsys.readouterr().err
    assert "while another request was denoised" in told
    for path in paths:
        assert json.loads(path.with_suffix(".json").read_text())["request"]["prompt"] in told
    assert " of 10 attributes are as the prompts say" in told


def test_the_demo_asks_for_what_was_never_trained_on() -> None:
    scenes = [scene_at(1, index, split="held_out") for index in range(demo.CLIPS)]
    assert all(is_held_out(thing) for scene in scenes for thing in scene.objects)
    assert {len(scene.objects) for scene in scenes} == {1, 2}
    assert len({thing.motion for scene in scenes for thing in scene.objects}) >= 6


def test_the_right_clip_has_every_attribute_and_a_wrong_one_is_told_apart() -> None:
    detector = Detector()
    reading = detector(render(PAIR, 17, 64, 64))
    found = demo.compare(PAIR, reading)
    assert found.verdict == "9 of 9 attributes."
    assert found.seen == "small red circle up and small blue bar rotate on white"
    other = replace(PAIR, objects=(LEFT, replace(RIGHT, shape="cross")), background="black")
    assert demo.compare(other, reading).verdict == (
        "7 of 9 attributes: not the shape of the right object, the background."
    )
    alone = replace(PAIR, objects=(LEFT,))
    assert demo.compare(alone, reading).verdict == "1 of 5 attributes: not the object."
    nothing = detector(np.zeros((17, 64, 64, 3), np.uint8))
    assert demo.compare(PAIR, nothing).seen == "no object on black"


def test_the_sheet_has_a_row_for_each_clip_with_its_own_text(tmp_path: Path) -> None:
    frames = render(PAIR, 17, 64, 64)
    row = SheetRow(frames=frames, prompt="a small red circle", remark="seen: a circle. 5 of 5", good=True)
    long = replace(row, prompt="many words " * 60, good=False)

    def sheet(*rows: SheetRow) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return media.read_video(prompt_sheet(rows, tmp_path / "sheet.png", columns=3))[0]

    one, two = sheet(row), sheet(row, row)
    assert one.shape == (140, 744, 3)  # 6 + 330 of text + 3 * (6 + 128) + 6
    assert two.shape[0] == 274
    assert np.array_equal(one[6:134], two[6:134]) and np.array_equal(one[6:134], two[140:268])
    for column, frame in enumerate((0, 8, 16)):
        left = 342 + column * 134
        assert np.array_equal(one[6:134, left : left + 128], frames[frame].repeat(2, 0).repeat(2, 1))
    other = sheet(replace(row, prompt="a small blue circle"))
    assert not np.array_equal(one[:, :336], other[:, :336]) and np.array_equal(one[:, 336:], other[:, 336:])
    assert sheet(long).shape[0] > one.shape[0]  # no line is lost
    with pytest.raises(ValueError, match="rows=\\[\\] is empty"):
        sheet()
    with pytest.raises(ValueError, match=r"must be that of the first, \[17, 64, 64, 3\]"):
        sheet(row, replace(row, frames=frames[:5]))


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(demo.app, ["--output", str(tmp_path), "--weights", "bundled:moving_shape"])
    assert result.exit_code == 2
    assert "model.weights='bundled:moving_shape' is no bundled model" in result.stderr
