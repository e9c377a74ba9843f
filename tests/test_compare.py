"""Two arms compared region by region."""

import json

import numpy as np
import pytest
from drawn_cohort import draw_cohort
from drawn_study import ARMS, draw_study

from counterstain.errors import InputError
from counterstain.segmentation.evaluate import evaluate
from counterstain.study.compare import compare_regions, table_of


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    cohort = draw_cohort(folder / "cohort", regions=3)
    return folder / "run", cohort, draw_study(folder / "run", cohort)


def right_px(segmenter, cohort):
    counts = evaluate(segmenter, cohort, "test")
    tumour = counts["subtype"] > 0
    return int(counts.loc[tumour, "predicted_tumour"].sum() + counts.loc[~tumour, "predicted_background"].sum())


def test_regions_where_the_arms_differ_most_come_first_and_all_pixels_are_accounted_for(study):
    run, cohort, (baseline, arm) = study
    found = compare_regions(run, ARMS[1])
    table = table_of(found)
    assert sorted(table["region"]) == ["p4-0", "p4-1", "p4-2"]
    assert table["disagreement"].is_monotonic_decreasing
    assert table["better_px"].sum() - table["worse_px"].sum() == right_px(arm, cohort) - right_px(baseline, cohort)
    assert compare_regions(run, ARMS[1], most=1)[0].region == found[0].region
    assert "oracle+100 and subtype differ in" in repr(found[0])


def test_a_picture_shows_tissue_reference_both_arms_and_where_they_differ(study):
    run, cohort, _ = study
    region = compare_regions(run, ARMS[1], most=1)[0]
    image, instances = cohort.read(int(np.flatnonzero(cohort.regions["region"] == region.region)[0]))
    assert np.array_equal(region.image, image)
    assert np.array_equal(region.labels > 0, instances > 0)
    assert (region.reference() != image).any(axis=2).sum() < (instances > 0).sum()
    blue, orange = ((region.difference() == colour).all(axis=2) for colour, _ in region.colours.values())
    assert (int(blue.sum()), int(orange.sum())) == (region.better_px, region.worse_px)
    assert ((blue | orange) == (region.baseline != region.arm)).all()


def test_looking_is_put_on_record(study):
    run = study[0]
    before = (run / "looks.jsonl").read_text().count("\n") if (run / "looks.jsonl").exists() else 0
    compare_regions(run, ARMS[1], most=1)
    lines = (run / "looks.jsonl").read_text().splitlines()
    assert len(lines) == before + 1
    assert json.loads(lines[-1])["command"] == "compare"


def test_the_command_line_writes_a_picture_of_each_region(study, run, tmp_path):
    folder = study[0]
    status, printed, _ = run("study", "compare", folder, "--arm", ARMS[1], "--out", tmp_path / "c", "--most", 2)
    assert status == 0
    assert "oracle+100 alone right" in printed
    assert len(list((tmp_path / "c").glob("*.png"))) == 2
    assert len((tmp_path / "c" / "regions.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("arm", "options", "message"),
    [
        ("spade+100", {}, r"arm 'spade\+100': expected one of subtype, oracle\+100"),
        ("subtype", {}, "subtype was given twice"),
        (ARMS[1], {"repeat": 3}, "repeat 3: arm subtype has the repeats 0 to 0"),
    ],
)
def test_what_the_study_does_not_have_is_named(study, arm, options, message):
    with pytest.raises(InputError, match=message):
        compare_regions(study[0], arm, **options)
