"""The errors that counterstain raises on purpose.

    CounterstainError               anything below; the command line prints one line and exits with status 2
    ├── InputError                  a file or a value that was given cannot be used
    │   ├── ConfigError             an unknown key, a wrong type, a value out of range
    │   └── TaxonomyError           a subtype that the taxonomy does not know
    ├── MismatchError               two things that do not belong together: a checkpoint of another taxonomy, size or
    │                               method; an output folder of another run
    ├── LeakageError                synthetic data whose generator saw a validation or test patient
    ├── StorageError                the disk is full or a file on it is damaged
    ├── FetchError                  a file at a URL that cannot be read just now: no connection, no permission
    └── DivergenceError             a training whose loss is no longer a number

Every message names the file, the place in it, the value, what was expected and what to do.
"""

import re

LONG_NAME = re.compile(r"'[^']{250,}'|\S{250,}")
LONGEST = 2000  # characters of a message


class CounterstainError(Exception):
    """Base of all errors that are the user's to mend; names and lists without end are cut in what it says."""

    def __str__(self) -> str:
        text = LONG_NAME.sub(lambda name: f"{name[0][:100]}…{name[0][-50:]}", super().__str__())
        return text if len(text) <= LONGEST else f"{text[: LONGEST - 500]}…{text[-400:]}"


class CounterstainWarning(UserWarning):
    """Something worth knowing that stops nothing; the command line prints one line."""


class InputError(CounterstainError, ValueError):
    """A file or value that was given cannot be used."""


class ConfigError(InputError):
    """A configuration has an unknown key, a wrong type or a value out of range."""


class TaxonomyError(InputError):
    """A subtype is not part of the taxonomy."""


class MismatchError(CounterstainError):
    """Two things do not belong together."""


class LeakageError(CounterstainError):
    """Synthetic data would carry a validation or test patient into training or evaluation."""


class StorageError(CounterstainError, OSError):
    """A file could not be written, or what is on the disk is damaged."""


class FetchError(CounterstainError):
    """A file at a URL cannot be read just now: no connection, no permission, or a server that sends something else."""


class DivergenceError(CounterstainError, ArithmeticError):
    """A training's loss is no longer a number."""
