"""The figures and tables of a report as files of their own."""

from __future__ import annotations

from pathlib import Path

from counterstain.report.copies import table_copies
from counterstain.report.effects import chosen_arm, effects_on_test
from counterstain.report.figure_style import save_figure
from counterstain.report.results import read_results
from counterstain.report.views import figure_views
from counterstain.storage import write_text


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
