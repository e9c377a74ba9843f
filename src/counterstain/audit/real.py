"""Real patches that synthetic ones are compared with, cut as masks for synthetic ones are cut by default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from counterstain.data.batches import PatchSource
from counterstain.data.cohort import Cohort
from counterstain.data.patches import Patch
from counterstain.data.sampling import PatchSampler, SamplingConfig
from counterstain.errors import InputError
from counterstain.seeding import derive, numpy_generator

MOST_DRAWN = 50  # patches drawn for each one wanted, before a half counts as not to be had


@dataclass(frozen=True)
class Chosen(Sequence[Patch]):
    """Some patches of an endless or long source, read when they are asked for."""

    source: PatchSource
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return self.source[self.numbers[index]]


def real_patches(cohort: Cohort, part: str, size_px: int, count: int, seed: int) -> Chosen:
    """Cut patches out of one part of a cohort, subtypes equally often."""
    return Chosen(PatchSampler(cohort, part, size_px, SamplingConfig(), derive(seed, "audit", part)), range(count))


def training_halves(cohort: Cohort, size_px: int, count: int, seed: int) -> tuple[Chosen, Chosen]:
    """Cut ``count`` patches out of each of two halves of the training patients, alike in their slides' scores.

    Raises
    ------
    InputError
        There is one training patient only, or half of them have next to no tissue.
    """
    sampler = PatchSampler(cohort, "train", size_px, SamplingConfig(), derive(seed, "audit", "halves"))
    first = _every_second_patient(cohort, seed)
    numbers: tuple[list[int], list[int]] = ([], [])
    for i in range(MOST_DRAWN * count):
        half = numbers[0 if sampler[i].source.patient in first else 1]
        if len(half) < count:
            half.append(i)
        if all(len(half) == count for half in numbers):
            return Chosen(sampler, numbers[0]), Chosen(sampler, numbers[1])
    raise InputError(f"{cohort.folder}: the training part cannot be halved by patient; it needs two patients at least")


def _every_second_patient(cohort: Cohort, seed: int) -> set[str]:
    """Return half of the training patients: every second one, those of one score beside each other."""
    training = cohort.regions.iloc[cohort.part("train")]
    scores = training.assign(score=training["score"].astype(str)).groupby("patient")["score"].min()
    shuffled = numpy_generator(seed, "audit", "half").permutation(len(scores))
    table = pd.DataFrame({"score": scores.to_numpy()[shuffled]}, index=scores.index.to_numpy()[shuffled])
    return set(table.sort_values("score", kind="stable").index[::2])
