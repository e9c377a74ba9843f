import json
from concurrent.futures import ThreadPoolExecutor

from drawn_results import draw_results
from typer.testing import CliRunner

from counterstain.cli import app
from counterstain.report.results import looked_at, read_results
from counterstain.report.summary import looks_sentence
from counterstain.storage import claim
from counterstain.study.test_access_log import LOOKS_FILE, Look, read_looks, record_look, run_of, times_looked_at


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
