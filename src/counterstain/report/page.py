"""The page: one HTML file that holds everything and loads nothing; the same figures and tables as files."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import yaml
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from matplotlib.figure import Figure

from counterstain.errors import InputError
from counterstain.progress import counted
from counterstain.report import figures, tables
from counterstain.report.data_sheets import (
    INTENDED_USE,
    LIMITS,
    TrainingRecord,
    data_sheets,
    fairness_sentences,
    read_fairness,
    read_sets,
    read_trainings,
)
from counterstain.report.figure_style import save_figure, svg_text
from counterstain.report.methods_section import methods_paragraphs, settings_table
from counterstain.report.results import (
    CEILING,
    Results,
    damaged,
    is_ceiling,
    label_of,
    looked_at,
    read_results,
)
from counterstain.report.summary import chosen_arm, summarise
from counterstain.report.tables import duration, effects_on_test
from counterstain.report.tissue_figures import examples
from counterstain.storage import write_text
from counterstain.study.arms import Arm
from counterstain.taxonomy import BACKGROUND, IGNORE, Taxonomy

DRAWS = 10_000  # of the bootstrap


def write_report(run: Path, out: Path | None = None, *, command: str = "report") -> Path:
    """Write the report of a study.

    Parameters
    ----------
    run : Path
        Folder of the study, or its results folder.
    out : Path, optional
        The file; ``RUN/report.html`` by default.
    command : str
        What shows the results, for the record of :mod:`counterstain.study.test_access_log`.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    InputError
        The study is missing or not finished, a table holds an impossible value, or ``out`` is a folder.
    StorageError
        A file is damaged or cannot be written.
    """
    path = out or run / "report.html"
    if path.is_dir():
        raise InputError(f"{path}: is a folder; use a file name, for example {path / 'report.html'}")
    if path.parent.exists() and not path.parent.is_dir():
        raise InputError(f"{path.parent}: is a file, not a folder; choose another place for the report")
    write_text(path, render(looked_at(read_results(run), command), place=path.parent))
    return path


def write_figures(run: Path, folder: Path) -> list[Path]:
    """Write every figure of the report as ``NAME.svg`` and ``NAME.png``; return the files.

    Raises InputError and StorageError as :func:`write_report` does.
    """
    results = read_results(run)
    files = []
    for view in figure_views(results, chosen_arm(results)):
        for kind in ("svg", "png"):
            files.append(folder / f"{view.anchor}.{kind}")
            save_figure(view.figure, files[-1])
    return files


def write_tables(run: Path, folder: Path) -> list[Path]:
    """Write the tables of results and of differences as ``NAME.csv`` and ``NAME.tex``; return the files.

    Raises InputError and StorageError as :func:`write_report` does.
    """
    results = read_results(run)
    files = []
    for name, copy in tables.table_copies(results, effects_on_test(results), chosen_arm(results)).items():
        for ending, text in (("csv", copy.csv), ("tex", copy.latex)):
            files.append(folder / f"{name}.{ending}")
            write_text(files[-1], text)
    return files


def render(results: Results, *, place: Path | None = None, draws: int = DRAWS) -> str:
    """Return the report as HTML, the same text for the same results.

    Parameters
    ----------
    results : Results
    place : Path, optional
        Folder that the report will lie in, for its links to logs; the study's folder if not given.
    draws : int
        Of the bootstrap.
    """
    study, folder = results.study, results.folder
    effects, chosen = effects_on_test(results, draws=draws), chosen_arm(results)
    trainings, fairness = read_trainings(folder), read_fairness(folder)
    return _template().render(
        css=_inlined("page.css"),
        js=_inlined("page.js"),
        study=study,
        facts=_facts(results),
        reference=label_of(results.reference),
        chosen=label_of(chosen) if chosen else None,
        ceiling=CEILING if any(is_ceiling(arm.method) for arm in results.arms) else None,
        summary=summarise(results, effects, chosen),
        differences=tables.differences_table(results, effects, chosen),
        power=tables.power_table(results, effects),
        scores=[tables.results_table(results, split, chosen) for split in ("test", "val")],
        variants=[t for split in ("test", "val") if (t := tables.variants_table(results, split, chosen))],
        figures={view.anchor: view for view in figure_views(results, chosen)},
        filter=tables.filter_table(results),
        times=tables.times_table(results),
        versions=tables.versions_table(results),
        config=yaml.safe_dump(study.config, sort_keys=False, allow_unicode=True),
        draws=draws,
        copies=tables.table_copies(results, effects, chosen),
        methods=methods_paragraphs(study, fairness["starts_from"].tolist()),
        settings=settings_table(study),
        fairness=fairness_sentences(fairness, study),
        sheets=data_sheets(read_sets(folder), trainings, study),
        intended_use=INTENDED_USE,
        limits=LIMITS,
        gallery=read_gallery(folder, study.taxonomy),
        logs=_logs(trainings, folder.parent, place or folder.parent),
    )


def _facts(results: Results) -> list[tuple[str, str]]:
    """Return what a reader wants to know first: name and value."""
    study = results.study
    facts = {
        "Preset": study.preset,
        "Cohort": study.cohort.source,
        "Patients": " / ".join(f"{count} {split}" for split, count in study.cohort.patients.items()),
        "Regions": f"{study.cohort.regions:,}" if study.cohort.regions else "",
        "Resolution": f"{study.cohort.mpp:g} µm per pixel" if study.cohort.mpp else "",
        "Arms": f"{len(study.arms)}, {counted(study.repeats, 'repeat')} each",
        "Device": study.device,
    }
    return [(name, value) for name, value in facts.items() if value]


def _logs(trainings: tuple[TrainingRecord, ...], run: Path, place: Path) -> list[tuple[str, str, str]]:
    """Return name, length and relative address of the curves of every training that left some."""
    found = []
    for training in trainings:
        if training.logs:
            address = quote(Path(os.path.relpath(run / training.logs, place)).as_posix() + "/")
            found.append((training.name, f"{training.steps:,} steps, {duration(training.seconds)}", address))
    return found


@dataclass(frozen=True, slots=True)
class FigureView:
    """A figure on the page, with its alternative text and caption."""

    anchor: str
    figure: Figure
    alt: str
    caption: str

    @property
    def source(self) -> str:
        """Data URI of the figure as SVG."""
        return "data:image/svg+xml," + quote(" ".join(svg_text(self.figure).split("\n")), safe=" /:;=,'()!*@+$?~")


def figure_views(results: Results, chosen: Arm | None) -> list[FigureView]:
    """Draw every figure; ``chosen`` is the arm that validation chose."""
    study, taxonomy = results.study, results.study.taxonomy
    tissue, reference = taxonomy.tissue_class, label_of(results.reference)
    beside = f" beside {label_of(chosen)}, chosen on validation, and their difference" if chosen else ""
    ceilings = [label_of(arm) for arm in results.arms if is_ceiling(arm.method)]
    labels = {name: study.set_label(name, "ceiling") for name in {*results.synthetic["method"], *_drawn(results)}}
    shown = [replace(e, images={labels[name]: image for name, image in e.images.items()}) for e in results.examples]
    return [
        FigureView(
            "boxplots",
            figures.boxplots(results.results, taxonomy, arms=results.arms, reference=results.reference),
            f"Box plots of {tissue} Dice and subtype variance on the test set for "
            f"{', '.join(map(label_of, results.arms))}. The numbers are in the results table.",
            f"{tissue.capitalize()} Dice and subtype variance on the test set. Box: mean ± standard deviation; "
            f"whiskers: smallest and largest repeat; dots: repeats; dashed line: mean of {reference}."
            + (f" Dashed boxes ({', '.join(ceilings)}): {CEILING}." if ceilings else ""),
        ),
        FigureView(
            "confusion",
            figures.confusion(results.counts, taxonomy, reference=results.reference, arm=chosen),
            f"Confusion by subtype of {reference}{beside}, in per cent of each row.",
            f"Confusion by subtype on the test set: {reference}{beside}. Pixels pooled over the split, per cent of "
            "each row, averaged over repeats.",
        ),
        FigureView(
            "composition",
            figures.composition(results.composition, taxonomy, mpp=study.cohort.mpp),
            f"Bars of the share of {', '.join(taxonomy.names)} in each split of the cohort, by instances and by area.",
            "Subtypes in each split of the cohort, by instances and by annotated area.",
        ),
        FigureView(
            "balance",
            figures.balance(results.synthetic.assign(method=results.synthetic["method"].map(labels)), taxonomy),
            "Bars of the share of every subtype in the synthetic sets before and after relabelling.",
            "Subtypes in the synthetic sets before (hatched) and after (filled) relabelling. Dashed: equal shares. "
            "Relabelling balances either instances or area, so the two differ.",
        ),
        FigureView(
            "examples",
            examples(shown, taxonomy, mpp=study.cohort.mpp),
            f"{counted(len(results.examples), 'patch', 'patches')}: real image, its labels, new labels and the image "
            "that each method drew for them.",
            "Real patches, their labels, the new labels, and the image that each method drew for them.",
        ),
        FigureView(
            "training",
            figures.training_curves(results.losses, study.arms),
            "Training curves of every generator and segmenter, one panel for each loss.",
            "Losses by optimiser step; a line for each training. Long curves are drawn as means over equal numbers of "
            "steps.",
        ),
    ]


def _drawn(results: Results) -> set[str]:
    return {name for example in results.examples for name in example.images}


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(_file("page.html.j2"))


def _inlined(name: str) -> Markup:
    """Return a file of this package for the page, unescaped: it is ours, nobody's input."""
    return Markup(_file(name))  # noqa: S704


def _file(name: str) -> str:
    return (resources.files("counterstain.report") / name).read_text(encoding="utf-8")


# The gallery of patches: pictures with what is known of them, as the page's template and script need it.

REAL = "real"
_COLUMNS = (
    "number", "method", "image", "mask", "source", "region", "slide", "patient", "y_px", "x_px", "attempts",
    "before", "after", "area_px",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One patch."""

    number: int
    method: str
    """``real``, or the name of a synthetic set."""
    image: str  # data URI
    mask: str  # data URI
    source: int
    """Number of the real patch whose relabelled mask it uses."""
    region: str
    slide: str
    patient: str
    y_px: int
    x_px: int
    attempts: int
    """Images drawn until the filter accepted one; 0 for real patches."""
    labels: tuple[tuple[str, str, int], ...]
    """Old subtype, new subtype and area in pixels of every instance."""

    @property
    def subtypes(self) -> tuple[str, ...]:
        """The subtypes in it, the largest area first."""
        areas: dict[str, int] = {}
        for _, after, area in self.labels:
            areas[after] = areas.get(after, 0) + area
        return tuple(sorted(areas, key=lambda name: (-areas[name], name)))

    @property
    def about(self) -> dict[str, Any]:
        """What the page's script shows after a click on it."""
        names = ("number", "method", "mask", "source", "region", "slide", "patient", "y_px", "x_px", "attempts")
        return {name: getattr(self, name) for name in (*names, "labels")}


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """All pictures of a page."""

    pictures: tuple[Picture, ...]
    taxonomy: Taxonomy

    @property
    def filters(self) -> dict[str, list[str]]:
        """The choices of the gallery's filters: name -> values."""
        return {
            "method": list(dict.fromkeys(picture.method for picture in self.sorted)),
            "subtype": [name for name in self.taxonomy.names if any(name in p.subtypes for p in self.pictures)],
            "slide": sorted({picture.slide for picture in self.pictures}),
            "patient": sorted({picture.patient for picture in self.pictures}),
        }

    @cached_property
    def sorted(self) -> list[Picture]:
        """Each real patch followed by the synthetic ones with its mask."""
        return sorted(self.pictures, key=lambda picture: (picture.source, picture.method != REAL, picture.number))

    @property
    def colours(self) -> dict[str, str]:
        """Subtype -> colour in the masks."""
        return {subtype.name: subtype.colour for subtype in self.taxonomy.subtypes}


def read_gallery(folder: Path, taxonomy: Taxonomy) -> Gallery:
    """Read ``gallery.parquet`` of a results folder; empty if it is missing, StorageError if it is damaged."""
    path = folder / "gallery.parquet"
    if not path.exists():
        return Gallery(pictures=(), taxonomy=taxonomy)
    try:
        table = pd.read_parquet(path, columns=list(_COLUMNS))
        pictures = tuple(_picture(row, taxonomy) for row in table.to_dict("records"))
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise damaged(path, error) from error
    return Gallery(pictures=pictures, taxonomy=taxonomy)


def _picture(row: dict[Any, Any], taxonomy: Taxonomy) -> Picture:
    labels = zip(row["before"], row["after"], row["area_px"], strict=True)
    values: dict[str, Any] = {name: str(row[name]) for name in ("method", "region", "slide", "patient")}
    values |= {name: int(row[name]) for name in ("number", "source", "y_px", "x_px", "attempts")}
    return Picture(
        **values,
        image=_data_uri(row["image"], "webp"),
        mask=_data_uri(row["mask"], "png"),
        labels=tuple((_name(before, taxonomy), _name(after, taxonomy), int(area)) for before, after, area in labels),
    )


def _data_uri(content: bytes, form: str) -> str:
    return f"data:image/{form};base64,{base64.b64encode(content).decode()}"


def _name(label: int, taxonomy: Taxonomy) -> str:
    return {BACKGROUND: "background", IGNORE: "ignored"}.get(int(label)) or taxonomy.name_of(int(label))
