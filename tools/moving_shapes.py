"""MovingShapes: a procedural text-to-video world, its captions, and a detector that reads them back. NumPy only.

One or two coloured shapes move over a neutral background. Everything a caption says (colour, shape, size, motion,
background) can be read from the frames without a network, so a text-to-video model can be *scored* on it.

Lengths are in units of the shorter frame side. The `radius` of a shape is that of the circle of equal area, so area
tells the size whatever the shape. x points right, y points down.

    python -m tools.moving_shapes --clips 2000                        # the detector's own confusion
    python -m tools.moving_shapes --clips 2000 --blur 0.8 --noise 0.03
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Split = Literal["train", "held_out", "any"]

# Six hues 60 degrees apart with the same chroma (0.8): chroma / 0.8 is then the exact coverage of a pixel on any grey.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.9, 0.1, 0.1),
    "yellow": (0.9, 0.9, 0.1),
    "green": (0.1, 0.9, 0.1),
    "cyan": (0.1, 0.9, 0.9),
    "blue": (0.1, 0.1, 0.9),
    "magenta": (0.9, 0.1, 0.9),
}
SHAPES = ("circle", "square", "triangle", "cross", "bar")
MOTIONS = ("left", "right", "up", "down", "bounce", "grow", "rotate", "still")
SIZES: dict[str, float] = {"small": 0.16, "large": 0.22}
BACKGROUNDS: dict[str, tuple[float, float]] = {  # grey at the top and at the bottom of the frame
    "black": (0.04, 0.04),
    "white": (0.96, 0.96),
    "gray": (0.5, 0.5),
    "gradient": (0.15, 0.85),
}
PAIR_MOTIONS = ("up", "down", "bounce", "grow", "rotate", "still")  # lanes are too narrow for left and right
ATTRIBUTES = ("colour", "shape", "size", "motion", "background")

_CHROMA = 0.8
_TURN = math.pi / 2  # of a rotating shape over the clip, clockwise: slow enough for a VAE that keeps every 4th frame
_GROW_FROM = 0.55
_BAR_RATIO = 2.6
_TRAVEL = (0.26, 0.42)
_MARGIN = 0.02

# Half extents of each shape of radius 1: right/left, up, down, and the circle around it (for rotation).
_HALF = math.sqrt(math.pi) / 2
_SIDE = math.sqrt(4 * math.pi / math.sqrt(3))
_ARM = math.sqrt(9 * math.pi / 5) / 2
_BAR_H = math.sqrt(math.pi / _BAR_RATIO) / 2
_EXTENTS: dict[str, tuple[float, float, float, float]] = {
    "circle": (1.0, 1.0, 1.0, 1.0),
    "square": (_HALF, _HALF, _HALF, _HALF * math.sqrt(2)),
    "triangle": (_SIDE / 2, _SIDE / math.sqrt(3), _SIDE / math.sqrt(12), _SIDE / math.sqrt(3)),
    "cross": (_ARM, _ARM, _ARM, math.hypot(_ARM, _ARM / 3)),
    "bar": (_BAR_H * _BAR_RATIO, _BAR_H, _BAR_H, math.hypot(_BAR_H, _BAR_H * _BAR_RATIO)),
}
# Smallest turn that maps the shape onto itself.
_PERIOD = {"square": math.pi / 2, "triangle": 2 * math.pi / 3, "cross": math.pi / 2, "bar": math.pi}


@dataclass(frozen=True, kw_only=True, slots=True)
class MovingObject:
    """One shape: the four attributes that a caption names. A circle never rotates: nobody could see it."""

    colour: str
    shape: str
    size: str
    motion: str

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("colour", self.colour, tuple(COLOURS)),
            ("shape", self.shape, SHAPES),
            ("size", self.size, tuple(SIZES)),
            ("motion", self.motion, MOTIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not in this world: one of {', '.join(allowed)}")
        if self.shape == "circle" and self.motion == "rotate":
            raise ValueError("motion='rotate' cannot be seen on shape='circle', nearest is shape='square'")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One clip: one object, or two side by side (left one first), a background, and the seed of the placement."""

    objects: tuple[MovingObject, ...]
    background: str
    placement: int

    def __post_init__(self) -> None:
        if not 1 <= len(self.objects) <= 2:
            raise ValueError(f"objects holds {len(self.objects)} objects, need 1 or 2")
        if self.background not in BACKGROUNDS:
            raise ValueError(f"background={self.background!r} is not in this world: one of {', '.join(BACKGROUNDS)}")
        if len(self.objects) == 2:
            first, second = self.objects
            if first.colour == second.colour:
                raise ValueError(f"two objects need two colours, both are {first.colour!r}")
            for thing in self.objects:
                if thing.motion not in PAIR_MOTIONS or thing.size != "small":
                    raise ValueError(
                        f"size={thing.size!r}, motion={thing.motion!r} does not fit beside another object: "
                        f"need size='small' and one of {', '.join(PAIR_MOTIONS)}"
                    )


def is_held_out(thing: MovingObject) -> bool:
    """Whether this combination of colour, shape and motion is never trained on.

    One motion of eight is held out for each pair of colour and shape, shifted from pair to pair as in a Latin square:
    every colour, shape and motion occurs on both sides, and so does every pair of two of them in training.
    """
    colour, shape = list(COLOURS).index(thing.colour), SHAPES.index(thing.shape)
    return (colour + 3 * shape + MOTIONS.index(thing.motion)) % len(MOTIONS) == 0


def combinations() -> Iterator[tuple[str, str, str]]:
    """Every (colour, shape, motion) of the world."""
    for colour in COLOURS:
        for shape in SHAPES:
            for motion in MOTIONS:
                if not (shape == "circle" and motion == "rotate"):
                    yield colour, shape, motion


def sample_scene(rng: np.random.Generator, *, split: Split = "train", num_objects: int | None = None) -> Scene:
    """Draw a scene.

    Args:
        rng: its state alone decides the scene.
        split: "train" holds no held-out object; in "held_out" every object is a held-out combination.
        num_objects: 1, 2, or None for three quarters ones and one quarter twos.
    Raises:
        ValueError: num_objects is neither 1 nor 2.
    """
    count = num_objects if num_objects is not None else (2 if rng.random() < 0.25 else 1)
    if count not in (1, 2):
        raise ValueError(f"num_objects={count} must be 1 or 2, nearest is {1 if count < 1 else 2}")
    motions = MOTIONS if count == 1 else PAIR_MOTIONS
    things: list[MovingObject] = []
    while len(things) < count:
        motion = motions[rng.integers(len(motions))]  # motion first: no shape or colour shifts its frequency
        shape = SHAPES[rng.integers(len(SHAPES))]
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        size = "small" if count == 2 else list(SIZES)[rng.integers(len(SIZES))]
        if shape == "circle" and motion == "rotate":
            continue
        thing = MovingObject(colour=colour, shape=shape, size=size, motion=motion)
        if split != "any" and is_held_out(thing) != (split == "held_out"):
            continue
        if any(other.colour == colour for other in things):
            continue
        things.append(thing)
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    return Scene(objects=tuple(things), background=background, placement=int(rng.integers(2**31)))


def scene_at(seed: int, index: int, *, split: Split = "train", num_objects: int | None = None) -> Scene:
    """Scene number `index` of the endless list that `seed` names; any order, any process, the same scene."""
    return sample_scene(np.random.default_rng([seed, index]), split=split, num_objects=num_objects)


# --- rendering ----------------------------------------------------------------------------------------------------


def signed_distance(shape: str, x: Floats, y: Floats, radius: Floats | float) -> Floats:
    """Distance to the outline of an upright shape at the origin, negative inside, in the unit of x, y and radius."""
    if shape == "circle":
        return np.asarray(np.hypot(x, y) - radius, np.float32)
    if shape == "square":
        return np.asarray(np.maximum(np.abs(x), np.abs(y)) - _HALF * radius, np.float32)
    if shape == "bar":
        return np.asarray(np.maximum(np.abs(x) - _BAR_H * _BAR_RATIO * radius, np.abs(y) - _BAR_H * radius), np.float32)
    if shape == "cross":
        ax, ay = np.abs(x), np.abs(y)
        across = np.maximum(ax - _ARM * radius, ay - _ARM / 3 * radius)
        along = np.maximum(ay - _ARM * radius, ax - _ARM / 3 * radius)
        return np.asarray(np.minimum(across, along), np.float32)
    inner = _SIDE / math.sqrt(12) * radius
    slanted = math.sqrt(3) / 2 * np.abs(x) - 0.5 * y - inner  # the two upper sides; y points down
    return np.asarray(np.maximum(y - inner, slanted), np.float32)


def _placed(thing: MovingObject, rng: np.random.Generator, lane: tuple[float, float], bottom: float) -> list[float]:
    """Start x, y and end x, y of the centre, all inside the lane; for a bounce the end is the floor."""
    radius = SIZES[thing.size]
    side, up, down, around = (radius * e for e in _EXTENTS[thing.shape])
    if thing.motion == "rotate":
        side = up = down = around
    x0, x1 = _inset(lane[0] + side, lane[1] - side)
    y0, y1 = _inset(up, bottom - down)
    x, y, travel = rng.random(), rng.random(), rng.uniform(*_TRAVEL)
    if thing.motion in ("left", "right"):
        travel = min(travel, x1 - x0)
        low = x0 + x * (x1 - x0 - travel)
        ends = (low + travel, low) if thing.motion == "left" else (low, low + travel)
        cy = y0 + y * (y1 - y0)
        return [ends[0], cy, ends[1], cy]
    cx = x0 + x * (x1 - x0)
    if thing.motion in ("up", "down", "bounce"):
        travel = min(travel, y1 - y0)
        low = y0 + y * (y1 - y0 - travel)
        ends = (low + travel, low) if thing.motion == "up" else (low, low + travel)
        return [cx, ends[0], cx, ends[1]]
    cy = y0 + y * (y1 - y0)
    return [cx, cy, cx, cy]


def _inset(low: float, high: float) -> tuple[float, float]:
    """The range less a margin on both sides, which shrinks where there is no room (two rotating shapes can touch)."""
    margin = min(_MARGIN, (high - low) / 2)
    return low + margin, high - margin


def render(scene: Scene, num_frames: int, height: int, width: int, *, times: Sequence[float] | None = None) -> Bytes:
    """Frames uint8 [T, H, W, 3] of a scene, anti-aliased; the same scene and size give the same bytes.

    Args:
        num_frames: T; a motion always fills the whole clip, whatever T is.
        height, width: H and W in pixels.
        times: T moments between 0 and 1 instead of an even spacing (single images: one random moment).
    Raises:
        ValueError: a size below 1 frame or 16 pixels, or a number of times other than T.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames} must be at least 1, nearest is 1")
    if min(height, width) < 16:
        near = f"{max(16, height)} and {max(16, width)}"
        raise ValueError(f"height={height}, width={width} must be at least 16, nearest is {near}")
    if times is not None and len(times) != num_frames:
        raise ValueError(f"times holds {len(times)} moments for num_frames={num_frames}, need {num_frames}")
    moments = np.linspace(0, 1, num_frames) if times is None else np.asarray(times)
    s = moments.astype(np.float32)[:, None, None]  # [T, 1, 1]
    unit = min(height, width)
    wide, tall = width / unit, height / unit
    xs = ((np.arange(width, dtype=np.float32) + 0.5) / unit)[None, None, :]
    ys = ((np.arange(height, dtype=np.float32) + 0.5) / unit)[None, :, None]
    top, bottom = BACKGROUNDS[scene.background]
    grey = top + (bottom - top) * ys / tall  # [1, H, 1]
    frames = np.broadcast_to(grey[..., None], (num_frames, height, width, 3)).astype(np.float32)
    rng = np.random.default_rng(scene.placement)
    lanes = [(0.0, wide)] if len(scene.objects) == 1 else [(0.0, wide / 2), (wide / 2, wide)]
    for thing, lane in zip(scene.objects, lanes, strict=True):
        x_from, y_from, x_to, y_to = _placed(thing, rng, lane, tall)
        path = s
        if thing.motion == "bounce":  # falls under gravity, meets the floor half-way, rises as it fell
            path = np.where(s < 0.5, (2 * s) ** 2, (2 - 2 * s) ** 2)
        growth = _GROW_FROM + (1 - _GROW_FROM) * s if thing.motion == "grow" else np.ones_like(s)
        radius = np.asarray(SIZES[thing.size] * growth, np.float32)
        dx, dy = xs - (x_from + (x_to - x_from) * path), ys - (y_from + (y_to - y_from) * path)
        if thing.motion == "rotate":
            cos, sin = np.cos(_TURN * s), np.sin(_TURN * s)
            dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
        distance = signed_distance(thing.shape, dx, dy, radius)
        cover = np.clip(0.5 - distance * unit, 0, 1)[..., None]  # [T, H, W, 1]
        frames += cover * (np.asarray(COLOURS[thing.colour], np.float32) - frames)
    return np.asarray(np.rint(frames * 255), np.uint8)


# --- captions -----------------------------------------------------------------------------------------------------

_NOUNS = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "cross": ("cross", "plus sign"),
    "bar": ("bar", "rectangle"),
}
_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_BACKGROUND_WORDS = {
    "black": ("black",),
    "white": ("white",),
    "gray": ("gray", "grey"),
    "gradient": ("gradient", "shaded"),
}
_VERBS = {  # (present tense, -ing form)
    "left": (
        ("moves left", "moving left"),
        ("slides to the left", "sliding to the left"),
        ("goes leftward", "going leftward"),
    ),
    "right": (
        ("moves right", "moving right"),
        ("slides to the right", "sliding to the right"),
        ("goes rightward", "going rightward"),
    ),
    "up": (("moves up", "moving up"), ("rises", "rising"), ("floats upward", "floating upward")),
    "down": (("moves down", "moving down"), ("sinks", "sinking"), ("slides downward", "sliding downward")),
    "bounce": (
        ("bounces", "bouncing"),
        ("bounces off the ground", "bouncing off the ground"),
        ("hops once", "hopping once"),
    ),
    "grow": (("grows", "growing"), ("gets bigger", "getting bigger"), ("expands", "expanding")),
    "rotate": (("rotates", "rotating"), ("spins", "spinning"), ("turns around", "turning around")),
    "still": (("stays still", "staying still"), ("does not move", "not moving"), ("rests", "resting")),
}


def caption(scene: Scene, rng: np.random.Generator | None = None, *, omit: float = 0.0) -> str:
    """One sentence that says the scene.

    Args:
        rng: picks among paraphrases; None gives the plain wording, always the same.
        omit: probability that the size, and independently the background, is left unsaid.
    """

    def pick(words: Sequence[str]) -> str:
        return words[0] if rng is None else words[int(rng.integers(len(words)))]

    def says() -> bool:
        return rng is None or rng.random() >= omit

    nouns, present, continuous = [], [], []
    for thing in scene.objects:
        words = [pick(_SIZE_WORDS[thing.size])] if says() else []
        nouns.append(" ".join(["a", *words, thing.colour, pick(_NOUNS[thing.shape])]))
        verb = _VERBS[thing.motion][0 if rng is None else rng.integers(len(_VERBS[thing.motion]))]
        present.append(verb[0])
        continuous.append(verb[1])
    ground = pick(_BACKGROUND_WORDS[scene.background]) if says() else None
    form = 0 if rng is None else int(rng.integers(4))
    if len(scene.objects) == 1:
        body = f"{nouns[0]} {present[0] if form % 2 == 0 else continuous[0]}"
    elif form % 2 == 0:
        body = f"{nouns[0]} {present[0]} on the left and {nouns[1]} {present[1]} on the right"
    else:
        body = f"on the left {nouns[0]} {continuous[0]}, on the right {nouns[1]} {continuous[1]}"
    if ground is None:
        return f"a video of {body}" if form == 3 else body
    if form == 0:
        return f"{body} on a {ground} background"
    if form == 1:
        return f"{body}, {ground} background"
    if form == 2:
        return f"on a {ground} background, {body}"
    return f"a video of {body} against a {ground} backdrop"


# --- reading clips back -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectReading:
    """What the detector read of one object; None where it is not sure.

    `overlap` is the mean intersection over union with the best template of the best shape (about 0.95 on real clips).
    """

    colour: str | None
    shape: str | None
    size: str | None
    motion: str | None
    overlap: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What the detector read of one clip: objects from left to right (none where it saw 0 or more than 2)."""

    objects: tuple[ObjectReading, ...]
    background: str | None


_GRID = 40
_REACH = 1.9  # templates span this many radii around the centroid: the largest circle around a shape is 1.56
_MIN_OVERLAP = 0.72
_MIN_MARGIN = 0.02


def _templates() -> tuple[list[str], Floats, Floats]:
    """Names [K], angles [K] in radians and masks [K, G, G] of every shape at every 10 degrees of its period."""
    axis = ((np.arange(_GRID, dtype=np.float32) + 0.5) / _GRID * 2 - 1) * _REACH
    y, x = np.meshgrid(axis, axis, indexing="ij")
    names, angles, masks = [], [], []
    for shape in SHAPES:
        steps = round(math.degrees(_PERIOD[shape]) / 10) if shape in _PERIOD else 1
        for step in range(steps):
            angle = math.radians(10 * step)
            cos, sin = math.cos(angle), math.sin(angle)
            turned_x = np.asarray(cos * x + sin * y, np.float32)
            turned_y = np.asarray(cos * y - sin * x, np.float32)
            distance = signed_distance(shape, turned_x, turned_y, 1.0)
            names.append(shape)
            angles.append(angle)
            masks.append(np.clip(0.5 - distance / 0.12, 0, 1))
    return names, np.asarray(angles, np.float32), np.stack(masks).astype(np.float32)


class Detector:
    """Reads every attribute of MovingShapes clips from pixels, without a network, and abstains when unsure.

    Coverage comes from chroma (backgrounds are neutral), colour from its direction, shape from the overlap with
    area-matched templates at every orientation, motion from the path of centroid, area and orientation.
    """

    def __init__(self) -> None:
        self._names, self._angles, self._masks = _templates()
        palette = np.asarray(list(COLOURS.values()), np.float32)
        low = palette.min(1, keepdims=True)
        self._directions = (palette - low) / (palette.max(1, keepdims=True) - low)  # [6, 3]

    def __call__(self, frames: NDArray[np.uint8] | NDArray[np.floating]) -> Reading:
        """Read a clip.

        Args:
            frames: [T, H, W, 3], uint8 or floating in [0, 1].
        Raises:
            ValueError: another shape or type.
        """
        if frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"frames of shape {frames.shape} cannot be read, need [T, H, W, 3]")
        if frames.dtype == np.uint8:
            video = np.asarray(frames, np.float32) / np.float32(255)
        elif np.issubdtype(frames.dtype, np.floating):
            video = frames.astype(np.float32)
        else:
            raise ValueError(f"frames of dtype {frames.dtype} cannot be read, need uint8 or floating in [0, 1]")
        unit = min(video.shape[1:3])
        low = video.min(-1)
        chroma = video.max(-1) - low  # [T, H, W]
        cover = np.clip((chroma / _CHROMA - 0.25) * 2, 0, 1)  # symmetric about a half: blur leaves the area alone
        direction = (video - low[..., None]) / np.maximum(chroma, 1e-6)[..., None]
        away = np.stack([np.square(direction - d).sum(-1) for d in self._directions])  # [6, T, H, W]
        label = away.argmin(0)
        areas = np.stack([(cover * (label == c)).sum((1, 2)) for c in range(len(COLOURS))]) / unit**2  # [6, T]
        seen = [c for c in range(len(COLOURS)) if areas[c].mean() > 0.025 and (areas[c] > 0.012).mean() >= 0.7]
        found: list[tuple[float, ObjectReading]] = []
        if len(seen) <= 2:
            for c in seen:
                mask = cover * (label == c)
                deviation = float((np.sqrt(away[c]) * mask).sum() / mask.sum())
                found.append(self._object(mask, unit, list(COLOURS)[c] if deviation < 0.35 else None))
        found.sort(key=lambda item: item[0])
        return Reading(objects=tuple(item[1] for item in found), background=self._background(video, chroma))

    def _object(self, mask: Floats, unit: int, colour: str | None) -> tuple[float, ObjectReading]:
        """Mean x in units, and the reading, of the object whose coverage is mask [T, H, W]."""
        num_frames, height, width = mask.shape
        mass = mask.sum((1, 2))  # [T]
        good = mass / unit**2 > 0.012
        mask, mass = mask[good], mass[good]
        moments = np.linspace(0, 1, num_frames)[good]
        x = (mask.sum(1) @ (np.arange(width) + 0.5)) / mass / unit
        y = (mask.sum(2) @ (np.arange(height) + 0.5)) / mass / unit
        radius = np.sqrt(mass / math.pi) / unit  # [T]
        overlaps = self._overlaps(mask, x * unit, y * unit, radius * unit)  # [T, K]
        weights = mass / mass.sum()
        free = {s: np.stack([overlaps[:, k] for k, n in enumerate(self._names) if n == s]).max(0) for s in SHAPES}
        ranked = sorted(((float(free[s] @ weights), s) for s in SHAPES), reverse=True)
        overlap, best = ranked[0]
        sure = overlap >= _MIN_OVERLAP and overlap - ranked[1][0] >= _MIN_MARGIN
        motion = self._motion(moments, x, y, radius, overlaps, best) if num_frames >= 5 else None
        final = float(np.median(radius[-max(1, len(radius) // 8) :] if motion == "grow" else radius))
        small, large = SIZES["small"], SIZES["large"]
        middle = math.sqrt(small * large)
        size = None
        if 0.75 * small < final < 0.97 * middle:
            size = "small"
        elif 1.03 * middle < final < 1.3 * large:
            size = "large"
        return float(x.mean()), ObjectReading(
            colour=colour, shape=best if sure else None, size=size, motion=motion, overlap=overlap
        )

    def _overlaps(self, mask: Floats, x: Floats, y: Floats, radius: Floats) -> Floats:
        """Overlap [T, K] of each frame, resampled to radius 1 around its centroid, with each template."""
        num_frames, height, width = mask.shape
        axis = ((np.arange(_GRID, dtype=np.float32) + 0.5) / _GRID * 2 - 1) * _REACH
        px = x[:, None] + axis * radius[:, None] - 0.5  # [T, G] in pixels
        py = y[:, None] + axis * radius[:, None] - 0.5
        padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
        px, py = np.clip(px + 1, 0, width + 0.999), np.clip(py + 1, 0, height + 0.999)
        ix, iy = px.astype(np.int64), py.astype(np.int64)
        fx, fy = (px - ix)[:, None, :], (py - iy)[:, :, None]
        t, row, col = np.arange(num_frames)[:, None, None], iy[:, :, None], ix[:, None, :]
        above = padded[t, row, col] * (1 - fx) + padded[t, row, col + 1] * fx
        below = padded[t, row + 1, col] * (1 - fx) + padded[t, row + 1, col + 1] * fx
        patch = (above * (1 - fy) + below * fy).reshape(num_frames, 1, -1).astype(np.float32)  # [T, 1, G*G]
        templates = self._masks.reshape(1, len(self._names), -1)
        both = np.minimum(patch, templates).sum(-1)
        return np.asarray(both / (patch.sum(-1) + templates.sum(-1) - both), np.float32)

    def _motion(
        self, s: NDArray[np.float64], x: Floats, y: Floats, radius: Floats, overlaps: Floats, shape: str
    ) -> str | None:
        """The motion that exactly one of position, area and orientation shows."""
        if len(s) < 5:
            return None
        edge = max(1, len(s) // 6)
        head, tail, middle = slice(0, edge), slice(-edge, None), slice(len(s) // 2 - edge // 2, len(s) // 2 + 1)
        dx, dy = float(np.mean(x[tail]) - np.mean(x[head])), float(np.mean(y[tail]) - np.mean(y[head]))
        dip = float(np.mean(y[middle]) - (np.mean(y[tail]) + np.mean(y[head])) / 2)
        growth = float(np.mean(radius[tail]) / np.mean(radius[head]))
        turn = self._turn(overlaps, shape)
        if max(abs(dx), abs(dy)) > 0.13:
            if abs(dip) > 0.1:
                return None
            if abs(dx) > 2 * abs(dy):
                return "left" if dx < 0 else "right"
            if abs(dy) > 2 * abs(dx):
                return "up" if dy < 0 else "down"
            return None
        if max(abs(dx), abs(dy)) > 0.09:
            return None
        if dip > 0.12:
            return "bounce"
        if growth > 1.3:
            return "grow"
        if turn > math.radians(55):
            return "rotate"
        if abs(dip) < 0.08 and 1 / 1.2 < growth < 1.2 and turn < math.radians(30):
            return "still"
        return None

    def _turn(self, overlaps: Floats, shape: str) -> float:
        """How far, in radians, the orientation of the shape runs clockwise over the clip (0 for a circle)."""
        if shape not in _PERIOD:
            return 0.0
        columns = [k for k, name in enumerate(self._names) if name == shape]
        angles = self._angles[columns][overlaps[:, columns].argmax(1)].astype(np.float64)
        period = _PERIOD[shape]
        steps = (np.diff(angles) + period / 2) % period - period / 2
        return max(0.0, float(steps.sum()))

    @staticmethod
    def _background(video: Floats, chroma: Floats) -> str | None:
        """The background whose grey fits the neutral pixels of the top and bottom rows."""
        height = video.shape[1]
        band = max(1, height // 8)
        greys = []
        for rows in (slice(0, band), slice(height - band, height)):
            neutral = chroma[:, rows] < 0.15 * _CHROMA
            if neutral.mean() < 0.1:
                return None
            greys.append(float(np.median(video[:, rows].mean(-1)[neutral])))
        top, bottom = greys
        for name, (want_top, want_bottom) in BACKGROUNDS.items():
            if max(abs(top - want_top), abs(bottom - want_bottom)) < 0.15:
                return name
        return None


def score(scene: Scene, reading: Reading) -> list[dict[str, bool]]:
    """Per object of the scene, which attributes were read as the scene has them; an abstention counts as wrong.

    Each dictionary has the keys of ATTRIBUTES and "all". A wrong number of objects makes every object attribute wrong.
    """
    rights = [{name: said == read for name, (said, read) in one.items()} for one in said_and_read(scene, reading)]
    return [right | {"all": all(right.values())} for right in rights]


def said_and_read(scene: Scene, reading: Reading) -> list[dict[str, tuple[str, str | None]]]:
    """Per object of the scene, what the scene has and what was read of each of ATTRIBUTES (None: an abstention).

    Nothing counts as read of any object where their number was read wrongly.
    """
    matched = len(reading.objects) == len(scene.objects)
    return [
        {
            name: (getattr(thing, name), getattr(reading.objects[i], name) if matched else None)
            for name in ("colour", "shape", "size", "motion")
        }
        | {"background": (scene.background, reading.background)}
        for i, thing in enumerate(scene.objects)
    ]


def blur_and_noise(frames: Bytes, blur: float, noise: float, rng: np.random.Generator) -> Floats:
    """What a lossy codec makes of a clip: a Gaussian blur of `blur` pixels, then Gaussian noise of `noise` (of 1)."""
    video = np.asarray(frames, np.float32) / np.float32(255)
    if blur > 0:
        reach = max(1, math.ceil(3 * blur))
        kernel = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / blur))
        kernel = (kernel / kernel.sum()).astype(np.float32)
        for axis in (1, 2):
            pad = [(reach, reach) if a == axis else (0, 0) for a in range(4)]
            padded = np.pad(video, pad, mode="edge")
            size = video.shape[axis]
            video = sum(w * padded.take(range(i, i + size), axis=axis) for i, w in enumerate(kernel))
    if noise > 0:
        video = video + rng.standard_normal(video.shape, dtype=np.float32) * np.float32(noise)
    return np.asarray(np.clip(video, 0, 1), np.float32)


def confusion(
    num_clips: int,
    *,
    seed: int,
    num_frames: int,
    height: int,
    width: int,
    blur: float = 0.0,
    noise: float = 0.0,
) -> dict[str, Counter[tuple[str, str]]]:
    """Count (said, read) per attribute over ground-truth clips of all combinations; "None" is an abstention.

    The extra key "objects" counts the numbers of objects.
    """
    detector = Detector()
    table: dict[str, Counter[tuple[str, str]]] = {name: Counter() for name in (*ATTRIBUTES, "objects")}
    for index in range(num_clips):
        scene = scene_at(seed, index, split="any")
        frames = render(scene, num_frames, height, width)
        reading = detector(blur_and_noise(frames, blur, noise, np.random.default_rng([seed, index, 1])))
        table["objects"][str(len(scene.objects)), str(len(reading.objects))] += 1
        objects = said_and_read(scene, reading)
        for i, one in enumerate(objects):
            for name, (said, read) in one.items():
                if name != "background" or i == 0:  # the scene has one background
                    table[name][said, str(read)] += 1
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Print how often the detector is right on ground truth, and where it is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--blur", type=float, default=0.0, help="sigma of a Gaussian blur, pixels")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation of added noise, of 1")
    parser.add_argument("--json", action="store_true", help="print the whole confusion as JSON")
    args = parser.parse_args(argv)
    table = confusion(
        args.clips,
        seed=args.seed,
        num_frames=args.frames,
        height=args.height,
        width=args.width,
        blur=args.blur,
        noise=args.noise,
    )
    if args.json:
        plain = {name: {f"{a} -> {b}": n for (a, b), n in sorted(counts.items())} for name, counts in table.items()}
        sys.stdout.write(json.dumps(plain, indent=1) + "\n")
        return 0
    for name, counts in table.items():
        total = sum(counts.values())
        right = sum(n for (said, read), n in counts.items() if said == read)
        wrong = ", ".join(f"{a}->{b} {n}" for (a, b), n in counts.most_common() if a != b)
        sys.stdout.write(f"{name:<11}{right}/{total} = {right / total:.4f}  {wrong}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
