"""Test a finished study on another cohort: all its segmenters, with results as of the study's own test set.

RUN/external/NAME holds ``test.json`` (what was tested on which cohort), ``counts.parquet`` and ``results.csv`` as
RUN/results does, with ``external`` as their split, and ``plan.json``, the cells in RUN/cells that they come from. Of
a cross-validated study, the segmenters of every fold are tested on all patients, and their counts are added up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from counterstain.checkpoints import read_header
from counterstain.data.cohort import Cohort
from counterstain.data.split import patient_key
from counterstain.errors import InputError, MismatchError, StorageError
from counterstain.processes import ExecutorConfig
from counterstain.segmentation.evaluate import check_evaluable, regions_of
from counterstain.storage import committing, name_on_disk, read_json, write_csv, write_json, write_sealed
from counterstain.study.cells import CELLS, EXTERNAL, REFERENCE, Cell, cohort_cell
from counterstain.study.config import Resources
from counterstain.study.executors import open_executor
from counterstain.study.results import about_cohort, counts_of, measures_table
from counterstain.study.run import locked, run_cells, whole_cells
from counterstain.study.stages import follow_cohort
from counterstain.study.status import FILES_FILE, CellRow, damage, is_done, notes_of, read_plan, tests_of, write_plan


def evaluate_on(
    run: Path, cohort: Cohort, *, split: str = "all", name: str | None = None, executor: ExecutorConfig | None = None
) -> Path:
    """Evaluate every segmenter of a study on a cohort, write the results and return their folder.

    ``split`` is that of the cohort, or ``all``; ``name`` that of the test, by default the cohort's folder's.
    Evaluations are cells of the study, run by ``executor``: those that are done are kept, also by ``study clean``.

    Raises InputError where the study has not finished, or the cohort has no such split; StorageError where the study's
    results have changed since they were written; LeakageError where a patient of it was trained on, or an image
    under another name; MismatchError where the cohort has other subtypes or another resolution, or the name belongs to
    another cohort.
    """
    root, segmenters = run / CELLS, _segmenters(run)
    headers = [read_header(root / row.folder) for row in segmenters]
    for row, header in zip(segmenters, headers, strict=True):
        check_evaluable(root / row.folder, header, cohort, split)
    place = run / EXTERNAL / name_on_disk(name or cohort.folder.resolve().name)
    _check_same(place, cohort, split)
    where = cohort_cell(cohort)
    cells = [where, *(_evaluation(row, where, split) for row in segmenters)]
    failures: dict[str, str] = {}
    with locked(run):
        done = whole_cells(cells, root)
        follow_cohort(where, root)
        if len(done) < len(cells):
            opened = open_executor(executor or ExecutorConfig(), Resources(), root)
            try:
                failures = run_cells(cells, done, root, opened, retries=Resources().retries)
            finally:
                opened.stop()
        counts = counts_of(cells, root).assign(split=EXTERNAL)
        known = set(map(patient_key, pd.read_parquet(run / "results" / "counts.parquet")["patient"].unique()))
        with committing(place) as folder:
            tested = regions_of(cohort, split)
            size = {"regions": len(tested), "patients": {EXTERNAL: int(tested["patient"].nunique())}}
            about = {"name": place.name, "cohort": about_cohort(cohort) | size, "split": split}
            trained = [
                {"arm": row.arm, "repeat": row.repeat, "sha256": header.sha256}
                | ({"fold": row.fold} if row.fold else {})
                for row, header in zip(segmenters, headers, strict=True)
            ]
            also = sorted(patient for patient in counts["patient"].unique() if patient_key(patient) in known)
            failed = [{"cell": cell, "why": why} for cell, why in failures.items()]
            write_json(folder / "test.json", about | {"segmenters": trained, "also_in_study": also, "failed": failed})
            counts.to_parquet(folder / "counts.parquet", index=False)
            write_csv(folder / "results.csv", measures_table(counts, cohort.taxonomy))
            write_plan(folder, cells)
            write_sealed(folder / FILES_FILE, {"files": notes_of(folder)})
    return place


def cells_of_tests(run: Path) -> set[str]:
    """Return the folders of all cells that tests of a study on other cohorts come from."""
    return {row.folder for place in tests_of(run) for row in read_plan(place)}


def _segmenters(run: Path) -> list[CellRow]:
    """Return the finished segmenters of a study that has results."""
    if not (run / "results" / "study.json").exists():
        raise InputError(f"{run}: not the folder of a study that has finished; give the one of 'study run'")
    if (run / "results" / FILES_FILE).exists() and (file := damage(run / "results", hashes=True, note=FILES_FILE)):
        raise StorageError(f"{run / 'results' / file}: missing, or changed since it was written; run the study again")
    planned = [row for row in read_plan(run) if row.stage == "segmenter" and row.arm]  # not those of cross-fitting
    unfinished = {(row.arm, row.repeat) for row in planned if not is_done(row, run / CELLS)}  # in some fold
    rows = [row for row in planned if (row.arm, row.repeat) not in unfinished]
    if REFERENCE not in {row.arm for row in rows}:
        raise InputError(f"{run}: no trained segmenter of the reference arm {REFERENCE!r}; run the study again")
    if any(row.repeat < 0 for row in rows):
        raise InputError(f"{run}: was made by an earlier version; run the study again, finished cells are kept")
    return rows


def _evaluation(row: CellRow, cohort: Cell, split: str) -> Cell:
    inputs = {"cohort": cohort.folder, "segmenter": row.folder}
    name = f"{row.name.replace('segmenter', 'evaluation', 1)} on {Path(cohort.details['path']).name}"
    whose: dict[str, Any] = {"arm": row.arm, "repeat": row.repeat, "fold": row.fold}
    return Cell(name=name, stage="evaluation", settings={"parts": [split]}, inputs=inputs, **whose)


def _check_same(place: Path, cohort: Cohort, split: str) -> None:
    if (place / "test.json").exists() and not damage(place, hashes=True, note=FILES_FILE):  # else it is made anew
        found = read_json(place / "test.json")
        if (found["cohort"]["fingerprint"], found["split"]) != (cohort.fingerprint, split):
            raise MismatchError(
                f"{place}: holds a test on another cohort, or on another split ({found['split']}); give this one a "
                "name with --name, or delete the folder"
            )
