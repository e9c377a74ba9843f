"""Folders of cells that a study's plan no longer refers to."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Leftover:
    """A folder that nothing needs."""

    folder: Path
    size_bytes: int


def leftovers(root: Path, planned: Collection[str]) -> list[Leftover]:
    """Return what lies among the cells and belongs to none of the planned ones, the largest first."""
    if not root.is_dir():
        return []
    found = [folder for folder in root.iterdir() if folder.is_dir() and folder.name not in planned]
    sized = [Leftover(folder, size_of(folder)) for folder in found]
    return sorted(sized, key=lambda leftover: (-leftover.size_bytes, leftover.folder.name))


def remove(found: Collection[Leftover]) -> None:
    """Delete folders; each is renamed first, so that a half-deleted cell is never taken for a whole one."""
    for leftover in found:
        doomed = leftover.folder.with_name(f".{leftover.folder.name.lstrip('.')}.removed")
        if leftover.folder != doomed:
            leftover.folder.replace(doomed)
        shutil.rmtree(doomed)


def size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() or file.is_symlink())
