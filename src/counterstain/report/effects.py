"""The differences of every arm to the reference arm, with intervals; the arm that validation chooses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd

from counterstain.progress import PERCENT, counted
from counterstain.report.formatting import fixed, is_baseline, is_oracle, method_of
from counterstain.report.results import Results
from counterstain.segmentation.counts import dice, recalls, subtype_variance
from counterstain.study.statistics.arm_differences import differences, effects_of
from counterstain.study.statistics.bootstrap import Measure
from counterstain.study.statistics.permutation_test import smallest_p
from counterstain.study.test_access_log import Look, times_looked_at
from counterstain.taxonomy import Taxonomy

MAIN = ("dice", "subtype_variance")
HIGHER_IS_BETTER = {"dice": 1, "subtype_variance": -1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """The difference of one arm to the reference arm in one measure, paired by repeat."""

    n: int = 0
    """Repeats."""
    mean: float = math.nan
    sd: float = math.nan
    """NaN for one repeat."""
    min: float = math.nan
    max: float = math.nan
    relative: float = math.nan
    """The mean as a share of the reference."""
    low: float = math.nan
    """End of the 95 % interval; NaN where there is none."""
    high: float = math.nan
    relative_low: float = math.nan
    relative_high: float = math.nan
    undefined: float = math.nan
    """Share of bootstrap draws that had no value."""
    p: float = math.nan
    """Of the exchange test, for this arm alone."""
    p_holm: float = math.nan
    """The same, corrected for the number of arms."""
    detectable: float = math.nan
    """The smallest difference that a study of this size sees with a power of 80 %."""
    needed_repeats: float = math.nan
    """Repeats that would see this difference with a power of 80 %; inf where no number would."""
    needed_patients: float = math.nan
    """Patients that would."""


UNDEFINED = Effect()
"""Where a measure has no value."""
Effects = dict[tuple[str, str], Effect]
"""By arm and measure."""


def effects_on_test(results: Results, *, draws: int = 10_000, seed: int = 0) -> Effects:
    """Return differences to the reference arm on the test part, with 95 % intervals, p-values and power.

    See :func:`~counterstain.study.statistics.differences` and :func:`~counterstain.study.statistics.effects_of`;
    variants of the measures have their differences alone.
    """
    study = results.study
    paired = differences(results.results, study.reference)
    paired = paired.loc[paired["split"] == "test"]
    counts = results.counts.loc[results.counts["split"] == "test"]
    tested = effects_of(
        counts,
        study.reference,
        _measures(study.taxonomy, counts),
        num_labels=study.taxonomy.num_labels,
        draws=draws,
        seed=seed,
    )
    joined = paired.merge(tested.drop(columns="n"), on=["arm", "measure"], how="left")
    names = [field.name for field in fields(Effect)]
    return {
        (row["arm"], row["measure"]): Effect(**{name: row[name] for name in names})
        for row in joined.to_dict(orient="records")
    }


def chosen_arm(results: Results) -> str | None:
    """Return the arm with synthetic images that has the highest mean Dice on validation.

    Ties go to the lower subtype variance. Baselines (every arm without synthetic images) cannot be chosen, as they are
    what the choice is held against (see :func:`preferred_baseline`), nor can oracle arms, which no real cohort has.
    None if no arm is left or validation has no results.
    """
    means = _on_validation(results, [a for a in results.arms if not (is_baseline(method_of(a)) or is_oracle(a))])
    if means.empty:
        return None
    return str(means.sort_values(list(MAIN), ascending=[False, True], kind="stable").index[0])


def preferred_baseline(results: Results, chosen: str) -> tuple[str, float, float] | None:
    """Return the baseline that validation ranks above the chosen arm, and the mean Dice of both there; None if none."""
    means = _on_validation(results, [chosen, *(a for a in results.arms if is_baseline(method_of(a)))])["dice"]
    best = str(means.idxmax())
    return None if best == chosen else (best, float(means[best]), float(means[chosen]))


def _on_validation(results: Results, arms: Sequence[str]) -> pd.DataFrame:
    """Return the means of the main measures over repeats, by arm."""
    table = results.results
    rows = table.loc[(table["split"] == "val") & table["arm"].isin(arms)]
    return rows.groupby("arm")[list(MAIN)].mean().dropna(subset=["dice"])


def _measures(taxonomy: Taxonomy, counts: pd.DataFrame) -> dict[str, Measure]:
    """Return the main measures; those of a draw that lacks a subtype which the part has are undefined."""
    pixels = counts.groupby("subtype")[["predicted_background", "predicted_tumour"]].sum().sum(axis=1)
    counted = [k for k in taxonomy.counted_ids if pixels.get(k, 0) > 0]

    def variance(table: np.ndarray) -> np.ndarray:
        lacks_one = (table[..., counted, :].sum(axis=-1) == 0).any(axis=-1)
        return np.where(lacks_one, np.nan, subtype_variance(table, counted))

    found = {f"recall_{s.name}": _recall(s.id) for s in taxonomy.subtypes}
    return {"dice": dice, "subtype_variance": variance, **found}


def _recall(subtype: int) -> Measure:
    return lambda table: recalls(table[..., [0, subtype], :])[..., 0]


# How sure a difference is, in words: p-values, power, and how often anybody looked.

SIGNIFICANT = 0.05
PART_NAMES = {"val": "validation", "test": "test"}


def p_text(p: float) -> str:
    """Write a p-value (``p = 0.03``, ``p < 0.001``); empty where there is none."""
    if not math.isfinite(p):
        return ""
    return f"p = {_figure(p)}" if p >= 0.001 else "p < 0.001"


def both_p_text(effect: Effect) -> str:
    """Write a p-value beside the one corrected for the number of arms (``p = 0.03, corrected 0.21``)."""
    if not math.isfinite(effect.p_holm) or effect.p_holm == effect.p:
        return p_text(effect.p)
    corrected = _figure(effect.p_holm) if effect.p_holm >= 0.001 else "< 0.001"
    return f"{p_text(effect.p)}, corrected {corrected}"


def needed_text(number: float, thing: str) -> str:
    """Write how many repeats or patients it takes (``9 repeats``); empty where that cannot be told."""
    if math.isnan(number):
        return ""
    return counted(int(number), thing) if math.isfinite(number) else f"no number of {thing}s"


def power_sentence(effect: Effect, what: str, patients: int) -> str:
    """Say what it would take to see a difference as large as this one; empty where that cannot be told."""
    repeats, of_patients = needed_text(effect.needed_repeats, "repeat"), needed_text(effect.needed_patients, "patient")
    if not repeats or not of_patients:
        return ""
    return (
        f"To see a difference in {what} as large as this one with 80{PERCENT} power takes {repeats} with "
        f"{counted(patients, 'test patient')}, or {of_patients} with {counted(effect.n, 'repeat')}."
    )


def smallest_p_caution(patients: int, arms: int) -> str:
    """Say where p-values end with few patients; empty where they end below what matters."""
    least = smallest_p(patients)
    if arms * least <= SIGNIFICANT:
        return ""
    said = f"With {counted(patients, 'test patient')} no p-value can be below {_figure(least)}"
    if arms > 1:
        said += f", and corrected for {counted(arms, 'arm')} none below {_figure(min(arms * least, 1.0))}"
    return f"{said}, whatever the difference: look at the intervals, or evaluate on more patients."


def looks_sentence(looks: Sequence[Look]) -> str:
    """Say how often the figures of each part were shown."""
    said = []
    for split, name in PART_NAMES.items():
        times = times_looked_at(looks, split)
        by_command = ", ".join(f"{command} {count}" for command, count in sorted(times.items()))
        if times:
            said.append(f"of the {name} part {_times(times.total())} ({by_command})")
    if not said:
        return "How often the figures of each part were looked at is not on record."
    return (
        f"Figures {' and '.join(said)} have been shown since {looks[0].time[:10]}, this page included. "
        "Whoever changes a study after a look at the test part chooses by the test part."
    )


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def _figure(p: float) -> str:
    return fixed(p, 2 if p >= 0.0995 else 3)
