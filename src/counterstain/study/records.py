"""Records of a study: what each training was given, on which claims of fairness rest, and how often results were shown.

``fairness.csv`` of the results has a row per arm, repeat and fold (if there are any); :func:`departures` says in what
the arms differ.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from counterstain.checkpoints import read_header
from counterstain.data.patch_set import HEADER_FILE, PatchSet
from counterstain.data.review import Review
from counterstain.errors import CounterstainError
from counterstain.storage import fingerprint, stage_of
from counterstain.study.cells import REFERENCE, Cell

COLUMNS = (
    "arm", "repeat", "steps", "batch_size", "seed", "starts_from", "settings", "augmentation", "subtype_weighting",
    "synthetic_set", "synthetic_patches", "synthetic_share", "schedule", "filter", "drawn", "rejected",
)  # fmt: skip
TEXTS = ("arm", "starts_from", "settings", "augmentation", "synthetic_set", "schedule", "filter")
EQUAL = {
    "steps": "optimiser steps",
    "batch_size": "batch size",
    "starts_from": "initial weights",
    "settings": "settings",
    "augmentation": "augmentation",
    "subtype_weighting": "weighting of subtypes",
}
OF_ARMS = ("sampling", "mixing", "copy_paste", "mixup_alpha", "subtype_weighting")
CORRECTIONS = ("ignore_above", "border_um")  # of labels of synthetic patches, in a segmenter's notes
LOOKS_FILE = "looks.jsonl"
LEVELS = 3  # of folders between a study's folder and its contents


def fairness_table(cells: Sequence[Cell], root: Path) -> pd.DataFrame:
    """Return a row per trained segmenter.

    Among its :data:`COLUMNS` are ``seed`` (of initial weights, order of the data and augmentation), ``starts_from``
    (initial weights of the encoder), ``settings`` (a hash of those without a column, and of what corrects labels),
    ``filter`` (which images of the set were drawn again), ``drawn`` and ``rejected`` (images, for the patches that are
    used).
    """

    @cache
    def patches_of(synthetic: str) -> pd.DataFrame:
        return PatchSet.open(root / synthetic).patches

    rows = []
    for cell in cells:
        if cell.stage == "segmenter":
            row = _row(cell, root)
            attempts, count = 0, row["synthetic_patches"]
            if count:
                patches = patches_of(cell.inputs["synthetic"])
                left_out = cell.settings.get("left_out", ())
                used = (patches["index"] < count + len(left_out)) & ~patches["index"].isin(left_out)
                attempts = int(patches.loc[used, "attempts"].sum())
            rows.append(row | {"drawn": attempts, "rejected": attempts - count})
    folds = ["fold"] if any(row["fold"] for row in rows) else []
    return pd.DataFrame(rows, columns=[*COLUMNS[:2], *folds, *COLUMNS[2:]])


def unreviewed(cells: Sequence[Cell], root: Path) -> Iterator[str]:
    """Say of each synthetic set of the arms ``+reviewed`` how much of it is not reviewed, a line for each."""
    sets = {cell.folder: cell for cell in cells if cell.stage == "synthetic"}
    for folder in {cell.inputs["synthetic"]: None for cell in cells if "left_out" in cell.settings}:
        cell = sets[folder]
        reviewed = Review(root / folder).progress().reviewed if (root / folder / HEADER_FILE).exists() else 0
        if reviewed < cell.count:
            yield (
                f"{cell.name}: {reviewed} of {cell.count} patches are reviewed, the others count as accepted; review "
                f"{root / folder} and run the study again"
            )


def departures(table: pd.DataFrame) -> Iterator[str]:
    """Say how the treatment of arms differed, a line for each difference.

    Intended differences of variants (``subtype+weighted``) are included; the amount of synthetic patches is not.
    """
    for column, words in EQUAL.items():
        usual = table.loc[table["arm"] == REFERENCE, column]
        expected = usual.iloc[0] if len(usual) else table[column].mode().iloc[0]
        for value, rows in table[table[column] != expected].groupby(column, sort=False):
            arms = ", ".join(dict.fromkeys(rows["arm"]))
            yield f"{words}: {value} in {arms}, {expected} in the others"
    for (repeat, *_), rows in table.groupby(paired_by(table)):
        if (rows["seed"] != rows["seed"].iloc[0]).any():
            yield f"seeds: arms of repeat {repeat} have different ones"
    filters = table[table["synthetic_patches"] > 0].groupby("filter", sort=False)["arm"].unique()
    if len(filters) > 1:
        yield "filter: " + "; ".join(f"{name} in {', '.join(arms)}" for name, arms in filters.items())


def paired_by(table: pd.DataFrame) -> list[str]:
    """Return the columns within which arms share their seed: the repeat, and the fold where there are any."""
    return ["repeat", *(["fold"] if "fold" in table else [])]


def _row(cell: Cell, root: Path) -> dict[str, Any]:
    header = read_header(root / cell.folder)
    config, notes = header.config, header.notes
    return {
        "arm": cell.arm,
        "repeat": cell.repeat,
        "fold": cell.fold,
        "steps": notes["steps"],
        "batch_size": config["training"]["batch_size"],
        "seed": header.seed,
        "starts_from": notes["encoder_starts_from"],
        "settings": fingerprint(
            {name: value for name, value in config.items() if name not in OF_ARMS}
            | {name: notes[name] for name in CORRECTIONS if name in notes}
        )[:12],
        "augmentation": augmentation_of(config),
        "subtype_weighting": config["subtype_weighting"],
        "synthetic_set": "" if notes["synthetic"] is None else notes["synthetic"]["method"],
        "synthetic_patches": notes["synthetic_patches"],
        "synthetic_share": notes["synthetic_share"],
        "schedule": config["mixing"]["schedule"],
        "filter": filter_of(notes["synthetic"]),
    }


def augmentation_of(config: dict[str, Any]) -> str:
    """Return how a segmenter's settings vary its patches, in words."""
    sampling = config["sampling"]
    jitter = f"stain jitter {sampling['stain_jitter']:g} ({sampling['stains']})"
    words = {
        "mirrored": sampling["flip"],
        "quarter turns": sampling["quarter_turns"],
        jitter: sampling["stain_jitter"],
        f"mixup {config['mixup_alpha']}": config["mixup_alpha"],
        "copy-paste": config["copy_paste"],
    }
    return ", ".join(word for word, used in words.items() if used) or "none"


def filter_of(header: dict[str, Any] | None) -> str:
    """Return which images of a synthetic set were drawn again, from its header; empty without a set."""
    if header is None:
        return ""
    settings = header["settings"]
    words = [settings["synthesis"]["reject"].replace("_", " ")]
    filters = settings.get("filter", {})
    if "agreement" in filters:
        words.append(f"judge agrees on {100 * filters['agreement']:g} %")
    if "novel" in filters:
        words.append("novel")
    return ", ".join(word for word in words if word != "none") or "none"


# Looks: how often test and validation results were shown, a line of ``looks.jsonl`` each. Changing a study after
# viewing its test results means selecting on the test set; the record cannot prevent that, but makes it visible.


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One time that results were shown: when (ISO 8601, UTC), by which command, and of which splits."""

    time: str
    command: str
    splits: tuple[str, ...]


def run_of(folder: Path) -> Path | None:
    """Return the study folder that a folder is or lies in; None for a folder outside of any study."""
    resolved = folder.resolve()
    for place in (resolved, *resolved.parents[:LEVELS]):
        try:
            if stage_of(place) == "study":
                return place
        except (CounterstainError, OSError, AttributeError):  # a run.json of another program
            continue
    return None


def record_look(folder: Path, command: str, splits: Sequence[str]) -> bool:
    """Append a look to the record in ``folder``, in one write, so that those of several processes do not mix.

    Returns whether it was recorded: results are shown also if the folder is not writable.
    """
    look = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "command": command, "splits": list(splits)}
    try:
        with (folder / LOOKS_FILE).open("a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"  # the last write was interrupted
            file.write((("\n" if torn else "") + json.dumps(look) + "\n").encode())
    except OSError:
        return False
    return True


def read_looks(folder: Path) -> tuple[Look, ...]:
    """Return the looks on record in a folder, oldest first; damaged lines are skipped."""
    try:
        lines = (folder / LOOKS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    found = (_look(line) for line in lines)
    return tuple(sorted((look for look in found if look), key=lambda look: look.time))


def times_looked_at(looks: Sequence[Look], split: str) -> Counter[str]:
    """Return how often each command showed the results of a split."""
    return Counter(look.command for look in looks if split in look.splits)


def _look(line: str) -> Look | None:
    try:
        content: Any = json.loads(line)
        splits = tuple(map(str, content["splits"]))
        return Look(time=str(content["time"]), command=str(content["command"]), splits=splits)
    except (ValueError, KeyError, TypeError):
        return None
