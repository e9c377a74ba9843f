"""What comes of tracing a synthetic set: tests over patients, and what they mean in words.

Patients, not patches, are the cases of every test: patches of one patient are alike.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import comb, factorial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from counterstain.audit.audit import sheet
from counterstain.data.patch_set import PatchSet
from counterstain.seeding import numpy_generator
from counterstain.storage import replacing, write_csv, write_json

ALPHA = 0.05  # false alarms of all tests together
DRAWS = 10_000  # permutations at most, and of patients with replacement
TOP = 5
PAIRS = 8  # that are shown
TRACE_FILE = "trace.json"
TESTS = {
    "copies": "single images are copies of training tissue",
    "closeness": "images are closer to training tissue than those of other patients are",
    "membership": "the denoiser knows its training patients from others",
    "re-identification": "images point to the patient whose mask they fill",
}
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What can be found out about patients from a synthetic set, and from the network that drew it.

    Examples
    --------
    >>> found = trace("synthetic", cohort="cohort", patches=32)
    >>> found.tests["test"].tolist()
    ['copies', 'closeness', 're-identification']
    """

    name: str
    images: pd.DataFrame
    """A row per compared image, the closest first: ``closeness`` (logarithm of the similarity to the nearest training
    tissue over that to the nearest held-out tissue), ``p`` and whether it is a ``copy``; where the nearest tissue lies;
    ``rank`` of the mask's patient among the training patients, by similarity."""
    tests: pd.DataFrame
    """A row per test: ``test``, ``value`` with ``low`` and ``high`` (95 %, over patients; NaN without one), ``p``,
    ``p_holm``, ``least_p`` (that this many patients can reach) and ``alarm``."""
    figures: Mapping[str, Any]
    """Numbers of patients and images, chances, and what was measured beside the tests."""
    by_design: tuple[str, ...]
    """What images share with real tissue whatever is found."""
    pairs: Mapping[str, Sequence[np.ndarray]] = field(repr=False)
    """The closest images, the nearest training and the nearest held-out tissue, (H, W, 3) uint8 each."""

    @property
    def alarms(self) -> list[str]:
        """The tests that found something."""
        return [str(name) for name in self.tests.loc[self.tests["alarm"], "test"]]

    def in_words(self) -> list[str]:
        """Say what was found, on what evidence, and what may be shared."""
        n, rows = self.figures, {str(row["test"]): row for row in self.tests.to_dict("records")}
        found, close, again = (rows[name] for name in ("copies", "closeness", "re-identification"))
        lines = [
            (
                f"Copies: {found['value']:.0f} of {n['images']} images are closer to one place of training tissue than "
                f"chance allows ({_p(found)})."
            ),
            (
                "Closeness: a drawn image is closer to training tissue than a real patch of another patient in "
                f"{close['value']:.0%} of pairs ({close['low']:.0%} to {close['high']:.0%}; chance 50%; {_p(close)})."
            ),
            (
                f"Re-identification: of {n['training_patients']} training patients, that of the mask is the most "
                f"similar for {again['value']:.0%} of the images (chance {n['chance']:.0%}; {_p(again)}), among the "
                f"first {TOP} for {n['top5']:.0%} (chance {n['chance_top5']:.0%}), and in the mask's own place for "
                f"{n['in_place']:.0%}."
            ),
        ]
        if "membership" in rows:
            of = rows["membership"]
            lines.append(
                f"Membership: by the denoiser's loss, {n['training_patients']} training and {n['held_out_patients']} "
                f"held-out patients are told apart with an AUC of {of['value']:.2f} ({of['low']:.2f} to "
                f"{of['high']:.2f}; chance 0.5; {_p(of)})."
            )
        if "features" in n:
            lines.append(
                f"In features of {n['features']}, own patients left out: closer in {n['features_closer']:.0%} of "
                f"pairs; the mask's patient is first for {n['features_first']:.0%}. Features know masks and stains, so "
                "this is no test."
            )
        blind = [row["test"] for row in rows.values() if row["least_p"] > ALPHA / len(rows)]
        if blind:
            lines.append(f"With so few patients no alarm is possible of: {', '.join(blind)}.")
        return [*lines, *self.by_design, self.verdict]

    @property
    def verdict(self) -> str:
        """What may be shared, in a sentence or two."""
        rate = f"a set without any trace would raise an alarm in {ALPHA:.0%} of cases at most"
        of_images = [TESTS[name] for name in self.alarms if name != "membership"]
        tested = "membership" in set(self.tests["test"])
        if of_images:
            return f"Alarm: {'; '.join(of_images)}. Do not share the images: treat them as patient data ({rate})."
        if self.alarms:
            what = "Do not share the generator; no image was found to be a copy"
            return f"Alarm: {TESTS['membership']}. {what} ({rate})."
        real = " Whatever is real tissue by design remains patient data." if self.by_design else ""
        model = "" if tested else " The generator itself was not tested: give --generator."
        return f"No trace of training patients was found in the images ({rate}).{real}{model}"

    def __repr__(self) -> str:
        return f"Trace({self.name}: {len(self.images)} images; alarms: {', '.join(self.alarms) or 'none'})"


def _p(row: Mapping[Any, Any]) -> str:
    return f"p {row['p']:.3g}{', ALARM' if row['alarm'] else ''}"


def write_trace(found: Trace, patch_set: PatchSet, out: Path) -> None:
    """Write ``trace.csv`` (a row per image), ``trace.png`` (the closest ones) and ``trace.json`` (all the rest)."""
    write_csv(out / "trace.csv", found.images)
    shown = found.images.head(PAIRS)
    captions = [
        f"{ratio:.2f}\n{region}"
        for ratio, region in zip(np.exp(shown["closeness"]), shown["training_region"], strict=True)
    ]
    with replacing(out / "trace.png") as partial:
        sheet(found.pairs, captions).save(partial, format="PNG")
    header = patch_set.header
    tests = [{k: None if v != v else v for k, v in row.items()} for row in found.tests.to_dict("records")]  # noqa: PLR0124
    about = {
        "set": found.name,
        "method": header.method,
        "generator": header.generator,
        "cohort": header.cohort,
        "seed": str(header.seed),
        "found": found.in_words(),
        "verdict": found.verdict,
        "alarms": found.alarms,
        "tests": tests,
        "figures": dict(found.figures),
    }
    write_json(out / TRACE_FILE, about)


# The tests. Each returns a row: test, value, low, high, p, and least_p, the smallest p that so many patients can reach.


def copies(p: pd.Series, found: pd.Series) -> Row:
    """Count images that are ``found`` to be copies; ``p`` holds what each would have by chance (Bonferroni)."""
    return _row("copies", float(found.sum()), min(1.0, float(p.min()) * len(p)), least_p=0.0)


def told_apart(test: str, scores: pd.Series, patients: pd.Series, first: np.ndarray, seed: int) -> Row:
    """Return how well scores tell ``first``, (n,) bool, from the others: the AUC, the chance that one is higher.

    Patients are drawn anew for the interval (percentiles), and their mean ranks permuted for the one-sided p.
    """
    from sklearn.metrics import roc_auc_score

    ranks = stats.rankdata(scores)
    sides = []
    for side in (first, ~first):
        number, _ = pd.factorize(patients.to_numpy()[side])
        sides.append([ranks[side][number == patient] for patient in range(number.max() + 1)])
    # Of two patients, how often a score of the one is higher, and how many pairs there are.
    higher = np.array([[_higher(one, other) for other in sides[1]] for one in sides[0]])
    pairs = np.array([[len(one) * len(other) for other in sides[1]] for one in sides[0]])

    def auc(one: np.ndarray, other: np.ndarray, axis: int) -> np.ndarray:  # noqa: ARG001 - always the last
        chosen = one[..., :, None], other[..., None, :]
        return np.asarray(higher[chosen].sum((-2, -1)) / pairs[chosen].sum((-2, -1)))

    numbers = tuple(np.arange(len(side)) for side in sides)
    rng = numpy_generator(seed, "trace", test)
    options: dict[str, Any] = {"n_resamples": DRAWS, "rng": rng}
    spread = stats.bootstrap(numbers, auc, method="percentile", vectorized=True, batch=1000, **options)
    low, high = spread.confidence_interval
    means = tuple(np.array([part.mean() for part in side]) for side in sides)
    p = stats.permutation_test(means, _excess, alternative="greater", **options).pvalue
    least = _least(comb(len(means[0]) + len(means[1]), len(means[0])))
    return _row(test, float(roc_auc_score(first, ranks)), float(p), float(low), float(high), least_p=least)


def _higher(one: np.ndarray, other: np.ndarray) -> float:
    return float(stats.mannwhitneyu(one, other, method="asymptotic").statistic)


def _excess(one: np.ndarray, other: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.asarray(one.mean(axis=axis) - other.mean(axis=axis))


def reidentified(patients: pd.Series, nearest: pd.Series, ranks: pd.Series, seed: int) -> Row:
    """Return how many images are the most similar to their own patient, of rank 1.

    The test assigns other patients to all images of a patient at once, so that patients whom every image resembles do
    not count for more than chance.
    """
    shares = pd.crosstab(patients, nearest, normalize="index")
    table = shares.reindex(columns=shares.index, fill_value=0.0).to_numpy()
    rows = np.arange(len(table))

    def first(assigned: np.ndarray) -> float:
        return float(table[rows, assigned].mean())

    rng = numpy_generator(seed, "trace", "re-identification")
    options: dict[str, Any] = {"permutation_type": "pairings", "alternative": "greater", "vectorized": False}
    p = stats.permutation_test((rows,), first, n_resamples=DRAWS, rng=rng, **options).pvalue
    by_patient = (ranks == 1).groupby(patients.to_numpy()).agg(["sum", "count"]).to_numpy(float)
    again: dict[str, Any] = {"paired": True, "n_resamples": DRAWS, "batch": 1000, "method": "percentile", "rng": rng}
    spread = stats.bootstrap(tuple(by_patient.T), _share, **again).confidence_interval
    least = _least(factorial(len(rows)))
    return _row("re-identification", float((ranks == 1).mean()), float(p), spread.low, spread.high, least_p=least)


def _share(found: np.ndarray, of: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.asarray(found.sum(axis=axis) / of.sum(axis=axis))


def _least(permutations: int) -> float:
    return 1 / min(permutations, DRAWS + 1)


def _row(
    test: str, value: float, p: float, low: float = float("nan"), high: float = float("nan"), *, least_p: float
) -> Row:
    return {"test": test, "value": value, "low": low, "high": high, "p": p, "least_p": least_p}


def holm(rows: Sequence[Row], by_design: Collection[str] = ()) -> pd.DataFrame:
    """Return tests as a table with Holm's ``p_holm`` and ``alarm``; what images show ``by_design`` raises none."""
    from statsmodels.stats.multitest import multipletests

    table = pd.DataFrame(rows).assign(p_holm=np.nan)
    counts = ~table["test"].isin(by_design)
    table.loc[counts, "p_holm"] = multipletests(table.loc[counts, "p"], method="holm")[1]
    table["alarm"] = table["p_holm"] < ALPHA
    return table[["test", "value", "low", "high", "p", "p_holm", "least_p", "alarm"]]
