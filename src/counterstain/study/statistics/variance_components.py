"""Where the spread of a difference between two arms comes from: patients, repeats, and what both share.

Shapes: R repeats, P patients, L labels (background and every subtype).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from counterstain.study.statistics.bootstrap import Measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """The variance of a mean difference, by source; NaN where a source cannot be seen."""

    patients: float
    """Variance over patients (jackknife): patients' own part and what is left over."""
    repeats: float
    """Variance over repeats: repeats' own part and what is left over."""
    both: float
    """What is left over (patients x repeats); 0 where it cannot be seen."""
    num_patients: int
    num_repeats: int

    @property
    def own_of_patients(self) -> float:
        """The patients' part without what is left over."""
        return max(self.patients - self.both, 0.0)

    @property
    def own_of_repeats(self) -> float:
        """The repeats' part without what is left over; 0 for one repeat.

        With two repeats what is left over is not taken off: two values cannot tell so little from nothing.
        """
        if self.num_repeats < 2:
            return 0.0
        return max(self.repeats - (self.both if self.num_repeats > 2 else 0.0), 0.0)


def components_of(pair: np.ndarray, measure: Measure) -> Components:
    """Split the variance of a mean difference by a two-way analysis of jackknife pseudo-values.

    A pseudo-value P m(all) - (P - 1) m(all but one) says what one patient contributes to a measure that is no mean
    (Tukey 1958; Arvesen, Ann. Math. Stat. 40, 1969). The table of their differences, repeats x patients, has one value
    a cell, so its rows, columns and residuals give three variances.

    Parameters
    ----------
    pair : (2, R, P, L, 2) array
        Counts of the reference and of the arm.
    measure : callable
        (..., L, 2) counts -> (...) values.

    Returns
    -------
    Components
        The variance over patients is NaN where one patient alone has what the measure needs.
    """
    repeats, patients = pair.shape[1:3]
    total = measure(pair.sum(axis=2))  # (2, R)
    found = total[1] - total[0]
    of_repeats = float(found.var(ddof=1)) / repeats if repeats > 1 else float("nan")
    if patients < 2:
        return Components(
            patients=float("nan"), repeats=of_repeats, both=0.0, num_patients=patients, num_repeats=repeats
        )
    without = measure(pair.sum(axis=2, keepdims=True) - pair)  # (2, R, P)
    pseudo = patients * total[..., None] - (patients - 1) * without
    table = pseudo[1] - pseudo[0]
    by_patient = table.mean(axis=0)
    left = table - by_patient - table.mean(axis=1, keepdims=True) + table.mean()
    freedom = (patients - 1) * (repeats - 1)
    return Components(
        patients=float(by_patient.var(ddof=1)) / patients,
        repeats=of_repeats,
        both=float((left**2).sum()) / (freedom * patients * repeats) if freedom else 0.0,
        num_patients=patients,
        num_repeats=repeats,
    )
