"""The gallery of patches: pictures with what is known of them, as the page's template and script want it."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import yaml
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from counterstain.errors import InputError, StorageError
from counterstain.generators.methods import METHODS
from counterstain.progress import counted
from counterstain.report import tables
from counterstain.report.datasheet import INTENDED_USE, LIMITS, data_sheets, fairness_sentences, read_fairness
from counterstain.report.effects import chosen_arm, effects_on_test
from counterstain.report.files import figure_views, table_copies
from counterstain.report.formatting import CEILING, duration, is_oracle, label_of, method_of
from counterstain.report.methods_section import methods_paragraphs
from counterstain.report.results import Results, TrainingRecord, looked_at, read_results, read_sets, read_trainings
from counterstain.report.summary import summarise
from counterstain.storage import write_text
from counterstain.taxonomy import BACKGROUND, IGNORE, Taxonomy

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
    image: str
    """Data URI."""
    mask: str
    """Data URI of its labels in the taxonomy's colours."""
    source: int
    """Number of the real patch whose mask it has, with other labels."""
    region: str
    slide: str
    patient: str
    y_px: int
    x_px: int
    attempts: int
    """Images drawn until the filter let one pass; 0 for real patches."""
    labels: tuple[tuple[str, str, int], ...]
    """Old subtype, new subtype and area in pixels of every instance."""

    @property
    def subtypes(self) -> tuple[str, ...]:
        """What it shows, the largest area first."""
        areas: dict[str, int] = {}
        for _, after, area in self.labels:
            areas[after] = areas.get(after, 0) + area
        return tuple(sorted(areas, key=lambda name: (-areas[name], name)))

    @property
    def is_real(self) -> bool:
        """Whether it is no synthetic one."""
        return self.method == REAL

    @property
    def about(self) -> dict[str, Any]:
        """What the page's script shows when it is clicked on."""
        names = ("number", "method", "mask", "source", "region", "slide", "patient", "y_px", "x_px", "attempts")
        return {name: getattr(self, name) for name in (*names, "labels")}


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """All pictures of a page."""

    pictures: tuple[Picture, ...]
    taxonomy: Taxonomy

    @property
    def filters(self) -> dict[str, list[str]]:
        """What can be chosen by: name -> values."""
        return {
            "method": list(dict.fromkeys(picture.method for picture in self.sorted)),
            "subtype": [name for name in self.taxonomy.names if any(name in p.subtypes for p in self.pictures)],
            "slide": sorted({picture.slide for picture in self.pictures}),
            "patient": sorted({picture.patient for picture in self.pictures}),
        }

    @cached_property
    def sorted(self) -> list[Picture]:
        """Each real patch followed by what was made of it."""
        return sorted(self.pictures, key=lambda picture: (picture.source, not picture.is_real, picture.number))

    @property
    def colours(self) -> dict[str, str]:
        """Subtype -> colour in the masks."""
        return {subtype.name: subtype.colour for subtype in self.taxonomy.subtypes}

    def label_of(self, method: str) -> str:
        """Return a method as the page writes it."""
        return f"{method} ({CEILING})" if is_oracle(method) else method


def read_gallery(folder: Path, taxonomy: Taxonomy) -> Gallery:
    """Read ``gallery.parquet`` of a results folder; empty where it is missing.

    Raises
    ------
    StorageError
        It is damaged.
    """
    path = folder / "gallery.parquet"
    if not path.exists():
        return Gallery(pictures=(), taxonomy=taxonomy)
    try:
        table = pd.read_parquet(path, columns=list(_COLUMNS))
        pictures = tuple(_picture(row, taxonomy) for row in table.to_dict("records"))
    except (ValueError, OSError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise StorageError(f"{path}: damaged ({reason}); delete it and give the study's command again") from error
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


# The page: one HTML file that holds everything and asks for nothing.


def write_report(run: Path, out: Path | None = None, *, command: str = "report") -> Path:
    """Write the report of a study.

    Parameters
    ----------
    run : Path
        Folder of the run, or its results folder.
    out : Path, optional
        The file; ``RUN/report.html`` by default.
    command : str
        What shows the figures, for the record of looks (:mod:`counterstain.study.test_access_log`).

    Returns
    -------
    Path
        The file.

    Raises
    ------
    InputError
        The study is missing or not finished, a table holds what it cannot, or ``out`` is a folder.
    StorageError
        A file is damaged or cannot be written.
    """
    path = out or run / "report.html"
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a file, for example {path / 'report.html'}")
    if path.parent.exists() and not path.parent.is_dir():
        raise InputError(f"{path.parent}: is a file, not a folder; give another place for the report")
    write_text(path, render(looked_at(read_results(run), command), place=path.parent))
    return path


def render(results: Results, *, place: Path | None = None, draws: int = 10_000, seed: int = 0) -> str:
    """Return the report as HTML, the same text for the same results.

    Parameters
    ----------
    results : Results
    place : Path, optional
        Folder that the report will lie in, for its links to logs; the study's folder if not given.
    draws, seed : int
        Of the bootstrap.
    """
    effects = effects_on_test(results, draws=draws, seed=seed)
    chosen = chosen_arm(results)
    trainings, sets = read_trainings(results.folder), read_sets(results.folder)
    fairness = read_fairness(results.folder)
    return _template().render(
        css=_inlined("page.css"),
        js=_inlined("page.js"),
        study=results.study,
        facts=_facts(results),
        reference=label_of(results.study.reference),
        chosen=label_of(chosen) if chosen else None,
        ceiling=CEILING if any(is_oracle(arm) for arm in results.arms) else None,
        summary=summarise(results, effects, chosen),
        differences=tables.differences_table(results, effects, chosen),
        power=tables.power_table(results, effects),
        scores=[tables.results_table(results, split, chosen) for split in ("test", "val")],
        variants=[t for split in ("test", "val") if (t := tables.variants_table(results, split, chosen))],
        figures={view.anchor: view for view in figure_views(results, chosen)},
        filter=tables.filter_table(results),
        times=tables.times_table(results),
        versions=tables.versions_table(results),
        config=yaml.safe_dump(results.study.config, sort_keys=False, allow_unicode=True),
        draws=draws,
        copies=table_copies(results, effects, chosen),
        methods=methods_paragraphs(results.study, fairness["starts_from"].tolist()),
        generates=any(method_of(arm) in METHODS for arm in results.study.arms),
        fairness=fairness_sentences(fairness),
        sheets=data_sheets(sets, trainings, results.study),
        intended_use=INTENDED_USE,
        limits=LIMITS,
        gallery=read_gallery(results.folder, results.study.taxonomy),
        logs=_logs(trainings, results.folder.parent, place or results.folder.parent),
    )


def _facts(results: Results) -> list[tuple[str, str]]:
    """Return what a reader wants to know first: name and value."""
    study = results.study
    patients = " / ".join(f"{count} {part}" for part, count in study.cohort.patients.items())
    facts = {
        "Preset": study.preset,
        "Cohort": study.cohort.source,
        "Patients": patients,
        "Regions": f"{study.cohort.regions:,}" if study.cohort.regions else "",
        "Resolution": f"{study.cohort.mpp:g} µm per pixel" if study.cohort.mpp else "",
        "Arms": f"{len(study.arms)}, {counted(study.repeats, 'repeat')} each",
        "Device": study.device,
    }
    return [(name, value) for name, value in facts.items() if value]


def _logs(trainings: tuple[TrainingRecord, ...], run: Path, place: Path) -> list[tuple[str, str, str]]:
    """Return name, length and relative address of the curves of every training that left some."""
    return [
        (
            training.name,
            f"{training.steps:,} steps, {duration(training.seconds)}",
            quote(_way(run / training.logs, place)),
        )
        for training in trainings
        if training.logs
    ]


def _way(folder: Path, place: Path) -> str:
    return Path(os.path.relpath(folder, place)).as_posix() + "/"


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(_file("page.html.j2"))


def _inlined(name: str) -> Markup:
    """Return a file of this package to be written into the page as it is: it is ours, nobody's input."""
    return Markup(_file(name))  # noqa: S704


def _file(name: str) -> str:
    return (resources.files("counterstain.report") / name).read_text(encoding="utf-8")
