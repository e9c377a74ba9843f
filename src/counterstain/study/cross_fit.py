"""Cross-fitting: what segmenters find hard on training patients that they have not seen, and which amount serves them.

Training patients are dealt into folds, stratified by score; what is trained without a fold is tested on it, and on the
validation patients. Test patients of the study take no part.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd

from counterstain.segmentation.counts import by_slide, dice, pooled, recalls
from counterstain.taxonomy import Taxonomy

HARDNESS_FILE, AMOUNT_FILE = "hardness.json", "amount.json"


def hardness(counts: pd.DataFrame, taxonomy: Taxonomy, keep: Collection[str] = ()) -> dict[str, Any]:
    """Say what segmenters find hard, from counts by slide of training patients whom they have not seen.

    ``subtypes``: share of each subtype among relabelled instances, in proportion to the share of its pixels that is
    missed (1 / K each if none is); those in ``keep`` and those without pixels get none. ``slides``: how often masks are
    cut out of each, in proportion to its rank by the share of its pixels that is wrong, the easiest having rank 1 (Yang
    et al., FreeMask, NeurIPS 2023: the number of images grows with the rank of their mask).
    """
    missed = 1 - recalls(pooled(counts))
    known = {name: miss for name, miss in zip(taxonomy.names, missed.tolist(), strict=True) if name not in keep}
    known = {name: miss for name, miss in known.items() if not np.isnan(miss)}
    total = sum(known.values())
    shares = {name: miss / total if total else 1 / len(known) for name, miss in known.items()}
    tables, slides = by_slide(counts), sorted({*zip(counts["patient"], counts["slide"], strict=True)})
    wrong = (tables[:, 0, 1] + tables[:, 1:, 0].sum(axis=1)) / tables.sum(axis=(1, 2))
    ranks = wrong.argsort(kind="stable").argsort(kind="stable") + 1
    return {
        "subtypes": shares,
        "slides": {slide: int(rank) for (_, slide), rank in zip(slides, ranks, strict=True)},
        "missed": known,
        "wrong": {slide: float(share) for (_, slide), share in zip(slides, wrong, strict=True)},
    }


def chosen_amount(counts: Mapping[float, pd.DataFrame]) -> dict[str, Any]:
    """Choose an amount by the one-standard-error rule (Breiman et al. 1984; Hastie et al. 2009, section 7.10).

    ``counts`` holds the counts by slide of each amount, of the same patients, with a column ``fit`` (the fold). The
    result has ``amount``: the smallest one that falls behind the best by at most one standard error, of the mean over
    patients of the difference in Dice; and ``table``, a row for each amount: ``amount``, ``dice`` (mean over patients),
    ``behind``, ``standard_error``.
    """
    scores = {amount: _dice_by_patient(table) for amount, table in sorted(counts.items())}
    means = {amount: float(score.mean()) for amount, score in scores.items()}
    best = max(means, key=lambda amount: (means[amount], -amount))
    rows = []
    for amount, score in scores.items():
        behind = (scores[best] - score).dropna()
        error = float(behind.std(ddof=1) / len(behind) ** 0.5) if len(behind) > 1 else 0.0
        row = {"amount": amount, "dice": means[amount], "behind": float(behind.mean()), "standard_error": error}
        rows.append(row)
    chosen = next(row["amount"] for row in rows if row["behind"] <= row["standard_error"])
    return {"amount": chosen, "best": best, "patients": len(scores[best]), "table": rows}


def _dice_by_patient(counts: pd.DataFrame) -> pd.Series:
    """Return each patient's Dice, of validation patients the mean over the folds."""
    rows = [(patient, float(dice(pooled(table)))) for (patient, _), table in counts.groupby(["patient", "fit"])]
    return pd.DataFrame(rows, columns=["patient", "dice"]).groupby("patient")["dice"].mean().dropna()
