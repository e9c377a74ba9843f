"""Where the spread of a difference between two arms comes from: patients, repeats, and what both share.

Shapes: R repeats, P patients, L labels (background and every subtype).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from counterstain.study.statistics.count_array import Measure


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
    def of_repeats(self) -> float:
        """The repeats' own part; 0 for one repeat.

        With two repeats what is left over is not taken off: 2 values cannot tell so little from nothing.
        """
        if self.num_repeats < 2:
            return 0.0
        return max(self.repeats - (self.both if self.num_repeats > 2 else 0.0), 0.0)

    def half_width(self, critical: float, level: float) -> float:
        """Return half of the interval's width.

        Each source has a quantile of its own: the repeats that of Student's t with R - 1 degrees of freedom, the
        patients ``critical`` (:func:`~counterstain.study.statistics.critical.critical_values`); the squares add up
        (Graybill and Wang, J. Am. Stat. Assoc. 75, 1980). NaN where neither source can be seen.
        """
        of_patients = critical**2 * self.patients if self.num_patients > 1 else 0.0
        if self.num_repeats < 2:
            return float(np.sqrt(of_patients)) if self.num_patients > 1 else float("nan")
        of_repeats = stdtrit(self.num_repeats - 1, (1 + level) / 2) ** 2 * self.of_repeats
        return float(np.sqrt(of_patients + of_repeats))


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
