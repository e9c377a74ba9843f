"""What new processes do in the tests: a module that they can import, and quickly."""

import os
import signal
from pathlib import Path

from counterstain.devices import rank, started_processes
from counterstain.errors import DivergenceError


def note_the_rank(folder: Path) -> None:
    (folder / f"{rank()} of {started_processes()}").touch()


def fail_in_the_second() -> None:
    if rank() == 1:
        raise DivergenceError("step 3: loss is nan")
    signal.pause()


def die_in_the_second() -> None:
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()
