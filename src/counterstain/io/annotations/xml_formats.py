"""Annotations saved as XML: ASAP's, Aperio ImageScope's and HALO's.

ASAP names the group of each outline. A spline is drawn as ASAP shows it, a curve through its points. ::

    ASAP_Annotations > Annotations > Annotation (Name, Type, PartOfGroup)
                                       > Coordinates > Coordinate (Order, X, Y)

Aperio has layers of regions, of which negative ones are cut out. ImageScope shows a layer under its attribute
``Description``; other tools name the layer or one of its attributes. ::

    Annotations > Annotation (Id, Name) > Attributes > Attribute (Name, Value)
                                        > Regions > Region (Id, Type, Text, NegativeROA)
                                            > Vertices > Vertex (X, Y)

Scripts that write this XML out of QuPath (WSITools, dicom_wsi) add ``GeoShape``, the shape's name, and put the number
of the class into ``Type``. HALO writes the same layers with other names (documentation of pyhaloxml, 2023)::

    Annotations > Annotation (Name, LineColor, Visible)
                    > Regions > Region (Type, HasEndcaps, NegativeROA)
                        > Vertices > V (X, Y)

XML is parsed without keeping it; entities and document types are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias
from xml.sax import SAXException
from xml.sax.handler import ContentHandler
from xml.sax.xmlreader import AttributesImpl

import numpy as np
import shapely
from defusedxml import DefusedXmlException
from defusedxml.sax import make_parser
from shapely import MultiPolygon

from counterstain.errors import InputError
from counterstain.io.annotations.outlines import (
    AnnotationFile,
    Area,
    Collector,
    corners_in_order,
    ellipse,
    polygonal,
    rectangle,
)
from counterstain.io.annotations.safe_parsing import MAX_DEPTH, OddObjectError, identifier, name, number, shown

MAX_ELEMENTS = 8_000_000  # as many points as a file may have, and what stands around them
MAX_CUTS = 100_000  # of negative regions out of others, in a layer
ASAP_OUTLINES = ("Polygon", "Rectangle", "Spline")
ASAP_WITHOUT_AREA = {
    "Dot": "point",
    "PointSet": "points",
    "Line": "line",
    "Measurement": "line",
    "None": "annotation without a type",
}
NEGATIVE = {"": False, "0": False, "false": False, "1": True, "true": True}
POLYGON, RECTANGLE, ELLIPSE = "polygon", "rectangle", "ellipse"
APERIO_TYPES = {"0": POLYGON, "1": RECTANGLE, "2": ELLIPSE, "3": "arrow", "4": "ruler"}
SHAPES_WITHOUT_AREA = {"arrow", "ruler", "pin", "point", "points", "line", "polyline"}
ENCODING = re.compile(rb"""^\s*<\?xml[^>]{0,200}?encoding\s*=\s*["']([^"']{1,60})""")
NOT_A_NAME = {"", "Description"}
NEGATIVE_ALONE = "negative region outside every region of its layer"
ALL_NEGATIVE = "region wholly inside negative regions"

Attributes: TypeAlias = "AttributesImpl[str]"


def read_asap(path: Path, data: bytes) -> AnnotationFile:
    """Read ASAP's XML; the label is the group. Errors name the line and what is wrong there."""
    return _AsapVisitor(path).read(data)


def read_aperio(path: Path, data: bytes) -> AnnotationFile:
    """Read Aperio's or HALO's XML; errors name the line and what is wrong there.

    The label is the layer's name, otherwise the region's text, otherwise ``layer`` with its Id.
    """
    return _AperioVisitor(path).read(data)


class _Visitor(ContentHandler):
    """Is told of the elements named in ``tags`` as they start and end, and of an object that cannot be read."""

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

    def drop(self) -> None:
        """Forget the object that is being read."""
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
        except InputError:
            raise
        except SAXException as error:
            raise InputError(f"{self.where()}: not XML or cut short ({error.getMessage()}); export it again") from error
        except (ValueError, LookupError) as error:  # Python's codecs refuse it
            found = ENCODING.match(data[:1000])
            said = f"encoding {shown(found[1].decode('ascii', 'replace'))}" if found else "an encoding"
            raise InputError(f"{self.collector.path}: says {said}, which is not read; save it as UTF-8") from error
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
            self._try(self.start, name, attrs)

    def endElement(self, name: str) -> None:  # noqa: N802
        self._depth -= 1
        if name in self.tags:
            self._try(self.end, name)

    def _try(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except OddObjectError as error:
            self.collector.odd(error)
            self.drop()


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
            attributes, self.attributes = self.attributes, None
            self._add(attributes)

    def drop(self) -> None:
        self.attributes = None

    def _add(self, attributes: Attributes) -> None:
        kind = attributes.get("Type", "Polygon")
        if kind in ASAP_WITHOUT_AREA:
            self.collector.skip(ASAP_WITHOUT_AREA[kind])
            return
        if kind not in ASAP_OUTLINES:
            raise OddObjectError(
                f"{self.place}: unknown Type {shown(kind)}; expected one of {', '.join(ASAP_OUTLINES)}"
            )
        group = name(attributes.get("PartOfGroup", "None"), f"{self.place} PartOfGroup")
        self.points.sort(key=lambda point: point[0])
        ring = np.array([point[1:] for point in self.points], float).reshape(-1, 2)
        ring = self.collector.curve(ring) if kind == "Spline" else ring
        ring = corners_in_order(ring) if kind == "Rectangle" else ring
        self.collector.add(
            self.collector.polygon([[ring]], self.place),
            identifier=identifier(attributes.get("Name"), self.number),
            label="Ungrouped" if group in {"", "None"} else group,
        )


@dataclass
class _Region:
    attributes: Attributes
    where: str
    points: list[tuple[float, float]] = field(default_factory=list)
    odd: bool = False

    @property
    def negative(self) -> bool:
        given = self.attributes.get("NegativeROA", "0").strip().lower()
        if given not in NEGATIVE:
            raise InputError(f"{self.where}: NegativeROA is {shown(given)}, expected 0 or 1; export it again")
        return NEGATIVE[given]

    def polygon(self, collector: Collector) -> Area | None:
        """Draw the region; rectangles and ellipses may be given by the corners of their box."""
        shape = self.attributes.get("GeoShape")  # decides where it stands: Type is then the number of the class
        if shape is None:
            shape = self.attributes.get("Type", "0").strip()
            shape = APERIO_TYPES.get(shape, shape)
        kind = shape.strip().lower()
        if kind not in {POLYGON, RECTANGLE, ELLIPSE}:
            if self.negative and kind not in SHAPES_WITHOUT_AREA:
                raise OddObjectError(
                    f"{self.where}: a negative region of the unknown shape {shown(shape)}; draw it again"
                )
            collector.skip(kind if kind in SHAPES_WITHOUT_AREA else f"region of the unknown shape {shown(shape)}")
            return None
        ring = np.array(self.points, float).reshape(-1, 2)
        if kind == ELLIPSE and 0 < len(ring) <= 4:  # more points are its outline
            ring = ellipse(ring)
        elif kind == RECTANGLE:
            ring = rectangle(ring) if len(ring) == 2 else corners_in_order(ring)
        return collector.polygon([[ring]], self.where)


@dataclass
class _Layer:
    attributes: Attributes
    where: str
    number: int
    names: list[tuple[str, str]] = field(default_factory=list)
    regions: list[_Region] = field(default_factory=list)

    def label(self) -> str:
        """Return the layer's name, or nothing; it may be too long."""
        described = next((value for key, value in self.names if key.strip() == "Description"), "")
        attribute = next((key for key, _ in self.names if key.strip() not in NOT_A_NAME), "")
        return next((text for text in (self.attributes.get("Name", ""), described, attribute) if text.strip()), "")


class _AperioVisitor(_Visitor):
    tags = frozenset({"Annotation", "Attribute", "Region", "Vertex", "V"})
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
        elif tag in {"Vertex", "V"} and self.region is not None and not self.region.odd:
            self.region.points.append(self.point(attributes))

    def end(self, tag: str) -> None:
        if tag == "Region":
            self.region = None
        elif tag == "Annotation" and self.layer is not None:
            layer, self.layer = self.layer, None
            _add_layer(self.collector, layer)

    def drop(self) -> None:
        if self.layer is not None and self.region is not None:
            self.layer.regions.pop()
            self.region.odd = True
            if self.region.negative:
                raise InputError(f"{self.region.where}: a negative region cannot be read; export it again")


def _drawn(collector: Collector, layer: _Layer) -> list[tuple[_Region, Area | None]]:
    drawn = []
    for region in layer.regions:
        try:
            drawn.append((region, region.polygon(collector)))
        except OddObjectError as error:
            if region.negative:
                raise InputError(str(error)) from error
            collector.odd(error)
    return drawn


def _add_layer(collector: Collector, layer: _Layer) -> None:
    drawn = _drawn(collector, layer)
    negatives = np.array([p for region, p in drawn if region.negative and p is not None], dtype=object)
    holes = shapely.get_parts(shapely.union_all(negatives))
    tree, hole_tree = shapely.STRtree(negatives), shapely.STRtree(holes)
    used: set[int] = set()
    cuts = 0
    layer_id, given = identifier(layer.attributes.get("Id"), layer.number), layer.label()
    for position, (region, polygon) in enumerate(drawn, start=1):
        if region.negative or polygon is None:
            continue
        inside = tree.query(polygon, predicate="intersects")
        used.update(inside.tolist())
        cuts += len(inside)
        if cuts > MAX_CUTS:
            raise InputError(f"{layer.where}: more than {MAX_CUTS:,} holes to cut out of regions; export it again")
        left: Area | None = polygon
        if len(inside):
            cut_out = MultiPolygon(list(holes[hole_tree.query(polygon, predicate="intersects")]))
            left = polygonal(shapely.difference(polygon, cut_out))
        if left is None:
            collector.skip(ALL_NEGATIVE)
            continue
        try:
            label = name(given, f"{layer.where} Name") or name(
                region.attributes.get("Text", ""), f"{region.where} Text"
            )
        except OddObjectError as error:
            collector.odd(error)
            continue
        region_id = identifier(region.attributes.get("Id"), position)
        collector.add(left, identifier=f"{layer_id}/{region_id}", label=label or f"layer {layer_id}")
    for _ in range(len(negatives) - len(used)):
        collector.skip(NEGATIVE_ALONE)
