"""Where a thumbnail shows tissue: stain is colourful, glass is not.

Shapes: H, W = rows and columns of the thumbnail in pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field
from scipy import ndimage
from shapely import MultiPolygon, Polygon

from counterstain.config import Config
from counterstain.io.regions import Box
from counterstain.io.slides import Thumbnail
from counterstain.taxonomy import BACKGROUND, IGNORE, Taxonomy

_BINS = 256


class TissueConfig(Config):
    """How tissue is told from glass."""

    min_saturation: Annotated[float, Field(ge=0, le=1)] = 0.04
    """Never take pixels below this for tissue (0..1), so that a blank slide has none."""
    max_saturation: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Always take pixels above this for tissue, so that a strong stain does not hide pale tissue."""
    min_brightness: Annotated[int, Field(ge=0, le=255)] = 30
    """Darker pixels are a border or a felt pen, not tissue."""
    closing_px: Annotated[int, Field(ge=0)] = 3
    """Gaps up to about this width between tissue are closed."""
    min_area_share: Annotated[float, Field(ge=0, le=1)] = 2e-4
    """Specks smaller than this share of the thumbnail are dust."""


def tissue_mask(image: np.ndarray, config: TissueConfig | None = None) -> np.ndarray:
    """Find tissue by saturation.

    The threshold is Otsu's (1979) between the two bounds of the configuration.

    Parameters
    ----------
    image : (H, W, 3) uint8 array
    config : TissueConfig, optional

    Returns
    -------
    (H, W) bool array
    """
    config = config or TissueConfig()
    values = ndimage.median_filter(saturation(image), size=3)
    threshold = float(np.clip(otsu(values), config.min_saturation, config.max_saturation))
    mask = (values > threshold) & (image.max(axis=-1) >= config.min_brightness)
    if config.closing_px:
        mask = _closed(mask, config.closing_px)
    return _without_specks(mask, config.min_area_share * mask.size)


def saturation(image: np.ndarray) -> np.ndarray:
    """Return the saturation of (H, W, 3) uint8 pixels as HSV defines it, (H, W) float32 in 0..1."""
    high, low = image.max(axis=-1).astype(np.float32), image.min(axis=-1).astype(np.float32)
    return np.asarray((high - low) / np.maximum(high, 1), np.float32)


def otsu(values: np.ndarray) -> float:
    """Return the threshold in 0..1 that parts values best into two classes (Otsu 1979)."""
    counts, edges = np.histogram(values, bins=_BINS, range=(0, 1))
    centres = (edges[:-1] + edges[1:]) / 2
    below, below_sum = np.cumsum(counts), np.cumsum(counts * centres)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (below_sum / below - (below_sum[-1] - below_sum) / above) ** 2
    return float(edges[1 + int(np.nan_to_num(between).argmax())])


def _closed(mask: np.ndarray, radius: int) -> np.ndarray:
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    padded = np.pad(mask, radius, mode="edge")  # else tissue at the border is eaten away
    closed = ndimage.binary_closing(padded, structure=x**2 + y**2 <= radius**2)
    return np.asarray(closed[radius:-radius, radius:-radius])


def _without_specks(mask: np.ndarray, min_area_px: float) -> np.ndarray:
    parts, _ = ndimage.label(mask)
    areas = np.bincount(parts.ravel())
    keep = areas >= min_area_px
    keep[0] = False
    return np.asarray(keep[parts])


# An overview picture of a slide: thumbnail, regions, and instances in the colours of their subtypes.
#
# Shapes: H, W = rows and columns of the thumbnail in pixels.

OPACITY = 110  # of 255
MARGIN_PX = 12
LINE_PX = 22
FONT_PX = 15
_INK = (20, 20, 20)

Instances = Sequence[tuple[int, Polygon | MultiPolygon]]


def draw_overview(
    title: str, thumbnail: Thumbnail, boxes: Sequence[Box], instances: Instances, taxonomy: Taxonomy
) -> Image.Image:
    """Draw instances, largest first, and regions on a thumbnail, with a legend beside it.

    Parameters
    ----------
    title : str
    thumbnail : Thumbnail
    boxes : sequence of Box
    instances : sequence of (label, polygon)
        A subtype's id, 0 = background or 255 = ignore; polygons in level-0 pixels.
    taxonomy : Taxonomy
    """
    picture = _painted(thumbnail, instances, taxonomy)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(FONT_PX)
    for box in boxes:
        (x0, y0), (x1, y1) = _on(thumbnail, [(box.x, box.y), (box.x + box.width, box.y + box.height)])
        draw.rectangle((x0, y0, x1, y1), outline=_INK, width=2)
        draw.text((x0 + 4, y0 + 3), box.name, fill=_INK, font=font, stroke_width=2, stroke_fill="white")
    counts = Counter(label for label, _ in instances)
    return _with_legend(picture, title, f"{len(boxes)} regions", counts, taxonomy)


def _painted(thumbnail: Thumbnail, instances: Instances, taxonomy: Taxonomy) -> Image.Image:
    base = Image.fromarray(thumbnail.image).convert("RGBA")
    layer = Image.new("RGBA", base.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    for label, polygon in sorted(instances, key=lambda instance: -instance[1].area):
        red, green, blue = _colour(label, taxonomy)
        for part in getattr(polygon, "geoms", [polygon]):
            outline = _on(thumbnail, part.exterior.coords)
            if len(outline) > 1:
                draw.polygon(outline, fill=(red, green, blue, OPACITY), outline=(red, green, blue, 255))
            for hole in part.interiors:
                draw.polygon(_on(thumbnail, hole.coords), fill=(0, 0, 0, 0), outline=(red, green, blue, 255))
    return Image.alpha_composite(base, layer).convert("RGB")


def _on(thumbnail: Thumbnail, points: object) -> list[tuple[float, float]]:
    xy = (np.asarray(points, float)[:, :2] - (thumbnail.x_level0_px, thumbnail.y_level0_px)) / thumbnail.downsample
    return [(float(x), float(y)) for x, y in xy]


def _colour(label: int, taxonomy: Taxonomy) -> tuple[int, int, int]:
    red, green, blue = (110, 110, 110) if label in {BACKGROUND, IGNORE} else taxonomy.palette[label].tolist()
    return red, green, blue


def _with_legend(
    picture: Image.Image, title: str, subtitle: str, counts: Mapping[int, int], taxonomy: Taxonomy
) -> Image.Image:
    font = ImageFont.load_default(FONT_PX)
    labels = [*(subtype.id for subtype in taxonomy.subtypes), BACKGROUND, IGNORE]
    entries = [(label, f"{taxonomy.name_of(label)}: {counts[label]:,}") for label in labels if counts.get(label)]
    lines = [title, subtitle, *(text for _, text in entries)]
    width = MARGIN_PX * 2 + LINE_PX + int(max(font.getlength(line) for line in lines))
    height = max(picture.height, MARGIN_PX * 2 + LINE_PX * len(lines))
    canvas = Image.new("RGB", (picture.width + width, height), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    left = picture.width + MARGIN_PX
    for number, text in enumerate((title, subtitle)):
        draw.text((left, MARGIN_PX + number * LINE_PX), text, fill=_INK, font=font)
    for number, (label, text) in enumerate(entries, start=2):
        top = MARGIN_PX + number * LINE_PX
        draw.rectangle((left, top + 2, left + 13, top + 15), fill=_colour(label, taxonomy))
        draw.text((left + LINE_PX, top), text, fill=_INK, font=font)
    return canvas
