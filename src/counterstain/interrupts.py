"""Ctrl-C and SIGTERM (``kill``, a cluster that wants its node back) while a model trains."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Holds Ctrl-C and SIGTERM back until they can be obeyed without loss."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self.waits = False
        """A signal has come: raise KeyboardInterrupt as soon as what must be kept is on the disk."""

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Only note signals; a second Ctrl-C raises KeyboardInterrupt at once, as does the end of the block.

        A second SIGTERM does not: a cluster sends it to all processes of a study, and its driver sends it once more.

        Outside the main thread, which alone receives signals, nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._before = {number: signal.getsignal(number) for number in SIGNALS if _is_heard(number)}
        try:
            self.listen()
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}
        if self.waits:
            raise KeyboardInterrupt

    def listen(self) -> None:
        """Hear the signals that are held back, if any, whoever listens to them by now."""
        for number in self._before:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.waits and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.waits = True
        if number == signal.SIGINT:  # a person waits; print() must not be called where it may be under way already
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")


def ignore_ctrl_c(_worker: int = 0) -> None:
    """Leave Ctrl-C, which a terminal sends to all processes, to the one that this process helps."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _is_heard(number: signal.Signals) -> bool:
    """Whether the signal is not ignored, as a shell has what it starts in the background ignore Ctrl-C."""
    return signal.getsignal(number) not in {None, signal.SIG_IGN}
