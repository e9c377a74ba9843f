"""Import of whole slides and their annotations into a cohort.

Everything is checked before anything is written: every slide is opened, every annotation file read, every region
placed. Regions are then written one by one, their pixels streamed from the slide, so that memory does not grow with
the number of regions and an interrupted import continues where it stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import shapely
from PIL import Image, ImageDraw, ImageFont, ImageOps

from counterstain.config import build
from counterstain.data.cohort import Cohort, CohortWriter
from counterstain.data.region_store import Region
from counterstain.data.split import same_patient
from counterstain.errors import InputError, MismatchError
from counterstain.io.annotations import Format, files_of_other_formats, match_annotations, read_all
from counterstain.io.annotations.json_formats import ANNOTATION
from counterstain.io.annotations.outlines import AnnotationFile
from counterstain.io.import_images import patients_behind, repeated_images
from counterstain.io.labels import LabelMap, count_labels, count_skipped, taxonomy_of_labels
from counterstain.io.regions import InstanceWindow, Outline, read_region_table
from counterstain.io.slide_plan import (
    Patient,
    SlidePlan,
    SlidesConfig,
    check_any,
    odd_objects,
    plan_slide,
    read_patients,
    slide_keys,
    warn_of_copies,
)
from counterstain.io.slides import Box, Slide, Thumbnail, list_slides
from counterstain.processes import ExecutorConfig, Map, shared_out
from counterstain.progress import Progress, silent
from counterstain.storage import file_identity, read_json, replacing, sha256_of, write_json, write_parquet
from counterstain.taxonomy import BACKGROUND, IGNORE, Taxonomy, alike, first_alike

SLIDES_FILE = "slides.json"  # what the slides were when the import began
CHANGES = {"bytes": "its size", "sample": "its content", "modified": "the time of its last change"}
HELD_PX = 2**24  # pixels of a map of instances that is painted at once
OVERVIEW_PX = 1400
OPACITY = 110  # of 255
MARGIN_PX = 12
LINE_PX = 22
FONT_PX = 15
INK = (20, 20, 20)


def import_slides(
    slides: str | Path,
    annotations: str | Path,
    *,
    file_format: Format,
    labels: str | Path,
    mpp: float,
    out: str | Path,
    regions: str | Path | None = None,
    origin: str | None = None,
    patients: str | Path | None = None,
    types: str | Path | None = None,
    objects: Collection[str] = (ANNOTATION,),
    taxonomy: Taxonomy | None = None,
    merge: str | None = None,
    progress: Progress | None = None,
    executor: ExecutorConfig | None = None,
    **options: Any,
) -> Cohort:
    """Import slides with annotations; see :func:`counterstain.import_slides` for the parameters.

    ``options`` are further fields of :class:`~counterstain.io.slide_plan.SlidesConfig`; ``mpp_level0`` of the table of
    patients overrules the option of that name, which is the same for all slides. With an ``executor``, slides are read
    in several processes or on a cluster, whose machines share all folders; the cohort is the same to the byte. Beside
    it lie ``import.json`` (counts by subtype, and what was repaired, cut or skipped), ``annotations.parquet`` (the
    instance that each annotation became) and ``overview/SLIDE.png``.

    Raises InputError where a slide, an annotation or an option cannot be used; MismatchError where ``out`` belongs to
    another import, or a slide is no longer the file that it was. Nothing is written, unless damage to a slide shows
    only while its pixels are read; finished regions are then kept.
    """
    labels, out = Path(labels), Path(out)
    label_map = LabelMap.load(labels)
    origin = origin or ("bounds" if file_format == "qupath" else "canvas")
    settings = {"mpp": mpp, "origin": origin, "regions": _region_mode(regions, label_map), **options}
    config = build(SlidesConfig, settings, f"import of {slides}")
    paths = list_slides(slides)
    identities = {name: _identity(path) for name, path in paths.items()}
    files = read_all(annotations, file_format, types=types, objects=objects)
    taxonomy = taxonomy or taxonomy_of_labels(label_map, labels)
    meanings = label_map.resolve(count_labels(files), taxonomy, labels)
    if merge:
        lookup, taxonomy = taxonomy.merge_lookup(merge), taxonomy.merged(merge)
        meanings = {label: int(lookup[subtype]) for label, subtype in meanings.items()}
    people = _people(Path(slides), patients, paths)
    _check_copies(paths)
    table = read_region_table(str(regions)) if config.regions == "table" else {}
    matched = match_annotations(paths, files)
    jobs = [(name, path, people[name], matched[name], table.get(name, ())) for name, path in paths.items()]
    with shared_out(executor or ExecutorConfig()) as spread:
        plans = list(spread(partial(plan_slide, labels=meanings, config=config), *zip(*jobs, strict=True)))
        check_any(plans, config, meanings)
        _check_names(paths, table, plans)
        warn_of_copies(plans)
        repeated = _repeated(Path(patients or slides), plans)
        source = _source(config, meanings, files, plans, set(objects))
        if patients and (behind := patients_behind(Path(patients))):  # of generated images that were exported
            source["patients_seen"] = sorted(behind)
        writer = CohortWriter(out, taxonomy=taxonomy, mpp=config.mpp, source=source)
        _check_unchanged(out, identities)
        if not writer.finished:
            write_json(out / SLIDES_FILE, identities)
            _write_slides(writer, plans, config, spread, progress or silent)
    cohort = writer.finish(sum(len(plan.boxes) for plan in plans))
    write_parquet(out / "annotations.parquet", _annotation_table(plans, taxonomy))
    alone = len(paths) if len(paths) > 1 and not patients else 0
    left_out = [path.name for path in files_of_other_formats(annotations, file_format)]
    more = {"files_of_other_formats": left_out, "slides_as_patients": alone}
    write_json(out / "import.json", _report(cohort, plans, files, config) | more | repeated)
    return cohort


def _people(slides: Path, patients: str | Path | None, paths: Mapping[str, Path]) -> Mapping[str, Patient]:
    """Return each slide's patient; raise InputError where two, or two scores, are probably one."""
    people = read_patients(patients, paths) if patients else {name: Patient(name) for name in paths}
    if found := same_patient(people[name].patient for name in paths):
        remedy = "use one spelling" if patients else "give their patients with --patients"
        raise InputError(f"{patients or slides}: patients {found[0]!r} and {found[1]!r} are probably one; {remedy}")
    if found := alike((people[name].score or "" for name in paths), near=False):
        raise InputError(f"{patients}: scores {found[0]!r} and {found[1]!r} are probably one; use one spelling")
    return people


def _identity(path: Path) -> dict[str, dict[str, Any]]:
    """Return what tells the files of a slide from others of their names, by name."""
    files = sorted(path.parent.glob("*.dcm")) if path.suffix.lower() == ".dcm" else [path]
    return {file.name: file_identity(file) for file in files}


def _check_unchanged(out: Path, identities: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise MismatchError where a slide is not the file that the import in ``out`` began with."""
    known = read_json(out / SLIDES_FILE) if (out / SLIDES_FILE).exists() else {}  # earlier versions have no such file
    for slide, now in identities.items():
        before = known.get(slide, now)
        for file in sorted(before.keys() | now.keys()):
            was, is_now = before.get(file, {}), now.get(file, {})
            differs = next((what for what in CHANGES if was.get(what) != is_now.get(what)), None)
            if differs is not None:
                remedy = "give another output folder, or delete that one to import the slide as it is now"
                if differs == "modified" and "modified" in was:
                    seconds, rest = divmod(was["modified"], 10**9)
                    remedy += f"; if it is the same, set its time back: touch -d @{seconds}.{rest:09} {file}"
                raise MismatchError(
                    f"slide {slide}: {file} is not the file that {out} was imported from: {CHANGES[differs]} differs; "
                    f"{remedy}"
                )


def _region_mode(regions: str | Path | None, label_map: LabelMap) -> str:
    if regions is None:
        return "drawn" if label_map.regions else "auto"
    if str(regions) == "drawn" and not label_map.regions:
        raise InputError("--regions drawn: LABELS.yaml names no label of regions; add a line such as 'regions: [ROI]'")
    return str(regions) if str(regions) in {"auto", "drawn"} else "table"


def _check_copies(paths: Mapping[str, Path]) -> None:
    """Raise InputError where two slides are one file; only files of one size are read for that."""
    described = {
        n: path.with_suffix("") / "Slidedat.ini" if path.suffix == ".mrxs" else path for n, path in paths.items()
    }
    sizes = Counter(file.stat().st_size for file in described.values() if file.is_file())
    same = {name: file for name, file in described.items() if file.is_file() and sizes[file.stat().st_size] > 1}
    if found := first_alike(same, lambda name: sha256_of(same[name])):
        first, second = (paths[name] for name in found)
        raise InputError(f"{second}: is the same slide as {first.name}; remove one, so that its tissue counts once")


def _repeated(where: Path, plans: Sequence[SlidePlan]) -> dict[str, Any]:
    """Return what :func:`repeated_images` finds among the slides."""
    rows = [(f"slide {plan.slide}", plan.patient.patient, plan.path, None) for plan in plans]
    frame = pd.DataFrame(rows, columns=["row", "patient", "image", "split"])
    return repeated_images(where, frame, pd.Series(slide_keys(plans)))


def _check_names(paths: Mapping[str, Path], table: Mapping[str, Sequence[Box]], plans: Sequence[SlidePlan]) -> None:
    strays = sorted(set(table) - set(paths))
    if strays:
        raise InputError(f"the table of regions names slide {strays[0]!r}, which is not among the slides; rename it")
    names = Counter(plan.region_name(box) for plan in plans for box in plan.boxes)
    name, count = names.most_common(1)[0]
    if count > 1:
        raise InputError(f"two regions would be called {name!r}; rename one of them or its slide")


def _source(
    config: SlidesConfig,
    meanings: Mapping[str, int],
    files: Sequence[AnnotationFile],
    plans: Sequence[SlidePlan],
    objects: set[str],
) -> dict[str, Any]:
    """Return what distinguishes this import from another; paths do not count, so that data may be moved."""
    # Cohorts of version 0.1 say nothing of curves and of objects.
    says_more = any(file.splines or file.of_other_types for file in files) or objects != {ANNOTATION}
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
        **({"splines": "curves", "objects": sorted(objects)} if says_more else {}),
    }


def _write_slides(
    writer: CohortWriter, plans: Sequence[SlidePlan], config: SlidesConfig, spread: Map, progress: Progress
) -> None:
    names = [plan.region_name(box) for plan in plans for box in plan.boxes]
    kept = sum(map(writer.has, names))
    with progress(f"regions, {kept:,} of them from before" if kept else "regions", len(names)) as advance:
        is_here = spread is map  # only then can it be told of single regions
        write = partial(_write_slide, writer, config, advance if is_here else None)
        for plan, _ in zip(plans, spread(write, plans), strict=True):
            if not is_here:
                advance(len(plan.boxes))


def _write_slide(
    writer: CohortWriter, config: SlidesConfig, advance: Callable[[int], None] | None, plan: SlidePlan
) -> None:
    picture = writer.folder / "overview" / f"{plan.slide}.png"
    advance = advance or (lambda _: None)
    missing = [box for box in plan.boxes if not writer.has(plan.region_name(box))]
    advance(len(plan.boxes) - len(missing))
    if missing or not picture.exists():
        with Slide.open(plan.path, plan.mpp_level0, given_by="") as slide:
            for box in missing:
                writer.add(plan.region_name(box), [read_region(slide, plan, box, writer.taxonomy, config.mpp)])
                advance(1)
            overview = _overview(slide, plan, writer.taxonomy)
        with replacing(picture) as beside:
            overview.save(beside, format="PNG", compress_level=4)  # half the time of 6, 4 % larger
    _check_unchanged(writer.folder, {plan.slide: _identity(plan.path)})


def read_region(slide: Slide, plan: SlidePlan, box: Box, taxonomy: Taxonomy, mpp: float) -> Region:
    """Return a region as it enters a cohort; its image is read while it is written."""
    window = slide.window(box, mpp)
    height, width, _ = window.shape
    placed = plan.placed(box, mpp)
    shown = [plan.shown[index] for index in placed.shown]
    ids = [BACKGROUND if s.label == BACKGROUND else s.instance for s in shown]
    outlines = InstanceWindow(list(zip(ids, placed.polygons, strict=True)), (height, width))
    main = plan.main_subtype
    return Region(
        region=plan.region_name(box),
        slide=plan.slide,
        patient=plan.patient.patient,
        image=window,
        instances=outlines if height * width > HELD_PX else outlines.read(0, 0, height, width),
        subtypes={s.instance: s.label for s in shown if s.label != BACKGROUND},
        score=plan.patient.score or (None if main is None else taxonomy.name_of(main)),
        mpp_level0=plan.mpp_level0,
        origin_xy_level0_px=(box.x, box.y),
    )


def _annotation_table(plans: Sequence[SlidePlan], taxonomy: Taxonomy) -> pd.DataFrame:
    """Return a row per annotation: the slide and the instance that it became."""
    name_of = taxonomy.name_of
    rows = [(p.slide, s.instance, s.source_id, s.source_label, name_of(s.label)) for p in plans for s in p.shown]
    return pd.DataFrame(rows, columns=["slide", "instance", "annotation", "label", "subtype"])


def _report(
    cohort: Cohort, plans: Sequence[SlidePlan], files: Sequence[AnnotationFile], config: SlidesConfig
) -> dict[str, Any]:
    shown = [s for plan in plans for s in plan.shown]
    return {
        "slides": cohort.regions["slide"].nunique(),
        "patients": cohort.regions["patient"].nunique(),
        "regions": len(cohort),
        "origin": config.origin,
        "regions_from": config.regions,
        "annotations": len(shown),
        "labels": dict(sorted(count_labels(files).items())),
        "skipped": dict(sorted(count_skipped(files).items())),
        "skipped_by_file": {file.path.name: dict(sorted(file.skipped.items())) for file in files if file.skipped},
        "odd": odd_objects(plans, files),
        "splines": sum(file.splines for file in files),
        "repaired": sum(file.repaired for file in files),
        "background": sum(s.label == BACKGROUND for s in shown),
        "ignored": sum(s.label == IGNORE for s in shown),
        "cut_at_slide_edge": sum(plan.cut for plan in plans),
        "off_the_slide": sum(len(plan.strays) for plan in plans),
        "outlines_of_two_classes": sum(len(plan.twice) for plan in plans),
        "slides_without_region": [plan.slide for plan in plans if not plan.boxes],
        **_region_counts(cohort, plans, config),
        "slides_coarser_than_mpp": [plan.slide for plan in plans if config.mpp < 0.99 * plan.mpp_level0],
        "subtypes": _by_subtype(cohort),
    }


def _region_counts(cohort: Cohort, plans: Sequence[SlidePlan], config: SlidesConfig) -> dict[str, int]:
    placed = [(plan, plan.placed(box, config.mpp)) for plan in plans for box in plan.boxes]
    instances = {(plan.slide, s.instance) for plan in plans for s in plan.shown if s.label != BACKGROUND}
    drawn = [(plan.slide, plan.shown[index].instance) for plan, region in placed for index in region.shown]
    drawn = [instance for instance in drawn if instance in instances]
    return {
        "cut_at_region_edge": sum(region.cut for _, region in placed),
        "outside_of_regions": len(instances - set(drawn)),
        "hidden_or_smaller_than_a_pixel": len(drawn) - len(cohort.instances),
        "regions_without_instance": int((~cohort.regions["region"].isin(cohort.instances["region"])).sum()),
        "overlapping_regions": sum(a.overlaps(b) for plan in plans for a, b in combinations(plan.boxes, 2)),
    }


def _by_subtype(cohort: Cohort) -> dict[str, dict[str, float]]:
    names = cohort.instances["subtype"].map(cohort.taxonomy.name_of)
    areas = cohort.instances["area_px"].groupby(names).agg(["size", "sum"])
    return {
        str(name): {"instances": int(count), "area_px": int(area), "area_mm2": round(area * cohort.mpp**2 * 1e-6, 6)}
        for name, count, area in areas.itertuples()
    }


def _overview(slide: Slide, plan: SlidePlan, taxonomy: Taxonomy) -> Image.Image:
    """Draw instances, largest first, and regions on a thumbnail, with a legend beside it."""
    thumbnail = slide.thumbnail(OVERVIEW_PX)
    picture = _painted(thumbnail, plan, taxonomy)
    counts = Counter(s.label for s in plan.shown)
    labels = [label for label in (*(s.id for s in taxonomy.subtypes), BACKGROUND, IGNORE) if counts[label]]
    lines: list[tuple[str, int | None]] = [(plan.slide, None), (f"{len(plan.boxes)} regions", None)]
    lines += [(f"{taxonomy.name_of(label)}: {counts[label]:,}", label) for label in labels]
    font = ImageFont.load_default(FONT_PX)
    width = MARGIN_PX * 2 + LINE_PX + int(max(font.getlength(text) for text, _ in lines))
    below = max(0, MARGIN_PX * 2 + LINE_PX * len(lines) - picture.height)
    canvas = ImageOps.expand(picture, (0, 0, width, below), "white")
    draw = ImageDraw.Draw(canvas)
    for box in plan.boxes:
        x0, y0, x1, y1 = _on(thumbnail, box.polygon).bounds
        draw.rectangle((x0, y0, x1, y1), outline=INK, width=2)
        draw.text((x0 + 4, y0 + 3), box.name, fill=INK, font=font, stroke_width=2, stroke_fill="white")
    for number, (text, label) in enumerate(lines):
        left, top = picture.width + MARGIN_PX, MARGIN_PX + number * LINE_PX
        if label is not None:
            draw.rectangle((left, top + 2, left + 13, top + 15), fill=_colour(label, taxonomy))
        draw.text((left + LINE_PX * (label is not None), top), text, fill=INK, font=font)
    return canvas


def _painted(thumbnail: Thumbnail, plan: SlidePlan, taxonomy: Taxonomy) -> Image.Image:
    base = Image.fromarray(thumbnail.image).convert("RGBA")
    layer = Image.new("RGBA", base.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    for s in sorted(plan.shown, key=lambda s: -s.polygon.area):
        colour = _colour(s.label, taxonomy)
        for part in shapely.get_parts(_on(thumbnail, s.polygon)):
            draw.polygon(part.exterior.coords, fill=(*colour, OPACITY), outline=(*colour, 255))
            for hole in part.interiors:
                draw.polygon(hole.coords, fill=(0, 0, 0, 0), outline=(*colour, 255))
    return Image.alpha_composite(base, layer).convert("RGB")


def _on(thumbnail: Thumbnail, polygon: Outline) -> Outline:
    corner = (thumbnail.x_level0_px, thumbnail.y_level0_px)
    return shapely.transform(polygon, lambda xy: (xy - corner) / thumbnail.downsample)


def _colour(label: int, taxonomy: Taxonomy) -> tuple[int, int, int]:
    red, green, blue = (110, 110, 110) if label in {BACKGROUND, IGNORE} else taxonomy.palette[label].tolist()
    return red, green, blue
