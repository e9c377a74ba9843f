"""What the commands print of their results, and what to do next."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from counterstain.cli.terminal import echo, print_table, warn
from counterstain.progress import counted

if TYPE_CHECKING:
    import pandas as pd

    from counterstain.audit.fidelity import Interval
    from counterstain.audit.findings import Audit
    from counterstain.audit.trace_result import Trace
    from counterstain.data.cohort import Cohort
    from counterstain.data.patch_set import PatchSet
    from counterstain.discovery.discover import Discovery
    from counterstain.segmentation.predict import Prediction

Arguments = dict[str, Any]
STARTED = time.time() - 1  # file systems may count in seconds
SHOWN = 20  # running and failed cells


def pasted(path: Any) -> str:
    """Return a path as a shell reads it: in quotes where it has spaces."""
    return shlex.quote(str(path))


def recipe_options(arguments: Arguments) -> str:
    """Return the options that chose a recipe, for a command that goes on from there."""
    options = [f" --{name} {pasted(arguments[name])}" for name in ("preset", "config") if arguments.get(name)]
    return "".join((*options, *(f" --set {pasted(setting)}" for setting in arguments.get("settings") or ())))


def text(text: str, _: Arguments) -> None:
    """Print a text that ends its last line."""
    echo(text, nl=False)


def json_text(content: dict[str, Any], _: Arguments) -> None:
    """Print a schema."""
    echo(json.dumps(content, indent=2))


def phantom(cohort: Cohort, arguments: Arguments) -> None:
    """Print what a phantom is made of."""
    regions = cohort.regions
    share = int(cohort.instances["area_px"].sum()) / int((regions["height_px"] * regions["width_px"]).sum())
    echo(
        f"{cohort.folder}: {arguments['slides']} slides, {len(cohort)} regions of {arguments['size_px']} px at "
        f"{cohort.mpp:g} mpp, {len(cohort.instances)} instances, {share:.0%} tumour"
    )
    echo(f"next: counterstain split {pasted(cohort.folder)}")


SMALLEST_PATCH_PX = 32  # what networks take
IMPORT_LINES = {  # by the entries of import.json
    "slides_as_patients": "no --patients: each of {} slides is a patient; give --patients if one has several slides",
    "repeated_images": "{} images are there once more: their tissue counts twice",
    "dropped_components": "dropped {} components of {dropped_px} px in all",
    "splines": "{} splines are drawn as the curves that ASAP shows",
    "repaired": "{} outlines crossed themselves and were repaired",
    "cut_at_slide_edge": "{} annotations reach over the edge of their slide and were cut there",
    "cut_at_region_edge": "{} annotations reach over the edge of a region and were cut there",
    "off_the_slide": "{} annotations lie off their slide and were left out",
    "outlines_of_two_classes": "{} outlines are there twice with two meanings: the later one shows",
    "outside_of_regions": "{} annotations lie outside all regions",
    "hidden_or_smaller_than_a_pixel": "{} instances are hidden by others or smaller than a pixel",
    "background": "{} annotations are background",
    "ignored": "{} annotations are ignored",
    "regions_without_instance": "{} regions have no instance",
    "overlapping_regions": "{} pairs of regions overlap: tissue that both show counts twice",
}
CORNERS = {"canvas": "whole canvas", "bounds": "scanned area"}


def imported(cohort: Cohort, _: Arguments) -> None:
    """Print what came of an import of a table or of slides."""
    from counterstain.data.composition import missing_subtypes, tissue_shares
    from counterstain.storage import read_json

    found = read_json(cohort.folder / "import.json")
    of_slides = "origin" in found
    if of_slides:
        echo(f"annotations count from the corner of the {CORNERS[found['origin']]} (--origin {found['origin']})")
    if masks := found.get("masks"):
        echo("masks: " + ", ".join(f"{count:,} {kind}" for kind, count in masks.items()))
    for name, line in IMPORT_LINES.items():
        if found.get(name):
            echo(line.format(f"{found[name]:,}", **found))
    for reason, count in found.get("left_out", {}).items():
        echo(f"left out: {count:,} x {reason}")
    if of_slides:
        _show_left_out(found, cohort)
    splits(cohort)
    _show_subtypes(cohort)
    shares = ", ".join(f"{name} {share:.1%}" for name, share in tissue_shares(cohort).items())
    echo(f"share of tissue in the regions that show it: {shares} (inverted masks would show here)")
    for line in (*missing_subtypes(cohort), *_small_regions(cohort)):
        warn(line)
    unsplit = cohort.regions["split"].isna().all()
    echo(f"next: counterstain {'split' if unsplit else 'inspect'} {pasted(cohort.folder)}")


def _small_regions(cohort: Cohort) -> list[str]:
    edges = cohort.regions.set_index("region")[["height_px", "width_px"]].min(axis=1)
    small = edges[edges < SMALLEST_PATCH_PX]
    if small.empty:
        return []
    more = f" and {len(small) - 1:,} more" if len(small) > 1 else ""
    return [f"region {small.index[0]}{more}: smaller than any patch ({SMALLEST_PATCH_PX} px); leave it out"]


def _show_left_out(found: Arguments, cohort: Cohort) -> None:
    from counterstain.io.annotations import first_names

    for reason, count in found["skipped"].items():
        echo(f"left out: {count:,} x {reason}")
    for message in found["odd"][:SHOWN]:
        warn(message)
    if others := found["files_of_other_formats"]:
        more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
        warn(f"{others[0]}{more}: another format, left out")
    if bare := found["slides_without_region"]:
        warn(f"no region on slides without an instance of a subtype: {first_names(bare)}")
    for slide in found["slides_coarser_than_mpp"]:
        warn(f"slide {slide} was scanned at a coarser resolution than {cohort.mpp:g} mpp")
    echo(f"overview pictures: {cohort.folder / 'overview'}")


def exact(out: Path, _: Arguments) -> None:
    """Print how many annotations were fetched."""
    from counterstain.storage import read_json

    echo(f"{out}: {read_json(out)['count']:,} annotations")
    echo(f"next: counterstain import labels {pasted(out)} --format exact > LABELS.yaml")


def weights(header: Any, arguments: Arguments) -> None:
    """Print what weights were taken for."""
    names, seen = header.taxonomy.names, len(header.patients_seen)
    echo(f"{arguments['out']}: {header.kind} of {len(names)} subtypes, {header.size_px} px at {header.mpp} um/px")
    if seen and arguments["cohort"] is not None:
        from counterstain.data.cohort import Cohort

        known = set(Cohort.open(arguments["cohort"]).regions["patient"])
        echo(f"{len(known & set(header.patients_seen))} of {seen} patients seen are of {arguments['cohort']}")
    echo(f"it counts as trained on {seen} patients" if seen else "it counts as trained on no patient of yours")
    if assumed := header.notes.get("assumed"):
        echo(f"taken for granted, as weights do not tell (compare with their configuration): {', '.join(assumed)}")


def splits(cohort: Cohort, _: Arguments | None = None) -> None:
    """Print patients, slides, regions and area of every split."""
    from counterstain.data.cohort import splits_table

    table = splits_table(cohort)
    unit, areas = _areas(table["area_mm2"])
    rows = [
        (str(row.split), f"{row.patients:,}", f"{row.slides:,}", f"{row.regions:,}", area)
        for row, area in zip(table.itertuples(), areas, strict=True)
    ]
    print_table(("split", "patients", "slides", "regions", unit), rows)


def _areas(area_mm2: pd.Series) -> tuple[str, list[str]]:
    """Return the unit of a column of areas and the areas in it."""
    small = area_mm2.max() < 1
    return ("µm²", [f"{a * 1e6:,.0f}" for a in area_mm2]) if small else ("mm²", [f"{a:,.3f}" for a in area_mm2])


def _show_subtypes(cohort: Cohort) -> None:
    from counterstain.data.cohort import subtypes_table

    subtypes = subtypes_table(cohort)
    unit, areas = _areas(subtypes["area_mm2"])
    rows: list[Sequence[str]] = []
    for split, table in subtypes.groupby("split", sort=False):
        for row in table.itertuples():
            named = str(split) if row.Index == table.index[0] else ""
            instances = (f"{row.slides:,}", f"{row.instances:,}", f"{row.instance_share:.1%}")
            rows.append((named, str(row.subtype), *instances, areas[int(str(row.Index))], f"{row.area_share:.1%}"))
        rows.append(())
    columns = ("slides", "instances", "of instances", unit, "of area")
    print_table(("split", cohort.taxonomy.tissue_class, *columns), rows, words=2)


def inspection(_: pd.DataFrame, arguments: Arguments) -> None:
    """Print what a cohort is made of."""
    from counterstain.api.cohorts import composition_file
    from counterstain.data.cohort import Cohort

    cohort = Cohort.open(arguments["cohort"])
    splits(cohort)
    _show_subtypes(cohort)
    echo(f"figure: {arguments['out'] or composition_file(cohort)}\nnext: counterstain init {pasted(cohort.folder)}")


def discovery(found: Discovery, arguments: Arguments) -> None:
    """Print which subtypes were found, how far they can be trusted, and how to name them."""
    from counterstain.discovery.clusters import STABLE

    rows = [
        (str(row.cluster), str(row.subtype), f"{row.instances:,}", f"{row.border:,}", str(row.patients),
         f"{row.area_share:.1%}", str(row.words))
        for row in found.clusters.itertuples()
    ]  # fmt: skip
    columns = ("cluster", "subtype", "instances", "border cases", "patients", "of area", "typical")
    print_table(columns, rows, title=f"{arguments['out']}: fitted on {found.fitted}")
    tried = ", ".join(f"{row.k}: {row.agreement:.2f}" for row in found.stability.itertuples())
    echo(f"agreement of clusters of resampled patients, 1 = the same, stable from {STABLE:g}: {tried}")
    if found.stability["agreement"].max() < STABLE:
        warn(f"{len(rows)} subtypes are not stable: other patients would give others")
    for who, index in found.agreement.items():
        echo(f"agreement with the known subtypes (adjusted Rand index), {who}: {index:.2f}")
    if found.undescribed:
        echo(f"ignored: {found.undescribed:,} instances too small to be described")
    out = pasted(arguments["out"])
    echo(f"look: {arguments['out'] / 'sheet.png'}")
    if arguments["names"] is None:
        echo(f"name the clusters: the same command with --names {','.join('NAME' for _ in rows)}")
    echo(f"next: counterstain {'split' if found.cohort.regions['split'].isna().all() else 'inspect'} {out}")


NEXT_OF_EXPORT = {
    "png": "read back: counterstain import dataset {out} --out COHORT",
    "nnunet": "next: nnUNetv2_plan_and_preprocess -d NUMBER --verify_dataset_integrity, then copy "
    "{out}/splits_final.json beside the preprocessed data, so that training and validation are split by patient",
    "qupath": "next: open {out}/project.qpproj in QuPath, then Automate > Project scripts > import_outlines > Run for "
    "project",
    "ome-zarr": "look: napari --plugin napari-ome-zarr {out}/NAME.ome.zarr",
    "huggingface": 'read with: load_dataset("{out}"); next: fill in the licence in {out}/README.md',
    "hf": 'read with: load_dataset("imagefolder", data_dir="{out}")',
}


def exported(written: list[Path] | int, arguments: Arguments) -> None:
    """Print what was exported and how to read it."""
    out = arguments["out"]
    if isinstance(written, int):
        echo(f"{out}: {counted(written, 'image')}")
        echo(NEXT_OF_EXPORT[arguments["format"]].format(out=pasted(out)))
    else:
        echo("\n".join(map(str, written)))


def training(out: Path, arguments: Arguments) -> None:
    """Print what to do with a trained network."""
    cohort, trained = pasted(arguments["cohort"]), pasted(out)
    of_recipe = recipe_options(arguments)
    following = {
        "autoencoder": f"train diffusion {cohort} --autoencoder {trained} --out DIR{of_recipe}",
        "judge": f"audit SET --cohort {cohort} --judge {trained} --out DIR",
    }
    drawn = {"distilled": "diffusion"}.get(arguments["network"], arguments["network"])
    draw = f"synthesize {cohort} --method {drawn} --generator {trained} --count N --out DIR"
    echo(f"{_trained(out)}\nnext: counterstain {following.get(arguments['network'], draw)}")


def _trained(out: Path) -> str:
    before = (out / "model.json").stat().st_mtime < STARTED
    return f"{out}: is trained already, with these settings; nothing was done" if before else f"{out}: trained"


def synthetic_set(found: PatchSet, arguments: Arguments) -> None:
    """Print the balance of a synthetic set."""
    balance = found.balance()
    balance["share"] = balance["instances"] / max(balance["instances"].sum(), 1)
    balance["share_of_area"] = balance["area_px"] / max(balance["area_px"].sum(), 1)
    forms = {"subtype": "", "instances_before": "", "instances": "", "share": ".1%",
             "area_px_before": ",", "area_px": ",", "share_of_area": ".1%"}  # fmt: skip
    rows = [[format(row[name], form) for name, form in forms.items()] for _, row in balance.iterrows()]
    columns = ("subtype", "instances before", "instances", "share", "area before (px)", "area (px)", "share of area")
    print_table(columns, rows, title=f"{arguments['out']}: {len(found)} patches ({found.header.method})")
    drawn = int(found.patches["attempts"].sum())
    echo(f"{drawn} images drawn, {drawn - len(found.patches)} refused by the filter")


def preview(rows: Sequence[Any], arguments: Arguments) -> None:
    """Print where a preview is."""
    echo(f"{arguments['out']}: {len(rows)} patches, each redrawn as {len(rows[0].drawn)} subtypes")


def redrawn(cohort: Cohort, arguments: Arguments) -> None:
    """Print what was redrawn and how to look at it."""
    out, where = arguments["out"], pasted(arguments["out"])
    echo(f"{out}: {len(cohort)} regions")
    echo(f"images with masks: counterstain export {where} --format png --out …; look: counterstain inspect {where}")


def audit(audit: Audit, arguments: Arguments) -> None:
    """Print the figures of an audit side by side."""
    found = audit.findings
    rows = [
        ("Fréchet distance", *(_with_interval(f.frechet, ".2f") for f in found)),
        ("kernel distance", *(_with_interval(f.kernel, ".4f") for f in found)),
        *(
            (name, *(f"{getattr(f, name):.2f}" for f in found))
            for name in ("precision", "recall", "density", "coverage")
        ),
        *((f"adherence, {s}", *(number(f.adherence[s]) for f in found)) for s in found[0].adherence.index),
        *((f"stain, {s}", *(number(f.stain[s]) for f in found)) for s in found[0].stain.index),
        ("seam (grey levels)", *(f"{f.seam:.1f}" for f in found)),
        ("near copies", *(number(f.copies.share, ".1%") for f in found)),
    ]
    title = "against real training patches; 95 % intervals over patients; adherence = share that looks as asked"
    print_table(("", *(f.name for f in found)), rows, title=title)
    echo("\n".join(audit.in_words()))
    echo(f"tables and pictures: {arguments['out']}")


def trace(found: Trace, arguments: Arguments) -> None:
    """Print the tests of a trace, what they mean and what may be shared."""
    rows = []
    for row in found.tests.to_dict("records"):
        ends = "-" if math.isnan(row["low"]) else f"{row['low']:.2f} to {row['high']:.2f}"
        p = f"{row['p']:.3g}", number(row["p_holm"], ".3g")
        rows.append((str(row["test"]), f"{row['value']:.2f}", ends, *p, "ALARM" if row["alarm"] else ""))
    print_table(("test", "value", "95 % interval", "p", "p (Holm)", ""), rows, title=f"{found.name}, over patients")
    echo("\n".join(found.in_words()))
    default = Path(arguments["synthetic"]) / "trace"
    echo(f"trace.json, trace.csv, trace.png: {arguments['out'] or default}")


def _with_interval(found: Interval, form: str) -> str:
    ends = "no interval" if math.isnan(found.low) else f"{format(found.low, form)}-{format(found.high, form)}"
    return f"{format(found.value, form)} ({ends})"


def number(value: float, form: str = ".2f") -> str:
    """Return a number, a dash for NaN."""
    return "-" if math.isnan(value) else format(value, form)


def segmenter(out: Path, arguments: Arguments) -> None:
    """Print what to do with a trained segmenter."""
    echo(f"{_trained(out)}\nnext: counterstain evaluate {pasted(out)} {pasted(arguments['cohort'])} --split val")


def scores(scores: pd.Series, arguments: Arguments) -> None:
    """Print what a segmenter scores, by subtype, with intervals and the numbers that they rest on."""
    summary = scores.attrs["summary"]
    title = f"{arguments['segmenter']} on {arguments['cohort']} ({arguments['split']})"
    rows = [
        (
            row.measure,
            number(row.value, form),
            "-" if math.isnan(row.low) else f"{row.low:{form}} to {row.high:{form}}",
            *(f"{number:,}" for number in (row.patients, row.slides, row.instances)),
        )
        for row in summary.itertuples()
        for form in [".4f" if row.measure.startswith("variance") else ".3f"]
    ]
    print_table(("measure", "value", "95 % interval", "patients", "slides", "instances"), rows, title=title)
    over = (
        "patients" if summary["patients"].iloc[0] > 1 else "slides of one patient: they say nothing of other patients"
    )
    echo(f"Pixels of all slides are counted together; intervals are over {over}.")
    if scores.attrs["absent"]:
        absent = ", ".join(scores.attrs["absent"])
        echo(f"notice: no pixel of {absent}; left out of the subtype variance", err=True)
    if "test_looks" in scores.attrs:
        times, log = scores.attrs["test_looks"], scores.attrs["test_log"]
        echo(f"test results shown {times} time{'s' if times > 1 else ''} so far ({log})")
    if arguments["out"] is not None:
        echo(f"written: {arguments['out']}/summary.csv, measures.csv and counts.parquet")
    else:
        echo("More measures, and the counts by slide: --out FOLDER")


def predictions(predictions: Sequence[Prediction], arguments: Arguments) -> None:
    """Print how much was outlined."""
    from counterstain.checkpoints import read_header

    outlined = read_header(arguments["segmenter"]).taxonomy.tissue_class
    for path, areas, area_um2 in predictions:
        if areas is None or area_um2 is None:
            echo(f"{path}: is there already")
        else:
            area = f"{area_um2 / 1e6:,.3f} mm²" if area_um2 >= 1e4 else f"{area_um2:,.0f} µm²"
            echo(f"{path}: {counted(areas, 'area')} of {outlined}, {area} in all")
