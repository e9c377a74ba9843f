"""A first study for the cohort at hand, and stains that are checked against it."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import counterstain as cs
from counterstain.data.region_store import Region
from counterstain.data.stains import STAIN_VECTORS, stain_shares

pytestmark = pytest.mark.filterwarnings("ignore:fold . trains without")  # so few patients are in these cohorts
SHARED = Path(__file__).parents[2] / "shared" / "data"


def stained(shape, other, amount, rng):
    """Tissue of haematoxylin with another stain where ``amount``, (H, W), says so."""
    blue, second = (np.array(STAIN_VECTORS[name]) for name in ("haematoxylin", other))
    density = rng.uniform(0.2, 0.6, (*shape, 1)) * blue + amount[..., None] * second
    return np.clip(255 * np.exp(-density), 1, 255).astype(np.uint8)


def tissue(folder, *, patients=6, other="eosin", subtypes=(1, 2), size_px=64, split=None):
    """A cohort with a box of each subtype per region; DAB inside the second, eosin everywhere."""
    rng = np.random.default_rng(0)
    taxonomy = cs.Taxonomy(
        name="gut", tissue_class="lesion",
        subtypes=tuple({"id": i, "name": name, "colour": "#4477aa"} for i, name in enumerate("abc", start=1)),
    )  # fmt: skip
    writer = cs.CohortWriter(folder, taxonomy, 0.5, {"kind": "drawn"})
    for patient in range(patients):
        instances = np.zeros((size_px, size_px), np.int32)
        for i in range(len(subtypes)):
            instances[4:20, 4 + 24 * i : 20 + 24 * i] = i + 1
        amount = np.where(instances == 2, 0.9, 0.1) if other == "dab" else np.ones_like(instances) * 0.9
        known = {"region": f"r{patient}", "slide": f"s{patient}", "patient": f"p{patient}"}
        image = stained(instances.shape, other, amount, rng)
        table = dict(enumerate(subtypes, start=1))
        writer.add(f"s{patient}", [Region(**known, image=image, instances=instances, subtypes=table)])
    cohort = writer.finish()
    parts = [
        part for part, count in zip(("train", "val", "test"), split or (), strict=bool(split)) for _ in range(count)
    ]
    return cohort.write_split({f"p{patient}": part for patient, part in enumerate(parts)}) if parts else cohort


def written(cohort, folder, **options):
    file = cs.init_study(cohort, out=folder / "study.yaml", **{"preset": "demo"} | options)
    return yaml.safe_load(file.read_text(encoding="utf-8")), cs.load_study(file)


def test_a_phantom_keeps_its_nuclei_and_changes_its_dab(tmp_path):
    cohort = cs.make_phantom(tmp_path / "cohort", slides=8, regions=1, size_px=128, mpp=2.0)
    text, study = written(cohort, tmp_path)
    assert text["cohort"] == {"path": "cohort", "folds": 4}
    assert text["recipe"]["diffusion"]["counterstain"] == {"shows": "contrast"}
    assert cs.plan_study(study).state.states


def test_tissue_in_h_and_e_gets_a_study_without_dab(tmp_path):
    text, study = written(tissue(tmp_path / "cohort"), tmp_path)
    assert "counterstain" not in text["recipe"]["diffusion"]
    assert text["recipe"]["synthesis"]["relabel"] == {"keep": ["c"]}
    assert text["cohort"]["folds"] == "leave_one_out"
    assert text["recipe"]["size_px"] == 32
    assert "HER2" not in (tmp_path / "study.yaml").read_text(encoding="utf-8")
    assert cs.plan_study(study).state.states


def test_subtypes_that_do_not_differ_in_dab_are_drawn_anew(tmp_path):
    assert "counterstain" in written(tissue(tmp_path / "dab", other="dab"), tmp_path)[0]["recipe"]["diffusion"]
    (tmp_path / "study.yaml").unlink()
    alike = tissue(tmp_path / "alike", other="dab", subtypes=(1, 1, 2)[:2])
    with pytest.raises(cs.InputError, match="all instances are a; a study compares subtypes"):
        written(alike, tmp_path)


@pytest.mark.parametrize(("split", "folds"), [((4, 2, 10), None), ((10, 3, 3), 5), (None, 5)])
def test_few_patients_to_test_on_take_turns(tmp_path, split, folds):
    text, _ = written(tissue(tmp_path / "cohort", patients=16, split=split), tmp_path)
    assert text["cohort"].get("folds") == folds


@pytest.mark.parametrize("preset", ["paper", "best", "demo"])
def test_patches_of_every_preset_fit_the_smallest_region(tmp_path, preset):
    cohort = tissue(tmp_path / "cohort", size_px=100)
    text, study = written(cohort, tmp_path, preset=preset)
    assert text["recipe"]["size_px"] <= 96
    assert cs.plan_study(study).state.states


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patients": 2}, "2 patients; a study needs three at least"),
        ({"size_px": 30, "subtypes": (1,)}, "all instances are a"),
        ({"size_px": 30, "subtypes": (1, 2)}, "networks need 32 px at least"),
    ],
)
def test_a_cohort_without_a_possible_study_is_refused(tmp_path, changes, message):
    with pytest.raises(cs.InputError, match=message):
        written(tissue(tmp_path / "cohort", **changes), tmp_path)
    assert not (tmp_path / "study.yaml").exists()


def test_a_file_that_is_there_stays(run, tmp_path):
    (tmp_path / "study.yaml").write_text("mine")
    status, _, error = run("init", tissue(tmp_path / "cohort").folder, "--out", tmp_path / "study.yaml")
    assert status == 2
    assert "is there already" in error
    assert (tmp_path / "study.yaml").read_text() == "mine"


def test_a_cohort_far_from_the_study_is_named_in_full(tmp_path):
    cohort = tissue(tmp_path / "data" / "cohort")
    (tmp_path / "a" / "b").mkdir(parents=True)
    text, _ = written(cohort, tmp_path / "a" / "b")
    assert text["cohort"]["path"] == str(tmp_path / "data" / "cohort")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"recipe": {"size_px": 32, "diffusion": {"counterstain": {}}}},
            r"^recipe.diffusion.counterstain.other_stain: dab, .*; set recipe.diffusion.counterstain.other_stain=eosin",
        ),
        (
            {"recipe": {"size_px": 32}, "extra_arms": ("subtype+stain",)},
            r"^variants.stains: .*; set variants.stains=eosin",
        ),
    ],
)
def test_a_study_that_takes_eosin_for_dab_is_refused(tmp_path, changes, said):
    cohort = {"path": tissue(tmp_path / "cohort").folder, "folds": 3}
    study = cs.StudyConfig(name="s", preset="demo", cohort=cohort, methods=("inpainting",), **changes)
    with pytest.raises(cs.ConfigError, match=said):
        cs.plan_study(study)
    spade = study.model_copy(update={"methods": ("spade",), "extra_arms": ()})  # which uses neither setting
    assert cs.plan_study(spade).state.states


def test_training_and_audits_check_the_stain_as_well(tmp_path):
    cohort = tissue(tmp_path / "cohort", other="dab", split=(4, 1, 1))
    eosin = {"spade.counterstain.other_stain": "eosin", "size_px": 32}
    with pytest.raises(cs.ConfigError, match=r"set spade.counterstain.other_stain=dab"):
        cs.train("spade", cohort, out=tmp_path / "spade", preset="demo", settings=eosin)
    jittered = {"segmenter.sampling.stain_jitter": 0.1, "segmenter.sampling.stains": "eosin", "size_px": 32}
    with pytest.raises(cs.ConfigError, match=r"set segmenter.sampling.stains=dab"):
        cs.segment(cohort, out=tmp_path / "segmenter", preset="demo", settings=jittered)
    with pytest.raises(cs.ConfigError, match="set stain=dab"):
        cs.audit(["set"], cohort=cohort, judge="judge", out=tmp_path / "audit", stain="eosin")


@pytest.mark.parametrize(("other", "stain"), [("dab", "dab"), ("eosin", "eosin"), (None, None)])
def test_the_stain_is_told_by_its_colour(other, stain):
    rng = np.random.default_rng(1)
    amount = np.zeros((64, 64)) if other is None else rng.uniform(0, 1.5, (64, 64))
    assert stain_shares([stained((64, 64), other or "dab", amount, rng)]).stain == stain


@pytest.mark.parametrize(
    ("name", "options", "keeps_nuclei"),
    [
        ("her2_spots", {"labels": "ids", "taxonomy": "her2", "mpp": 0.5, "shrink": 4}, True),
        ("ebhi_seg", {"mpp": 0.25, "threshold": 127, "tissue_class": "lesion"}, False),
    ],
)
def test_real_tissue_gets_a_study_of_its_stain(tmp_path, name, options, keeps_nuclei):
    if not (SHARED / name).is_dir():
        pytest.skip("needs the real data in ../shared/data")
    rows = pd.read_csv(SHARED / name / "table.csv", dtype=str)
    rows = rows.iloc[1 :: len(rows) // 20 or 3]
    rows = rows.assign(**{key: f"{SHARED / name}/" + rows[key] for key in ("image", "label")})
    rows.to_csv(tmp_path / "table.csv", index=False)
    cohort = cs.import_table(tmp_path / "table.csv", out=tmp_path / "cohort", **options)
    text, study = written(cohort, tmp_path)
    assert ("counterstain" in text["recipe"]["diffusion"]) == keeps_nuclei
    assert cs.plan_study(study).state.states
