"""Numbers as they are written in a report."""

from __future__ import annotations

import math

MINUS = "\N{MINUS SIGN}"
PERCENT = "\N{NO-BREAK SPACE}%"
TIMES = "\N{MULTIPLICATION SIGN}"
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


def counted(number: int, thing: str, things: str = "") -> str:
    """Write a number with its noun (``1 repeat``, ``5 repeats``)."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"
