"""Cross-fitting: what is hard, which amount serves, and that no patient is tested by what saw it."""

import json

import numpy as np
import pandas as pd
import pytest
from drawn_cohort import HER2, draw_cohort
from small_study import small_study

from counterstain.checkpoints import read_header
from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import PatchSet
from counterstain.data.split import split_of_fit
from counterstain.errors import ConfigError, InputError
from counterstain.segmentation.counts import TABLE_COLUMNS
from counterstain.study.config import load_study
from counterstain.study.plan import plan_study
from counterstain.study.run import run_study
from counterstain.study.stages import chosen_amount, hardness


def counts(missed, *, patients=("a", "b"), wrong_background=(0, 0), fit=0):
    """A slide per patient with 100 pixels of background and of each HER2 subtype, of which so many are missed."""
    rows = []
    for patient, wrong in zip(patients, wrong_background, strict=True):
        found = [(100 - wrong, wrong), *((miss, 100 - miss) for miss in missed), (0, 0)]
        rows += [(f"slide {patient}", patient, None, "test", label, *row) for label, row in enumerate(found)]
    return pd.DataFrame(rows, columns=list(TABLE_COLUMNS)).assign(fit=fit)


def test_each_fold_holds_out_other_training_patients_and_no_test_patient_is_in_any(tmp_path):
    cohort = draw_cohort(tmp_path, regions=1)  # p0, p1, p2 train, p3 validates, p4 tests
    splits = [split_of_fit(cohort, 3, fit, seed=0) for fit in (1, 2, 3)]
    held_out = [patient for split in splits for patient, part in split.items() if part == "test"]
    assert sorted(held_out) == ["p0", "p1", "p2"]
    assert all(split["p3"] == "val" and "p4" not in split for split in splits)
    with pytest.raises(InputError, match="3 training patients cannot be dealt into 4 parts"):
        split_of_fit(cohort, 4, 1, seed=0)


def test_subtypes_get_images_in_proportion_to_what_is_missed():
    found = hardness(counts([30, 10, 10, 0]), HER2)
    assert found["subtypes"] == pytest.approx({"HER2 0": 0.6, "HER2 1+": 0.2, "HER2 2+": 0.2, "HER2 3+": 0.0})
    kept = hardness(counts([30, 10, 10, 0]), HER2, keep=("HER2 0",))
    assert kept["subtypes"] == pytest.approx({"HER2 1+": 0.5, "HER2 2+": 0.5, "HER2 3+": 0.0})
    assert set(hardness(counts([0, 0, 0, 0]), HER2)["subtypes"].values()) == {0.25}


def test_slides_are_weighted_by_the_rank_of_their_errors():
    found = hardness(counts([10, 10, 10, 10], patients="abc", wrong_background=(5, 90, 20)), HER2)
    assert found["slides"] == {"slide a": 1, "slide b": 3, "slide c": 2}


def test_a_slide_of_which_nothing_is_counted_is_not_drawn():
    table = counts([10, 10, 10, 10], patients="abc", wrong_background=(5, 90, 20))
    pixels = ["predicted_background", "predicted_tumour"]
    table.loc[table["patient"] == "b", pixels] = 0
    assert hardness(table, HER2)["slides"] == {"slide a": 1, "slide c": 2}


def amounts(*dice_of_amounts):
    """Counts in which patient p has the Dice of (amount, patient)."""
    tables = {}
    for amount, scores in dice_of_amounts:
        rows = []
        for number, score in enumerate(scores):
            found = round(1000 * score / (2 - score))  # Dice of so many found of 1,000, none wrong
            rows += [(f"s{number}", f"p{number}", None, "test", label, *row) for label, row in
                     enumerate([(0, 0), (1000 - found, found), *[(0, 0)] * 4])]  # fmt: skip
        tables[amount] = pd.DataFrame(rows, columns=list(TABLE_COLUMNS)).assign(fit=0)
    return tables


def test_the_smallest_amount_within_a_standard_error_of_the_best_is_chosen():
    noisy = amounts((0.5, [0.80, 0.70, 0.75, 0.78]), (1.0, [0.75, 0.80, 0.70, 0.80]), (2.0, [0.5, 0.6, 0.5, 0.6]))
    assert chosen_amount(noisy)["amount"] == 0.5  # 1.0 is best, but not by a standard error
    clear = amounts((0.5, [0.70, 0.71, 0.70, 0.72]), (1.0, [0.80, 0.80, 0.81, 0.80]), (2.0, [0.81, 0.80, 0.80, 0.80]))
    found = chosen_amount(clear)
    assert (found["amount"], found["patients"]) == (1.0, 4)
    assert [row["amount"] for row in found["table"]] == [0.5, 1.0, 2.0]


def test_a_validation_patient_that_every_fold_tested_counts_once():
    one, two = amounts((0.5, [0.8, 0.6])), amounts((0.5, [0.8, 0.8]))
    both = {0.5: pd.concat([one[0.5], two[0.5].assign(fit=1)])}
    assert np.isclose(chosen_amount(both)["table"][0]["dice"], 0.75, atol=1e-3)


# In a study

CHANGES = {
    "methods": [],
    "baselines": ["subtype"],
    "cohort": {
        "phantom": {"slides": 9, "regions_per_slide": 1, "size_px": 64},
        "split": {"train": 5, "val": 2, "test": 2},
    },
    "repeats": 1,
}  # fmt: skip


def planned(tmp_path, *arms, **changes):
    study = load_study(small_study(tmp_path, **CHANGES | {"extra_arms": list(arms)} | changes))
    return study, plan_study(study, study.resolved_recipe("study"))


def test_hard_masks_follow_from_segmenters_of_the_training_part_alone(tmp_path):
    _, cells = planned(tmp_path, "oracle+100", "oracle+100+hard")
    by_folder = {cell.folder: cell for cell in cells}
    (hard,) = [cell for cell in cells if cell.stage == "hardness"]
    fits = [by_folder[folder] for role, folder in hard.inputs.items() if role != "cohort"]
    assert [cell.stage for cell in fits] == ["evaluation"] * 3
    assert len({cell.inputs["cohort"] for cell in fits}) == 3
    sets = {cell.set_name: cell for cell in cells if cell.stage == "synthetic"}
    assert sets["oracle+hard"].inputs["hardness"] == hard.folder
    assert "hardness" not in sets["oracle"].inputs
    assert all(by_folder[need] for cell in cells for need in cell.needs)
    seen = set()
    for cell in cells:  # each after all that it needs
        assert set(cell.needs) <= seen
        seen.add(cell.folder)


def test_arms_without_cross_fitting_keep_their_cells(tmp_path):
    without = {cell.folder for cell in planned(tmp_path, "oracle+100")[1]}
    assert without <= {cell.folder for cell in planned(tmp_path, "oracle+100", "oracle+100+hard", "oracle+auto")[1]}


def test_an_amount_is_tried_with_generators_of_each_fit(tmp_path):
    _, cells = planned(tmp_path, "spade+auto", amounts=[0.5, 1.0])
    trained = [cell for cell in cells if cell.stage == "spade"]
    assert sorted(cell.fit for cell in trained) == [0, 1, 2, 3]
    assert len({cell.inputs["cohort"] for cell in trained}) == 4
    (choice,) = [cell for cell in cells if cell.stage == "amount"]
    assert len(choice.inputs) == 1 + 3 * 2
    (auto,) = [cell for cell in cells if cell.stage == "segmenter" and cell.arm == "spade+auto"]
    assert auto.inputs["amount"] == choice.folder
    with pytest.raises(ConfigError, match="at least two that METHOD\\+auto"):
        planned(tmp_path, "spade+auto", amounts=[1.0])


def test_a_study_draws_hard_masks_and_chooses_an_amount(tmp_path):
    arms = ("oracle+auto", "oracle+100+hard")
    study, cells = planned(tmp_path, *arms, amounts=[0.5, 1.0], variants={"cross_fit": 2})
    results = run_study(study, tmp_path / "run")
    root = tmp_path / "run" / "cells"
    (hard,) = [cell for cell in cells if cell.stage == "hardness"]
    found = json.loads((root / hard.folder / "hardness.json").read_text())
    (drawn,) = [cell for cell in cells if cell.set_name == "oracle+hard"]
    synthesis = PatchSet.open(root / drawn.folder).header.settings["synthesis"]
    assert synthesis["relabel"]["target"] == found["subtypes"]
    assert synthesis["slides"] == found["slides"]
    cohort = Cohort.open(root / cells[0].folder / "cohort")
    assert set(found["slides"]) == set(cohort.regions.loc[cohort.regions["split"] == "train", "slide"])
    (choice,) = [cell for cell in cells if cell.stage == "amount"]
    amount = json.loads((root / choice.folder / "amount.json").read_text())
    recorded = json.loads((results / "study.json").read_text())["amounts"]
    assert recorded == {"oracle+auto": [amount["amount"]]}
    tried = pd.read_csv(results / "amounts.csv")
    assert tried["amount"].tolist() == [0.5, 1.0]
    assert tried[tried["chosen"]]["amount"].tolist() == recorded["oracle+auto"]
    assert amount["patients"] == 7  # of the training and validation parts
    (auto,) = [cell for cell in cells if cell.stage == "segmenter" and cell.arm == "oracle+auto"]
    assert read_header(root / auto.folder).notes["synthetic_patches"] == 64 * amount["amount"]
    for cell in cells:
        if cell.stage == "segmenter" and cell.fit:  # no held-out patient was seen, nor a test patient
            held_out = Cohort.open(root / cell.inputs["cohort"] / "cohort").patients("test")
            seen = read_header(root / cell.folder).patients_seen
            assert not {*held_out, *cohort.patients("val"), *cohort.patients("test")} & {*seen}
    assert set(pd.read_csv(results / "results.csv")["arm"]) == {"subtype", *arms}
    assert set(pd.read_csv(results / "fairness.csv")["arm"]) == {"subtype", *arms}
    assert run_study(study, tmp_path / "run") == results  # nothing is made again


def test_folds_of_a_cross_validation_cross_fit_their_own_training_patients(tmp_path):
    cohort = {"phantom": {"slides": 9, "regions_per_slide": 1, "size_px": 64}, "folds": 2}
    _, cells = planned(tmp_path, "spade+100+hard", "spade+auto", amounts=[0.5, 1.0], cohort=cohort)
    by_folder = {cell.folder: cell for cell in cells}
    assert len(by_folder) == len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        if cell.fit:
            assert all(by_folder[need].fold in {0, cell.fold} for need in cell.needs)
    assert [cell.fold for cell in cells if cell.stage == "hardness"] == [1, 2]
    assert len([cell for cell in cells if cell.stage == "cohort"]) == 1 + 2 + 2 * 3
