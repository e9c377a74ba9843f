import pytest
from drawn_cohort import draw_cohort

from counterstain.data.split import check_no_leak, patient_key
from counterstain.errors import LeakageError


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Five patients: p0 trains, p1 validates, the others test."""
    drawn = draw_cohort(tmp_path_factory.mktemp("cohort") / "c", regions=1)
    return drawn.write_split({"p0": "train", "p1": "val"} | dict.fromkeys(("p2", "p3", "p4"), "test"))


def test_training_patients_may_be_seen(cohort):
    check_no_leak(["p0", "elsewhere"], cohort, "set a")


@pytest.mark.parametrize(
    "name", ["P1", " p1", "p\u00a01", "p01", "p001", "p\u200b1", "\uff501", "p\uff11", "P 0\u00ad1 "]
)
def test_another_spelling_of_a_patient_is_the_same_patient(cohort, name):
    with pytest.raises(LeakageError, match="has seen p1 of the val part"):
        check_no_leak([name], cohort, "set a")


@pytest.mark.parametrize(
    "one_and_other", [("p1", "p10"), ("1.05", "1.5"), ("a-1", "b-1"), ("p10", "p100"), ("0", "00a")]
)
def test_other_patients_stay_others(one_and_other):
    one, other = one_and_other
    assert patient_key(one) != patient_key(other)
    assert patient_key("Jos\u00e9") == patient_key("Jose\u0301")


def test_a_held_out_patient_is_named_with_its_part_and_the_remedy(cohort):
    with pytest.raises(LeakageError, match=r"set a has seen p1 of the val part of .*; train the generator on"):
        check_no_leak(["p0", "p1"], cohort, "set a")


def test_what_is_held_out_and_the_remedy_may_be_chosen(cohort):
    with pytest.raises(LeakageError, match=r"b has seen p0, p1, p2 and 2 more of [^ ]*; try others"):
        check_no_leak([f"p{i}" for i in range(5)], cohort, "b", parts=["all"], remedy="try others")
