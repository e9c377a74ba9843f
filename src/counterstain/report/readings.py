"""Results of blind reading tests and of traces of synthetic sets, as sections of the report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from pydantic import TypeAdapter, ValidationError

from counterstain.audit.reading_result import ALL_READERS, RESULT_FILE, TABLES
from counterstain.audit.trace_result import TRACE_FILE
from counterstain.errors import CounterstainError, StorageError
from counterstain.report.tables import NONE, Cell, Row, Table, plain_table
from counterstain.storage import read_csv, read_json

READING_TESTS = "reading-tests"  # folder of their results in that of a study
TRACES = "traces"  # likewise, of traced sets
COLUMNS = {
    "accuracy": "Real or drawn, right",
    "drawn_found": "Drawn called drawn",
    "real_found": "Real called real",
    "subtype_of_real": "Subtype of real",
    "subtype_of_drawn": "Subtype of drawn",
}
SENTENCES = TypeAdapter(list[str])


class ReadingSection(NamedTuple):
    """A reading test as the page shows it."""

    name: str
    found: list[str]  # sentences
    readers: Table
    confusions: list[Table]  # of subtypes, for real and for drawn patches, all readers together
    agreement: Table | None


class TraceSection(NamedTuple):
    """The trace of a synthetic set as the page shows it."""

    name: str
    found: list[str]  # sentences, the verdict last
    tests: Table
    of: tuple[str, ...]  # what tells the set: its method, generator, cohort and seed

    @property
    def verdict(self) -> str:
        """What may be shared."""
        return self.found[-1]


def trace_sections(run: Path) -> list[TraceSection]:
    """Read the traces in a study's folder; StorageError where one is damaged."""
    return [_trace(file) for file in sorted((run / TRACES).glob(f"[!.]*/{TRACE_FILE}"))]


def _trace(file: Path) -> TraceSection:
    try:
        about = read_json(file)
        found = SENTENCES.validate_python(about["found"])
        rows = [
            (
                test["test"],
                f"{test['value']:.2f}",
                NONE if test["low"] is None else f"{test['low']:.2f} to {test['high']:.2f}",
                f"{test['p']:.3g}",
                NONE if test["p_holm"] is None else f"{test['p_holm']:.3g}",
                "alarm" if test["alarm"] else "none",
            )
            for test in about["tests"]
        ]
        columns = ("Test", "Value", "95 % interval", "p", "p (Holm)", "Alarm")
        of = tuple(str(about[key]) for key in ("method", "generator", "cohort", "seed"))
        caption = "Tests over patients; together they raise a false alarm in 5 % of cases at most"
        return TraceSection(str(about["set"]), found, plain_table(caption, columns, rows), of)
    except (CounterstainError, ValidationError, KeyError, IndexError, TypeError, ValueError) as error:
        remedy = f"give 'trace --study' again, or delete {file.parent}"
        raise StorageError(f"{file}: damaged ({' '.join(str(error).split())[:120]}); {remedy}") from error


def reading_sections(run: Path, names: tuple[str, ...]) -> list[ReadingSection]:
    """Read the results of the reading tests in a study's folder; ``names`` are the subtypes.

    Raises StorageError where one is damaged.
    """
    places = sorted(place.parent for place in (run / READING_TESTS).glob(f"[!.]*/{RESULT_FILE}"))
    return [_section(place, names) for place in places]


def _section(place: Path, names: tuple[str, ...]) -> ReadingSection:
    try:
        found = SENTENCES.validate_python(read_json(place / RESULT_FILE)["found"])
        readers, confusion, agreement = (read_csv(place / f"{name}.csv") for name in TABLES)
        kappas = [
            (who, what.replace("drawn", "real or drawn"), statistic, f"{float(kappa):.2f}", f"{int(questions)}")
            for who, what, statistic, kappa, questions in agreement.to_numpy()
        ]
        columns = ("Readers", "Question", "Kappa of", "Kappa", "Patches")
        return ReadingSection(
            name=place.name,
            found=found,
            readers=_readers(readers),
            confusions=[_confusion(confusion[confusion["kind"] == kind], kind, names) for kind in ("real", "drawn")],
            agreement=plain_table("Agreement between readers", columns, kappas) if kappas else None,
        )
    except (CounterstainError, ValidationError, KeyError, TypeError, ValueError, OSError) as error:
        remedy = f"give 'reading-test result' again, or delete {place}"
        raise StorageError(f"{place}: damaged ({' '.join(str(error).split())[:120]}); {remedy}") from error


def _readers(table: pd.DataFrame) -> Table:
    rows = []
    ends = [f"{name}{end}" for name in COLUMNS for end in ("", "_low", "_high")]
    for row in table[["reader", "answers", "d_prime", *ends]].to_dict("records"):
        cells = [Cell(f"{row['answers']:,}", value=float(row["answers"]))]
        cells += [_share(row, name) for name in COLUMNS]
        rows.append(Row(str(row["reader"]), (*cells, Cell(f"{row['d_prime']:.2f}", value=float(row["d_prime"])))))
    caption = "Readers, shares in per cent with 95 % intervals: exact for each reader" + (
        f"; of {ALL_READERS}, means with intervals over readers and patches, from three readers on"
        if len(rows) > 1
        else ""
    )
    return Table(caption, ("Reader", "Answers", *COLUMNS.values(), "d'"), tuple(rows))


def _share(row: dict[Any, Any], name: str) -> Cell:
    value, low, high = (100 * float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    if not math.isfinite(value):
        return Cell(NONE)
    return Cell(f"{value:.0f}", f"{low:.0f} to {high:.0f}" if math.isfinite(low) else "", value)


def _confusion(table: pd.DataFrame, kind: str, names: tuple[str, ...]) -> Table:
    """Return the answers by shown (row) and answered subtype, in per cent of each row with their number."""
    counts = table.pivot_table(index="shown", columns="answered", values="answers", aggfunc="sum").fillna(0)
    counts = counts.reindex(index=[name for name in names if name in counts.index], columns=list(names), fill_value=0)
    rows = []
    for shown, given in zip(counts.index, counts.to_numpy(float), strict=True):
        cells = [Cell(f"{100 * n / given.sum():.0f}", f"{n:.0f}", 100 * n / given.sum()) for n in given.tolist()]
        rows.append(Row(str(shown), tuple(cells)))
    caption = f"Subtypes seen in {kind} patches, per cent of each row (and answers) over all readers"
    return Table(caption, ("Shown \\ seen", *names), tuple(rows))
