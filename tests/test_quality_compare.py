"""Planted differences are found and named at the right place; the command line, its JSON and its exit codes."""

import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from pipelines.compare_cli import app
from tests.quality_clips import brighter, moving_picture, noisy, write_images, write_video
from videopipe import media, quality
from videopipe.clip_file import write_frames
from videopipe.geometry import VideoSpec
from videopipe.quality import compare_clips, open_clip
from videopipe.quality.terminal import sparkline
from videopipe.quality.thresholds import failures, parse_thresholds
from videopipe.records import SideCar, VideoRequest

REF = moving_picture(24)
GAMMA = (255 * (REF / 255) ** 1.1).round().astype(np.uint8)


def changed(frame, picture):
    cand = REF.copy()
    cand[frame] = picture
    return cand


def one_pixel():
    cand = REF.copy()
    cand[7, 10, 20, 1] ^= 1
    return cand


def one_corner():
    cand = REF.copy()
    cand[11:, 40:56, 64:96] //= 2
    return cand


LOST = "REF's frame 12 is missing in CAND: from CAND's frame 12 on, frame t shows REF's t+1"
EXTRA = "CAND's frame 12 is extra: from CAND's frame 12 on, frame t shows REF's t-1"
FROZEN = "CAND's frame 9 shows REF's frame 8; the order is right again from frame 10 on"
SHIFTED = "frame 5: the picture is shifted 2 px down and 3 px left"
FLICKERS = "mean brightness against REF jumps by up to 10.0 levels, at frame 9, 10"
PLANTED = {  # candidate, first different frame, number of different frames, what is said about it
    "one pixel": (one_pixel(), 7, 1, "frame 7: one pixel differs, row 10, column 20"),
    "one corner": (one_corner(), 11, 13, "frame 11: only rows 40 to 55, columns 64 to 95 differ"),
    "shifted frame": (changed(5, np.roll(REF[5], (2, -3), (0, 1))), 5, 1, SHIFTED),
    "frozen frame": (changed(9, REF[8]), 9, 1, FROZEN),
    "dropped frame": (np.concatenate([REF[:12], REF[13:], REF[-1:]]), 12, 11, LOST),
    "extra frame": (np.concatenate([REF[:12], REF[11:-1]]), 12, 12, EXTRA),
    "gamma": (GAMMA, 0, 24, "frame 0: gamma 1.10"),
    "seam": (np.concatenate([REF[:16], brighter(REF[16:], 6)]), 16, 8, "frame 16: brightness +6.0 levels"),
    "flicker": (changed(9, brighter(REF[9], 10)), 9, 1, FLICKERS),
    "noise": (noisy(REF), 0, 24, "every frame differs a little, all over the picture"),
    "other content": (
        np.random.default_rng(5)
        .integers(0, 256, (24, 8, 8, 3))
        .astype(np.uint8)
        .repeat(REF.shape[1] // 8, 1)
        .repeat(REF.shape[2] // 8, 2),
        0,
        24,
        "every frame differs strongly, all over the picture",
    ),
}


def compared(tmp_path, cand, **options):
    np.save(tmp_path / "ref.npy", REF)
    np.save(tmp_path / "cand.npy", cand)
    return compare_clips(open_clip(tmp_path / "ref.npy"), open_clip(tmp_path / "cand.npy"), **options)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_difference_is_named_at_its_place(tmp_path, name):
    cand, first, count, finding = PLANTED[name]
    result = compared(tmp_path, cand)
    assert (result.first_different_frame, result.num_different_frames) == (first, count)
    assert any(line.startswith(finding) for line in result.findings), result.findings
    assert not result.identical
    if count == 1:
        assert {series.worst_frame for series in result.series.values()} == {first}


def test_equal_clips_have_nothing_to_find(tmp_path):
    result = compared(tmp_path, REF)
    assert result.identical
    assert (result.first_different_frame, result.findings, result.num_frames) == (None, (), 24)


def test_dropped_frame_is_found_under_lossy_encoding(tmp_path):
    lossy = {"codec": "libx264", "pix_fmt": "yuv420p"}
    ref = write_video(tmp_path / "ref.mp4", REF, crf="18", **lossy)
    cand = write_video(tmp_path / "cand.mp4", np.delete(REF, 12, axis=0), crf="26", **lossy)
    result = compare_clips(open_clip(ref), open_clip(cand), align={"length"})
    assert result.findings[0].startswith("REF's frame 12 is missing in CAND")
    assert result.num_frames == 23
    whole = write_video(tmp_path / "whole.mp4", REF, crf="26", **lossy)
    again = compare_clips(open_clip(ref), open_clip(whole))
    assert again.findings[0].startswith("every frame differs a little, all over the picture")


def test_seam_metric_names_its_border(tmp_path):
    cand = PLANTED["seam"][0]
    series = compared(tmp_path, cand, seams=(8, 16)).series["seam"]
    assert (series.at, series.worst_frame) == ((8, 16), 16)
    assert series.values[0] == pytest.approx(1, abs=0.01)
    assert series.worst > 1.03


def test_streamed_values_equal_the_functions(tmp_path):
    cand = noisy(REF, 9)
    result = compared(tmp_path, cand, workers=3)
    for name in ("max_abs", "mae", "psnr", "ssim", "flicker"):
        assert result.series[name].values == pytest.approx(tuple(getattr(quality, name)(REF, cand)), rel=1e-9), name
    assert result.psnr_pooled == pytest.approx(10 * math.log10(255**2 / quality.mse(REF, cand).mean()))
    assert "ms_ssim" not in result.series  # sides below 161 px


def test_memory_does_not_grow_with_length():
    import tracemalloc

    class Endless:
        def __init__(self, count, step):
            self.info = quality.ClipInfo(path="x", kind="npy", latents=False, num_frames=count, height=64, width=64)
            self._step = step

        def frames(self):
            for t in range(self.info.num_frames):
                yield np.full((64, 64, 3), (t * self._step) % 251, np.uint8)

    def peak(count):
        tracemalloc.start()
        compare_clips(Endless(count, 1), Endless(count, 2), metrics=("psnr",), workers=2)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(16)
    assert peak(400) - peak(100) < 300 * 64 * 64 * 3 * 0.1  # far less than the frames themselves


def test_thresholds_hold_on_the_worst_frame_and_the_limit_itself_passes(tmp_path):
    result = compared(tmp_path, PLANTED["flicker"][0])
    worst = result.series["psnr"].worst
    for text, lines in (
        (f"psnr={worst!r}", 0),
        (f"psnr={worst + 0.01},ssim=0.5", 1),
        ("mae=1", 1),
        ("mae.mean=1", 0),
        ("psnr.mean=29", 1),
    ):
        assert len(failures(result, parse_thresholds(text))) == lines, text
    assert "psnr 28.1" in failures(result, parse_thresholds("psnr=45"))[0]
    assert "at frame 9 is below 45" in failures(result, parse_thresholds("psnr=45"))[0]
    for text in ("psnr", "psnr=high", "sharpness=3", "psnr.median=3", "psnr=nan"):
        with pytest.raises(ValueError, match="fail-under="):
            parse_thresholds(text)


def test_sparkline_keeps_a_single_bad_frame_of_a_long_clip():
    values = [50.0] * 5000
    values[3210] = 20.0
    line = sparkline(values, 40, higher_is_better=True)
    assert (len(line), line.count("▁"), line.index("▁")) == (40, 1, 25)
    assert sparkline([1.0] * 9, 3, higher_is_better=True) == "███"
    assert sparkline([0.0] * 9, 3, higher_is_better=False) == "▁▁▁"
    assert sparkline([math.inf] * 9, 3, higher_is_better=True) == "███"
    assert sparkline([math.inf, 30.0, 40.0], 3, higher_is_better=True)[0] == "█"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    np.save(root / "ref.npy", REF)
    np.save(root / "same.npy", REF)
    np.save(root / "flicker.npy", PLANTED["flicker"][0])
    np.save(root / "short.npy", REF[:20])
    return root


def test_json_has_the_promised_keys(files, tmp_path):
    assert run(files / "ref.npy", files / "flicker.npy", "--json", tmp_path / "a.json").exit_code == 0
    data = json.loads((tmp_path / "a.json").read_text())
    assert (data["num_frames"], data["first_different_frame"]) == (24, 9)
    for name in ("max_abs", "mae", "psnr", "ssim", "flicker"):
        assert {"mean", "worst", "worst_frame"} <= set(data[name])
        assert (data[name]["worst_frame"], len(data[name]["frames"])) == (9, 24)
    assert run(files / "ref.npy", files / "same.npy", "--json", tmp_path / "b.json").exit_code == 0
    same = json.loads((tmp_path / "b.json").read_text())
    assert (same["first_different_frame"], same["psnr"]["worst_frame"], same["psnr"]["worst"]) == (None, None, math.inf)
    assert "Infinity" not in (tmp_path / "b.json").read_text()  # which is no JSON
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("cand", "options", "code", "words"),
    [
        ("same", [], 0, "identical: all 24 frames"),
        ("flicker", [], 0, "first different frame: 9"),
        ("same", ["--expect", "identical", "--fail-under", "psnr=45,ssim=0.99"], 0, "identical"),
        ("flicker", ["--expect", "identical"], 1, "not identical: frame 9 is the first to differ"),
        ("flicker", ["--fail-under", "psnr=45,ssim=0.99"], 1, "failed: psnr 28.1"),
        ("flicker", ["--fail-under", "psnr=20"], 0, "first different frame: 9"),
        ("short", ["--align", "length", "--expect", "identical"], 1, "not identical: lengths differ"),
        ("short", [], 2, "length differs: REF has 24 frames, CAND has 20; pass --align length"),
        ("absent", [], 2, "no such file"),
        ("flicker", ["--fail-under", "psnr"], 2, "fail-under="),
        ("flicker", ["--expect", "equal"], 2, "expect='equal' must be identical or within-floor"),
        ("flicker", ["--expect", "within-floor"], 2, "pass --rerun"),
        ("flicker", ["--metrics", "psnr,vif"], 2, "metrics='vif' must be among"),
        ("flicker", ["--fail-under", "ssim=1", "--metrics", "psnr"], 2, "not measured, have psnr"),
        ("flicker", ["--metrics", "ms_ssim"], 2, "ms_ssim needs sides of at least 161 px, REF is 128x96"),
        ("flicker", ["--seams", "24"], 2, "seams=24 must lie between 1 and 23, nearest is 23"),
        ("flicker", ["--json", "nowhere/a.json"], 2, "the folder nowhere does not exist"),
        ("flicker", ["--decoder", "vlc"], 2, "decoder='vlc'"),
        ("flicker", ["--colour"], 2, "No such option"),
    ],
)
def test_exit_codes(files, cand, options, code, words):
    result = run(files / "ref.npy", files / f"{cand}.npy", *options)
    assert result.exit_code == code, result.output
    assert words in " ".join(result.output.split())


def test_names_with_brackets_are_printed_as_they_are(tmp_path):
    result = run(tmp_path / "[red]a[/x].npy", tmp_path / "b.npy")
    assert (result.exit_code, "[red]a[/x].npy: no such file" in " ".join(result.output.split())) == (2, True)
    np.save(tmp_path / "[bold]b.npy", REF)
    assert "[bold]b.npy" in run(tmp_path / "[bold]b.npy", tmp_path / "[bold]b.npy").output


def test_a_candidate_is_judged_by_reruns(tmp_path):
    for name, frames in {
        "ref": noisy(REF, 3, 1),
        "again": noisy(REF, 3, 2),
        "good": noisy(REF, 3, 3),
        "bad": noisy(REF, 9, 4),
    }.items():
        np.save(tmp_path / f"{name}.npy", frames)
    floor = ["--rerun", tmp_path / "again.npy", "--expect", "within-floor"]
    for cand, code, words in (
        ("good", 0, "verdict: within-floor"),
        ("bad", 1, "is beyond the noise floor"),
        ("again", 0, "verdict: same"),
    ):
        result = run(tmp_path / "ref.npy", tmp_path / f"{cand}.npy", *floor)
        assert (result.exit_code, words in result.output) == (code, True), result.output


@pytest.fixture
def folders(tmp_path):
    for side in ("ref", "cand"):
        (tmp_path / side).mkdir()
    for stem in ("a", "b", "c"):
        np.save(tmp_path / "ref" / f"{stem}.npy", REF)
        (tmp_path / "ref" / f"{stem}.json").write_text("{}")
    np.save(tmp_path / "cand" / "a.npy", REF)
    write_images(tmp_path / "cand" / "b", PLANTED["flicker"][0])
    return tmp_path


def test_directories_are_matched_by_request_id(folders):
    result = run(folders / "ref", folders / "cand", "--json", folders / "all.json", "--report", folders / "all.html")
    assert result.exit_code == 2
    assert "'c' is missing in CAND" in " ".join(result.output.split())
    np.save(folders / "cand" / "c.npy", REF)
    result = run(folders / "ref", folders / "cand", "--json", folders / "all.json", "--report", folders / "all.html")
    assert result.exit_code == 0, result.output
    assert "3 clips compared, 2 identical, 0 failed, 0 not comparable" in result.output
    data = json.loads((folders / "all.json").read_text())
    assert (data["num_frames"], data["first_different_clip"], data["first_different_frame"]) == (72, "b", 9)
    assert (data["psnr"]["worst_clip"], data["psnr"]["worst_frame"]) == ("b", 9)
    assert set(data["clips"]) == {"a", "b", "c"}
    assert (folders / "all" / "b.html").is_file()
    assert 'href="all/b.html"' in (folders / "all.html").read_text()
    assert run(folders / "ref", folders / "cand", "--expect", "identical").exit_code == 1
    assert run(folders / "ref", folders / "cand" / "a.npy").exit_code == 2
    (folders / "empty").mkdir()
    for path, words in ((folders / "empty", "holds neither images nor clips"), (folders / "absent", "no such file")):
        result = run(folders / "ref", path)
        assert (result.exit_code, words in " ".join(result.output.split())) == (2, True), result.output


def side_car(clip_id, frames, seed=0):
    spec = VideoSpec(height=96, width=128, num_frames=len(frames), fps=12.0)
    return SideCar(
        request=VideoRequest(id=clip_id, prompt="blocks", spec=spec, seed=seed),
        output=f"{clip_id}.mp4",
        format="mp4",
        frames_sha256=media.frames_hash(frames),
        versions={"videopipe": "0"},
        plan={},
        config={},
        stages=(),
        queue_wait_s=0.0,
        total_s=1.0,
        peak_memory_bytes={},
        finished_at="2026-01-01T00:00:00Z",
    )


def test_what_the_renderer_writes_is_what_is_compared(tmp_path):
    for side, crf in (("ref", 10), ("cand", 30)):
        (tmp_path / side).mkdir()
        for form, stem in (("mp4", "a.1"), ("png", "b.5"), ("npy", "c")):
            write_frames(REF, tmp_path / side / stem, form, fps=12.0, crf=crf)
            media.write_side_car(side_car(stem, REF), tmp_path / side / f"{stem}.json")
        (tmp_path / side / ".d.part").mkdir()  # a clip being written is no clip yet
        write_frames(REF[:1], tmp_path / side / ".d.part" / "x", "png")
    result = run(tmp_path / "ref", tmp_path / "cand", "--json", tmp_path / "o.json")
    assert result.exit_code == 0, result.output
    clips = json.loads((tmp_path / "o.json").read_text())["clips"]
    assert set(clips) == {"a.1", "b.5", "c"}
    assert [clips[stem]["identical"] for stem in ("a.1", "b.5", "c")] == [False, True, True]
    assert any("before encoding the clips were equal" in note for note in clips["a.1"]["notes"])
    assert open_clip(tmp_path / "ref" / "b.5").info.fps == 12.0
