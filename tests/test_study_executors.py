import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_study import FOLDS, small_study

from counterstain.errors import ConfigError, DivergenceError, InputError, StorageError
from counterstain.processes import ExecutorConfig
from counterstain.report.results import read_results
from counterstain.storage import write_json
from counterstain.study.cells import Cell
from counterstain.study.config import load_study
from counterstain.study.executors import Outcome, ProcessExecutor, attempt
from counterstain.study.plan import plan_study
from counterstain.study.run import leftovers, remove, run_cells, run_study, whole_cells
from counterstain.study.status import (
    events_of,
    notes_of,
    plan_tree,
    read_plan,
    record,
    running_and_failed,
    stage_table,
    state_of,
    time_left,
    what_it_takes,
)

HERE = Path(__file__).parent


def cell(name, *needs, stage="segmenter"):
    return Cell(name=name, stage=stage, settings={"name": name}, inputs={need.folder: need.folder for need in needs})


A = cell("a")
B = cell("b", A)
C = cell("c", A)
D = cell("d", B, C)
DIAMOND = [A, B, C, D]


class Recorder:
    """An executor of nothing: cells end as they are told to."""

    name, slots, queue = "recorder", 2, 2

    def __init__(self, ends=None):
        self.ends, self.log, self.taken = ends or {}, [], []

    @property
    def order(self):
        return [line.removeprefix("start ") for line in self.log if line.startswith("start")]

    def start(self, cell):
        self.log.append(f"start {cell.name}")
        self.taken.append(cell)

    def stop(self):
        pass

    def wait(self):
        cell = self.taken.pop(0)
        self.log.append(f"end {cell.name}")
        ends = self.ends.get(cell.name, [])
        return [ends.pop(0)(cell) if ends else Outcome(cell, seconds=1.0)]


def lost(cell):
    return Outcome(cell, lost=True)


def ended_process():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        return process.pid


def small(folder, **changes):
    study = load_study(small_study(folder, **changes))
    return study, plan_study(study, study.resolved_recipe("study"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    run_study(small(folder, amounts=[2.0], repeats=1)[0], folder / "run")
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """The finished study again: itself, its cells, its folder and the bytes of its results."""
    run = shutil.copytree(finished / "run", tmp_path / "run")
    return *small(tmp_path, amounts=[2.0], repeats=1), run, (run / "results" / "results.csv").read_bytes()


def test_a_cell_starts_when_all_that_it_needs_is_done(tmp_path):
    executor = Recorder()
    assert run_cells(DIAMOND, {A.folder}, tmp_path / "cells", executor, retries=0) == {}
    assert executor.log == ["start b", "start c", "end b", "end c", "start d", "end d"]


def test_a_failed_cell_takes_along_only_what_depends_on_it(tmp_path):
    executor = Recorder({"b": [lambda cell: Outcome(cell, DivergenceError("nan"))]})
    failed = run_cells(DIAMOND, set(), tmp_path / "cells", executor, retries=0)
    assert failed == {"b": "nan", "d": "an input of it failed"}
    assert executor.order == ["a", "b", "c"]


def test_a_lost_cell_starts_again_but_not_for_ever(tmp_path):
    executor = Recorder({"a": [lost, lost]})
    assert run_cells(DIAMOND, set(), tmp_path / "cells", executor, retries=2) == {}
    assert executor.order == ["a", "a", "a", "b", "c", "d"]
    failed = run_cells([A], set(), tmp_path / "cells", Recorder({"a": [lost, lost]}), retries=1)
    assert failed == {"a": "its process was lost 2 times; perhaps memory ran out"}


def test_resources_default_to_the_threads_and_change_no_name(tmp_path):
    _, before = small(tmp_path)
    study, after = small(tmp_path, resources={"threads": 4, "stages": {"spade": {"gpus": 0.5}}})
    names = {one.folder for one in before if one.stage != "shards"}
    assert names == {one.folder for one in after}
    assert (study.resources.of("spade"), study.resources.of("segmenter")) == ((4, 0.5), (4, 0))


def test_a_set_drawn_in_shards_by_several_cells_is_the_same_set(finished, tmp_path):
    _, cells = small(tmp_path, amounts=[2.0], repeats=1, resources={"threads": 1})
    drawn = [one for one in cells if one.stage == "synthetic"]
    whole = tmp_path / "run" / "cells"
    shutil.copytree(finished / "run" / "cells", whole, ignore=shutil.ignore_patterns("synthetic-*", "shards-*"))
    assert attempt(drawn[0], whole, 1).error is None
    files = notes_of(whole / drawn[0].folder)
    assert sum(name.endswith("hashes.json") for name in files) > 1
    assert files == notes_of(finished / "run" / "cells" / drawn[0].folder)


@pytest.mark.parametrize("stage", ["spade", "synthetic", "evaluation", "cohort"])
def test_a_damaged_file_is_said_and_made_again_the_same(copied, stage, capsys):
    study, cells, run, whole = copied
    folder = next(run / "cells" / one.folder for one in cells if one.stage == stage)
    largest = max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content if stage != "spade" else content[:-1])
    noted = len(events_of(run))
    run_study(study, run)
    assert f"{largest} is damaged or missing; the cell is made again" in capsys.readouterr().err
    assert [event["stage"] for event in events_of(run)[noted:] if event["event"] == "start"] == [stage]
    assert (run / "results" / "results.csv").read_bytes() == whole


@pytest.mark.parametrize("name", ["segmenter-*/losses.csv", "spade-*/cell.json", "synthetic-*/shards/*/hashes.json"])
def test_small_files_are_mended_as_well_and_changed_results_are_refused(copied, name):
    study, _, run, whole = copied
    file = min((run / "cells").glob(name))
    content = file.read_bytes()
    file.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    table = run / "results" / "results.csv"
    table.write_bytes(whole.replace(b"0.", b"1.", 1))
    with pytest.raises(StorageError, match=r"results.csv: missing, or changed since it was written"):
        read_results(run)
    run_study(study, run)
    assert table.read_bytes() == whole
    assert len(read_results(run).losses)
    assert whole_cells(copied[1], run / "cells") == {one.folder for one in copied[1]}


def test_a_cohort_whose_process_is_lost_again_and_again_ends_the_study_in_one_line(tmp_path, monkeypatch):
    study, cells = small(tmp_path)
    monkeypatch.setattr("counterstain.study.run.open_executor", lambda *_: Recorder({cells[0].name: [lost] * 9}))
    with pytest.raises(InputError, match=r"cannot go on \(its process was lost 3 times; perhaps memory ran out\)"):
        run_study(study, tmp_path / "run")


def test_a_damaged_plan_is_named(copied):
    (copied[2] / "plan.json").write_text("[[1, 2]]")
    with pytest.raises(StorageError, match=r"plan.json: damaged; give the command that wrote it"):
        read_plan(copied[2])


def test_a_full_disk_is_one_line_and_the_study_goes_on_afterwards(copied):
    study, cells, run, whole = copied
    shutil.rmtree(next(run / "cells" / one.folder for one in cells if one.stage == "segmenter"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"segmenter .*: .*; free some space and give the same command again"):
            run_study(study, run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run_study(study, run)
    assert (run / "results" / "results.csv").read_bytes() == whole


def test_a_half_written_line_of_the_journal_is_passed_over(tmp_path):
    record(tmp_path, "start", A)
    file = next((tmp_path / "journal").iterdir())
    file.write_text(file.read_text() + '{"event": "fini')
    assert [event["event"] for event in events_of(tmp_path)] == ["start"]


def test_the_status_tells_running_from_interrupted_and_failed(tmp_path):
    for one, kind in ((A, "start"), (B, "start"), (C, "fail")):
        record(tmp_path, kind, one, why="loss is nan")
    file = next((tmp_path / "journal").iterdir())
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1]["pid"] = ended_process()
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = state_of(tmp_path, DIAMOND)
    assert list(state.states.values()) == ["running", "left", "failed", "left"]
    runs, failed = running_and_failed(state, 9)
    assert failed == "failed: c: loss is nan"
    assert runs.startswith("running: a, ")


def test_what_is_left_is_estimated_from_cells_of_the_same_stage_and_never_below_zero(tmp_path):
    told = time_left(state_of(tmp_path, DIAMOND), 2)
    assert told == "time not known: no cell of segmenter has finished"
    record(tmp_path, "finish", cell("y"), seconds=10.0, bytes=2_000_000)
    state = state_of(tmp_path, DIAMOND)
    assert (state.seconds_left(1), state.seconds_left(2), state.seconds_left(9)) == (40, 30, 30)  # a, b or c, d wait
    assert (
        "4 left\nabout 40 s of work (and up to a minute for starting, and for results and report), about 8.0 MB"
        in what_it_takes(state, tmp_path, 1)
    )
    record(tmp_path, "start", A)
    state = state_of(tmp_path, [A])
    assert time_left(replace(state, now=state.now + 11), 1).startswith("about 0 s of work")


def test_shards_of_a_set_that_is_whole_are_done(tmp_path):
    shards = cell("shards", stage="shards")
    whole = replace(cell("set", shards, stage="synthetic"), details={"count": 4})
    rows = [shards, whole]
    assert list(state_of(tmp_path, rows).states.values()) == ["left", "left"]
    write_json(tmp_path / "cells" / whole.folder / "cell.json", {"count": 4})
    assert list(state_of(tmp_path, rows).states.values()) == ["done", "done"]


def test_a_finished_study_shows_all_its_cells_done_and_they_are_whole(finished):
    _, cells = small(finished, amounts=[2.0], repeats=1)
    assert whole_cells(cells, finished / "run" / "cells") == {one.folder for one in cells}
    rows = read_plan(finished / "run")
    state = state_of(finished / "run", rows)
    assert set(state.states.values()) == {"done"}
    assert what_it_takes(state, finished / "run", 1) == f"{len(rows)} cells, {len(rows)} done, 0 left"
    assert stage_table(state).row_count == 6
    assert plan_tree(state, "small").children[0].label == "cohort: done"


def test_cleaning_takes_what_no_plan_refers_to(tmp_path):
    for name in ("kept-1", "old-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"123")
    found = leftovers(tmp_path, {"kept-1"})
    assert [(one.folder.name, one.size_bytes) for one in found] == [("old-2", 3)]
    remove(found)
    assert [folder.name for folder in tmp_path.iterdir()] == ["kept-1"]


def test_a_process_that_dies_loses_its_cell_alone(tmp_path):
    executor = ProcessExecutor(tmp_path / "cells", 1, threads=1)
    try:
        executor.start(A)
        multiprocessing.active_children()[0].kill()
        assert executor.wait() == [Outcome(A, lost=True)]
        executor.start(A)
        assert "KeyError: 'amount'" in str(executor.wait()[0].error)  # the traceback of the other process
    finally:
        executor.stop()


def test_a_process_that_is_stopped_saves_the_state_of_its_training(tmp_path):
    study = load_study(small_study(tmp_path), ["recipe.segmenter.training.steps=1000000"])
    cells = plan_study(study, study.resolved_recipe("study"))
    root = tmp_path / "run" / "cells"
    assert attempt(cells[0], root).error is None
    segmenter = next(one for one in cells if one.stage == "segmenter" and len(one.inputs) == 1)
    executor = ProcessExecutor(root, 1, threads=1)
    executor.start(segmenter)
    while not (root / segmenter.folder / "logs").exists():
        time.sleep(0.05)
    executor.stop()
    assert torch.load(root / segmenter.folder / "last.ckpt", weights_only=True)["step"] > 0


def test_ray_that_is_not_installed_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'counterstain\[ray\]'"):
        run_study(small(tmp_path)[0], tmp_path / "run", executor=ExecutorConfig(kind="ray"))


@pytest.mark.long
@pytest.mark.parametrize(("changes", "rows"), [({}, 5 * 2 * 2), (FOLDS, 2 * 2 * 2)], ids=["split", "folds"])
def test_processes_and_ray_nodes_give_the_results_of_one_process_byte_for_byte(tmp_path, changes, rows):
    pytest.importorskip("ray", reason="Ray is not installed: the extra [ray]", exc_type=ImportError)
    study = small_study(tmp_path, **changes)
    run_study(load_study(study), tmp_path / "one")
    run_study(load_study(study), tmp_path / "two", executor=ExecutorConfig(processes=2))
    for name, kill_after_cells in (("ray", 0), ("killed", 6)):
        command = [sys.executable, HERE / "two_nodes.py", study, tmp_path / name, str(kill_after_cells)]
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
        environment["RAY_worker_niceness"] = "0"  # by default they wait for all else that a shared machine does
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("killed" in done.stdout) == bool(kill_after_cells)
    results = [(tmp_path / name / "results/results.csv").read_bytes() for name in ("one", "two", "ray", "killed")]
    assert results[0].count(b"\n") == 1 + rows
    assert set(results) == {results[0]}
