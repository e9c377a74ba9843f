"""One region of a slide: its pixels, streamed, and its annotations as an instance map."""

from __future__ import annotations

from dataclasses import dataclass

from shapely import MultiPolygon, Polygon

from counterstain.data.annotations import Annotation
from counterstain.data.cohort import Region
from counterstain.data.rasterise import place, rasterise
from counterstain.data.regions import Box
from counterstain.data.slide_plan import SlidePlan
from counterstain.data.slides import Slide
from counterstain.taxonomy import BACKGROUND, Taxonomy


@dataclass(frozen=True, slots=True)
class Contents:
    """What a region shows."""

    painted: list[tuple[int, Polygon | MultiPolygon]]
    """Instance and polygon in region pixels; instance 0 paints background."""
    subtypes: dict[int, int]
    """Subtype of every instance, 255 = ignore."""
    cut: int
    """Annotations that reach over the region's edge."""


def region_contents(plan: SlidePlan, box: Box, mpp: float) -> Contents:
    """Place the annotations of a slide in one of its regions."""
    numbered = [Annotation(id=str(s.instance), label=s.source_label, polygon=s.polygon) for s in plan.shown]
    placed = place(numbered, (box.x, box.y, box.width, box.height), mpp / plan.mpp_level0)
    labels = {str(s.instance): s.label for s in plan.shown}
    painted, subtypes = [], {}
    for annotation, polygon in zip(placed.annotations, placed.polygons, strict=True):
        label = labels[annotation.id]
        painted.append((BACKGROUND if label == BACKGROUND else int(annotation.id), polygon))
        if label != BACKGROUND:
            subtypes[int(annotation.id)] = label
    return Contents(painted, subtypes, placed.cut)


def read_region(slide: Slide, plan: SlidePlan, box: Box, *, taxonomy: Taxonomy, mpp: float) -> Region:
    """Return a region as it enters a cohort; its image is read while it is written."""
    window = slide.window(box, mpp)
    height, width, _ = window.shape
    contents = region_contents(plan, box, mpp)
    return Region(
        region=plan.region_name(box),
        slide=plan.slide,
        patient=plan.patient.patient,
        image=window,
        instances=rasterise(contents.painted, (height, width)),
        subtypes=contents.subtypes,
        score=plan.patient.score or _commonest(plan, taxonomy),
        mpp_level0=plan.mpp_level0,
        origin_xy_level0_px=(box.x, box.y),
    )


def _commonest(plan: SlidePlan, taxonomy: Taxonomy) -> str | None:
    """Return the subtype with the largest area on the slide: a score for slides that have none."""
    areas = plan.areas_level0_px
    return taxonomy.name_of(max(areas, key=lambda label: (areas[label], -label))) if areas else None
