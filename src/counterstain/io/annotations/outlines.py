"""Outlines of any annotation format as labelled, valid polygons in level-0 pixels.

Shapes: n = points of an outline.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
import shapely
from shapely import MultiPolygon, Polygon
from shapely.errors import GEOSException

from counterstain.errors import InputError
from counterstain.io.annotations.safe_parsing import OddObjectError, shown

Area = Polygon | MultiPolygon
Rings = Sequence[np.ndarray]  # (n, 2) float each: the outline, then its holes

UNCLASSIFIED = "Unclassified"
MAX_POINTS = 5_000_000
MAX_TANGLES = 1_000_000  # of all outlines of a file together
NO_AREA = "outline without area"
ODD = "object that cannot be read"
SHOWN_ODD, MAX_ODD = 3, 100_000  # of a file
MAX_REPAIR_POINTS = 200_000  # about ten seconds
MAX_TANGLE = 50_000  # that many take make_valid a second or two, and it grows with the square
PAIRS_PER_SEGMENT = 20  # pairs of segments whose boxes meet, of an outline that crosses itself here and there
PAIRS_AT_ONCE = 10_000_000  # at most, 16 bytes each
FLATNESS_PX = 0.1  # a curve and the line that is drawn for it lie so close together
MAX_STEPS = 1000  # between two points of a curve


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """One outlined instance, or the rectangle of a region."""

    id: str  # unique in its file and the same every time the file is read
    label: str  # as the source names it; LABELS.yaml says which subtype that is
    polygon: Area  # valid, with an area, in level-0 pixels: pixel (column 0, row 0) covers x 0..1 and y 0..1
    slide: str | None = None
    """File name of the slide as the source gives it, without folders; None where the format has none."""


@dataclass(frozen=True, kw_only=True)
class AnnotationFile:
    """The annotations of one file, and counts of what was skipped."""

    path: Path
    annotations: tuple[Annotation, ...]
    skipped: Counter[str] = field(default_factory=Counter)
    """Reason -> objects that cannot become an instance: points, lines, deleted rows, outlines without area."""
    odd: tuple[str, ...] = ()
    """What is wrong with the first of the objects that could not be read, and where; all are counted as skipped."""
    repaired: int = 0  # polygons that crossed themselves and were made valid
    splines: int = 0  # outlines that the source draws as curves through their points
    sizes: Mapping[str | None, tuple[int, int]] = field(default_factory=dict)
    """Rows and columns of the images, as :attr:`Annotation.slide` names them, where the file says so."""
    image: str | None = None  # path of the one image, where the file says it
    colours: Mapping[str, str] = field(default_factory=dict)  # label -> #rrggbb, where the source says it

    @property
    def slides(self) -> tuple[str, ...]:
        """Names of the slides that the source gives, in order of appearance; empty where the format has none."""
        return tuple(dict.fromkeys(a.slide for a in self.annotations if a.slide is not None))

    @property
    def of_other_types(self) -> bool:
        """Whether objects of QuPath were left out that ``objects`` would import."""
        return any("--objects" in reason for reason in self.skipped)

    @property
    def labels(self) -> Counter[str]:
        """Label -> annotations that carry it."""
        return Counter(a.label for a in self.annotations)

    def of_slide(self, slide: str | None) -> tuple[Annotation, ...]:
        """Return the annotations of one slide; None gives those without a slide's name."""
        return tuple(a for a in self.annotations if a.slide == slide)


def polygonal(geometry: shapely.Geometry) -> Area | None:
    """Return the parts of a geometry that have an area, or None."""
    parts = shapely.get_parts(shapely.get_parts(geometry))  # twice: a collection may hold a MultiPolygon
    polygons = [part for part in parts if isinstance(part, Polygon) and part.area > 0]
    if not polygons:
        return None
    return polygons[0] if len(polygons) == 1 else MultiPolygon(polygons)


def ellipse(points: np.ndarray) -> np.ndarray:
    """Return the ellipse that fills the box of some (n, 2) points as an outline of 180 points, (180, 2) float."""
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    angle = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    return np.stack([(x0 + x1 + (x1 - x0) * np.cos(angle)) / 2, (y0 + y1 + (y1 - y0) * np.sin(angle)) / 2], axis=1)


def rectangle(points: np.ndarray) -> np.ndarray:
    """Return the corners of the box of some (n, 2) points, (4, 2) float."""
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], float)


def corners_in_order(points: np.ndarray) -> np.ndarray:
    """Return the four corners of a rectangle, (4 or 5, 2) float, in order around it where its outline crosses itself.

    Programs list them row by row; other outlines are returned as they are.
    """
    if len(points) not in {4, 5} or Polygon(points).is_valid:
        return points
    y, x = (points - points.mean(axis=0)).T[::-1]
    return points[np.argsort(np.arctan2(y, x))]


def spline(points: np.ndarray) -> np.ndarray:
    """Return the curve that ASAP draws through some (n, 2) points as a polyline that ends at the first, (m, 2) float.

    A centripetal Catmull-Rom spline: each piece is the cubic Bezier curve between two points whose inner control points
    follow from the neighbours and the square roots of the distances. As in ASAP, a piece beside the last point takes
    the mirror image of its other end for the neighbour beyond that point, so that the curve may have a corner there.
    """
    kept = points[np.append(True, np.any(points[1:] != points[:-1], axis=1))[: len(points)]]
    if len(kept) > 1 and np.array_equal(kept[0], kept[-1]):
        kept = kept[:-1]
    if len(kept) < 3:
        return np.asarray(kept)
    start, end = kept, np.roll(kept, -1, axis=0)
    before, after = np.roll(kept, 1, axis=0), np.roll(kept, -2, axis=0)
    after[-2], before[-1] = 2 * end[-2] - start[-2], 2 * start[-1] - end[-1]
    first, second = _control(before, start, end), _control(after, end, start)

    # A line of n pieces lies within max |second derivative| / (8 n^2) of its curve.
    bend = np.maximum(*(np.hypot(*(a - 2 * b + c).T) for a, b, c in ((start, first, second), (first, second, end))))
    steps = np.clip(np.ceil(np.sqrt(6 * bend / (8 * FLATNESS_PX))), 1, MAX_STEPS).astype(int)
    piece = np.repeat(np.arange(len(kept)), steps)
    t = (np.arange(len(piece)) - np.repeat(np.cumsum(steps) - steps, steps))[:, None] / steps[piece, None]
    weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
    curve = sum(w * p[piece] for w, p in zip(weights, (start, first, second, end), strict=True))
    return np.concatenate([np.asarray(curve), kept[:1]])


def _control(neighbour: np.ndarray, point: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the control point beside ``point`` of pieces that end at ``other`` (Yuksel et al. 2011)."""
    d1, d2 = (np.hypot(*(a - b).T)[:, None] for a, b in ((point, neighbour), (other, point)))
    r1, r2 = np.sqrt(d1), np.sqrt(d2)
    return np.asarray((d1 * other - d2 * neighbour + (2 * d1 + 3 * r1 * r2 + d2) * point) / (3 * r1 * (r1 + r2)))


class Collector:
    """Gathers the annotations of one file, counts what is skipped and keeps ids unique."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._annotations: list[Annotation] = []
        self._skipped: Counter[str] = Counter()
        self._numbers: dict[str, int] = {}
        self._odd: list[str] = []
        self.colours: dict[str, str] = {}
        self._slides: dict[str | None, object] = {}
        self.sizes: dict[str | None, tuple[int, int]] = {}
        self.image: str | None = None
        self._repaired = self._tangle = self._points = self._splines = 0

    def skip(self, reason: str) -> None:
        """Count an object that cannot become an instance."""
        self._skipped[reason] += 1

    @property
    def skips(self) -> int:
        """How many objects were skipped so far."""
        return self._skipped.total()

    def odd(self, error: OddObjectError) -> None:
        """Count an object that cannot be read and keep the message; :meth:`finish` refuses a file of many."""
        self.skip(ODD)
        if len(self._odd) < SHOWN_ODD:
            self._odd.append(str(error))
        if self._skipped[ODD] > MAX_ODD:
            self._refuse()

    def count_points(self, points: int) -> None:
        """Count points before anything is built of them; too many for one file are an InputError."""
        self._points += points
        if self._points > MAX_POINTS:
            raise InputError(
                f"{self.path}: more than {MAX_POINTS:,} points; export tissue annotations alone (without cells and "
                "detections), or simplify them"
            )

    def polygon(self, parts: Sequence[Rings], where: str) -> Area | None:
        """Make one valid polygon of outlines with their holes; without an area it is skipped and None is returned.

        Several parts become a MultiPolygon; they may overlap. Rings need not be closed. Outlines that cross themselves
        are repaired, unless they do so all over (an InputError); the method ``structure`` keeps the inside of a loop
        that an outline draws over itself. ``where`` is the file and the place in it, for messages.
        """
        polygons = [
            Polygon(rings[0], [hole for hole in rings[1:] if _has_corners(hole)])
            for rings in parts
            if _has_corners(rings[0])
        ]
        drawn = polygons[0] if len(polygons) == 1 else MultiPolygon(polygons)
        if not drawn.is_valid:
            mended = self._mended(drawn, where)
            self._repaired += mended is not None
        else:
            mended = drawn if drawn.area > 0 else None
        if mended is None:
            self.skip(NO_AREA)
        return mended

    def curve(self, points: np.ndarray) -> np.ndarray:
        """Return the curve of :func:`spline`, counted."""
        drawn = spline(points)
        self.count_points(max(0, len(drawn) - len(points)))
        self._splines += len(drawn) > 2
        return drawn

    def _mended(self, drawn: Area, where: str) -> Area | None:
        tangle = _tangle(drawn, where)
        self._tangle += tangle
        if self._tangle > MAX_TANGLES:
            raise InputError(
                f"{where}: this and earlier outlines of the file cross themselves all over; are these outlines of "
                "tissue? export them again"
            )
        if tangle > MAX_TANGLE:
            raise OddObjectError(
                f"{where}: the outline of {shapely.get_num_coordinates(drawn):,} points crosses itself all over; it is "
                "not the outline of anything; draw it again or delete it"
            )
        try:
            return polygonal(shapely.make_valid(drawn, method="structure", keep_collapsed=False))
        except GEOSException as error:
            reason = " ".join(str(error).split())
            raise OddObjectError(f"{where}: the outline cannot be made valid ({reason}); draw it again") from error

    def add(
        self, polygon: Area | None, *, identifier: str, label: str, slide: str | None = None, number: object = None
    ) -> None:
        """Add an annotation; None, which :meth:`polygon` returns where there is no area, adds nothing.

        ``number`` is the source's number of the slide; two of one name are an InputError.
        """
        if polygon is not None:
            other = self._slides.setdefault(slide, number) if number is not None else number
            if other != number and slide is not None:
                raise InputError(
                    f"{self.path}: two slides are called {slide!r} (numbers {shown(other)} and {shown(number)}); "
                    "save the annotations of each into a file of its own"
                )
            unique = self._unique(identifier)
            self._annotations.append(Annotation(id=unique, label=label or UNCLASSIFIED, polygon=polygon, slide=slide))

    def finish(self) -> AnnotationFile:
        """Return what was gathered; a file with more odd objects than annotations is an InputError."""
        if self._skipped[ODD] > len(self._annotations):
            self._refuse()
        return AnnotationFile(
            path=self.path,
            annotations=tuple(self._annotations),
            skipped=+self._skipped,
            odd=tuple(self._odd),
            repaired=self._repaired,
            splines=self._splines,
            sizes=self.sizes,
            image=self.image,
            colours=self.colours,
        )

    def _refuse(self) -> NoReturn:
        more = f" (and {self._skipped[ODD] - 1:,} more such objects)" if self._skipped[ODD] > 1 else ""
        raise InputError(self._odd[0] + more)

    def _unique(self, identifier: str) -> str:
        """Return an identifier unchanged the first time, then with a number."""
        unique = identifier
        while unique in self._numbers:
            self._numbers[identifier] += 1
            unique = f"{identifier}#{self._numbers[identifier]}"
        self._numbers[unique] = 1
        return unique


def _has_corners(ring: np.ndarray) -> bool:
    """Whether a ring has at least three distinct points; of long ones it is assumed."""
    return len(ring) > 8 or len({tuple(point) for point in ring.tolist()}) >= 3


def _tangle(drawn: Area, where: str) -> int:
    """Count near pairs of segments beyond those of a plain outline, up to a few more than MAX_TANGLE."""
    points = shapely.get_num_coordinates(drawn)
    if points > MAX_REPAIR_POINTS:
        raise OddObjectError(
            f"{where}: the outline crosses itself and has {points:,} points; at most {MAX_REPAIR_POINTS:,} can be "
            "repaired; simplify it in the annotation tool"
        )
    xy, ring = shapely.get_coordinates(shapely.get_rings(shapely.get_parts(drawn)), return_index=True)
    same = ring[1:] == ring[:-1]
    low, high = np.minimum(xy[1:], xy[:-1])[same], np.maximum(xy[1:], xy[:-1])[same]
    boxes = np.asarray(shapely.box(low[:, 0], low[:, 1], high[:, 0], high[:, 1]))
    tree = shapely.STRtree(boxes)
    tangle = -PAIRS_PER_SEGMENT * len(boxes)
    step = max(1, PAIRS_AT_ONCE // len(boxes))
    for first in range(0, len(boxes), step):
        tangle += tree.query(boxes[first : first + step]).shape[1]
        if tangle > MAX_TANGLE:
            break
    return max(0, min(tangle, MAX_TANGLE + 1))
