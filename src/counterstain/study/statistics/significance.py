"""How certain the difference between two arms is: its bootstrap interval, and the permutation test of no difference.

Shapes: R repeats, P patients, L labels (background and every subtype), B bootstrap draws or permutations. Counts of a
pair of arms, (2, R, P, L, 2), have the reference first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtri, stdtr, stdtrit

from counterstain.data.cohort import Cohort
from counterstain.seeding import numpy_generator
from counterstain.segmentation.counts import by_slide, dice, recalls
from counterstain.taxonomy import BACKGROUND

Measure = Callable[[np.ndarray], np.ndarray]
"""(..., L, 2) counts -> (...) values; undefined values are NaN."""
LEVEL = 0.95
"""Coverage of all intervals."""
ENDS = ("low", "high", "relative_low", "relative_high")
ALL_UP_TO = 12  # patients; all 2**12 permutations are tried, beyond that DRAWN of them
DRAWN = 5_000
FEWEST_PATIENTS = 3  # with two, Student's interval is 6.5 times that of the normal distribution and says nothing
SUMMARY_DRAWS = 2000  # of the interval of one segmenter
UNDEFINED = 0.05  # share of draws without a value above which there is no interval
SAME = 1e-9  # relative; sums in another order differ by less


def bootstrap_weights(seed: int, what: str, size: int, draws: int) -> np.ndarray:
    """Return the weight of each of ``size`` patients or repeats in each draw, (B, size), each row adding up to 1.

    A draw takes n - 1 of n with replacement, which makes the variance of the draws unbiased also for small n (Rao and
    Wu, J. Am. Stat. Assoc. 83, 1988).
    """
    taken = max(size - 1, 1)
    return numpy_generator(seed, "bootstrap", what).multinomial(taken, np.full(size, 1 / size), size=draws) / taken


def pooled_draws(pair: np.ndarray, of_patients: np.ndarray) -> np.ndarray:
    """Pool (2, R, P, L, 2) counts by (B, P) weights: (2, B, R, L, 2)."""
    drawn: np.ndarray = np.einsum("bp,arpls->abrls", of_patients, pair, optimize=True)
    return drawn


def bootstrap_interval(
    pair: np.ndarray, drawn: np.ndarray, of_repeats: np.ndarray, measure: Measure, *, own_of_repeats: float
) -> dict[str, float]:
    """Return the 95 % interval of the difference between two arms of counts, ``pair`` (2, R, P, L, 2).

    A draw pools the pixels of its patients for every repeat of both arms, measures, and takes the mean over its
    repeats; arm and reference share patients and repeats. ``drawn`` (2, B, R, L, 2) are those of :func:`pooled_draws`,
    ``of_repeats`` (B, R) the weights of :func:`bootstrap_weights`. The percentiles of the draws are then moved away
    from the observed difference by the ratio of Student's to normal quantiles, separately for patients and repeats
    (:func:`student_width`); ``own_of_repeats`` is the repeats' own part of the variance of the mean difference
    (:attr:`~counterstain.study.statistics.arm_differences.Components.own_of_repeats`).

    Returns ``low`` and ``high`` of the difference, ``relative_low`` and ``relative_high`` of the difference as a
    fraction of the reference, cut at the largest differences that are possible; ``undefined``, the fraction of draws
    without a value (a subtype without pixels), which are excluded. NaN for one patient and one repeat, whose variance
    is unknown.
    """
    old, new = (measure(drawn) * of_repeats).sum(axis=-1)  # (B,)
    by_repeat = measure(pair.sum(axis=2))  # (2, R)
    old_found, new_found = by_repeat.mean(axis=-1)
    defined = np.isfinite(new - old)
    difference = (new - old)[defined]
    stretch = _stretch(difference, by_repeat[1] - by_repeat[0], pair.shape[2], own_of_repeats)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative, relative_found = difference / old[defined], (new_found - old_found) / old_found
    ends = (*_stretched(difference, new_found - old_found, stretch), *_stretched(relative, relative_found, stretch))
    possible = [np.clip(end, -1, 1) for end in ends[:2]]  # measures are between 0 and 1
    ends = (*possible, np.maximum(ends[2], -1), ends[3])
    return dict(zip(ENDS, map(float, ends), strict=True)) | {"undefined": float(1 - defined.mean())}


def interval_of(counts: np.ndarray, measure: Measure) -> tuple[float, float]:
    """Return the 95 % interval of a measure of pooled pixels over the patients (or slides) of (P, L, 2) counts.

    As :func:`bootstrap_interval`, for one arm and one repeat. The measure is one of shares, 0 to 1. NaN for one or two
    patients, and where too many draws lack a subtype; patients without a pixel that the measure depends on should be
    left out.
    """
    size = len(counts)
    if size < FEWEST_PATIENTS:
        return float("nan"), float("nan")
    drawn = np.einsum("bp,pls->bls", bootstrap_weights(0, "patients", size, SUMMARY_DRAWS), counts)
    stretch = float(stdtrit(size - 1, (1 + LEVEL) / 2) / ndtri((1 + LEVEL) / 2))
    values = measure(drawn)
    if np.isnan(values).mean() > UNDEFINED:
        return float("nan"), float("nan")
    low, high = _stretched(values, float(measure(counts.sum(axis=0))), stretch)
    return float(np.clip(low, 0, 1)), float(np.clip(high, 0, 1))


def summary_of(table: pd.DataFrame, cohort: Cohort) -> pd.DataFrame:
    """Summarise counts by slide: Dice, the recall of each subtype and the variance of the recalls of the counted ones.

    Returns a row per measure: ``measure``, ``value``, ``low`` and ``high`` (over patients; over slides where there is
    one patient; NaN of fewer than three), and the ``patients``, ``slides`` and ``instances`` that it rests on.
    """
    taxonomy, counts = cohort.taxonomy, by_slide(table)
    slides = table.drop_duplicates(["patient", "slide"]).sort_values(["patient", "slide"])
    of_slides = cohort.regions.loc[cohort.regions["slide"].isin(slides["slide"]), "region"]
    subtypes = cohort.instances.loc[cohort.instances["region"].isin(of_slides), "subtype"]
    rows = []

    def add(name: str, measure: Measure, labels: list[int]) -> None:
        having = counts[:, labels].any(axis=(1, 2))
        of, patients = counts[having], slides["patient"].to_numpy()[having]
        names = np.unique(patients)
        groups = [of[patients == name].sum(axis=0) for name in names] if len(names) > 1 else of
        rests_on = len(names), len(of), int(subtypes.isin(labels).sum())
        rows.append((name, float(measure(of.sum(axis=0))), *interval_of(np.asarray(groups), measure), *rests_on))

    every = [subtype.id for subtype in taxonomy.subtypes]
    add("Dice", dice, [BACKGROUND, *every])
    for subtype in taxonomy.subtypes:
        add(f"recall of {subtype.name}", partial(_recalls_together, [subtype.id], np.mean), [subtype.id])
    found = [label for label in taxonomy.counted_ids if counts[:, label].any()]
    if len(found) > 1:
        add("variance of the recalls", partial(_recalls_together, found, np.var), found)
    return pd.DataFrame(rows, columns=["measure", "value", "low", "high", "patients", "slides", "instances"])


def _recalls_together(labels: list[int], together: Callable[..., Any], counts: np.ndarray) -> np.ndarray:
    """Return the mean or variance of the recalls of some subtypes; NaN where one of them has no pixel."""
    return np.asarray(together(recalls(counts)[..., [label - 1 for label in labels]], axis=-1))


def student_width(of_patients: float, of_repeats: float, patients: int, repeats: int) -> float:
    """Return half the width of an interval with two sources of variance, each with its own Student quantile.

    The squares add up (Graybill and Wang, J. Am. Stat. Assoc. 75, 1980). With the degrees of freedom of the sum
    (Satterthwaite) the interval would be too short for 2 or 3 repeats, whose variance may be small by chance.
    """
    tail = (1 + LEVEL) / 2
    squares = stdtrit(max(patients - 1, 1), tail) ** 2 * of_patients
    return float(np.sqrt(squares + stdtrit(max(repeats - 1, 1), tail) ** 2 * of_repeats))


def _stretch(draws: np.ndarray, by_repeat: np.ndarray, patients: int, own_of_repeats: float) -> float:
    """Return how much wider an interval must be than the normal distribution makes it."""
    repeats = len(by_repeat)
    if not len(draws) or (patients < 2 and repeats < 2):
        return float("nan")
    total = float(draws.var())
    of_repeats = min(float(by_repeat.var(ddof=1)) / repeats, total) if repeats > 1 else 0.0
    of_patients = total - of_repeats if patients > 1 else 0.0
    width = student_width(of_patients, min(own_of_repeats, of_repeats), patients, repeats)
    return width / float(ndtri((1 + LEVEL) / 2) * np.sqrt(total)) if total > 0 else 1.0


def _stretched(draws: np.ndarray, found: float, stretch: float) -> tuple[float, float]:
    """Return the percentiles of the draws, moved away from the observed value."""
    finite = draws[np.isfinite(draws)]
    if not len(finite) or not np.isfinite([found, stretch]).all():
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(found + stretch * (low - found)), float(found + stretch * (high - found))


def exchanges(patients: int, seed: int = 0) -> np.ndarray:
    """Return which patients' arms are swapped (-1) or not (1), (B, P); the first row swaps none.

    All permutations up to 12 patients, beyond that 5,000 random ones.
    """
    if patients <= ALL_UP_TO:
        bits = np.arange(2**patients)[:, None] >> np.arange(patients) & 1
        return 1 - 2 * bits
    drawn = 1 - 2 * numpy_generator(seed, "exchange").integers(0, 2, (DRAWN, patients))
    drawn[0] = 1
    return drawn


def smallest_p(patients: int) -> float:
    """Return the smallest possible p-value: swapping all patients is as extreme as swapping none."""
    return 2 / 2**patients if patients <= ALL_UP_TO else 1 / DRAWN


def exchanged_halves(pair: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Pool (2, R, P, L, 2) counts after each permutation: (2, B, R, L, 2)."""
    half = (pair[1] - pair[0]) / 2
    middle = pair.mean(axis=0).sum(axis=1)  # (R, L, 2)
    apart = np.einsum("bp,rpls->brls", signs.astype(float), half, optimize=True)
    return np.stack([middle - apart, middle + apart])


def exchange_p_value(exchanged: np.ndarray, measure: Measure, *, of_repeats: float) -> float:
    """Return the two-sided p-value of the mean difference between two arms; NaN if the measure has no value.

    Without a difference, it is random which of a patient's two count tables belongs to which arm. All repeats of a
    patient are swapped together: they share the effect of a generator on this patient, so swapping them one by one
    would count one effect several times. A random effect of one training, however, shifts all patients alike, which
    swapping does not undo. So the repeats' own part of the variance, ``of_repeats``, is added to the distribution of
    the permuted differences as Student's t with R - 1 degrees of freedom. The p-value is never below that of the
    permutations alone. ``exchanged`` (2, B, R, L, 2) are those of :func:`exchanged_halves`; the first permutation is
    none.
    """
    old, new = measure(exchanged).mean(axis=-1)  # (B,)
    difference = new - old
    if not np.isfinite(difference).all() or not np.isfinite(of_repeats):
        return float("nan")
    found = abs(difference[0]) * (1 - SAME)
    of_exchange = float(np.mean(np.abs(difference) >= found))
    repeats = exchanged.shape[2]
    if of_repeats <= 0 or repeats < 2:
        return of_exchange
    error = np.sqrt(of_repeats)
    above, below = (found - difference) / error, (-found - difference) / error
    return max(of_exchange, float(np.mean(stdtr(repeats - 1, -above) + stdtr(repeats - 1, below))))


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return p-values corrected for their number (Holm, Scand. J. Stat. 6, 1979); NaN stay NaN and do not count."""
    from statsmodels.stats.multitest import multipletests

    corrected = np.array(p_values, float)
    known = np.isfinite(corrected)
    if known.any():
        corrected[known] = multipletests(corrected[known], method="holm")[1]
    return corrected
