"""Score slides by the subtypes that their tissue is made of, with how certain the score is. For research only.

What is resampled are the regions of a slide, or the tiles of its only one; what a segmenter is unsure of is drawn anew
from its calibrated probabilities.

Shapes: K = number of subtypes, n = areas, R = draws.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy

from counterstain.data.cohort import Cohort
from counterstain.data.patches import label_mask
from counterstain.data.split import patient_scores
from counterstain.errors import InputError
from counterstain.seeding import derive, numpy_generator
from counterstain.segmentation.areas import Areas, SlidePart, canvases_of
from counterstain.taxonomy import IGNORE, ScoreRule, Taxonomy, name_key

DRAWS = 2000
LEVEL = 0.95  # of intervals
CALIBRATED_PX = 5000  # pixels of a region that a temperature is fitted on
TEMPERATURES = (0.05, 20.0)  # that are tried
BINS = 15  # of the expected calibration error

NOTICE = "research use only, not for diagnosis"


# How sure a segmenter may be


class Calibration(NamedTuple):
    """The temperature of a segmenter's subtypes (Guo et al., ICML 2017), and its calibration before and after."""

    temperature: float  # logits are divided by it
    ece_before: float  # expected calibration error on the same pixels
    ece: float
    patients: int


def calibrate(segmenter: Path, cohort: Cohort, device: str, seed: int) -> Calibration:
    """Fit the temperature on annotated tumour of a cohort's validation patients, which must show some."""
    from scipy.optimize import minimize_scalar
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, labels = [], []
    for position, canvas in canvases_of(segmenter, cohort, "val", device):
        truth = label_mask(cohort.read(position)[1], cohort.subtypes(position)).ravel()
        tumour = np.flatnonzero((truth > 0) & (truth != IGNORE))
        rng = numpy_generator(seed, "calibration", position)
        chosen = rng.choice(tumour, min(len(tumour), CALIBRATED_PX), replace=False)
        found = canvas.logits()
        logits.append(found.reshape(len(found), -1)[:, chosen].T)
        labels.append(truth[chosen].astype(np.int64) - 1)
    told, true = torch.from_numpy(np.concatenate(logits)), torch.from_numpy(np.concatenate(labels))
    if not len(true):
        raise InputError(f"{cohort.folder}: its validation patients show no {cohort.taxonomy.tissue_class}")

    def loss(log_temperature: float) -> float:
        return float(cross_entropy(told / np.exp(log_temperature), true))

    def error(temperature: float) -> float:
        shares = (told / temperature).softmax(1)
        return float(multiclass_calibration_error(shares, true, num_classes=told.shape[1], n_bins=BINS))

    best = float(np.exp(minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded").x))
    return Calibration(best, error(1.0), error(best), len(cohort.patients("val")))


# From areas to scores


def scored(
    parts: Iterable[SlidePart], taxonomy: Taxonomy, rule: ScoreRule, *, by: str = "area", seed: int = 0
) -> pd.DataFrame:
    """Score every slide and every patient by the areas of its parts.

    Returns a row per slide, then one per patient: ``level``, ``patient``, ``slide``; ``score`` with the ends ``low``
    and ``high`` of its 95 % interval and the ``probability_…`` of each score, empty where nothing is counted; ``units``
    that were resampled; ``area_mm2`` and ``cells`` of what is counted; the ``share_…`` of each subtype in all tumour by
    area and ``cell_share_…`` by nuclei.
    """
    by_slide: dict[tuple[str, str], list[SlidePart]] = {}
    for part in parts:
        by_slide.setdefault((part.patient, part.slide), []).append(part)
    units = {key: _units(found) for key, found in sorted(by_slide.items())}
    rows = [
        {
            "level": "slide",
            "patient": patient,
            "slide": slide,
            **_row([of_slide], taxonomy, rule, by=by, seed=derive(seed, slide)),
        }
        for (patient, slide), of_slide in units.items()
    ]
    for patient in dict.fromkeys(patient for patient, _ in units):
        of_patient = [found for (owner, _), found in units.items() if owner == patient]
        row = _row(of_patient, taxonomy, rule, by=by, seed=derive(seed, patient))
        rows.append({"level": "patient", "patient": patient, "slide": "", **row})
    texts = ("score", "low", "high")
    return pd.DataFrame(rows).assign(**{name: pd.Series([row[name] for row in rows], dtype=object) for name in texts})


class _Units(NamedTuple):
    """The areas of a slide, and which unit of resampling each is of."""

    unit: np.ndarray  # (n,) int
    units: int
    mm2: np.ndarray  # (n,)
    cells: np.ndarray  # (n,)
    subtype: np.ndarray  # (n,) 1..K
    shares: np.ndarray  # (n, K)


def _units(parts: list[SlidePart]) -> _Units:
    """Join the parts of a slide; its units are its regions, or the tiles of its only one."""
    regions = {part.region for part in parts if len(part.areas.tile)}
    keys = [(part.region, 0 if len(regions) > 1 else int(t)) for part in parts for t in part.areas.tile]
    number = {key: n for n, key in enumerate(dict.fromkeys(keys))}
    joined = Areas(*(np.concatenate(columns) for columns in zip(*(part.areas for part in parts), strict=True)))
    mm2 = np.concatenate([part.areas.area_px * (part.mpp * 1e-3) ** 2 for part in parts])
    unit = np.array([number[key] for key in keys], np.int64)
    return _Units(unit, len(number), mm2, joined.cells, joined.subtype, joined.shares)


def _row(slides: list[_Units], taxonomy: Taxonomy, rule: ScoreRule, *, by: str, seed: int) -> dict[str, Any]:
    starts = np.cumsum([0, *(found.units for found in slides)])
    unit = np.concatenate([found.unit + start for found, start in zip(slides, starts[:-1], strict=True)])
    mm2, cells, subtype, shares = (np.concatenate(columns) for columns in list(zip(*slides, strict=True))[2:])
    size = len(taxonomy.subtypes) + 1
    area = np.bincount(subtype, weights=mm2, minlength=size)[None, 1:]
    nuclei = np.bincount(subtype, weights=cells, minlength=size)[None, 1:]
    amounts = {"area": mm2, "cells": cells}[by]
    level = int(rule.levels({"area": area, "cells": nuclei}[by], taxonomy)[0])
    drawn = _drawn(unit, int(starts[-1]), amounts, shares, seed) if level >= 0 else amounts[:0, None] * shares[:0]
    levels = rule.levels(drawn, taxonomy)
    levels = levels[levels >= 0]
    counted = [taxonomy.id_of(subtype) - 1 for subtype in rule.counted]
    row: dict[str, Any] = {"score": rule.scores[level] if level >= 0 else None, "low": None, "high": None}
    if level >= 0 and (starts[-1] > 1 or (shares.max(1) < 1).any()):
        ends = np.quantile(levels, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf").astype(int)
        row |= dict(zip(("low", "high"), (rule.scores[min(max(e, 0), len(rule.scores))] for e in ends), strict=True))
    chances = np.bincount(levels, minlength=len(rule.scores)) / max(len(levels), 1)
    row |= {f"probability_{score}": float(p) for score, p in zip(rule.scores, chances, strict=True)}
    row |= {
        "units": int(starts[-1]),
        "area_mm2": float(area[0, counted].sum()),
        "cells": float(nuclei[0, counted].sum()),
    }
    for prefix, of_all in (("share", area[0]), ("cell_share", nuclei[0])):
        total = of_all.sum()
        row |= {
            f"{prefix}_{n}": float(a / total) if total > 0 else np.nan
            for n, a in zip(taxonomy.names, of_all, strict=True)
        }
    return row


def _drawn(unit: np.ndarray, count: int, amounts: np.ndarray, shares: np.ndarray, seed: int) -> np.ndarray:
    """Return the amounts of the subtypes (R, K) in resampled units with subtypes drawn by their probabilities.

    The areas of a draw share one random number: where a slide is stained darker than those that a segmenter knows, it
    is wrong about all of it, not about each area on its own.
    """
    rng, num_subtypes = numpy_generator(seed), shares.shape[1]
    cumulative = np.cumsum(shares, axis=1)[:, :-1]
    drawn = np.zeros((DRAWS, num_subtypes))
    for row in drawn:
        times = np.bincount(rng.integers(count, size=count), minlength=count)
        subtype = (cumulative < rng.random()).sum(1)
        row[:] = np.bincount(subtype, weights=amounts * times[unit], minlength=num_subtypes)
    return drawn


# Against known scores


def with_known(table: pd.DataFrame, cohort: Cohort | None) -> pd.DataFrame:
    """Add the column ``known`` after ``slide``: the score of a slide in its cohort, of a patient the commonest."""
    known: dict[tuple[str, str], str | None] = {}
    if cohort is not None:
        of_slides = cohort.regions.drop_duplicates("slide")[["slide", "score"]].itertuples(index=False)
        known = {("slide", str(slide)): None if pd.isna(score) else str(score) for slide, score in of_slides}
        known |= {("patient", patient): score for patient, score in patient_scores(cohort).items()}
    keys = zip(table["level"], table["slide"].where(table["level"] == "slide", table["patient"]), strict=True)
    table.insert(3, "known", pd.Series([known.get(key) for key in keys], dtype=object))
    return table


def level_of(score: str | None, rule: ScoreRule) -> int:
    """Return the place of a known score among those of a rule, as it may be written (3, 3+); -1 where it is none."""
    keys = [name_key(name).removesuffix("+") for name in rule.scores]
    key = name_key(score).removesuffix("+") if score is not None else None
    return keys.index(key) if key in keys else -1


class Agreement(NamedTuple):
    """How scores agree with known ones, over patients."""

    confusion: pd.DataFrame  # patients by known score (rows) and score (columns)
    kappa: tuple[float, float, float]  # weighted quadratically, and the ends of its interval over patients
    equal: float  # share of the patients
    within_one: float


def agreement(
    known: Sequence[str | None], found: Sequence[str | None], rule: ScoreRule, seed: int = 0
) -> Agreement | None:
    """Compare the scores of patients with known ones; None where there are fewer than two."""
    from scipy.stats import bootstrap
    from sklearn.metrics import cohen_kappa_score, confusion_matrix

    pairs = np.array([(level_of(k, rule), level_of(f, rule)) for k, f in zip(known, found, strict=True)]).reshape(-1, 2)
    pairs = pairs[(pairs >= 0).all(1)]
    if len(pairs) < 2:
        return None
    levels, rng = list(range(len(rule.scores))), numpy_generator(seed, "agreement")
    options: dict[str, Any] = {"paired": True, "vectorized": False, "method": "percentile", "rng": rng}
    kappa = partial(cohen_kappa_score, labels=levels, weights="quadratic")
    with warnings.catch_warnings(action="ignore"):  # all of one score: not defined
        drawn = bootstrap(tuple(pairs.T), kappa, n_resamples=DRAWS // 2, **options)
        ends = np.nanquantile(drawn.bootstrap_distribution, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        value, low, high = map(float, (kappa(*pairs.T), *ends))
    table = pd.DataFrame(confusion_matrix(*pairs.T, labels=levels), rule.scores, rule.scores)
    away = np.abs(pairs[:, 0] - pairs[:, 1])
    return Agreement(table, (value, low, high), float((away == 0).mean()), float((away <= 1).mean()))
