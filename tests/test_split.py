from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterstain.data.cohort import Cohort, CohortWriter, missing_subtypes, parts_table, subtypes_table
from counterstain.data.region_store import Region
from counterstain.data.split import SplitConfig, check_disjoint, patient_scores, split_cohort, split_patients
from counterstain.errors import InputError, MismatchError
from counterstain.taxonomy import Taxonomy

COUNTS = {"train": 24, "val": 8, "test": 8}
SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
FORTY = [f"p{i:02d}" for i in range(40)]


def region(name, patient, score, *, slide=None, split=None, subtype=1):
    instances = np.zeros((8, 8), np.int32)
    instances[:4, :4] = 1
    return Region(
        region=name,
        slide=slide or patient,
        patient=patient,
        image=np.zeros((8, 8, 3), np.uint8),
        instances=instances,
        subtypes={1: subtype},
        score=score,
        split=split,
    )


def cohort(folder, *regions) -> Cohort:
    writer = CohortWriter(folder / "cohort", taxonomy=Taxonomy.named("her2"), mpp=500, source={})
    writer.add("all", regions)
    return writer.finish()


@pytest.fixture
def five(tmp_path):
    """Five patients, one of them with a rare subtype."""
    subtypes = [1, 1, 2, 1, 2]
    return cohort(tmp_path, *(region(f"r{i}", f"p{i}", "x", subtype=subtypes[i]) for i in range(5)))


@pytest.mark.parametrize("amounts", [COUNTS, SHARES])
def test_each_part_has_the_same_number_of_each_score(amounts):
    scores = [str(i % 4) for i in range(40)]
    split = split_patients(FORTY, scores, amounts, 0)
    counts = Counter((scores[FORTY.index(patient)], part) for patient, part in split.items())
    assert counts == {(s, part): n for s in "0123" for part, n in (("train", 6), ("val", 2), ("test", 2))}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcdef"), min_size=5, max_size=60), st.integers(0, 3))
def test_totals_are_exact_and_scores_within_one_patient_of_their_proportion(scores, seed):
    patients = [f"p{i}" for i in range(len(scores))]
    split = split_patients(patients, scores, SHARES, seed)
    totals = Counter(split.values())
    assert sum(totals.values()) == len(patients)
    for part, share in SHARES.items():
        assert abs(totals[part] - share * len(patients)) < 1
        for score in set(scores):
            members = [split[p] for p, s in zip(patients, scores, strict=True) if s == score]
            assert abs(members.count(part) - len(members) * totals[part] / len(patients)) < 1


def test_a_split_depends_on_the_seed_and_not_on_the_order_of_patients():
    scores = ["x"] * 40
    split = split_patients(FORTY, scores, COUNTS, 3)
    assert split_patients(FORTY[::-1], scores, COUNTS, 3) == split
    assert split_patients(FORTY, scores, COUNTS, 4) != split


def test_counts_must_sum_to_the_number_of_patients():
    with pytest.raises(InputError, match=r"24 \+ 8 \+ 8 = 40 patients, but the cohort has 39; give counts"):
        split_patients(FORTY[:39], ["x"] * 39, COUNTS, 0)


@pytest.mark.parametrize("train", [0.5, 0.7, 24])
def test_shares_must_sum_to_one(train):
    with pytest.raises(InputError, match="expected shares that sum to 1"):
        split_patients(FORTY, ["x"] * 40, SHARES | {"train": train}, 0)


def test_a_part_that_would_be_empty_is_named():
    with pytest.raises(InputError, match=r"of 2 patients leaves val empty|of 2 patients leaves test empty"):
        split_patients(["a", "b"], ["x", "x"], SHARES, 0)


def test_patients_without_a_score_are_dealt_out_as_well():
    assert Counter(split_patients(FORTY, [None] * 40, SHARES, 0).values()) == COUNTS


def test_a_patients_score_is_the_commonest_of_the_slides(tmp_path):
    drawn = cohort(
        tmp_path,
        *(region(f"a{i}", "p1", score, slide=f"s{i}") for i, score in enumerate(["3+", "1+", "1+"])),
        *(region(f"b{i}", "p2", "2+", slide="t") for i in range(2)),
        region("c", "p3", None),
    )
    assert patient_scores(drawn) == {"p1": "1+", "p2": "2+", "p3": None}


def test_a_cohort_keeps_its_split(five):
    split_cohort(five, SplitConfig(train=3, val=1, test=1))
    parts = Cohort.open(five.folder).regions["split"]
    assert Counter(parts) == {"train": 3, "val": 1, "test": 1}


def test_another_split_is_only_made_by_force(five):
    first, _ = split_cohort(five, SplitConfig(train=3, val=1, test=1))
    again, _ = split_cohort(first, SplitConfig(train=3, val=1, test=1))
    assert again.fingerprint == first.fingerprint
    with pytest.raises(MismatchError, match=r"has another split already \(train 3, val 1, test 1\); give --force"):
        split_cohort(first, SplitConfig(train=2, val=2, test=1))
    forced, _ = split_cohort(first, SplitConfig(train=2, val=2, test=1), force=True)
    assert len(forced.patients("val")) == 2


def test_parts_without_a_subtype_are_named(five):
    _, warnings = split_cohort(five, SplitConfig(train=3, val=1, test=1))
    assert len(warnings) == 3
    assert "part val has no" in warnings[1]
    assert "LCIS/DCIS" in warnings[1]


def test_a_patient_in_two_parts_is_an_error(tmp_path):
    drawn = cohort(tmp_path, region("a", "p1", "x", split="train"), region("b", "p1", "x", split="test"))
    with pytest.raises(InputError, match="patient p1 is in two parts, test and train; run 'counterstain split"):
        check_disjoint(drawn)


def test_the_tables_of_a_cohort_count_by_part_and_subtype(tmp_path):
    drawn = cohort(
        tmp_path,
        region("a", "p1", "x", split="train", subtype=1),
        region("b", "p1", "x", split="train", subtype=4),
        region("c", "p2", "x", split="test", subtype=4),
        region("d", "p3", "x"),
    )
    assert parts_table(drawn).to_numpy().tolist() == [
        ["train", 1, 1, 2, 32.0],
        ["test", 1, 1, 1, 16.0],
        ["no part", 1, 1, 1, 16.0],
    ]
    table = subtypes_table(drawn).set_index(["part", "subtype"])
    assert table.loc[("train", "HER2 0")].tolist() == [1, 1, 0.5, 4.0, 0.5]
    assert table.loc[("test", "HER2 0")].tolist() == [0, 0, 0, 0, 0]
    assert [line.split(", so")[0] for line in missing_subtypes(drawn)] == [
        "part train has no HER2 1+, HER2 2+, LCIS/DCIS",
        "part test has no HER2 0, HER2 1+, HER2 2+, LCIS/DCIS",
    ]
