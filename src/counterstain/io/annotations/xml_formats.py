"""Annotations saved as XML: ASAP's and Aperio ImageScope's.

ASAP names the group of each outline. A spline is taken as the polygon through its points. ::

    ASAP_Annotations > Annotations > Annotation (Name, Type, PartOfGroup)
                                       > Coordinates > Coordinate (Order, X, Y)

Aperio has layers of regions, of which negative ones are cut out. ImageScope shows a layer under its attribute
``Description``; other tools name the layer or one of its attributes. ::

    Annotations > Annotation (Id, Name) > Attributes > Attribute (Name, Value)
                                        > Regions > Region (Id, Type, Text, NegativeROA)
                                            > Vertices > Vertex (X, Y)

XML is parsed without keeping it; entities and document types are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias
from xml.sax import SAXException
from xml.sax.handler import ContentHandler
from xml.sax.xmlreader import AttributesImpl

import numpy as np
import shapely
from defusedxml import DefusedXmlException
from defusedxml.sax import make_parser

from counterstain.errors import InputError
from counterstain.io.annotations.outlines import AnnotationFile, Area, Collector, ellipse, polygonal, rectangle
from counterstain.io.annotations.safe_parsing import MAX_DEPTH, name, number, shown

MAX_ELEMENTS = 8_000_000  # as many points as a file may have, and what stands around them
ASAP_OUTLINES = ("Polygon", "Rectangle", "Spline")
ASAP_WITHOUT_AREA = {"Dot": "point", "PointSet": "points", "Line": "line", "Measurement": "line"}
RECTANGLE, ELLIPSE = "1", "2"
APERIO_OUTLINES = {"0", RECTANGLE, ELLIPSE}
APERIO_WITHOUT_AREA = {"3": "arrow"}
NOT_A_NAME = {"", "Description"}
NEGATIVE_ALONE = "negative region outside every region of its layer"
ALL_NEGATIVE = "region wholly inside negative regions"

Attributes: TypeAlias = "AttributesImpl[str]"


def read_asap(path: Path, data: bytes) -> AnnotationFile:
    """Read ASAP's XML; the label is the group. Errors name the line and what is wrong there."""
    return _AsapVisitor(path).read(data)


def read_aperio(path: Path, data: bytes) -> AnnotationFile:
    """Read Aperio's XML; the label is the layer's name, otherwise the region's text, otherwise ``layer`` with its Id.

    Errors name the line and what is wrong there.
    """
    return _AperioVisitor(path).read(data)


class _Visitor(ContentHandler):
    """Is told of the elements named in ``tags`` as they start and end."""

    tags: frozenset[str]

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.collector = Collector(path)
        self.number = 0
        """Of the annotation that is being read."""
        self._parser = make_parser()
        self._depth = self._elements = 0

    def start(self, tag: str, attributes: Attributes) -> None:
        raise NotImplementedError

    def end(self, tag: str) -> None:
        raise NotImplementedError

    def read(self, data: bytes) -> AnnotationFile:
        self._parser.forbid_dtd = True
        self._parser.setContentHandler(self)
        try:
            self._parser.feed(data)  # in one piece: expat before 2.6 takes quadratic time for long tokens in small ones
            self._parser.close()
        except DefusedXmlException as error:
            raise InputError(
                f"{self.collector.path}: has a document type or entities of its own, which can do harm and which no "
                "annotation tool writes; export it again"
            ) from error
        except (SAXException, UnicodeError, LookupError) as error:
            message = getattr(error, "getMessage", error.__str__)()
            raise InputError(f"{self.where()}: not XML or cut short ({message}); export it again") from error
        return self.collector.finish()

    def where(self) -> str:
        return f"{self.collector.path} line {self._parser.getLineNumber() or 1}"

    def point(self, attributes: Attributes) -> tuple[float, float]:
        self.collector.count_points(1)
        return number(attributes.get("X"), self.where, "X"), number(attributes.get("Y"), self.where, "Y")

    def startElement(self, name: str, attrs: Attributes) -> None:  # noqa: N802
        self._depth += 1
        self._elements += 1
        if self._depth > MAX_DEPTH:
            raise InputError(f"{self.where()}: nested too deep for annotations; export it again")
        if self._elements > MAX_ELEMENTS:
            raise InputError(f"{self.where()}: more than {MAX_ELEMENTS:,} elements; export one file a slide")
        if name in self.tags:
            self.start(name, attrs)

    def endElement(self, name: str) -> None:  # noqa: N802
        self._depth -= 1
        if name in self.tags:
            self.end(name)


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
            label="Ungrouped" if group in {"", "None"} else group,
        )


@dataclass
class _Region:
    attributes: Attributes
    where: str
    points: list[tuple[float, float]] = field(default_factory=list)

    @property
    def negative(self) -> bool:
        return self.attributes.get("NegativeROA", "0").strip().lower() in {"1", "true"}

    def polygon(self, collector: Collector) -> Area | None:
        """Draw the region; rectangles and ellipses may be given by the corners of their box."""
        kind = self.attributes.get("Type", "0").strip()
        if kind not in APERIO_OUTLINES:
            collector.skip(APERIO_WITHOUT_AREA.get(kind, f"region of Type {shown(kind)}"))
            return None
        ring = np.array(self.points, float).reshape(-1, 2)
        if kind == ELLIPSE and 0 < len(ring) <= 4:  # more points are its outline
            ring = ellipse(ring)
        elif kind == RECTANGLE and len(ring) == 2:
            ring = rectangle(ring)
        return collector.polygon([[ring]], self.where)


@dataclass
class _Layer:
    attributes: Attributes
    where: str
    number: int
    names: list[tuple[str, str]] = field(default_factory=list)
    regions: list[_Region] = field(default_factory=list)

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
    drawn = [(region, region.polygon(collector)) for region in layer.regions]
    negatives = np.array([p for region, p in drawn if region.negative and p is not None], dtype=object)
    tree = shapely.STRtree(negatives)
    used: set[int] = set()
    label = layer.label()
    layer_id = name(layer.attributes.get("Id", ""), f"{layer.where} Id") or str(layer.number)
    for position, (region, polygon) in enumerate(drawn, start=1):
        if region.negative or polygon is None:
            continue
        inside = tree.query(polygon, predicate="intersects")
        used.update(inside.tolist())
        left = polygonal(shapely.difference(polygon, shapely.union_all(negatives[inside]))) if len(inside) else polygon
        if left is None:
            collector.skip(ALL_NEGATIVE)
            continue
        text = name(region.attributes.get("Text", ""), f"{region.where} Text")
        identifier = name(region.attributes.get("Id", ""), f"{region.where} Id") or str(position)
        collector.add(left, identifier=f"{layer_id}/{identifier}", label=label or text or f"layer {layer_id}")
    for _ in range(len(negatives) - len(used)):
        collector.skip(NEGATIVE_ALONE)
