"""How sure a difference is, in words: p-values, power, and how often anybody looked."""

from __future__ import annotations

import math
from collections.abc import Sequence

from counterstain.report.effects import Effect
from counterstain.report.numbers import PERCENT, counted, fixed
from counterstain.study.looks import Look, times_looked_at
from counterstain.study.statistics import smallest_p

SIGNIFICANT = 0.05
PART_NAMES = {"val": "validation", "test": "test"}


def p_text(p: float) -> str:
    """Write a p-value (``p = 0.03``, ``p < 0.001``); empty where there is none."""
    if not math.isfinite(p):
        return ""
    return f"p = {_figure(p)}" if p >= 0.001 else "p < 0.001"


def both_p_text(effect: Effect) -> str:
    """Write a p-value beside the one corrected for the number of arms (``p = 0.03, corrected 0.21``)."""
    if not math.isfinite(effect.p_holm) or effect.p_holm == effect.p:
        return p_text(effect.p)
    corrected = _figure(effect.p_holm) if effect.p_holm >= 0.001 else "< 0.001"
    return f"{p_text(effect.p)}, corrected {corrected}"


def needed_text(number: float, thing: str) -> str:
    """Write how many repeats or patients it takes (``9 repeats``); empty where that cannot be told."""
    if math.isnan(number):
        return ""
    return counted(int(number), thing) if math.isfinite(number) else f"no number of {thing}s"


def power_sentence(effect: Effect, what: str, patients: int) -> str:
    """Say what it would take to see a difference as large as this one; empty where that cannot be told."""
    repeats, of_patients = needed_text(effect.needed_repeats, "repeat"), needed_text(effect.needed_patients, "patient")
    if not repeats or not of_patients:
        return ""
    return (
        f"To see a difference in {what} as large as this one with 80{PERCENT} power takes {repeats} with "
        f"{counted(patients, 'test patient')}, or {of_patients} with {counted(effect.n, 'repeat')}."
    )


def smallest_p_caution(patients: int, arms: int) -> str:
    """Say where p-values end with few patients; empty where they end below what matters."""
    least = smallest_p(patients)
    if arms * least <= SIGNIFICANT:
        return ""
    said = f"With {counted(patients, 'test patient')} no p-value can be below {_figure(least)}"
    if arms > 1:
        said += f", and corrected for {counted(arms, 'arm')} none below {_figure(min(arms * least, 1.0))}"
    return f"{said}, whatever the difference: look at the intervals, or evaluate on more patients."


def looks_sentence(looks: Sequence[Look]) -> str:
    """Say how often the figures of each part were shown."""
    said = []
    for split, name in PART_NAMES.items():
        times = times_looked_at(looks, split)
        by_command = ", ".join(f"{command} {count}" for command, count in sorted(times.items()))
        if times:
            said.append(f"of the {name} part {_times(times.total())} ({by_command})")
    if not said:
        return "How often the figures of each part were looked at is not on record."
    return (
        f"Figures {' and '.join(said)} have been shown since {looks[0].time[:10]}, this page included. "
        "Whoever changes a study after a look at the test part chooses by the test part."
    )


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def _figure(p: float) -> str:
    return fixed(p, 2 if p >= 0.0995 else 3)
