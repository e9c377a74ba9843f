"""Tables to copy: as CSV with every digit, as LaTeX (booktabs) as they stand on the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pandas as pd

from counterstain.report.effects import Effects
from counterstain.report.numbers import MINUS, NONE
from counterstain.report.results import Results
from counterstain.report.tables import Row, Table, differences_table, results_table
from counterstain.study.statistics import spread

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
