"""How far the arms of a study lie from its reference arm.

Shapes: A arms, R repeats, P patients, L labels (background and every subtype), B bootstrap draws. Everything here is
pure: tables in, tables out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

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
    """Return percentile intervals for the differences of every arm to the reference arm.

    A draw takes as many patients as there are, with replacement, pools their pixels for every repeat of both arms,
    and then takes as many repeats as there are, with replacement. Arm and reference always share the patients and
    the repeats of a draw, and all arms share their patients. Both resamplings narrow the interval by about
    sqrt((n - 1) / n), so with two repeats or a handful of patients it is too narrow.

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
    of_reference = _measure_draws(array.counts[at_reference], patient_weights, measures)
    rows = []
    for position, arm in enumerate(array.arms):
        paired = np.flatnonzero(array.present[at_reference] & array.present[position])
        if position == at_reference or not len(paired):
            continue
        repeat_weights = _weights(seed, "repeats", len(paired), draws) / len(paired)  # (B, R)
        of_arm = _measure_draws(array.counts[position], patient_weights, measures)
        for name in measures:
            old = (of_reference[name][:, paired] * repeat_weights).sum(axis=1)
            new = (of_arm[name][:, paired] * repeat_weights).sum(axis=1)
            size = {"arm": arm, "measure": name, "n": len(paired), "patients": len(array.patients)}
            rows.append(size | _interval(new - old, old, level))
    columns = ["arm", "measure", "n", "patients", "low", "high", "relative_low", "relative_high", "undefined"]
    return pd.DataFrame(rows, columns=columns)


def _weights(seed: int, what: str, size: int, draws: int) -> np.ndarray:
    """How often each of ``size`` things is in each draw, (B, size)."""
    return numpy_generator(seed, "bootstrap", what).multinomial(size, np.full(size, 1 / size), size=draws)


def _measure_draws(counts: np.ndarray, weights: np.ndarray, measures: Mapping[str, Measure]) -> dict[str, np.ndarray]:
    """Pool (R, P, L, 2) counts by (B, P) weights and measure: name -> (B, R)."""
    pooled = np.einsum("bp,rpls->brls", weights.astype(float), counts.astype(float), optimize=True)
    return {name: np.asarray(measure(pooled), float) for name, measure in measures.items()}


def _interval(difference: np.ndarray, reference: np.ndarray, level: float) -> dict[str, float]:
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = difference / reference
    low, high = _percentiles(difference, level)
    relative_low, relative_high = _percentiles(relative, level)
    return {
        "low": low,
        "high": high,
        "relative_low": relative_low,
        "relative_high": relative_high,
        "undefined": float(1 - np.isfinite(difference).mean()),
    }


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    defined = values[np.isfinite(values)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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
