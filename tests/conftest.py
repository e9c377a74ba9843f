"""Test processes share the machine: one thread each, or they wait for each other."""

import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line and return its exit status, output and errors."""
    from counterstain.cli import main

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["counterstain", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        return stopped.value.code or 0, printed.out, printed.err

    return run
