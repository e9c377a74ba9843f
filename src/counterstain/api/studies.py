"""Studies: init, headroom, plan, run, demo, test on another cohort, status, clean, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from counterstain.api import (
    Numbers,
    PathLike,
    Settings,
    assignments,
    check_logger,
    numbers_of,
    open_cohort,
    recipe_of,
    verb,
)
from counterstain.errors import ConfigError, InputError

if TYPE_CHECKING:
    from counterstain.data.cohort import Cohort
    from counterstain.processes import ExecutorConfig
    from counterstain.study.config import StudyConfig
    from counterstain.study.headroom import Headroom
    from counterstain.study.run import Leftover
    from counterstain.study.status import StudyState


class StudyPlan(NamedTuple):
    """A study before it runs."""

    name: str
    run: Path  # folder of the study
    state: StudyState  # of every cell, and what it should take
    lacking: tuple[str, ...]  # what this machine still lacks for it, a line each
    untimed: tuple[str, ...]  # cells whose like was not timed on this machine, and why not where it was tried
    picture_bytes: float  # of the pictures in the results
    unreviewed: tuple[str, ...] = ()  # what nobody has reviewed of the sets of arms +reviewed, a line each

    def __repr__(self) -> str:
        done = sum(state == "done" for state in self.state.states.values())
        return f"StudyPlan({self.name}: {len(self.state.states)} cells, {done} of them done, in {self.run})"


MOST_DEMO_PROCESSES = 4  # no more than that can be busy for long, and each needs a gigabyte


@verb
def init_study(cohort: PathLike | Cohort, *, out: PathLike = "study.yaml", preset: str | None = None) -> Path:
    """Write a first study for a cohort: a commented STUDY.yaml, its settings chosen by what is measured of the cohort.

    Stain, size of the patches, preset, arms and folds are chosen, and the reasons stand beside them.

    Parameters
    ----------
    cohort : str, Path or Cohort
        Folder of the cohort, with a split or without.
    out : str or Path
        The file to write; one that is there already stays as it is.
    preset : str, optional
        paper, best or demo [default: best where this machine has a GPU, otherwise demo].

    Returns
    -------
    Path
        The file, for :func:`plan_study` and :func:`run_study`.
    """
    from counterstain.devices import choose_device
    from counterstain.recipe import PRESETS
    from counterstain.storage import write_text
    from counterstain.study.init import first_study

    out = Path(out)
    if out.exists():
        raise InputError(f"{out}: is there already, perhaps with changes of yours; give --out another name")
    if preset not in {None, *PRESETS}:
        raise ConfigError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
    text = first_study(open_cohort(cohort), out, preset=preset, gpu=choose_device().type == "cuda")
    write_text(out, text)
    return out


@verb
def headroom(
    cohort: PathLike | Cohort,
    *,
    out: PathLike,
    patients: Numbers | None = None,
    repeats: int = 3,
    split: str = "val",
    preset: str | None = "best",
    config: PathLike | None = None,
    settings: Settings | None = None,
    seed: int = 0,
    arms: str | None = None,
) -> Headroom:
    """Draw the learning curve of the baseline: where it is flat, no generator can help.

    If interrupted, the same command continues.

    Parameters
    ----------
    out : str or Path
        Folder of the trainings, the table and the figure.
    patients : str or sequence of int, optional
        Numbers of training patients, such as 6,12,24 [default: all, half, a quarter, …].
    repeats : int
        Trainings at each number, with other patients and seeds.
    split : str
        val or test: what is tested on.
    seed : int
        Of the choice of patients and of the trainings.
    arms : str, optional
        Arms to draw beside the baseline, such as diffusion+100,diffusion+only (synthetic patches alone): at every
        number of patients, their generators are trained on those patients only.
    cohort, preset, config, settings
        As for :func:`train`.
    """
    from counterstain.config import build
    from counterstain.progress import bar
    from counterstain.report.figures import headroom_figure, save_figure
    from counterstain.study.headroom import HeadroomConfig, measure_headroom, sizes_of

    chosen = {"patients": numbers_of(patients, "patients"), "repeats": repeats, "split": split, "seed": seed}
    wanted = build(HeadroomConfig, chosen | {"arms": tuple((arms or "subtype").split(","))}, "headroom")
    opened, out = open_cohort(cohort), Path(out)
    opened.positions("train"), opened.positions(wanted.split)
    recipe = recipe_of(preset, config, settings)
    points = len(sizes_of(wanted, len(opened.patients("train")))) * repeats * (1 + len(wanted.arms))
    with bar("headroom", points) as advance:
        found = measure_headroom(opened, recipe, wanted, out, ran=lambda: advance(1))
    figure = headroom_figure(found)
    for kind in ("svg", "png"):
        save_figure(figure, out / f"headroom.{kind}")
    return found


@verb
def run_study(
    study: PathLike | StudyConfig,
    *,
    out: PathLike | None = None,
    executor: str = "local",
    processes: int | None = None,
    address: str | None = None,
    settings: Settings | None = None,
    logger: str | None = None,
) -> Path:
    """Run a study and write its report.

    If interrupted or changed, the same command continues: only what is not there yet is made.

    Parameters
    ----------
    study : str, Path or StudyConfig
        The study, STUDY.yaml.
    out : str or Path, optional
        Folder of the study [default: out/NAME_OF_THE_FILE].
    executor : str
        Where cells run: local, or ray (a cluster).
    processes : int, optional
        Processes on this machine, with resources.threads threads each [default: one cell after another].
    address : str, optional
        A running Ray cluster, or auto [default: a new one on this machine alone].
    settings : mapping or sequence of str, optional
        A change to the study, for example repeats=2.
    logger : str, optional
        As for :func:`train`.

    Returns
    -------
    Path
        The report; the tables are in the folder ``results`` beside it.
    """
    from counterstain.processes import executor_of

    where = executor_of(executor, processes, address)
    changes = [*assignments(settings), *([] if logger is None else [f"resources.logger={check_logger(logger)}"])]
    loaded, source, run = _loaded(study, out, changes)
    return _run_and_report(loaded, run, source, where)


@verb
def test_study(
    run: PathLike,
    cohort: PathLike | Cohort,
    *,
    split: str = "all",
    name: str | None = None,
    executor: str = "local",
    processes: int | None = None,
    address: str | None = None,
) -> Path:
    """Evaluate every arm and repeat of a finished study on another cohort, and compare the arms there.

    The report gets a section of its own for it. If interrupted, the same command continues.

    Parameters
    ----------
    run : str or Path
        Folder of the study (--out of study run).
    cohort : str, Path or Cohort
        Another cohort with the study's resolution, of patients that it has not trained on; import it with the study's
        subtypes (--taxonomy-of), of which some may be absent.
    split : str
        train, val, test, or all regions, also of a cohort without a split.
    name : str, optional
        What the test is called [default: the cohort's folder].
    executor, processes, address
        As for :func:`run_study`.

    Returns
    -------
    Path
        Folder of counts.parquet (pixels per arm, repeat, slide and label), results.csv (every measure per arm and
        repeat) and differences.csv (paired differences from the baseline, with 95 % intervals and p-values).
    """
    from counterstain.processes import executor_of
    from counterstain.report.page import write_external, write_report
    from counterstain.study.external import evaluate_on

    where = executor_of(executor, processes, address)
    folder = evaluate_on(Path(run), open_cohort(cohort), split=split, name=name, executor=where)
    write_external(Path(run), folder)
    write_report(Path(run), command="study test")
    return folder


@verb
def demo(*, out: PathLike = "out/demo", processes: int | None = None, settings: Settings | None = None) -> Path:
    """Run everything in minutes on two CPU cores: phantom, generators, synthetic sets, segmenters, report.

    Parameters
    ----------
    out : str or Path
        Folder of the study.
    processes : int, optional
        Processes of one thread each [default: one per core].
    settings : mapping or sequence of str, optional
        A change to the study, for example repeats=2.
    """
    import os
    from importlib import resources

    from counterstain.processes import executor_of

    # Networks as small as these gain next to nothing from a second thread.
    count = processes if processes is not None else min(os.cpu_count() or 1, MOST_DEMO_PROCESSES)
    where = executor_of("local", count, None)
    with resources.as_file(resources.files("counterstain") / "presets" / "study_demo.yaml") as file:
        study, _, run = _loaded(file, out, assignments(settings))
        return _run_and_report(study, run, "demo", where)


@verb
def plan_study(
    study: PathLike | StudyConfig,
    *,
    out: PathLike | None = None,
    processes: int | None = None,
    timing: bool = False,
    settings: Settings | None = None,
) -> StudyPlan:
    """Show what a study is made of, what is done, and what time and disk the rest will take. Makes nothing of it.

    Parameters
    ----------
    processes : int, optional
        As many cells at once, with resources.threads threads each [default: one cell after another].
    timing : bool
        Time a few steps of each network that was not timed on this machine before.
    study, out, settings
        As for :func:`run_study`.
    """
    from counterstain.progress import bar
    from counterstain.study.cells import CELLS
    from counterstain.study.config import lacking
    from counterstain.study.estimate import Estimate
    from counterstain.study.plan import plan_study as plan
    from counterstain.study.records import unreviewed
    from counterstain.study.status import state_of

    loaded, source, run = _loaded(study, out, assignments(settings))
    recipe = loaded.resolved_recipe(source)
    planned = plan(loaded, recipe, run / CELLS)
    estimate = Estimate(loaded, planned, threads=loaded.resources.threads or (None if processes is None else 1))
    if timing and estimate.untimed():
        with bar("timing", len(estimate.untimed())) as advance:
            estimate.measure(run / CELLS, advance)
    state = state_of(run, planned, estimate.expected())
    todo = [cell for cell in planned if state.states[cell.folder] != "done"]
    untimed = (f"{work.cell.name}{estimate.failures.get(work.key, '')}" for work in estimate.untimed())
    lines = tuple(lacking(recipe, todo)), tuple(untimed)
    return StudyPlan(loaded.name, run, state, *lines, estimate.picture_bytes, tuple(unreviewed(planned, run / CELLS)))


@verb
def study_status(run: PathLike) -> StudyState:
    """Show what of a study is done, runs, failed and is left; from any process, also while it runs.

    Parameters
    ----------
    run : str or Path
        Folder of the study (--out of study run).
    """
    from counterstain.study.status import read_plan, state_of

    return state_of(Path(run), read_plan(Path(run)))


@verb
def clean_study(
    study: PathLike | StudyConfig,
    *,
    out: PathLike | None = None,
    dry_run: bool = False,
    settings: Settings | None = None,
) -> list[Leftover]:
    """Delete the folders of cells that the study's plan no longer refers to, and return them; the command asks first.

    Synthetic sets that somebody has reviewed are kept.

    Parameters
    ----------
    dry_run : bool
        Only say what would be deleted.
    study, out, settings
        As for :func:`run_study`.
    """
    from counterstain.storage import claim, stage_of
    from counterstain.study.cells import CELLS
    from counterstain.study.external import cells_of_tests
    from counterstain.study.plan import plan_study as plan
    from counterstain.study.run import leftovers, locked, remove

    loaded, source, run = _loaded(study, out, assignments(settings))
    if stage_of(run) != "study":
        raise InputError(f"{run}: not the folder of a study; give the one of 'study run' with --out")
    claim(run, "study", {"name": loaded.name})  # of another study, nothing would be referred to
    with locked(run):
        planned = {cell.folder for cell in plan(loaded, loaded.resolved_recipe(source), run / CELLS)}
        found = leftovers(run / CELLS, planned | cells_of_tests(run))
        if not dry_run:
            remove(found)
    return found


@verb
def report(
    run: PathLike, *, out: PathLike | None = None, figures: PathLike | None = None, tables: PathLike | None = None
) -> Path:
    """Write one self-contained page with the figures, tables and findings of a study.

    Parameters
    ----------
    run : str or Path
        Folder of a study that has run, or its results folder.
    out : str or Path, optional
        The file to write [default: RUN/report.html].
    figures : str or Path, optional
        Folder to write each figure to as well, as SVG and PNG.
    tables : str or Path, optional
        Folder to write the tables to as well, as CSV and LaTeX.
    """
    from counterstain.report.page import write_figures, write_report, write_tables

    page = write_report(Path(run), None if out is None else Path(out))
    if figures is not None:
        write_figures(Path(run), Path(figures))
    if tables is not None:
        write_tables(Path(run), Path(tables))
    return page


def _loaded(
    study: PathLike | StudyConfig, out: PathLike | None, settings: list[str]
) -> tuple[StudyConfig, str | Path, Path]:
    """Return a study, where it comes from for messages, and its folder."""
    from counterstain.study.config import StudyConfig, load_study

    if isinstance(study, StudyConfig):
        if settings:
            raise ConfigError("settings go over a file; change the StudyConfig itself")
        return study, "study", Path(out or Path("out") / study.name)
    file = Path(study)
    return load_study(file, settings), file, Path(out or Path("out") / file.stem)


def _run_and_report(study: StudyConfig, out: Path, source: str | Path, executor: ExecutorConfig) -> Path:
    from counterstain.report.page import write_report
    from counterstain.storage import read_json
    from counterstain.study.run import run_study as run

    results = run(study, out, source=source, executor=executor)
    failed: Any = read_json(results / "study.json")["failed"]
    if failed and (results / "results.csv").stat().st_size < 2:
        why = failed[0]["why"].partition("\n")[0]
        raise InputError(f"{results.parent}: no arm has a result; the first failure: {failed[0]['cell']}: {why}")
    return write_report(results.parent, command="study run")
