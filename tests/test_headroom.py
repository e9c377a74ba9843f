import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from drawn_cohort import draw_cohort, draw_region

import counterstain as cs
from counterstain.checkpoints import read_header
from counterstain.cli import main
from counterstain.config import build
from counterstain.data.cohort import Cohort, CohortWriter
from counterstain.data.split import keep_training_patients, link_cohort, order_patients
from counterstain.errors import ConfigError, InputError
from counterstain.report.figures import headroom_figure
from counterstain.segmentation.counts import dice
from counterstain.study.arms import parse_arm
from counterstain.study.config import StudyConfig
from counterstain.study.headroom import (
    Curve,
    Headroom,
    HeadroomConfig,
    Step,
    bootstrapped,
    compared,
    extrapolate,
    fit_power_law,
    in_words,
    sizes_of,
    steps,
)
from counterstain.study.plan import plan_study
from counterstain.study.stages import open_cohort, run_cell
from counterstain.taxonomy import Taxonomy

SIZES = (6, 12, 24, 48)
TINY = ("segmenter.training={steps: 1, batch_size: 2}", "segmenter.encoder=tu-test_resnet", "size_px=32")


def scores(**counts):
    return {f"{score}{i}": score for score, count in counts.items() for i in range(count)}


def law(n, a=0.9, b=0.6, c=0.7):
    return a - b * np.asarray(n, float) ** -c


def counts_of(curve, noise, repeats=4, patients=8, seed=0):
    """Count tables (S, R, P, 2, 2) whose Dice is a curve with noise between repeats."""
    rng = np.random.default_rng(seed)
    values = np.clip(np.asarray(curve)[:, None, None] + noise * rng.normal(size=(len(curve), repeats, 1)), 0, 1)
    found = np.round(1e6 * np.broadcast_to(values, (len(curve), repeats, patients))).astype(int)
    wrong = 10**6 - found
    return np.stack([np.stack([wrong * 0, wrong], -1), np.stack([wrong, found], -1)], -2)


# Fewer training patients


@pytest.mark.parametrize("seed", range(5))
def test_the_first_patients_have_every_score_in_proportion(seed):
    given = scores(a=24, b=12, c=4)
    ordered = order_patients(given, seed)
    assert ordered == order_patients(given, seed) != order_patients(given, seed + 1)
    assert sorted(ordered) == sorted(given)
    for n in range(1, 41):
        found = Counter(given[patient] for patient in ordered[:n])
        assert all(abs(found[score] - n * share) <= 1 for score, share in {"a": 0.6, "b": 0.3, "c": 0.1}.items())


def test_a_linked_cohort_trains_on_fewer_and_leaves_the_whole_one_alone(tmp_path):
    whole = draw_cohort(tmp_path / "whole", regions=1)
    before = whole.fingerprint
    fewer = keep_training_patients(link_cohort(whole, tmp_path / "fewer"), 2, 0)
    assert len(fewer.patients("train")) == 2
    assert [fewer.patients(part) for part in ("val", "test")] == [whole.patients(part) for part in ("val", "test")]
    assert np.array_equal(fewer.read(1)[0], whole.read(1)[0])
    assert fewer.fingerprint != before == Cohort.open(tmp_path / "whole").fingerprint
    with pytest.raises(InputError, match="4 training patients are asked for, its training part has 3; give 3 at most"):
        keep_training_patients(whole, 4, 0)
    whole.source["patients_seen"] = ["from elsewhere"]  # behind generated images
    assert "from elsewhere" not in keep_training_patients(whole, 2, 0).regions["patient"].tolist()


@pytest.mark.parametrize("source", ["path", "phantom"])
def test_a_study_trains_on_so_many_patients(tmp_path, source):
    draw_cohort(tmp_path / "whole", regions=1)
    phantom = {"slides": 5, "regions_per_slide": 1, "size_px": 64}
    drawn = {"phantom": phantom, "split": {"train": 3, "val": 1, "test": 1}}
    given = {"path": tmp_path / "whole"} if source == "path" else drawn
    plain, *_ = plan_study(*study(given))
    cell, *_ = plan_study(*study({**given, "train_patients": 2}))
    assert cell.folder != plain.folder
    run_cell(cell, tmp_path / "cells")
    cohort = open_cohort(tmp_path / "cells" / cell.folder)
    assert [len(cohort.patients(part)) for part in ("train", "val", "test")] == [2, 1, 1]


def study(cohort):
    config = StudyConfig.model_validate({"name": "x", "preset": "demo", "methods": [], "cohort": cohort})
    return config, config.resolved_recipe("x")


# The curve


def test_sizes_double_up_to_all():
    assert sizes_of(HeadroomConfig(), 78) == (5, 10, 20, 39, 78)
    assert sizes_of(HeadroomConfig(patients=(24, 12)), 78) == (12, 24)
    with pytest.raises(InputError, match="3 training patients are too few"):
        sizes_of(HeadroomConfig(), 3)
    with pytest.raises(ConfigError, match="two different numbers"):
        build(HeadroomConfig, {"patients": [12, 12]})


def test_a_power_law_is_found_again_and_the_gain_of_twice_the_patients_lies_in_its_interval():
    assert fit_power_law(SIZES, law(SIZES)) == pytest.approx((0.9, 0.6, 0.7), abs=0.02)
    counts = counts_of(law(SIZES), noise=0.002)
    curve, draws = dice(counts.sum(2)).mean(1), bootstrapped(counts, dice, 0, draws=200)
    promised = extrapolate(SIZES, curve, draws, repeats=4, patients=8)
    assert promised.patients == 96
    assert promised.low <= law(96) - law(48) <= promised.high
    assert promised.high - promised.low < 0.03


@pytest.mark.parametrize(
    ("sizes", "repeats", "noise", "why"),
    [
        (SIZES[1:], 4, 0.002, "at least 4 numbers"),
        (SIZES, 2, 0.002, "at least 3 repeats"),
        (SIZES, 4, 0.2, "too uncertain"),
    ],
)
def test_a_gain_that_cannot_be_estimated_is_not_predicted(sizes, repeats, noise, why):
    counts = counts_of(law(sizes), noise, repeats)
    curve, draws = dice(counts.sum(2)).mean(1), bootstrapped(counts, dice, 0, draws=100)
    promised = extrapolate(sizes, curve, draws, repeats=repeats, patients=8)
    assert why in promised
    assert f"cannot be estimated: {promised}." in in_words("Dice", steps(sizes, curve, draws), promised)[-1]


def test_words_say_where_the_curve_is_steep():
    rise = Step(fewer=6, more=12, per_doubling=0.05, low=0.03, high=0.07)
    flat = Step(fewer=12, more=24, per_doubling=0.002, low=-0.01, high=0.01)
    few = Step(fewer=2, more=4, per_doubling=0.076, low=-0.1, high=0.2)
    fall = Step(fewer=4, more=16, per_doubling=-0.238, low=-0.3, high=-0.2)
    for found, words in (
        ([rise, flat], "steepest from 6 to 12 patients, +0.050 per doubling; flat at the end"),
        ([rise], "still steep at the end"),
        ([flat], "+0.002 per doubling from 12 to 24 patients; better data can bring little"),
        ([few], "too few trainings"),
        ([fall], "it falls, which more patients do not explain"),
    ):
        assert words in in_words("Dice", found, "")[0]


def drawn_curve(subtype):
    values = np.linspace(0.5, 0.9, 8).reshape(2, 4)
    step = Step(fewer=4, more=8, per_doubling=0.0, low=0.0, high=0.0)
    return Curve(subtype=subtype, scores=values, draws=values.T, steps=[step], predicted="too little")


def test_the_figure_has_the_colours_of_the_taxonomy_and_what_is_missing_is_named():
    her2 = Taxonomy.named("her2")
    curves = [drawn_curve(subtype) for subtype in (None, *her2.names[1:])]
    found = Headroom(sizes=(4, 8), curves=curves, split="val", taxonomy=her2)
    assert found.in_words()[-1] == "No recall of HER2 0: absent from the validation set."
    alone = Headroom(sizes=(4, 8), curves=[replace(curves[1], patients=1)], split="val", taxonomy=her2).in_words()[0]
    assert alone == "Recall of HER2 1+: measured on a single patient, so the curve says nothing about other patients."
    recalls = headroom_figure(found).axes[1]
    assert [line.get_color() for line in recalls.lines] == [subtype.colour for subtype in her2.subtypes[1:]]
    assert [text.get_text() for text in recalls.get_legend().get_texts()] == list(her2.names[1:])


# The command


@pytest.fixture
def cohort(tmp_path):
    rng = np.random.default_rng(0)
    writer = CohortWriter(tmp_path / "cohort", Taxonomy.named("her2"), 0.5, {"kind": "drawn"})
    for i in range(6):
        writer.add(f"p{i}", [draw_region(rng, f"p{i}-0", f"p{i}", 64)])
    return writer.finish().write_split({f"p{i}": "train" if i < 4 else "val" for i in range(6)})


def test_the_command_writes_table_figure_and_words_and_does_nothing_twice(cohort, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    settings = [word for setting in TINY for word in ("--set", setting)]
    line = ["counterstain", "headroom", cohort.folder, "--out", out, "--patients", "2,4", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in (*line, "--preset", "demo", *settings)])
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        printed = capsys.readouterr().out
        assert "Dice: " in printed
        assert "cannot be estimated: a power law needs at least 4 numbers of patients, found 2" in printed
        monkeypatch.setattr("counterstain.study.headroom.run_cell", lambda *_: pytest.fail("a cell ran twice"))
    table = pd.read_csv(out / "headroom.csv")
    assert table[["train_patients", "repeat"]].to_numpy().tolist() == [[2, 0], [4, 0]]
    assert {"dice", "recall_HER2 0", "subtype_variance"} <= set(table.columns)
    for name in ("headroom.svg", "headroom.png", "headroom.txt", "counts.parquet"):
        assert (out / name).stat().st_size > 0


def test_arms_are_drawn_beside_the_baseline_on_the_same_patients(cohort, tmp_path):
    small = ("spade.training={steps: 1, batch_size: 2}", "spade.generator_width=4", "spade.discriminator_width=4")
    mixing = "segmenter.mixing={epoch_patches: 8}"
    given = {"patients": [2, 4], "repeats": 2, "preset": "demo", "settings": [*TINY, *small, mixing]}
    alone = cs.headroom(cohort, out=tmp_path / "out", **given)
    found = cs.headroom(cohort, out=tmp_path / "out", arms="subtype,spade+only", **given)
    assert [curve.scores.tolist() for curve in found.curves[: len(alone.curves)]] == [
        curve.scores.tolist() for curve in alone.curves
    ]
    table = pd.read_csv(tmp_path / "out" / "headroom.csv")
    assert table.groupby("arm").size().to_dict() == {"subtype": 4, "spade+only": 4}
    assert "spade only against subtype-sampled, Dice (2 repeats and 2 patients are too few" in "\n".join(
        found.in_words()
    )
    cells = [p.name.partition("-")[0] for p in (tmp_path / "out" / "cells").iterdir()]
    assert cells.count("spade") == 3  # with all patients, repeats share the generator
    for folder in (tmp_path / "out" / "cells").glob("spade-*"):
        assert len(read_header(folder).patients_seen) in {2, 4}
    assert len(headroom_figure(found).axes) == len({curve.subtype for curve in found.curves})
    with pytest.raises(ConfigError, match="'spad' is not known; did you mean spade"):
        cs.headroom(cohort, out=tmp_path / "out", arms="spad+only", **given)


def test_synthetic_patches_alone_are_compared_with_real_ones_of_so_many_patients():
    base = Curve(
        subtype=None, scores=np.array([[0.5] * 3, [0.7] * 3]), draws=np.array([[0.5, 0.7]] * 4), steps=[], predicted=""
    )
    only = replace(base, scores=base.scores - 0.1, draws=base.draws - 0.1, arm=parse_arm("diffusion+only"))
    lines = compared(only, base, (4, 16))
    assert lines[1].startswith(
        "  4 patients: -0.100 (95 % interval -0.100 to -0.100); real patches of under 4 patients"
    )
    assert lines[2].endswith("real patches of about 8 patients do as well")
