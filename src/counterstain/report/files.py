"""Tables to copy: as CSV with every digit, as LaTeX (booktabs) as they stand on the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

import pandas as pd
from matplotlib.figure import Figure

from counterstain.progress import counted
from counterstain.report import figures
from counterstain.report.effects import Effects, chosen_arm, effects_on_test
from counterstain.report.example_figures import examples
from counterstain.report.figure_style import save_figure, svg_text
from counterstain.report.formatting import CEILING, MINUS, NONE, is_oracle, label_of
from counterstain.report.results import Results, read_results
from counterstain.report.tables import Row, Table, differences_table, results_table
from counterstain.storage import write_text
from counterstain.study.statistics.arm_differences import spread

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\N{NO-BREAK SPACE}": "~", "±": r"$\pm$", MINUS: "$-$",
    NONE: "--", "µ": r"\textmu{}", "²": r"$^2$", "<": "$<$", ">": "$>$", "|": r"\textbar{}",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A table in the forms in which it can be copied."""

    name: str
    """Of its files, and on the page."""
    csv: str
    latex: str


def table_copies(results: Results, effects: Effects, chosen: str | None) -> dict[str, Copy]:
    """Return what can be copied by name: ``results-test``, ``results-val`` and, with two arms or more, ``effects``."""
    copies = {}
    for split in ("test", "val"):
        part = spread(results.results[results.results["split"] == split])
        name = f"results-{split}"
        copies[name] = Copy(name=name, csv=_csv(part), latex=latex(results_table(results, split, chosen), label=name))
    if effects:
        rows = [{"arm": arm, "measure": measure} | asdict(effect) for (arm, measure), effect in effects.items()]
        text = latex(differences_table(results, effects, chosen), label="effects")
        copies["effects"] = Copy(name="effects", csv=_csv(pd.DataFrame(rows)), latex=text)
    return copies


def latex(table: Table, *, label: str) -> str:
    """Write a table for LaTeX's booktabs; what stands small under a number becomes a line of its own.

    Parameters
    ----------
    table : Table
    label : str
        ``tab:LABEL``.
    """
    columns = "l" + "r" * (len(table.columns) - 1)
    head = " & ".join(map(_escaped, table.columns))
    body = "\n".join(line for row in table.rows for line in _lines(row))
    return (
        "% needs \\usepackage{booktabs}\n"
        "\\begin{table*}\n\\centering\\footnotesize\n"
        f"\\caption{{{_escaped(table.caption)}.}}\n\\label{{tab:{label}}}\n"
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{head} \\\\\n\\midrule\n{body}\n\\bottomrule\n"
        "\\end{tabular}\n\\end{table*}\n"
    )


def _lines(row: Row) -> list[str]:
    head = _escaped(row.head) + (f" ({_escaped(', '.join(row.tags))})" if row.tags else "")
    lines = [_joined(head, [_escaped(cell.text) for cell in row.cells])]
    notes = [cell.note.split("\n") if cell.note else [] for cell in row.cells]
    for number in range(max(map(len, notes), default=0)):
        small = [_small(note[number]) if number < len(note) else "" for note in notes]
        lines.append(_joined("", small))
    return lines


def _joined(head: str, cells: Sequence[str]) -> str:
    return " & ".join([head, *cells]) + r" \\"


def _small(text: str) -> str:
    return rf"{{\scriptsize {_escaped(text)}}}"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _csv(table: pd.DataFrame) -> str:
    return str(table.to_csv(index=False, lineterminator="\n"))


# The figures of a report with what is said of them.


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
        svg = svg_text(self.figure)
        return "data:image/svg+xml," + quote(" ".join(svg.split("\n")), safe=" /:;=,'()!*@+$?~")


def figure_views(results: Results, chosen: str | None) -> list[FigureView]:
    """Draw every figure; ``chosen`` is the arm that validation chose."""
    study, taxonomy = results.study, results.study.taxonomy
    tissue, reference = taxonomy.tissue_class, label_of(study.reference)
    beside = f" beside {label_of(chosen)}, chosen on validation, and their difference" if chosen else ""
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
            examples(results.examples, taxonomy, mpp=study.cohort.mpp),
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


# The figures and tables of a report as files of their own.


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
    for view in figure_views(results, chosen_arm(results)):
        for kind in ("svg", "png"):
            files.append(folder / f"{view.anchor}.{kind}")
            save_figure(view.figure, files[-1])
    return files


def write_tables(run: Path, folder: Path) -> list[Path]:
    """Write the tables of results and of differences as ``NAME.csv`` and ``NAME.tex``; return the files.

    Raises
    ------
    InputError
        The study is missing or not finished, or a table holds what it cannot.
    StorageError
        A file is damaged or cannot be written.
    """
    results = read_results(run)
    files = []
    for copy in table_copies(results, effects_on_test(results), chosen_arm(results)).values():
        for ending, text in (("csv", copy.csv), ("tex", copy.latex)):
            files.append(folder / f"{copy.name}.{ending}")
            write_text(files[-1], text)
    return files
