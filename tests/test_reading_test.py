"""Blind reading tests: what readers see, what is kept of their answers, and what comes of them."""

import json

import numpy as np
import pytest
from drawn_cohort import draw_cohort, draw_set
from scipy import stats

from counterstain.audit.reading_patches import write_reading_test
from counterstain.audit.reading_result import d_prime, exact_interval, readers_interval, score_readers
from counterstain.audit.reading_test import ReadingTest, key_of
from counterstain.errors import ConfigError, InputError, LeakageError, MismatchError, StorageError


@pytest.fixture(scope="module")
def tissue(tmp_path_factory):
    return draw_cohort(tmp_path_factory.mktemp("tissue") / "cohort", regions=4)


@pytest.fixture(scope="module")
def patches(tissue, tmp_path_factory):
    return draw_set(tmp_path_factory.mktemp("set") / "set", tissue, size_px=32)


@pytest.fixture
def test(tissue, patches, tmp_path):
    return write_reading_test(tissue, patches, tmp_path / "test", count=12)


def test_half_of_the_patches_are_real_and_of_the_same_composition_as_the_drawn_ones(test, tissue, patches):
    key = test.key()
    drawn, real = ([q for q in key if q.drawn is kind] for kind in (True, False))
    assert len(drawn) == len(real) == 6
    assert sorted((q.subtype, q.subtypes) for q in drawn) == sorted((q.subtype, q.subtypes) for q in real)
    assert {q.source["patient"] for q in real} == set(tissue.patients("test"))
    assert {q.source["patient"] for q in drawn} <= set(tissue.patients("train"))
    order = [q.drawn for q in key]
    assert order not in (sorted(order), sorted(order, reverse=True))
    for number, question in enumerate(key, start=1):
        if question.drawn:
            assert np.array_equal(test.image(number), patches[question.number].image)


def test_nothing_beside_the_pixels_says_which_patches_are_drawn(test):
    files = sorted(path.relative_to(test.folder).as_posix() for path in test.folder.rglob("*") if path.is_file())
    assert files == [*(f"questions/{i:04d}.png" for i in range(1, 13)), "run.json", "test.json"]
    chunks = {path.read_bytes()[:33][:16] for path in test.folder.glob("questions/*")}
    assert len(chunks) == 1
    for name in ("test.json", "run.json"):
        assert "drawn" not in (test.folder / name).read_text()


def test_no_two_patches_show_more_than_a_quarter_of_the_same_tissue(test):
    sources = [question.source for question in test.key()]
    for i, one in enumerate(sources):
        for other in sources[:i]:
            if one["region"] == other["region"]:
                shared = [max(0, 32 - abs(one[axis] - other[axis])) for axis in ("y_px", "x_px")]
                assert shared[0] * shared[1] <= 32 * 32 / 4


def test_a_reader_goes_on_where_he_stopped_and_readers_do_not_mix(test):
    test.answer("ada", 1, drawn=True, subtype="HER2 0", confidence=5)
    test.answer("ada", 3, drawn=False, subtype="HER2 3+")
    test.answer("Ada", 1, drawn=False, subtype="HER2 1+")
    again = ReadingTest.open(test.folder)
    assert again.next_question("ada") == 2
    assert again.progress("ada") == (2, 12)
    assert again.progress("Ada") == (1, 12)
    assert again.readers() == ["Ada", "ada"]
    assert again.answers("ada")[["question", "drawn", "subtype"]].to_numpy().tolist() == [
        [1, True, "HER2 0"],
        [3, False, "HER2 3+"],
    ]
    assert again.next_question("new") == 1


def test_an_answer_is_final_because_the_key_may_be_shown_after_it(test):
    with pytest.raises(InputError, match="ada has not answered question 1 yet"):
        test.truth("ada", 1)
    test.answer("ada", 1, drawn=True, subtype="HER2 0")
    assert test.truth("ada", 1) == test.key()[0]
    with pytest.raises(InputError, match="ada has answered question 1; answers are final"):
        test.answer("ada", 1, drawn=False, subtype="HER2 0")
    assert len(test.answers()) == 1


def test_a_test_is_read_without_its_key_and_the_key_belongs_to_it(test, tissue, patches, tmp_path):
    other = write_reading_test(tissue, patches, tmp_path / "other", count=8, seed=1)
    with pytest.raises(MismatchError, match="is the key of another test"):
        ReadingTest.open(test.folder, other.key_file).key()
    key_of(test.folder).unlink()
    again = ReadingTest.open(test.folder)
    again.answer("ada", 1, drawn=True, subtype="HER2 0")
    with pytest.raises(InputError, match=r"test\.key\.json: no such key"):
        again.key()


def test_the_same_command_keeps_a_finished_test_and_its_answers(test, tissue, patches):
    test.answer("ada", 1, drawn=True, subtype="HER2 0")
    again = write_reading_test(tissue, patches, test.folder, count=12)
    assert again.key() == test.key()
    assert again.progress("ada") == (1, 12)
    with pytest.raises(MismatchError, match="belongs to another run"):
        write_reading_test(tissue, patches, test.folder, count=10)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"question": 13}, "question 13: expected a number of 1 to 12"),
        ({"drawn": "yes"}, "drawn 'yes': expected True"),
        ({"subtype": "HER2 9"}, "subtype 'HER2 9': expected one of HER2 0"),
        ({"confidence": 6}, "confidence 6: expected a whole number of 1"),
        ({"reader": ""}, "reader '': expected a name"),
    ],
)
def test_what_is_no_answer_is_refused(test, answer, message):
    with pytest.raises(InputError, match=message):
        test.answer(**({"reader": "ada", "question": 1, "drawn": True, "subtype": "HER2 0"} | answer))
    assert test.answers().empty


def test_answers_that_were_changed_or_are_of_another_test_are_noticed(test):
    test.answer("ada", 1, drawn=True, subtype="HER2 0")
    file = next((test.folder / "answers").iterdir())
    known = json.loads(file.read_text())
    file.write_text(json.dumps(known | {"question": 99}))
    with pytest.raises(StorageError, match="question 99: no answer"):
        test.answers()
    file.write_text(json.dumps(known | {"test": "x"}))
    with pytest.raises(MismatchError, match="answers to another reading test"):
        test.answers()


def test_an_answer_to_a_test_that_was_moved_away_is_not_kept_elsewhere(test):
    test.folder.rename(test.folder.with_name("moved"))
    with pytest.raises(StorageError, match="is not there any more; nothing was kept"):
        test.answer("ada", 1, drawn=True, subtype="HER2 0")
    assert not test.folder.exists()


def test_what_cannot_be_tested_is_refused_and_leaves_nothing(tissue, patches, tmp_path):
    with pytest.raises(ConfigError, match="split 'train': expected val or test"):
        write_reading_test(tissue, patches, tmp_path / "t", part="train")
    with pytest.raises(ConfigError, match="count 3: expected an even number"):
        write_reading_test(tissue, patches, tmp_path / "t", count=3)
    with pytest.raises(InputError, match="questions are possible, 100 were asked for"):
        write_reading_test(tissue, patches, tmp_path / "t", count=100)
    with pytest.raises(LeakageError, match="has seen p4"):
        write_reading_test(tissue, draw_set(tmp_path / "s", tissue, size_px=32, seen=["p4"]), tmp_path / "t")
    with pytest.raises(MismatchError, match="was not made from"):
        write_reading_test(draw_cohort(tmp_path / "c", size_px=64), patches, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def read(test, reader, rng, skill=1.0, subtypes=0.8):
    """Answer all questions like a reader of a known d' who names a subtype rightly at a known rate."""
    for number, question in enumerate(test.key(), start=1):
        drawn = bool(rng.normal(skill / 2 if question.drawn else -skill / 2) > 0)
        named = question.subtype if rng.random() < subtypes else "HER2 3+"
        test.answer(reader, number, drawn=drawn, subtype=named)


def test_a_simulated_reader_of_known_skill_is_found_again_within_the_interval():
    rng, patches, skill = np.random.default_rng(1), 30, 1.0
    truth = stats.norm.cdf(skill / 2)
    hits, alarms = rng.binomial(patches, truth, 400), rng.binomial(patches, 1 - truth, 400)
    intervals = [exact_interval(int(h + patches - a), 2 * patches) for h, a in zip(hits, alarms, strict=True)]
    within = np.mean([low <= truth <= high for low, high in intervals])
    assert within >= 0.95  # exact intervals are conservative
    found = [d_prime(int(h), patches, int(a), patches) for h, a in zip(hits, alarms, strict=True)]
    assert np.mean(found) == pytest.approx(skill, abs=0.08)
    assert abs(np.mean([d_prime(int(h), patches, int(a), patches) for h, a in zip(hits, hits, strict=True)])) < 1e-9


def test_readers_of_known_skill_are_found_again_within_the_interval_of_all():
    rng, truth, within = np.random.default_rng(2), stats.norm.cdf(0.5 / np.sqrt(1 + 0.4**2 + 0.5**2)), []
    for _ in range(200):
        readers, questions = 0.4 * rng.normal(size=(4, 1)), 0.5 * rng.normal(size=(1, 40))
        low, high = readers_interval((0.5 + readers + questions + rng.normal(size=(4, 40)) > 0).astype(float))
        within.append(low <= truth <= high)
    assert np.mean(within) >= 0.93


def test_readers_who_contradict_each_other_leave_the_mean_open():
    right, wrong = np.ones(12), np.zeros(12)
    assert np.isnan(readers_interval(np.array([right, wrong]))).all()
    low, high = readers_interval(np.array([right, wrong, right, wrong]))
    assert (low < 0.05, high > 0.95) == (True, True)
    assert readers_interval(np.array([right] * 3)) == exact_interval(12, 12)
    some = np.where(np.arange(12) < 6, right, np.nan)
    assert readers_interval(np.array([right, right, some])) == exact_interval(12, 12)


def test_perfect_readers_have_a_finite_sensitivity_and_chance_has_none():
    assert 3 < d_prime(20, 20, 0, 20) < 5
    assert d_prime(10, 20, 10, 20) == 0
    assert exact_interval(20, 20) == pytest.approx((0.8316, 1.0), abs=1e-4)  # 0.025 ** (1 / 20)


def test_readers_are_scored_and_their_agreement_measured(test, tmp_path):
    rng = np.random.default_rng(0)
    for number, question in enumerate(test.key(), start=1):
        test.answer("perfect", number, drawn=question.drawn, subtype=question.subtype)
        test.answer("wrong", number, drawn=not question.drawn, subtype=question.subtype)
    read(test, "usual", rng)
    result = score_readers(test)
    rows = result.readers.set_index("reader")
    assert list(rows.index) == ["perfect", "usual", "wrong", "all readers"]
    assert rows.loc["perfect", ["accuracy", "drawn_found", "real_found", "subtype_of_drawn"]].tolist() == [1] * 4
    assert rows.loc["wrong", "accuracy"] == 0
    assert rows.loc["perfect", "d_prime"] == -rows.loc["wrong", "d_prime"] > 2
    assert rows.loc["perfect", "accuracy_low"] == pytest.approx(0.025 ** (1 / 12))
    together = rows.loc["all readers"]
    assert together["accuracy_low"] < 0.05 < together["accuracy"] < 0.95 < together["accuracy_high"]
    kappa = result.agreement.set_index(["readers", "what"])["kappa"]
    assert kappa["perfect, wrong", "drawn"] == pytest.approx(-1)
    assert kappa["perfect, wrong", "subtype"] == pytest.approx(1)
    assert set(result.agreement["statistic"]) == {"Cohen", "Fleiss"}
    named = result.confusion[result.confusion["reader"] == "perfect"]
    assert (named["shown"] == named["answered"]).all()
    assert named.groupby("kind")["answers"].sum().to_dict() == {"drawn": 6, "real": 6}
    assert "readers, 12 questions, half of them drawn by oracle" in repr(result)


def test_two_readers_have_a_mean_without_an_interval(test):
    for reader, right in (("right", True), ("wrong", False)):
        for number, question in enumerate(test.key(), start=1):
            test.answer(reader, number, drawn=question.drawn is right, subtype=question.subtype)
    result = score_readers(test)
    together = result.readers.set_index("reader").loc["all readers"]
    assert (together["accuracy"], np.isnan(together["accuracy_low"])) == (0.5, True)
    assert "all readers: 50 % of the answers" in repr(result)
    assert "An interval over readers takes 3 of them" in repr(result)


def test_one_reader_who_has_stopped_early_is_scored_on_what_he_answered(test):
    with pytest.raises(InputError, match="no reader has answered both a real and a drawn patch yet"):
        score_readers(test)
    kinds = [question.drawn for question in test.key()]
    for number in (kinds.index(True) + 1, kinds.index(False) + 1):
        test.answer("ada", number, drawn=True, subtype="HER2 0")
    result = score_readers(test)
    assert result.readers[["reader", "answers", "accuracy"]].to_numpy().tolist() == [["ada", 2, 0.5]]
    assert result.agreement.empty


def test_the_command_line_makes_and_scores_a_test(run, tissue, patches, tmp_path):
    made = run(
        "reading-test", "make", tissue.folder, "--synthetic", patches.folder, "--out", tmp_path / "t", "--count", 8
    )
    assert made[0] == 0
    assert "8 questions; the key, not for readers" in made[1]
    read(ReadingTest.open(tmp_path / "t"), "ada", np.random.default_rng(0))
    status, printed, _ = run("reading-test", "result", tmp_path / "t")
    assert status == 0
    assert "ada" in printed
    assert {file.name for file in (tmp_path / "t-result").iterdir()} == {
        "readers.csv", "confusion.csv", "agreement.csv", "result.json", "run.json",
    }  # fmt: skip
    status, _, error = run("reading-test", "result", tissue.folder)
    assert (status, "no reading test" in error) == (2, True)
