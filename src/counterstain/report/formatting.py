"""Numbers as they are written in a report."""

from __future__ import annotations

import math

from counterstain.errors import ConfigError
from counterstain.generators.methods import METHODS
from counterstain.progress import PERCENT
from counterstain.study.arms import Arm, Variant, parse_arm

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"
"""What stands where there is no value."""
NO_INTERVAL = "no interval"
"""What stands where a value has no interval."""


def fixed(value: float, digits: int) -> str:
    """Write a number with so many digits after the point."""
    if not math.isfinite(value):
        return NONE
    text = f"{value:.{digits}f}"
    return (text.lstrip("-") if float(text) == 0 else text).replace("-", MINUS)


def signed(value: float, digits: int) -> str:
    """Write a difference: always with its sign, except for nought itself (``-0.0`` is a little below)."""
    if not math.isfinite(value):
        return NONE
    return f"{value:+.{digits}f}".replace("-", MINUS) if value else fixed(value, digits)


def interval(low: float, high: float, digits: int, unit: str = "") -> str:
    """Write an interval of differences (``+0.4 to +1.2``), or that there is none."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return NO_INTERVAL
    return f"{signed(low, digits)} to {signed(high, digits)}{unit}"


def span(low: float, high: float, digits: int) -> str:
    """Write two ends in little room (``-0.4, +1.2``, with a proper minus sign)."""
    return f"{signed(low, digits)}, {signed(high, digits)}" if math.isfinite(low) and math.isfinite(high) else NONE


def bracketed(low: float, high: float, digits: int, unit: str = "") -> str:
    """Write an interval in brackets (``[-0.4, +1.2]``, with a proper minus sign), or that there is none."""
    return f"[{span(low, high, digits)}]{unit}" if math.isfinite(low) and math.isfinite(high) else NO_INTERVAL


def duration(seconds: float) -> str:
    """Write a time as people say it (``3 h 5 min``)."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# What the name of an arm says: its method, its amount, how it is written in a report.

BASELINES = ("tumor", "subtype")
"""Arms that train on real patches alone."""
CEILING = "ceiling, phantom only"
"""What an oracle arm is called wherever it is shown: no real cohort has a perfect generator."""


WORDS: dict[Variant, str] = {
    "weighted": "weighted loss",
    "stain": "stain jitter",
    "mixup": "mixup",
    "copypaste": "copy-paste",
    "filtered": "filtered",
    "pretrain": "pre-training",
    "anneal": "annealed",
}


def method_of(arm: str) -> str:
    """Return what an arm adds to the real patches (``diffusion`` of ``diffusion+100``; a baseline is itself)."""
    return arm.partition("+")[0]


def is_oracle(arm: str) -> bool:
    """Whether an arm's images come from the phantom's own renderer."""
    method = METHODS.get(method_of(arm))
    return method is not None and method.ceiling


def is_baseline(arm: str) -> bool:
    """Whether an arm trains on real patches alone, with nothing changed."""
    return arm in BASELINES


def label_of(arm: str) -> str:
    """Return an arm as it is written in text and tables (``diffusion +100 %, filtered``; unbroken before the sign)."""
    try:
        parsed = parse_arm(arm)
    except ConfigError:
        return arm  # of results that another version wrote
    return ", ".join([_trained_on(parsed), *(WORDS[variant] for variant in parsed.variants)])


def _trained_on(arm: Arm) -> str:
    if arm.method is None:
        return arm.mode
    return f"{arm.method} only" if arm.only else f"{arm.method} +{100 * arm.amount:g}{PERCENT}"


def figure_label_of(arm: str) -> str:
    """Return an arm as it is written in figures, where no remark stands beside it."""
    return f"{label_of(arm)} (ceiling)" if is_oracle(arm) else label_of(arm)
