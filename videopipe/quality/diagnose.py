"""What a difference looks like: lost or repeated frames, a shift, a tone curve, one corner, flicker, or noise.

The watcher sees every pair of frames and keeps a few small thumbnails and numbers, whatever the length of the clip.
Each finding is a measured statement with the frame it is about; where nothing simple explains a difference, it says so.
"""

from collections import deque
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_REACH = 3  # frames back and forth within which a lost or repeated frame is recognised
_STRONG = 10.0  # levels, root mean square on thumbnails: far above what encoders and kernels leave there
_LOOKS = 12  # frames looked at closely at most
_GRID = 48  # thumbnail samples per side
_FLICKER_LEVELS = 1.5  # change of mean brightness that counts as flicker, in grey levels


class _Box(Protocol):
    @property
    def top(self) -> int: ...
    @property
    def bottom(self) -> int: ...
    @property
    def left(self) -> int: ...
    @property
    def right(self) -> int: ...


class Watcher:
    """Sees pairs of frames in order, then says what it found."""

    def __init__(self) -> None:
        self._count = 0
        self._different = 0
        self._first: int | None = None
        self._shape = (0, 0)
        self._refs: deque[tuple[int, NDArray[np.float32]]] = deque(maxlen=2 * _REACH + 1)
        self._waiting: deque[tuple[int, NDArray[np.float32]]] = deque()
        self._runs: list[tuple[int, int]] = [(0, 0)]  # (first frame, offset into REF) of each run
        self._looks: list[tuple[int, str]] = []
        self._looked = 0
        self._largest = 0.0
        self._brightness: list[float] = []
        self._noise: list[float] = []  # mean squared error of each frame, on thumbnails

    def see(self, ref: NDArray[Any], cand: NDArray[Any], equal: bool) -> None:
        """The next pair of frames [H, W, 3]; `equal` if they are bit for bit."""
        t = self._count
        self._count += 1
        self._shape = (ref.shape[0], ref.shape[1])
        small_ref, small_cand = _thumbnail(ref), _thumbnail(cand)
        self._refs.append((t, small_ref))
        self._waiting.append((t, small_cand))
        if len(self._waiting) > _REACH:
            self._place(*self._waiting.popleft())
        self._brightness.append(float((small_cand - small_ref).mean()))
        error = float(np.square(small_cand - small_ref).mean())
        self._noise.append(error)
        if equal:
            return
        self._different += 1
        if self._first is None or (error > 1.5 * self._largest and self._looked < _LOOKS):
            self._first = t if self._first is None else self._first
            self._looked += 1
            look = _look(ref, cand)
            if look is not None:
                self._looks.append((t, look))
        self._largest = max(self._largest, error)

    def findings(self, box: _Box | None) -> tuple[str, ...]:
        """What was found, most telling first. `box` holds all differences of the first different frame."""
        while self._waiting:
            self._place(*self._waiting.popleft())
        if self._first is None:
            return ()
        found = self._order_findings()
        found += [] if found else self._look_findings()  # frames out of order look shifted when objects move
        confined = self._confined(box)
        found += [confined] if confined else []
        found += self._flicker_findings()
        if not found and self._different == self._count and self._count > 1:
            low, high = min(self._noise) ** 0.5, max(self._noise) ** 0.5
            if high > _STRONG:
                what = "every frame differs strongly, all over the picture: other content, or a mistake in every frame"
            else:
                cause = "lossy re-encoding or another kernel"
                what = f"every frame differs a little, all over the picture, as {cause} leaves it"
            found.append(f"{what} (root mean square {low:.2f} to {high:.2f} levels)")
        return tuple(found)

    def _place(self, t: int, thumbnail: NDArray[np.float32]) -> None:
        """Which frame of REF does CAND's frame t show? Stays with the last answer unless another is clearly better."""
        errors = {at - t: float(np.abs(thumbnail - ref).mean()) for at, ref in self._refs if abs(at - t) <= _REACH}
        current = self._runs[-1][1]
        best = min(errors, key=lambda offset: (errors[offset], abs(offset - current)))
        here = errors.get(current)
        if here is None:  # beyond the last frame seen of REF
            return
        if best != current and here > 0.05 and errors[best] < 0.5 * here:
            self._runs.append((t, best))

    def _order_findings(self) -> list[str]:
        found = []
        runs = [*self._runs, (self._count, 0)]
        skip = False
        for i in range(1, len(runs) - 1):
            if skip:
                skip = False
                continue
            (start, offset), before, (end, after) = runs[i], runs[i - 1][1], runs[i + 1]
            if i + 1 < len(runs) - 1 and after == before and end - start < _REACH:
                shown, there = _span(start + offset, end + offset), _span(start, end)
                found.append(f"CAND's {there} shows REF's {shown}; the order is right again from frame {end} on")
                skip = True
            elif offset > before:
                lost = _span(start + before, start + offset)
                shows = f"from CAND's frame {start} on, frame t shows REF's {_relative(offset)}"
                found.append(f"REF's {lost} is missing in CAND: {shows}")
            else:
                extra = _span(start, start + before - offset)
                shows = f"from CAND's frame {start} on, frame t shows REF's {_relative(offset)}"
                found.append(f"CAND's {extra} is extra: {shows}")
        return found

    def _look_findings(self) -> list[str]:
        if self._looks and len({text for _, text in self._looks}) == 1 and self._different > 1:
            return [f"from {_at(self._looks[0])}" if len(self._looks) > 1 else _at(self._looks[0])]
        return [_at(look) for look in self._looks[:3]]

    def _confined(self, box: _Box | None) -> str | None:
        if box is None:
            return None
        rows, cols = box.bottom - box.top, box.right - box.left
        if rows * cols > 0.5 * self._shape[0] * self._shape[1]:
            return None
        if rows == cols == 1:
            return f"frame {self._first}: one pixel differs, row {box.top}, column {box.left}"
        where = f"rows {box.top} to {box.bottom - 1}, columns {box.left} to {box.right - 1}"
        return f"frame {self._first}: only {where} differ"

    def _flicker_findings(self) -> list[str]:
        steps, noise = np.diff(np.asarray(self._brightness)), np.asarray(self._noise)
        explains = np.square(steps) > 0.25 * np.maximum(noise[1:], noise[:-1])  # not the mean of a larger difference
        jumps = [int(t) + 1 for t in np.flatnonzero((np.abs(steps) > _FLICKER_LEVELS) & explains)]
        if not jumps or len(self._runs) > 1:  # a wrong order explains it
            return []
        listed = ", ".join(map(str, jumps[:8])) + (f" and {len(jumps) - 8} more" if len(jumps) > 8 else "")
        return [f"mean brightness against REF jumps by up to {np.abs(steps).max():.1f} levels, at frame {listed}"]


def shift_between(ref: NDArray[Any], cand: NDArray[Any]) -> tuple[int, int] | None:
    """Whole pixels (down, right) by which CAND's picture is moved against REF's [H, W, 3]; None unless it explains it.

    Source: Kuglin and Hines 1975, phase correlation; the peak must cut the squared error to a quarter.
    """
    a, b = ref.mean(axis=2, dtype=np.float32), cand.mean(axis=2, dtype=np.float32)
    spectrum = np.fft.rfft2(b) * np.conj(np.fft.rfft2(a))
    surface = np.fft.irfft2(spectrum / np.maximum(np.abs(spectrum), 1e-6), s=a.shape)
    peak = np.unravel_index(int(np.argmax(surface)), surface.shape)
    down, right = (int(p) - (n if p > n // 2 else 0) for p, n in zip(peak, a.shape, strict=True))
    if (down, right) == (0, 0) or abs(down) > a.shape[0] // 4 or abs(right) > a.shape[1] // 4:
        return None
    before = float(np.square(a - b).mean())
    there = a[_overlap(-down, a.shape[0]), _overlap(-right, a.shape[1])]
    here = b[_overlap(down, a.shape[0]), _overlap(right, a.shape[1])]
    return (down, right) if float(np.square(there - here).mean()) < 0.25 * before else None


def tone_between(ref: NDArray[Any], cand: NDArray[Any]) -> str | None:
    """The gamma, gain or brightness that turns REF's frame into CAND's, in words; None unless one explains it."""
    x, y = ref.reshape(-1).astype(np.float64), cand.reshape(-1).astype(np.float64)
    step = max(1, x.size // 20000) | 1  # odd: samples all three channels
    x, y = x[::step], y[::step]
    inside = (y > 0) & (y < 255) & (x > 0) & (x < 255)  # clipped values follow no curve
    x, y = x[inside], y[inside]
    if x.size < 16:
        return None
    before = float(np.square(y - x).mean())
    limit = max(0.1 * before, 0.15)  # rounding to whole levels alone leaves 1/12
    if before <= limit:
        return None
    offset = float((y - x).mean())
    fits: list[tuple[float, str]] = [(float(np.square(y - x - offset).mean()), f"brightness {offset:+.1f} levels")]
    if float(x.std()) > 2.0:
        gain, bias = np.polyfit(x, y, 1)
        words = f"contrast x{gain:.3f}, brightness {bias:+.1f} levels"
        fits.append((float(np.square(gain * x + bias - y).mean()), words))
        middle = (x > 8) & (x < 247)
        if middle.sum() >= 16:
            gamma = float(np.median(np.log(y[middle] / 255) / np.log(x[middle] / 255)))
            fits.append((float(np.square(255 * (x / 255) ** gamma - y).mean()), f"gamma {gamma:.2f}"))
    residual, text = min(fits, key=lambda fit: fit[0])
    if fits[0][0] <= 1.2 * residual + 0.02:
        residual, text = fits[0]  # the simplest that does as well
    return text if residual <= limit else None


def _look(ref: NDArray[Any], cand: NDArray[Any]) -> str | None:
    """A closer look at one different frame."""
    tone = tone_between(ref, cand)
    if tone is not None:
        return tone
    moved = shift_between(ref, cand)
    if moved is None:
        return None
    down, right = moved
    parts = [f"{abs(n)} px {way[n < 0]}" for n, way in ((down, ("down", "up")), (right, ("right", "left"))) if n]
    return f"the picture is shifted {' and '.join(parts)}"


def _overlap(shift: int, size: int) -> slice:
    return slice(max(shift, 0), size + min(shift, 0))


def _thumbnail(frame: NDArray[Any]) -> NDArray[np.float32]:
    rows, cols = max(1, frame.shape[0] // _GRID), max(1, frame.shape[1] // _GRID)
    return frame[::rows, ::cols].astype(np.float32)


def _span(start: int, end: int) -> str:
    return f"frame {start}" if end - start == 1 else f"frames {start} to {end - 1}"


def _relative(offset: int) -> str:
    return f"t{offset:+d}" if offset else "t again"


def _at(look: tuple[int, str]) -> str:
    return f"frame {look[0]}: {look[1]}"
