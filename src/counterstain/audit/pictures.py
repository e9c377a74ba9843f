"""Sheets of patches, each pixel a square of pixels, with names beside the rows and captions above the columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHOWN_PX = 128  # smaller patches are enlarged, by a whole number, to about this
GAP_PX = 4
FONT_PX = 13
LINE_PX = 17
INK, FRAME = (26, 26, 26), (200, 200, 200)


def sheet(rows: Mapping[str, Sequence[np.ndarray]], captions: Sequence[str] = ()) -> Image.Image:
    """Lay rows of patches out below each other.

    Parameters
    ----------
    rows : mapping
        Name -> patches, (H, W, 3) uint8, all of one size; a row of patches for each name.
    captions : sequence of str, optional
        What stands above each column, in lines that are cut off at its width.

    Returns
    -------
    Image
        RGB. Patches are copied pixel by pixel; those below 128 px are enlarged by a whole number.
    """
    font = ImageFont.load_default(FONT_PX)
    height, width = next(iter(rows.values()))[0].shape[:2]
    factor = max(1, round(SHOWN_PX / max(height, width)))
    step_y, step_x = height * factor + GAP_PX, width * factor + GAP_PX
    left = round(max(font.getlength(name) for name in rows)) + 2 * GAP_PX
    top = LINE_PX * max((caption.count("\n") + 1 for caption in captions), default=0) + GAP_PX
    columns = max(len(patches) for patches in rows.values())
    canvas = Image.new("RGB", (left + columns * step_x, top + len(rows) * step_y), "white")
    draw = ImageDraw.Draw(canvas)
    for column, caption in enumerate(captions):
        for number, line in enumerate(caption.split("\n")):
            place = (left + column * step_x, number * LINE_PX + GAP_PX // 2)
            draw.text(place, _cut(line, width * factor, font), fill=INK, font=font)
    for row, (name, patches) in enumerate(rows.items()):
        y = top + row * step_y
        draw.text((GAP_PX, y + (step_y - GAP_PX) // 2), name, fill=INK, font=font, anchor="lm")
        for column, patch in enumerate(patches):
            large = patch.repeat(factor, 0).repeat(factor, 1)
            x = left + column * step_x
            draw.rectangle((x - 1, y - 1, x + step_x - GAP_PX, y + step_y - GAP_PX), outline=FRAME)
            canvas.paste(Image.fromarray(large), (x, y))
    return canvas


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return as much of a text as a width in pixels holds."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
