"""Subtypes that nobody annotated: how many, whose, named, and what cannot be told."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score

import counterstain as cs
from counterstain.data.region_store import Region
from counterstain.data.stains import STAIN_VECTORS

ONE = cs.Taxonomy(name="one", subtypes=({"id": 1, "name": "tumour", "colour": "#4477aa"},))
BLUE, BROWN = (np.array(STAIN_VECTORS[name]) / np.linalg.norm(STAIN_VECTORS[name]) for name in ("haematoxylin", "dab"))


def tissue(folder, strengths=(0.05, 0.4, 1.2), *, patients=8, split=True, size_px=96):
    """Nine squares of DAB a region, of a strength each, whose order changes; the slides differ a little."""
    writer, truth = cs.CohortWriter(folder, ONE, 1.0, {"kind": "drawn"}), []
    for patient in range(patients):
        rng = np.random.default_rng(patient)
        instances = np.kron(np.arange(1, 10).reshape(3, 3), np.ones((32, 32), int)).astype(np.int32)
        instances[np.kron(np.ones((3, 3), bool), np.pad(np.ones((20, 20), bool), 6)) == 0] = 0
        kinds = rng.permutation(np.arange(9) % len(strengths))
        brown = np.array([0, *np.array(strengths)[kinds] * rng.uniform(0.9, 1.1, 9)])[instances]
        density = rng.uniform(0.2, 0.5, (size_px, size_px, 1)) * BLUE + brown[..., None] * BROWN
        image = np.clip(255 * np.exp(-density), 1, 255).astype(np.uint8)
        known = {"region": f"r{patient}", "slide": f"s{patient}", "patient": f"p{patient}"}
        writer.add(
            f"s{patient}", [Region(**known, image=image, instances=instances, subtypes=dict.fromkeys(range(1, 10), 1))]
        )
        truth += kinds.tolist()
    cohort = writer.finish()
    parts = {f"p{i}": "test" if i == patients - 1 else "train" for i in range(patients)}
    return cohort.write_split(parts) if split else cohort, truth


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("discover")
    cohort, truth = tissue(folder / "cohort")
    return cohort, cs.discover(cohort, out=folder / "found", k=3), truth


def test_the_strengths_that_were_drawn_are_found_from_the_palest_on(found):
    _, discovery, truth = found
    assert adjusted_rand_score(truth, discovery.instances["cluster"]) > 0.9
    assert discovery.cohort.taxonomy.names == ("found 1", "found 2", "found 3")
    assert discovery.clusters["stain"].is_monotonic_increasing
    assert discovery.fitted == "7 training patients"


def test_a_found_cohort_is_as_any_other_and_shares_the_pixels_of_the_first(found):
    cohort, discovery, _ = found
    opened = cs.Cohort.open(discovery.cohort.folder)
    assert (opened.folder / "packs").resolve() == (cohort.folder / "packs").resolve()
    assert np.array_equal(opened.read(0)[0], cohort.read(0)[0])
    assert cs.inspect(opened, out=opened.folder / "figure.png")["instances"].sum() == 72
    assert (opened.folder / "sheet.png").stat().st_size > 10_000


def test_names_join_and_leave_out_clusters_and_are_kept(tmp_path):
    cohort, _ = tissue(tmp_path / "cohort")
    again = cs.discover(cohort, out=tmp_path / "found", k=3, names="ignore, brown, brown").cohort
    assert again.taxonomy.names == ("brown",)
    assert sorted(again.instances["subtype"].unique()) == [1, 255]
    kept = cs.discover(cohort, out=tmp_path / "found", k=3).cohort
    assert kept.fingerprint == again.fingerprint
    with pytest.raises(cs.ConfigError, match="expected 3 names, one for each cluster, found 2"):
        cs.discover(cohort, out=tmp_path / "found", k=3, names="a,b")
    assert cs.Cohort.open(tmp_path / "found").fingerprint == again.fingerprint


def test_held_out_patients_change_no_cluster(tmp_path):
    cohort, _ = tissue(tmp_path / "cohort")
    whole = cs.discover(cohort, out=tmp_path / "whole", k=3).instances
    parts = {f"p{i}": "train" for i in range(7)}
    without = cs.discover(cohort.write_split(parts), out=tmp_path / "without", k=3).instances
    columns = ["cluster", "certainty"]
    pd.testing.assert_frame_equal(whole[columns], without[columns])


def test_instances_of_one_kind_have_no_subtypes(tmp_path):
    cohort, _ = tissue(tmp_path / "cohort", strengths=(0.4,))
    with pytest.raises(cs.InputError, match=r"no number of subtypes is stable: .* give --k \d and another --out"):
        cs.discover(cohort, out=tmp_path / "found")


@pytest.mark.parametrize("file", ["parts.parquet", "stability.csv", "instances.parquet"])
def test_what_is_damaged_of_an_earlier_call_is_made_again(tmp_path, file):
    cohort, _ = tissue(tmp_path / "cohort")
    first = cs.discover(cohort, out=tmp_path / "found", k=3).instances
    (tmp_path / "found" / file).write_bytes(b"k,agr")
    pd.testing.assert_frame_equal(cs.discover(cohort, out=tmp_path / "found", k=3).instances, first)
    (tmp_path / "found" / "names.json").write_text('["one"]')
    with pytest.raises(cs.StorageError, match="expected 3 names"):
        cs.discover(cohort, out=tmp_path / "found", k=3)


def test_too_few_patients_and_wrong_words_are_one_line(tmp_path):
    cohort, _ = tissue(tmp_path / "cohort", patients=1, split=False)
    with pytest.raises(cs.InputError, match="9 instances of 1 patient are too few"):
        cs.discover(cohort, out=tmp_path / "found", k=2)
    for words in ({"k": "many"}, {"correction": "all"}, {"features": "judges"}, {"ignore_below": 2.0}, {"k": 1}):
        with pytest.raises(cs.ConfigError, match="expected"):
            cs.discover(cohort, out=tmp_path / "found", **words)
    assert not (tmp_path / "found").exists()
