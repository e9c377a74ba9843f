import json
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
from drawn_results import draw_results
from small_study import SMALL, small_study
from typer.testing import CliRunner

from counterstain.checkpoints import read_header
from counterstain.cli import app
from counterstain.config import merge
from counterstain.report.page import write_report
from counterstain.report.results import looked_at, read_results
from counterstain.report.summary import looks_sentence
from counterstain.storage import claim, read_json
from counterstain.study.cells import CELLS
from counterstain.study.config import load_study
from counterstain.study.plan import plan_study
from counterstain.study.records import (
    LOOKS_FILE,
    Look,
    augmentation_of,
    departures,
    filter_of,
    read_looks,
    record_look,
    run_of,
    times_looked_at,
)
from counterstain.study.run import run_study
from counterstain.taxonomy import Taxonomy


def look(command, *splits):
    return Look(time="2026-01-02T03:04:05+00:00", command=command, splits=splits)


def test_looks_are_counted_by_part_and_command(tmp_path):
    for command, splits in (("study run", ["val", "test"]), ("report", ["val", "test"]), ("evaluate", ["val"])):
        assert record_look(tmp_path, command, splits)
    looks = read_looks(tmp_path)
    assert times_looked_at(looks, "test") == {"study run": 1, "report": 1}
    assert times_looked_at(looks, "val").total() == 3


def test_looks_recorded_at_once_do_not_mix(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: record_look(tmp_path, "report", ["val", "test"]), range(100)))
    assert len(read_looks(tmp_path)) == 100


def test_a_damaged_line_is_passed_over_and_the_next_look_is_kept(tmp_path):
    record_look(tmp_path, "report", ["test"])
    whole = (tmp_path / LOOKS_FILE).read_bytes()
    (tmp_path / LOOKS_FILE).write_bytes(b'\xff\x00[1]\n{"time": 3}\n7\n' + whole + whole[: len(whole) // 2])
    record_look(tmp_path, "report", ["test"])
    assert len(read_looks(tmp_path)) == 2


def test_no_record_is_no_look(tmp_path):
    assert read_looks(tmp_path) == ()
    assert "no record" in looks_sentence(())


def test_a_place_that_cannot_be_written_to_is_no_reason_to_show_nothing(tmp_path):
    assert not record_look(tmp_path / "nowhere", "report", ["test"])
    (tmp_path / LOOKS_FILE).mkdir()
    assert not record_look(tmp_path, "report", ["test"])
    assert read_looks(tmp_path) == ()


def test_the_run_of_a_cell_is_found_and_a_foreign_run_json_is_passed_over(tmp_path):
    claim(tmp_path / "run", "study", {"name": "small"})
    cell = tmp_path / "run" / "cells" / "segmenter-1"
    cell.mkdir(parents=True)
    (tmp_path / "run" / "cells" / "run.json").write_text("[somebody's")
    assert run_of(cell) == run_of(tmp_path / "run") == (tmp_path / "run").resolve()
    assert run_of(tmp_path) is None


def test_the_sentence_says_how_often_and_by_which_command():
    said = looks_sentence([look("study run", "val", "test"), look("report", "val", "test"), look("evaluate", "val")])
    assert "validation results 3 times (evaluate 1, report 1, study run 1)" in said
    assert "test results twice (report 1, study run 1)" in said
    assert "since 2026-01-02" in said


def test_every_report_of_a_run_is_a_look_and_says_so(tmp_path):
    run = draw_results(tmp_path / "run", ("subtype", "spade+100"), 2, patients=2, methods=("spade",))
    (run / "run.json").write_text(json.dumps({"stage": "study", "settings": {}, "fingerprint": ""}))
    assert len(looked_at(read_results(run / "results"), "study run").looks) == 1
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 0, result.output
    assert "test results twice (report 1, study run 1)" in (run / "report.html").read_text()
    assert not (run / "results" / LOOKS_FILE).exists()


def test_a_copy_of_the_results_keeps_the_record_that_it_came_with(tmp_path):
    copy = draw_results(tmp_path / "run", ("subtype",), 2, patients=2) / "results"
    record_look(copy, "report", ["test"])
    before = read_looks(copy)
    assert looked_at(read_results(copy), "report").looks == before == read_looks(copy)


ARMS = ("subtype+weighted+stain+mixup+copypaste", "oracle+only", "oracle+100+anneal", "oracle+100+filtered")
JUDGE = {"training": {"steps": 2, "batch_size": 2}, "encoder": "tu-test_resnet"}
CHANGES = {
    "methods": [],
    "extra_arms": list(ARMS),
    "repeats": 1,
    "variants": {"filtered": {"masks": 2, "min_area_px": 20}},
    "recipe": merge(SMALL["recipe"], {"judge": JUDGE, "synthesis": {"attempts": 2}}),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fairness")
    study = load_study(small_study(folder, **CHANGES))
    run_study(study, folder / "run")
    return folder / "run", plan_study(study, study.resolved_recipe("study"))


def row(run, arm):
    table = read_results(run).fairness
    return table[table["arm"] == arm].iloc[0]


def test_every_arm_of_a_study_is_reported_with_what_each_training_was_given(finished):
    run, _ = finished
    assert set(read_results(run).results["arm"]) == {"tumor", "subtype", *ARMS}
    assert "subtype-sampled, weighted loss, stain jitter" in write_report(run).read_text()
    table = read_results(run).fairness
    assert len(table) == 6
    assert set(table["steps"]) == {2}
    assert set(table["batch_size"]) == {2}
    assert table["seed"].nunique() == table["settings"].nunique() == 1
    only = row(run, "oracle+only")
    assert (only["synthetic_set"], only["synthetic_patches"], only["synthetic_share"]) == ("oracle", 64, 1.0)
    annealed = row(run, "oracle+100+anneal")
    assert (annealed["schedule"], annealed["synthetic_share"]) == ("anneal", 0.75)  # of two steps: 1 and 1 / 2


def test_the_rejections_of_the_filter_are_on_record(finished):
    run, _ = finished
    filtered = row(run, "oracle+100+filtered")
    assert filtered["filter"] == "near white, judge agrees on 75 %"
    assert filtered["drawn"] - filtered["rejected"] == filtered["synthetic_patches"] == 64
    assert filtered["rejected"] > 0  # a judge of two steps agrees with nothing
    record = read_json(run / "results" / "study.json")["filter"]["oracle+filtered"]
    assert record["never_passed"] > 0
    assert {entry["subtype"] for entry in record["by_subtype"]} == set(Taxonomy.named("her2").names)
    assert any(entry["rejection_rate"] > 0 for entry in record["by_subtype"])


def test_the_weights_of_subtypes_are_on_record(finished):
    run, cells = finished
    (cell,) = [c for c in cells if c.stage == "segmenter" and c.arm == ARMS[0]]
    weights = read_header(run / CELLS / cell.folder).notes["label_weights"]
    assert len(set(weights.values())) > 1


def test_departures_from_equal_treatment_are_said(finished):
    run, _ = finished
    usual = "mirrored, quarter turns"
    assert list(departures(read_results(run).fairness)) == [
        f"augmentation: {usual}, stain jitter 0.1 (dab), mixup 0.4, copy-paste in {ARMS[0]}, {usual} in the others",
        f"weighting of subtypes: 1.0 in {ARMS[0]}, 0.0 in the others",
        "filter: near white in oracle+only, oracle+100+anneal; near white, judge agrees on 75 % in oracle+100+filtered",
    ]


def table(**columns):
    plain = {
        "arm": ["subtype", "a"], "repeat": 0, "steps": 5, "batch_size": 2, "seed": 1, "starts_from": "random",
        "settings": "x", "augmentation": "none", "subtype_weighting": 0.0, "synthetic_patches": [0, 4],
        "filter": ["", "none"],
    }  # fmt: skip
    return pd.DataFrame(plain | columns)


@pytest.mark.parametrize(
    ("columns", "lines"),
    [
        ({}, []),
        ({"steps": [5, 10]}, ["optimiser steps: 10 in a, 5 in the others"]),
        ({"settings": ["x", "y"]}, ["settings: y in a, x in the others"]),
        ({"seed": [1, 2]}, ["seeds: arms of repeat 0 have different ones"]),
    ],
)
def test_each_kind_of_departure_is_said(columns, lines):
    assert list(departures(table(**columns))) == lines


def test_words_for_settings_without_augmentation_or_filter():
    sampling = {"flip": False, "quarter_turns": False, "stain_jitter": 0.0, "stains": "channels"}
    assert augmentation_of({"sampling": sampling, "mixup_alpha": None, "copy_paste": None}) == "none"
    assert filter_of({"settings": {"synthesis": {"reject": "none"}}}) == "none"
