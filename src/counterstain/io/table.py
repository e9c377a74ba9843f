"""CSV tables as people save them, checked row by row before anything is written.

Rows are numbered as a spreadsheet numbers them: the header is row 1.
"""

from __future__ import annotations

import csv
import io
import os
import re
import textwrap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
from pydantic import Field

from counterstain.config import Config
from counterstain.data.cohort import PARTS
from counterstain.data.split import same_patient
from counterstain.errors import InputError
from counterstain.io.parts import Part, is_pixels, source_of
from counterstain.io.pixel_readers import image_size
from counterstain.storage import without_apostrophe
from counterstain.taxonomy import CONTROL, alike

LONGEST_NAME = 300  # characters of a cell that is a name or a path
LOST = re.compile(
    r"nan|null|none|na|n/a|#n/a|[-\u2013?.]+|#+|#(?:ref|value|name|null|div/0)[!?]|\d(?:[.,]\d+)?e\+\d+", re.IGNORECASE
)
OTHER_PARTS = ("training", "validation", "valid", "testing")
EXCELS_LINE = re.compile(r"sep=.?", re.IGNORECASE)
ZIP = b"PK\x03\x04"

ColumnName = Annotated[str, Field(min_length=1)]


def csv_rows(
    path: str | Path, required: Sequence[str], optional: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield every row of a table with its place for messages, ``TABLE.csv row 2``.

    Raises InputError where the file is missing, is not CSV or lacks a required column.
    """
    table = _read_csv(Path(path), dict.fromkeys((*required, *optional), ""))
    missing = [name for name in required if name not in table]
    if missing:
        raise InputError(
            f"{path}: no column {missing[0]!r}; expected {', '.join(required)} and perhaps {', '.join(optional)}"
        )
    for number, row in zip(table.index, table.to_dict("records"), strict=True):
        yield f"{path} row {number}", {str(name): value for name, value in row.items()}


def _read_csv(path: Path, used: Mapping[str, str]) -> pd.DataFrame:
    """Read a table as text without white space around it; its index holds the numbers of the rows.

    ``used`` holds the columns that are looked at, each with what else its message may advise.
    """
    rows = _rows(path)
    rows = {number: row for number, row in rows.items() if number > 1 or not EXCELS_LINE.fullmatch("".join(row))}
    if not rows:
        raise InputError(f"{path}: the table is empty; expected a header and rows")
    (header_row, header), *body = rows.items()
    _check_header(f"{path} row {header_row}", header, used)
    if not body:
        raise InputError(f"{path}: the table has a header but no row")
    for number, row in body:
        _check_row(f"{path} row {number}", header, row, used)
    cells = [[*map(without_apostrophe, row), *[""] * (len(header) - len(row))] for _, row in body]
    table = pd.DataFrame(cells, columns=header, index=[number for number, _ in body], dtype=object)
    return table.loc[:, ~table.columns.duplicated()]


def _check_header(where: str, header: list[str], used: Mapping[str, str]) -> None:
    for sign, name in {";": "semicolons", "\t": "tabs"}.items():
        if len(header) == 1 and sign in header[0]:
            raise InputError(f"{where}: its columns are separated by {name}; save it with commas")
    for name, advice in used.items():
        if header.count(name) > 1:
            raise InputError(f"{where}: two columns are called {name!r}; rename one, or remove it")
        alike = [other for other in header if _column_key(other) == _column_key(name)]
        if alike and name not in header:
            raise InputError(f"{where}: column {alike[0]!r} is spelt {name!r}; rename it{advice}")


def _column_key(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.casefold())


def _check_row(where: str, header: list[str], row: list[str], used: Mapping[str, str]) -> None:
    if len(row) > len(header):
        raise InputError(
            f"{where}: more values than the header has columns; remove commas at the ends of rows, "
            "write decimals with a point (0.25), and put text that holds a comma in quotes"
        )
    for name, cell in zip(header, row, strict=False):
        if name in used and (found := CONTROL.search(cell)):
            raise InputError(f"{where}: column {name!r} holds a control character ({found[0]!r}); remove it")
        if name in used and len(cell) > LONGEST_NAME and not cell.startswith("["):  # a list of patients
            raise InputError(f"{where}: column {name!r} holds more than {LONGEST_NAME} characters; shorten it")


def _rows(path: Path) -> dict[int, list[str]]:
    """Return the cells of all rows that are not blank by the number that a spreadsheet gives the row."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise InputError(f"{path}: no such file; expected a CSV table") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if content.startswith(ZIP):
        raise InputError(f"{path}: a workbook of a spreadsheet, not a CSV table; save it as 'CSV UTF-8'")
    if b"\0" in content:
        raise InputError(f"{path}: holds NUL bytes, as UTF-16 and damaged files do; save the table as 'CSV UTF-8'")
    try:
        lines = io.StringIO(content.decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); save the table as 'CSV UTF-8'") from error
    reader = csv.reader(lines, skipinitialspace=True, strict=True)
    try:
        rows = {number: [cell.strip() for cell in row] for number, row in enumerate(reader, start=1)}
    except csv.Error as error:
        raise InputError(f"{path}: not a CSV table (line {reader.line_num}: {error})") from error
    return {number: row for number, row in rows.items() if any(row)}


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
    instances: str = ""
    """Instance map of the image, which keeps touching instances apart; none if empty."""


def read_table(path: Path, columns: Columns, *, subtypes: bool = True, known_subtypes: bool = False) -> pd.DataFrame:
    """Read a table of images and check everything that can be checked without a pixel.

    ``subtypes`` says that label images need the subtype column, ``known_subtypes`` that a taxonomy lists its names.
    Returned is what :func:`checked_rows` returns.

    Raises InputError with one line that names the row, the column, the value and the remedy.
    """
    names = {field: name for field, name in columns.model_dump().items() if name}
    table = _read_csv(path, {name: f" or give --{field}-column" for field, name in names.items()})
    labels = table.get(columns.label, ["?"])
    masks = subtypes and any(is_pixels(label) and ".zarr[" not in label for label in labels)  # these may name classes
    _check_columns(path, table, columns, ["image", "label", "patient", *(["subtype"] if masks else [])])
    _check_no_other_parts(path, table, columns)
    named = pd.DataFrame({field: table[name] for field, name in names.items() if name in table})
    named.insert(0, "row", [f"row {number}" for number in table.index])
    return checked_rows(path, path.parent, named.reset_index(drop=True), columns, known_subtypes=known_subtypes)


def checked_rows(
    path: Path, folder: Path, named: pd.DataFrame, columns: Columns, *, known_subtypes: bool = False
) -> pd.DataFrame:
    """Check rows of text: ``row`` (their place, for messages), image, label and patient, and perhaps the other columns.

    Images and label images are relative to ``folder``, or parts of files there. Returned are the columns row, number,
    image, label, instances (absolute paths, or parts of files), region, slide, patient, score, split, subtype (name or
    None), height_px, width_px.
    """
    _check_filled(path, named, columns)
    defaults = {"subtype": None, "score": None, "part": None, "slide": named["patient"]}
    named = named.assign(**{field: value for field, value in defaults.items() if field not in named})
    files = [field for field in ("image", "label", "instances") if field in named]
    for field in files:
        named[field] = [
            _portable(folder, text, f"{path} {row}") for row, text in zip(named["row"], named[field], strict=True)
        ]
    if "region" not in named:
        images = named["image"].map(Path)
        stems = images.map(lambda file: file.stem)
        clash = stems.duplicated().any()
        named["region"] = images.map(lambda file: file.with_suffix("").as_posix()) if clash else stems
    named["score"] = _scores(named)
    _check_spelling(path, named, near=not known_subtypes)
    _check_parts(path, named)
    _check_identities(path, named)
    named = named.assign(number=range(len(named)), **({} if "instances" in named else {"instances": None}))
    for field in files:
        named[field] = named[field].map(lambda file: source_of(folder.resolve(), file))
    return _with_sizes(path, named.rename(columns={"part": "split"}))


def _check_columns(path: Path, table: pd.DataFrame, columns: Columns, required: list[str]) -> None:
    default, found = Columns(), textwrap.shorten(", ".join(name[:LONGEST_NAME] for name in table.columns), 400)
    for field, name in columns.model_dump().items():
        if name in table or not name:
            continue
        if field in required:
            raise InputError(f"{path}: no column {name!r}; found {found}; name the right one with --{field}-column")
        if name != getattr(default, field):
            raise InputError(f"{path}: no column {name!r} (--{field}-column); found {found}")


def _check_no_other_parts(path: Path, table: pd.DataFrame, columns: Columns) -> None:
    """Refuse a column of parts under another name than that of ``columns``, which would be divided anew."""
    for name in table.columns if columns.part not in table else ():
        values = set(table[name].str.lower())
        if len(values) > 1 and values <= {*PARTS, *OTHER_PARTS}:
            found = ", ".join(sorted(values))
            advice = f"give --part-column {name}" if values <= set(PARTS) else f"it takes {', '.join(PARTS)}"
            raise InputError(f"{path}: column {name!r} holds {found}, which are parts; {advice}, or remove the column")


def _check_filled(path: Path, named: pd.DataFrame, columns: Columns) -> None:
    if "part" in named:
        named["part"] = None if (named["part"] == "").all() else named["part"].str.lower()
    for field in named.columns.drop(["row", "score"], errors="ignore"):
        name = getattr(columns, str(field), field)
        for row in named["row"][named[field] == ""]:
            raise InputError(f"{path} {row}: column {name!r} is empty; fill it in")
        if field in {"patient", "slide", "subtype"}:
            for row, text in named.drop_duplicates(field)[["row", field]].to_numpy():
                check_name(f"{path} {row}", name, text)


def check_name(where: str, column: str, text: str) -> None:
    """Raise InputError where a program wrote a cell in the place of a name that was missing or that it shortened."""
    if LOST.fullmatch(text):
        raise InputError(
            f"{where}: column {column!r} is {text!r}, which programs write for a missing or shortened value; fill in "
            "the name, and format the column as text"
        )


def _portable(folder: Path, text: str, where: str) -> str:
    """Return a path as this system spells it: with slashes, and in the Unicode form in which the file is there."""
    slashes = text.replace("\\", "/")
    for spelled in (text, slashes, unicodedata.normalize("NFC", slashes), unicodedata.normalize("NFD", slashes)):
        found = source_of(folder, spelled)
        file = found.path if isinstance(found, Part) else found
        if os.path.isfile(file) or (file.suffix == ".zarr" and os.path.isdir(file)):  # noqa: PTH112, PTH113 - long names
            return spelled
    if os.name != "nt" and re.match(r"[A-Za-z]:/|//", slashes):
        raise InputError(f"{where}: {text} is a path of a Windows computer; give paths relative to the table's folder")
    raise InputError(f"{where}: {text}: no such file in {folder}; paths are relative to the table's folder")


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
            raise InputError(f"{path} {row}: unknown part {part!r}; expected {', '.join(PARTS)}")
    for patient, first, second in _conflicts(named, "patient", "part"):
        raise InputError(
            f"{path}: patient {patient} is in two parts, {first['part']} ({first['row']}) and {second['part']} "
            f"({second['row']}); move all rows of a patient to one part"
        )


def _check_spelling(path: Path, named: pd.DataFrame, *, near: bool) -> None:
    """Refuse names that are one name in two spellings; with ``near`` also subtypes that differ by a letter or two."""
    for field in ("subtype", "patient", "slide", "score"):
        rows = named.dropna(subset=field).drop_duplicates(field).set_index(field)["row"]
        remedy = "use one spelling"
        found = same_patient(rows.index) if field == "patient" else alike(rows.index, near=False)
        if field == "subtype" and near and not found:
            found, remedy = alike(rows.index), "use one spelling, or list both in a file and give --taxonomy FILE"
        if found:
            first, second = found
            raise InputError(f"{path}: {field} {first!r} in {rows[first]} is {second!r} in {rows[second]}; {remedy}")


def _check_identities(path: Path, named: pd.DataFrame) -> None:
    for region, rows in named[named["region"].duplicated(keep=False)].groupby("region")["row"]:
        raise InputError(
            f"{path}: region {region!r} is in {rows.iloc[0]} and {rows.iloc[1]}; "
            "remove one, or name them differently in a column 'region'"
        )
    for field, remedy in (("patient", "give each slide its own name"), ("score", "give each slide one score")):
        for slide, first, second in _conflicts(named, "slide", field):
            raise InputError(
                f"{path}: slide {slide} has two values of {field}, {first[field]} ({first['row']}) and "
                f"{second[field]} ({second['row']}); {remedy}"
            )


def _conflicts(named: pd.DataFrame, key: str, field: str) -> Iterator[tuple[str, pd.Series, pd.Series]]:
    """Yield keys that have several values of a field, with the first row of two of them."""
    distinct = named[[key, field, "row"]].dropna(subset=[field]).drop_duplicates([key, field])
    for name, rows in distinct[distinct.duplicated(key, keep=False)].groupby(key, sort=False):
        yield str(name), rows.iloc[0], rows.iloc[1]


def _with_sizes(path: Path, named: pd.DataFrame) -> pd.DataFrame:
    """Add the sizes of images; label files without pixels, such as outlines, are checked when they are read."""
    sizes = []
    for row, image, *labels in named[["row", "image", "label", "instances"]].itertuples(index=False, name=None):
        if image in labels:
            raise InputError(f"{path} {row}: {image.name} is the image and its label; name the two files")
        try:
            size = image_size(image)
            of_labels = [(label, image_size(label, labels=True)) for label in labels if label and is_pixels(label)]
        except InputError as error:
            raise InputError(f"{path} {row}: {error}") from error
        for label, of_label in of_labels:
            if size != of_label:
                raise InputError(
                    f"{path} {row}: {image.name} is {size[0]} x {size[1]} px but its label {label.name} is "
                    f"{of_label[0]} x {of_label[1]} px (rows x columns); export both at the same scale"
                )
        sizes.append(size)
    return named.assign(height_px=[height for height, _ in sizes], width_px=[width for _, width in sizes])
