"""What comes of a blind reading test: how well readers tell drawn from real patches, and which subtypes they see.

For each reader: accuracy, rates and shares of subtypes with exact intervals (Clopper & Pearson, Biometrika 1934), and
the sensitivity d' = z(hits) - z(false alarms) of signal detection theory, "drawn" being the signal, with the log-linear
correction: half an answer is added to each count and one to each number of patches, so that d' is finite and hardly
biased (Hautus, Behavior Research Methods, Instruments, & Computers 1995). Chance is d' = 0 and an accuracy of a half.
Over all readers: means of their shares. Readers differ, and answers to one question resemble each other; so the
variance is that of Obuchowski and Rockette (Communications in Statistics 1995) with Hillis' degrees of freedom
(Statistics in Medicine 2007), for readers and questions both drawn at random, and the interval the exact one of as many
independent answers as have that variance (Korn and Graubard, Survey Methodology 1998). Two readers do not tell how much
readers differ; for them there is none. Agreement: Cohen's kappa of each pair of readers, Fleiss' kappa of all.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from counterstain.audit.reading_test import ReadingTest
from counterstain.errors import InputError
from counterstain.progress import counted
from counterstain.storage import claim, fingerprint, write_csv, write_json

ALL_READERS = "all readers"
KINDS = {False: "real", True: "drawn"}
RESULT_FILE, TABLES = "result.json", ("readers", "confusion", "agreement")
FEWEST_TOGETHER = 2  # questions that readers must have in common for a kappa
TAIL = 0.025  # on either side of a 95 % interval
FEWEST_READERS = 3  # for an interval over readers: of two, it covered the truth in 89 % of simulated tests only


@dataclass(frozen=True, repr=False)
class ReadingResult:
    """The result of a reading test, in tables.

    ``readers``: a row per reader, the last one of all of them, if there are several: reader, answers; accuracy,
    drawn_found (drawn patches called drawn), real_found, subtype_of_real, subtype_of_drawn (subtypes named as asked
    for), each with _low and _high (95 %); d_prime. ``confusion``: reader, kind (real or drawn), shown, answered,
    answers. ``agreement``: readers, what (drawn or subtype), statistic, kappa, questions.
    """

    about: dict[str, Any]
    readers: pd.DataFrame
    confusion: pd.DataFrame
    agreement: pd.DataFrame

    def __repr__(self) -> str:
        return "\n".join(self.in_words())

    def in_words(self) -> Iterator[str]:
        """Say what the test found, a sentence for each."""
        rows = self.readers
        readers, questions = counted(len(rows) - (len(rows) > 1), "reader"), self.about["questions"]
        yield f"{readers}, {questions} questions, half of them drawn by {self.about['method']}."
        row = rows.iloc[-1]
        yield (
            f"{row['reader']}: {_interval(row, 'accuracy')} of the answers real or drawn are right (chance: 50 %), "
            f"d' = {row['d_prime']:.2f} (chance: 0)."
        )
        if 1 < len(rows) <= FEWEST_READERS:
            yield f"An interval over readers takes {FEWEST_READERS} of them or more."
        chance = f"chance: {100 / self.about['subtypes']:.0f} %"
        yield (
            f"Subtypes named as they are: {_interval(row, 'subtype_of_real')} of real patches, "
            f"{_interval(row, 'subtype_of_drawn')} of drawn ones ({chance})."
        )


def write_result(result: ReadingResult, folder: Path) -> None:
    """Write readers.csv, confusion.csv, agreement.csv and result.json, the last one last; earlier ones are replaced.

    Raises MismatchError where the folder holds something else.
    """
    claim(folder, "reading test result", {"key": result.about["key"]})
    for name in TABLES:
        write_csv(folder / f"{name}.csv", getattr(result, name))
    write_json(folder / RESULT_FILE, result.about | {"found": list(result.in_words())})


def score_readers(test: ReadingTest) -> ReadingResult:
    """Score the answers of all readers; questions that a reader has not answered do not count for him.

    Raises InputError where nobody has answered both a real and a drawn patch, or the key is missing.
    """
    key = pd.DataFrame([(i, q.drawn, q.subtype) for i, q in enumerate(test.key(), start=1)])
    key.columns = pd.Index(["question", "is_drawn", "shown"])
    answers = test.answers().merge(key, on="question")
    answers = answers.assign(
        right=answers["drawn"] == answers["is_drawn"], named=answers["subtype"] == answers["shown"]
    )
    usable = answers.groupby("reader")["is_drawn"].transform("nunique") == 2
    scored = answers[usable]
    if scored.empty:
        raise InputError(
            f"{test.folder}: no reader has answered both a real and a drawn patch yet; they answer in a browser: "
            f"counterstain studio COHORT --reading-test {shlex.quote(str(test.folder))}"
        )
    rows = [{"reader": name} | _of_reader(own) for name, own in scored.groupby("reader")]
    if len(rows) > 1:
        rows.append({"reader": ALL_READERS} | _of_all(scored, pd.DataFrame(rows)))
    h = test.header
    about = {
        "questions": len(test),
        "method": h.method,
        "part": h.part,
        "size_px": h.size_px,
        "mpp": h.mpp,
        "subtypes": len(test.subtypes),
        "key": h.key_sha256,
        "answers": fingerprint(answers[["reader", "question", "drawn", "subtype"]].to_numpy().tolist()),
    }
    return ReadingResult(about, pd.DataFrame(rows), _confusion(scored, test.subtypes), _agreement(scored))


def d_prime(hits: int, signals: int, false_alarms: int, noises: int) -> float:
    """Return the sensitivity d' with the log-linear correction."""
    z = stats.norm.ppf
    return float(z((hits + 0.5) / (signals + 1)) - z((false_alarms + 0.5) / (noises + 1)))


def exact_interval(right: float, answers: float) -> tuple[float, float]:
    """Return the 95 % interval of a share by Clopper and Pearson; NaN without answers.

    Numbers need not be whole: those of answers that resemble each other count as fewer.
    """
    if not answers:
        return float("nan"), float("nan")
    low = stats.beta.ppf(TAIL, right, answers - right + 1) if right > 0 else 0.0
    high = stats.beta.ppf(1 - TAIL, right + 1, answers - right) if right < answers else 1.0
    return float(low), float(high)


def readers_interval(right: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean share of readers, for readers and questions like these.

    ``right`` (readers, questions) is 1 for a right answer, 0 for a wrong one, NaN where there is none. The interval of
    fewer than three readers is NaN.
    """
    readers, questions = right.shape
    if readers < FEWEST_READERS:
        return float("nan"), float("nan")
    answers = np.isfinite(right).sum(axis=1)
    shares = np.nanmean(right, axis=1)
    share = float(shares.mean())
    if share in {0.0, 1.0}:
        return exact_interval(share * questions, questions)
    residuals = np.nan_to_num(right - shares[:, None])
    scale = np.sqrt(answers * np.maximum(answers - 1, 1))
    covariance = residuals @ residuals.T / np.outer(scale, scale)
    between = max(float(covariance[~np.eye(readers, dtype=bool)].mean()), 0.0)  # due to common questions
    spread = float(shares.var(ddof=1))
    variance = spread / readers + between
    freedom = (spread + readers * between) ** 2 / (spread**2 / (readers - 1)) if spread else np.inf
    if not variance:
        return exact_interval(share * questions, questions)
    certainty = (stats.norm.ppf(TAIL) / stats.t.ppf(TAIL, freedom)) ** 2
    independent = min(share * (1 - share) / variance * certainty, float(answers.sum()))
    return exact_interval(share * independent, independent)


def _shares(answers: pd.DataFrame) -> dict[str, pd.Series]:
    drawn = answers["is_drawn"]
    return {
        "accuracy": answers["right"],
        "drawn_found": answers.loc[drawn, "right"],
        "real_found": answers.loc[~drawn, "right"],
        "subtype_of_real": answers.loc[~drawn, "named"],
        "subtype_of_drawn": answers.loc[drawn, "named"],
    }


def _of_reader(answers: pd.DataFrame) -> dict[str, Any]:
    row: dict[str, Any] = {"answers": len(answers)}
    for name, right in _shares(answers).items():
        low, high = exact_interval(int(right.sum()), len(right))
        row |= {name: float(right.mean()), f"{name}_low": low, f"{name}_high": high}
    drawn, called = answers["is_drawn"], answers["drawn"]
    counts = (int((called & drawn).sum()), int(drawn.sum()), int((called & ~drawn).sum()), int((~drawn).sum()))
    return row | {"d_prime": d_prime(*counts)}


def _of_all(answers: pd.DataFrame, readers: pd.DataFrame) -> dict[str, Any]:
    """Return the means over readers, with intervals for readers and questions like these."""
    row: dict[str, Any] = {"answers": len(answers)}
    for name, right in _shares(answers).items():
        own = answers.loc[right.index].assign(given=right.astype(float))
        low, high = readers_interval(own.pivot_table(index="reader", columns="question", values="given").to_numpy())
        row |= {name: float(readers[name].mean()), f"{name}_low": low, f"{name}_high": high}
    return row | {"d_prime": float(readers["d_prime"].mean())}


def _confusion(answers: pd.DataFrame, subtypes: tuple[str, ...]) -> pd.DataFrame:
    """Count answers by reader, kind, and shown and answered subtype; combinations that were not given are left out."""
    table = answers.assign(kind=answers["is_drawn"].map(KINDS), answered=answers["subtype"])
    columns = ["reader", "kind", "shown", "answered"]
    found = table.groupby(columns, as_index=False).size().rename(columns={"size": "answers"})
    order = {name: place for place, name in enumerate(subtypes)}
    return found.sort_values(columns, key=lambda column: column.map(lambda name: (order.get(name, 0), name)))


def _agreement(answers: pd.DataFrame) -> pd.DataFrame:
    columns = ["readers", "what", "statistic", "kappa", "questions"]
    names = sorted(answers["reader"].unique())
    if len(names) < 2:
        return pd.DataFrame(columns=columns)
    cohen, fleiss = _kappas()
    rows: list[tuple[str, str, str, float, int]] = []
    for what in ("drawn", "subtype"):
        given = answers.pivot_table(index="question", columns="reader", values=what, aggfunc="first")
        for one, other in combinations(names, 2):
            both = given[[one, other]].dropna().astype(str)
            if len(both) >= FEWEST_TOGETHER:
                rows.append((f"{one}, {other}", what, "Cohen", cohen(both[one], both[other]), len(both)))
        together = given.dropna().astype(str)
        if len(names) > 2 and len(together) >= FEWEST_TOGETHER:
            rows.append((ALL_READERS, what, "Fleiss", fleiss(together.to_numpy()), len(together)))
    return pd.DataFrame(rows, columns=columns)


def _kappas() -> tuple[Any, Any]:
    """Return Cohen's and Fleiss' kappa, which are NaN where all answers are the same: nothing could be agreed upon."""
    from sklearn.metrics import cohen_kappa_score
    from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa

    def cohen(one: pd.Series, other: pd.Series) -> float:
        return float("nan") if len({*one, *other}) < 2 else float(cohen_kappa_score(one, other))

    def fleiss(answers: np.ndarray) -> float:
        return float("nan") if len({*answers.ravel()}) < 2 else float(fleiss_kappa(aggregate_raters(answers)[0]))

    return cohen, fleiss


def _interval(row: pd.Series, name: str) -> str:
    value, low, high = (100 * row[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{value:.0f} %" + (f" ({low:.0f} to {high:.0f} %)" if np.isfinite(low) else "")
