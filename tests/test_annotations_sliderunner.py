import sqlite3

import numpy as np
import pytest

from counterstain.errors import InputError
from counterstain.io.annotations import read_annotations, sliderunner

TABLES = """
CREATE TABLE `Slides` (`uid` INTEGER PRIMARY KEY, `filename` TEXT);
CREATE TABLE `Classes` (`uid` INTEGER PRIMARY KEY, `name` TEXT);
CREATE TABLE `Annotations` (`uid` INTEGER PRIMARY KEY, `slide` INTEGER, `deleted` INTEGER DEFAULT 0, `type` INTEGER,
                            `agreedClass` INTEGER);
CREATE TABLE `Annotations_coordinates` (`uid` INTEGER PRIMARY KEY, `coordinateX` INTEGER, `coordinateY` INTEGER,
                                        `slide` INTEGER, `annoId` INTEGER, `orderIdx` INTEGER);
INSERT INTO Slides VALUES (1, 'A1.svs'), (2, 'C:\\scans\\B2.svs');
INSERT INTO Classes VALUES (1, 'Tumor'), (2, 'Stroma');
"""
SQUARE = [(10, 10), (30, 10), (30, 30), (10, 30)]
BOX = SQUARE[::2]


def database(tmp_path, *annotations, tables=TABLES):
    """Write annotations (type, points, class, slide, deleted), the points in reversed order of their rows."""
    path = tmp_path / "all.sqlite"
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as connection:
        connection.executescript(tables)
        for uid, (kind, points, label, slide, deleted) in enumerate(annotations, start=1):
            connection.execute("INSERT INTO Annotations VALUES (?, ?, ?, ?, ?)", (uid, slide, deleted, kind, label))
            rows = [(x, y, slide, uid, order) for order, (x, y) in reversed(list(enumerate(points)))]
            columns = "coordinateX, coordinateY, slide, annoId, orderIdx"
            connection.executemany(f"INSERT INTO Annotations_coordinates ({columns}) VALUES (?, ?, ?, ?, ?)", rows)
    connection.close()
    return path


def test_outlines_boxes_and_circles_are_read_with_their_class_and_slide_and_the_rest_is_counted(tmp_path):
    rows = [(3, SQUARE, 1, 1, 0), (2, BOX, 2, 2, 0), (5, BOX, 0, 1, 0), (1, BOX[:1], 1, 1, 0), (3, SQUARE, 1, 1, 1)]
    file = read_annotations(database(tmp_path, *rows, (9, SQUARE, 1, 1, 0)), "sliderunner")
    read = [(a.id, a.label, a.slide, round(a.polygon.area)) for a in file.annotations]
    assert read[:2] == [("1", "Tumor", "A1.svs", 400), ("2", "Stroma", "B2.svs", 400)]
    assert read[2] == ("3", "Unclassified", "A1.svs", round(90 * 100 * np.sin(np.pi / 90)))
    assert file.skipped == {"point": 1, "deleted annotation": 1, "annotation of type 9": 1}


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ((3, [(0, 0), ("x", 1), (5, 5)], 1, 1, 0), r"annotation 2: expected x and y.* found \('x', 1\)"),
        ((3, [(0, 0), (1e300, 1), (5, 5)], 1, 1, 0), "annotation 2: expected x and y"),
        ((2, SQUARE, 1, 1, 0), "annotation 2: a box or circle of 4 points, expected two"),
        ((3, SQUARE, 3, 1, 0), "annotation 2 class: expected a name"),
    ],
)
def test_one_odd_annotation_is_left_out_counted_and_described(tmp_path, odd, message):
    tables = TABLES + f"INSERT INTO Classes VALUES (3, '{'x' * 300}');"
    file = read_annotations(database(tmp_path, (3, SQUARE, 1, 1, 0), odd, tables=tables), "sliderunner")
    assert len(file.annotations) == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(*file.odd)


def test_two_slides_of_one_name_are_not_mixed(tmp_path):
    tables = TABLES.replace("B2.svs", "A1.svs")
    with pytest.raises(InputError, match=r"two slides are called 'A1\.svs' \(numbers 1 and 2\)"):
        read_annotations(database(tmp_path, (3, SQUARE, 1, 1, 0), (3, SQUARE, 1, 2, 0), tables=tables), "sliderunner")


def test_what_is_not_a_sound_database_of_sliderunner_is_one_line(tmp_path, monkeypatch):
    path = database(tmp_path, (3, SQUARE, 1, 1, 0))
    sound = path.read_bytes()

    def refused(message, content=sound, file_format="sliderunner"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            read_annotations(path, file_format)
        assert "\n" not in str(caught.value)

    refused("looks like sliderunner, not qupath; give --format sliderunner", file_format="qupath")
    refused("a SQLite database that cannot be read", sound[: len(sound) // 2])
    refused("a SQLite database that cannot be read", sound[:100] + b"\xff" * (len(sound) - 100))
    beside = path.with_name("all.sqlite-wal")
    beside.write_bytes(b"changes")
    refused(r"is open in SlideRunner or was not closed \(all\.sqlite-wal lies beside it\)")
    beside.unlink()
    without = [line for line in TABLES.split(";") if "Classes" not in line]
    refused("without SlideRunner's table Classes", database(tmp_path, tables=";".join(without)).read_bytes())
    renamed = TABLES.replace("`orderIdx`", "`rank`")
    refused("table Annotations_coordinates has no column orderIdx", database(tmp_path, tables=renamed).read_bytes())
    endless = "WITH RECURSIVE n(uid, filename) AS (SELECT 1, 'a' UNION ALL SELECT uid + 1, 'a' FROM n) SELECT * FROM n"
    view = TABLES + f"DROP TABLE Slides; CREATE VIEW Slides AS {endless};"
    refused("without SlideRunner's table Slides", database(tmp_path, tables=view).read_bytes())
    monkeypatch.setattr(sliderunner, "SECONDS", -1)
    monkeypatch.setattr(sliderunner, "STEPS", 1)
    refused(r"cannot be read .*takes more than")
