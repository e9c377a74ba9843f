"""Print how often intervals cover a known effect, and how often tests reject without one, over simulated studies.

A study has a reference arm, an arm that is the same and an arm that is better. Recalls are logistic-normal: patients
differ in difficulty, repeats differ from each other, and every arm has errors of its own by patient, by repeat and by
both. In studies of :data:`FOLDS`, the generator of an arm (the reference has none) has errors of its own as well, which
all repeats share: one generator for all test patients, or one for those of each fold. Shapes: A arms, R repeats, P
patients, L labels (background and the five HER2 subtypes).
"""

import sys
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from scipy.special import expit, logit, stdtrit

from counterstain.seeding import numpy_generator
from counterstain.segmentation.counts import dice, recalls, subtype_variance
from counterstain.study.statistics.arm_differences import CountArray, components_of, effects_of, power
from counterstain.study.statistics.significance import bootstrap_weights, pooled_draws

ARMS = ("reference", "same", "better")
LABELS = 6
BASE = np.array([0.05, 0.64, 0.80, 0.88, 0.93, 0.85])  # share predicted as tumour, by label; the paper's spread
GAIN = np.array([0.0, 0.5, 0.2, 0.0, 0.0, 0.0])  # logits: HER2 0 from 0.64 to 0.74, as the paper has it
DIFFICULTY, SLIDES_DIFFER, SHARED_BY_REPEAT = 0.6, 0.4, 0.3  # logits, the same for all arms
SLIDES = 2  # per patient
BACKGROUND, OWN, OTHER = 400_000, 60_000, 6_000  # pixels: background, the patient's own subtype, any other
HAS_OTHER = 0.7  # chance that a patient has another subtype at all
SPREAD_OF_PIXELS, SPREAD_OF_BACKGROUND = 0.6, 0.2  # log-normal


@dataclass(frozen=True)
class Spread:
    """Standard deviations of an arm's own errors, in logits."""

    name: str
    patients: float
    repeats: float
    both: float
    generators: float = 0.0
    alike: float = 0.0
    """Share of the generators' variance that all folds have in common, as they have training patients in common."""


SPREADS = (
    Spread("patients", 0.25, 0.05, 0.10),
    Spread("repeats", 0.05, 0.25, 0.10),
    Spread("equal", 0.25, 0.15, 0.15),
)
FOLDS = (
    Spread("folds-apart", 0.25, 0.15, 0.15, generators=0.15),
    Spread("folds-alike", 0.25, 0.15, 0.15, generators=0.15, alike=0.5),
)


def _recall(label: int, counts: np.ndarray) -> np.ndarray:
    return recalls(counts[..., [0, label], :])[..., 0]


def _variance(counts: np.ndarray) -> np.ndarray:
    lacks_one = (counts[..., 1:5, :].sum(axis=-1) == 0).any(axis=-1)
    return np.where(lacks_one, np.nan, subtype_variance(counts, range(1, 5)))


MEASURES = {
    "Dice": dice,
    "variance": _variance,
    "HER2 0": partial(_recall, 1),
    "HER2 1+": partial(_recall, 2),
    "HER2 2+": partial(_recall, 3),
    "HER2 3+": partial(_recall, 4),
}


def simulate(spread: Spread, patients: int, repeats: int, seed: int, folds: int = 1) -> np.ndarray:
    """Draw a study, (A, R, P, L, 2) counts."""
    rng = numpy_generator(seed, "study", spread.name, patients, repeats)
    own = np.zeros((patients, LABELS), bool)
    own[np.arange(patients), 1 + rng.permutation(np.arange(patients) % 4)] = True
    pixels = np.where(own, OWN, OTHER) * np.exp(rng.normal(0, SPREAD_OF_PIXELS, own.shape))
    pixels *= own | (rng.random(own.shape) < HAS_OTHER)
    pixels[:, 0] = BACKGROUND * np.exp(rng.normal(0, SPREAD_OF_BACKGROUND, patients))
    by_slide = np.rint(pixels[..., None] * rng.dirichlet(np.full(SLIDES, 3.0), own.shape))  # (P, L, S)
    arms = len(ARMS)
    fold = np.empty(patients, int)
    fold[np.argsort(own.argmax(axis=1), kind="stable")] = np.arange(patients) % folds  # each with its share of a score
    x = (logit(BASE) + np.outer([0, 0, 1], GAIN))[:, None, None, :, None]
    x = x + rng.normal(0, DIFFICULTY, (patients, LABELS, 1)) + rng.normal(0, SLIDES_DIFFER, by_slide.shape)
    x = x + rng.normal(0, SHARED_BY_REPEAT, (repeats, 1, LABELS, 1))
    x = x + rng.normal(0, spread.patients, (arms, 1, patients, LABELS, 1))
    x = x + rng.normal(0, spread.repeats, (arms, repeats, folds, LABELS, 1))[:, :, fold]
    x = x + rng.normal(0, spread.both, (arms, repeats, patients, LABELS, 1))
    x = x + rng.normal(0, spread.both, (arms, repeats, *by_slide.shape))
    if spread.generators:
        all_folds = rng.normal(0, np.sqrt(spread.alike), (arms, 1, 1, LABELS, 1))
        each = rng.normal(0, np.sqrt(1 - spread.alike), (arms, 1, folds, LABELS, 1))
        x[1:] += spread.generators * (all_folds + each)[1:, :, fold]
    found = np.rint(by_slide * expit(x)).sum(axis=-1)
    return np.stack([by_slide.sum(axis=-1) - found, found], axis=-1)


def truth(spread: Spread, draws: int = 40_000) -> dict[str, float]:
    """Return what the better arm really wins in each measure: over all patients there could be, in the mean repeat."""
    rng = numpy_generator(0, "truth", spread.name)
    nodes, weights = np.polynomial.hermite_e.hermegauss(31)
    within = np.sqrt(DIFFICULTY**2 + SLIDES_DIFFER**2 + spread.patients**2 + 2 * spread.both**2)
    mean_pixels = np.full(LABELS, (0.25 * OWN + 0.75 * HAS_OTHER * OTHER) * np.exp(SPREAD_OF_PIXELS**2 / 2))
    mean_pixels[0] = BACKGROUND * np.exp(SPREAD_OF_BACKGROUND**2 / 2)
    mean_pixels[5] = HAS_OTHER * OTHER * np.exp(SPREAD_OF_PIXELS**2 / 2)
    shared = rng.normal(0, SHARED_BY_REPEAT, (draws, LABELS))
    values = []
    for gain, generators in ((np.zeros(LABELS), 0.0), (GAIN, spread.generators)):
        x = logit(BASE) + gain + shared + rng.normal(0, np.hypot(spread.repeats, generators), shared.shape)
        rate = (expit(x[..., None] + within * nodes) * weights).sum(axis=-1) / weights.sum()
        counts = np.stack([mean_pixels * (1 - rate), mean_pixels * rate], axis=-1)
        values.append({name: float(np.mean(measure(counts))) for name, measure in MEASURES.items()})
    return {name: values[1][name] - values[0][name] for name in MEASURES}


def table_of(counts: np.ndarray) -> pd.DataFrame:
    """Return counts in the long form that a study writes."""
    arm, repeat, patient, label = (place.ravel() for place in np.indices(counts.shape[:-1]))
    pixels = counts.reshape(-1, 2).astype(np.int64)
    return pd.DataFrame(
        {
            "arm": np.take(ARMS, arm),
            "repeat": repeat,
            "patient": patient,
            "subtype": label,
            "predicted_background": pixels[:, 0],
            "predicted_tumour": pixels[:, 1],
        }
    )


def compared(
    counts: np.ndarray, better: pd.DataFrame, effects: dict[str, float], draws: int, seed: int
) -> pd.DataFrame:
    """Return whether intervals that are not shown in reports cover, and the power that is foretold for the effects.

    ``percentile`` is the bootstrap without Student's t; ``variances`` is symmetric, from the analysis of variance, with
    a quantile of Student's t for patients and one for repeats.
    """
    pair = CountArray.of(table_of(counts), LABELS).pair("reference", "better")
    repeats, patients = pair.shape[1:3]
    drawn = pooled_draws(pair, bootstrap_weights(seed, "patients", patients, draws))
    of_repeats = bootstrap_weights(seed, "repeats", repeats, draws)
    quantiles = stdtrit([patients - 1, repeats - 1], 0.975)
    rows = {}
    for name, measure in MEASURES.items():
        effect = effects[name]
        old, new = (measure(drawn) * of_repeats).sum(axis=-1)
        low, high = np.nanquantile(new - old, [0.025, 0.975])
        found = float(np.diff(measure(pair.sum(axis=2)).mean(axis=-1))[0])
        parts = components_of(pair, measure)
        squares = quantiles**2 @ np.array([parts.patients, parts.own_of_repeats])
        rows[name] = {
            "percentile": low <= effect <= high,
            "variances": abs(found - effect) <= np.sqrt(squares),
            "foretold": power(
                effect, parts, (better.loc[name, "high"] - better.loc[name, "low"]) / 2, patients, repeats
            ),
        }
    return pd.DataFrame.from_dict(rows, orient="index").astype(float)


def run(
    spread: Spread,
    patients: int,
    repeats: int,
    studies: int,
    *,
    folds: int = 1,
    draws: int = 1_000,
    compare: bool = False,
) -> pd.DataFrame:
    """Return a row per study and measure: what covered, what was rejected."""
    effects = truth(spread)
    rows = []
    for seed in range(studies):
        counts = simulate(spread, patients, repeats, seed, folds)
        table = effects_of(table_of(counts), "reference", MEASURES, num_labels=LABELS, draws=draws, seed=seed)
        table = table.set_index(["arm", "measure"])
        same, better = table.loc["same"], table.loc["better"]
        effect = pd.Series(effects)
        found = pd.DataFrame(
            {
                "covers 0": (same["low"] <= 0) & (same["high"] >= 0),
                "rejects": same["p"] <= 0.05,
                "covers": (better["low"] <= effect) & (effect <= better["high"]),
                "too high": better["low"] > effect,
                "too low": better["high"] < effect,
                "width": better["high"] - better["low"],
                "sees": (better["low"] > 0) | (better["high"] < 0),
                "test sees": better["p"] <= 0.05,
                "no interval": better["low"].isna(),
            }
        )
        if compare:
            found = found.join(compared(counts, better, effects, draws, seed))
        rows.append(found.rename_axis("measure").reset_index())
    return pd.concat(rows, ignore_index=True)


def main() -> None:
    studies = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    names = sys.argv[2].split(",") if len(sys.argv) > 2 else [spread.name for spread in SPREADS]
    for spread in (s for s in (*SPREADS, *FOLDS) if s.name in names):
        for patients, folds in ((8, 1), (40, 1), (40, 5))[: 3 if spread.generators else 2]:
            start = time.perf_counter()
            found = run(spread, patients, 5, studies, folds=folds, compare=True).groupby("measure", sort=False).mean()
            seconds = time.perf_counter() - start
            print(f"\n{spread.name} dominate, {patients} patients, 5 repeats, {studies} studies, {seconds:.0f} s")
            if spread.generators:
                print(f"generators: {folds} for each arm but the reference")
            print((100 * found.drop(columns="width")).round(1).join(found["width"].round(4)).to_string(), flush=True)


if __name__ == "__main__":
    main()
