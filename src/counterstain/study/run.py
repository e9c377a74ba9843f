"""Run a study: the cells that are not done yet, one after another, then the results."""

from __future__ import annotations

import fcntl
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from counterstain.config import to_yaml
from counterstain.errors import CounterstainError, DivergenceError, MismatchError
from counterstain.progress import duration
from counterstain.storage import claim, read_json, write_text
from counterstain.study.config import StudyConfig
from counterstain.study.plan import Cell, cells_folder, plan_study
from counterstain.study.results import write_results
from counterstain.study.stages import DONE_FILE, is_done, run_cell


def run_study(study: StudyConfig, out: Path, *, source: str | Path = "study") -> Path:
    """Run every cell that is not done and write the results.

    Parameters
    ----------
    study : StudyConfig
    out : Path
        Folder of the study. Running again goes on where it was stopped; after a change of the study, what does not
        depend on the change is kept.
    source : str or Path
        Where the study comes from, for messages.

    Returns
    -------
    Path
        The folder of the results.

    Raises
    ------
    MismatchError
        The folder belongs to another study, or another process is running this one.
    """
    recipe = study.resolved_recipe(source)
    cells = plan_study(study, recipe)
    claim(out, "study", {"name": study.name})
    with _locked(out):
        write_text(out / "study.yaml", to_yaml(study))
        failures = _run_cells(cells, cells_folder(out))
        return write_results(study, recipe, cells, out, failures)


def _run_cells(cells: Sequence[Cell], root: Path) -> dict[str, str]:
    """Run cells in order; return why cells failed, by name. What depends on a failed cell is left out."""
    failures: dict[str, str] = {}
    broken: set[str] = set()
    todo = [cell for cell in cells if not is_done(cell, root)]
    _say(f"{len(cells)} cells, {len(cells) - len(todo)} done already")
    for number, cell in enumerate(todo, start=1):
        missing = broken.intersection(cell.inputs.values())
        if missing:
            failures[cell.name] = "an input of it failed"
            broken.add(cell.folder)
            continue
        _say(f"[{number}/{len(todo)}] {cell.name}{_time_left(todo[number - 1 :], root)}")
        try:
            run_cell(cell, root)
        except DivergenceError as error:
            failures[cell.name] = str(error)
            broken.add(cell.folder)
            # The next run starts it from the beginning, not from a state that has diverged already.
            shutil.rmtree(root / cell.folder, ignore_errors=True)
            _say(f"{cell.name}: failed ({error}); the rest goes on")
        except CounterstainError as error:
            raise type(error)(f"{cell.name}: {error}") from error
    return failures


def _time_left(todo: Sequence[Cell], root: Path) -> str:
    """Estimate from the cells of the same stage that are done; empty while a stage is still unknown."""
    known: dict[str, list[float]] = {}
    for done in root.glob(f"*/{DONE_FILE}"):
        content = read_json(done)
        known.setdefault(content["stage"], []).append(float(content["seconds"]))
    if not all(cell.stage in known for cell in todo):
        return ""
    return f", about {duration(sum(fmean(known[cell.stage]) for cell in todo))} left"


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    # The operating system drops the lock with the process, however that ends.
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise MismatchError(f"{out}: another process is running this study; wait for it or stop it") from error
        yield


def _say(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()
