"""Whether a finished cell is still what was written: sizes and hashes of its files, noted when it was done."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from counterstain.storage import RUN_FILE, read_json, sha256_of
from counterstain.tracking import LOG_FOLDER

DONE_FILE = "cell.json"
UNNOTED = {DONE_FILE, RUN_FILE}


def notes_of(folder: Path) -> dict[str, list[Any]]:
    """Return name -> [size in bytes, SHA-256] of a cell's files; partial ones and logs are left out."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {
        name: [file.stat().st_size, sha256_of(file)]
        for name, file in files.items()
        if name not in UNNOTED and ".partial-" not in name and not name.startswith(f"{LOG_FOLDER}/")
    }


def damage(folder: Path, *, hashes: bool) -> str | None:
    """Say which file of a finished cell is missing or changed; None where all is well.

    Parameters
    ----------
    folder : Path
    hashes : bool
        Read the files through; without, only their sizes are looked at.
    """
    try:
        notes = read_json(folder / DONE_FILE).get("files", {})
    except (OSError, ValueError, AttributeError):
        return DONE_FILE
    return next((name for name, note in notes.items() if not _as_noted(folder / name, note, hashes=hashes)), None)


def _as_noted(file: Path, note: Iterable[Any], *, hashes: bool) -> bool:
    size, sha256 = note
    if not file.is_file() or file.stat().st_size != size:
        return False
    return not hashes or sha256_of(file) == sha256
