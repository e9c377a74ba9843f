"""Scores of slides from the subtypes that their tissue is made of."""

import json

import numpy as np
import pandas as pd
import pytest
from drawn_cohort import HER2
from typer.testing import CliRunner

import counterstain as cs
from counterstain.cli import app
from counterstain.data.cohort import Cohort, CohortWriter
from counterstain.data.region_store import Region
from counterstain.errors import ConfigError, InputError, MismatchError
from counterstain.report.patch_figures import scores
from counterstain.segmentation import score as score_module
from counterstain.segmentation.areas import Areas, SlidePart, areas_in, nuclei_in
from counterstain.segmentation.score import agreement, calibrate, scored
from counterstain.taxonomy import ScoreRule, Taxonomy

PX, RULE = 100, HER2.score_rule("2018")
SHARES = {  # of the rows of a region, by subtype; in situ growth is left out of the score
    "strong": ({4: 12, 1: 40, 5: 40}, "3+", "3"),
    "some-strong": ({4: 4, 1: 46}, "2+", "2+"),
    "weak": ({3: 15, 1: 35}, "2+", "2"),
    "faint": ({2: 20, 1: 30}, "1+", "0"),
    "none": ({2: 3, 1: 57}, "0", "0"),
    "in-situ": ({5: 60}, None, None),
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Cohort:
    writer = CohortWriter(tmp_path_factory.mktemp("score") / "cohort", HER2, mpp=0.5, source={"kind": "drawn"})
    for name, (rows, _, known) in SHARES.items():
        instances, start = np.zeros((PX, PX), np.int32), 0
        for instance, count in rows.items():
            instances[start : start + count] = instance
            start += count
        subtypes = dict(zip(rows, rows, strict=True))
        image = np.full((PX, PX, 3), 230, np.uint8)
        about = {"region": name, "slide": name, "patient": name, "score": known}
        writer.add(name, [Region(**about, image=image, instances=instances, subtypes=subtypes)])
    return writer.finish()


def of_patients(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["level"] == "patient"].set_index("patient")


def test_a_planted_composition_has_the_score_of_the_rule(cohort, tmp_path):
    table = of_patients(cs.score(cohort, out=tmp_path / "s"))
    assert table["score"].to_dict() == {name: score for name, (_, score, _) in SHARES.items()}
    assert table.loc["strong", "share_HER2 3+"] == pytest.approx(12 / 92)
    assert table.loc["strong", "area_mm2"] == pytest.approx(52 * PX * 0.25e-6)


def test_the_rule_of_2007_asks_for_more_strong_staining(cohort, tmp_path):
    table = of_patients(cs.score(cohort, out=tmp_path / "s", rule="2007"))
    assert table.loc[["strong", "none"], "score"].tolist() == ["2+", "1+"]


def test_known_scores_are_compared_however_they_are_written(cohort, tmp_path):
    found = cs.score(cohort, out=tmp_path / "s").attrs["agreement"]
    assert (found.equal, found.within_one) == (0.8, 1.0)
    assert found.confusion.loc["0", "1+"] == 1
    assert found.kappa[1] <= found.kappa[0] <= found.kappa[2]
    perfect = agreement(["0", "1", "3+"], ["0", "1+", "3+"], RULE)
    assert perfect.kappa[0] == 1
    assert agreement(["odd", None], ["0", "0"], RULE) is None


def test_the_command_says_that_scores_are_no_diagnosis(cohort, tmp_path):
    result = CliRunner().invoke(app, ["score", str(cohort.folder), "--out", str(tmp_path / "s")])
    assert result.exit_code == 0, result.output
    assert "research use only, not for diagnosis" in result.output
    assert {"score.csv", "score.png", "score.json", "confusion.csv"} <= {
        file.name for file in (tmp_path / "s").iterdir()
    }
    assert "not for diagnosis" in json.loads((tmp_path / "s" / "score.json").read_text())["notice"]


def planted(rng: np.random.Generator, share: float, sure: float = 1.0, units: int = 30) -> list[SlidePart]:
    """A slide whose regions have different shares of 3+ around a mean, seen by a segmenter that is ``sure``."""
    parts = []
    for region, strong in enumerate(rng.beta(20 * share, 20 * (1 - share), units)):
        seen = np.eye(5)[[0, 3]] * sure + np.eye(5)[[3, 0]] * (1 - sure)
        px = np.array([1 - strong, strong]) * 1e6
        areas = Areas(np.zeros(2, np.int64), np.array([1, 4]), px, np.full(2, np.nan), seen)
        parts.append(SlidePart("s", "p", str(region), 1.0, areas))
    return parts


@pytest.mark.parametrize("share", [0.05, 0.095, 0.105, 0.2])
def test_the_interval_covers_the_score_of_the_tissue_that_regions_were_taken_from(share):
    rng, truth = np.random.default_rng(0), 3 if share > 0.1 else 2
    covered = 0
    for _ in range(40):
        row = scored(planted(rng, share), HER2, RULE).iloc[0]
        covered += RULE.scores.index(row["low"]) <= truth <= RULE.scores.index(row["high"])
    assert covered >= 36


def test_an_unsure_segmenter_has_a_wider_interval():
    rng = np.random.default_rng(0)
    sure, unsure = (scored(planted(rng, 0.03, s), HER2, RULE).iloc[0] for s in (1.0, 0.8))
    assert (sure["low"], sure["high"]) == ("2+", "2+")
    assert unsure["high"] == "3+"
    chances = [f"probability_{score}" for score in RULE.scores]
    assert unsure[chances].sum() == pytest.approx(1)


def test_areas_are_cut_at_tiles_and_take_the_mean_probability():
    labels = np.zeros((8, 8), np.uint8)
    labels[1:3, 1:7], labels[6, 6] = 2, 1
    shares = np.stack([np.full((8, 8), 0.25), np.full((8, 8), 0.75)])
    nuclei = np.array([[1, 1], [2, 2], [0, 0], [6, 6]])
    found = areas_in(labels, 2, 4, shares=shares, nuclei=nuclei)
    assert sorted(zip(found.subtype, found.area_px, found.cells, strict=True)) == [(1, 1, 1), (2, 6, 0), (2, 6, 2)]
    assert len({*found.tile.tolist()}) == 3
    np.testing.assert_allclose(found.shares, [[0.25, 0.75]] * 3)


def test_nuclei_are_counted_where_pixels_are_fine_enough():
    y, x = np.mgrid[:128, :128]
    image = np.full((128, 128, 3), (235, 225, 235), np.uint8)
    for cy, cx in ((30, 30), (30, 80), (90, 40), (100, 100)):
        image[(y - cy) ** 2 + (x - cx) ** 2 < 36] = (90, 80, 150)
    image[60:70] = (140, 90, 50)  # DAB
    found = nuclei_in(image, 0.5)
    assert len(found) == 4
    assert nuclei_in(image, 2.0) is None


def test_the_temperature_undoes_what_a_segmenter_is_too_sure_of(cohort, monkeypatch):
    rng, true = np.random.default_rng(0), cohort.write_split(dict.fromkeys(SHARES, "val"))

    class Sure:
        def __init__(self, position: int) -> None:
            labels = true.cut(position, 0, 0, PX, PX).label_mask
            drawn = rng.normal(size=(5, PX, PX))
            right = np.eye(6)[labels][..., 1:].transpose(2, 0, 1)
            self._logits = (4 * (drawn + right)).astype(np.float32)  # log odds of 1 are told as 4

        def logits(self) -> np.ndarray:
            return self._logits

    monkeypatch.setattr(score_module, "canvases_of", lambda *_: ((n, Sure(n)) for n in range(len(true))))
    found = calibrate(None, true, "cpu", 0)
    assert found.temperature == pytest.approx(4, rel=0.1)
    assert found.ece < found.ece_before / 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rule": "2013"}, InputError, "--rule 2013: unknown; her2 has 2018, 2007"),
        ({"by": "weight"}, ConfigError, "--by weight: expected area or cells"),
        ({"regions": "auto"}, InputError, "are for slides"),
        ({"calibration": "elsewhere"}, ConfigError, "give --segmenter too"),
        ({"split": "val"}, InputError, "no region in split 'val'"),
    ],
)
def test_what_cannot_be_scored_is_refused(cohort, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        cs.score(cohort, out=tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_rules_of_a_file_are_checked_against_the_subtypes(cohort, tmp_path):
    file = tmp_path / "rule.yaml"
    file.write_text(
        "counted: [HER2 0, HER2 3+]\nsteps: [{score: high, subtypes: [HER2 3+], above: 0.2}]\notherwise: low\n"
    )
    table = of_patients(cs.score(cohort, out=tmp_path / "s", rule=str(file)))
    assert table.loc[["strong", "some-strong"], "score"].tolist() == ["high", "low"]
    file.write_text("counted: [odd]\nsteps: [{score: high, subtypes: [odd], above: 0.2}]\notherwise: low\n")
    with pytest.raises(cs.TaxonomyError, match="unknown subtype 'odd'"):
        HER2.score_rule(file)
    with pytest.raises(ConfigError, match="which is not among counted"):
        ScoreRule(counted=("a",), steps=({"score": "x", "subtypes": ["b"], "above": 0.1},), otherwise="y")


def step(score: str, above: float, *subtypes: str) -> dict:
    return {"score": score, "subtypes": subtypes, "above": above}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([step("3", 0.3, "b"), step("2", 0.1, "b"), step("3", 0.1, "a")], r"step 3 \(3\) is above 2 too"),
        ([step("3", 0.1, "a", "b"), step("2", 0.1, "b")], r"step 2 \(2\) never holds"),
        ([step("1", 0.3, "b"), step("2", 0.1, "b")], r"otherwise \(1\) is above 2 too"),
        ([step("3", 0.1, "b", "b")], "names a subtype twice"),
    ],
)
def test_steps_that_contradict_each_other_are_refused(steps, message):
    with pytest.raises(ConfigError, match=message):
        ScoreRule(counted=("a", "b"), steps=steps, otherwise="1")


def test_the_picture_shows_what_the_rule_counts(cohort, tmp_path):
    table = cs.score(cohort, out=tmp_path / "s")
    axes = scores(table, HER2, RULE).axes[0]
    assert axes.get_xlabel() == "share of the tumour without LCIS/DCIS (%)"
    strong = table[table["level"] == "patient"]["patient"].tolist().index("strong")
    widths = [bars[strong].get_width() for bars in axes.containers]
    assert widths == pytest.approx([100 * share / 52 for share in (40, 0, 0, 12)])


def test_a_taxonomy_keeps_its_own_rules_and_the_built_in_one_is_saved_as_before():
    assert "score_rules" not in HER2.model_dump()
    rules = {"main": {"counted": ["HER2 0"], "steps": [{"score": "y", "subtypes": ["HER2 0"], "above": 0}]}}
    rules["main"]["otherwise"] = "x"
    own = Taxonomy(**HER2.model_dump() | {"score_rules": rules})
    assert Taxonomy(**own.model_dump()).score_rule().scores == ("x", "y")
    with pytest.raises(InputError, match="has no score rules"):
        HER2.merged("stained").score_rule()


def test_slides_need_a_segmenter_that_tells_subtypes(tmp_path, small_segmenters):
    cohort, tissue, subtypes = small_segmenters
    with pytest.raises(MismatchError, match="--set segmenter"):
        cs.score(cohort, out=tmp_path / "s", segmenter=tissue)
    table = cs.score(cohort, out=tmp_path / "t", segmenter=subtypes)
    assert set(table["patient"]) == set(cohort.patients("test"))
    assert table.attrs["calibration"].patients == len(cohort.patients("val"))
    (tmp_path / "images").mkdir()
    cs.export(cohort, out=tmp_path / "png", format="png")
    image = next((tmp_path / "png").rglob("*.png"))
    with pytest.raises(InputError, match="give --segmenter"):
        cs.score(image, out=tmp_path / "u")
    slide = cs.score(image, out=tmp_path / "u", segmenter=subtypes, mpp_level0=cohort.mpp)
    assert slide["level"].tolist() == ["slide", "patient"]


@pytest.fixture(scope="module")
def small_segmenters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmenters")
    cs.make_phantom(folder / "cohort", slides=6, regions=1, size_px=64, mpp=2.0)
    cohort = Cohort.open(folder / "cohort")
    parts = dict(zip(cohort.regions["patient"], ["train"] * 4 + ["val", "test"], strict=True))
    cohort = cohort.write_split(parts)
    settings = {"size_px": 32, "segmenter.training.steps": 2, "segmenter.encoder_depth": 3}
    settings |= {"segmenter.decoder_channels": [32, 24, 16], "segmenter.training.batch_size": 2}
    made = []
    for classes in ("tissue", "subtypes"):
        given = settings | {"segmenter.classes": classes}
        made.append(cs.segment(folder / "cohort", out=folder / classes, preset="demo", settings=given))
    return cohort, *made
