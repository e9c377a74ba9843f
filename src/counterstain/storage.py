"""Writing that survives being killed: write beside, fsync, rename.

A file or folder is either absent or whole. What a killed process leaves behind is named ``.<name>.partial-…``; it is
swept away by the next run that claims the folder, or writes to the same place.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from counterstain.errors import CounterstainError, InputError, MismatchError, StorageError
from counterstain.remote import Place

RUN_FILE = "run.json"
SAMPLE_BLOCKS, BLOCK_BYTES = 64, 2**16  # what is read of a large file to know it again
LOG_FOLDER = "logs"  # of a training
HASH = "[0-9a-f]{64}"
REMAKE = "delete its folder and make it again"
CHECKSUM = "checksum"  # key of a JSON file that says what the rest must hash to
MAX_NAME = 100  # characters of a name on disk; with a suffix and what marks it as partial, file systems take it
FORMULA = re.compile(r"'*[=+\-@\t\r].")  # how a cell begins that a spreadsheet would compute
DEAD_AFTER_S = 24 * 60 * 60
NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than the system allows",
}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; on success it takes the place of ``path`` in one step.

    A link stays: the file that it leads to is replaced.

    Raises StorageError where the place cannot be written; something else than a file is there, such as a folder or a
    device.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        raise StorageError(f"{path}: is not a file, so it is not replaced; give another output file")
    _make_folder(path.parent)
    partial = _partial(path)
    with disk_errors_named(path):
        try:
            yield partial
            fsync(partial)
            partial.replace(path)
            fsync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove what killed writers of a file or folder left beside it; only where one process at a time writes it."""
    for left_over in path.parent.glob(f".{glob.escape(_short(path.name))}.partial-*"):
        _remove(left_over)


def name_on_disk(name: str) -> str:
    """Return a name for files that stands for ``name`` alone, on every system, also where case does not count."""
    safe = re.sub(r"[^a-z0-9_.-]", "_", name.lower()).lstrip(".-")[:MAX_NAME] or "_"
    return safe if safe == name else f"{safe}~{fingerprint(name)[:16]}"  # no name that is safe has a ~


@contextmanager
def committing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``folder`` to fill; on success it becomes ``folder`` in one step.

    A link stays: the folder that it leads to is replaced.
    """
    folder = folder.resolve() if folder.is_symlink() else folder
    _make_folder(folder.parent)
    sweep(folder)
    partial = _partial(folder)
    partial.mkdir()
    with disk_errors_named(folder):
        try:
            yield partial
            for file in partial.rglob("*"):
                fsync(file)
            if folder.exists():
                shutil.rmtree(folder)
            partial.replace(folder)
            fsync(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one step."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Place) -> Any:
    """Read a JSON file that counterstain wrote; raises InputError where it is missing, StorageError where damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: damaged ({error}); {REMAKE}") from error


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file with a checksum of its content, for :func:`read_sealed`."""
    write_json(path, {**content, CHECKSUM: fingerprint(content)})


def read_sealed(path: Place) -> dict[str, Any]:
    """Read a JSON mapping as :func:`read_json`; StorageError also where it is not what :func:`write_sealed` wrote.

    One that an earlier version wrote without a checksum is taken as it is.
    """
    content = read_json(path)
    sealed = content.pop(CHECKSUM, None) if isinstance(content, dict) else content
    if not isinstance(content, dict) or (sealed is not None and sealed != fingerprint(content)):
        raise StorageError(f"{path}: damaged (its content is not what was written); {REMAKE}")
    return content


def write_parquet(path: Path, table: pd.DataFrame) -> None:
    """Write a table in one step."""
    with replacing(path) as partial:
        table.to_parquet(partial, index=False)


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table in one step; floats keep all their digits."""
    write_text(path, csv_of(table))


def csv_of(table: pd.DataFrame) -> str:
    """Return a table as CSV; before text that a spreadsheet would compute stands an apostrophe."""
    texts = table.select_dtypes(exclude="number").columns
    shown = table.assign(**{name: table[name].map(_with_apostrophe) for name in texts}).rename(columns=_with_apostrophe)
    return str(shown.to_csv(index=False, lineterminator="\n"))


def _with_apostrophe(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) and not _is_number(cell) else cell


def without_apostrophe(cell: Any) -> Any:
    """Return what a cell was before :func:`csv_of` wrote it."""
    return cell[1:] if isinstance(cell, str) and cell.startswith("'") and FORMULA.match(cell) else cell


def read_csv(path: Path, **options: Any) -> pd.DataFrame:
    """Read a table that :func:`write_csv` wrote; ``options`` are those of pandas."""
    table: pd.DataFrame = pd.read_csv(path, **options).rename(columns=without_apostrophe)
    texts = table.select_dtypes(exclude="number").columns
    return table.assign(**{name: table[name].map(without_apostrophe) for name in texts})


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_identity(path: Path) -> dict[str, Any]:
    """Return what tells a large file from another of its name: ``bytes``, ``modified`` (ns) and a hash, ``sample``.

    The hash is taken over 64 blocks of 64 KiB that are spread evenly over the file, so that a slide costs 4 MiB of
    reading; smaller files are hashed whole. The files beside a MIRAX slide (``a.mrxs`` with the folder ``a``) share the
    blocks. Another modification time alone makes another identity, as nothing is known of what lies between the blocks.
    Raises InputError where the file is missing or cannot be read.
    """
    beside = path.with_suffix("").rglob("*") if path.suffix.lower() == ".mrxs" else ()
    try:
        files = [path, *sorted(file for file in beside if file.is_file())]
        known, digest = [file.stat() for file in files], hashlib.sha256()
        for file, about in zip(files, known, strict=True):
            digest.update(f"{file.name}\0{about.st_size}\0".encode())
            count = max(2, SAMPLE_BLOCKS // len(files))
            last = max(0, about.st_size - BLOCK_BYTES)
            whole = about.st_size <= count * BLOCK_BYTES
            starts = range(0, about.st_size, BLOCK_BYTES) if whole else (last * i // (count - 1) for i in range(count))
            with file.open("rb") as opened:
                for start in starts:
                    opened.seek(start)
                    digest.update(opened.read(BLOCK_BYTES))
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    size, modified = sum(a.st_size for a in known), max(a.st_mtime_ns for a in known)
    return {"bytes": size, "modified": modified, "sample": digest.hexdigest()}


def fingerprint(content: Any) -> str:
    """Return a hash of anything JSON can hold: the name of a configuration."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def claim(folder: Path, stage: str, settings: Any) -> None:
    """Reserve ``folder`` for one run, identified by its stage and settings.

    Raises MismatchError, and leaves the folder as it was, where it holds something else.
    """
    identity = {"stage": stage, "settings": settings, "fingerprint": fingerprint([stage, settings])}
    run_file = folder / RUN_FILE
    if not run_file.exists() and _is_in_use(folder) and not run_file.exists():  # not even by another process just now
        raise MismatchError(f"{folder}: is not empty and was not made by counterstain; give another output folder")
    if run_file.exists():
        found = _claim_in(folder)
        if found.get("fingerprint") != identity["fingerprint"]:
            difference = first_difference(found.get("settings"), settings) if found.get("stage") == stage else ""
            raise MismatchError(
                f"{folder}: belongs to another run ({found.get('stage')}{difference}); "
                "give another output folder, or delete this one"
            )
        _sweep_all(folder)
        return
    write_json(run_file, identity)


@contextmanager
def claimed(folder: Path, stage: str, settings: Any) -> Iterator[None]:
    """Claim a folder as :func:`claim`; release it where one of our errors ends the block before anything is written."""
    claim(folder, stage, settings)
    with released_on_error(folder):
        yield


@contextmanager
def released_on_error(folder: Path) -> Iterator[None]:
    """Release a claimed folder where one of our errors ends the block and it holds nothing but its claim and logs."""
    try:
        yield
    except CounterstainError:
        if (folder / RUN_FILE).exists() and {file.name for file in folder.iterdir()} <= {RUN_FILE, LOG_FOLDER}:
            shutil.rmtree(folder)
        raise


def _is_in_use(folder: Path) -> bool:
    if not folder.is_dir():
        return folder.exists()
    return any(not file.name.startswith(f".{RUN_FILE}.partial-") for file in folder.iterdir())


def stage_of(folder: Path) -> str | None:
    """Say which stage claimed a folder; None where none did."""
    return str(_claim_in(folder).get("stage")) if (folder / RUN_FILE).exists() else None


def _claim_in(folder: Path) -> dict[str, Any]:
    found = read_json(folder / RUN_FILE)
    if not isinstance(found, dict):
        raise StorageError(f"{folder / RUN_FILE}: damaged (no mapping); {REMAKE}")
    return found


def first_difference(found: Any, wanted: Any, where: str = "") -> str:
    """Return the first setting that differs, with both values unless these are hashes, as the end of a message."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}, key=str):
            if found.get(key) != wanted.get(key):
                return first_difference(found.get(key), wanted.get(key), f"{where}.{key}" if where else str(key))
    if all(isinstance(value, str) and re.fullmatch(HASH, value) for value in (found, wanted)):
        return f": {where} is another"
    return f": {where or 'settings'} was {_shown(found)}, now {_shown(wanted)}"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "not given", True: "yes", False: "no"}[value]
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _make_folder(folder: Path) -> None:
    with disk_errors_named(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            raise StorageError(f"{folder}: cannot be made ({error.strerror}); give another output folder") from error


def _partial(path: Path) -> Path:
    return path.with_name(f".{_short(path.name)}.partial-{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def _short(name: str) -> str:
    return name.encode()[:180].decode(errors="ignore")  # file systems take 255 bytes


@cache
def _machine() -> str:
    """Return what tells apart machines and containers: each counts its processes for itself."""
    processes = Path("/proc/self/ns/pid")
    return fingerprint([socket.gethostname(), str(processes.readlink()) if processes.exists() else ""])[:8]


def _sweep_all(folder: Path) -> None:
    """Remove what killed writers left in a folder and in those in it; others may be writing there just now."""
    for place in (folder, *(child for child in folder.iterdir() if child.is_dir())):
        for left_over in place.glob(".*.partial-*"):
            machine, _, process = left_over.name.rpartition(".partial-")[2].rpartition("-")[0].partition("-")
            if machine == _machine() and process.isdecimal():
                dead = not _is_running(int(process))
            else:  # of another machine, or of an earlier version
                dead = left_over.exists() and time.time() - left_over.stat().st_mtime > DEAD_AFTER_S
            if dead:
                _remove(left_over)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors_named(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk, a quota or a place without write permission into a StorageError of one line."""
    try:
        yield
    except OSError as error:
        if (named := disk_error(error, path)) is None:
            raise
        raise named from error


def disk_error(error: BaseException, path: Path | None = None) -> StorageError | None:
    """Return what says of a full disk, a quota or a place without write permission what to do; None of other errors."""
    if not isinstance(error, OSError) or isinstance(error, CounterstainError):
        return None
    place = path or error.filename or "the output"
    if error.errno in NO_ROOM:
        remedy = "free some space and give the same command again, finished work is kept"
        return StorageError(f"{place}: {NO_ROOM[error.errno]}; {remedy}")
    if error.errno in {errno.EACCES, errno.EROFS, errno.EPERM}:
        return StorageError(f"{place}: cannot be written ({error.strerror}); give another output folder")
    if error.errno in {errno.EISDIR, errno.ENOTDIR}:
        return StorageError(f"{place}: cannot be written ({error.strerror}); move what is there away")
    if error.errno == errno.ENAMETOOLONG:
        return StorageError(f"{str(place)[:80]}…: a name in its path is too long; give another output folder")
    return None
