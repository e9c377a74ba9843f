"""What the name of an arm says: its method, its amount, how it is written in a report."""

from __future__ import annotations

from counterstain.errors import ConfigError
from counterstain.report.numbers import PERCENT
from counterstain.study.arms import Arm, Variant, parse_arm

BASELINES = ("tumor", "subtype")
"""Arms that train on real patches alone."""
ORACLE = "oracle"
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
    return arm.startswith(ORACLE)


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
