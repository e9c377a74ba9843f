"""The plan of an import of slides: the annotations, the patient and the regions of each slide.

Places are level-0 pixels of the whole canvas.
"""

from __future__ import annotations

import math
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import shapely
from pydantic import Field

from counterstain.config import Config
from counterstain.data.split import image_key
from counterstain.errors import CounterstainWarning, InputError
from counterstain.io.annotations.outlines import Annotation, AnnotationFile, polygonal
from counterstain.io.regions import Outline, Placed, drawn_boxes, place, place_boxes, tissue_mask
from counterstain.io.slides import Box, Slide, slide_name
from counterstain.io.table import check_name, csv_rows
from counterstain.taxonomy import BACKGROUND, IGNORE

SHOWN_NAMES = 5
DEEPZOOM_OF_EXACT = ".dzi"  # EXACT gives some images this ending
COMPARED_PX = 256  # edge of what slides of one size are compared by
TISSUE_PX = 1024  # longer side of the thumbnail in which tissue is sought
MAX_REGION_PX = 20_000**2  # an instance map of 1.6 GB

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SlidesConfig(Config):
    """How slides and their annotations become a cohort."""

    mpp: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)]
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


@dataclass(frozen=True, slots=True)
class Patient:
    """The patient of a slide."""

    patient: str
    score: str | None = None
    """Score of the slide."""
    mpp_level0: float | None = None
    """Micrometres per level-0 pixel of the slide, where its file does not say."""


def read_patients(path: str | Path, slides: Iterable[str]) -> dict[str, Patient]:
    """Read the patient of each slide from a CSV table with columns slide, patient and perhaps score and mpp_level0.

    Raises
    ------
    InputError
        A column or a slide is missing, a field is empty, a resolution is not above 0, or a slide is listed twice.
    """
    patients: dict[str, Patient] = {}
    for where, row in csv_rows(path, ("slide", "patient"), ("score", "mpp_level0")):
        slide, patient = slide_name(row["slide"]), row["patient"]
        if not slide or not patient:
            raise InputError(f"{where}: slide or patient is empty; fill it in")
        check_name(where, "patient", patient)
        if slide in patients:
            raise InputError(f"{where}: slide {slide} is listed twice; remove one row")
        patients[slide] = Patient(patient, row.get("score") or None, _resolution(where, row.get("mpp_level0")))
    missing = [slide for slide in slides if slide not in patients]
    if missing:
        raise InputError(f"{path}: no row for {_listed(missing)}; add one for every slide")
    return patients


def _resolution(where: str, text: str | None) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"{where}: mpp_level0 {text!r}: expected micrometres per pixel above 0, such as 0.25")
    return value


def match_annotations(slides: Iterable[str], files: Sequence[AnnotationFile]) -> dict[str, list[Annotation]]:
    """Give every slide its annotations.

    A file belongs to the slide whose name it has, whatever follows after a dot (``a.svs`` and ``a.qupath.json``); if
    several fit, to the slide with the longest name. Annotations that name their slide, as EXACT's do, belong to it.

    Raises
    ------
    InputError
        A slide without annotations or annotations without a slide; lists the names of both sides.
    """
    matched: dict[str, list[Annotation]] = {slide: [] for slide in slides}
    found: dict[str, list[str]] = {}  # files of each slide
    strays: set[str] = set()
    for file in files:
        for source in file.slides or (None,):
            name = source or file.path.name
            slide = _slide_of(name, matched)
            if slide is None:
                strays.add(name)
            else:
                _check_repeated(
                    slide, found.setdefault(slide, []), file.path.name, matched[slide], file.of_slide(source)
                )
                matched[slide].extend(file.of_slide(source))
    bare = matched.keys() - found.keys()
    if bare or strays:
        raise InputError(
            "slides and annotations do not match: "
            + ", ".join(f"no {what} for {_listed(of)}" for what, of in (("annotations", bare), ("slide", strays)) if of)
            + "; give both the same name, or move files that are not to be imported to another folder"
        )
    return matched


def _check_repeated(
    slide: str, before: list[str], name: str, known: Sequence[Annotation], more: Sequence[Annotation]
) -> None:
    """Say that a slide has a further file of annotations; raise InputError where an outline is in both."""
    if before and name not in before:
        outlines = {(a.label, a.polygon.wkb) for a in known}
        twice = sum((a.label, a.polygon.wkb) in outlines for a in more)
        if twice:
            raise InputError(
                f"slide {slide}: {name} repeats {twice} outlines of {before[0]}; move the older file to another folder"
            )
        warnings.warn(
            f"slide {slide} has several files of annotations, {', '.join([*before, name])}; all are imported",
            CounterstainWarning,
            stacklevel=2,
        )
    before.append(name)


def _slide_of(name: str, slides: Iterable[str]) -> str | None:
    """Return the longest slide's name that ``name`` is or continues after a dot."""
    name = unicodedata.normalize("NFC", name)
    bare = slide_name(name.removesuffix(DEEPZOOM_OF_EXACT))
    return max((s for s in slides if bare == s or name.startswith(f"{s}.")), key=len, default=None)


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


class Shown(NamedTuple):
    """An annotation as it is painted into regions."""

    instance: int
    """Its number on the slide, from 1 on; the same every time the annotations are read."""
    label: int
    """Subtype, 0 = background, 255 = ignore."""
    source_id: str
    source_label: str
    polygon: Outline


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
    strays: tuple[str, ...]
    """Annotations that lie off the slide and are left out: label, id and place of each."""

    def region_name(self, box: Box) -> str:
        """Return what a region of the slide is called in the cohort."""
        return f"{self.slide}-{box.name}"

    @property
    def main_subtype(self) -> int | None:
        """The subtype with the largest annotated area: the score of a slide for which none is given."""
        areas = _areas(self.shown)
        return max(areas, key=lambda label: (areas[label], -label)) if areas else None

    def placed(self, box: Box, mpp: float) -> Placed:
        """Place what is shown in one of the slide's regions, ``mpp`` micrometres per pixel."""
        return place([s.polygon for s in self.shown], box, mpp / self.mpp_level0)


def _areas(shown: Sequence[Shown]) -> dict[int, float]:
    """Return the annotated area of every subtype in square level-0 pixels."""
    areas: dict[int, float] = {}
    for s in shown:
        if s.label not in {BACKGROUND, IGNORE}:
            areas[s.label] = areas.get(s.label, 0.0) + s.polygon.area
    return areas


def plan_slide(
    name: str,
    path: Path,
    patient: Patient,
    annotations: Sequence[Annotation],
    *,
    labels: Mapping[str, int],
    config: SlidesConfig,
    listed: Sequence[Box] = (),
) -> SlidePlan:
    """Plan the import of one slide.

    ``labels`` maps labels to subtypes, 0 = background and 255 = ignore; annotations of other labels are rectangles of
    regions. ``listed`` are the slide's regions for ``regions="table"``.

    Raises
    ------
    InputError
        The slide cannot be read, an annotation or a region lies off it, or there is no region.
    """
    given_by = "the patients table's mpp_level0" if patient.mpp_level0 else "--mpp-level0"
    with Slide.open(path, patient.mpp_level0 or config.mpp_level0, given_by) as slide:
        extent = Box(*slide.bounds_level0_px)
        moved = _moved(annotations, (extent.x, extent.y)) if config.origin == "bounds" else annotations
        moved, strays = _on_slide(name, moved, extent, config)
        instances = [a for a in moved if a.label in labels]
        shown = _shown(instances, labels, extent.polygon)
        boxes = list(listed)
        if config.regions == "auto":
            boxes = _placed_boxes(slide, shown, config)
        elif config.regions == "drawn":
            boxes = drawn_boxes(name, [a.polygon for a in moved if a.label not in labels])
        _check_boxes(name, boxes, slide, config)
        return SlidePlan(
            slide=name,
            path=path,
            patient=patient,
            mpp_level0=slide.mpp_level0,
            size_level0_px=slide.size_level0_px,
            boxes=tuple(boxes),
            shown=shown,
            cut=sum(not extent.polygon.covers(a.polygon) for a in instances),
            strays=strays,
        )


def slide_keys(plans: Sequence[SlidePlan]) -> list[str | None]:
    """Return for every slide a hash of its pixels at the centres of a few regions, None where it shows nothing.

    Copies have one hash, however they are compressed and described; slides of a size that no other has have none.
    """
    by_size: dict[tuple[int, int], list[SlidePlan]] = {}
    for plan in plans:
        by_size.setdefault(plan.size_level0_px, []).append(plan)
    keys: dict[str, str | None] = {}
    for alike in by_size.values():
        if len(alike) > 1:
            boxes = dict.fromkeys(plan.boxes[0] for plan in alike[:SHOWN_NAMES])
            for plan in alike:
                with Slide.open(plan.path, plan.mpp_level0, given_by="") as slide:
                    keys[plan.slide] = image_key(np.concatenate([_centre(slide, box) for box in boxes]))
    return [keys.get(plan.slide) for plan in plans]


def _centre(slide: Slide, box: Box) -> np.ndarray:
    x, y = (start + (side - COMPARED_PX) // 2 for start, side in ((box.x, box.width), (box.y, box.height)))
    return slide.read(x, y, COMPARED_PX, COMPARED_PX, slide.mpp_level0)


def _shown(instances: Sequence[Annotation], labels: Mapping[str, int], area: shapely.Polygon) -> tuple[Shown, ...]:
    """Return annotations as they are painted: numbered, and cut at the edge of the scanned area."""
    within = [a.polygon if area.covers(a.polygon) else polygonal(a.polygon.intersection(area)) for a in instances]
    return tuple(
        Shown(number, labels[a.label], a.id, a.label, polygon)
        for number, (a, polygon) in enumerate(zip(instances, within, strict=True), start=1)
        if polygon is not None
    )


def _moved(annotations: Sequence[Annotation], offset_xy: tuple[int, int]) -> list[Annotation]:
    polygons = np.array([a.polygon for a in annotations], dtype=object)
    moved = shapely.transform(polygons, lambda xy: np.add(xy, offset_xy))
    return [replace(a, polygon=polygon) for a, polygon in zip(annotations, moved, strict=True)]


def _on_slide(
    name: str, annotations: Sequence[Annotation], extent: Box, config: SlidesConfig
) -> tuple[list[Annotation], tuple[str, ...]]:
    """Return the annotations that lie on the slide, and a word on each that does not.

    Raises InputError where most are off the slide, or where the other origin would put more of them on it.
    """
    outside = _outside(annotations, extent)
    strays = [a for a, off in zip(annotations, outside, strict=True) if off]
    if not strays:
        return list(annotations), ()
    places = tuple(
        f"{a.label!r}, id {a.id}, at x {a.polygon.bounds[0]:.0f}, y {a.polygon.bounds[1]:.0f}" for a in strays
    )
    sign = -1 if config.origin == "bounds" else 1
    if sum(_outside(_moved(annotations, (sign * extent.x, sign * extent.y)), extent)) < len(strays):
        other = "canvas" if config.origin == "bounds" else "bounds"
        remedy = f"the scanned area begins at x {extent.x}, y {extent.y}: try --origin {other}"
    elif 2 * len(strays) > len(annotations):
        remedy = "they belong to another slide or another level of it"
    else:
        return [a for a, off in zip(annotations, outside, strict=True) if not off], places
    raise InputError(
        f"slide {name}: {len(strays)} of {len(annotations)} annotations lie off the slide's {extent.width} x "
        f"{extent.height} px (the first: {places[0]}); {remedy}"
    )


def _outside(annotations: Sequence[Annotation], extent: Box) -> list[bool]:
    area = extent.polygon
    return [not a.polygon.intersects(area) or a.polygon.touches(area) for a in annotations]


def _placed_boxes(slide: Slide, shown: Sequence[Shown], config: SlidesConfig) -> list[Box]:
    tumour = [s for s in shown if s.label not in {BACKGROUND, IGNORE}]
    areas = _areas(tumour)
    return place_boxes(
        [s.polygon for s in tumour],
        count=config.regions_per_slide,
        edge=max(1, round(config.region_size_um / slide.mpp_level0)),
        extent=Box(*slide.bounds_level0_px),
        # Every subtype of the slide counts the same in all; otherwise regions go where the commonest subtype is.
        weights=[1 / areas[s.label] for s in tumour],
        tissue=tissue_mask(slide.thumbnail(TISSUE_PX).image),
    )


def _check_boxes(name: str, boxes: Sequence[Box], slide: Slide, config: SlidesConfig) -> None:
    if not boxes:
        remedy = {
            "auto": "it has no instance of a subtype; remove the slide, or give regions in a table",
            "drawn": "none of its annotations has a label of a region; draw one, or give --regions auto",
            "table": "the table has no row for it; add one, or remove the slide",
        }
        raise InputError(f"slide {name}: no region; {remedy[config.regions]}")
    width, height = slide.size_level0_px
    for box in boxes:
        if not box.overlaps(Box(0, 0, width, height)):
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
