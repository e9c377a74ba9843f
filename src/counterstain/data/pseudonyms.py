"""Pseudonyms of patients: what shared checkpoints hold instead of names, so that their owner's check for leaks works.

A pseudonym is a keyed hash (HMAC-SHA256) of a patient's name. The key stays with the owner: without it nobody can tell
whose pseudonym it is, not even by trying all names that a hospital uses. Whoever has the key recognises the patients.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from counterstain.errors import CounterstainWarning, InputError
from counterstain.storage import replacing

MARK = "pseudonym"
KEY_BYTES = 32
KEY_VARIABLE = "COUNTERSTAIN_PATIENT_KEY"


def key_file() -> Path:
    """Return where the key is kept: the file that COUNTERSTAIN_PATIENT_KEY names, or one among the user's settings."""
    if named := os.environ.get(KEY_VARIABLE):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "counterstain" / "patient-key"


def pseudonyms(keys: Iterable[str]) -> list[str]:
    """Return the pseudonyms of patients, by the keys that all spellings of a name share; those of others stay.

    The key file is made where there is none.
    """
    key = _key() or _new_key()
    return sorted(name if name.startswith(f"{MARK}:") else _pseudonym(name, key) for name in keys)


def recogniser(seen: Iterable[str], what: str) -> Callable[[str], bool]:
    """Return a function that says of a patient's key whether ``seen`` holds the patient's pseudonym.

    It warns where some were made with another key than the one that is here.
    """
    found = {name for name in seen if name.startswith(f"{MARK}:")}
    key = _key() if found else None
    foreign = [name for name in found if key is None or name.split(":")[1] != _number(key)]
    if foreign:
        warnings.warn(
            f"{what} has seen {len(foreign)} patients whose names are hidden by a key that is not here ({key_file()}); "
            "whether they are yours cannot be checked",
            CounterstainWarning,
            stacklevel=3,
        )
    return lambda patient: key is not None and _pseudonym(patient, key) in found


def _pseudonym(patient_key: str, key: bytes) -> str:
    return f"{MARK}:{_number(key)}:{hmac.new(key, patient_key.encode(), hashlib.sha256).hexdigest()[:32]}"


def _number(key: bytes) -> str:
    return hashlib.sha256(b"number of " + key).hexdigest()[:8]


def _key() -> bytes | None:
    file = key_file()
    if not file.exists():
        return None
    try:
        key = bytes.fromhex(file.read_text(encoding="ascii").strip())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not a key of pseudonyms; restore it from a copy, or remove it") from error
    if len(key) < KEY_BYTES:
        raise InputError(f"{file}: too short for a key of pseudonyms; restore it from a copy, or remove it")
    return key


def _new_key() -> bytes:
    key = secrets.token_bytes(KEY_BYTES)
    with replacing(key_file()) as partial:
        partial.touch(mode=0o600)
        partial.write_text(key.hex() + "\n", encoding="ascii")
    return key
