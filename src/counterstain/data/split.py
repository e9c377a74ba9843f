"""The split of a cohort into train, val and test: by patient, stratified by score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field
from scipy.optimize import linprog

from counterstain.config import Config
from counterstain.data.cohort import PARTS, Cohort
from counterstain.data.composition import missing_subtypes
from counterstain.errors import InputError, MismatchError
from counterstain.seeding import numpy_generator

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SplitConfig(Config):
    """How many patients each part gets: counts (24, 8, 8) or shares that sum to 1 (0.6, 0.2, 0.2)."""

    train: Amount = 0.6
    """Patients to train on."""
    val: Amount = 0.2
    """Patients to choose hyper-parameters and checkpoints with."""
    test: Amount = 0.2
    """Patients that only the final evaluation sees."""
    seed: int = 0
    """Another seed deals the patients of a score out in another way."""

    @property
    def amounts(self) -> dict[str, float]:
        """Counts or shares by part."""
        return {"train": self.train, "val": self.val, "test": self.test}


def split_patients(
    patients: Sequence[str], scores: Sequence[str | None], amounts: Mapping[str, float], seed: int
) -> dict[str, str]:
    """Deal patients out to parts, each part with its share of every score.

    Parameters
    ----------
    patients : sequence of str, all different
    scores : sequence of str or None
        One for each patient; None is a score as any other.
    amounts : mapping
        Part -> number of patients (all whole numbers) or share (all at most 1, in all 1).
    seed : int

    Returns
    -------
    dict
        Patient -> part. The sizes of the parts are exact; the number of a score in a part is the exact proportion,
        rounded up or down.

    Raises
    ------
    InputError
        The amounts do not fit the number of patients.
    """
    totals = _totals(len(patients), amounts)
    by_score: dict[str, list[str]] = {}
    for patient, score in sorted(zip(patients, scores, strict=True), key=lambda pair: pair[0]):
        by_score.setdefault("" if score is None else str(score), []).append(patient)
    names = sorted(by_score)
    table = _rounded([len(by_score[name]) for name in names], list(totals.values()), seed)
    split: dict[str, str] = {}
    for name, counts in zip(names, table.tolist(), strict=True):
        members = numpy_generator(seed, "split", name).permutation(np.array(by_score[name], dtype=object))
        split |= dict(zip(members, np.repeat(list(totals), counts).tolist(), strict=True))
    return split


def split_cohort(cohort: Cohort, config: SplitConfig, *, force: bool = False) -> tuple[Cohort, list[str]]:
    """Split a cohort and store the split.

    Parameters
    ----------
    cohort : Cohort
    config : SplitConfig
    force : bool
        Replace a split that is there already. What was trained on the old one then counts as having seen its patients.

    Returns
    -------
    cohort, warnings
        The cohort with its split; a line for every part that lacks a subtype.

    Raises
    ------
    MismatchError
        The cohort has another split already.
    InputError
        The amounts do not fit the number of patients.
    """
    scores = patient_scores(cohort)
    split = split_patients(list(scores), list(scores.values()), config.amounts, config.seed)
    if cohort.regions["split"].notna().any() and not force:
        found = dict(zip(cohort.regions["patient"], cohort.regions["split"], strict=True))
        if found != split:
            raise MismatchError(
                f"{cohort.folder}: has another split already ({_sizes(cohort)}); give --force to replace it, and train "
                "anew what was trained on it"
            )
        return cohort, missing_subtypes(cohort)
    cohort = cohort.write_split(split)
    check_disjoint(cohort)
    return cohort, missing_subtypes(cohort)


def patient_scores(cohort: Cohort) -> dict[str, str | None]:
    """Return every patient's score: the commonest among the slides, of equally common ones the first by name."""
    slides = cohort.regions.drop_duplicates("slide")
    scores: dict[str, str | None] = {}
    for patient, score in slides.groupby("patient", sort=True)["score"]:
        commonest = score.dropna().mode()
        scores[str(patient)] = str(commonest.iloc[0]) if len(commonest) else None
    return scores


def check_disjoint(cohort: Cohort) -> None:
    """Check that no patient is in two parts.

    Raises
    ------
    InputError
        Names the patient and the parts.
    """
    pairs = cohort.regions[["patient", "split"]].dropna().drop_duplicates()
    for patient, parts in pairs.groupby("patient")["split"]:
        if len(parts) > 1:
            raise InputError(
                f"{cohort.folder}: patient {patient} is in two parts, {' and '.join(sorted(parts))}; "
                f"run 'counterstain split {cohort.folder} --force'"
            )


def _totals(count: int, amounts: Mapping[str, float]) -> dict[str, int]:
    """Return the number of patients of each part; shares are rounded by largest remainder."""
    given = " + ".join(f"{amount:g}" for amount in amounts.values())
    total = sum(amounts.values())
    if all(float(amount).is_integer() for amount in amounts.values()) and total != 1:
        if total != count:
            raise InputError(
                f"{given} = {total:g} patients, but the cohort has {count}; give counts that sum to {count}"
            )
        return {part: int(amount) for part, amount in amounts.items()}
    if abs(total - 1) > 1e-6 or max(amounts.values()) > 1:
        raise InputError(
            f"{given} = {total:g}: expected shares that sum to 1 (0.6 0.2 0.2), or whole numbers that sum to the "
            f"{count} patients of the cohort"
        )
    exact = {part: count * amount for part, amount in amounts.items()}
    totals = {part: int(value + 1e-9) for part, value in exact.items()}
    by_remainder = sorted(totals, key=lambda part: totals[part] - exact[part])  # stable: train before val before test
    for part in by_remainder[: count - sum(totals.values())]:
        totals[part] += 1
    empty = [part for part, amount in amounts.items() if amount > 0 and totals[part] == 0]
    if empty:
        raise InputError(f"{given} of {count} patients leaves {empty[0]} empty; give counts, or more patients")
    return totals


def _rounded(rows: Sequence[int], columns: Sequence[int], seed: int) -> np.ndarray:
    """Fill a table of whole numbers, each cell its exact proportion rounded up or down, from the sums of both sides.

    Parameters
    ----------
    rows, columns : sequences of int
        Patients of every score and of every part; both sum to the number of patients.

    Notes
    -----
    Which cells are rounded up is a transport problem, whose best solution is always whole. Cells with the largest
    remainders are preferred; equal ones are decided by the seed.
    """
    lower, remainder = np.divmod(np.outer(rows, columns), sum(rows))
    cells = np.eye(lower.size).reshape(*lower.shape, -1)
    tie_break = numpy_generator(seed, "round").random(lower.size) * 1e-3
    solution = linprog(
        -(remainder.ravel() / sum(rows) + tie_break),
        A_eq=np.concatenate([cells.sum(axis=1), cells.sum(axis=0)]),
        b_eq=np.concatenate([rows - lower.sum(axis=1), columns - lower.sum(axis=0)]),
        bounds=np.stack([np.zeros(lower.size), remainder.ravel() > 0], axis=1),
    )
    assert solution.success, solution.message
    table: np.ndarray = lower + np.rint(solution.x).astype(np.int64).reshape(lower.shape)
    return table


def _sizes(cohort: Cohort) -> str:
    return ", ".join(f"{part} {len(cohort.patients(part))}" for part in PARTS)
