"""How far the arms of a study lie from its reference arm.

Shapes: A arms, R repeats, P patients, L labels (background and every subtype), B bootstrap draws. Everything here is
pure: tables in, tables out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import ndtri, stdtrit

from counterstain.errors import InputError
from counterstain.seeding import numpy_generator

Measure = Callable[[np.ndarray], np.ndarray]
"""(..., L, 2) counts -> (...) values; undefined values are NaN."""

KEYS = ("arm", "repeat", "split")
EFFECT = ["arm", "split", "measure", "n", "reference", "value", "mean", "sd", "min", "max", "relative"]


def measures_of(results: pd.DataFrame) -> list[str]:
    """Return the columns of a results table that are measures."""
    return [str(column) for column in results.columns if column not in KEYS]


def spread(results: pd.DataFrame) -> pd.DataFrame:
    """Return mean, sd (ddof 1), min, max and n over the repeats: a row per arm, split and measure."""
    long = results.melt(id_vars=list(KEYS), value_vars=measures_of(results), var_name="measure")
    groups = long.groupby(["arm", "split", "measure"], sort=False)["value"]
    return groups.agg(mean="mean", sd="std", min="min", max="max", n="count").reset_index()


def differences(results: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return the differences of every arm to the reference arm, paired by repeat.

    Parameters
    ----------
    results : DataFrame
        A row per arm, repeat and split; every other column is a measure.
    reference : str
        Name of the arm that the others are held against.

    Returns
    -------
    DataFrame
        A row per arm, split and measure: ``n`` pairs; ``reference`` and ``value``, the two means over these pairs;
        ``mean``, ``sd`` (ddof 1; NaN for one pair), ``min`` and ``max`` of the differences; ``relative``, the mean
        difference as a share of ``reference``.

    Raises
    ------
    InputError
        The reference arm has no row.
    """
    _require_reference(results, reference)
    long = results.melt(id_vars=list(KEYS), value_vars=measures_of(results), var_name="measure").dropna()
    of_reference = long.loc[long["arm"] == reference].drop(columns="arm").rename(columns={"value": "reference"})
    pairs = long.loc[long["arm"] != reference].merge(of_reference, on=["repeat", "split", "measure"])
    pairs["difference"] = pairs["value"] - pairs["reference"]
    groups = pairs.groupby(["arm", "split", "measure"], sort=False)
    table = groups.agg(
        n=("difference", "size"),
        reference=("reference", "mean"),
        value=("value", "mean"),
        mean=("difference", "mean"),
        sd=("difference", "std"),
        min=("difference", "min"),
        max=("difference", "max"),
    ).reset_index()
    table["relative"] = table["mean"] / table["reference"].where(table["reference"] != 0)
    return table[EFFECT]


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


def bootstrap_differences(
    counts: pd.DataFrame,
    reference: str,
    measures: Mapping[str, Measure],
    *,
    num_labels: int,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Return bootstrap intervals for the differences of every arm to the reference arm.

    A draw takes n - 1 of n patients with replacement, pools their pixels for every repeat of both arms, and then
    takes n - 1 of n repeats with replacement: with one less than there are, the spread of the draws is right also for
    few of them (Rao and Wu, J. Am. Stat. Assoc. 83, 1988). Arm and reference share the patients and the repeats of a
    draw, and all arms share their patients. The percentiles are then drawn out, from the difference itself, as
    Student's t is wider than the normal distribution, with Satterthwaite's degrees of freedom for the two sources of
    spread. One patient or one repeat tells nothing of its own spread, which is then left out.

    Parameters
    ----------
    counts : DataFrame
        The count tables of **one** split; see :meth:`CountArray.of`.
    reference : str
        Name of the arm that the others are held against.
    measures : mapping
        Name -> function of (..., L, 2) counts.
    num_labels : int
        L: background and every subtype.
    draws : int
        B.
    seed : int
        The intervals depend on it and on nothing else.
    level : float
        Coverage of the intervals.

    Returns
    -------
    DataFrame
        A row per arm and measure: ``n`` repeats, ``patients``; ``low`` and ``high`` of the difference,
        ``relative_low`` and ``relative_high`` of the difference as a share of the reference; ``undefined``, the share
        of draws without a value (no pixel of a subtype drawn), which are left out.

    Raises
    ------
    InputError
        The reference arm has no counts, or cells of the study differ in their patients.
    """
    _require_reference(counts, reference)
    array = CountArray.of(counts, num_labels)
    at_reference = array.arms.index(reference)
    patient_weights = _weights(seed, "patients", len(array.patients), draws)  # (B, P)
    everyone = np.ones((1, len(array.patients)))
    reference_draws = _measure_draws(array.counts[at_reference], patient_weights, measures)
    reference_found = _measure_draws(array.counts[at_reference], everyone, measures)
    rows = []
    for position, arm in enumerate(array.arms):
        paired = np.flatnonzero(array.present[at_reference] & array.present[position])
        if position == at_reference or not len(paired):
            continue
        repeat_weights = _weights(seed, "repeats", len(paired), draws)
        repeat_weights = repeat_weights / repeat_weights.sum(axis=1, keepdims=True)  # (B, R)
        arm_draws = _measure_draws(array.counts[position], patient_weights, measures)
        arm_found = _measure_draws(array.counts[position], everyone, measures)
        for name in measures:
            size = {"arm": arm, "measure": name, "n": len(paired), "patients": len(array.patients)}
            interval = _interval(
                old=(reference_draws[name][:, paired] * repeat_weights).sum(axis=1),
                new=(arm_draws[name][:, paired] * repeat_weights).sum(axis=1),
                old_found=reference_found[name][0, paired],
                new_found=arm_found[name][0, paired],
                patients=len(array.patients),
                level=level,
            )
            rows.append(size | interval)
    columns = ["arm", "measure", "n", "patients", "low", "high", "relative_low", "relative_high", "undefined"]
    return pd.DataFrame(rows, columns=columns)


def _weights(seed: int, what: str, size: int, draws: int) -> np.ndarray:
    """How often each of ``size`` things is in each draw of one less, (B, size)."""
    taken = max(size - 1, 1)
    return numpy_generator(seed, "bootstrap", what).multinomial(taken, np.full(size, 1 / size), size=draws)


def _measure_draws(counts: np.ndarray, weights: np.ndarray, measures: Mapping[str, Measure]) -> dict[str, np.ndarray]:
    """Pool (R, P, L, 2) counts by (B, P) weights and measure: name -> (B, R)."""
    pooled = np.einsum("bp,rpls->brls", weights.astype(float), counts.astype(float), optimize=True)
    return {name: np.asarray(measure(pooled), float) for name, measure in measures.items()}


def _interval(
    *, old: np.ndarray, new: np.ndarray, old_found: np.ndarray, new_found: np.ndarray, patients: int, level: float
) -> dict[str, float]:
    """Return an interval from draws of the reference and the arm, (B,), and from what was found, (R,)."""
    difference = new - old
    defined = np.isfinite(difference)
    stretch = _stretch(difference[defined], new_found - old_found, patients, level)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = difference / old
        relative_found = (new_found.mean() - old_found.mean()) / old_found.mean()
    low, high = _stretched(difference, float(new_found.mean() - old_found.mean()), stretch, level)
    relative_low, relative_high = _stretched(relative, float(relative_found), stretch, level)
    return {
        "low": low,
        "high": high,
        "relative_low": max(relative_low, -1.0),  # measures are not negative
        "relative_high": relative_high,
        "undefined": float(1 - defined.mean()),
    }


def _stretch(draws: np.ndarray, by_repeat: np.ndarray, patients: int, level: float) -> float:
    """How much wider than the normal distribution Student's t is for these two sources of spread."""
    repeats = len(by_repeat)
    total = float(draws.var()) if len(draws) else 0.0
    of_repeats = min(float(by_repeat.var(ddof=1)) / repeats, total) if repeats > 1 else 0.0
    of_patients = total - of_repeats if patients > 1 else 0.0
    weakness = of_repeats**2 / max(repeats - 1, 1) + of_patients**2 / max(patients - 1, 1)
    if not weakness > 0:
        return 1.0
    freedom = (of_repeats + of_patients) ** 2 / weakness
    tail = (1 + level) / 2
    return float(stdtrit(freedom, tail) / ndtri(tail))


def _stretched(draws: np.ndarray, found: float, stretch: float, level: float) -> tuple[float, float]:
    """Return the percentiles of the defined draws, drawn out from what was found."""
    defined = draws[np.isfinite(draws)]
    if not len(defined) or not np.isfinite(found):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(found + stretch * (low - found)), float(found + stretch * (high - found))


def _require_reference(table: pd.DataFrame, reference: str) -> None:
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
