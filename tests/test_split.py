from collections import Counter
from dataclasses import replace

import pytest
from drawn_cohort import boxes, store
from hypothesis import given, settings
from hypothesis import strategies as st

from counterstain.data.cohort import Cohort, splits_table, subtypes_table
from counterstain.data.composition import missing_subtypes
from counterstain.data.split import SplitConfig, check_disjoint, patient_scores, split_cohort, split_patients
from counterstain.errors import InputError, MismatchError

COUNTS = {"train": 24, "val": 8, "test": 8}
SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
FORTY = [f"p{i:02d}" for i in range(40)]
ALIKE = dict.fromkeys(FORTY, "x")


def region(name, patient, score="x", *, subtype=1, **known):
    return boxes(name, (subtype, 0, 0, 4, 4), shape=(8, 8), slide=patient, score=score, split=None, **known)


def cohort(folder, *regions) -> Cohort:
    return store(folder / "cohort", *regions, mpp=500)


@pytest.fixture
def five(tmp_path):
    """Five patients, one of them with a rare subtype."""
    subtypes = [1, 1, 2, 1, 2]
    return cohort(tmp_path, *(region(f"r{i}", f"p{i}", subtype=subtypes[i]) for i in range(5)))


@pytest.mark.parametrize("amounts", [COUNTS, SHARES])
def test_each_part_has_the_same_number_of_each_score(amounts):
    scores = {patient: str(i % 4) for i, patient in enumerate(FORTY)}
    counts = Counter((scores[patient], part) for patient, part in split_patients(scores, amounts, 0).items())
    assert counts == {(s, part): n for s in "0123" for part, n in (("train", 6), ("val", 2), ("test", 2))}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcdef"), min_size=5, max_size=60), st.integers(0, 3))
def test_totals_are_exact_and_scores_within_one_patient_of_their_proportion(scores, seed):
    split = split_patients(dict(enumerate(scores)), SHARES, seed)
    totals = Counter(split.values())
    assert sum(totals.values()) == len(scores)
    for part, share in SHARES.items():
        assert abs(totals[part] - share * len(scores)) < 1
        for score in set(scores):
            members = [split[i] for i, other in enumerate(scores) if other == score]
            assert abs(members.count(part) - len(members) * totals[part] / len(scores)) < 1


def test_a_split_depends_on_the_seed_and_not_on_the_order_of_patients():
    split = split_patients(ALIKE, COUNTS, 3)
    assert split_patients(dict(reversed(ALIKE.items())), COUNTS, 3) == split
    assert split_patients(ALIKE, COUNTS, 4) != split
    unscored = split_patients(dict.fromkeys(FORTY), SHARES, 3)
    assert Counter(unscored.values()) == COUNTS


@pytest.mark.parametrize(
    ("patients", "amounts", "message"),
    [
        (39, COUNTS, r"24 \+ 8 \+ 8 = 40 patients, but the cohort has 39; give counts"),
        *((40, SHARES | {"train": train}, "expected shares that sum to 1") for train in (0.5, 0.7, 24)),
        (2, SHARES, r"of 2 patients leaves (val|test) empty"),
    ],
)
def test_amounts_that_do_not_fit_are_an_error(patients, amounts, message):
    with pytest.raises(InputError, match=message):
        split_patients(dict.fromkeys(FORTY[:patients], "x"), amounts, 0)


def test_a_patients_score_is_the_commonest_of_the_slides(tmp_path):
    drawn = cohort(
        tmp_path,
        *(replace(region(f"a{i}", "p1", score), slide=f"s{i}") for i, score in enumerate(["3+", "1+", "1+"])),
        *(region(f"b{i}", "p2", "2+") for i in range(2)),
        region("c", "p3", None),
    )
    assert patient_scores(drawn) == {"p1": "1+", "p2": "2+", "p3": None}


def test_another_split_is_only_made_by_force(five):
    first, warnings = split_cohort(five, SplitConfig(train=3, val=1, test=1))
    assert len(warnings) == 3
    assert Counter(Cohort.open(five.folder).regions["split"]) == {"train": 3, "val": 1, "test": 1}
    again, _ = split_cohort(first, SplitConfig(train=3, val=1, test=1))
    assert again.fingerprint == first.fingerprint
    with pytest.raises(MismatchError, match=r"has another split already \(train 3, val 1, test 1\); give --force"):
        split_cohort(first, SplitConfig(train=2, val=2, test=1))
    forced, _ = split_cohort(first, SplitConfig(train=2, val=2, test=1), force=True)
    assert len(forced.patients("val")) == 2


def test_a_patient_in_two_parts_is_an_error(tmp_path):
    drawn = cohort(tmp_path, *(replace(region(part, "p1"), split=part) for part in ("train", "test")))
    with pytest.raises(InputError, match="patient p1 is in two parts, test and train; run 'counterstain split"):
        check_disjoint(drawn)


def test_two_spellings_of_a_patient_in_an_older_cohort_are_never_split(tmp_path):
    drawn = cohort(
        tmp_path, *(replace(region(name, name), split=part) for name, part in (("P1", "train"), ("p01", "test")))
    )
    with pytest.raises(InputError, match="patient P1 or p01 is in two parts, test and train; import the cohort again"):
        check_disjoint(drawn)
    with pytest.raises(InputError, match="patients 'P1' and 'p01' are probably one; import the cohort again"):
        split_cohort(drawn, SplitConfig(), force=True)


def test_the_tables_of_a_cohort_count_by_part_and_subtype(tmp_path):
    drawn = cohort(
        tmp_path,
        replace(region("a", "p1"), split="train"),
        replace(region("b", "p1", subtype=4), split="train"),
        replace(region("c", "p2", subtype=4), split="test"),
        region("d", "p3"),
    )
    assert splits_table(drawn).to_numpy().tolist() == [
        ["train", 1, 1, 2, 32.0],
        ["test", 1, 1, 1, 16.0],
        ["no split", 1, 1, 1, 16.0],
    ]
    table = subtypes_table(drawn).set_index(["split", "subtype"])
    assert table.loc[("train", "HER2 0")].tolist() == [1, 1, 0.5, 4.0, 0.5]
    assert table.loc[("test", "HER2 0")].tolist() == [0, 0, 0, 0, 0]
    assert [line.split(", so")[0] for line in missing_subtypes(drawn)] == [
        "split train has no HER2 1+, HER2 2+, LCIS/DCIS",
        "split test has no HER2 0, HER2 1+, HER2 2+, LCIS/DCIS",
    ]
