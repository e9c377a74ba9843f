import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_study import FOLDS, small_study

from counterstain.study.status import events_of

KILLS = 20
HERE = Path(__file__).parent


class Launcher:
    def __init__(self, log):
        command = [sys.executable, HERE / "study_launcher.py"]
        environment = os.environ | {"PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        assert self._line() == "ready"

    def run(self, study, out, processes, kill_after=None):
        """Run a driver, kill it some seconds after its first cell began, and return its exit status."""
        noted = starts(out)
        order = {"study": str(study), "out": str(out), "processes": processes}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        pid = int(self._line())
        if kill_after is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                while starts(out) == noted:
                    os.kill(pid, 0)
                    time.sleep(0.01)
                time.sleep(kill_after)
                os.kill(pid, signal.SIGKILL)
        return int(self._line())

    def _line(self):
        return self._process.stdout.readline().strip()

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def starts(out):
    return sum(event["event"] == "start" for event in events_of(out))


def seen(line):
    """Show a line of the log of docs/reliability.md (pytest -s)."""
    sys.stdout.write(f"{line}\n")


def kill_and_resume(launcher, folder, processes, rng, **changes):
    """Kill drivers 20 times over as many studies as that takes; return all results and print what was seen."""
    study, results, kills, seconds_a_cell = small_study(folder, **changes), [], 0, 0.0
    while kills < KILLS or not results:
        out = folder / f"run-{len(results)}"
        runs = 0
        while True:
            done = {file.parent.name for file in out.glob("cells/*/cell.json")}
            noted = len(events_of(out))
            delay = rng.uniform(0, 4 * seconds_a_cell) if results and kills < KILLS else None
            status = launcher.run(study, out, processes, delay)
            started = {event["cell"] for event in events_of(out)[noted:] if event["event"] == "start"}
            assert not started & done, "a finished cell ran again"
            runs += 1
            if status == 0:
                times = [event["seconds"] for event in events_of(out) if event["event"] == "finish"]
                seconds_a_cell = sum(times) / len(times)
                break
            assert status == -signal.SIGKILL
            kills += 1
            seen(f"kill {kills:2d} after {delay:5.2f} s: {len(done)} cells were done, {len(started)} had started")
        seen(f"study {len(results)}: finished in run {runs}")
        results.append((out / "results" / "results.csv").read_bytes())
    return results


@pytest.mark.long
@pytest.mark.parametrize(("processes", "changes"), [(None, {}), (2, {}), (2, FOLDS)], ids=["one", "two", "folds"])
def test_a_driver_killed_at_20_random_moments_ends_with_the_same_results(tmp_path, processes, changes):
    with (tmp_path / "log").open("w") as log:
        launcher = Launcher(log)
        results = kill_and_resume(launcher, tmp_path, processes, random.Random(0), **changes)
        launcher.close()
    assert len(results) > 1
    assert set(results) == {results[0]}


@pytest.fixture
def ctrl_c_is_heard():
    """What a shell starts in the background ignores Ctrl-C, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.long
@pytest.mark.usefixtures("ctrl_c_is_heard")
@pytest.mark.parametrize("arguments", [[], ["--processes", "2"]])
def test_ctrl_c_ends_driver_and_processes_within_5_seconds_and_says_how_to_go_on(tmp_path, arguments):
    command = [sys.executable, "-m", "counterstain", "study", "run", small_study(tmp_path), "--out", tmp_path / "run"]
    with subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while not starts(tmp_path / "run"):
            time.sleep(0.01)
        start = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert time.monotonic() - start < 5
    assert process.returncode == 130
    assert "give the same command again to continue" in said
    for event in events_of(tmp_path / "run"):
        with pytest.raises(ProcessLookupError):
            os.kill(event["pid"], 0)
