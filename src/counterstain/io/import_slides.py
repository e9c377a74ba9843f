"""What came of an import of slides: counts by subtype, what was repaired, cut, left out."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
from shapely import MultiPolygon, Polygon

from counterstain.config import build
from counterstain.data.cohort import Cohort, CohortWriter, Region
from counterstain.errors import InputError
from counterstain.io.annotations import Format, annotation_files, files_of_other_formats, read_annotations
from counterstain.io.annotations.outlines import Annotation, AnnotationFile
from counterstain.io.labels import MEANINGS, LabelMap, count_labels
from counterstain.io.rasterise import place, rasterise
from counterstain.io.regions import Box, read_region_table
from counterstain.io.slide_plan import Patient, SlidePlan, SlidesConfig, match_annotations, plan_slide, read_patients
from counterstain.io.slides import Slide, list_slides, slide_name
from counterstain.io.thumbnails import draw_overview
from counterstain.storage import replacing, sha256_of, write_json, write_parquet
from counterstain.taxonomy import BACKGROUND, IGNORE, Taxonomy, colours


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


# One region of a slide: its pixels, streamed, and its annotations as an instance map.


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


# Import of whole slides and their annotations into a cohort.
#
# Everything is checked before anything is written: every slide is opened, every annotation file read, every region
# placed. Regions are then written one by one, their pixels streamed from the slide, so that memory does not grow with
# the number of regions and a killed import goes on where it was.

OVERVIEW_PX = 1400

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def import_slides(
    slides: Path,
    annotations: Path,
    *,
    file_format: Format,
    labels: Path,
    mpp: float,
    out: Path,
    regions: str | Path | None = None,
    origin: str | None = None,
    patients: Path | None = None,
    types: Path | None = None,
    taxonomy: Taxonomy | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Cohort:
    """Import slides with annotations.

    Parameters
    ----------
    slides : Path
        Folder of slides, or one slide.
    annotations : Path
        Folder of annotation files, or one file; matched to slides by name.
    file_format : ``exact``, ``qupath``, ``asap`` or ``aperio``
    labels : Path
        LABELS.yaml, see :class:`counterstain.io.labels.LabelMap`.
    mpp : float
        Micrometres per pixel of the cohort.
    out : Path
        Folder of the cohort. An interrupted import into it goes on.
    regions : ``auto``, ``drawn`` or Path of a CSV table, optional
        Without it ``drawn`` where LABELS.yaml names labels of regions, ``auto`` elsewhere.
    origin : ``canvas`` or ``bounds``, optional
        What annotations count from; without it ``bounds`` for QuPath, which exports so, and ``canvas`` for others.
    patients : Path, optional
        CSV with columns slide, patient and perhaps score and mpp_level0 (before the option of that name, which holds
        for all slides); without it every slide is a patient.
    types : Path, optional
        Names of EXACT's annotation types.
    taxonomy : Taxonomy, optional
        Without it HER2's where LABELS.yaml names no other subtypes, otherwise one of the subtypes named there.
    progress : callable, optional
        As :func:`counterstain.progress.bar`.
    **options
        Further fields of :class:`~counterstain.io.slide_plan.SlidesConfig`.

    Returns
    -------
    Cohort
        With ``import.json`` (counts by subtype, what was repaired, cut, left out), ``annotations.parquet`` (which
        instance is which annotation) and ``overview/SLIDE.png``.

    Raises
    ------
    InputError
        A slide, an annotation or an option cannot be used. Nothing is written, unless a slide turns out to be damaged
        in the middle; finished regions are then kept.
    MismatchError
        ``out`` belongs to another import.
    """
    label_map = LabelMap.load(labels)
    origin = origin or ("bounds" if file_format == "qupath" else "canvas")
    settings = {"mpp": mpp, "origin": origin, "regions": _region_mode(regions, label_map), **options}
    config = build(SlidesConfig, settings, f"import of {slides}")
    paths = list_slides(slides)
    files = [read_annotations(path, file_format, types=types) for path in annotation_files(annotations, file_format)]
    taxonomy = taxonomy or _taxonomy(label_map, labels)
    meanings = label_map.resolve(count_labels(files), taxonomy, labels)
    people = read_patients(patients, paths) if patients else {name: Patient(name) for name in paths}
    table = _table(Path(str(regions))) if config.regions == "table" else {}
    matched = match_annotations(paths, files)
    plans = _plans(paths, matched, meanings=meanings, people=people, table=table, config=config)
    writer = CohortWriter(out, taxonomy=taxonomy, mpp=config.mpp, source=_source(config, meanings, files, plans))
    cohort = _write(writer, plans, config, progress or _silent)
    write_parquet(out / "annotations.parquet", annotation_table(plans, taxonomy))
    left_out = [path.name for path in files_of_other_formats(annotations, file_format)]
    write_json(out / "import.json", slides_report(cohort, plans, files, config) | {"files_of_other_formats": left_out})
    return cohort


def _region_mode(regions: str | Path | None, label_map: LabelMap) -> str:
    if regions is None:
        return "drawn" if label_map.regions else "auto"
    if str(regions) == "drawn" and not label_map.regions:
        raise InputError("--regions drawn: LABELS.yaml names no label of regions; add a line such as 'regions: [ROI]'")
    return str(regions) if str(regions) in {"auto", "drawn"} else "table"


def _taxonomy(label_map: LabelMap, source: Path) -> Taxonomy:
    """Return HER2's taxonomy where it has all subtypes that the map names, otherwise one of them in their order."""
    names = list(dict.fromkeys(meaning for meaning in label_map.labels.values() if meaning not in MEANINGS))
    her2 = Taxonomy.named("her2")
    if set(names) <= set(her2.names):
        return her2
    for name in names:
        near = difflib.get_close_matches(name.casefold(), [known.casefold() for known in her2.names], n=1, cutoff=0.8)
        if near and name not in her2.names:
            meant = next(known for known in her2.names if known.casefold() == near[0])
            raise InputError(
                f"{source}: {name!r} is none of HER2's subtypes; did you mean {meant!r}? "
                "Where it is one of your own, give all of them with --taxonomy FILE"
            )
    subtypes = [
        {"id": i, "name": name, "colour": colour}
        for i, (name, colour) in enumerate(zip(names, colours(len(names)), strict=True), start=1)
    ]
    return build(Taxonomy, {"name": source.stem[:80], "subtypes": subtypes}, source)


def _table(path: Path) -> dict[str, list[Box]]:
    boxes: dict[str, list[Box]] = {}
    for slide, listed in read_region_table(path).items():
        boxes.setdefault(slide_name(slide), []).extend(listed)
    return boxes


def _plans(
    paths: Mapping[str, Path],
    annotations: Mapping[str, Sequence[Annotation]],
    *,
    meanings: Mapping[str, int],
    people: Mapping[str, Patient],
    table: Mapping[str, Sequence[Box]],
    config: SlidesConfig,
) -> list[SlidePlan]:
    plans = []
    for name, path in paths.items():
        with Slide.open(path, people[name].mpp_level0 or config.mpp_level0) as slide:
            plans.append(
                plan_slide(
                    name,
                    slide,
                    patient=people[name],
                    annotations=annotations[name],
                    labels=meanings,
                    config=config,
                    listed=table.get(name, ()),
                )
            )
    strays = sorted(set(table) - set(paths))
    if strays:
        raise InputError(f"the table of regions names slide {strays[0]!r}, which is not among the slides; rename it")
    _check_names(plans)
    return plans


def _check_names(plans: Sequence[SlidePlan]) -> None:
    names = Counter(plan.region_name(box) for plan in plans for box in plan.boxes)
    name, count = max(names.items(), key=lambda item: item[1])
    if count > 1:
        raise InputError(f"two regions would be called {name!r}; rename one of them or its slide")


def _source(
    config: SlidesConfig, meanings: Mapping[str, int], files: Sequence[AnnotationFile], plans: Sequence[SlidePlan]
) -> dict[str, Any]:
    """Return what tells this import from another; paths are no part of it, so that data may be moved."""
    return {
        "kind": "slides",
        "options": config.model_dump(mode="json"),
        "labels": dict(sorted(meanings.items())),
        "annotations": {file.path.name: sha256_of(file.path) for file in files},
        "slides": {
            plan.slide: {
                "patient": plan.patient.patient,
                "score": plan.patient.score,
                "size_level0_px": list(plan.size_level0_px),
                "mpp_level0": plan.mpp_level0,
                "regions": [[box.name, box.x, box.y, box.width, box.height] for box in plan.boxes],
            }
            for plan in plans
        },
    }


def _write(writer: CohortWriter, plans: Sequence[SlidePlan], config: SlidesConfig, progress: Progress) -> Cohort:
    if not writer.finished:
        with progress("regions", sum(len(plan.boxes) for plan in plans)) as advance:
            for plan in plans:
                _write_slide(writer, plan, config, advance)
    return writer.finish()


def _write_slide(writer: CohortWriter, plan: SlidePlan, config: SlidesConfig, advance: Callable[[int], None]) -> None:
    picture = writer.folder / "overview" / f"{plan.slide}.png"
    missing = [box for box in plan.boxes if not writer.has(plan.region_name(box))]
    advance(len(plan.boxes) - len(missing))
    if not missing and picture.exists():
        return
    with Slide.open(plan.path, plan.mpp_level0) as slide:
        for box in missing:
            writer.add(plan.region_name(box), [read_region(slide, plan, box, taxonomy=writer.taxonomy, mpp=config.mpp)])
            advance(1)
        shown = [(s.label, s.polygon) for s in plan.shown]
        overview = draw_overview(plan.slide, slide.thumbnail(OVERVIEW_PX), plan.boxes, shown, writer.taxonomy)
    with replacing(picture) as partial:
        overview.save(partial, format="PNG")


@contextmanager
def _silent(_label: str, _total: int) -> Iterator[Callable[[int], None]]:
    yield lambda _regions: None
