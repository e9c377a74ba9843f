"""Annotations of SlideRunner: a SQLite database of many slides.

The tables that are read, as SlideRunner 1.31 to 2.2 write them::

    Slides (uid, filename)    Classes (uid, name)    Annotations (uid, slide, type, agreedClass, deleted)
    Annotations_coordinates (annoId, orderIdx, coordinateX, coordinateY)

A database is untrusted: it is opened read-only from memory, views and triggers are not run, and a query that takes
long is stopped.
"""

from __future__ import annotations

import sqlite3
import struct
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from counterstain.errors import InputError
from counterstain.io.annotations.outlines import UNCLASSIFIED, AnnotationFile, Collector, ellipse, rectangle
from counterstain.io.annotations.safe_parsing import COORDINATE, OddObjectError, file_name, name, shown, usable

AREA, POLYGON, CIRCLE = 2, 3, 5
WITHOUT_AREA = {1: "point", 4: "point", 6: "label of the whole image"}
TABLES = {
    "Slides": {"uid", "filename"},
    "Classes": {"uid", "name"},
    "Annotations": {"uid", "slide", "type", "agreedClass"},
    "Annotations_coordinates": {"annoId", "orderIdx", "coordinateX", "coordinateY"},
}
SECONDS = 60
STEPS = 100_000  # of SQLite's machine between two looks at the clock
POINTS = """
SELECT a.uid, a.type, a.slide, a.agreedClass, {deleted}, c.coordinateX, c.coordinateY
FROM Annotations AS a LEFT JOIN Annotations_coordinates AS c ON c.annoId = a.uid ORDER BY a.uid, c.orderIdx, c.rowid
"""


def read_sliderunner(path: Path, data: bytes) -> AnnotationFile:
    """Read SlideRunner's database; the label is the agreed class. Errors name the annotation."""
    for ending in ("-wal", "-journal"):  # changes that are not in the file yet
        beside = path.with_name(path.name + ending)
        if beside.is_file() and beside.stat().st_size:
            raise InputError(
                f"{path}: is open in SlideRunner or was not closed ({beside.name} lies beside it); close it"
            )
    collector = Collector(path)
    try:
        with closing(sqlite3.connect(":memory:")) as database:
            end = time.monotonic() + SECONDS
            database.set_progress_handler(lambda: time.monotonic() > end, STEPS)
            database.text_factory = lambda text: text.decode("utf-8", "replace")
            # Bytes 18 and 19 say how the file is written to; a database in memory cannot be in the mode of a log.
            database.deserialize(data[:18] + b"\x01\x01" + data[20:])
            database.execute("PRAGMA trusted_schema = OFF")
            database.execute("PRAGMA query_only = ON")
            _check_whole(database, data)
            columns = _check_tables(database, path)
            slides = dict(database.execute("SELECT uid, filename FROM Slides"))
            classes = dict(database.execute("SELECT uid, name FROM Classes"))
            query = POINTS.format(deleted="a.deleted" if "deleted" in columns else "0")
            for head, rows in groupby(database.execute(query), key=lambda row: row[:5]):
                try:
                    _add(collector, head, rows, slides, classes)
                except OddObjectError as error:
                    collector.odd(error)
    except (sqlite3.Error, struct.error, OverflowError, MemoryError) as error:
        reason = f"takes more than {SECONDS} s" if "interrupted" in str(error) else " ".join(str(error).split())
        raise InputError(f"{path}: a SQLite database that cannot be read ({reason}); save it again") from error
    return collector.finish()


def _check_whole(database: sqlite3.Connection, data: bytes) -> None:
    """Raise where a database is cut short, which SQLite reads as if zeros followed, or damaged."""
    size, pages = struct.unpack_from(">H10xI", data, 16)
    if len(data) < max(1, pages) * (2**16 if size == 1 else size):
        raise sqlite3.DatabaseError("it is cut short")
    ((found,),) = database.execute("PRAGMA quick_check(1)")
    if found != "ok":
        raise sqlite3.DatabaseError(str(found))


def _check_tables(database: sqlite3.Connection, path: Path) -> set[str]:
    """Return the columns of Annotations; raise an InputError where a table or a column is missing."""
    kinds = dict(database.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'"))
    columns: set[str] = set()
    for table, expected in TABLES.items():
        if not str(kinds.get(table)).upper().startswith("CREATE TABLE"):
            raise InputError(f"{path}: a SQLite database without SlideRunner's table {table}; it is not read")
        columns = {row[1] for row in database.execute(f"PRAGMA table_info({table})")} | {""}
        if missing := sorted(expected - columns):
            raise InputError(f"{path}: SlideRunner's table {table} has no column {missing[0]}; save it again")
        if table == "Annotations":
            annotations = columns
    return annotations


def _add(
    collector: Collector,
    head: tuple[Any, ...],
    rows: Iterator[tuple[Any, ...]],
    slides: dict[Any, Any],
    classes: dict[Any, Any],
) -> None:
    uid, kind, slide, agreed, deleted = head
    where = f"{collector.path} annotation {shown(uid)}"
    if deleted or kind not in {AREA, POLYGON, CIRCLE}:
        unknown = f"annotation of type {shown(kind)}"
        collector.skip("deleted annotation" if deleted else WITHOUT_AREA.get(kind, unknown))
        return
    points = [row[5:] for row in rows if row[5:] != (None, None)]
    collector.count_points(len(points))
    for x, y in points:
        if not (usable(x) and usable(y)):
            raise OddObjectError(f"{where}: expected x and y, each {COORDINATE}, found {shown((x, y))}; correct it")
    xy = np.array(points, float).reshape(-1, 2)
    if kind != POLYGON and len(xy) != 2:
        raise OddObjectError(f"{where}: a box or circle of {len(xy)} points, expected two; draw it again")
    if kind == CIRCLE:  # its width is the diameter
        xy = ellipse(xy.mean(axis=0) + np.array([[-1.0], [1.0]]) * abs(xy[1, 0] - xy[0, 0]) / 2)
    label = classes.get(agreed)
    collector.add(
        collector.polygon([[rectangle(xy) if kind == AREA else xy]], where),
        identifier=str(uid),
        label=UNCLASSIFIED if label is None else name(label, f"{where} class"),
        slide=file_name(slides.get(slide, f"image {slide}"), f"{where} slide"),
        number=slide,
    )
