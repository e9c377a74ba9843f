"""Whether the arms of a study were treated alike, read off what its trainings recorded."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from counterstain.report.arms import label_of
from counterstain.report.numbers import PERCENT, counted
from counterstain.report.record import SetRecord, TrainingRecord

SEGMENTER = "segmenter"
KeyT = TypeVar("KeyT", bound=Hashable)


def fairness_sentences(trainings: Sequence[TrainingRecord], sets: Sequence[SetRecord]) -> tuple[str, ...]:
    """Say of each thing that arms must have in common whether they had it.

    Returns
    -------
    tuple of str
        Empty where the study recorded no segmenter.
    """
    segmenters = [training for training in trainings if training.stage == SEGMENTER]
    if not segmenters:
        return ()
    return (_steps(segmenters), _augmentation(segmenters), _seeds(segmenters), *_filter(sets))


def _steps(segmenters: Sequence[TrainingRecord]) -> str:
    found = _by(segmenters, lambda t: (t.steps, t.batch_size))
    if len(found) == 1:
        (steps, batch) = next(iter(found))
        return (
            f"Equal optimiser steps: every segmenter ({len(segmenters)}) took {steps:,} steps of {batch} patches, so "
            "no arm wins by more updates."
        )
    told = "; ".join(f"{steps:,} steps of {batch} patches: {_arms(of)}" for (steps, batch), of in found.items())
    return f"Optimiser steps differ between arms: {told}."


def _augmentation(segmenters: Sequence[TrainingRecord]) -> str:
    found = _by(segmenters, _varied)
    if len(found) == 1:
        return f"Equal augmentation of real and synthetic patches in all arms: {next(iter(found))}."
    return "Augmentation differs between arms: " + "; ".join(f"{how}: {_arms(of)}" for how, of in found.items()) + "."


def _varied(training: TrainingRecord) -> str:
    settings = training.augmentation
    ways = [way for name, way in (("flip", "mirrored"), ("quarter_turns", "turned by quarters")) if settings.get(name)]
    jitter = settings.get("stain_jitter")
    return ", ".join([*ways, f"stain jitter {jitter:g}" if jitter else "no stain jitter"])


def _seeds(segmenters: Sequence[TrainingRecord]) -> str:
    repeats = sorted({training.repeat for training in segmenters})
    unequal = [r for r in repeats if len({t.seed for t in segmenters if t.repeat == r}) > 1]
    if unequal:
        return f"Seeds differ between arms in repeat {', '.join(map(str, unequal))}: differences are not paired there."
    alike = len({training.seed for training in segmenters}) < len(repeats)
    note = " Some repeats share a seed." if alike else ""
    return (
        f"Equal seeds: within each of {counted(len(repeats), 'repeat')} all arms have the same initial weights and the "
        f"same order of real patches; the seeds were read from the checkpoints.{note}"
    )


def _filter(sets: Sequence[SetRecord]) -> list[str]:
    if not sets:
        return []
    rules = {_rule(found) for found in sets}
    rates = ", ".join(
        f"{label_of(s.name)} {s.rejected:,} of {s.drawn:,} ({100 * s.rejected / max(s.drawn, 1):.1f}{PERCENT})"
        for s in sets
    )
    alike = f"Equal filter for all methods ({next(iter(rules))})" if len(rules) == 1 else "Filters differ between sets"
    return [f"{alike}; refused: {rates}."]


def _rule(found: SetRecord) -> str:
    synthesis = found.settings.get("synthesis", {})
    if "filter" in found.settings:
        return "judged by a network"
    if synthesis.get("reject", "none") == "none":
        return "none"
    name = str(synthesis["reject"]).replace("_", " ")
    level, attempts = synthesis.get("white_level", 0), synthesis.get("attempts", 1)
    return f"{name}: grey level above {level:g}, at most {attempts} images for a patch"


def _by(
    segmenters: Sequence[TrainingRecord], key: Callable[[TrainingRecord], KeyT]
) -> dict[KeyT, list[TrainingRecord]]:
    groups: dict[KeyT, list[TrainingRecord]] = {}
    for training in segmenters:
        groups.setdefault(key(training), []).append(training)
    return groups


def _arms(trainings: Sequence[TrainingRecord]) -> str:
    return ", ".join(dict.fromkeys(label_of(training.arm) for training in trainings))
