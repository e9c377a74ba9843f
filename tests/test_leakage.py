import pytest

from counterstain.data.split import check_no_leak
from counterstain.errors import LeakageError

HELD_OUT = {"val": ["p7"], "test": ["p8", "p9", "p10", "p11", "p12"]}


def test_training_patients_may_be_seen():
    check_no_leak(["p1", "p2"], HELD_OUT, "set a")


def test_a_held_out_patient_is_named_with_its_part_and_the_remedy():
    with pytest.raises(LeakageError, match="set a has seen p7 of the val part; train the generator on"):
        check_no_leak(["p1", "p7"], HELD_OUT, "set a")


def test_only_three_of_many_patients_are_named():
    with pytest.raises(LeakageError, match="has seen p10, p11, p12 and 2 more of the test part"):
        check_no_leak(iter(HELD_OUT["test"]), HELD_OUT, "checkpoint b")
