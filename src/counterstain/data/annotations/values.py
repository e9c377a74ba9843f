"""Single values out of annotation files, checked."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable
from typing import Any

from counterstain.errors import InputError

MAX_COORDINATE_PX = 10_000_000  # the largest slides have about 500,000 pixels a side
MAX_NAME_LENGTH = 200


def shown(value: Any) -> str:
    """Return a value as it stands in an error message: one line, short."""
    return reprlib.repr(value)


def usable(value: Any) -> bool:
    """Whether a value is a number that a coordinate can be; NaN and infinities are not."""
    return type(value) in {int, float} and -MAX_COORDINATE_PX <= value <= MAX_COORDINATE_PX


def number(text: str | None, place: Callable[[], str], what: str) -> float:
    """Read a coordinate that is written as text; the place is asked for where it is needed.

    Raises
    ------
    InputError
        Missing, not a number, or beyond any slide.
    """
    if text is None:
        raise InputError(f"{place()} {what}: the coordinate is missing; export the annotations again")
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not -MAX_COORDINATE_PX <= value <= MAX_COORDINATE_PX:  # NaN is not either
        raise InputError(
            f"{place()} {what}: expected a coordinate in level-0 pixels, at most {MAX_COORDINATE_PX:,} either way, "
            f"found {shown(text)}; correct it or export the annotations again"
        )
    return value


def name(value: Any, where: str) -> str:
    """Return a name on one line, white space and unprintable characters made single spaces.

    Raises
    ------
    InputError
        Not text, or too long to be a name.
    """
    if not isinstance(value, str) or len(value) > MAX_NAME_LENGTH:
        raise InputError(f"{where}: expected a name of at most {MAX_NAME_LENGTH} characters, found {shown(value)}")
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())


def file_name(value: Any, where: str) -> str | None:
    """Return the last part of a path, or None where it names no file; nothing in it can lead to another folder."""
    last = re.split(r"[/\\]", name(value, where))[-1].strip()
    return None if last in {"", ".", ".."} else last


def colour_of_rgb(red: Any, green: Any, blue: Any) -> str | None:
    """Return ``#rrggbb``, or None where the channels are not 0..255."""
    channels = (red, green, blue)
    if all(type(c) is int and 0 <= c <= 255 for c in channels):
        return "#" + "".join(f"{c:02x}" for c in channels)
    return None


def colour_of_text(text: Any) -> str | None:
    """Return ``#rrggbb`` of such a text, otherwise None: a colour is no reason to refuse a file."""
    return text.lower() if isinstance(text, str) and re.fullmatch(r"#[0-9A-Fa-f]{6}", text) else None
