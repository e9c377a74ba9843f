"""CSV tables as people save them: text, with a header, from a spreadsheet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from counterstain.errors import InputError

FIRST_ROW = 2  # as a spreadsheet numbers rows: the header is row 1


def csv_rows(path: Path, required: Sequence[str], optional: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield every row of a table with its place for messages, ``TABLE.csv row 2``.

    Raises
    ------
    InputError
        The file is missing, is not CSV or lacks a required column.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"{path}: no such file; expected a CSV table") from error
    except ValueError as error:  # pandas' own errors are ValueErrors
        raise InputError(f"{path}: not a CSV table ({' '.join(str(error).split())})") from error
    columns = [str(name).strip() for name in table.columns]
    missing = [name for name in required if name not in columns]
    if missing:
        raise InputError(
            f"{path}: no column {missing[0]!r}; expected {', '.join(required)} and perhaps {', '.join(optional)}"
        )
    for number, values in enumerate(table.fillna("").itertuples(index=False), start=FIRST_ROW):
        yield f"{path} row {number}", dict(zip(columns, (str(value).strip() for value in values), strict=True))
