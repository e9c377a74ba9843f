"""Instances in an image: connected components of a label image, with their areas and boxes.

Shapes: H, W = rows and columns in pixels. Pixels are connected to all eight neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from counterstain.errors import InputError
from counterstain.taxonomy import BACKGROUND, IGNORE

_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """The instances of one label image."""

    instances: np.ndarray  # (H, W) int32, 0 = background, ids 1, 2, 3, …
    labels: dict[int, int]
    """Label of every instance."""
    dropped: int
    """Components below the smallest area, now background."""
    dropped_px: int


def components(label_image: np.ndarray, min_area_px: int = 0) -> Components:
    """Find the connected components of every label.

    Parameters
    ----------
    label_image : (H, W) uint8 array
        0 = background, 255 = ignore.
    min_area_px : int
        Smaller components become background, except those to be ignored.

    Returns
    -------
    Components
        Numbered by label, then from top to bottom.
    """
    instances = np.zeros(label_image.shape, np.int32)
    labels: dict[int, int] = {}
    dropped = dropped_px = 0
    present = np.bincount(label_image.ravel(), minlength=256).nonzero()[0].tolist()
    for label in (value for value in present if value != BACKGROUND):
        found, _ = ndimage.label(label_image == label, structure=_EIGHT_NEIGHBOURS)
        areas = np.bincount(found.ravel())
        keep = (areas >= min_area_px) | (label == IGNORE)
        keep[0] = False
        numbers = np.where(keep, len(labels) + np.cumsum(keep), BACKGROUND).astype(np.int32)
        specks = areas[1:][~keep[1:]]
        dropped, dropped_px = dropped + len(specks), dropped_px + int(specks.sum())
        instances += numbers[found]
        labels |= dict.fromkeys(numbers[keep].tolist(), label)
    return Components(instances=instances, labels=labels, dropped=dropped, dropped_px=dropped_px)


def instance_boxes(instances: np.ndarray) -> Iterator[tuple[int, int, tuple[int, int, int, int]]]:
    """Yield id, area in pixels and box (y0, x0, y1, x1; ends excluded) of every instance of an (H, W) map.

    Raises
    ------
    InputError
        An id is negative.
    """
    if instances.min(initial=0) < 0:
        raise InputError(f"instance id {instances.min()}: ids are 1, 2, 3, … and 0 is background")
    if instances.max(initial=0) > instances.size:  # ids with gaps wider than the image
        ids, compact = np.unique(np.append(BACKGROUND, instances), return_inverse=True)
        compact = compact[1:].reshape(instances.shape)
    else:
        ids, compact = np.arange(instances.max(initial=0) + 1), instances
    areas = np.bincount(compact.ravel(), minlength=len(ids)).tolist()
    for number, box in enumerate(ndimage.find_objects(compact), start=1):
        if box is not None:
            rows, columns = box
            yield int(ids[number]), areas[number], (rows.start, columns.start, rows.stop, columns.stop)
