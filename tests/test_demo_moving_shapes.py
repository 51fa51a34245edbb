"""MovingShapes says what it draws, holds out a balanced part, and the detector reads it back."""

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from tools.moving_shapes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    PAIR_MOTIONS,
    SHAPES,
    SIZES,
    Detector,
    MovingObject,
    Scene,
    blur_and_noise,
    caption,
    combinations,
    confusion,
    is_held_out,
    main,
    render,
    scene_at,
    score,
)


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector()


def _object(**changes: str) -> MovingObject:
    return MovingObject(**{"colour": "red", "shape": "square", "size": "large", "motion": "still", **changes})


def _accuracy(counts: Counter[tuple[str, str]]) -> float:
    return sum(n for (said, read), n in counts.items() if said == read) / sum(counts.values())


def test_world_is_as_large_as_promised() -> None:
    assert len(COLOURS) >= 6
    assert len(SHAPES) >= 5
    assert len(MOTIONS) >= 6
    assert len(SIZES) == 2
    assert len(BACKGROUNDS) >= 4
    assert min(SIZES.values()) >= 0.16


def test_held_out_split_is_balanced() -> None:
    things = [MovingObject(colour=c, shape=s, motion=m, size="small") for c, s, m in combinations()]
    held_out = [t for t in things if is_held_out(t)]
    train = [t for t in things if not is_held_out(t)]
    assert 0.1 < len(held_out) / len(things) < 0.15
    for name, values in (("colour", tuple(COLOURS)), ("shape", SHAPES), ("motion", MOTIONS)):
        counts = Counter(getattr(t, name) for t in held_out)
        assert set(counts) == set(values)
        assert max(counts.values()) - min(counts.values()) <= 2
    # every pair of values is trained on: only the triple is new
    for first, second in (("colour", "shape"), ("colour", "motion"), ("shape", "motion")):
        seen = {(getattr(t, first), getattr(t, second)) for t in train}
        assert seen == {(getattr(t, first), getattr(t, second)) for t in things}


@pytest.mark.parametrize("num_objects", [1, 2])
def test_each_split_draws_only_its_own_objects_and_every_value(num_objects: int) -> None:
    for split, wanted in (("train", False), ("held_out", True)):
        scenes = [scene_at(3, i, split=split, num_objects=num_objects) for i in range(400)]
        things = [t for s in scenes for t in s.objects]
        assert {is_held_out(t) for t in things} == {wanted}
        assert {t.colour for t in things} == set(COLOURS)
        assert {t.shape for t in things} == set(SHAPES)
        assert {t.motion for t in things} == set(MOTIONS if num_objects == 1 else PAIR_MOTIONS)
        assert {s.background for s in scenes} == set(BACKGROUNDS)
    assert {t.size for s in (scene_at(3, i) for i in range(50)) for t in s.objects} == set(SIZES)


def test_same_seed_same_bytes_and_another_seed_others() -> None:
    frames = [render(scene_at(seed, 5), 9, 48, 64) for seed in (0, 0, 1)]
    assert frames[0].tobytes() == frames[1].tobytes()
    assert frames[0].tobytes() != frames[2].tobytes()
    scene = scene_at(0, 5, num_objects=1)
    moved = render(replace(scene, placement=scene.placement + 1), 9, 48, 64)
    assert moved.tobytes() != render(scene, 9, 48, 64).tobytes()


@pytest.mark.parametrize("size", [(1, 16, 16), (5, 64, 96), (33, 96, 64), (17, 40, 104)])
def test_renders_any_size_and_keeps_objects_inside(size: tuple[int, int, int]) -> None:
    for index in range(30):
        frames = render(scene_at(1, index, split="any"), *size)
        assert frames.shape == (*size, 3)
        assert frames.dtype == np.uint8
        if min(size[1:]) < 64 or index % 2:  # below that the margin is less than a pixel
            continue
        frames = render(scene_at(1, index, split="any", num_objects=1), *size)
        border = np.concatenate([frames[:, [0, -1]].reshape(-1, 3), frames[:, :, [0, -1]].reshape(-1, 3)])
        assert int(np.ptp(border.astype(int), axis=1).max()) < 12  # neutral: no object is cut by the frame


def test_edges_are_anti_aliased() -> None:
    scene = Scene(objects=(_object(shape="circle"),), background="black", placement=0)
    levels = np.unique(render(scene, 1, 64, 64)[..., 0])
    assert len(levels) > 20  # a hard mask would give 2


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "circle"])
def test_rotation_is_visible(shape: str) -> None:
    scene = Scene(objects=(_object(shape=shape, motion="rotate"),), background="black", placement=0)
    red = render(scene, 17, 64, 64)[..., 0].astype(float)
    change = np.abs(np.diff(red, axis=0)).mean((1, 2)) / red.mean()
    assert change.min() > 0.01  # in every frame


def test_impossible_objects_are_refused() -> None:
    with pytest.raises(ValueError, match=r"motion='rotate' cannot be seen on shape='circle', nearest is"):
        _object(shape="circle", motion="rotate")
    with pytest.raises(ValueError, match=r"colour='pink' is not in this world: one of red"):
        _object(colour="pink")
    with pytest.raises(ValueError, match="two objects need two colours"):
        Scene(objects=(_object(size="small"), _object(size="small")), background="black", placement=0)
    with pytest.raises(ValueError, match="does not fit beside another object"):
        Scene(
            objects=(_object(size="small"), _object(size="small", colour="blue", motion="left")),
            background="black",
            placement=0,
        )
    with pytest.raises(ValueError, match=r"objects holds 0 objects"):
        Scene(objects=(), background="black", placement=0)
    with pytest.raises(ValueError, match=r"num_frames=0 must be at least 1"):
        render(scene_at(0, 0), 0, 64, 64)
    with pytest.raises(ValueError, match=r"height=8, width=64 must be at least 16"):
        render(scene_at(0, 0), 1, 8, 64)
    with pytest.raises(ValueError, match=r"num_objects=3 must be 1 or 2, nearest is 2"):
        scene_at(0, 0, num_objects=3)


def test_captions_say_every_attribute_in_several_wordings() -> None:
    rng = np.random.default_rng(0)
    for index in range(60):
        scene = scene_at(2, index, split="any")
        wordings = {caption(scene, rng) for _ in range(30)}
        assert len(wordings) >= 8
        for text in wordings:
            assert all(t.colour in text for t in scene.objects)
        assert caption(scene) == caption(scene)
        assert caption(scene) in {caption(scene, None, omit=0.5)}
    scene = scene_at(2, 0, num_objects=1)
    assert any("background" not in caption(scene, rng, omit=0.5) for _ in range(20))


def test_different_scenes_never_share_a_caption() -> None:
    rng = np.random.default_rng(0)
    seen: dict[str, Scene] = {}
    for colour, shape, motion in combinations():
        for size, ground in product(SIZES, BACKGROUNDS):
            thing = MovingObject(colour=colour, shape=shape, motion=motion, size=size)
            scene = Scene(objects=(thing,), background=ground, placement=0)
            for text in {caption(scene, rng) for _ in range(3)}:
                assert seen.setdefault(text, scene) == scene


def test_detector_is_right_on_ground_truth() -> None:
    table = confusion(150, seed=11, num_frames=17, height=64, width=64)
    assert all(_accuracy(counts) >= 0.99 for counts in table.values())


@pytest.mark.slow
@pytest.mark.parametrize(("blur", "noise"), [(0.0, 0.0), (0.8, 0.032), (1.2, 0.032)])
def test_detector_is_right_on_2000_clips_blurred_and_noisy(blur: float, noise: float) -> None:
    table = confusion(2000, seed=7, num_frames=17, height=64, width=64, blur=blur, noise=noise)
    assert all(_accuracy(counts) >= 0.99 for counts in table.values())


def test_detector_survives_what_a_30_db_codec_does() -> None:
    table = confusion(80, seed=12, num_frames=17, height=64, width=64, blur=1.0, noise=0.032)
    assert all(_accuracy(counts) >= 0.98 for counts in table.values())


def test_detector_reads_other_sizes(detector: Detector) -> None:
    for size in ((9, 96, 128), (33, 64, 64), (17, 128, 80)):
        scenes = [scene_at(4, i, split="any") for i in range(12)]
        rights = [right["all"] for s in scenes for right in score(s, detector(render(s, *size)))]
        assert np.mean(rights) >= 0.96


def test_detector_notices_every_change_of_one_attribute(detector: Detector) -> None:
    """The twin: clips that differ from their description in one attribute must fail on that one only."""
    base = _object(motion="up")
    scene = Scene(objects=(base,), background="gray", placement=3)
    clean = score(scene, detector(render(scene, 17, 64, 64)))[0]
    assert all(clean.values())
    for name, value in (("colour", "blue"), ("shape", "cross"), ("size", "small"), ("motion", "down")):
        other = Scene(objects=(replace(base, **{name: value}),), background="gray", placement=3)
        right = score(scene, detector(render(other, 17, 64, 64)))[0]
        assert not right.pop(name)
        assert not right.pop("all")
        assert all(right.values()), name
    other = replace(scene, background="white")
    right = score(scene, detector(render(other, 17, 64, 64)))[0]
    assert [k for k, v in right.items() if not v] == ["background", "all"]


def test_detector_abstains_when_unsure(detector: Detector) -> None:
    rng = np.random.default_rng(0)
    nothing = detector(np.full((17, 64, 64, 3), 127, np.uint8))
    assert nothing.objects == ()
    assert nothing.background == "gray"
    noise = detector(rng.integers(0, 256, (17, 64, 64, 3), dtype=np.uint8))
    assert all(o.shape is None for o in noise.objects)
    scene = Scene(objects=(_object(shape="square"),), background="black", placement=0)
    smeared = detector(blur_and_noise(render(scene, 17, 64, 64), 14.0, 0.0, rng))
    assert all(o.shape is None or o.size is None for o in smeared.objects)
    shuffled = render(replace(scene, objects=(_object(motion="left"),)), 17, 64, 64)[rng.permutation(17)]
    assert detector(shuffled).objects[0].motion is None
    single = detector(render(scene, 1, 64, 64))
    assert single.objects[0].motion is None
    assert single.objects[0].shape == "square"


def test_detector_refuses_what_is_no_clip(detector: Detector) -> None:
    with pytest.raises(ValueError, match=r"frames of shape \(64, 64, 3\) cannot be read"):
        detector(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match=r"frames of dtype int64 cannot be read"):
        detector(np.zeros((1, 64, 64, 3), np.int64))


def test_two_objects_are_read_from_left_to_right(detector: Detector) -> None:
    left = _object(size="small", colour="cyan", shape="bar", motion="up")
    right = _object(size="small", colour="red", shape="cross", motion="rotate")
    scene = Scene(objects=(left, right), background="gradient", placement=1)
    frames = render(scene, 17, 64, 64)
    assert [r["all"] for r in score(scene, detector(frames))] == [True, True]
    mirrored = score(scene, detector(frames[:, :, ::-1]))
    assert not any(r["colour"] for r in mirrored)


def test_command_line_prints_the_confusion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--clips", "6"]) == 0
    assert "background 6/6 = 1.0000" in capsys.readouterr().out
    assert main(["--clips", "3", "--json"]) == 0
    assert "->" in capsys.readouterr().out
