"""Pictures of tissue to look at: outlines of instances in the colours of their subtypes, regions made small.

Shapes: H, W = rows and columns in pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from counterstain.data.cohort import Cohort
from counterstain.data.patches import Patch, Source, turn
from counterstain.taxonomy import IGNORE

TILE_PX = 1024  # of a region that is read at once
NICE = Image.Resampling.LANCZOS


def borders(instances: np.ndarray, width_px: int = 1) -> np.ndarray:
    """Return the pixels, (H, W) bool, of instances, (H, W) integer, that lie within ``width_px`` of another one."""
    found = np.zeros(instances.shape, bool)
    found[1:] |= instances[1:] != instances[:-1]
    found[:-1] |= instances[1:] != instances[:-1]
    found[:, 1:] |= instances[:, 1:] != instances[:, :-1]
    found[:, :-1] |= instances[:, 1:] != instances[:, :-1]
    if width_px > 1:
        found = ndimage.binary_dilation(found, np.ones((3, 3), bool), iterations=width_px - 1)
    return np.asarray(found & (instances != 0))


def outlined(patch: Patch, *, width_px: int = 1, marked: Collection[int] = (), numbered: bool = False) -> np.ndarray:
    """Return the image of a patch, (H, W, 3) uint8, with its instances outlined in their subtypes' colours.

    The outlines of ``marked`` instances are twice as wide, in black and white. ``numbered`` writes the number of each
    instance into it.
    """
    assert patch.taxonomy is not None
    image, labels = patch.image.copy(), patch.label_mask
    line = borders(patch.instances, width_px)
    image[line] = patch.taxonomy.palette[labels[line]]
    chosen = np.where(np.isin(patch.instances, list(marked)), patch.instances, 0)
    image[borders(chosen, 2 * width_px)] = 0
    image[borders(chosen, width_px)] = 255
    return _with_numbers(image, patch) if numbered else image


def _with_numbers(image: np.ndarray, patch: Patch) -> np.ndarray:
    """Write the number of each instance where it is widest."""
    picture = Image.fromarray(image)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(max(10, len(image) // 24))
    for instance in (instance for instance, subtype in patch.subtypes.items() if subtype != IGNORE):
        inside = np.pad(patch.instances == instance, 1)
        y, x = np.unravel_index(ndimage.distance_transform_edt(inside).argmax(), inside.shape)
        pen.text((int(x), int(y)), str(instance), "black", font, anchor="mm", stroke_width=3, stroke_fill="white")
    return np.array(picture)


def enlarged(patch: Patch, factor: int) -> Patch:
    """Return a patch some times as large, so that thin outlines can be drawn on it."""
    height, width = patch.instances.shape
    instances = patch.instances.repeat(factor, 0).repeat(factor, 1)
    return replace(patch, image=resized(patch.image, (width * factor, height * factor)), instances=instances)


def cut_again(cohort: Cohort, source: Source, size_px: int) -> Patch:
    """Cut a patch out of a cohort again, and turn it as it was turned."""
    position = int(np.flatnonzero(cohort.regions["region"] == source.region)[0])
    patch = cohort.patch(position, source.y_px, source.x_px, size_px)
    image, instances = (
        turn(array, flipped=source.flipped, quarter_turns=source.quarter_turns)
        for array in (patch.image, patch.instances)
    )
    return replace(patch, image=image, instances=instances, source=source)


def outlined_region(cohort: Cohort, position: int, longest_px: int) -> np.ndarray:
    """Return a region made small with its subtypes outlined in their colours, (H, W, 3) uint8.

    It is read tile by tile, so that memory does not grow with the region.
    """
    row = cohort.regions.iloc[position]
    height, width = int(row["height_px"]), int(row["width_px"])
    scale = min(1.0, longest_px / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    image, labels = np.full((*size, 3), 255, np.uint8), np.zeros(size, np.uint8)
    for top, left in itertools.product(range(0, height, TILE_PX), range(0, width, TILE_PX)):
        patch = cohort.cut(position, top, left, min(TILE_PX, height - top), min(TILE_PX, width - left))
        rows, columns = patch.instances.shape
        y0, y1, x0, x1 = (round(edge * scale) for edge in (top, top + rows, left, left + columns))
        if y1 > y0 and x1 > x0:
            image[y0:y1, x0:x1] = resized(patch.image, (x1 - x0, y1 - y0), Image.Resampling.BOX)
            labels[y0:y1, x0:x1] = resized(patch.label_mask, (x1 - x0, y1 - y0), Image.Resampling.NEAREST)
    line = borders(labels)
    image[line] = cohort.taxonomy.palette[labels[line]]
    return image


def resized(array: np.ndarray, size: tuple[int, int], how: Image.Resampling = NICE) -> np.ndarray:
    """Return an image, (H, W) or (H, W, 3) uint8, at another size (width, height)."""
    return np.asarray(Image.fromarray(array).resize(size, how))
