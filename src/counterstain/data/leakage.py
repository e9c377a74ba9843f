"""The check that nothing synthetic carries a held-out patient into training or evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from counterstain.errors import LeakageError

NAMED = 3  # patients that a message names


def check_no_leak(patients_seen: Iterable[str], held_out: Mapping[str, Iterable[str]], what: str) -> None:
    """Check that a checkpoint, or what it made, has seen no patient of the held-out parts.

    Parameters
    ----------
    patients_seen : iterable of str
        As recorded in a checkpoint or a patch set.
    held_out : mapping
        Part (``val``, ``test``) -> its patients.
    what : str
        The checkpoint or patch set, as the message is to name it.

    Raises
    ------
    LeakageError
        Names what, the part, up to three patients and the remedy.
    """
    seen = set(patients_seen)
    for part, patients in held_out.items():
        leaked = sorted(seen.intersection(patients))
        if leaked:
            shown = ", ".join(leaked[:NAMED]) + (f" and {len(leaked) - NAMED} more" if len(leaked) > NAMED else "")
            raise LeakageError(
                f"{what} has seen {shown} of the {part} part; train the generator on this cohort's training part only, "
                "or split the cohort as it was when the generator was trained"
            )
