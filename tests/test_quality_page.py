"""The HTML report: what goes in, and what a headless Chromium shows of it."""

import json
import re
import shutil
import subprocess
import time
import urllib.request

import numpy as np
import pytest

from tests.quality_clips import moving_picture, noisy
from videopipe.quality import compare_clips, open_clip
from videopipe.quality.page import page_data, parameter_rows, shown_frames, write_page

REF = moving_picture(12, 64, 96)
CAND = REF.copy()
CAND[3:] = noisy(REF[3:], 1)
CAND[7, 20:40, 30:60] = 255 - CAND[7, 20:40, 30:60]  # the worst frame, at a place of its own


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    np.save(root / "ref.npy", REF)
    np.save(root / "cand.npy", CAND)
    for name, strategy in (("ref", "ulysses"), ("cand", "</script><b>ring</b>")):
        side_car = {
            "request": {"id": name, "seed": 0, "spec": {"fps": 12.0}},
            "config": {"attention": {"strategy": strategy, "chunks": [1, 2]}},
        }
        (root / f"{name}.json").write_text(json.dumps(side_car))
    return root


@pytest.fixture(scope="module")
def page(clips):
    ref, cand = open_clip(clips / "ref.npy"), open_clip(clips / "cand.npy")
    write_page(clips / "report.html", compare_clips(ref, cand), ref, cand, trace=["runs part at step 2"])
    return clips / "report.html"


def test_the_page_needs_nothing_from_outside(page):
    text = page.read_text()
    assert "default-src 'none'" in text
    outside = re.findall(r"""(?:src|href)\s*=\s*["']?(?!data:)[a-z]+:|@import|url\(|fetch\(|XMLHttpRequest""", text)
    assert outside == []
    assert text.count("<script") == text.count("</script>")  # values cannot close a script
    assert not list(page.parent.glob(".*"))


def test_parameters_that_differ_come_first(clips):
    ref, cand = open_clip(clips / "ref.npy"), open_clip(clips / "cand.npy")
    rows = page_data(compare_clips(ref, cand), ref, cand)["parameters"]
    assert [row[0] for row in rows if row[1] != row[2]] == ["request.id", "config.attention.strategy"]
    assert [row[0] for row in rows[:2]] == ["request.id", "config.attention.strategy"]
    assert ("config.attention.chunks", "[1,2]", "[1,2]", False) in rows
    assert parameter_rows({"a": 1}, None) == [("a", "1", None, False)]
    assert parameter_rows(None, None) == []


def test_what_was_measured_comes_last_and_stages_go_by_name():
    times = [("encode", 0, 1.0), ("denoise", 0, 2.0), ("denoise", 0, 3.0)]
    sides = [
        {
            "total_s": 1.0 + i,
            "stages": [dict(zip(("stage", "rank", "seconds"), t, strict=True)) for t in order],
            "seed": 1,
        }
        for i, order in enumerate((times, times[::-1]))
    ]
    assert parameter_rows(*sides) == [
        ("seed", "1", "1", False),
        ("total_s", "1.0", "2.0", True),
        ("stages.denoise, rank 0 [s]", "5.0", "5.0", True),
        ("stages.encode, rank 0 [s]", "1.0", "1.0", True),
    ]


def test_a_long_clip_is_thinned_out_but_keeps_what_matters(clips):
    count = 400
    ref, cand = np.zeros((count, 16, 16, 3), np.uint8), np.zeros((count, 16, 16, 3), np.uint8)
    cand[123, 3, 3] = 9
    cand[317, 3, 3] = 90
    np.save(clips / "long_ref.npy", ref)
    np.save(clips / "long_cand.npy", cand)
    a, b = open_clip(clips / "long_ref.npy"), open_clip(clips / "long_cand.npy")
    comparison = compare_clips(a, b)
    chosen = shown_frames(comparison, 40)
    assert {122, 123, 124, 316, 317, 318} <= set(chosen)
    assert len(chosen) <= 40
    assert max(np.diff(chosen)) < 40
    write_page(clips / "long.html", comparison, a, b, max_frames=40)
    assert (clips / "long.html").read_text().count("<script>shot(") == len(chosen)
    with pytest.raises(ValueError, match="max_frames=0 must be at least 1"):
        write_page(clips / "long.html", comparison, a, b, max_frames=0)


def test_latents_have_curves_but_no_pictures(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((1, 4, 3, 6, 8), np.float32))
    np.save(tmp_path / "b.npy", np.ones((1, 4, 3, 6, 8), np.float32))
    a, b = open_clip(tmp_path / "a.npy"), open_clip(tmp_path / "b.npy")
    write_page(tmp_path / "page.html", compare_clips(a, b), a, b)
    text = (tmp_path / "page.html").read_text()
    assert text.count("<script>shot(") == 0
    assert '"rel_l2":{"mean":1e999' in text  # against zeros


def test_no_single_pixel_is_lost_where_the_heat_map_is_scaled_down():
    import av

    from videopipe.quality.page import _heat

    ref = np.zeros((300, 401, 3), np.uint8)
    cand = ref.copy()
    cand[200, 137, 2] = 77
    url = _heat(ref, cand, 50)
    import base64
    import io

    with av.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as container:
        grey = next(container.decode(video=0)).to_ndarray(format="gray")
    assert grey.shape == (37, 50)
    assert (int(grey.max()), int((grey > 0).sum())) == (77, 1)


class Browser:
    """A headless Chromium spoken to over the WebDriver protocol."""

    def __init__(self):
        self._process = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        port = next(
            m.group(1) for line in self._process.stdout if (m := re.search(r"successfully on port (\d+)", line))
        )
        self._url = f"http://127.0.0.1:{port}"
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1400"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._url += (
            f"/session/{self._call('POST', '/session', {'capabilities': {'alwaysMatch': wanted}})['sessionId']}"
        )

    def _call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, path):
        self._call("POST", "/url", {"url": path.as_uri()})

    def js(self, script, *args):
        return self._call("POST", "/execute/sync", {"script": script, "args": list(args)})

    def messages(self):
        return self._call("POST", "/se/log", {"type": "browser"})

    def click(self, css):
        element = self._call("POST", "/element", {"using": "css selector", "value": css})
        self._call("POST", f"/element/{next(iter(element.values()))}/click", {})

    def key(self, key):
        actions = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "k", "actions": actions}]})

    def frame(self, wanted):
        """Wait until the page shows this frame."""
        until = time.monotonic() + 20
        while (shown := self.js("return document.body.dataset.frame")) != str(wanted):
            assert time.monotonic() < until, (shown, wanted)

    def pixels(self, canvas):
        script = """const c = document.getElementById(arguments[0]);
            return [c.height, c.width, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]"""
        height, width, data = self.js(script, canvas)
        return np.array(data, np.uint8).reshape(height, width, 4)[..., :3]

    def close(self):
        self._call("DELETE", "")
        self._process.terminate()
        self._process.wait(timeout=20)


@pytest.fixture(scope="module")
def browser(page):
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: apt-get install chromium chromium-driver)")
    browser = Browser()
    browser.open(page)
    yield browser
    browser.close()


def test_frames_step_in_sync(browser):
    browser.frame(3)  # opens at the first difference
    for move, frame in (
        ("#next", 4),
        ("#next", 5),
        ("#back", 4),
        ("\ue014", 5),
        ("\ue012", 4),
        ("\ue011", 0),
        ("\ue010", 11),
    ):
        browser.click(move) if move.startswith("#") else browser.key(move)
        browser.frame(frame)
        assert np.array_equal(browser.pixels("ref"), REF[frame])
        assert np.array_equal(browser.pixels("cand"), CAND[frame])
    assert not np.array_equal(REF[11], CAND[11])  # else the check above could not tell the sides apart


def test_many_quick_steps_end_in_sync(browser):
    browser.js(
        "for (let i = 0; i < 7; i++) document.getElementById('back').click(); document.getElementById('next').click()"
    )
    browser.js("const s = document.getElementById('slider'); s.value = 6; s.dispatchEvent(new Event('input'))")
    browser.frame(6)
    assert np.array_equal(browser.pixels("ref"), REF[6])
    assert np.array_equal(browser.pixels("cand"), CAND[6])


def test_a_click_on_a_worst_frame_goes_there_and_the_heat_map_shows_where(browser):
    for metric in ("psnr", "ssim", "mae", "max_abs"):
        browser.js("document.getElementById('back').click()")
        browser.click(f"svg[data-metric={metric}] .worst[data-frame='7']")
        browser.frame(7)
    heat = browser.pixels("heat").sum(axis=2, dtype=int)
    inside = np.zeros(heat.shape, bool)
    inside[20:40, 30:60] = True
    assert heat[inside].mean() > 5 * max(heat[~inside].mean(), 1)
    browser.click("#summary a.frame")
    browser.frame(7)
    browser.click("#back")
    browser.frame(6)
    assert browser.pixels("heat")[inside].mean() < 30  # nothing of the other frame stays


def test_a_click_on_a_curve_goes_to_that_time(browser):
    browser.js("""const s = document.querySelector('svg[data-metric=psnr]'), r = s.getBoundingClientRect();
        s.dispatchEvent(new MouseEvent('click', {clientX: r.left + r.width * 2 / 11, clientY: r.top + 5}))""")
    browser.frame(2)
    assert browser.pixels("heat").max() == 0  # equal frames


def test_curves_and_parameters_appear(browser):
    curves = browser.js("""return [...document.querySelectorAll('#curves svg')]
        .map(s => [s.dataset.metric, s.querySelectorAll('.worst').length])""")
    assert {name for name, _ in curves} == {"max_abs", "mae", "psnr", "ssim", "flicker"}
    assert all(count >= 1 for _, count in curves)
    points = browser.js(
        "return document.querySelector('svg[data-metric=mae] path').getAttribute('d').split('L').length"
    )
    assert points == 12
    differing = browser.js("return [...document.querySelectorAll('#parameters tr.differs')].map(r => r.innerText)")
    assert [row.split("\t")[0] for row in differing] == ["request.id", "config.attention.strategy"]
    assert "</script><b>ring</b>" in differing[1]
    background = "return getComputedStyle(document.querySelector('#parameters tr.{} td')).backgroundColor"
    assert browser.js(background.format("differs")) != browser.js(background.format("same"))
    assert "runs part at step 2" in browser.js("return document.getElementById('findings').innerText")


def test_play_runs_and_stops(browser):
    before = browser.js("return document.body.dataset.frame")
    browser.click("#play")
    until = time.monotonic() + 20
    while browser.js("return document.body.dataset.frame") == before:
        assert time.monotonic() < until
    browser.click("#play")
    assert browser.js("return document.getElementById('play').textContent") == "play"


def test_nothing_was_loaded_and_nothing_failed(browser):
    loaded = browser.js(
        "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'))"
    )
    assert loaded == []
    assert [entry for entry in browser.messages() if entry["level"] == "SEVERE"] == []
