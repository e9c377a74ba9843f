"""The page: one HTML file that holds everything and asks for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from urllib.parse import quote

import yaml
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from matplotlib.figure import Figure

from counterstain.errors import InputError
from counterstain.report import figures, tables
from counterstain.report.arms import CEILING, is_oracle, label_of
from counterstain.report.effects import chosen_arm, effects_on_test
from counterstain.report.numbers import counted
from counterstain.report.results import Results, looked_at, read_results
from counterstain.report.summary import summarise
from counterstain.storage import replacing, write_text

PNG_DPI = 150


@dataclass(frozen=True, slots=True)
class FigureView:
    """A figure on the page."""

    anchor: str
    figure: Figure
    alt: str
    caption: str

    @property
    def source(self) -> str:
        """Data URI of the figure as SVG."""
        svg = figures.svg_text(self.figure)
        return "data:image/svg+xml," + quote(" ".join(svg.split("\n")), safe=" /:;=,'()!*@+$?~")


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
    write_text(path, render(looked_at(read_results(run), command)))
    return path


def write_figures(run: Path, folder: Path) -> list[Path]:
    """Write every figure of the report of a study as ``NAME.svg`` and ``NAME.png``; return the files.

    Raises
    ------
    InputError
        The study is missing or not finished, or a table holds what it cannot.
    StorageError
        A file is damaged or cannot be written.
    """
    results = read_results(run)
    files = []
    for view in _figures(results, chosen_arm(results)):
        files += [folder / f"{view.anchor}.svg", folder / f"{view.anchor}.png"]
        write_text(files[-2], figures.svg_text(view.figure))
        with replacing(files[-1]) as partial:
            view.figure.savefig(partial, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return files


def render(results: Results, *, draws: int = 10_000, seed: int = 0) -> str:
    """Return the report as HTML, the same text for the same results."""
    effects = effects_on_test(results, draws=draws, seed=seed)
    chosen = chosen_arm(results)
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
        figures={view.anchor: view for view in _figures(results, chosen)},
        filter=tables.filter_table(results),
        times=tables.times_table(results),
        versions=tables.versions_table(results),
        config=yaml.safe_dump(results.study.config, sort_keys=False, allow_unicode=True),
        draws=draws,
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


def _figures(results: Results, chosen: str | None) -> list[FigureView]:
    study, taxonomy = results.study, results.study.taxonomy
    tissue, reference = taxonomy.tissue_class, label_of(study.reference)
    beside = f" beside {label_of(chosen)}, the best arm on validation, and their difference" if chosen else ""
    return [
        FigureView(
            "boxplots",
            figures.boxplots(results.results, taxonomy, arms=results.arms, reference=study.reference),
            f"Box plots of {tissue} Dice and subtype variance on the test part for {_listed(results.arms)}. "
            "The numbers stand in the results table.",
            f"{tissue.capitalize()} Dice and subtype variance on the test part. Box: mean ± standard deviation; "
            f"whiskers: smallest and largest repeat; dots: repeats; dashed line: mean of {reference}."
            + (f" Oracle: {CEILING}." if any(map(is_oracle, results.arms)) else ""),
        ),
        FigureView(
            "confusion",
            figures.confusion(results.counts, taxonomy, reference=study.reference, arm=chosen),
            f"Confusion by subtype of {reference}{beside}, in percent of each row.",
            f"Confusion by subtype on the test part: {reference}{beside}. Pixels pooled over the part, percent of each "
            "row, averaged over repeats.",
        ),
        FigureView(
            "composition",
            figures.composition(results.composition, taxonomy, mpp=study.cohort.mpp),
            f"Bars of the share of {', '.join(taxonomy.names)} in each part of the cohort, by instances and by area.",
            "Subtypes in each part of the cohort, by instances and by annotated area.",
        ),
        FigureView(
            "balance",
            figures.balance(results.synthetic, taxonomy),
            "Bars of the share of every subtype in the synthetic sets before and after relabelling.",
            "Subtypes in the synthetic sets before (hatched) and after (filled) relabelling. Dashed: equal shares. "
            "Relabelling balances what it was told to, so instances and area differ.",
        ),
        FigureView(
            "examples",
            figures.examples(results.examples, taxonomy, mpp=study.cohort.mpp),
            f"{counted(len(results.examples), 'patch', 'patches')}: real image, its labels, new labels and the image "
            "that every method made of them.",
            "Real patches, their labels, the new labels, and what every method made of them.",
        ),
        FigureView(
            "training",
            figures.training_curves(results.losses),
            "Training curves of every generator and segmenter, one panel for each loss.",
            "Losses by optimiser step; a line for each training. Long curves are drawn as means over equal numbers of "
            "steps.",
        ),
    ]


def _listed(arms: Sequence[str]) -> str:
    return ", ".join(label_of(arm) for arm in arms)


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(_file("page.html.j2"))


def _inlined(name: str) -> Markup:
    """Return a file of this package to be written into the page as it is: it is ours, nobody's input."""
    return Markup(_file(name))  # noqa: S704


def _file(name: str) -> str:
    return (resources.files("counterstain.report") / name).read_text(encoding="utf-8")
