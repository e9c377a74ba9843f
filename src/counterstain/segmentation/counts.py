"""Pixel counts, from which every measure of a segmentation is computed.

Shapes: K = number of subtypes. A count table is int64 (..., K + 1, 2): rows are background and every subtype, columns
are predicted background and predicted tumour. Pooling is addition, and nothing is averaged before it must be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from counterstain.errors import InputError
from counterstain.taxonomy import IGNORE, Taxonomy

TABLE_COLUMNS = ("slide", "patient", "score", "split", "subtype", "predicted_background", "predicted_tumour")
"""Columns of the counts by slide: a row per slide and label, ``subtype`` being the label (0 = background)."""
_SLIDE = ["patient", "slide"]
_COUNTS = ["predicted_background", "predicted_tumour"]


def count(label_mask: np.ndarray, predicted: np.ndarray, num_labels: int) -> np.ndarray:
    """Count the pixels of every label by prediction, (K + 1, 2) int64.

    ``label_mask`` (H, W) uint8 holds 0 = background, 1…K = subtypes, 255 = ignored; ``predicted`` (H, W) bool says what
    was predicted as tumour. Raises InputError at a label that the taxonomy does not have.
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
    """Return the Dice coefficient of tumour, (…); NaN if there is no tumour and none was predicted."""
    true_positive, false_positive, false_negative = _confusion(counts)
    return _ratio(2 * true_positive, 2 * true_positive + false_positive + false_negative)


def recalls(counts: np.ndarray) -> np.ndarray:
    """Return the recall of each subtype, (…, K); NaN for a subtype without pixels."""
    return _ratio(counts[..., 1:, 1], counts[..., 1:, 0] + counts[..., 1:, 1])


def subtype_variance(counts: np.ndarray, counted_ids: Sequence[int], ddof: int = 0) -> np.ndarray:
    """Return the variance of the recalls of the counted subtypes, (…).

    Subtypes without pixels are left out; NaN if fewer than two remain.
    """
    return _variance(recalls(counts)[..., np.asarray(counted_ids, np.intp) - 1], ddof)


def measures(counts: pd.DataFrame | np.ndarray, taxonomy: Taxonomy) -> dict[str, float]:
    """Compute every measure of a segmentation, under the column names of ``results.csv``.

    Parameters
    ----------
    counts : DataFrame or (K + 1, 2) array
        Counts by slide, as :func:`counterstain.evaluate` returns them, or a table pooled over slides.

    Returns
    -------
    dict
        ``dice``, ``iou``, ``precision`` of tumour, ``recall_NAME`` of each subtype and ``recall_background``, all from
        pixels pooled over slides. ``subtype_variance`` is the population variance of the recalls of the counted
        subtypes, ``_all`` that of all subtypes, ``_ddof1`` the sample variance of the counted ones. Counts by slide
        also give ``dice_slide_mean``, the mean of the slides' Dice, and ``subtype_variance_slide_mean``, the variance
        of recalls that are means over the slides with the subtype (within one slide it would mostly be undefined, as
        one subtype dominates).

    Examples
    --------
    >>> counts = np.array([[90, 10], [5, 15], [4, 16], [8, 12], [0, 20], [3, 7]])
    >>> found = measures(counts, Taxonomy.named("her2"))
    >>> round(found["dice"], 3), found["recall_HER2 0"], found["recall_HER2 3+"]
    (0.824, 0.75, 1.0)
    """
    if isinstance(counts, pd.DataFrame):
        return measures(pooled(counts), taxonomy) | _slide_means(by_slide(counts), taxonomy)
    counts = np.asarray(counts)
    if counts.shape != (taxonomy.num_labels, 2):
        expected = f"{(taxonomy.num_labels, 2)}, a row for background and each subtype of {taxonomy.name}"
        raise InputError(f"counts of shape {counts.shape}: expected {expected}")
    counted, everyone = taxonomy.counted_ids, range(1, taxonomy.num_labels)
    true_positive, false_positive, false_negative = _confusion(counts)
    recall_by_name = zip(taxonomy.names, recalls(counts), strict=True)
    return {
        "dice": float(dice(counts)),
        "subtype_variance": float(subtype_variance(counts, counted)),
        **{f"recall_{name}": float(recall) for name, recall in recall_by_name},
        "subtype_variance_all": float(subtype_variance(counts, everyone)),
        "subtype_variance_ddof1": float(subtype_variance(counts, counted, ddof=1)),
        "recall_background": float(_ratio(counts[0, 0], counts[0].sum())),
        "precision": float(_ratio(true_positive, true_positive + false_positive)),
        "iou": float(_ratio(true_positive, true_positive + false_positive + false_negative)),
    }


def add_by_slide(regions: pd.DataFrame, counts: np.ndarray) -> pd.DataFrame:
    """Sum the count tables of regions, (n, K + 1, 2), by slide.

    The regions have the columns slide, patient, score and split, the result has :data:`TABLE_COLUMNS`, sorted by
    patient and slide.
    """
    rows: list[tuple[Any, ...]] = []
    for members in regions.groupby(_SLIDE, sort=True).indices.values():
        first = (regions[column].iloc[members[0]] for column in TABLE_COLUMNS[:4])
        about = [None if pd.isna(value) else str(value) for value in first]
        rows += [(*about, label, *row) for label, row in enumerate(counts[members].sum(axis=0).tolist())]
    return pd.DataFrame(rows, columns=list(TABLE_COLUMNS))


def by_slide(table: pd.DataFrame) -> np.ndarray:
    """Return counts by slide as an array, (slides, K + 1, 2), sorted by patient and slide."""
    ordered = table.groupby([*_SLIDE, "subtype"], sort=True, as_index=False)[_COUNTS].sum()
    return ordered[_COUNTS].to_numpy(np.int64).reshape(-1, ordered["subtype"].nunique(), 2)


def pooled(table: pd.DataFrame) -> np.ndarray:
    """Return counts by slide as one (K + 1, 2) table over all slides."""
    return np.asarray(by_slide(table).sum(axis=0))


def _slide_means(counts: np.ndarray, taxonomy: Taxonomy) -> dict[str, float]:
    recall = _mean(recalls(counts))[np.asarray(taxonomy.counted_ids, np.intp) - 1]
    variance = _variance(recall, ddof=0)
    return {"dice_slide_mean": float(_mean(dice(counts))), "subtype_variance_slide_mean": float(variance)}


def _confusion(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return true positives, false positives and false negatives of all subtypes together."""
    return counts[..., 1:, 1].sum(-1), counts[..., 0, 1], counts[..., 1:, 0].sum(-1)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    whole = np.asarray(whole, np.float64)
    ratio: np.ndarray = np.full(whole.shape, np.nan)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio


def _variance(values: np.ndarray, ddof: int) -> np.ndarray:
    """Return the variance along the last axis, ignoring NaN; NaN for fewer than two values."""
    present = ~np.isnan(values)
    n = present.sum(-1)
    known = np.where(present, values, 0.0)
    mean = _ratio(known.sum(-1), n)[..., None]
    squares = np.where(present, (known - mean) ** 2, 0.0).sum(-1)
    return _ratio(squares, np.where(n >= 2, n - ddof, 0))


def _mean(values: np.ndarray) -> np.ndarray:
    """Return the mean along the first axis, ignoring NaN."""
    present = ~np.isnan(values)
    return _ratio(np.where(present, values, 0.0).sum(0), present.sum(0))
