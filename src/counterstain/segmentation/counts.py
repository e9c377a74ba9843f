"""Count tables of pixels: every measure of a segmentation derives from them.

Shapes: K = number of subtypes. A count table is int64 (..., K + 1, 2): rows are background and every subtype, columns
are predicted background and predicted tumour. Tables add up: pixels are pooled by summing tables, and nothing is
averaged before it must be.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from counterstain.errors import InputError
from counterstain.taxonomy import IGNORE, Taxonomy

TABLE_COLUMNS = ("slide", "patient", "score", "split", "subtype", "predicted_background", "predicted_tumour")
"""Columns of the long form: a row per slide and label, ``subtype`` being the label (0 = background)."""
_SLIDE = ["patient", "slide"]
_COUNTS = ["predicted_background", "predicted_tumour"]


@dataclass(frozen=True, kw_only=True)
class SlideCounts:
    """The count table of one slide."""

    slide: str
    patient: str
    score: str | None
    split: str | None
    counts: np.ndarray  # (K + 1, 2) int64


def count(label_mask: np.ndarray, predicted: np.ndarray, num_labels: int) -> np.ndarray:
    """Count the pixels of every label by what was predicted.

    Parameters
    ----------
    label_mask : (H, W) uint8 array
        0 = background, 1…K = subtypes; pixels of 255 are left out.
    predicted : (H, W) bool array
        Whether a pixel was taken for tumour.
    num_labels : int
        K + 1.

    Returns
    -------
    (K + 1, 2) int64 array

    Raises
    ------
    InputError
        A label beyond the taxonomy.
    """
    kept = label_mask != IGNORE
    joint = 2 * label_mask[kept].astype(np.intp) + predicted[kept].astype(bool)
    counts = np.bincount(joint, minlength=2 * num_labels)
    if len(counts) > 2 * num_labels:
        raise InputError(
            f"label {label_mask[kept].max()} in a mask; expected 0 to {num_labels - 1} or {IGNORE} (ignore)"
        )
    return counts.reshape(num_labels, 2).astype(np.int64)


def dice(counts: np.ndarray) -> np.ndarray:
    """Return the Dice coefficient of tumour, (…); nan where there is no tumour and none was predicted."""
    true_positive, false_positive, false_negative = _tumour(counts)
    return _ratio(2 * true_positive, 2 * true_positive + false_positive + false_negative)


def iou(counts: np.ndarray) -> np.ndarray:
    """Return intersection over union of tumour, (…); nan where there is no tumour and none was predicted."""
    true_positive, false_positive, false_negative = _tumour(counts)
    return _ratio(true_positive, true_positive + false_positive + false_negative)


def precision(counts: np.ndarray) -> np.ndarray:
    """Return the share of predicted tumour that is tumour, (…); nan where none was predicted."""
    true_positive, false_positive, _ = _tumour(counts)
    return _ratio(true_positive, true_positive + false_positive)


def recalls(counts: np.ndarray) -> np.ndarray:
    """Return the share of each subtype that was found, (…, K); nan for a subtype without a pixel."""
    return _ratio(counts[..., 1:, 1], counts[..., 1:, 0] + counts[..., 1:, 1])


def background_recall(counts: np.ndarray) -> np.ndarray:
    """Return the share of background that was left alone, (…)."""
    return _ratio(counts[..., 0, 0], counts[..., 0, :].sum(-1))


def subtype_variance(counts: np.ndarray, counted_ids: Sequence[int], ddof: int = 0) -> np.ndarray:
    """Return the variance of the recalls of the counted subtypes, (…).

    A subtype without a pixel is left out (:func:`absent_subtypes` names it); nan where fewer than two remain.
    """
    return _variance(recalls(counts)[..., np.asarray(counted_ids, np.intp) - 1], ddof)


def absent_subtypes(counts: np.ndarray, taxonomy: Taxonomy) -> tuple[str, ...]:
    """Return the names of the subtypes without a pixel in a (K + 1, 2) table: they have no recall."""
    return tuple(s.name for s in taxonomy.subtypes if not counts[s.id].any())


def measures(counts: np.ndarray, taxonomy: Taxonomy) -> dict[str, float]:
    """Return the measures of a pooled (K + 1, 2) table under their column names in ``results.csv``.

    ``subtype_variance`` is the population variance of the recalls of the counted subtypes. ``_all`` is that of all
    subtypes and ``_ddof1`` the sample variance of the counted ones.
    """
    counted, everyone = taxonomy.counted_ids, range(1, taxonomy.num_labels)
    recall_by_name = zip(taxonomy.names, recalls(counts), strict=True)
    return {
        "dice": float(dice(counts)),
        "subtype_variance": float(subtype_variance(counts, counted)),
        **{f"recall_{name}": float(recall) for name, recall in recall_by_name},
        "subtype_variance_all": float(subtype_variance(counts, everyone)),
        "subtype_variance_ddof1": float(subtype_variance(counts, counted, ddof=1)),
        "recall_background": float(background_recall(counts)),
        "precision": float(precision(counts)),
        "iou": float(iou(counts)),
    }


def slide_measures(table: pd.DataFrame, taxonomy: Taxonomy) -> dict[str, float]:
    """Return the measures in which every slide weighs the same, from the long form of a count table.

    ``dice_slide_mean`` is the mean over slides of their Dice. ``subtype_variance_slide_mean`` is the variance of the
    counted subtypes' recalls where each recall is the mean over the slides that have the subtype (a variance within a
    slide would be undefined for most slides, as one subtype dominates them).
    """
    counts = by_slide(table)
    counted = np.asarray(taxonomy.counted_ids, np.intp) - 1
    return {
        "dice_slide_mean": float(_present_mean(dice(counts))),
        "subtype_variance_slide_mean": float(_variance(_present_mean(recalls(counts))[counted], ddof=0)),
    }


def to_table(slides: Iterable[SlideCounts]) -> pd.DataFrame:
    """Return the long form: a row per slide and label, columns :data:`TABLE_COLUMNS`."""
    rows = [
        (s.slide, s.patient, s.score, s.split, label, *row)
        for s in slides
        for label, row in enumerate(s.counts.tolist())
    ]
    return pd.DataFrame(rows, columns=list(TABLE_COLUMNS))


def by_slide(table: pd.DataFrame) -> np.ndarray:
    """Return the count tables of all slides of a long form, (slides, K + 1, 2), sorted by patient and slide."""
    ordered = table.groupby([*_SLIDE, "subtype"], sort=True, as_index=False)[_COUNTS].sum()
    return ordered[_COUNTS].to_numpy(np.int64).reshape(-1, ordered["subtype"].nunique(), 2)


def pooled(table: pd.DataFrame) -> np.ndarray:
    """Return the (K + 1, 2) table over all slides of a long form."""
    total: np.ndarray = by_slide(table).sum(axis=0)
    return total


def _tumour(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return true positives, false positives and false negatives, all subtypes taken together."""
    return counts[..., 1:, 1].sum(-1), counts[..., 0, 1], counts[..., 1:, 0].sum(-1)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    whole = np.asarray(whole, np.float64)
    ratio: np.ndarray = np.full(whole.shape, np.nan)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio


def _variance(values: np.ndarray, ddof: int) -> np.ndarray:
    """Return the variance along the last axis of what is not nan; nan for fewer than two values."""
    present = ~np.isnan(values)
    n = present.sum(-1)
    known = np.where(present, values, 0.0)
    mean = _ratio(known.sum(-1), n)[..., None]
    squares = np.where(present, (known - mean) ** 2, 0.0).sum(-1)
    return _ratio(squares, np.where(n >= 2, n - ddof, 0))


def _present_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean along the first axis of what is not nan."""
    present = ~np.isnan(values)
    return _ratio(np.where(present, values, 0.0).sum(0), present.sum(0))
