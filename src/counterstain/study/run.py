"""Run a study: the cells that are not done yet, wherever the executor has them run, then the results."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from counterstain.config import to_yaml
from counterstain.devices import started_processes
from counterstain.errors import ConfigError, MismatchError
from counterstain.generators.methods import missing_file
from counterstain.recipe import Recipe
from counterstain.segmentation.model import Segmenter
from counterstain.storage import claim, write_text
from counterstain.study.config import StudyConfig, trainings
from counterstain.study.executors import ExecutorConfig, open_executor
from counterstain.study.journal import DONE_FILE, damage, is_done
from counterstain.study.plan import Cell, cells_folder, cells_of
from counterstain.study.results import write_results
from counterstain.study.scheduler import run_cells, say
from counterstain.study.stages import follow_cohort
from counterstain.study.status import rows_of, write_plan

READ_BY_RESULTS = {"cohort", "synthetic", "evaluation"}


def run_study(
    study: StudyConfig, out: Path, *, source: str | Path = "study", executor: ExecutorConfig | None = None
) -> Path:
    """Run every cell that is not done and write the results.

    Parameters
    ----------
    study : StudyConfig
    out : Path
        Folder of the study. Running again goes on where it was stopped; after a change of the study, what does not
        depend on the change is kept.
    source : str or Path
        Where the study comes from, for messages.
    executor : ExecutorConfig, optional
        Where cells run; in this process if not given. It changes nothing about the results.

    Returns
    -------
    Path
        The folder of the results.

    Raises
    ------
    MismatchError
        The folder belongs to another study, or another process is running this one.
    ConfigError
        A package or a file that a cell needs is not there, or the segmenter's network cannot be built.
    """
    if started_processes() > 1:
        raise ConfigError("a study starts the processes of its trainings itself; run it without torchrun")
    recipe = study.resolved_recipe(source)
    cells = cells_of(study, recipe)
    claim(out, "study", {"name": study.name})
    with locked(out):
        write_text(out / "study.yaml", to_yaml(study))
        write_plan(out, rows_of(cells))
        follow_cohort(cells[0], cells_folder(out))
        failures = _run(cells, cells_folder(out), study, recipe, executor or ExecutorConfig())
        return write_results(study, recipe, cells, out, failures)


def _run(
    cells: Sequence[Cell], root: Path, study: StudyConfig, recipe: Recipe, executor: ExecutorConfig
) -> dict[str, str]:
    done = whole_cells(cells, root)
    if len(done) == len(cells):
        say(f"{len(cells)} cells, all done already")
        return {}
    lines = lacking(recipe, (cell for cell in cells if cell.folder not in done))
    if lines:
        raise ConfigError("; ".join(lines))
    with torch.random.fork_rng():
        Segmenter(recipe.segmenter, steps=1, seed=0)  # a network that cannot be built is met here, not hours later
    opened = open_executor(executor, study.resources, root)
    try:
        return run_cells(cells, done, root, opened, retries=study.resources.retries)
    finally:
        opened.stop()


def lacking(recipe: Recipe, cells: Iterable[Cell]) -> list[str]:
    """Return what the cells will not find on this machine, a line for each package and file of weights.

    Parameters
    ----------
    recipe : Recipe
    cells : iterable of Cell
        Those that are to run.
    """
    stages = {cell.stage for cell in cells}
    lines: list[str] = []
    if "segmenter" in stages:
        lines += missing_file("segmenter.encoder_weights", recipe.segmenter.encoder_weights)
    for stage, training in trainings().items():
        if stage in stages:
            lines += training.missing(recipe.settings_of(training))
    return lines


def whole_cells(cells: Sequence[Cell], root: Path) -> set[str]:
    """Return the folders of finished cells; those that are damaged are said and taken for not done.

    Sizes are compared for all; files that will be read are read through and their hashes compared.
    """
    done = {cell.folder for cell in cells if is_done(cell, root)}
    done |= {cell.folder for cell in cells if cell.stage == "shards" and cell.settings["set"] in done}
    read: set[str] = set()
    for cell in reversed(cells):  # each before its inputs
        if cell.folder in done and (root / cell.folder).exists():
            file = damage(root / cell.folder, hashes=cell.folder in read or cell.stage in READ_BY_RESULTS)
            if file is not None:
                say(f"{cell.name}: {root / cell.folder / file} is damaged or missing; the cell is made again")
                _forget(cell, root)
                done.remove(cell.folder)
        if cell.folder not in done:
            read.update(cell.needs)
    return done


def _forget(cell: Cell, root: Path) -> None:
    if cell.stage == "synthetic":  # its shards have hashes of their own: only the damaged ones are drawn again
        (root / cell.folder / DONE_FILE).unlink(missing_ok=True)
    else:
        shutil.rmtree(root / cell.folder)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a second driver away; the operating system drops the lock with the process, however that ends."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise MismatchError(f"{out}: another process is running this study; wait for it or stop it") from error
        yield


@dataclass(frozen=True)
class Leftover:
    """A folder that nothing needs."""

    folder: Path
    size_bytes: int


def leftovers(root: Path, planned: Collection[str]) -> list[Leftover]:
    """Return what lies among the cells and belongs to none of the planned ones, the largest first."""
    if not root.is_dir():
        return []
    found = [folder for folder in root.iterdir() if folder.is_dir() and folder.name not in planned]
    sized = [Leftover(folder, size_of(folder)) for folder in found]
    return sorted(sized, key=lambda leftover: (-leftover.size_bytes, leftover.folder.name))


def remove(found: Collection[Leftover]) -> None:
    """Delete folders; each is renamed first, so that a half-deleted cell is never taken for a whole one."""
    for leftover in found:
        doomed = leftover.folder.with_name(f".{leftover.folder.name.lstrip('.')}.removed")
        if leftover.folder != doomed:
            leftover.folder.replace(doomed)
        shutil.rmtree(doomed)


def size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() or file.is_symlink())
