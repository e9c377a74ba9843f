"""Which annotations and which patient belong to which slide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import shapely
from pydantic import Field
from shapely import MultiPolygon, Polygon

from counterstain.config import Config
from counterstain.errors import InputError
from counterstain.io.annotations.outlines import Annotation, AnnotationFile
from counterstain.io.regions import Box, Extent, drawn_boxes, place_boxes
from counterstain.io.slides import Slide, slide_name
from counterstain.io.table import csv_rows
from counterstain.io.thumbnails import tissue_mask
from counterstain.taxonomy import BACKGROUND, IGNORE

SHOWN_NAMES = 5
DEEPZOOM_OF_EXACT = ".dzi"  # EXACT names some images so


@dataclass(frozen=True, slots=True)
class Patient:
    """Whose slide it is."""

    patient: str
    score: str | None = None
    """Score of the slide."""
    mpp_level0: float | None = None
    """Micrometres per level-0 pixel of the slide, where its file does not say."""


def match_annotations(slides: Iterable[str], files: Sequence[AnnotationFile]) -> dict[str, list[Annotation]]:
    """Give every slide its annotations.

    A file belongs to the slide whose name it has, whatever follows after a dot (``a.svs`` and ``a.qupath.json``); of
    several slides that fit, to that with the longest name. Annotations that name their slide themselves, as EXACT's
    do, belong to it.

    Raises
    ------
    InputError
        A slide without annotations or annotations without a slide; lists the names of both sides.
    """
    matched: dict[str, list[Annotation]] = {slide: [] for slide in slides}
    found: set[str] = set()
    strays: dict[str, None] = {}
    for file in files:
        for source in file.slides or (None,):
            name = source or file.path.name
            slide = _slide_of(name, matched)
            if slide is None:
                strays[name] = None
            else:
                found.add(slide)
                matched[slide].extend(file.of_slide(source))
    bare = [slide for slide in matched if slide not in found]
    if bare or strays:
        raise InputError(
            "slides and annotations do not match: "
            + ", ".join(f"no {what} for {_listed(of)}" for what, of in (("annotations", bare), ("slide", strays)) if of)
            + "; give both the same name, or move away what is not to be imported"
        )
    return matched


def read_patients(path: Path, slides: Iterable[str]) -> dict[str, Patient]:
    """Read whose slides they are from a CSV table with the columns slide, patient and perhaps score and mpp_level0.

    Raises
    ------
    InputError
        A column or a slide is missing, a field is empty, a resolution is not above 0, or a slide stands there twice.
    """
    patients: dict[str, Patient] = {}
    for place, row in csv_rows(path, ("slide", "patient"), ("score", "mpp_level0")):
        slide, patient = slide_name(row["slide"]), row["patient"]
        if not slide or not patient:
            raise InputError(f"{place}: slide or patient is empty; fill it in")
        if slide in patients:
            raise InputError(f"{place}: slide {slide} stands there twice; remove one row")
        patients[slide] = Patient(patient, row.get("score") or None, _resolution(place, row.get("mpp_level0")))
    missing = [slide for slide in slides if slide not in patients]
    if missing:
        raise InputError(f"{path}: no row for {_listed(missing)}; add one for every slide")
    return patients


def _resolution(place: str, text: str | None) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"{place}: mpp_level0 {text!r}: expected micrometres per pixel above 0, such as 0.25")
    return value


def _slide_of(name: str, slides: Mapping[str, object]) -> str | None:
    """Return the longest slide's name that ``name`` is or continues after a dot."""
    bare = slide_name(name.removesuffix(DEEPZOOM_OF_EXACT))
    fitting = [slide for slide in slides if bare == slide or name.startswith(f"{slide}.")]
    return max(fitting, key=len, default=None)


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


# What is to be imported from one slide: its annotations on the canvas, their labels and its regions.
#
# Places are level-0 pixels of the whole canvas.

TISSUE_PX = 1024  # longer side of the thumbnail in which tissue is sought
MAX_REGION_PX = 20_000**2  # an instance map of 1.6 GB

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SlidesConfig(Config):
    """How slides and their annotations become a cohort."""

    mpp: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
    """Micrometres per pixel of the cohort."""
    mpp_level0: PositiveFloat | None = None
    """Micrometres per level-0 pixel, for slides whose files do not say."""
    origin: Literal["canvas", "bounds"]
    """Where annotations count from: the corner of the whole canvas, or that of the scanned area."""
    regions: Literal["auto", "drawn", "table"]
    """Regions are placed on annotated tissue, drawn as rectangles among the annotations, or listed in a table."""
    regions_per_slide: Annotated[int, Field(ge=1, le=10_000)] = 10
    """``auto``: how many at most."""
    region_size_um: PositiveFloat = 1500.0
    """``auto``: edge of the square regions in micrometres."""


class Shown(NamedTuple):
    """An annotation as it is drawn into regions."""

    instance: int
    """Its number on the slide, from 1 on; the same every time the annotations are read."""
    label: int
    """Subtype, 0 = background, 255 = ignore."""
    source_id: str
    source_label: str
    polygon: Polygon | MultiPolygon


@dataclass(frozen=True, kw_only=True)
class SlidePlan:
    """What is to be imported from one slide."""

    slide: str
    path: Path
    patient: Patient
    mpp_level0: float
    size_level0_px: tuple[int, int]
    boxes: tuple[Box, ...]
    shown: tuple[Shown, ...]
    cut: int
    """Annotations that reach over the edge of the scanned area and end there."""

    def region_name(self, box: Box) -> str:
        """Return what a region of the slide is called in the cohort."""
        return f"{self.slide}-{box.name}"

    @property
    def areas_level0_px(self) -> dict[int, float]:
        """Annotated area of every subtype."""
        areas: dict[int, float] = {}
        for shown in self.shown:
            if shown.label not in {BACKGROUND, IGNORE}:
                areas[shown.label] = areas.get(shown.label, 0.0) + shown.polygon.area
        return areas


def plan_slide(
    name: str,
    slide: Slide,
    *,
    patient: Patient,
    annotations: Sequence[Annotation],
    labels: Mapping[str, int],
    config: SlidesConfig,
    listed: Sequence[Box] = (),
) -> SlidePlan:
    """Plan the import of one slide.

    Parameters
    ----------
    name : str
    slide : Slide
        Open.
    patient : Patient
    annotations : sequence of Annotation
        All of the slide.
    labels : mapping
        Label -> subtype, 0 = background, 255 = ignore; annotations of other labels are rectangles of regions.
    config : SlidesConfig
    listed : sequence of Box
        Regions of the slide, for ``regions="table"``.

    Raises
    ------
    InputError
        An annotation or a region lies off the slide, or there is no region.
    """
    extent = Extent(*slide.bounds_level0_px)
    moved = _on_canvas(annotations, extent if config.origin == "bounds" else None)
    _check_on_slide(name, moved, slide, config)
    instances = [a for a in moved if a.label in labels]
    within = _cut(instances, extent)
    shown = tuple(
        Shown(number, labels[a.label], a.id, a.label, polygon)
        for number, (a, polygon) in enumerate(zip(instances, within, strict=True), start=1)
    )
    drawn = [a.polygon for a in moved if a.label not in labels]
    boxes = {
        "auto": lambda: _placed_boxes(slide, shown, config),
        "drawn": lambda: drawn_boxes(name, drawn),
        "table": lambda: list(listed),
    }[config.regions]()
    _check_boxes(name, boxes, slide, config)
    return SlidePlan(
        slide=name,
        path=slide.path,
        patient=patient,
        mpp_level0=slide.mpp_level0,
        size_level0_px=slide.size_level0_px,
        boxes=tuple(boxes),
        shown=shown,
        cut=sum(polygon is not a.polygon for a, polygon in zip(instances, within, strict=True)),
    )


def _on_canvas(annotations: Sequence[Annotation], extent: Extent | None) -> list[Annotation]:
    if extent is None or (extent.x, extent.y) == (0, 0) or not annotations:
        return list(annotations)
    polygons = np.array([a.polygon for a in annotations], dtype=object)
    moved = shapely.transform(polygons, lambda xy: np.add(xy, (extent.x, extent.y)))
    return [replace(a, polygon=polygon) for a, polygon in zip(annotations, moved, strict=True)]


def _check_on_slide(name: str, annotations: Sequence[Annotation], slide: Slide, config: SlidesConfig) -> None:
    x, y, width, height = slide.bounds_level0_px
    area = shapely.box(x, y, x + width, y + height)
    outside = [a for a in annotations if not a.polygon.intersects(area) or a.polygon.touches(area)]
    if not outside:
        return
    left, top, _, _ = outside[0].polygon.bounds
    if (x, y) == (0, 0):
        remedy = "they belong to another slide or another level of it"
    else:
        other = "canvas" if config.origin == "bounds" else "bounds"
        remedy = f"the scanned area begins at x {x}, y {y}: try --origin {other}"
    raise InputError(
        f"slide {name}: {len(outside)} of {len(annotations)} annotations lie off the slide's {width} x {height} px "
        f"(the first: {outside[0].label!r}, id {outside[0].id}, at x {left:.0f}, y {top:.0f}); {remedy}"
    )


def _cut(annotations: Sequence[Annotation], extent: Extent) -> list[Polygon | MultiPolygon]:
    """Return the polygons, those that reach over the edge of the extent cut there."""
    area = shapely.box(extent.x, extent.y, extent.x + extent.width, extent.y + extent.height)
    shapely.prepare(area)
    return [a.polygon if area.covers(a.polygon) else _polygons(a.polygon.intersection(area)) for a in annotations]


def _polygons(geometry: shapely.Geometry) -> Polygon | MultiPolygon:
    """Leave points and lines away that an intersection may hold beside polygons."""
    parts = [part for part in shapely.get_parts(geometry) if isinstance(part, Polygon)]
    return parts[0] if len(parts) == 1 else MultiPolygon(parts)


def _placed_boxes(slide: Slide, shown: Sequence[Shown], config: SlidesConfig) -> list[Box]:
    edge = max(1, round(config.region_size_um / slide.mpp_level0))
    tumour = [s for s in shown if s.label not in {BACKGROUND, IGNORE}]
    return place_boxes(
        [s.polygon for s in tumour],
        count=config.regions_per_slide,
        width=edge,
        height=edge,
        extent=Extent(*slide.bounds_level0_px),
        weights=_weights(tumour),
        tissue=tissue_mask(slide.thumbnail(TISSUE_PX).image),
    )


def _weights(shown: Sequence[Shown]) -> list[float]:
    """Return what a pixel of each instance counts: every subtype of the slide the same in all, so that rare ones count.

    Without it, regions would go where the commonest subtype is.
    """
    area: dict[int, float] = {}
    for s in shown:
        area[s.label] = area.get(s.label, 0.0) + s.polygon.area
    return [1 / area[s.label] if area[s.label] else 0.0 for s in shown]


def _check_boxes(name: str, boxes: Sequence[Box], slide: Slide, config: SlidesConfig) -> None:
    if not boxes:
        remedy = {
            "auto": "it has no instance of a subtype; remove the slide, or give regions in a table",
            "drawn": "none of its annotations has a label of a region; draw one, or give --regions auto",
            "table": "the table has no row for it; add one, or remove the slide",
        }
        raise InputError(f"slide {name}: no region; {remedy[config.regions]}")
    width, height = slide.size_level0_px
    canvas = Box(name="", x=0, y=0, width=width, height=height)
    for box in boxes:
        if not box.overlaps(canvas):
            raise InputError(
                f"slide {name}: region {box.name} at x {box.x}, y {box.y} lies off the slide's {width} x {height} px; "
                "regions are given in level-0 pixels"
            )
        area = box.width * box.height * (slide.mpp_level0 / config.mpp) ** 2
        if area > MAX_REGION_PX:
            raise InputError(
                f"slide {name}: region {box.name} has {area:.3g} pixels at {config.mpp:g} mpp, more than "
                f"{MAX_REGION_PX:.3g}; give smaller regions or a larger --mpp"
            )
