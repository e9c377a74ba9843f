"""A cohort that trains on fewer patients: which ones, and how it shares the pixels of the whole cohort."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from counterstain.data.cohort import PARTS, Cohort
from counterstain.data.split import patient_scores
from counterstain.errors import InputError
from counterstain.seeding import numpy_generator
from counterstain.storage import replacing

FILES = ("regions.parquet", "instances.parquet", "cohort.json")  # the last one makes a cohort of the folder


def order_patients(scores: Mapping[str, str | None], seed: int) -> list[str]:
    """Order patients so that the first n are a stratified choice, for any n; larger choices hold smaller ones.

    Parameters
    ----------
    scores : mapping
        Patient -> score; None is a score as any other.
    seed : int

    Returns
    -------
    list of str
        All patients. Among the first n each score has its share of n, to within one patient.
    """
    by_score: dict[str, list[str]] = {}
    for patient in sorted(scores):
        by_score.setdefault(scores[patient] or "", []).append(patient)
    waiting = {
        score: numpy_generator(seed, "training patients", score).permutation(members).tolist()
        for score, members in by_score.items()
    }
    shares = {score: len(members) / len(scores) for score, members in by_score.items()}
    ties = dict(zip(sorted(shares), numpy_generator(seed, "scores").permutation(len(shares)).tolist(), strict=True))
    ordered: list[str] = []
    taken = dict.fromkeys(shares, 0)
    for number in range(1, len(scores) + 1):
        left = [score for score in shares if waiting[score]]
        score = max(left, key=lambda name: (shares[name] * number - taken[name], ties[name]))
        ordered.append(waiting[score].pop())
        taken[score] += 1
    return ordered


def keep_training_patients(cohort: Cohort, count: int, seed: int) -> Cohort:
    """Take all but ``count`` training patients out of the split, by score; validation and test stay as they are.

    Raises
    ------
    InputError
        The training part has fewer patients.
    """
    check_count(cohort, count)
    scores = patient_scores(cohort)
    kept = order_patients({patient: scores[patient] for patient in _training(cohort)}, seed)[:count]
    parts = {part: cohort.patients(part) for part in PARTS} | {"train": kept}
    return cohort.write_split({patient: part for part, patients in parts.items() for patient in patients})


def _training(cohort: Cohort) -> list[str]:
    """Return the patients of the training part's own regions, without those behind generated images."""
    return sorted({*cohort.regions.loc[cohort.regions["split"] == "train", "patient"]})


def check_count(cohort: Cohort, count: int) -> None:
    """Raise InputError unless the training part has so many patients."""
    available = len(_training(cohort))
    if count > available:
        raise InputError(
            f"{cohort.folder}: {count} training patients are asked for, its training part has {available}; "
            f"give {available} at most"
        )


def link_cohort(cohort: Cohort, folder: Path) -> Cohort:
    """Make a cohort with tables of its own whose pixels are those of another one; the other must stay in its place."""
    folder.mkdir(parents=True, exist_ok=True)
    link_packs(cohort.folder, folder)
    for name in FILES:
        with replacing(folder / name) as partial:
            shutil.copyfile(cohort.folder / name, partial)
    return Cohort.open(folder)


def link_packs(whole: Path, folder: Path) -> None:
    """Let a cohort made by :func:`link_cohort` find the pixels of the whole one, which may have been moved."""
    packs = folder / "packs"
    packs.unlink(missing_ok=True)
    packs.symlink_to((whole / "packs").resolve(), target_is_directory=True)
