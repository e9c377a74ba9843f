"""Count tables of a study as one array.

Shapes: A arms, R repeats, P patients, L labels (background and every subtype).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from counterstain.errors import InputError

Measure = Callable[[np.ndarray], np.ndarray]
"""(..., L, 2) counts -> (...) values; undefined values are NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CountArray:
    """Count tables as one array."""

    counts: np.ndarray  # (A, R, P, L, 2) int64 pixels
    present: np.ndarray  # (A, R) bool, whether that cell of the study has counts
    arms: tuple[str, ...]
    patients: tuple[str, ...]

    @classmethod
    def of(cls, table: pd.DataFrame, num_labels: int) -> CountArray:
        """Add the slides of every patient up.

        Parameters
        ----------
        table : DataFrame
            Columns arm, repeat, patient, subtype (label), predicted_background, predicted_tumour (pixels).
        num_labels : int
            Background and every subtype.

        Raises
        ------
        InputError
            A label is out of range, or a cell lacks a patient that another one has.
        """
        outside = table.loc[~table["subtype"].between(0, num_labels - 1), "subtype"]
        if len(outside):
            raise InputError(f"counts: label {outside.iloc[0]} found, the taxonomy has 0 to {num_labels - 1}")
        arm, arms = pd.factorize(table["arm"])
        repeat, repeats = pd.factorize(table["repeat"], sort=True)
        patient, patients = pd.factorize(table["patient"], sort=True)
        counts = np.zeros((len(arms), len(repeats), len(patients), num_labels, 2), np.int64)
        place = (arm, repeat, patient, table["subtype"].to_numpy(np.int64))
        np.add.at(counts, place, table[["predicted_background", "predicted_tumour"]].to_numpy(np.int64))
        seen = np.zeros(counts.shape[:3], bool)
        seen[place[:3]] = True
        present = np.asarray(seen.any(axis=2))
        _require_same_patients(seen, present, arms.tolist(), repeats.tolist(), patients.tolist())
        return cls(counts=counts, present=present, arms=tuple(arms), patients=tuple(patients))

    def pair(self, reference: str, arm: str) -> np.ndarray:
        """Return the counts of two arms in the repeats that both have, (2, R, P, L, 2) float, the reference first."""
        rows = [self.arms.index(reference), self.arms.index(arm)]
        both: np.ndarray = self.counts[rows][:, self.present[rows].all(axis=0)].astype(float)
        return both


def require_reference(table: pd.DataFrame, reference: str) -> None:
    """Raise InputError where the reference arm has no row."""
    arms = list(pd.unique(table["arm"]))
    if reference not in arms:
        raise InputError(f"reference arm {reference!r} has no results; found {', '.join(map(str, arms)) or 'none'}")


def _require_same_patients(
    seen: np.ndarray, present: np.ndarray, arms: Sequence[str], repeats: Sequence[int], patients: Sequence[str]
) -> None:
    lacking = np.argwhere(present[..., None] & ~seen)
    if len(lacking):
        arm, repeat, patient = lacking[0].tolist()
        raise InputError(
            f"counts: arm {arms[arm]}, repeat {repeats[repeat]} lacks patient {patients[patient]}, which other cells "
            "have; evaluate all arms on the same patients"
        )
