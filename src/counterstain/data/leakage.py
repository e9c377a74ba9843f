"""The guard against leaks: no patient who is tested on may have been learned from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from counterstain.errors import LeakageError


def check_no_leak(patients_seen: Iterable[str], held_out: Mapping[str, Iterable[str]], what: str) -> None:
    """Raise LeakageError if any held-out patient was seen.

    Parameters
    ----------
    patients_seen : iterable of str
        Patients whose tissue went into ``what``.
    held_out : mapping
        Part (``val``, ``test``) -> its patients.
    what : str
        The checkpoint or set, as the message names it.
    """
    seen = set(patients_seen)
    for part, patients in held_out.items():
        leaked = sorted(seen & set(patients))
        if leaked:
            shown = ", ".join(leaked[:3]) + (f" and {len(leaked) - 3} more" if len(leaked) > 3 else "")
            raise LeakageError(
                f"{what} has seen {shown} of the {part} part; train the generator on this cohort's training part only, "
                "or split the cohort as it was when the generator was trained"
            )
