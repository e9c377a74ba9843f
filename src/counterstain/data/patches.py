"""Patches: one image, one map of instances, one table with the subtype of each instance.

Real and synthetic patches are the same record. Shapes: H, W = rows and columns of a patch or a label image in pixels.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from counterstain.errors import InputError
from counterstain.taxonomy import BACKGROUND, IGNORE, Taxonomy, colours, palette_of

Box = tuple[int, int, int, int]  # y0, x0, y1, x1; ends excluded
BAND_PX = 512  # rows of a map that are counted at once
LARGEST_TABLE = 2**16  # ids up to this are looked up, or counted, in a table of all ids
FEW_COLOURS = 8  # an image that has no more is no tissue
GAP_PX = 4  # between image and mask in a notebook


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Source:
    """Where a patch was cut out of a cohort and how it was turned.

    Examples
    --------
    >>> Source(region="r1", slide="s1", patient="p1", y_px=8, x_px=12, quarter_turns=1)
    Source(region r1 of slide s1, patient p1, at y=8, x=12, turned by 90 degrees)
    """

    region: str
    slide: str
    patient: str
    y_px: int  # row of the upper edge in the region
    x_px: int  # column of the left edge in the region
    flipped: bool = False  # mirrored left to right, before it is turned
    quarter_turns: int = 0  # counter-clockwise, by 90 degrees each

    def __repr__(self) -> str:
        turned = f", turned by {90 * self.quarter_turns} degrees" if self.quarter_turns else ""
        where = f"region {self.region} of slide {self.slide}, patient {self.patient}, at y={self.y_px}, x={self.x_px}"
        return f"Source({where}{', mirrored' if self.flipped else ''}{turned})"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class Patch:
    """An image with its instances and their subtypes; a notebook shows it as image and label mask.

    Examples
    --------
    >>> patch = Cohort.open("cohort").patch(0, y_px=0, x_px=0, size_px=48)
    >>> patch
    Patch(48 x 48 px of region p0-0: 2 HER2 1+, 1 HER2 3+, 1 LCIS/DCIS)
    >>> patch.relabelled({"HER2 1+": "HER2 0", 2: "HER2 2+"})
    Patch(48 x 48 px of region p0-0: 2 HER2 0, 1 HER2 2+, 1 LCIS/DCIS)
    """

    image: np.ndarray  # (H, W, 3) uint8
    instances: np.ndarray  # (H, W) int32, 0 = background
    subtypes: dict[int, int]  # subtype of every instance that the patch shows (255 = to be ignored)
    source: Source
    taxonomy: Taxonomy | None = None  # names and colours of the subtypes

    @property
    def label_mask(self) -> np.ndarray:
        """Labels, (H, W) uint8: 0 = background, otherwise the subtype of the instance."""
        return label_mask(self.instances, self.subtypes)

    @property
    def areas_px(self) -> dict[int, int]:
        """Area of every instance in pixels."""
        ids, areas = areas_of(self.instances)
        return dict(zip(ids.tolist(), areas.tolist(), strict=True))

    def relabelled(self, changes: Mapping[Any, int | str]) -> Patch:
        """Return the same patch with other subtypes.

        ``changes`` maps instances (ids) or subtypes (names, meaning all their instances) to new subtypes (ids or
        names). Raises InputError where the patch does not show such an instance, or there is no such subtype.
        """
        shown = sorted(self.subtypes)
        unknown = [i for i in changes if not isinstance(i, str) and i not in self.subtypes]
        if unknown:
            raise InputError(f"unknown instances {unknown}; {self.source.region} shows {shown} here")
        new = dict(self.subtypes)
        for key, subtype in changes.items():
            old = self._subtype(key) if isinstance(key, str) else None
            instances = [key] if old is None else [i for i in shown if self.subtypes[i] == old]
            new |= dict.fromkeys(instances, self._subtype(subtype))
        return replace(self, subtypes=new)

    def _subtype(self, subtype: int | str) -> int:
        if self.taxonomy is not None:
            return self.taxonomy.id_of(subtype)
        if not isinstance(subtype, str) and BACKGROUND < subtype <= IGNORE:
            return subtype
        raise InputError(f"unknown subtype {subtype!r}; this patch has no taxonomy, give ids (1..254, 255 = ignore)")

    def __repr__(self) -> str:
        name = str if self.taxonomy is None else self.taxonomy.name_of
        found, counts = np.unique(list(self.subtypes.values()), return_counts=True)
        shown = ", ".join(f"{n} {name(int(subtype))}" for subtype, n in zip(found, counts, strict=True))
        height, width = self.instances.shape
        return f"Patch({height} x {width} px of region {self.source.region}: {shown or 'background'})"

    def _repr_png_(self) -> bytes:
        labels = self.label_mask
        known = max((s for s in self.subtypes.values() if s != IGNORE), default=BACKGROUND)
        palette = palette_of(colours(known)) if self.taxonomy is None else self.taxonomy.palette
        gap = np.full((len(labels), GAP_PX, 3), 255, np.uint8)
        file = io.BytesIO()
        Image.fromarray(np.concatenate([self.image, gap, palette[labels]], axis=1)).save(file, "PNG")
        return file.getvalue()


def label_mask(instances: np.ndarray, subtypes: Mapping[int, int]) -> np.ndarray:
    """Look up the subtype of every pixel of an (H, W) map of instances, all of which the table must hold; uint8."""
    if (highest := max(subtypes, default=BACKGROUND)) < LARGEST_TABLE:  # twelve times as fast as a search
        table = np.zeros(highest + 1, np.uint8)
        table[list(subtypes)] = list(subtypes.values())
        return table.take(instances)
    ids = np.array([BACKGROUND, *sorted(subtypes)], instances.dtype)
    values = np.array([BACKGROUND, *(subtypes[i] for i in ids[1:].tolist())], np.uint8)
    return values[np.minimum(np.searchsorted(ids, instances), len(subtypes))]


def turn(array: np.ndarray, *, flipped: bool, quarter_turns: int) -> np.ndarray:
    """Mirror and turn an (H, W, …) array as :class:`Source` describes; returns a copy."""
    return _copied(np.rot90(array[:, ::-1] if flipped else array, quarter_turns))


def turn_back(array: np.ndarray, *, flipped: bool, quarter_turns: int) -> np.ndarray:
    """Undo :func:`turn`."""
    turned = np.rot90(array, -quarter_turns)
    return _copied(turned[:, ::-1] if flipped else turned)


def _copied(view: np.ndarray) -> np.ndarray:
    """Copy an (H, W, …) view channel by channel: numpy copies turned RGB pixels one by one, six times as slowly."""
    if view.ndim < 3 or view.strides[1] == view.shape[2] * view.itemsize:
        return view.copy(order="C")
    copy = np.empty(view.shape, view.dtype)
    for channel in range(view.shape[2]):
        copy[:, :, channel] = view[:, :, channel]
    return copy


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """The instances of one label image."""

    instances: np.ndarray  # (H, W) int32, 0 = background, ids 1, 2, 3, …
    labels: dict[int, int]  # label of every instance
    dropped: int  # components below the smallest area, now background
    dropped_px: int


def components(label_image: np.ndarray, min_area_px: int = 0) -> Components:
    """Find the components of every label of an (H, W) uint8 image, numbered by label, then from top to bottom.

    Pixels that touch at a corner are connected. Components smaller than ``min_area_px`` become background, except those
    to be ignored (255).
    """
    instances = np.zeros(label_image.shape, np.int32)
    labels: dict[int, int] = {}
    dropped = dropped_px = 0
    present = np.bincount(label_image.ravel(), minlength=256).nonzero()[0].tolist()
    for label in (value for value in present if value != BACKGROUND):
        found, _ = ndimage.label(label_image == label, structure=np.ones((3, 3), bool))
        areas = np.bincount(found.ravel())
        keep = (areas >= min_area_px) | (label == IGNORE)
        keep[0] = False
        numbers = np.where(keep, len(labels) + np.cumsum(keep), BACKGROUND).astype(np.int32)
        specks = areas[1:][~keep[1:]]
        dropped, dropped_px = dropped + len(specks), dropped_px + int(specks.sum())
        instances += numbers[found]
        labels |= dict.fromkeys(numbers[keep].tolist(), label)
    return Components(instances=instances, labels=labels, dropped=dropped, dropped_px=dropped_px)


def areas_of(instances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids in an (H, W) map, sorted, without the background, and their areas in pixels.

    Raises ValueError for a negative id.
    """
    bands = [_runs(instances[y : y + BAND_PX]) for y in range(0, len(instances) or 1, BAND_PX)]
    found, lengths = (np.concatenate(runs).astype(np.int64) for runs in zip(*bands, strict=True))
    if (highest := found.max(initial=0)) < LARGEST_TABLE:  # counting is three times as fast as sorting
        counts = np.bincount(found, lengths, highest + 1)
        ids = counts.nonzero()[0]
        areas = counts[ids].astype(np.int64)
    else:
        ids, places = np.unique(found, return_inverse=True)
        areas = np.bincount(places, lengths).astype(np.int64)
    inside = ids != BACKGROUND
    return ids[inside], areas[inside]


def _runs(instances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of the runs of equal pixels in a map, read row by row, and their lengths: few, in tissue."""
    pixels = instances.ravel()
    starts = np.flatnonzero(np.concatenate([[True], pixels[1:] != pixels[:-1]])[: pixels.size])
    return pixels[starts], np.diff(starts, append=pixels.size)


def shows(instances: np.ndarray, known: np.ndarray) -> bool:
    """Say whether an (H, W) map shows just the ``known`` instances, (n, 2) ids and areas in pixels."""
    if instances.min(initial=0) < 0:
        return False
    return np.array_equal(np.stack(areas_of(instances), axis=1), known[np.argsort(known[:, 0])])


def shown_of(instances: np.ndarray, known: np.ndarray, y_px: int, x_px: int) -> list[int] | None:
    """Return the ids in a window of a map; None where it shows what the ``known`` instances of the map rule out.

    ``known`` has a row of id, area and box each, (n, 6). No pixel of an instance lies outside its box, none is more
    than its area, and of one whose box is inside the window none is missing.
    """
    known = known[np.argsort(known[:, 0])]
    start, end = np.array([y_px, x_px]), np.array([y_px, x_px]) + instances.shape
    inside = (np.minimum(known[:, 4:], end) - np.maximum(known[:, 2:4], start)).clip(0).prod(axis=1)
    whole = np.all((known[:, 2:4] >= start) & (known[:, 4:] <= end), axis=1)
    try:
        ids, areas = areas_of(instances)
    except ValueError:  # a negative id
        return None
    found = np.zeros(len(known), np.int64)
    places = np.searchsorted(known[:, 0], ids)
    if len(ids) and (not len(known) or not np.array_equal(known[places.clip(0, len(known) - 1), 0], ids)):
        return None
    found[places] = areas
    fits = np.where(whole, found == known[:, 1], found <= np.minimum(known[:, 1], inside))
    return ids.tolist() if fits.all() else None


def instance_boxes(bands: Iterable[np.ndarray]) -> Iterator[tuple[int, int, Box]]:
    """Yield id, area in pixels and box of every instance of a map, which comes in bands, (rows, W) integer each.

    Raises InputError for a negative id.
    """
    found: dict[int, tuple[int, Box]] = {}
    top = 0
    for part in bands:
        band = part
        if band.min(initial=0) < 0:
            raise InputError(f"instance id {band.min()}: ids are 1, 2, 3, … and 0 is background")
        ids, areas = areas_of(band)
        if band.max(initial=0) > band.size:  # ids with gaps wider than the band
            band = np.where(band == BACKGROUND, BACKGROUND, np.searchsorted(ids, band) + 1)
        boxes = [box for box in ndimage.find_objects(band) if box is not None]
        for (rows, columns), instance, area in zip(boxes, ids.tolist(), areas.tolist(), strict=True):
            y0, x0, y1, x1 = rows.start + top, columns.start, rows.stop + top, columns.stop
            above, (y0, left, _, right) = found.get(instance, (0, (y0, x0, y1, x1)))
            found[instance] = above + area, (y0, min(left, x0), y1, max(right, x1))
        top += len(band)
    for instance in sorted(found):
        yield instance, *found[instance]


def image_key(image: np.ndarray) -> str | None:
    """Return a hash of an image, (H, W, 3) uint8, as :class:`ImageKey` does."""
    key = ImageKey(*image.shape[:2])
    key.add(image)
    return key.value


class ImageKey:
    """A hash of an image, H x W px, by which it is known under any name; the image is added in bands, from the top."""

    def __init__(self, height_px: int, width_px: int) -> None:
        self._digest = hashlib.blake2b(digest_size=8, person=f"{height_px}x{width_px}".encode())
        self._colours: list[np.ndarray] = []  # until they are more than a few

    def add(self, band: np.ndarray) -> None:
        """Add the next rows, (h, W, 3) uint8."""
        self._digest.update(np.ascontiguousarray(band).data)
        pixels = band.reshape(-1, 3)
        for others in (pixels[:: 1 + len(pixels) // 1024], pixels):
            for colour in self._colours if len(self._colours) <= FEW_COLOURS else ():
                others = others[(others != colour).any(axis=-1)]  # noqa: PLW2901
            while len(others) and len(self._colours) <= FEW_COLOURS:
                self._colours.append(others[0].copy())
                others = others[(others != others[0]).any(axis=-1)]  # noqa: PLW2901

    @property
    def value(self) -> str | None:
        """The hash; None of an image of a few colours, which is no tissue: glass, or a drawing."""
        return self._digest.hexdigest() if len(self._colours) > FEW_COLOURS else None
