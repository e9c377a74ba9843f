"""What the name of an arm says: its method, its amount, how it is written in a report."""

from __future__ import annotations

from counterstain.report.numbers import PERCENT

BASELINES = ("tumor", "subtype")
"""Arms that train on real patches alone."""
ORACLE = "oracle"
CEILING = "ceiling, phantom only"
"""What an oracle arm is called wherever it is shown: no real cohort has a perfect generator."""


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
    """Return an arm as it is written in text and tables (``diffusion +100 %``, unbroken before the sign)."""
    method, plus, amount = arm.partition("+")
    return f"{method} +{amount}{PERCENT}" if plus and amount.isdigit() else arm


def figure_label_of(arm: str) -> str:
    """Return an arm as it is written in figures, where no remark stands beside it."""
    return f"{label_of(arm)} (ceiling)" if is_oracle(arm) else label_of(arm)
