"""The page: one HTML file that holds everything and asks for nothing."""

from __future__ import annotations

import os
from functools import cache
from importlib import resources
from pathlib import Path
from urllib.parse import quote

import yaml
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from counterstain.errors import InputError
from counterstain.generators.methods import METHODS
from counterstain.report import tables
from counterstain.report.arms import CEILING, is_oracle, label_of, method_of
from counterstain.report.copies import table_copies
from counterstain.report.datasheet import INTENDED_USE, LIMITS, data_sheets
from counterstain.report.effects import chosen_arm, effects_on_test
from counterstain.report.fairness import fairness_sentences, read_fairness
from counterstain.report.gallery import read_gallery
from counterstain.report.methods import methods_paragraphs
from counterstain.report.numbers import counted, duration
from counterstain.report.record import TrainingRecord, read_sets, read_trainings
from counterstain.report.results import Results, looked_at, read_results
from counterstain.report.summary import summarise
from counterstain.report.views import figure_views
from counterstain.storage import write_text


def write_report(run: Path, out: Path | None = None, *, command: str = "report") -> Path:
    """Write the report of a study.

    Parameters
    ----------
    run : Path
        Folder of the run, or its results folder.
    out : Path, optional
        The file; ``RUN/report.html`` by default.
    command : str
        What shows the figures, for the record of looks (:mod:`counterstain.study.looks`).

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
