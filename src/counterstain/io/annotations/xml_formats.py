"""Annotations saved as XML: ASAP's and Aperio ImageScope's.

ASAP names the group of each outline. A spline is taken as the polygon through its points. ::

    ASAP_Annotations > Annotations > Annotation (Name, Type, PartOfGroup, Color)
                                       > Coordinates > Coordinate (Order, X, Y)

Aperio has layers of regions, of which negative ones are cut out. ImageScope shows a layer under its attribute
``Description``; other tools name the layer or one of its attributes. ::

    Annotations > Annotation (Id, Name, LineColor) > Attributes > Attribute (Name, Value)
                                                   > Regions > Region (Id, Type, Text, NegativeROA)
                                                       > Vertices > Vertex (X, Y)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import shapely
from shapely import MultiPolygon, Polygon

from counterstain.errors import InputError
from counterstain.io.annotations.outlines import AnnotationFile, Collector, Shape, ellipse, polygonal, rectangle
from counterstain.io.annotations.safe_parsing import (
    Attributes,
    XmlVisitor,
    colour_of_text,
    name,
    number,
    parse_xml,
    shown,
)

UNGROUPED = "Ungrouped"
ASAP_OUTLINES: dict[str, Shape | None] = {"Polygon": None, "Rectangle": None, "Spline": "spline"}
ASAP_WITHOUT_AREA = {"Dot": "point", "PointSet": "points", "Line": "line", "Measurement": "line"}
RECTANGLE, ELLIPSE = "1", "2"
APERIO_OUTLINES = {"0", RECTANGLE, ELLIPSE}
APERIO_WITHOUT_AREA = {"3": "arrow"}
NOT_A_NAME = {"", "Description"}
NEGATIVE_ALONE = "negative region outside every region of its layer"
ALL_NEGATIVE = "region wholly inside negative regions"


def read_asap(path: Path, data: bytes) -> AnnotationFile:
    """Read ASAP's XML; the label is the group.

    Raises
    ------
    InputError
        Names the line and what is wrong there.
    """
    visitor = _AsapVisitor(path, "asap")
    parse_xml(data, visitor)
    return visitor.collector.finish()


def read_aperio(path: Path, data: bytes) -> AnnotationFile:
    """Read Aperio's XML; the label is the layer's name, otherwise the region's text, otherwise ``layer`` with its Id.

    Raises
    ------
    InputError
        Names the line and what is wrong there.
    """
    visitor = _AperioVisitor(path, "aperio")
    parse_xml(data, visitor)
    return visitor.collector.finish()


class _Visitor(XmlVisitor):
    """What the two formats share: a collector, and points with X and Y."""

    def __init__(self, path: Path, file_format: str) -> None:
        super().__init__(path)
        self.collector = Collector(path, file_format)
        self.number = 0
        """Of the annotation that is being read."""

    def point(self, attributes: Attributes) -> tuple[float, float]:
        self.collector.count_points(1)
        return number(attributes.get("X"), self.where, "X"), number(attributes.get("Y"), self.where, "Y")


class _AsapVisitor(_Visitor):
    tags = frozenset({"Annotation", "Coordinate"})
    attributes: Attributes | None = None
    place = ""

    def start(self, tag: str, attributes: Attributes) -> None:
        if tag == "Annotation":
            self.attributes, self.place = attributes, self.where()
            self.points: list[tuple[float, float, float]] = []  # order, x, y
            self.number += 1
        elif self.attributes is not None:
            order = number(attributes.get("Order", str(len(self.points))), self.where, "Order")
            self.points.append((order, *self.point(attributes)))

    def end(self, tag: str) -> None:
        if tag == "Annotation" and self.attributes is not None:
            self._add(self.attributes)
            self.attributes = None

    def _add(self, attributes: Attributes) -> None:
        kind = attributes.get("Type", "Polygon")
        if kind in ASAP_WITHOUT_AREA:
            self.collector.skip(ASAP_WITHOUT_AREA[kind])
            return
        if kind not in ASAP_OUTLINES:
            raise InputError(f"{self.place}: unknown Type {shown(kind)}; expected one of {', '.join(ASAP_OUTLINES)}")
        group = name(attributes.get("PartOfGroup", "None"), f"{self.place} PartOfGroup")
        self.points.sort(key=lambda point: point[0])
        ring = np.array([point[1:] for point in self.points], float).reshape(-1, 2)
        self.collector.add(
            self.collector.polygon([[ring]], self.place),
            identifier=name(attributes.get("Name", ""), f"{self.place} Name") or str(self.number),
            label=UNGROUPED if group in {"", "None"} else group,
            colour=colour_of_text(attributes.get("Color")),
            kind=ASAP_OUTLINES[kind],
        )


@dataclass
class _Region:
    attributes: Attributes
    where: str
    points: list[tuple[float, float]] = field(default_factory=list)

    @property
    def negative(self) -> bool:
        return self.attributes.get("NegativeROA", "0").strip().lower() in {"1", "true"}

    @property
    def kind(self) -> str:
        return self.attributes.get("Type", "0").strip()

    @property
    def is_ellipse(self) -> bool:
        """Whether it is an ellipse given by its box; with more points they are its outline."""
        return self.kind == ELLIPSE and len(self.points) <= 4

    def ring(self) -> np.ndarray:
        """Return the outline, (n, 2) float; rectangles and ellipses may be given by the corners of their box."""
        points = np.array(self.points, float).reshape(-1, 2)
        if not len(points):
            return points
        bounds = (*points.min(axis=0).tolist(), *points.max(axis=0).tolist())
        if self.is_ellipse:
            return ellipse(bounds)
        return rectangle(bounds) if self.kind == RECTANGLE and len(points) == 2 else points


@dataclass
class _Layer:
    attributes: Attributes
    where: str
    number: int
    names: list[tuple[str, str]] = field(default_factory=list)
    regions: list[_Region] = field(default_factory=list)

    @property
    def identifier(self) -> str:
        return name(self.attributes.get("Id", ""), f"{self.where} Id") or str(self.number)

    def label(self) -> str:
        """Return the layer's name, or nothing."""
        attributes = [(name(key, self.where), name(value, self.where)) for key, value in self.names]
        described = next((value for key, value in attributes if key == "Description"), "")
        attribute = next((key for key, _ in attributes if key not in NOT_A_NAME), "")
        return name(self.attributes.get("Name", ""), f"{self.where} Name") or described or attribute


class _AperioVisitor(_Visitor):
    tags = frozenset({"Annotation", "Attribute", "Region", "Vertex"})
    layer: _Layer | None = None
    region: _Region | None = None

    def start(self, tag: str, attributes: Attributes) -> None:
        if tag == "Annotation":
            self.number += 1
            self.layer = _Layer(attributes, self.where(), self.number)
        elif self.layer is None:
            return
        elif tag == "Region":
            self.region = _Region(attributes, self.where())
            self.layer.regions.append(self.region)
        elif tag == "Attribute" and self.region is None:
            self.layer.names.append((attributes.get("Name", ""), attributes.get("Value", "")))
        elif tag == "Vertex" and self.region is not None:
            self.region.points.append(self.point(attributes))

    def end(self, tag: str) -> None:
        if tag == "Region":
            self.region = None
        elif tag == "Annotation" and self.layer is not None:
            _add_layer(self.collector, self.layer)
            self.layer = None


def _add_layer(collector: Collector, layer: _Layer) -> None:
    drawn = [(region, _polygon(collector, region)) for region in layer.regions]
    negatives = _Negatives([polygon for region, polygon in drawn if region.negative and polygon is not None])
    label = layer.label()
    for position, (region, polygon) in enumerate(drawn, start=1):
        if region.negative or polygon is None:
            continue
        left = negatives.cut_out_of(polygon)
        if left is None:
            collector.skip(ALL_NEGATIVE)
            continue
        text = name(region.attributes.get("Text", ""), f"{region.where} Text")
        identifier = name(region.attributes.get("Id", ""), f"{region.where} Id") or str(position)
        collector.add(
            left,
            identifier=f"{layer.identifier}/{identifier}",
            label=label or text or f"layer {layer.identifier}",
            colour=_colour(layer.attributes.get("LineColor", "")),
            kind="ellipse" if region.is_ellipse and left is polygon else None,
        )
    for _ in range(negatives.unused):
        collector.skip(NEGATIVE_ALONE)


class _Negatives:
    """The negative regions of a layer."""

    def __init__(self, polygons: list[Polygon | MultiPolygon]) -> None:
        self._polygons = np.array(polygons, dtype=object)
        self._tree = shapely.STRtree(polygons)
        self._used: set[int] = set()

    @property
    def unused(self) -> int:
        return len(self._polygons) - len(self._used)

    def cut_out_of(self, polygon: Polygon | MultiPolygon) -> Polygon | MultiPolygon | None:
        """Return the polygon without the negatives: itself if none meets it, None if they cover it."""
        inside = self._tree.query(polygon, predicate="intersects")
        if not len(inside):
            return polygon
        self._used.update(inside.tolist())
        return polygonal(shapely.difference(polygon, shapely.union_all(self._polygons[inside])))


def _polygon(collector: Collector, region: _Region) -> Polygon | MultiPolygon | None:
    if region.kind not in APERIO_OUTLINES:
        collector.skip(APERIO_WITHOUT_AREA.get(region.kind, f"region of Type {shown(region.kind)}"))
        return None
    return collector.polygon([[region.ring()]], region.where)


def _colour(packed: str) -> str | None:
    """Return the colour of Windows' ``0x00bbggrr`` as a decimal number."""
    if not packed.isascii() or not packed.isdigit() or len(packed) > 10:
        return None
    blue_green_red = int(packed) & 0xFFFFFF
    return f"#{blue_green_red & 0xFF:02x}{blue_green_red >> 8 & 0xFF:02x}{blue_green_red >> 16:02x}"
