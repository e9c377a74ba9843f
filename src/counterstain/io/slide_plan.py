"""The plan of an import of slides: the annotations, the patient and the regions of each slide.

Places are level-0 pixels of the whole canvas.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import shapely
from pydantic import Field

from counterstain.config import Config
from counterstain.data.patches import image_key
from counterstain.errors import CounterstainWarning, InputError
from counterstain.io.annotations import first_names, slide_of
from counterstain.io.annotations.outlines import Annotation, AnnotationFile, polygonal
from counterstain.io.regions import Outline, Placed, drawn_boxes, place, place_boxes, tissue_mask
from counterstain.io.slides import Box, Slide, slide_name
from counterstain.io.table import check_name, csv_rows
from counterstain.taxonomy import BACKGROUND, IGNORE

COMPARED_REGIONS = 5
COMPARED_PX = 256  # edge of what slides of one size are compared by
ONE_BOX = 5  # points: a label of the whole slide
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
    score: str | None = None  # score of the slide
    mpp_level0: float | None = None  # micrometres per level-0 pixel of the slide, where its file does not say


def read_patients(path: str | Path, slides: Iterable[str]) -> dict[str, Patient]:
    """Read the patient of each slide from a CSV table with columns slide, patient and perhaps score and mpp_level0.

    Raises InputError where a column or a slide is missing, a field is empty, a resolution is not above 0, or a slide is
    listed twice.
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
        raise InputError(f"{path}: no row for {first_names(missing)}; add one for every slide")
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


class Shown(NamedTuple):
    """An annotation as it is painted into regions."""

    instance: int  # its number on the slide, from 1 on; the same every time the annotations are read
    label: int  # subtype, 0 = background, 255 = ignore
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
    cut: int  # annotations that reach over the edge of the scanned area and end there
    strays: tuple[str, ...]  # annotations that lie off the slide and are left out: label, id and place of each
    twice: tuple[str, ...]
    """Outlines that are there again with another meaning, which shows: both labels and the place of each."""

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
    listed: Sequence[Box] = (),
    *,
    labels: Mapping[str, int],
    config: SlidesConfig,
) -> SlidePlan:
    """Plan the import of one slide.

    ``labels`` maps labels to subtypes, 0 = background and 255 = ignore; annotations of other labels are rectangles of
    regions. ``listed`` are the slide's regions for ``regions="table"``.

    Raises InputError where the slide cannot be read, an annotation or a region lies off it, or no region is drawn or
    listed.
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
            twice=_twice(shown),
        )


def _twice(shown: Sequence[Shown]) -> tuple[str, ...]:
    polygons = np.array([s.polygon for s in shown], dtype=object)
    _, group, sizes = np.unique(
        shapely.bounds(polygons).reshape(-1, 4), axis=0, return_inverse=True, return_counts=True
    )
    alike = np.flatnonzero(sizes[group.ravel()] > 1).tolist()  # of one box; to compare all takes seconds
    shown, outlines = [shown[i] for i in alike], shapely.to_wkb(shapely.normalize(polygons[alike]))
    last = dict(zip(outlines, shown, strict=True))
    return tuple(
        f"{s.source_label!r} and {last[wkb].source_label!r} at x {s.polygon.bounds[0]:.0f}, y {s.polygon.bounds[1]:.0f}"
        for s, wkb in zip(shown, outlines, strict=True)
        if last[wkb].label != s.label
    )


def warn_of_copies(plans: Sequence[SlidePlan]) -> None:
    """Say which slides have the same outlines, as where a file of annotations was copied."""
    first: dict[frozenset[bytes], str] = {}
    copies = []
    for plan in plans:
        polygons = np.array([s.polygon for s in plan.shown], dtype=object)
        if shapely.get_num_coordinates(polygons).sum() > ONE_BOX:
            other = first.setdefault(frozenset(shapely.to_wkb(polygons)), plan.slide)
            copies += [f"{plan.slide} as {other}"] if other != plan.slide else []
    if copies:
        said = (
            f"slides that have the same outlines as another: {first_names(copies)}; was a file of annotations copied?"
        )
        warnings.warn(said, CounterstainWarning, stacklevel=3)


def slide_keys(plans: Sequence[SlidePlan]) -> list[str | None]:
    """Return for every slide a hash of its pixels at the centres of a few regions, None where it shows nothing.

    Copies have one hash, however they are compressed and described; slides of a size that no other has have none.
    """
    by_size: dict[tuple[int, int], list[SlidePlan]] = {}
    for plan in plans:
        if plan.boxes:
            by_size.setdefault(plan.size_level0_px, []).append(plan)
    keys: dict[str, str | None] = {}
    for alike in by_size.values():
        if len(alike) > 1:
            boxes = dict.fromkeys(plan.boxes[0] for plan in alike[:COMPARED_REGIONS])
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
    if not boxes and config.regions != "auto":
        remedy = {
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


def check_any(plans: Sequence[SlidePlan], config: SlidesConfig, meanings: Mapping[str, int]) -> None:
    """Raise InputError where labels stand for subtypes, but no region shows an instance of one."""
    if not any(plan.boxes for plan in plans):
        raise InputError("no slide has an instance of a subtype, so no region can be placed; give regions in a table")
    subtypes = {label for label in meanings.values() if label not in {BACKGROUND, IGNORE}}
    shown = (plan.shown[i].label for plan in plans for box in plan.boxes for i in plan.placed(box, config.mpp).shown)
    if subtypes and subtypes.isdisjoint(shown):
        raise InputError(
            "no region shows an instance of a subtype; annotations and regions are given in level-0 pixels, x first: "
            "are they in micrometres, swapped, or of other slides?"
        )


def odd_objects(plans: Sequence[SlidePlan], files: Sequence[AnnotationFile]) -> list[str]:
    """Return a line for what is odd: objects, strays, outlines twice, slides of nothing but objects left out."""
    slides, bare = [plan.slide for plan in plans], {plan.slide for plan in plans if plan.main_subtype is None}
    of_files = [(slide_of(file.path.name, slides), file) for file in files if file.skipped]
    odd = [message for file in files for message in file.odd]
    odd += [f"slide {p.slide}: {len(p.strays):,} off the slide, the first: {p.strays[0]}" for p in plans if p.strays]
    odd += [f"slide {p.slide}: one outline twice, {p.twice[0]}; the later shows" for p in plans if p.twice]
    return odd + [
        f"slide {slide} has no instance of a subtype, but {file.path.name} has "
        + ", ".join(f"{count:,} x {reason}" for reason, count in sorted(file.skipped.items()))
        for slide, file in of_files
        if slide in bare
    ]
