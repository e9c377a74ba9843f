"""What a study will take: timed once on a machine, then added up."""

from dataclasses import replace

import pytest
import yaml
from small_study import SMALL
from test_methods_registry import TOY

import counterstain as cs
from counterstain.errors import InputError
from counterstain.generators.methods import METHODS, register
from counterstain.storage import write_json
from counterstain.study.config import StudyConfig
from counterstain.study.status import Expected, record, state_of, time_left, what_it_takes


def study_of(**changes):
    return StudyConfig.model_validate(SMALL | {"repeats": 1} | changes)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A machine on which the small study was timed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        out = tmp_path_factory.mktemp("study") / "run"
        before = cs.plan_study(study_of(), out=out)
        after = cs.plan_study(study_of(), out=out, timing=True)
        yield before, after


def plan(tmp_path, **changes):
    return cs.plan_study(study_of(**changes), out=tmp_path / "run")


def seconds(found, stage):
    return sum(taken.seconds for row, taken in found.state.open if row.stage == stage)


def test_a_study_that_has_not_begun_is_timed_where_it_is_asked_for_and_makes_nothing(machine):
    before, after = machine
    assert before.untimed[:2] == ("cohort", "SPADE")
    assert after.untimed == ()
    assert all(taken.seconds > 0 for _, taken in after.state.open)
    told = what_it_takes(after.state, after.run, 2, after.picture_bytes)
    assert "of work, at least" in told
    assert "MB of disk" in told
    assert not after.run.exists()


def test_timings_are_found_again_for_other_amounts_repeats_and_lengths(machine, tmp_path):
    again = plan(tmp_path, repeats=3, amounts=[0.5, 4.0], recipe=SMALL["recipe"] | {
        "spade": SMALL["recipe"]["spade"] | {"training": {"steps": 2000, "batch_size": 2}}})  # fmt: skip
    assert again.untimed == ()
    assert seconds(again, "spade") > 10 * seconds(machine[1], "spade")
    assert seconds(again, "shards") == pytest.approx(2 * seconds(machine[1], "shards"))


def test_other_networks_and_other_threads_are_not_timed_yet(machine, tmp_path):
    wider = SMALL["recipe"] | {"spade": SMALL["recipe"]["spade"] | {"hidden": 8}}
    assert plan(tmp_path, recipe=wider).untimed == ("SPADE", "synthetic spade")
    assert "evaluation tumor #0" in plan(tmp_path, resources={"threads": 2}).untimed


def test_a_set_takes_what_its_shards_take_but_for_loading_its_network(machine, tmp_path):
    in_shards, whole = machine[1], plan(tmp_path, resources={"threads": 1})
    assert seconds(whole, "synthetic") == pytest.approx(seconds(in_shards, "shards") - seconds(in_shards, "synthetic"))


def test_what_finished_cells_took_corrects_the_rest_of_their_stage(machine, tmp_path):
    _, after = machine
    rows = [row for row in after.state.rows if row.stage == "segmenter"]
    expected = dict.fromkeys((row.folder for row in rows), Expected(10.0, 1e6))
    record(tmp_path, "finish", rows[0], seconds=30.0, bytes=1_000_000)
    write_json(tmp_path / "cells" / rows[0].folder / "cell.json", {})
    state = state_of(tmp_path, rows, expected)
    assert {taken.seconds for _, taken in state.open} == {30.0}
    assert time_left(replace(state, expected={}), 1) == time_left(state, 1)  # their mean, where nothing was timed


def test_a_method_of_another_package_is_timed_too(machine, tmp_path):
    recipe = {name: value for name, value in SMALL["recipe"].items() if name != "spade"} | {"toy": {"patches": 4}}
    with register(TOY):
        found = cs.plan_study(study_of(methods=["toy"], recipe=recipe), out=tmp_path / "run", timing=True)
    assert found.untimed == ()
    assert seconds(found, "toy") > 0


def test_a_study_is_timed_where_no_timing_can_be_kept(machine, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    recipe = {name: value for name, value in SMALL["recipe"].items() if name != "spade"} | {"toy": {"patches": 4}}
    with register(TOY):
        found = cs.plan_study(study_of(methods=["toy"], recipe=recipe), out=tmp_path / "run", timing=True)
    assert found.untimed == ()


def test_what_cannot_be_timed_is_named_and_the_rest_is_timed(machine, tmp_path):
    def train(*_args, **_options):
        raise InputError("the network is too large")

    broken = replace(METHODS["spade"].trainings[0], stage="broken", title="broken", train=train)
    with register(replace(METHODS["spade"], name="broken", trainings=(broken,))):
        recipe = SMALL["recipe"] | {"broken": SMALL["recipe"]["spade"]}
        found = cs.plan_study(study_of(methods=["broken"], recipe=recipe), out=tmp_path / "run", timing=True)
    assert found.untimed == ("broken: the network is too large", "synthetic broken: the network is too large")
    assert "without" in time_left(found.state, 1)
    assert seconds(found, "segmenter") > 0


def test_a_plan_without_times_says_how_to_get_them(run, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(SMALL | {"repeats": 1}))
    _, printed, _ = run("study", "plan", file, "--no-timing", "--out", tmp_path / "out")
    assert "the same command without --no-timing times them" in printed


def test_the_command_prints_the_plan_with_and_without_timing(run, machine, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(SMALL | {"repeats": 1}))
    status, printed, error = run("study", "plan", file, "--no-timing", "--out", tmp_path / "out")
    assert (status, error) == (0, "")
    assert "of work (and up to a minute for starting" in printed.replace("\n", " ")  # it was timed before
