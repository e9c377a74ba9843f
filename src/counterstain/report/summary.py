"""What a study found, in plain words: the arm that validation chooses, how it did on the test set, and cautions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd

from counterstain.progress import PERCENT, counted
from counterstain.report.results import CEILING, CROSS_VALIDATED, Results
from counterstain.report.tables import (
    MAIN,
    NO_INTERVAL,
    UNDEFINED,
    Effect,
    Effects,
    Table,
    effects_on_test,
    first_table,
    fixed,
    interval,
    missed_most,
    needed_text,
    p_text,
    recall_spread,
    relative_means_something,
    short_p,
    signed,
)
from counterstain.study.arms import Arm
from counterstain.study.records import Look, times_looked_at
from counterstain.study.statistics.significance import FEWEST_PATIENTS, smallest_p

ENOUGH_REPEATS = 5  # the paper's number
ENOUGH_PATIENTS = 8  # the paper's number of test patients
SIGNIFICANT = 0.05
HIGHER_IS_BETTER = {"dice": 1, "subtype_variance": -1}  # and of recalls
ON_CHOICE = (
    "The arm chosen on validation is a single test on the test set and needs no correction.",
    "Read those of the chosen arm, too: patients that validate one fold are tested in another.",  # of folds
)
SPREAD = "Spread of the recalls of the subtypes, their standard deviation (0 = all are found equally well)"


def chosen_arm(results: Results) -> Arm | None:
    """Return the arm with synthetic images that has the highest mean Dice on validation; None if there is none.

    Ties go to the lower subtype variance. Arms without synthetic images cannot be chosen, as the choice is compared
    with them, nor can ceilings, which no real cohort has.
    """
    means = _on_validation(results, [a for a in results.arms if a.method is not None and not a.ceiling])
    if means.empty:
        return None
    best = means.sort_values(list(MAIN), ascending=[False, True], kind="stable").index[0]
    return next(arm for arm in results.arms if arm.name == best)


def _on_validation(results: Results, arms: Sequence[Arm]) -> pd.DataFrame:
    """Return the means of the main measures over repeats, by arm."""
    table = results.results
    rows = table.loc[(table["split"] == "val") & table["arm"].isin([arm.name for arm in arms])]
    return rows.groupby("arm")[list(MAIN)].mean().dropna(subset=["dice"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The finding and what must be said with it."""

    headline: str  # the subtype that is missed most: how much of it is found without and with synthetic images
    verdict: str  # a few words
    finding: str  # a few sentences
    by_subtype: Table | None  # what the chosen arm changes for each subtype
    harm: tuple[str, ...]  # a sentence of every arm with synthetic images that makes something worse beyond chance
    power: str  # how large a study must be to detect the chosen arm's difference; may be empty
    looks: str  # how often the results of each split were shown
    cautions: tuple[str, ...]  # reasons for doubt
    arms: tuple[tuple[str, str], ...]  # label and sentence of every arm but the reference


def summarise(results: Results, effects: Effects, chosen: Arm | None) -> Summary:
    """Say what a study found, given the differences on the test set and the arm that validation chose."""
    measured = {arm for arm, measure in effects if measure == "dice"}
    compared = chosen if chosen is not None and chosen.name in measured else None
    nothing = (
        "No arm with generated images has results on both validation and test, so none could be compared with "
        f"{results.reference.label}."
    )
    found = _finding(results, effects, compared) if compared else ("", "Nothing to compare", nothing)
    return Summary(
        headline=found[0],
        verdict=found[1],
        finding=found[2],
        by_subtype=first_table(results, effects, compared) if compared else None,
        harm=tuple(
            f"{arm.label}. {sentence}"
            for arm in results.others
            if arm.method is not None
            for sentence in _harm(results, effects, arm)
        ),
        power=_power(results, effects, compared) if compared else "",
        looks=looks_sentence(results.looks),
        cautions=tuple(_cautions(results, effects)),
        arms=tuple((arm.label, _arm_sentence(results, effects, arm)) for arm in results.others if arm.name in measured),
    )


class Overview(NamedTuple):
    """What a study found, for a terminal."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[str, ...]


def overview(results: Results) -> Overview:
    """Return all arms on the test set, beginning with the subtype that is missed most, and the finding in short."""
    effects, reference = effects_on_test(results), results.reference
    found, first = summarise(results, effects, chosen_arm(results)), missed_most(results)
    others = [name for name in results.study.taxonomy.names if name != first]
    test, rows = results.results[results.results["split"] == "test"], []
    for arm in results.arms:
        repeats = test[test["arm"] == arm.name]
        means = repeats[["dice", "subtype_variance", *results.recalls]].mean()
        scores = [
            fixed(100 * means[measure], 1) for measure in ("dice", *(f"recall_{name}" for name in (first, *others)))
        ]
        by, of_dice = (
            "" if arm == reference else signed(100 * effects.get((arm.name, measure), UNDEFINED).mean, 1)
            for measure in (f"recall_{first}", "dice")
        )
        spread = fixed(recall_spread(means["subtype_variance"]), 1)
        rows.append((arm.label, str(len(repeats)), scores[1], by, *scores[2:], scores[0], of_dice, spread))
    return Overview(
        title=f"{results.tested_on}, means over repeats: recall of each subtype, Dice, spread of the recalls",
        columns=("arm", "repeats", f"{first} found", "difference", *others, "Dice", "difference", "spread"),
        rows=tuple(rows),
        lines=tuple(filter(None, (found.headline, f"{found.verdict}.", *found.harm))),
    )


def _judged(effect: Effect, measure: str) -> str:
    """Return ``better`` or ``worse`` if the interval excludes zero, otherwise ``unclear``, also without an interval."""
    ends = [HIGHER_IS_BETTER.get(measure, 1) * end for end in (effect.low, effect.high)]
    if not all(map(math.isfinite, ends)):
        return "unclear"
    return "better" if min(ends) > 0 else "worse" if max(ends) < 0 else "unclear"


def _finding(results: Results, effects: Effects, chosen: Arm) -> tuple[str, str, str]:
    of_dice, of_variance = (effects.get((chosen.name, measure), UNDEFINED) for measure in MAIN)
    subtype, reference = missed_most(results), results.reference.label
    of_missed = effects.get((chosen.name, f"recall_{subtype}"), UNDEFINED)
    headline, seen = "", f"{chosen.label} was chosen on validation{_baseline_ahead(results, chosen)}."
    if math.isfinite(of_missed.mean):
        before, after = (f"{fixed(100 * share, 0)}{PERCENT}" for share in (of_missed.reference, of_missed.value))
        headline = f"{subtype}: {before} of its pixels found by {reference}, {after} with {chosen.label}"
        seen += (
            f" {subtype} is what {reference} misses most on validation; on the {results.tested_on} it finds {before} "
            f"of its pixels and {chosen.label} {after}: {_change(of_missed, 'recall')}."
        )
    seen += f" Dice of {results.study.taxonomy.tissue_class}, the overlap with the annotation: "
    seen += f"{_change(of_dice, 'dice')}. {SPREAD}: {_change(of_variance, 'subtype_variance')}."
    seen = " ".join([seen, *_harm(results, effects, chosen)])
    if of_dice.n < ENOUGH_REPEATS:
        repeats = counted(of_dice.n, "repeat")
        return headline, "Too few repeats for a conclusion", f"With {repeats} nothing can be concluded. {seen}"
    return headline, *_verdict(of_dice, of_variance, seen)


def _harm(results: Results, effects: Effects, arm: Arm) -> list[str]:
    """Say which measures an arm makes worse beyond chance: those whose interval lies on the wrong side of zero."""
    worse = []
    for measure in ("dice", *results.recalls):
        effect = effects.get((arm.name, measure), UNDEFINED)
        if _judged(effect, measure) == "worse":
            less = "Dice is lower" if measure == "dice" else f"less {measure.removeprefix('recall_')} is found"
            worse.append(f"{less} ({signed(100 * effect.mean, 1)} points)")
    return [f"Harm: {', '.join(worse)}."] if worse else []


def _baseline_ahead(results: Results, chosen: Arm) -> str:
    """Say if validation prefers no synthetic images at all."""
    arms = [chosen, *(arm for arm in results.arms if arm.method is None)]
    dice = _on_validation(results, arms)["dice"]
    best = next(arm for arm in arms if arm.name == dice.idxmax())
    if best == chosen:
        return ""
    return (
        f", where {best.label} did better still (Dice {fixed(dice[best.name], 4)} versus {fixed(dice[chosen.name], 4)})"
    )


def _verdict(of_dice: Effect, of_variance: Effect, seen: str) -> tuple[str, str]:
    judged = {"Dice": _judged(of_dice, "dice"), "subtype variance": _judged(of_variance, "subtype_variance")}
    better = [name for name, how in judged.items() if how == "better"]
    worse = [name for name, how in judged.items() if how == "worse"]
    if better and worse:
        return "Mixed", f"Synthetic images improved {better[0]} and made {worse[0]} worse. {seen}"
    if better:
        return f"Improved {' and '.join(better)}", f"Synthetic images improved {' and '.join(better)}. {seen}"
    if worse or not _gains(of_dice, of_variance):
        return "No improvement", f"Synthetic images brought no improvement. {seen}"
    significant = [name for name, e in (("Dice", of_dice), ("variance", of_variance)) if e.p < SIGNIFICANT]
    but = f", although the test of {' and '.join(significant)} alone is significant" if significant else ""
    return "No improvement shown", f"No improvement is demonstrated: both intervals include zero{but}. {seen}"


def _gains(of_dice: Effect, of_variance: Effect) -> bool:
    """Whether at least one of the two measures moved in the right direction."""
    return bool(of_dice.mean > 0 or of_variance.mean < 0)


def _arm_sentence(results: Results, effects: Effects, arm: Arm) -> str:
    said = [f"{CEILING.capitalize()}."] if arm.ceiling else []
    for measure, name in zip(MAIN, ("Dice", "Spread of recalls"), strict=True):
        effect = effects.get((arm.name, measure), UNDEFINED)
        said.append(f"{name} {_change(effect, measure, corrected=True)}: {_in_words(effect, measure)}.")
    return " ".join([*said, *_harm(results, effects, arm)])


def _in_words(effect: Effect, measure: str) -> str:
    gain = HIGHER_IS_BETTER[measure] * effect.mean
    if not math.isfinite(gain):
        return "not measured"
    if effect.n < ENOUGH_REPEATS:
        return "too few repeats to tell"
    if gain > 0 and not math.isfinite(effect.low):
        return "cannot be distinguished from chance (no interval)"
    unclear = "undecided: interval and test disagree" if effect.p_holm < SIGNIFICANT else "within chance"
    words = {"better": "improved", "worse": "worse", "unclear": unclear if gain > 0 else "no improvement"}
    return words[_judged(effect, measure)]


def _power(results: Results, effects: Effects, chosen: Arm) -> str:
    said = []
    for measure, name in zip(MAIN, ("Dice", "subtype variance"), strict=True):
        effect = effects.get((chosen.name, measure), UNDEFINED)
        repeats, patients = effect.needed_repeats, effect.needed_patients
        what = f"a difference in {name} of this size with 80{PERCENT} power"
        ways = []
        if math.isfinite(repeats):
            ways.append(f"{needed_text(repeats, 'repeat')} with {counted(_test_patients(results), 'test patient')}")
        if math.isfinite(patients):
            ways.append(f"{needed_text(patients, 'patient')} with {counted(effect.n, 'repeat')}")
        if math.isinf(repeats) and math.isinf(patients):
            said.append(f"Neither more repeats nor more test patients alone would be enough to detect {what}.")
        elif not (math.isnan(repeats) or math.isnan(patients)):
            said.append(f"Detecting {what} would take {', or '.join(ways)}.")
    return " ".join(said)


def _test_patients(results: Results) -> int:
    return int(results.counts.loc[results.counts["split"] == "test", "patient"].nunique())


def smallest_p_caution(patients: int, arms: int) -> str:
    """Say how small p-values can become with few patients; empty if they can be significant."""
    least = smallest_p(patients)
    if arms * least <= SIGNIFICANT:
        return ""
    said = f"With {counted(patients, 'test patient')} no p-value can be below {short_p(least)}"
    if arms > 1:
        said += f", and corrected for {counted(arms, 'arm')} none below {short_p(min(arms * least, 1.0))}"
    return f"{said}, however large the difference: rely on the intervals, or evaluate on more patients."


def looks_sentence(looks: Sequence[Look]) -> str:
    """Say how often the results of each split were shown."""
    said = []
    for split, name in (("val", "validation"), ("test", "test")):
        times = times_looked_at(looks, split)
        by_command = ", ".join(f"{command} {count}" for command, count in sorted(times.items()))
        if times:
            total = {1: "once", 2: "twice"}.get(times.total(), f"{times.total()} times")
            said.append(f"{name} results {total} ({by_command})")
    if not said:
        return "There is no record of how often the results of each split were viewed."
    return (
        f"Shown since {looks[0].time[:10]}, this page included: {'; '.join(said)}. "
        "Changing a study after viewing its test results means selecting on the test set."
    )


def _cautions(results: Results, effects: Effects) -> list[str]:
    study, said = results.study, list(_untrained(results))
    if results.tested_on == CROSS_VALIDATED:
        said.append(
            f"Cross-validation in {counted(len(study.folds), 'fold')}: every patient was tested once, by networks that "
            "never saw that patient. Folds share training patients, so their results are not independent: take "
            "intervals and p-values as approximate."
        )
    repeats = max((effect.n for effect in effects.values()), default=study.repeats)
    if repeats < ENOUGH_REPEATS:
        said.append(
            f"{counted(repeats, 'repeat')} per arm: a difference of this size can come from the seed alone. "
            f"Run at least {ENOUGH_REPEATS} repeats before drawing conclusions."
        )
    patients = _test_patients(results)
    if patients < ENOUGH_PATIENTS:
        none = "; too few patients for an interval" if patients < FEWEST_PATIENTS else ""
        said.append(
            f"The {results.tested_on} has {counted(patients, 'patient')}: results on so few may not generalise to "
            f"other patients{none}."
        )
    tested = len({arm for arm, _ in effects})
    if tested and (caution := smallest_p_caution(patients, tested)):
        said.append(caution)
    undefined = max((e.undefined for e in effects.values() if math.isfinite(e.undefined)), default=0.0)
    if undefined > 0.01:
        said.append(
            f"Some subtypes are found in few test patients: up to {fixed(100 * undefined, 0)}{PERCENT} of the "
            "bootstrap draws contained none of them and were excluded from that interval."
        )
    if single := _of_one_patient(results):
        said.append(
            f"{', '.join(single)}: found in only one test patient, so the variation between patients is unknown. "
            "Neither this recall nor the subtype variance has an interval."
        )
    test = results.results[results.results["split"] == "test"]
    if absent := [n for n, c in zip(study.taxonomy.names, results.recalls, strict=True) if test[c].isna().all()]:
        what = f"The {results.tested_on} contains no {', '.join(absent)}"
        said.append(f"{what}: no recall, excluded from the subtype variance.")
    if len(results.others) > 2:
        said.append(
            f"{counted(len(results.others), 'arm')} are compared with one reference: one of them may look better by "
            "chance. The intervals are not corrected for that; the corrected p-values (Holm) are. "
            + ON_CHOICE[results.tested_on == CROSS_VALIDATED]
        )
    if study.failed:
        said.append(f"{counted(len(study.failed), 'cell')} of the study failed and is missing here (see Failures).")
    return said


def _untrained(results: Results) -> Iterator[str]:
    for number, fold in enumerate(results.study.folds, 1):
        if names := ", ".join(fold.get("lacking", ())):
            yield (
                f"Fold {number} trained without {names}: what its test patients show of {names} says nothing of "
                "synthetic images."
            )


def _of_one_patient(results: Results) -> list[str]:
    """Return the counted subtypes that only one of several test patients has."""
    test = results.counts[results.counts["split"] == "test"]
    if _test_patients(results) == 1:
        return []
    seen = test[test["predicted_background"] + test["predicted_tumour"] > 0]
    patients = seen.groupby("subtype")["patient"].nunique()
    return [s.name for s in results.study.taxonomy.subtypes if s.counted and patients.get(s.id, 0) == 1]


def _change(effect: Effect, measure: str, *, corrected: bool = False) -> str:
    """Write a difference: ``+1.2 points (95 % interval +0.4 to +2.0; p = 0.03)``; of the variance, see below.

    The variance is told as the spread of the recalls, ``from 4.5 to 3.2 points (variance -48 %, ...; p = 0.01)``,
    without its relative change where that means nothing.
    """
    p, is_interval = p_text(effect.p, effect.p_holm if corrected else math.nan), f"95{PERCENT} interval "
    if measure == "subtype_variance":
        spreads = (fixed(recall_spread(variance), 1) for variance in (effect.reference, effect.value))
        amount, ends = f"from {' to '.join(spreads)} points", ""
        if relative_means_something(effect):
            low, high = 100 * effect.relative_low, 100 * effect.relative_high
            ends = interval(low, high, 0, PERCENT)
            known = ends if ends == NO_INTERVAL else f"{is_interval}{ends}"
            ends = f"variance {signed(100 * effect.relative, 1)}{PERCENT}, {known}"
    else:
        amount, ends = f"{signed(100 * effect.mean, 1)} points", interval(100 * effect.low, 100 * effect.high, 1)
        ends = ends if ends == NO_INTERVAL else f"{is_interval}{ends}"
    return f"{amount} ({'; '.join(filter(None, (ends, p)))})" if ends or p else amount
