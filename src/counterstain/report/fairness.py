"""Whether the arms of a study were treated alike, read off what its trainings recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from counterstain.errors import StorageError
from counterstain.report.arms import label_of
from counterstain.report.numbers import PERCENT, counted
from counterstain.study.fairness import COLUMNS, FAIRNESS_FILE, departures, fairness_of


def read_fairness(folder: Path) -> pd.DataFrame:
    """Read ``fairness.csv`` of a results folder, with a row per arm and repeat; empty where it is missing.

    Raises
    ------
    StorageError
        It is damaged.
    """
    if not (folder / FAIRNESS_FILE).exists():
        return pd.DataFrame(columns=list(COLUMNS))
    try:
        return fairness_of(folder)[list(COLUMNS)]
    except (ValueError, KeyError) as error:  # pandas derives its errors from these
        reason = " ".join(str(error).split())[:120]
        file = folder / FAIRNESS_FILE
        raise StorageError(f"{file}: damaged ({reason}); delete it and give the study's command again") from error


def fairness_sentences(table: pd.DataFrame) -> tuple[str, ...]:
    """Say what arms had in common, then in what they differ; empty where the study recorded nothing."""
    return (*_common(table), *(f"Differs: {line}." for line in departures(table))) if len(table) else ()


def _common(table: pd.DataFrame) -> Iterator[str]:
    values = {column: list(dict.fromkeys(table[column].tolist())) for column in table.columns}
    alike = {column: found[0] for column, found in values.items() if len(found) == 1}
    if {"steps", "batch_size"} <= alike.keys():
        yield (
            f"Equal optimiser steps: every segmenter ({len(table)}) took {alike['steps']:,} steps of "
            f"{alike['batch_size']} patches, so no arm wins by more updates."
        )
    if "augmentation" in alike:
        yield f"Equal augmentation of real and synthetic patches in all arms: {alike['augmentation']}."
    if "settings" in alike:
        yield "Equal settings of network, losses and optimiser in all arms."
    if all(len(set(rows["seed"].tolist())) == 1 for _, rows in table.groupby("repeat")):
        repeats = counted(len(values["repeat"]), "repeat")
        yield f"Equal seeds: within each of {repeats} all arms have the same initial weights and order of real patches."
    yield from _filters(table[table["synthetic_patches"] > 0])


def _filters(table: pd.DataFrame) -> Iterator[str]:
    """Say what was refused, by the largest amount that arms use of each set."""
    largest = table.sort_values("synthetic_patches").drop_duplicates(["filter", "synthetic_set"], keep="last")
    rates: dict[str, list[str]] = {}
    for row in largest.to_dict("records"):
        drawn, rejected = int(row["drawn"]), int(row["rejected"])
        share = f"{100 * rejected / max(drawn, 1):.1f}{PERCENT}"
        rates.setdefault(str(row["filter"]), []).append(
            f"{label_of(str(row['synthetic_set']))} {rejected:,} of {drawn:,} images ({share})"
        )
    for name, told in rates.items():
        whom = "all synthetic sets" if len(rates) == 1 else "these sets"
        yield f"One filter for {whom} ({name}); refused: {', '.join(told)}."
