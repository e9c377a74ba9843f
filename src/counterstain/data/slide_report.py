"""What came of an import of slides: counts by subtype, what was repaired, cut, left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pandas as pd

from counterstain.data.annotations import AnnotationFile
from counterstain.data.cohort import Cohort
from counterstain.data.labels import count_labels
from counterstain.data.slide_plan import SlidePlan, SlidesConfig
from counterstain.data.slide_region import region_contents
from counterstain.taxonomy import BACKGROUND, IGNORE, Taxonomy


def annotation_table(plans: Sequence[SlidePlan], taxonomy: Taxonomy) -> pd.DataFrame:
    """Return a row per annotation: which instance of which slide it became."""
    rows = [
        (plan.slide, s.instance, s.source_id, s.source_label, taxonomy.name_of(s.label))
        for plan in plans
        for s in plan.shown
    ]
    return pd.DataFrame(rows, columns=["slide", "instance", "annotation", "label", "subtype"])


def slides_report(
    cohort: Cohort, plans: Sequence[SlidePlan], files: Sequence[AnnotationFile], config: SlidesConfig
) -> dict[str, Any]:
    """Return the contents of ``import.json``."""
    return {
        "slides": len(plans),
        "patients": len({plan.patient.patient for plan in plans}),
        "regions": len(cohort),
        "origin": config.origin,
        "regions_from": config.regions,
        **_source_counts(plans, files),
        **_region_counts(cohort, plans, config),
        "slides_coarser_than_mpp": [plan.slide for plan in plans if config.mpp < 0.99 * plan.mpp_level0],
        "subtypes": _by_subtype(cohort),
    }


def _source_counts(plans: Sequence[SlidePlan], files: Sequence[AnnotationFile]) -> dict[str, Any]:
    shown = [s for plan in plans for s in plan.shown]
    skipped: Counter[str] = sum((file.skipped for file in files), Counter())
    return {
        "annotations": len(shown),
        "labels": dict(sorted(count_labels(files).items())),
        "skipped": dict(sorted(skipped.items())),
        "repaired": sum(file.repaired for file in files),
        "background": sum(s.label == BACKGROUND for s in shown),
        "ignored": sum(s.label == IGNORE for s in shown),
        "cut_at_slide_edge": sum(plan.cut for plan in plans),
    }


def _region_counts(cohort: Cohort, plans: Sequence[SlidePlan], config: SlidesConfig) -> dict[str, int]:
    contents = {plan.slide: [region_contents(plan, box, config.mpp) for box in plan.boxes] for plan in plans}
    inside = {(slide, i) for slide, regions in contents.items() for region in regions for i in region.subtypes}
    instances = {(plan.slide, s.instance) for plan in plans for s in plan.shown if s.label != BACKGROUND}
    drawn = sum(len(region.subtypes) for regions in contents.values() for region in regions)
    return {
        "cut_at_region_edge": sum(region.cut for regions in contents.values() for region in regions),
        "outside_of_regions": len(instances - inside),
        "hidden_or_smaller_than_a_pixel": drawn - len(cohort.instances),
        "regions_without_instance": int((~cohort.regions["region"].isin(cohort.instances["region"])).sum()),
        "overlapping_regions": sum(a.overlaps(b) for plan in plans for a, b in combinations(plan.boxes, 2)),
    }


def _by_subtype(cohort: Cohort) -> dict[str, dict[str, float]]:
    names = cohort.instances["subtype"].map(cohort.taxonomy.name_of)
    areas = cohort.instances["area_px"].groupby(names).agg(["size", "sum"])
    return {
        str(name): {
            "instances": int(count),
            "area_px": int(area),
            "area_mm2": round(float(area) * cohort.mpp**2 * 1e-6, 6),
        }
        for name, count, area in areas.itertuples()
    }
