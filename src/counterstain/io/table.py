"""CSV tables as people save them, checked row by row before anything is written.

Rows are numbered as a spreadsheet numbers them: the header is row 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import Field

from counterstain.config import Config
from counterstain.data.cohort import PARTS
from counterstain.errors import InputError
from counterstain.io.masks import label_size
from counterstain.io.pixel_readers import image_size
from counterstain.storage import without_apostrophe

FIRST_ROW = 2

ColumnName = Annotated[str, Field(min_length=1)]


def csv_rows(
    path: str | Path, required: Sequence[str], optional: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield every row of a table with its place for messages, ``TABLE.csv row 2``.

    Raises InputError where the file is missing, is not CSV or lacks a required column.
    """
    table = _read_csv(Path(path))
    missing = [name for name in required if name not in table]
    if missing:
        raise InputError(
            f"{path}: no column {missing[0]!r}; expected {', '.join(required)} and perhaps {', '.join(optional)}"
        )
    for number, row in enumerate(table.to_dict("records"), start=FIRST_ROW):
        yield f"{path} row {number}", {str(name): value for name, value in row.items()}


def _read_csv(path: Path) -> pd.DataFrame:
    """Read a table as text without white space around it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # without index_col, all columns would shift
            table = pd.read_csv(
                path, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True, index_col=False
            )
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise InputError(f"{path}: no such file; expected a CSV table") from error
    except pd.errors.EmptyDataError as error:
        raise InputError(f"{path}: the table is empty; expected a header and rows") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8; save the table as 'CSV UTF-8'") from error
    except pd.errors.ParserWarning as error:
        raise InputError(
            f"{path} row {FIRST_ROW}: more values than the header has columns; remove commas at the ends of rows, "
            "write decimals with a point (0.25), and put text that holds a comma in quotes"
        ) from error
    except ValueError as error:  # pandas' other errors
        raise InputError(f"{path}: not a CSV table ({' '.join(str(error).split())})") from error
    if table.empty:
        raise InputError(f"{path}: the table has a header but no row")
    cells = {str(name).strip(): table[name].fillna("").str.strip() for name in table.columns}
    return pd.DataFrame({name: column.map(without_apostrophe) for name, column in cells.items()})


class Columns(Config):
    """Names of a table's columns; other columns are ignored."""

    image: ColumnName = "image"
    """Image file, relative to the table's folder."""
    label: ColumnName = "label"
    """Label image, relative to the table's folder."""
    patient: ColumnName = "patient"
    """Patient; splits are made by it."""
    subtype: ColumnName = "subtype"
    """Subtype of the image; needed where label images are masks."""
    slide: ColumnName = "slide"
    """Slide; the patient where there is no such column."""
    part: ColumnName = "part"
    """train, val or test; no split where there is no such column."""
    score: ColumnName = "score"
    """Score of the slide, by which splits are stratified; the patient's commonest subtype without such a column."""
    region: ColumnName = "region"
    """Name of the region; the image's file name where there is no such column."""


def read_table(path: Path, columns: Columns, *, labels: Literal["mask", "ids"]) -> pd.DataFrame:
    """Read a table of images and check everything that can be checked without a pixel.

    Label images that are masks need the subtype column. Returned are the columns row, image, label (absolute paths),
    region, slide, patient, score, split, subtype (name or None), height_px, width_px.

    Raises
    ------
    InputError
        One line that names the row, the column, the value and the remedy.
    """
    table = _read_csv(path)
    _check_columns(path, table, columns, ["image", "label", "patient", *(["subtype"] if labels == "mask" else [])])
    names = columns.model_dump()
    named = pd.DataFrame({field: table[name] for field, name in names.items() if name in table})
    named.insert(0, "row", range(FIRST_ROW, len(table) + FIRST_ROW))
    _check_filled(path, named, columns)
    defaults = {"subtype": None, "score": None, "part": None, "slide": named["patient"]}
    named = named.assign(**{field: value for field, value in defaults.items() if field not in named})
    if "region" not in named:
        files = named["image"].map(Path)
        stems = files.map(lambda file: file.stem)
        clash = stems.duplicated().any()
        named["region"] = files.map(lambda file: file.with_suffix("").as_posix()) if clash else stems
    named["score"] = _scores(named)
    _check_spelling(path, named)
    _check_parts(path, named)
    _check_identities(path, named)
    for field in ("image", "label"):
        named[field] = [path.parent.resolve() / file for file in named[field]]
    return _with_sizes(path, named.rename(columns={"part": "split"}))


def _check_columns(path: Path, table: pd.DataFrame, columns: Columns, required: list[str]) -> None:
    default, found = Columns(), ", ".join(table.columns)
    for field, name in columns.model_dump().items():
        if name in table:
            continue
        if field in required:
            if len(table.columns) == 1 and ";" in found:
                raise InputError(f"{path}: its columns are separated by semicolons; save it with commas")
            raise InputError(f"{path}: no column {name!r}; found {found}; name the right one with --{field}-column")
        if name != getattr(default, field):
            raise InputError(f"{path}: no column {name!r} (--{field}-column); found {found}")


def _check_filled(path: Path, named: pd.DataFrame, columns: Columns) -> None:
    if "part" in named and (named["part"] == "").all():
        named["part"] = None
    for field in named.columns.drop(["row", "score"], errors="ignore"):
        for row in named["row"][named[field] == ""]:
            raise InputError(f"{path} row {row}: column {getattr(columns, str(field))!r} is empty; fill it in")


def _scores(named: pd.DataFrame) -> pd.Series:
    """Return the given scores, otherwise each patient's commonest subtype (of equally common ones the first)."""
    given = named["score"].replace("", None)
    if given.notna().any() or named["subtype"].isna().all():
        return given
    commonest = named.groupby("patient")["subtype"].agg(lambda subtypes: subtypes.mode().iloc[0])
    return named["patient"].map(commonest)


def _check_parts(path: Path, named: pd.DataFrame) -> None:
    for row, part in named.dropna(subset="part")[["row", "part"]].to_numpy():
        if part not in PARTS:
            raise InputError(f"{path} row {row}: unknown part {part!r}; expected {', '.join(PARTS)}")
    for patient, first, second in _conflicts(named, "patient", "part"):
        raise InputError(
            f"{path}: patient {patient} is in two parts, {first['part']} (row {first['row']}) and {second['part']} "
            f"(row {second['row']}); move all rows of a patient to one part"
        )


def _check_spelling(path: Path, named: pd.DataFrame) -> None:
    spelled: dict[str, tuple[str, int]] = {}
    for name, row in named.dropna(subset="subtype").drop_duplicates("subtype")[["subtype", "row"]].to_numpy():
        first, first_row = spelled.setdefault("".join(name.casefold().split()), (name, row))
        if first != name:
            raise InputError(f"{path}: subtype {first!r} in row {first_row} is {name!r} in row {row}; use one spelling")


def _check_identities(path: Path, named: pd.DataFrame) -> None:
    for region, rows in named[named["region"].duplicated(keep=False)].groupby("region")["row"]:
        raise InputError(
            f"{path}: region {region!r} is in rows {rows.iloc[0]} and {rows.iloc[1]}; "
            "remove one, or name them differently in a column 'region'"
        )
    for field, remedy in (("patient", "give each slide its own name"), ("score", "give each slide one score")):
        for slide, first, second in _conflicts(named, "slide", field):
            raise InputError(
                f"{path}: slide {slide} has two values of {field}, {first[field]} (row {first['row']}) and "
                f"{second[field]} (row {second['row']}); {remedy}"
            )


def _conflicts(named: pd.DataFrame, key: str, field: str) -> Iterator[tuple[str, pd.Series, pd.Series]]:
    """Yield keys that have several values of a field, with the first row of two of them."""
    distinct = named[[key, field, "row"]].dropna(subset=[field]).drop_duplicates([key, field])
    for name, rows in distinct[distinct.duplicated(key, keep=False)].groupby(key, sort=False):
        yield str(name), rows.iloc[0], rows.iloc[1]


def _with_sizes(path: Path, named: pd.DataFrame) -> pd.DataFrame:
    sizes = []
    for row, image, label in zip(named["row"], named["image"], named["label"], strict=True):
        try:
            size, of_label = image_size(image), label_size(label)
        except InputError as error:
            raise InputError(f"{path} row {row}: {error}") from error
        if size != of_label:
            raise InputError(
                f"{path} row {row}: {image.name} is {size[0]} x {size[1]} px but its label {label.name} is "
                f"{of_label[0]} x {of_label[1]} px (rows x columns); export both at the same scale"
            )
        sizes.append(size)
    return named.assign(height_px=[height for height, _ in sizes], width_px=[width for _, width in sizes])
