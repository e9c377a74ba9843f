"""A study on one cohort, its segmenters tested on another."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from drawn_cohort import HER2, draw_cohort, draw_region, store
from PIL import Image
from small_study import SMALL, small_study
from typer.testing import CliRunner

import counterstain as cs
from counterstain.cli import app
from counterstain.errors import InputError, LeakageError, MismatchError, StorageError
from counterstain.segmentation.inference import sliding_window_inference
from counterstain.segmentation.model import load_segmenter
from counterstain.study import executors
from counterstain.study.status import read_plan

TISSUE = Path(__file__).parents[2] / "shared" / "data" / "ebhi_seg"
CHANGES = {"cohort": {"path": "ours"}, "methods": [], "repeats": 2, "recipe": SMALL["recipe"]}


def draw_others(folder, *patients, **known):
    rng = np.random.default_rng(7)
    regions = [replace(draw_region(rng, f"{patient}-0", patient), **known) for patient in patients]
    return store(folder, *regions)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("external")
    draw_cohort(folder / "ours", regions=1)
    draw_others(folder / "theirs", "q0", "q1", "q2")
    cs.run_study(small_study(folder, **CHANGES), out=folder / "run")
    cs.test_study(folder / "run", folder / "theirs")
    return folder


@pytest.fixture
def study(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def by_hand(segmenter, cohort):
    """Dice and recalls of the predictions themselves."""
    model, header = load_segmenter(segmenter)
    images = [cohort.read(i)[0] for i in range(len(cohort))]
    predicted = sliding_window_inference(model, images, model.config.inference.windows(header.size_px))
    labels = cohort.taxonomy.num_labels
    hits, missed = np.zeros(labels), np.zeros(labels)
    for i, probability in enumerate(predicted):
        instances, subtypes = cohort.read(i)[1], cohort.subtypes(i)
        of_instance = np.array([subtypes.get(instance, 0) for instance in range(instances.max() + 1)])
        for label in range(labels):
            here = of_instance[instances] == label
            hits[label] += ((probability > 0.5) & here).sum()
            missed[label] += ((probability <= 0.5) & here).sum()
    tissue = (hits + missed)[1:]
    return 2 * hits[1:].sum() / (hits.sum() + tissue.sum()), hits[1:] / tissue


def check_by_hand(run, cohort):
    """Compare what a test on a cohort wrote with the predictions of each arm's segmenters."""
    tested = run / "external" / cohort.folder.name
    expected = {
        (row.arm, row.repeat): by_hand(run / "cells" / row.folder, cohort)
        for row in read_plan(run)
        if row.stage == "segmenter"
    }
    results, subtypes = pd.read_csv(tested / "results.csv").set_index(["arm", "repeat"]), cohort.taxonomy.subtypes
    assert sorted(results.index) == sorted(expected)
    for key, (dice, recalls) in expected.items():
        assert results.loc[key, "dice"] == pytest.approx(dice)
        assert results.loc[key, [f"recall_{s.name}" for s in subtypes]].to_numpy(float) == pytest.approx(recalls)
        counted = [recall for s, recall in zip(subtypes, recalls, strict=True) if s.counted]
        assert results.loc[key, "subtype_variance"] == pytest.approx(np.var(counted))
    effect = pd.read_csv(tested / "differences.csv").query("arm == 'tumor' and measure == 'dice'").iloc[0]
    repeats = {repeat for _, repeat in expected}
    assert effect["mean"] == pytest.approx(
        np.mean([expected["tumor", r][0] - expected["subtype", r][0] for r in repeats])
    )
    assert effect["low"] <= effect["mean"] <= effect["high"]
    return pd.read_parquet(tested / "counts.parquet")


def test_figures_on_another_cohort_are_those_of_the_predictions(finished):
    counts = check_by_hand(finished / "run", cs.Cohort.open(finished / "theirs"))
    assert set(counts["slide"]) == {"q0", "q1", "q2"}
    assert counts[["predicted_background", "predicted_tumour"]].to_numpy().sum() == 4 * 3 * 96 * 96


@pytest.mark.filterwarnings("ignore:split (val|test) has no")
@pytest.mark.skipif(not TISSUE.is_dir(), reason="the tissue is not here (../shared/data)")
def test_figures_on_the_other_half_of_real_tissue_are_those_of_the_predictions(tmp_path):
    table = pd.read_csv(TISSUE / "table.csv").groupby(["subtype", "patient"], sort=True).head(1)
    half = table["patient"].rank(method="dense").astype(int) % 2
    cohorts = {}
    for number, name in enumerate(("ours", "theirs")):
        rows = table[half == number].groupby("subtype").head(3)
        paths = {column: [str(TISSUE / path) for path in rows[column]] for column in ("image", "label")}
        rows.drop(columns="part").assign(**paths).to_csv(tmp_path / "table.csv", index=False)
        cohorts[name] = cs.import_table(tmp_path / "table.csv", mpp=0.25, out=tmp_path / name, tissue_class="lesion")
    cs.split(cohorts["ours"])
    cs.run_study(small_study(tmp_path, **CHANGES | {"repeats": 1}), out=tmp_path / "run")
    cs.test_study(tmp_path / "run", cohorts["theirs"])
    counts = check_by_hand(tmp_path / "run", cohorts["theirs"])
    assert counts[["predicted_background", "predicted_tumour"]].to_numpy().sum() == 2 * len(rows) * 224 * 224


def test_the_report_shows_the_other_cohort_and_files_of_its_tables(finished, tmp_path):
    html = cs.report(finished / "run", out=tmp_path / "r.html", tables=tmp_path).read_text()
    assert '<h3 id="external-theirs">theirs</h3>' in html
    assert "Differences from subtype-sampled on the external cohort theirs" in html
    assert {"external-theirs-effects.csv", "external-theirs-results.tex"} <= {f.name for f in tmp_path.iterdir()}


def test_an_interrupted_test_goes_on_and_a_finished_one_runs_nothing(study, monkeypatch, capsys):
    whole = (study / "run" / "external" / "theirs" / "results.csv").read_bytes()
    cells = [row.folder for row in read_plan(study / "run" / "external" / "theirs") if row.stage == "evaluation"]
    for folder in cells[1:]:
        shutil.rmtree(study / "run" / "cells" / folder)
    shutil.rmtree(study / "run" / "external")
    ran = []
    real = executors.run_cell
    monkeypatch.setattr(executors, "run_cell", lambda cell, root: ran.append(cell.folder) or real(cell, root))
    for _ in range(2):
        cs.test_study(study / "run", study / "theirs")
        assert (study / "run" / "external" / "theirs" / "results.csv").read_bytes() == whole
        assert ran == cells[1:]
    assert cs.clean_study(study / "study.yaml", out=study / "run") == []
    printed = CliRunner().invoke(app, ["study", "test", str(study / "run"), str(study / "theirs")])
    assert "difference in Dice" in printed.output


def test_patients_or_images_of_training_are_a_leak(study):
    with pytest.raises(LeakageError, match="has seen P0 of"):
        cs.test_study(study / "run", draw_others(study / "again", "P0", "q1"))
    image = cs.Cohort.open(study / "ours").read(0)[0]
    renamed = draw_others(study / "renamed", "q8", image=image)
    with pytest.raises(LeakageError, match=r"was trained on the image of region q8-0 .*, under another name"):
        cs.test_study(study / "run", renamed)


def test_another_cohort_of_the_same_name_or_no_study_is_refused(study, tmp_path):
    with pytest.raises(MismatchError, match="holds a test on another cohort"):
        cs.test_study(study / "run", draw_others(tmp_path / "theirs", "q5"))
    assert cs.test_study(study / "run", tmp_path / "theirs", name="more").name == "more"
    with pytest.raises(InputError, match="not the folder of a study that has finished"):
        cs.test_study(tmp_path, study / "theirs")


def test_results_of_segmenters_that_were_trained_anew_are_not_shown(study):
    study_file = small_study(study, **CHANGES | {"seed": 1})
    html = cs.run_study(study_file, out=study / "run").read_text()
    assert "has trained its segmenters anew since" in html
    assert "on the external cohort theirs" not in html


def test_a_cohort_that_lacks_subtypes_is_imported_with_those_of_a_segmenter(study, tmp_path):
    Image.fromarray(np.full((96, 96, 3), 200, np.uint8)).save(tmp_path / "image.png")
    label = np.zeros((96, 96), np.uint8)
    label[20:60, 20:60] = 255
    Image.fromarray(label).save(tmp_path / "label.png")
    (tmp_path / "table.csv").write_text("image,label,patient,subtype\nimage.png,label.png,x,HER2 1+\n")
    segmenter = next((study / "run" / "cells").glob("segmenter-*"))
    alone = cs.import_table(tmp_path / "table.csv", mpp=0.5, out=tmp_path / "alone")
    with pytest.raises(MismatchError, match="import the cohort with --taxonomy-of"):
        cs.evaluate(segmenter, alone, split="all")
    cohort = cs.import_table(tmp_path / "table.csv", mpp=0.5, out=tmp_path / "cohort", taxonomy_of=segmenter)
    assert cohort.taxonomy == HER2
    assert "HER2 3+" in cs.evaluate(segmenter, cohort, split="all").attrs["absent"]
    cs.test_study(study / "run", cohort)
    assert "The external cohort cohort contains no HER2 0, HER2 2+" in (study / "run" / "report.html").read_text()


def test_changed_results_are_not_tested_on_nor_shown(study):
    theirs, run = study / "theirs", study / "run"
    tested = next(row.folder for row in read_plan(run / "external" / "theirs") if row.stage == "evaluation")
    evaluated = run / "cells" / tested / "counts.parquet"
    shutil.copyfile(run / "results" / "counts.parquet", evaluated)
    whole = (run / "external" / "theirs" / "results.csv").read_bytes()
    cs.test_study(run, theirs)  # makes the changed cell again
    assert (run / "external" / "theirs" / "results.csv").read_bytes() == whole
    (run / "external" / "theirs" / "test.json").unlink()
    with pytest.raises(StorageError, match=r"test\.json: missing, or changed .* give its 'study test' again"):
        cs.report(run)
    results = run / "results" / "results.csv"
    results.write_text(results.read_text().replace("0.", "0.9", 1))
    with pytest.raises(StorageError, match=r"results\.csv: missing, or changed since it was written"):
        cs.test_study(run, theirs)


def test_a_segmenter_that_was_changed_after_the_study_is_not_tested(study):
    segmenter = next(row.folder for row in read_plan(study / "run") if (row.stage, row.arm) == ("segmenter", "tumor"))
    weights = study / "run" / "cells" / segmenter / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(StorageError, match=r"evaluation tumor #0 on others: .*damaged \(its hash differs"):
        cs.test_study(study / "run", draw_others(study / "others", "q4", "q5", "q6"))
    assert not (study / "run" / "external" / "others").exists()
