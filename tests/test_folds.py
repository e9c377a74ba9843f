"""Cross-validation: every patient is tested once, by networks that never saw it."""

import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from drawn_cohort import draw_region, store
from hypothesis import given, settings
from hypothesis import strategies as st
from small_study import FOLDS, SMALL, small_study

import counterstain as cs
from counterstain.checkpoints import read_header
from counterstain.data.cohort import Cohort
from counterstain.data.composition import untrained_subtypes
from counterstain.data.patch_set import PatchSet
from counterstain.data.split import folds_of, split_into_folds
from counterstain.errors import ConfigError, DivergenceError, InputError, LeakageError
from counterstain.report.results import read_results
from counterstain.segmentation.evaluate import evaluate
from counterstain.storage import read_json
from counterstain.study import stages
from counterstain.study.config import load_study
from counterstain.study.plan import plan_study
from counterstain.study.run import run_study
from counterstain.study.stages import open_cohort
from counterstain.study.status import read_plan

EIGHT = dict(zip("abcdefgh", "00112223", strict=True))
TWO_ARMS = FOLDS | {
    "amounts": [1.0],
    "recipe": SMALL["recipe"] | {"segmenter": SMALL["recipe"]["segmenter"] | {"mixing": {"epoch_patches": 8}}},
}


def load(folder, *overrides, **changes):
    return load_study(small_study(folder, **TWO_ARMS | changes), list(overrides))


def planned(folder, *overrides, **changes):
    study = load(folder, *overrides, **changes)
    return plan_study(study, study.resolved_recipe("study"))


def draw_eight(folder):
    rng = np.random.default_rng(0)
    return store(folder, *(replace(draw_region(rng, f"{p}-0", p), score=score) for p, score in EIGHT.items()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folds")
    study = load(folder)
    run_study(study, folder / "run")
    return folder / "run", plan_study(study, study.resolved_recipe("study"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=4, max_size=50), st.integers(2, 9), st.integers(0, 3))
def test_every_patient_is_tested_once_and_each_score_is_shared_out(scores, folds, seed):
    patients, folds = dict(enumerate(scores)), min(folds, len(scores))
    splits = split_into_folds(patients, folds, 1, seed)
    assert Counter(p for split in splits for p, part in split.items() if part == "test") == dict.fromkeys(patients, 1)
    for split in splits:
        assert split.keys() == patients.keys()
        assert Counter(split.values()) >= Counter({"train": 1, "val": 1, "test": len(scores) // folds})
        for score in set(scores):
            tested = sum(part == "test" and patients[p] == score for p, part in split.items())
            assert abs(tested - scores.count(score) / folds) < 1


def test_forty_patients_in_five_folds_are_those_of_the_paper_and_validate_once():
    scores = {f"p{i:02d}": str(i % 4) for i in range(40)}
    splits = split_into_folds(scores, 5, 0.2, 0)
    for split in splits:
        counts = Counter((part, scores[patient]) for patient, part in split.items())
        assert counts == {(part, s): n for s in "0123" for part, n in (("train", 6), ("val", 2), ("test", 2))}
    validated = Counter(p for split in splits for p, part in split.items() if part == "val")
    assert validated == dict.fromkeys(scores, 1)
    assert split_into_folds(scores, 5, 0.2, 1) != splits


@pytest.mark.parametrize(("folds", "tested", "trained_on"), [(4, 2, 5), (8, 1, 6)])
def test_of_eight_patients_one_validates_and_the_only_one_of_a_score_trains_unless_it_is_tested(
    folds, tested, trained_on
):
    for split in split_into_folds(EIGHT, folds, 0.2, 0):
        assert Counter(split.values()) == {"train": trained_on, "val": 1, "test": tested}
        assert split["h"] != "val"  # the only patient of score 3


@pytest.mark.parametrize(("folds", "validation"), [(9, 0.2), (2, 4), (8, 7), (2, 0.5)])
def test_folds_that_leave_nobody_to_train_on_are_refused(folds, validation):
    with pytest.raises(InputError, match="leave nobody to train on"):
        split_into_folds(EIGHT, folds, validation, 0)


@pytest.mark.parametrize(
    ("cohort", "message"),
    [
        ({"folds": 1}, "folds"),
        ({"folds": 5, "split": {"train": 3, "val": 2, "test": 1}}, "split and folds exclude each other"),
        ({"validation": 0.3}, "validation is for folds"),
        ({"folds": 5, "validation": 1.5}, "a share below 1, or a whole number of patients"),
    ],
)
def test_settings_of_folds_that_make_no_sense_are_rejected(tmp_path, cohort, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, cohort={"phantom": {}} | cohort)


def test_a_redrawn_cohort_or_one_with_a_patient_of_two_names_has_no_folds(tmp_path):
    cohort = draw_eight(tmp_path / "cohort")
    cohort.source["patients_seen"] = ["a"]
    with pytest.raises(InputError, match="was redrawn by a generator"):
        folds_of(cohort, 4, 0.2, 0)
    region = Cohort.open(tmp_path / "cohort").regions
    again = Cohort.open(tmp_path / "cohort")
    again.regions = region.replace({"patient": {"b": "A "}})
    with pytest.raises(InputError, match="are probably one"):
        folds_of(again, 4, 0.2, 0)


def test_a_plan_warns_of_a_fold_that_trains_without_a_subtype(tmp_path):
    cohort = draw_eight(tmp_path / "cohort")
    cohort.instances = cohort.instances.assign(subtype=1 + (cohort.instances["region"] == "h-0"))
    splits = folds_of(cohort, 4, 0.2, 0)
    untrained = [number for number, split in enumerate(splits, 1) if split["h"] != "train"]
    assert list(untrained_subtypes(cohort, splits)) == [
        f"fold {number} trains without HER2 1+; only patient h has HER2 1+" for number in untrained
    ]
    cohort.instances = cohort.instances.assign(subtype=1)
    assert not list(untrained_subtypes(cohort, splits))


@pytest.mark.parametrize(("folds", "number"), [(4, 4), ("leave_one_out", 8)])
def test_a_plan_has_the_cells_of_a_split_once_for_each_fold(tmp_path, folds, number):
    draw_eight(tmp_path / "cohort")
    cohort = {"path": str(tmp_path / "cohort"), "folds": folds}
    counts = Counter(cell.stage for cell in planned(tmp_path, cohort=cohort, repeats=3))
    trained = {"segmenter": 2 * 3 * number, "evaluation": 2 * 3 * number}
    assert counts == {"cohort": 1 + number, "spade": number, "synthetic": number} | trained


def test_networks_of_an_unsplit_cohort_are_timed_once_for_all_folds(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    draw_eight(tmp_path / "cohort")
    study = load(tmp_path, cohort={"path": str(tmp_path / "cohort"), "folds": 4}, methods=[])
    plan = cs.plan_study(study, out=tmp_path / "run", timing=True)
    assert plan.untimed == ()
    assert len(list((tmp_path / "counterstain" / "timings").iterdir())) == 4  # two kinds of cohorts, and two networks
    assert len({taken for row, taken in plan.state.open if row.stage == "segmenter"}) == 1


@pytest.mark.parametrize("arms", [[], ["spade+200+hard", "spade+auto", "spade+100+filtered+masked"]])
def test_folds_share_no_cell_and_no_seed_and_arms_of_a_fold_share_theirs(tmp_path, arms):
    cells = [cell for cell in planned(tmp_path, amounts=[0.5, 1.0], extra_arms=arms) if cell.fold]
    of_fold = {cell.folder: cell.fold for cell in cells}
    assert len(of_fold) == len(cells)
    assert all(of_fold.get(need, cell.fold) == cell.fold for cell in cells for need in cell.needs)
    seeds = {}
    for cell in cells:
        if cell.stage == "segmenter" and not cell.fit:
            seeds.setdefault((cell.repeat, cell.fold), set()).add(cell.settings["seed"])
    assert [len(found) for found in seeds.values()] == [1] * 4
    assert len(set.union(*seeds.values())) == 4


def test_more_training_patients_than_a_fold_has_are_refused_and_fewer_are_chosen(tmp_path):
    draw_eight(tmp_path / "cohort")
    cohort = {"path": str(tmp_path / "cohort"), "folds": 4}
    with pytest.raises(InputError, match="6 training patients are asked for, a fold has 5"):
        planned(tmp_path, cohort=cohort | {"train_patients": 6})
    run = tmp_path / "run"
    run_study(load(tmp_path, methods=[], cohort=cohort | {"train_patients": 2}, repeats=1), run)
    assert {len(fold["train"]) for fold in read_json(run / "results" / "study.json")["folds"]} == {2}


def test_nothing_that_is_trained_or_drawn_for_a_fold_saw_its_test_or_validation_patients(finished):
    run, cells = finished
    checked = Counter()
    for cell in cells:
        folder = run / "cells" / cell.folder
        if cell.stage in {"synthetic", "spade", "segmenter"}:
            cohort = open_cohort(run / "cells" / cell.inputs["cohort"])
            seen = PatchSet.open(folder).header.patients_seen if cell.set_name else read_header(folder).patients_seen
            assert sorted(seen) == cohort.patients("train")
            assert not {*seen} & {*cohort.patients("test"), *cohort.patients("val")}
            checked[cell.stage] += 1
    assert checked == {"spade": 2, "synthetic": 2, "segmenter": 8}


def test_the_guard_against_leaks_stops_a_segmenter_on_the_patients_of_another_fold(finished):
    run, cells = finished
    first, second = (cell for cell in cells if cell.stage == "cohort" and cell.fold)
    segmenter = next(cell for cell in cells if cell.stage == "segmenter" and cell.fold == first.fold)
    with pytest.raises(LeakageError, match="has seen"):
        evaluate(run / "cells" / segmenter.folder, open_cohort(run / "cells" / second.folder), "test")


def test_results_are_those_of_all_patients_each_tested_once_in_every_arm_and_repeat(finished):
    run, _ = finished
    results = read_results(run)
    test = results.counts[results.counts["split"] == "test"]
    patients = {f"P0-{i:03d}" for i in range(6)}
    for _, rows in test.groupby(["arm", "repeat"]):
        assert set(rows["patient"]) == patients
        assert not rows.duplicated(["slide", "subtype"]).any()
    assert test[["predicted_background", "predicted_tumour"]].to_numpy().sum() == 2 * 2 * 6 * 64 * 64
    assert len(results.results) == 2 * 2 * 2  # arms, repeats, val and test
    assert sorted(patient for fold in results.study.folds for patient in fold["test"]) == sorted(patients)
    assert results.study.cohort.patients["test"] == 6
    shown = results.composition.groupby("subtype")["patient"].agg(set)
    lacking = [{s for s, having in shown.items() if not having & {*fold["train"]}} for fold in results.study.folds]
    assert [{*fold["lacking"]} for fold in results.study.folds] == lacking
    assert len(results.fairness) == 2 * 2 * 2
    assert results.composition["patient"].nunique() == 6
    assert sorted(found.fold for found in results.sets) == [1, 2]
    html = (cs.report(run)).read_text()
    assert "6, each tested once in 2 folds" in html
    assert "Folds share training patients" in html
    assert "within each of 2 repeats and 2 folds" in html


def test_a_repeat_that_failed_in_one_fold_is_left_out_in_all(finished, tmp_path, monkeypatch):
    def diverging(*_, label, **_options):
        raise DivergenceError(f"{label}: loss is nan")

    run, name = shutil.copytree(finished[0], tmp_path / "run"), "segmenter spade+100 #1, fold 2"
    shutil.rmtree(next(run / "cells" / cell.folder for cell in finished[1] if cell.name == name))
    shutil.rmtree(next(run / "cells" / cell.folder for cell in finished[1] if cell.name == f"evaluation{name[9:]}"))
    monkeypatch.setattr(stages, "train_segmenter", diverging)
    run_study(load(tmp_path), run)
    results = read_results(run)
    assert [failure.cell for failure in results.study.failed] == [name, f"evaluation{name[9:]}"]
    found = {*zip(results.results["arm"], results.results["repeat"], strict=True)}
    assert found == {("spade+100", 0), ("subtype", 0), ("subtype", 1)}
    assert "loss is nan" in cs.report(run).read_text()


def test_a_study_of_folds_goes_on_where_its_cohort_and_itself_were_moved_to(tmp_path):
    draw_eight(tmp_path / "here")
    changes = {"methods": [], "cohort": {"path": str(tmp_path / "here"), "folds": 2}, "repeats": 1}
    run_study(load(tmp_path, **changes), tmp_path / "run")
    changes["cohort"]["path"] = str((tmp_path / "here").rename(tmp_path / "there"))
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    before = len(read_plan(moved))
    run_study(load(tmp_path, **changes | {"repeats": 2}), moved)
    assert len(read_plan(moved)) == before + 4
    assert set(read_results(moved).results["repeat"]) == {0, 1}


def test_every_folds_segmenters_are_tested_on_another_cohort(finished, tmp_path):
    run, _ = finished
    rng = np.random.default_rng(3)
    others = store(tmp_path / "others", *(draw_region(rng, f"{p}-0", p) for p in ("q0", "q1", "q2")), mpp=1.0)
    folder = cs.test_study(run, others)
    counts = pd.read_parquet(folder / "counts.parquet")
    pixels = counts.groupby(["arm", "repeat", "patient"])[["predicted_background", "predicted_tumour"]].sum()
    assert len(pixels) == 2 * 2 * 3
    assert set(pixels.sum(axis=1)) == {2 * 96 * 96}  # of both folds
    assert len(read_json(folder / "test.json")["segmenters"]) == 2 * 2 * 2
    assert "on the external cohort others" in (run / "report.html").read_text()
    assert cs.clean_study(load(tmp_path), out=run) == []


# Merged subtypes


@pytest.mark.parametrize("source", ["split", "folds"])
def test_a_study_of_merged_subtypes_is_counted_by_them_and_by_the_original_ones(tmp_path, source):
    where = SMALL["cohort"] if source == "split" else FOLDS["cohort"]
    study = load(tmp_path, cohort=where | {"merge": "stained"}, methods=["spade"], repeats=1)
    results = run_study(study, tmp_path / "run")
    merged, original = pd.read_csv(results / "results.csv"), pd.read_csv(results / "unmerged" / "results.csv")
    assert {"recall_stained", "recall_non-stained"} <= set(merged)
    assert "recall_HER2 1+" not in merged
    assert {"recall_HER2 1+", "recall_HER2 3+"} <= set(original)
    assert merged["dice"].tolist() == original["dice"].tolist()
    assert merged["recall_non-stained"].tolist() == pytest.approx(original["recall_HER2 0"].tolist(), nan_ok=True)
    drawn = next((tmp_path / "run" / "cells").glob("synthetic-*"))
    assert PatchSet.open(drawn).header.taxonomy.names == ("non-stained", "stained", "LCIS/DCIS")
    assert read_results(results).study.taxonomy.name == "her2:stained"
    assert cs.report(tmp_path / "run").exists()


def test_a_merge_is_written_out_or_named_and_anything_else_is_refused(tmp_path):
    with_merge = lambda merge: planned(tmp_path, cohort=SMALL["cohort"] | {"merge": merge})  # noqa: E731
    assert len({with_merge(m)[-1].folder for m in (None, "stained", {"brown": ["HER2 2+", "HER2 3+"]})}) == 3
    for merge, why in (
        ("stain", "unknown merge 'stain'; her2 has stained"),
        ({"x": ["HER2 4+"]}, "unknown subtype 'HER2 4\\+'"),
        ({"x": ["HER2 0"], "y": ["HER2 0"]}, "each subtype once"),
        ({"HER2 3+": ["HER2 0"]}, "each subtype once"),
        ({"x": []}, "each group at least one"),
    ):
        with pytest.raises(InputError, match=why):
            with_merge(merge)
    with pytest.raises(ConfigError, match="oracle draws phantoms only"):
        planned(tmp_path, cohort=SMALL["cohort"] | {"merge": "stained"}, methods=["oracle"])
