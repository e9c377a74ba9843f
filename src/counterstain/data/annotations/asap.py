"""ASAP's XML: outlines with the group that each is part of.

    ASAP_Annotations > Annotations > Annotation (Name, Type, PartOfGroup, Color)
                                       > Coordinates > Coordinate (Order, X, Y)

A spline is taken as the polygon through its points: ASAP places them a few pixels apart.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from counterstain.data.annotations.collect import Collector
from counterstain.data.annotations.documents import Attributes, Place, parse_xml
from counterstain.data.annotations.records import AnnotationFile, Shape
from counterstain.data.annotations.values import colour_of_text, name, number, shown
from counterstain.errors import InputError

UNGROUPED = "Ungrouped"
OUTLINES: dict[str, Shape | None] = {"Polygon": None, "Rectangle": None, "Spline": "spline"}
WITHOUT_AREA = {"Dot": "point", "PointSet": "points", "Line": "line", "Measurement": "line"}


def read_asap(path: Path, data: bytes) -> AnnotationFile:
    """Read ASAP's XML; the label is the group.

    Raises
    ------
    InputError
        Names the line and what is wrong there.
    """
    visitor = _Visitor(Collector(path, "asap"))
    parse_xml(path, data, visitor)
    return visitor.collector.finish()


class _Visitor:
    tags = frozenset({"Annotation", "Coordinate"})

    def __init__(self, collector: Collector) -> None:
        self.collector = collector
        self._attributes: Attributes | None = None
        self._where = str(collector.path)
        self._points: list[tuple[float, float, float]] = []  # order, x, y
        self._number = 0

    def start(self, tag: str, attributes: Attributes, where: Place) -> None:
        if tag == "Annotation":
            self._attributes, self._where, self._points = attributes, where(), []
            self._number += 1
        elif tag == "Coordinate" and self._attributes is not None:
            self.collector.count_points(1)
            order = number(attributes.get("Order", str(len(self._points))), where, "Order")
            x = number(attributes.get("X"), where, "X")
            y = number(attributes.get("Y"), where, "Y")
            self._points.append((order, x, y))

    def end(self, tag: str) -> None:
        if tag == "Annotation" and self._attributes is not None:
            self._finish(self._attributes)
            self._attributes = None

    def _finish(self, attributes: Attributes) -> None:
        kind = attributes.get("Type", "Polygon")
        if kind in WITHOUT_AREA:
            self.collector.skip(WITHOUT_AREA[kind])
            return
        if kind not in OUTLINES:
            raise InputError(f"{self._where}: unknown Type {shown(kind)}; expected one of {', '.join(OUTLINES)}")
        group = name(attributes.get("PartOfGroup", "None"), f"{self._where} PartOfGroup")
        self._points.sort(key=lambda point: point[0])
        ring = np.array([point[1:] for point in self._points], float).reshape(-1, 2)
        self.collector.add(
            self.collector.polygon([[ring]], self._where),
            identifier=name(attributes.get("Name", ""), f"{self._where} Name") or str(self._number),
            label=UNGROUPED if group in {"", "None"} else group,
            colour=colour_of_text(attributes.get("Color")),
            kind=OUTLINES[kind],
        )
