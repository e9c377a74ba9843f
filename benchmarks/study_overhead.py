"""Print what planning and status of a study of 10,000 cells take, and what a cell takes besides its own work."""

import resource
import tempfile
import time
from pathlib import Path

from counterstain.study.cells import Cell
from counterstain.study.config import StudyConfig
from counterstain.study.plan import plan_study
from counterstain.study.status import plan_tree, read_plan, stage_table, state_of, write_plan


def memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def show(what: str, start: float) -> None:
    print(f"{what}: {time.perf_counter() - start:.2f} s, peak memory {memory_mb():.0f} MB")


def main() -> None:
    print(f"libraries imported: {memory_mb():.0f} MB")
    study = StudyConfig.model_validate(
        {"name": "many", "cohort": {"phantom": {}}, "repeats": 357}  # 14 arms x 357 repeats x 2, and what they share
    )
    recipe = study.resolved_recipe("benchmark")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        start = time.perf_counter()
        cells = plan_study(study, recipe)
        plan_tree(state_of(run, cells), study.name)
        show(f"plan of {len(cells)} cells", start)
        write_plan(run, cells)
        start = time.perf_counter()
        stage_table(state_of(run, read_plan(run)))
        show("status when none is done", start)
        run_without_work(cells, run)
        start = time.perf_counter()
        stage_table(state_of(run, read_plan(run)))
        show("status when all are done", start)


def run_without_work(cells: list[Cell], run: Path) -> None:
    # Planning and status load no torch; running does.
    from counterstain.study import stages
    from counterstain.study.executors import InProcessExecutor
    from counterstain.study.run import run_cells

    print(f"libraries of the stages imported: {memory_mb():.0f} MB")
    stages.WORK.update(dict.fromkeys({cell.stage for cell in cells}, lambda *_: None))  # the work itself is left out
    start = time.perf_counter()
    run_cells(cells, set(), run / "cells", InProcessExecutor(run / "cells", 1), retries=0)
    show("running them without their work", start)
    print(f"overhead of a cell: {(time.perf_counter() - start) / len(cells) * 1000:.1f} ms")


if __name__ == "__main__":
    main()
