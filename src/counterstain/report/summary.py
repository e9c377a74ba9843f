"""What a study found, in plain words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from counterstain.progress import PERCENT, counted
from counterstain.report.effects import (
    HIGHER_IS_BETTER,
    MAIN,
    SIGNIFICANT,
    UNDEFINED,
    Effect,
    Effects,
    both_p_text,
    looks_sentence,
    p_text,
    power_sentence,
    preferred_baseline,
    smallest_p_caution,
)
from counterstain.report.formatting import CEILING, NO_INTERVAL, fixed, interval, is_oracle, label_of, signed
from counterstain.report.results import Results

ENOUGH_REPEATS = 5  # the paper's number
ENOUGH_PATIENTS = 8  # the paper's number of test patients


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The finding and what must be said with it."""

    verdict: str
    """A few words."""
    finding: str
    """One or two sentences."""
    power: str
    """What it would take to see the chosen arm's differences; may be empty."""
    looks: str
    """How often the figures of each part were shown."""
    cautions: tuple[str, ...]
    """Why not to believe too much."""
    arms: tuple[tuple[str, str], ...]
    """Label and sentence of every arm but the reference."""


def summarise(results: Results, effects: Effects, chosen: str | None) -> Summary:
    """Say what a study found.

    Parameters
    ----------
    results : Results
        The study.
    effects : Effects
        Of :func:`~counterstain.report.effects.effects_on_test`.
    chosen : str, optional
        Of :func:`~counterstain.report.effects.chosen_arm`.

    Returns
    -------
    Summary
    """
    measured = {arm for arm, measure in effects if measure == "dice"}
    verdict, finding = _finding(results, effects, chosen) if chosen in measured else _nothing_to_compare(results)
    others = [arm for arm in results.arms if arm != results.study.reference and arm in measured]
    return Summary(
        verdict=verdict,
        finding=finding,
        power=_power(results, effects, chosen) if chosen in measured else "",
        looks=looks_sentence(results.looks),
        cautions=tuple(_cautions(results, effects)),
        arms=tuple((label_of(arm), _arm_sentence(effects, arm)) for arm in others),
    )


def judge(effect: Effect, measure: str) -> str:
    """Return ``better``, ``worse`` (the interval leaves nought out) or ``unclear``."""
    sign = HIGHER_IS_BETTER[measure]
    ends = sorted([sign * effect.low, sign * effect.high])
    if not all(map(math.isfinite, ends)):
        return "unclear"
    return "better" if ends[0] > 0 else "worse" if ends[1] < 0 else "unclear"


def _nothing_to_compare(results: Results) -> tuple[str, str]:
    reference = label_of(results.study.reference)
    return "Nothing to compare", (
        "No arm with images of a generator has results on validation and test, so none was chosen to be held against "
        f"{reference}."
    )


def _finding(results: Results, effects: Effects, chosen: str) -> tuple[str, str]:
    of_dice, of_variance = (effects.get((chosen, measure), UNDEFINED) for measure in MAIN)
    n = of_dice.n
    seen = (
        f"Of the arms with synthetic images validation chose {label_of(chosen)}{_baseline_ahead(results, chosen)}. "
        f"It differs from {label_of(results.study.reference)} on the "
        f"test part by {_points(of_dice)} of {results.study.taxonomy.tissue_class} Dice "
        f"({_with_p(_named(_interval_points(of_dice)), p_text(of_dice.p))}) and by "
        f"{_percent(of_variance)} in subtype variance "
        f"({_with_p(_named(_interval_percent(of_variance)), p_text(of_variance.p))})."
    )
    if n < ENOUGH_REPEATS:
        trend = "" if _gains(of_dice, of_variance) else "no improvement was seen, and "
        return (
            "No improvement seen; too few repeats" if trend else "Too few repeats to conclude",
            f"With {counted(n, 'repeat')} {trend}nothing can be concluded. {seen}",
        )
    return _verdict(of_dice, of_variance, seen)


def _baseline_ahead(results: Results, chosen: str) -> str:
    """Say where validation would rather have no synthetic images at all."""
    ahead = preferred_baseline(results, chosen)
    if ahead is None:
        return ""
    baseline, theirs, own = ahead
    return f", but {label_of(baseline)} is ahead of it there (Dice {fixed(theirs, 4)} against {fixed(own, 4)})"


def _power(results: Results, effects: Effects, chosen: str) -> str:
    patients = results.counts.loc[results.counts["split"] == "test", "patient"].nunique()
    names = {"dice": "Dice", "subtype_variance": "subtype variance"}
    found = (power_sentence(effects.get((chosen, measure), UNDEFINED), names[measure], patients) for measure in MAIN)
    return " ".join(sentence for sentence in found if sentence)


def _verdict(of_dice: Effect, of_variance: Effect, seen: str) -> tuple[str, str]:
    judged = {"Dice": judge(of_dice, "dice"), "subtype variance": judge(of_variance, "subtype_variance")}
    better = [name for name, how in judged.items() if how == "better"]
    worse = [name for name, how in judged.items() if how == "worse"]
    if better and worse:
        return "Mixed", f"Synthetic images improved {better[0]} and made {worse[0]} worse. {seen}"
    if better:
        return f"Improved {' and '.join(better)}", f"Synthetic images improved {' and '.join(better)}. {seen}"
    if worse or not _gains(of_dice, of_variance):
        return "No improvement", f"There is no improvement by synthetic images. {seen}"
    return "No improvement shown", f"No improvement can be shown: {_both_ways(of_dice, of_variance)}. {seen}"


def _both_ways(of_dice: Effect, of_variance: Effect) -> str:
    """Say why gains are not taken for shown, and whether the tests see it otherwise."""
    seen = [name for name, effect in (("Dice", of_dice), ("variance", of_variance)) if _significant(effect.p)]
    but = f", although the test of the {' and the '.join(seen)} alone would" if seen else ""
    return f"both intervals reach over nought{but}"


def _significant(p: float) -> bool:
    return math.isfinite(p) and p < SIGNIFICANT


def _gains(of_dice: Effect, of_variance: Effect) -> bool:
    """Whether at least one of the two measures moved the right way."""
    return bool(of_dice.mean > 0 or of_variance.mean < 0)


def _arm_sentence(effects: Effects, arm: str) -> str:
    of_dice, of_variance = (effects.get((arm, measure), UNDEFINED) for measure in MAIN)
    judged = (_in_words(of_dice, "dice"), _in_words(of_variance, "subtype_variance"))
    return (
        (f"{CEILING.capitalize()}. " if is_oracle(arm) else "")
        + f"Dice {_points(of_dice)} ({_with_p(_interval_points(of_dice), both_p_text(of_dice))}): {judged[0]}. "
        + f"Subtype variance {_percent(of_variance)} "
        + f"({_with_p(_interval_percent(of_variance), both_p_text(of_variance))}): {judged[1]}."
    )


def _in_words(effect: Effect, measure: str) -> str:
    gain = HIGHER_IS_BETTER[measure] * effect.mean
    if not math.isfinite(gain):
        return "not measured"
    if effect.n < ENOUGH_REPEATS:
        return "too few repeats to tell" if gain > 0 else "no improvement seen"
    if gain > 0 and not math.isfinite(effect.low):
        return "whether by chance cannot be told"
    unclear = "open, as interval and test disagree" if _significant(effect.p_holm) else "within chance"
    words = {"better": "improved", "worse": "worse", "unclear": unclear if gain > 0 else "no improvement"}
    return words[judge(effect, measure)]


def _cautions(results: Results, effects: Effects) -> list[str]:
    study = results.study
    said = []
    repeats = max((effect.n for effect in effects.values()), default=study.repeats)
    if repeats < ENOUGH_REPEATS:
        said.append(
            f"{counted(repeats, 'repeat')} an arm: a difference of this size can come from the seed alone. "
            f"Run at least {ENOUGH_REPEATS} repeats before you conclude anything."
        )
    patients = results.counts.loc[results.counts["split"] == "test", "patient"].nunique()
    if patients < ENOUGH_PATIENTS:
        said.append(
            f"The test part has {counted(patients, 'patient')}: what holds for so few may not hold for the next ones."
        )
    tested = len({arm for arm, _ in effects})
    if tested and (caution := smallest_p_caution(patients, tested)):
        said.append(caution)
    undefined = max((e.undefined for e in effects.values() if math.isfinite(e.undefined)), default=0.0)
    if undefined > 0.01:
        share = fixed(100 * undefined, 0)
        said.append(
            f"Some subtypes come from few test patients: up to {share}{PERCENT} of the bootstrap draws held none "
            "of them and were left out of that interval."
        )
    if alone := _of_one_patient(results):
        said.append(
            f"{', '.join(alone)}: from one test patient alone, whose like are unknown. Neither this recall nor the "
            "subtype variance has an interval."
        )
    absent = [name for name, c in zip(study.taxonomy.names, results.recalls, strict=True) if _absent(results, c)]
    if absent:
        said.append(f"The test part has no pixel of {', '.join(absent)}: no recall, left out of the subtype variance.")
    if len(results.arms) > 3:
        said.append(
            f"{counted(len(results.arms) - 1, 'arm')} are held against one reference: among so many, one may look "
            "better by chance. The intervals are not corrected for that; the corrected p-values (Holm) are. The arm "
            "chosen on validation is one test on the test part and needs no correction."
        )
    if study.failed:
        said.append(f"{counted(len(study.failed), 'cell')} of the study failed and is missing here (see Failures).")
    return said


def _of_one_patient(results: Results) -> list[str]:
    """Return the counted subtypes that only one of several test patients has."""
    test = results.counts[results.counts["split"] == "test"]
    if test["patient"].nunique() == 1:
        return []
    seen = test[test["predicted_background"] + test["predicted_tumour"] > 0]
    patients = seen.groupby("subtype")["patient"].nunique()
    return [s.name for s in results.study.taxonomy.subtypes if s.counted and patients.get(s.id, 0) == 1]


def _absent(results: Results, column: str) -> bool:
    return bool(results.results.loc[results.results["split"] == "test", column].isna().all())


def _points(effect: Effect) -> str:
    return f"{signed(100 * effect.mean, 1)} points"


def _percent(effect: Effect) -> str:
    return f"{signed(100 * effect.relative, 1)}{PERCENT}"


def _with_p(ends: str, p: str) -> str:
    return f"{ends}; {p}" if p else ends


def _named(ends: str) -> str:
    return ends if ends == NO_INTERVAL else f"95{PERCENT} interval {ends}"


def _interval_points(effect: Effect) -> str:
    return interval(100 * effect.low, 100 * effect.high, 1)


def _interval_percent(effect: Effect) -> str:
    return interval(100 * effect.relative_low, 100 * effect.relative_high, 0, PERCENT)
