"""A contact sheet that says, beside the frames of each clip, what they were asked to show and what is seen in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from videopipe.media import check_frames

_GREY = (24, 24, 24)
_WHITE = (235, 235, 235)
_GREEN, _ORANGE = (120, 220, 120), (255, 170, 80)
_FONT_PX, _LINE_PX = 14, 18


@dataclass(frozen=True, kw_only=True, slots=True)
class SheetRow:
    """One clip: frames uint8 [T, H, W, 3], its prompt, a remark below it, and whether the remark is good news."""

    frames: NDArray[np.uint8]
    prompt: str
    remark: str
    good: bool


def prompt_sheet(
    rows: Sequence[SheetRow],
    path: Path,
    *,
    columns: int = 6,
    picture_px: int = 128,
    text_px: int = 330,
    gap_px: int = 6,
) -> Path:
    """Write one PNG: for each row the text on the left, then `columns` frames at even distances, first and last shown.

    Args:
        rows: the clips, all of one size in frames, rows and cols.
        path: the PNG; its folder must exist.
        columns: pictures of each clip.
        picture_px: width of a picture; the height follows.
        text_px: width of the text.
        gap_px: between pictures.
    Returns:
        `path`.
    Raises:
        ValueError: no row, or clips that do not have the size of the first.
    """
    if not rows:
        raise ValueError("rows=[] is empty, need at least 1")
    shape = rows[0].frames.shape
    for row in rows:
        check_frames(row.frames)
        if row.frames.shape != shape:
            raise ValueError(f"a clip has the shape {list(row.frames.shape)}, must be that of the first, {list(shape)}")
    picks = np.unique(np.linspace(0, shape[0] - 1, min(columns, shape[0])).round().astype(int))
    font = ImageFont.load_default(_FONT_PX)
    texts = [
        [(line, colour) for text, colour in _coloured(row) for line in _wrapped(text, font, text_px)] for row in rows
    ]
    picture = (picture_px, round(picture_px * shape[1] / shape[2]))
    heights = [max(picture[1], _LINE_PX * len(lines)) for lines in texts]
    width = gap_px + text_px + (gap_px + picture_px) * len(picks) + gap_px
    sheet = Image.new("RGB", (width, gap_px + sum(height + gap_px for height in heights)), _GREY)
    draw = ImageDraw.Draw(sheet)
    top = gap_px
    for row, lines, height in zip(rows, texts, heights, strict=True):
        for number, (line, colour) in enumerate(lines):
            draw.text((gap_px, top + number * _LINE_PX), line, fill=colour, font=font)
        for column, pick in enumerate(picks):
            left = 2 * gap_px + text_px + column * (picture_px + gap_px)
            sheet.paste(Image.fromarray(row.frames[pick]).resize(picture, Image.Resampling.NEAREST), (left, top))
        top += height + gap_px
    part = path.with_name(f".{path.name}.part")
    sheet.save(part, format="PNG")
    part.rename(path)
    return path


def _coloured(row: SheetRow) -> list[tuple[str, tuple[int, int, int]]]:
    return [(row.prompt, _WHITE), (row.remark, _GREEN if row.good else _ORANGE)]


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> list[str]:
    """Lines of whole words that are at most `width_px` wide where no single word is wider."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width_px:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
