"""The check that nothing synthetic carries a held-out patient into training or evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from counterstain.errors import InputError, LeakageError

PATIENTS_SEEN_FILE = "patients_seen.txt"  # beside exported generated images
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


def read_patients_seen(path: Path) -> tuple[str, ...]:
    """Read a text file with a patient a line.

    Raises
    ------
    InputError
        There is no such file, it is not text, or it names no patient.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a text file with a patient a line") from error
    patients = tuple(line.strip() for line in lines if line.strip())
    if not patients:
        raise InputError(f"{path}: names no patient")
    return patients
