import pandas as pd
import pytest
from small_study import SMALL, small_study

from counterstain.checkpoints import read_header
from counterstain.config import merge
from counterstain.report.page import write_report
from counterstain.report.results import read_results
from counterstain.storage import read_json
from counterstain.study.config import load_study
from counterstain.study.fairness import augmentation_of, departures, filter_of
from counterstain.study.plan import CELLS, plan_study
from counterstain.study.run import run_study
from counterstain.taxonomy import Taxonomy

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
