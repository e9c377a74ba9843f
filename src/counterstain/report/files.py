"""The figures and tables of a report as files of their own."""

from __future__ import annotations

from pathlib import Path

from counterstain.report import figures
from counterstain.report.copies import table_copies
from counterstain.report.effects import chosen_arm, effects_on_test
from counterstain.report.results import read_results
from counterstain.report.views import figure_views
from counterstain.storage import replacing, write_text

PNG_DPI = 150


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
        files += [folder / f"{view.anchor}.svg", folder / f"{view.anchor}.png"]
        write_text(files[-2], figures.svg_text(view.figure))
        with replacing(files[-1]) as partial:
            view.figure.savefig(partial, format="png", dpi=PNG_DPI, metadata={"Software": None})
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
