"""Every training of a study: which checkpoint came of it, where its curves lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from counterstain.checkpoints import CheckpointHeader, is_finished, read_header
from counterstain.storage import read_json
from counterstain.study.integrity import DONE_FILE
from counterstain.study.plan import Cell
from counterstain.tracking import LOG_FOLDER


def training_records(done: Sequence[Cell], root: Path) -> list[dict[str, Any]]:
    """Return a record of every finished training, in the plan's order.

    Parameters
    ----------
    done : sequence of Cell
        Finished cells; those that trained nothing are left out.
    root : Path
        The folder of all cells.
    """
    return [_record(cell, root) for cell in done if is_finished(root / cell.folder)]


def _record(cell: Cell, root: Path) -> dict[str, Any]:
    folder = root / cell.folder
    header = read_header(folder)
    logs = folder / LOG_FOLDER
    return {
        "name": cell.name,
        "stage": cell.stage,
        "sha256": header.sha256,
        "steps": _steps(header),
        "batch_size": header.config["training"]["batch_size"],
        "patients_seen": len(header.patients_seen),
        "seconds": float(read_json(folder / DONE_FILE)["seconds"]),
        # Where its curves lie, from the study's folder.
        "logs": logs.relative_to(root.parent).as_posix() if logs.is_dir() else "",
    }


def _steps(header: CheckpointHeader) -> int:
    return int(header.notes.get("steps", header.config["training"]["steps"]))
