"""A patch: one image, one instance map, one table.

Shapes: H, W = rows and columns of the patch in pixels. Real and synthetic patches are the same record, so nothing
that reads patches knows or cares where one came from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from counterstain.taxonomy import BACKGROUND


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a patch was cut out of a cohort and how it was turned."""

    region: str
    slide: str
    patient: str
    y_px: int
    """Row of the upper edge in the region."""
    x_px: int
    """Column of the left edge in the region."""
    flipped: bool = False
    """Mirrored left to right, before it is turned."""
    quarter_turns: int = 0
    """Turned counter-clockwise by 90 degrees so many times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """An image with its instances and their subtypes."""

    image: np.ndarray  # (H, W, 3) uint8
    instances: np.ndarray  # (H, W) int32, 0 = background
    subtypes: dict[int, int]
    """Subtype of every instance that the patch shows (255 = to be ignored)."""
    source: Source

    @property
    def label_mask(self) -> np.ndarray:
        """Labels, (H, W) uint8: 0 = background, otherwise the subtype of the instance."""
        return label_mask(self.instances, self.subtypes)

    @property
    def areas_px(self) -> dict[int, int]:
        """Area of every instance in pixels."""
        ids, areas = np.unique(self.instances[self.instances != BACKGROUND], return_counts=True)
        return dict(zip(ids.tolist(), areas.tolist(), strict=True))

    def relabelled(self, subtypes: dict[int, int]) -> Patch:
        """Return the same patch with another table."""
        return replace(self, subtypes=subtypes)


def label_mask(instances: np.ndarray, subtypes: dict[int, int]) -> np.ndarray:
    """Look the subtype of every pixel up.

    Parameters
    ----------
    instances : (H, W) integer array
        0 = background.
    subtypes : dict
        Instance id -> subtype. Every id of ``instances`` must be in it.

    Returns
    -------
    (H, W) uint8 array
    """
    ids = np.fromiter(sorted(subtypes), dtype=instances.dtype, count=len(subtypes))
    values = np.array([BACKGROUND, *(subtypes[i] for i in ids.tolist())], np.uint8)
    if not len(ids):
        return np.zeros(instances.shape, np.uint8)
    position = np.searchsorted(ids, instances)
    return np.where(instances == BACKGROUND, BACKGROUND, values[np.minimum(position + 1, len(ids))]).astype(np.uint8)


def turn(array: np.ndarray, *, flipped: bool, quarter_turns: int) -> np.ndarray:
    """Mirror and turn an (H, W, …) array as :class:`Source` describes; returns a copy."""
    return _copied(_rotated(array[:, ::-1] if flipped else array, quarter_turns))


def turn_back(array: np.ndarray, *, flipped: bool, quarter_turns: int) -> np.ndarray:
    """Undo :func:`turn`."""
    turned = _rotated(array, -quarter_turns)
    return _copied(turned[:, ::-1] if flipped else turned)


def _rotated(array: np.ndarray, quarter_turns: int) -> np.ndarray:
    """Return :func:`numpy.rot90` of the first two axes, without the cost of its checks."""
    quarter = quarter_turns % 4
    turned = array[::-1, ::-1] if quarter >= 2 else array
    return turned.swapaxes(0, 1)[::-1] if quarter % 2 else turned


def _copied(view: np.ndarray) -> np.ndarray:
    """Copy an (H, W, …) view channel by channel: numpy copies turned RGB pixels one by one, six times as slowly."""
    if view.ndim < 3 or view.strides[1] == view.shape[2] * view.itemsize:
        return view.copy(order="C")
    copy = np.empty(view.shape, view.dtype)
    for channel in range(view.shape[2]):
        copy[:, :, channel] = view[:, :, channel]
    return copy
