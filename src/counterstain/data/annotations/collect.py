"""Gathers the annotations of one file, counts what is left out and keeps ids unique."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from shapely import MultiPolygon, Polygon

from counterstain.data.annotations.polygons import Rings, build, shape_of
from counterstain.data.annotations.records import UNCLASSIFIED, Annotation, AnnotationFile, Shape
from counterstain.errors import InputError

MAX_POINTS = 5_000_000
MAX_TANGLE = 1_000_000  # of all outlines of a file together
NO_AREA = "outline without area"


class Collector:
    """What a format's reader fills."""

    def __init__(self, path: Path, file_format: str) -> None:
        self.path = path
        self._file_format = file_format
        self._annotations: list[Annotation] = []
        self._skipped: Counter[str] = Counter()
        self._numbers: dict[str, int] = {}
        self._repaired = 0
        self._tangle = 0
        self._points = 0

    def skip(self, reason: str) -> None:
        """Count an object that cannot become an instance."""
        self._skipped[reason] += 1

    def count_points(self, points: int) -> None:
        """Count points before anything is built of them.

        Raises
        ------
        InputError
            More than a file can hold.
        """
        self._points += points
        if self._points > MAX_POINTS:
            raise InputError(
                f"{self.path}: more than {MAX_POINTS:,} points; export tissue annotations alone (without cells and "
                "detections), or simplify them"
            )

    def polygon(self, parts: Sequence[Rings], where: str) -> Polygon | MultiPolygon | None:
        """Make a valid polygon of outlines with their holes; without an area it is skipped."""
        built = build(parts, where)
        if built is None:
            self.skip(NO_AREA)
            return None
        self._repaired += built.repaired
        self._tangle += built.tangle
        if self._tangle > MAX_TANGLE:
            raise InputError(
                f"{where}: this and earlier outlines of the file cross themselves all over; are these outlines of "
                "tissue? export them again"
            )
        return built.polygon

    def add(
        self,
        polygon: Polygon | MultiPolygon | None,
        *,
        identifier: str,
        label: str,
        slide: str | None = None,
        colour: str | None = None,
        kind: Shape | None = None,
    ) -> None:
        """Add an annotation; None, which :meth:`polygon` returns where there is no area, adds nothing."""
        if polygon is None:
            return
        self._annotations.append(
            Annotation(
                id=self._unique(identifier),
                label=label or UNCLASSIFIED,
                polygon=polygon,
                slide=slide,
                kind=kind or shape_of(polygon),
                colour=colour,
            )
        )

    def finish(self) -> AnnotationFile:
        """Return what was gathered."""
        return AnnotationFile(
            path=self.path,
            file_format=self._file_format,
            annotations=tuple(self._annotations),
            skipped=self._skipped,
            repaired=self._repaired,
        )

    def _unique(self, identifier: str) -> str:
        """Return an identifier as it is the first time, then with a number."""
        unique = identifier
        while unique in self._numbers:
            self._numbers[identifier] += 1
            unique = f"{identifier}#{self._numbers[identifier]}"
        self._numbers[unique] = 1
        return unique
