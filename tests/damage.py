"""Damage to files, drawn by hypothesis: bytes cut and put in, values replaced by nasty ones, files lost or swapped."""

import json
import os
import re
import resource
import shutil
import signal
import warnings
from contextlib import contextmanager

import pandas as pd
import yaml
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from counterstain.errors import CounterstainError

SECONDS, MEMORY_KB = 20, 2**20  # of this process, however busy the machine is
HANGS_AFTER_S = 600
LONGEST_MESSAGE = 900  # beside paths

NASTY_TEXT = st.sampled_from(
    (
        *("", "../../etc/passwd", "..\\..\\x", "/", "a\x00b", "\ud800", "\u202e", "x" * 500, "nan", "1e999", "#12"),
        *("None", "\x1b[31m", "=1+1", "$x_1$", "tu-hf-hub:a/b", "CON"),
    )
)
NASTY_NUMBER = st.sampled_from([float("nan"), float("inf"), -(10**400), 1e308, 2**31, 10**12, -1, 0, 0.1, True])
DEEP = json.loads("[" * 400 + "]" * 400)
NASTY = NASTY_TEXT | NASTY_NUMBER | st.sampled_from([None, [], {}, [[]] * 50, DEEP, {"a": {"id": {}}}])
NASTY_BYTES = st.sampled_from(
    (
        *(b"", b"\xff\xfe", b"\x00", b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"&b;", b"<!--", b"<![CDATA[", b"[" * 3000),
        *(b"<a>" * 300, b"9" * 5000, b"NaN", b'"', b"\xf0\x9f\x92\xa9", b"]]}}", b"<Region>", b"</Annotation>"),
    )
)
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), NASTY_BYTES), min_size=1, max_size=4)


def fuzzed(trials, phases=tuple(Phase)):
    """Return the settings of a test that draws damage: always the same, unless COUNTERSTAIN_FUZZ asks for so many."""
    same = "COUNTERSTAIN_FUZZ" not in os.environ
    known = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "phases": phases}
    return settings(max_examples=max(1, trials), derandomize=same, **known)


def edited(sample, edits):
    """Cut bytes out and put others in."""
    for share, cut, insert in edits:
        at = int(share * len(sample))
        sample = sample[:at] + insert + sample[at + cut :]
    return sample


def places(content, path=()):
    """Return the path of every value in a JSON document."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(found for key, value in items for found in places(value, (*path, key)))]


def replaced(content, path, value):
    """Return a JSON document with another value at a path."""
    if not path:
        return value
    key, *rest = path
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[key] = replaced(content[key], rest, value)
    return copy


def with_nasty_values(data, content, values=NASTY):
    """Return a JSON document with one to three nasty values."""
    for _ in range(data.draw(st.integers(1, 3))):
        content = replaced(content, data.draw(st.sampled_from(places(content))), data.draw(values))
    return content


def with_nasty_cells(data, table):
    """Return a table with a nasty cell, a column too few or too many, or rows that stand twice."""
    column = data.draw(st.sampled_from(list(table.columns)))
    kind = data.draw(st.sampled_from(["cell", "column", "lost", "renamed", "twice", "empty"]))
    if kind in {"cell", "column"}:
        table = table.astype({column: object})
        rows = [data.draw(st.integers(0, len(table) - 1))] if kind == "cell" else range(len(table))
        value = data.draw(NASTY_TEXT | NASTY_NUMBER | st.sampled_from([None, [1], [[]]]))
        for row in rows:
            table.iloc[row, table.columns.get_loc(column)] = value
        return table
    changed = {
        "lost": lambda: table.drop(columns=column),
        "renamed": lambda: table.rename(columns={column: "x"}),
        "twice": lambda: pd.concat([table, table]),
        "empty": lambda: table.iloc[:0],
    }
    return changed[kind]()


KINDS = ("bytes", "bit", "cut", "gone", "empty", "folder", "swapped", *["values"] * 4)


def damage(data, folder, pattern="*"):
    """Damage one file of a folder, of which any name is as likely; return the file and what was done."""
    files = sorted(file for file in folder.rglob(pattern) if file.is_file())
    name = data.draw(st.sampled_from(sorted({file.name for file in files})))
    file = data.draw(st.sampled_from([file for file in files if file.name == name]))
    kind = data.draw(st.sampled_from(KINDS))
    if kind == "values" and not _change_values(data, file):
        kind = "bytes"
    content = file.read_bytes()
    if kind == "bytes":
        file.write_bytes(edited(content, data.draw(EDITS)))
    elif kind == "bit" and content:
        at = data.draw(st.integers(0, len(content) - 1))
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << data.draw(st.integers(0, 7))]) + content[at + 1 :])
    elif kind == "cut":
        file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    elif kind == "gone":
        file.unlink()
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "swapped":
        shutil.copyfile(data.draw(st.sampled_from(files)), folder / "swapped")
        (folder / "swapped").replace(file)
    return file.relative_to(folder), kind


def _change_values(data, file):
    """Change values of a file that stays well-formed; say whether its kind is known."""
    try:
        if file.suffix == ".json":
            content = with_nasty_values(data, json.loads(file.read_text()))
            file.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")
        elif file.suffix == ".jsonl":
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            text = "".join(f"{json.dumps(line)}\n" for line in with_nasty_values(data, lines))
            file.write_text(text, encoding="utf-8", errors="surrogatepass")
        elif file.suffix == ".yaml":
            content = with_nasty_values(
                data, yaml.safe_load(file.read_text()), NASTY_NUMBER | st.sampled_from([None, [], {}])
            )
            file.write_text(yaml.safe_dump(content))
        elif file.suffix == ".csv":
            text = with_nasty_cells(data, pd.read_csv(file, dtype=str)).to_csv(index=False)
            file.write_text(text, encoding="utf-8", errors="surrogatepass")
        elif file.suffix == ".parquet":
            with_nasty_cells(data, pd.read_parquet(file)).to_parquet(file, index=False)
        else:
            return False
    except (ValueError, TypeError, OverflowError, UnicodeError):  # a value that the format cannot hold
        return False
    return True


def peak_memory_kb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _took_too_long(*_):
    raise TimeoutError(f"more than {SECONDS} s")


@contextmanager
def within_bounds():
    """Fail where the block takes too long or too much memory."""
    peak_kb = peak_memory_kb()
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, _took_too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(HANGS_AFTER_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    assert peak_memory_kb() - peak_kb < MEMORY_KB


def answer(door, *args):
    """Return what a door of the package answers, or None where it refuses in one line."""
    with within_bounds(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return door(*args)
        except CounterstainError as error:
            message = re.sub(r"\S*/\S*", "", str(error))
            assert "\n" not in message
            assert len(message) < LONGEST_MESSAGE, message
            return None
