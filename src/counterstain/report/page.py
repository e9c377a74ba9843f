"""The page: one HTML file that holds everything and loads nothing; the same figures and tables as files."""

from __future__ import annotations

import base64
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pandas as pd
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from counterstain.errors import InputError
from counterstain.generators.methods import METHODS
from counterstain.progress import TIMES, counted, duration
from counterstain.report import figures, patch_figures, tables
from counterstain.report.methods_section import fairness_sentences, methods_paragraphs, settings_table
from counterstain.report.readings import TraceSection, reading_sections, trace_sections
from counterstain.report.results import (
    CEILING,
    ExternalRecord,
    Results,
    SetRecord,
    StudyRecord,
    TrainingRecord,
    damaged,
    looked_at,
    read_results,
    read_tests,
)
from counterstain.report.summary import Summary, chosen_arm, summarise
from counterstain.report.tables import NONE, Cell, Row, Table, effects_on_test, plain_table, rate
from counterstain.segmentation.counts import measures
from counterstain.storage import write_text
from counterstain.study.arms import Arm
from counterstain.taxonomy import IGNORE, Taxonomy

DRAWS = 10_000  # of the bootstrap
MOST_NAMED = 6  # test patients of a fold


def write_report(run: Path, out: Path | None = None, *, command: str = "report") -> Path:
    """Write the report of a study and return its file, ``RUN/report.html`` if not given.

    ``run`` and the errors are as in :func:`~counterstain.report.results.read_results`; ``command`` is what shows the
    results, for the record of :mod:`counterstain.study.records`.
    """
    path = out or run / "report.html"
    if path.is_dir():
        raise InputError(f"{path}: is a folder; use a file name, for example {path / 'report.html'}")
    if path.parent.exists() and not path.parent.is_dir():
        raise InputError(f"{path.parent}: is a file, not a folder; choose another place for the report")
    write_text(path, render(looked_at(read_results(run), command), place=path.parent))
    return path


def write_figures(run: Path, folder: Path) -> None:
    """Write every figure of the report as ``NAME.svg`` and ``NAME.png``."""
    results = read_results(run)
    for name, figure in draw_figures(results, chosen_arm(results)).items():
        for kind in ("svg", "png"):
            figures.save_figure(figure, folder / f"{name}.{kind}")


def write_tables(run: Path, folder: Path) -> None:
    """Write the tables of results and of differences as ``NAME.csv`` and ``NAME.tex``."""
    results = read_results(run)
    chosen = chosen_arm(results)
    written = tables.table_copies(results, effects_on_test(results), chosen)
    for test in external_tests(results, chosen, DRAWS):
        written |= test.copies
    for name, copies in written.items():
        for ending, text in copies.items():
            write_text(folder / f"{name}.{ending}", text)


def write_external(run: Path, folder: Path) -> None:
    """Write ``differences.csv`` of a test on another cohort into its folder, RUN/external/NAME."""
    results = read_results(run)
    for test in external_tests(results, chosen_arm(results), DRAWS):
        if test.record.name == folder.name:
            write_text(folder / "differences.csv", test.copies[f"{test.anchor}-effects"]["csv"])


class ExternalTest(NamedTuple):
    """A test of the study on another cohort, as the page shows it; of segmenters trained anew since, nothing."""

    record: ExternalRecord
    anchor: str
    summary: Summary | None = None
    differences: Table | None = None
    scores: Table | None = None
    copies: dict[str, dict[str, str]] = {}  # noqa: RUF012 - never changed


def external_tests(results: Results, chosen: Arm | None, draws: int) -> list[ExternalTest]:
    """Return what ``study test`` found on other cohorts; ``chosen`` is the arm that the study's validation chose."""
    shown = []
    for record, tested in read_tests(results):
        anchor = f"external-{record.name}"
        if tested is None:
            shown.append(ExternalTest(record, anchor))
            continue
        effects = effects_on_test(tested, draws=draws)
        copies = tables.table_copies(tested, effects, chosen)
        named = {"results-test": f"{anchor}-results", "effects": f"{anchor}-effects"}
        shown.append(
            ExternalTest(
                record,
                anchor,
                summarise(tested, effects, chosen),
                tables.differences_table(tested, effects, chosen),
                tables.results_table(tested, "test", chosen),
                {name: copies[old] for old, name in named.items() if old in copies},
            )
        )
    return shown


def render(results: Results, *, place: Path | None = None, draws: int = DRAWS) -> str:
    """Return the report as HTML, the same text for the same results.

    ``place`` is the folder that it will lie in, for its links to logs: the study's folder if not given. ``draws`` are
    those of the bootstrap.
    """
    study, folder = results.study, results.folder
    effects, chosen = effects_on_test(results, draws=draws), chosen_arm(results)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    pictures = read_gallery(folder, study.taxonomy)
    tests, traces = external_tests(results, chosen, draws), trace_sections(folder.parent)
    copies = tables.table_copies(results, effects, chosen)
    for test in tests:
        copies |= test.copies
    files = resources.files("counterstain.report")
    template, css, js = ((files / name).read_text(encoding="utf-8") for name in ("page.html.j2", "page.css", "page.js"))
    return environment.from_string(template).render(
        css=Markup(css),  # noqa: S704 - ours, nobody's input
        js=Markup(js),  # noqa: S704
        study=study,
        repeats=counted(study.repeats, "repeat"),
        arms=results.arms,
        reference=results.reference,
        chosen=chosen,
        ceiling=CEILING,
        summary=summarise(results, effects, chosen),
        folds=folds_table(results, chosen) if study.folds else None,
        tested_on=results.tested_on,
        differences=tables.differences_table(results, effects, chosen),
        power=tables.power_table(results, effects),
        scores=[tables.results_table(results, split, chosen) for split in ("test", "val")],
        further=tables.further_tables(results, chosen),
        figures={name: _data_uri(figure) for name, figure in draw_figures(results, chosen).items()},
        examples=counted(len(results.examples), "patch", "patches"),
        filter=tables.filter_table(results),
        times=plain_table("Time by stage", ("Stage", "Time"), ((k, duration(v)) for k, v in study.seconds.items())),
        versions=plain_table("Versions", ("Package", "Version"), study.versions.items()),
        config=yaml.safe_dump(study.config, sort_keys=False, allow_unicode=True),
        draws=draws,
        copies=copies,
        tests=tests,
        readings=reading_sections(folder.parent, study.taxonomy.names),
        traces=traces,
        methods=methods_paragraphs(study, results.fairness["starts_from"].tolist()),
        settings=settings_table(study),
        fairness=fairness_sentences(results.fairness, study),
        sheets=[data_sheet(found, results.trainings, study, traces) for found in results.sets if found.fold < 2],
        pictures=pictures,
        filters={
            "method": list(dict.fromkeys(picture["method"] for picture in pictures)),
            "subtype": [name for name in study.taxonomy.names if any(name in p["subtypes"] for p in pictures)],
            "slide": sorted({picture["slide"] for picture in pictures}),
            "patient": sorted({picture["patient"] for picture in pictures}),
        },
        about={
            "colours": {subtype.name: subtype.colour for subtype in study.taxonomy.subtypes},
            "pictures": [{k: v for k, v in p.items() if k not in {"image", "subtypes"}} for p in pictures],
        },
        logs=[
            (training.name, f"{training.steps:,} steps, {duration(training.seconds)}", quote(address.as_posix() + "/"))
            for training in results.trainings
            if training.logs
            and (address := Path(os.path.relpath(folder.parent / training.logs, place or folder.parent)))
        ],
    )


def folds_table(results: Results, chosen: Arm | None) -> Table:
    """Return the patients of every fold, and the Dice of the reference and of the arm that validation chose."""
    arms = [results.reference, *([] if chosen is None else [chosen])]
    test = results.counts[results.counts["split"] == "test"]
    rows = []
    for number, fold in enumerate(results.study.folds, start=1):
        patients = ", ".join(fold["test"][:MOST_NAMED]) + (" …" if len(fold["test"]) > MOST_NAMED else "")
        sizes = [Cell(str(len(fold[part])), patients if part == "test" else "") for part in ("train", "val", "test")]
        lacking = (f"no {', '.join(fold['lacking'])} in training",) if fold["lacking"] else ()
        scores = []
        for arm in arms:
            counts = test[(test["fold"] == number) & (test["arm"] == arm.name)]
            dice = pd.Series([measures(table, results.study.taxonomy)["dice"] for _, table in counts.groupby("repeat")])
            scores.append(Cell(tables.fixed(dice.mean(), 3), value=float(dice.mean()) if len(dice) else None))
        rows.append(Row(f"Fold {number}", (*sizes, *scores), lacking))
    columns = ("Fold", "Training", "Validation", "Test", *(f"Dice of {arm.label}" for arm in arms))
    return Table("Patients of each fold, and Dice on its test patients, means over repeats", columns, tuple(rows))


def draw_figures(results: Results, chosen: Arm | None) -> dict[str, Figure]:
    """Draw every figure; ``chosen`` is the arm that validation chose."""
    study, taxonomy = results.study, results.study.taxonomy
    sets = results.synthetic.assign(method=[study.set_label(name, "ceiling") for name in results.synthetic["method"]])
    shown = [
        replace(e, images={study.set_label(name, "ceiling"): image for name, image in e.images.items()})
        for e in results.examples
    ]
    return {
        "boxplots": figures.boxplots(results.results, taxonomy, arms=results.arms, reference=results.reference),
        "confusion": figures.confusion(results.counts, taxonomy, reference=results.reference, arm=chosen),
        "composition": patch_figures.composition(results.composition, taxonomy, mpp=study.cohort.mpp),
        "balance": patch_figures.balance(sets, taxonomy),
        "examples": patch_figures.examples(shown, taxonomy, mpp=study.cohort.mpp),
        "training": figures.training_curves(results.losses, study.arms),
    }


def _data_uri(figure: Figure) -> str:
    return "data:image/svg+xml," + quote(" ".join(figures.svg_text(figure).split("\n")), safe=" /:;=,'()!*@+$?~")


class Sheet(NamedTuple):
    """The data sheet of a synthetic set."""

    name: str
    facts: dict[str, str]
    changes: Table  # instances by old and new subtype
    settings: str  # YAML


def data_sheet(
    found: SetRecord,
    trainings: Sequence[TrainingRecord],
    study: StudyRecord,
    traces: Sequence[TraceSection] = (),
) -> Sheet:
    """Return the data sheet of a set: what it was drawn from and how, as the registry has it, and from whom."""
    of = (found.method, found.generator, found.cohort, found.seed)
    traced = next((trace.verdict for trace in traces if trace.of == of), "not tested; 'counterstain trace' does")
    method = METHODS.get(found.method)
    drawing = {"Method": found.method if method is None else method.title, "Drawn with": NONE}
    if method is not None and method.data_sheet is not None:
        drawing |= method.data_sheet(found.settings, study.config.get("recipe", {}))
    none = f"none ({CEILING})" if method is not None and method.ceiling else "none"
    facts = drawing | {
        "Generator": f"checkpoint {found.generator}" if found.generator else none,
        "Training of the generator": _training(found, trainings, study),
        "Patches": f"{found.patches:,} of {found.size_px} {TIMES} {found.size_px} pixels at {found.mpp:g} µm per "
        f"pixel, {found.background_only:,} of them without an instance",
        "Masks from": f"{counted(found.sources.get('region', 0), 'region')} of "
        f"{counted(found.sources.get('patient', 0), 'patient')}, training split of cohort {found.cohort[:16]}",
        "Seed": found.seed,
        "Rejected": f"{found.rejected:,} of {found.drawn:,} images drawn ({rate(found.rejected, found.drawn)})",
        **_reviewed(found),
        "Traced to patients": traced,
        "Version": f"counterstain {found.version}",
        "Source patients": ", ".join(found.patients_seen),
    }
    return Sheet(
        name=study.set_label(found.name),
        facts=facts,
        changes=_changes(found, study.taxonomy.names, study.taxonomy.tissue_class),
        settings=yaml.safe_dump(found.settings, sort_keys=False, allow_unicode=True),
    )


def _reviewed(found: SetRecord) -> dict[str, str]:
    if not found.review:
        return {}
    accepted, rejected, unsure = (int(found.review.get(name, 0)) for name in ("accepted", "rejected", "unsure"))
    return {
        "Reviewed": f"{accepted + rejected + unsure:,} of {found.patches:,} patches by people: {accepted:,} accepted, "
        f"{unsure:,} unsure, {rejected:,} rejected, which the reviewed arms leave out"
    }


def _training(found: SetRecord, trainings: Sequence[TrainingRecord], study: StudyRecord) -> str:
    if not found.generator:
        return "none"
    trained = next((t for t in trainings if t.sha256 and t.sha256 == found.generator), None)
    if trained is None:
        return f"not part of this study; it and the masks used {counted(len(found.patients_seen), 'patient')}"
    cohort = f" of the cohort “{study.cohort.source}”" if study.cohort.source else ""
    return (
        f"{trained.name}: {trained.steps:,} steps of {trained.batch_size} patches of the training split{cohort}, "
        f"{counted(trained.patients_seen, 'patient')}"
    )


def _changes(found: SetRecord, names: Sequence[str], tissue: str) -> Table:
    """Return the matrix of old by new subtypes, with sums."""
    befores = [name for name in names if any(change.before == name for change in found.changes)]
    rows = []
    for before in (*befores, "all"):
        cells = []
        for after in (*names, "all"):
            chosen = [c for c in found.changes if before in {c.before, "all"} and after in {c.after, "all"}]
            instances, area = sum(c.instances for c in chosen), sum(c.area_px for c in chosen)
            note = f"{area * (found.mpp * 1e-3) ** 2:.3g} mm²"
            cells.append(Cell(text=f"{instances:,}", note=note, value=instances))
        rows.append(Row(head=before, cells=tuple(cells)))
    caption = f"Instances of {tissue} by old (row) and new subtype (column), with their area"
    return Table(caption=caption, columns=("Old \\ new", *names, "all"), rows=tuple(rows))


REAL = "real"
GALLERY_TEXTS = ("method", "region", "slide", "patient")
GALLERY_NUMBERS = ("number", "source", "y_px", "x_px", "attempts")


def read_gallery(folder: Path, taxonomy: Taxonomy) -> list[dict[str, Any]]:
    """Read ``gallery.parquet`` of a results folder: each real patch, then the synthetic ones with its mask.

    Each is a dict of the columns of texts and numbers (``source``: the number of the real patch; ``attempts``: images
    drawn until the filter accepted one); ``image`` and ``mask``, data URIs; ``labels``, the old subtype, new subtype
    and area in pixels of every instance; ``subtypes``, the largest area first. Empty if the file is missing,
    StorageError if it is damaged.
    """
    path = folder / "gallery.parquet"
    if not path.exists():
        return []
    columns = [*GALLERY_TEXTS, *GALLERY_NUMBERS, "image", "mask", "before", "after", "area_px"]
    try:
        pictures = [_picture(row, taxonomy) for row in pd.read_parquet(path, columns=columns).to_dict("records")]
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise damaged(path, error) from error
    return sorted(pictures, key=lambda picture: (picture["source"], picture["method"] != REAL, picture["number"]))


def _picture(row: dict[Any, Any], taxonomy: Taxonomy) -> dict[str, Any]:
    names = {0: "background", IGNORE: "ignored"} | {subtype.id: subtype.name for subtype in taxonomy.subtypes}
    instances = zip(row["before"], row["after"], row["area_px"], strict=True)
    labels = [(names[int(before)], names[int(after)], int(area)) for before, after, area in instances]
    areas = Counter[str]()
    for _, after, area in labels:
        areas[after] += area
    plain = {name: str(row[name]) for name in GALLERY_TEXTS} | {name: int(row[name]) for name in GALLERY_NUMBERS}
    return plain | {
        "image": f"data:image/webp;base64,{base64.b64encode(row['image']).decode()}",
        "mask": f"data:image/png;base64,{base64.b64encode(row['mask']).decode()}",
        "labels": labels,
        "subtypes": sorted(areas, key=lambda name: (-areas[name], name)),
    }
