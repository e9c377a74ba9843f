"""Reviews of synthetic sets: what is kept, what counts, and who respects it."""

import json
import subprocess
import sys
import threading

import pandas as pd
import pytest
from drawn_cohort import HER2, draw_cohort, draw_set

import counterstain as cs
from counterstain.checkpoints import read_header
from counterstain.data.patch_set import JudgedInstance
from counterstain.data.review import REVIEW_FILE, Review
from counterstain.errors import InputError, LeakageError, MismatchError, StorageError
from counterstain.study.config import StudyConfig
from counterstain.study.plan import plan_study
from counterstain.study.records import unreviewed
from counterstain.study.run import leftovers


@pytest.fixture(scope="module")
def tissue(tmp_path_factory):
    return draw_cohort(tmp_path_factory.mktemp("tissue") / "cohort")


@pytest.fixture
def patches(tissue, tmp_path):
    return draw_set(tmp_path / "set", tissue)


def decided(review):
    return dict(review.decisions()[["index", "decision"]].to_numpy().tolist())


def test_the_last_decision_of_a_patch_counts_whoever_made_it(patches):
    ada, ben = Review(patches, "ada"), Review(patches, "ben")
    ada.decide(3, "accept")
    ben.decide(3, "reject")
    ada.decide(5, "unsure")
    assert decided(ada) == decided(Review(patches.folder)) == {3: "reject", 5: "unsure"}
    assert str(ada.progress()) == "2 of 64 patches reviewed: 0 accepted, 1 rejected, 1 unsure"
    assert ada.rejected == (3,)
    assert [line["reviewer"] for line in ada.history()] == ["ada", "ben", "ada"]


def test_undo_takes_back_ones_own_decisions_step_by_step_and_deletes_nothing(patches):
    ada, ben = Review(patches, "ada"), Review(patches, "ben")
    ada.decide(3, "accept")
    ada.decide(3, "reject")
    ben.decide(4, "reject")
    assert ada.undo() == 3
    assert decided(ada) == {3: "accept", 4: "reject"}
    assert (ada.undo(), ada.undo()) == (3, None)
    assert decided(ada) == {4: "reject"}
    assert len(ada.history()) == 5


@pytest.mark.parametrize("damage", ["\x00\x01", "[1]", '{"index": 1, "deci'])
def test_a_damaged_line_is_an_error_and_no_decision_is_forgotten(patches, damage):
    review = Review(patches, reviewer="ada")
    review.decide(1, "reject")
    review.file.write_text(damage + "\n" + review.file.read_text())
    with pytest.raises(StorageError, match="line 1: damaged"):
        review.decisions()


def test_a_line_that_a_kill_cut_off_costs_that_line_alone(patches):
    review = Review(patches, "ada")
    review.decide(3, "reject")
    with review.file.open("a") as file:
        file.write('{"index": 4, "decis')
    assert decided(review) == {3: "reject"}
    review.decide(5, "accept")
    assert decided(review) == {3: "reject", 5: "accept"}


def test_a_decision_about_a_set_that_was_moved_away_is_not_kept_elsewhere(patches):
    review = cs.Review(patches, "ada")
    patches.folder.rename(patches.folder.with_name("moved"))
    with pytest.raises(StorageError, match="is not there any more; nothing was kept"):
        review.decide(0, "reject")
    assert not patches.folder.exists()


def test_two_writers_at_once_lose_no_decision(patches):
    write = (
        "import sys; from counterstain.data.review import Review\n"
        "review = Review(sys.argv[1], sys.argv[2])\n"
        "for index in range(16): review.decide(index, 'accept')"
    )
    writers = [subprocess.Popen([sys.executable, "-c", write, patches.folder, name]) for name in ("ada", "ben")]
    threads = [threading.Thread(target=Review(patches, "cy").decide, args=(i, "reject")) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(Review(patches).history()) == 2 * 16 + 20


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda at: Review(at, "ada").decide(64, "reject"), "patch 64: expected a number of 0 to 63"),
        (lambda at: Review(at, "ada").decide(1, "maybe"), "decision 'maybe': expected accept, reject, unsure"),
        (lambda at: Review(at).decide(1, "reject"), "a decision needs a reviewer"),
        (lambda at: Review(at, " "), "reviewer ' ': expected a name"),
        (lambda at: Review(at, "ada").select(decision="good"), "decision 'good': expected"),
        (lambda at: Review(at.parent), "no such set"),
    ],
)
def test_what_is_no_decision_is_refused(patches, act, message):
    with pytest.raises(InputError, match=message):
        act(patches.folder)
    assert not (patches.folder / REVIEW_FILE).exists()


def test_decisions_about_another_set_are_noticed(patches, tissue, tmp_path):
    Review(patches, "ada").decide(3, "reject")
    other = draw_set(tmp_path / "other", tissue, size_px=32)
    (patches.folder / REVIEW_FILE).rename(other.folder / REVIEW_FILE)
    with pytest.raises(MismatchError, match="decisions about another synthetic set"):
        Review(other).decisions()


def test_a_decision_that_somebody_misspelt_is_named(patches):
    review = Review(patches, "ada")
    review.decide(3, "reject")
    review.file.write_text(review.file.read_text().replace("reject", "rejct"))
    with pytest.raises(StorageError, match="decision 'rejct': expected accept"):
        review.decisions()


def test_patches_are_filtered_by_subtype_slide_decision_and_agreement_of_the_judge(tissue, tmp_path):
    judged = (JudgedInstance(drawing=0, subtype=1, agreed=True, kept=True),)
    settings = {"filter": {"agreement": 1.0}}
    patches = draw_set(tmp_path / "set", tissue, settings=settings, judged=judged, kept=True)
    review = Review(patches, "ada")
    review.decide(0, "reject")
    table = review.table().set_index("index")
    for index in review.select(subtype="HER2 1+", slide="p1", agreed=True, decision=["undecided", "unsure"]):
        assert HER2.id_of("HER2 1+") in patches[index].subtypes.values()
        assert patches[index].source.slide == "p1"
    assert table.loc[0, "decision"] == "reject"
    assert review.select(decision="reject") == [0]
    assert review.select(agreed=False) == []


def test_a_judge_says_which_patches_of_a_set_without_filter_look_as_asked(patches):
    judged = Review(patches, judged=lambda: pd.Series({2: 1.0, 5: 0.5}))
    assert (judged.select(agreed=True), judged.select(agreed=False)) == ([2], [5])
    assert judged.table().set_index("index")["agreement"].dropna().to_dict() == {2: 1.0, 5: 0.5}


def test_patches_are_filtered_by_the_method_that_drew_them(patches):
    assert len(Review(patches).select(method=patches.header.method)) == len(patches)
    assert Review(patches).select(method="spade") == []


def test_near_copies_come_first_where_the_set_was_audited(patches, tmp_path):
    header = patches.header.model_dump(mode="json", exclude={"taxonomy"})
    (tmp_path / "audit.json").write_text(json.dumps({"sets": {"a": header}}))
    (tmp_path / "copies.csv").write_text("image,similarity,images\n7,0.5,a\n9,0.9,a\n1,0.99,held out\n")
    assert Review(patches, audit=tmp_path).select()[:3] == [9, 7, 0]
    (tmp_path / "audit.json").write_text(json.dumps({"sets": {"a": header | {"seed": 5}}}))
    with pytest.raises(MismatchError, match="this set was not audited there"):
        Review(patches, audit=tmp_path).select()


@pytest.fixture
def larger(tissue, tmp_path):
    return draw_set(tmp_path / "larger", tissue, size_px=64)


def test_a_segmenter_is_not_trained_on_rejected_patches_and_says_whose_review_it_was(tissue, larger, tmp_path):
    settings = ["segmenter.encoder=tu-test_resnet", "segmenter.mixing.epoch_patches=8", "size_px=64"]
    settings += ["segmenter.training.steps=1", "segmenter.training.batch_size=2"]
    options = {"synthetic": larger, "preset": "demo", "settings": settings}
    plain = read_header(cs.segment(tissue, out=tmp_path / "plain", **options))
    review = Review(larger, "ada")
    for index, decision in ((3, "reject"), (4, "accept"), (5, "unsure"), (60, "reject")):
        review.decide(index, decision)
    reviewed = read_header(cs.segment(tissue, out=tmp_path / "reviewed", **options))
    assert plain.notes["synthetic_patches"] == 8
    assert reviewed.notes["synthetic_patches"] == 7
    assert reviewed.notes["left_out"] == [3]
    assert reviewed.notes["review"] == review.provenance()
    assert cs.segment(tissue, out=tmp_path / "plain", with_rejected=True, **options) == tmp_path / "plain"
    with pytest.raises(MismatchError, match="left_out"):
        cs.segment(tissue, out=tmp_path / "plain", **options)


def test_an_export_leaves_out_rejected_patches_and_says_so(patches, tmp_path):
    review = Review(patches, "ada")
    review.decide(3, "reject")
    review.decide(4, "accept")
    assert cs.export(patches, format="png", out=tmp_path / "png") == 63
    assert not (tmp_path / "png" / "images" / "000003.png").exists()
    assert "000003" not in (tmp_path / "png" / "instances.csv").read_text()
    record = json.loads((tmp_path / "png" / "export.json").read_text())
    assert (record["images"], record["rejected"], record["review"]) == (63, [3], review.provenance())
    review.decide(5, "accept")
    assert cs.export(patches, format="png", out=tmp_path / "png") == 63
    review.decide(6, "reject")
    with pytest.raises(MismatchError, match="belongs to another run"):
        cs.export(patches, format="png", out=tmp_path / "png")


def planned(study, root):
    cells = plan_study(study, study.resolved_recipe("study"), root)
    return {cell.name: cell for cell in cells}


def test_only_the_reviewed_arm_of_a_study_follows_new_decisions(tissue, tmp_path):
    study = StudyConfig(
        name="s", preset="demo", cohort={"phantom": {}}, methods=("oracle",), amounts=(1.0,), repeats=1,
        extra_arms=("oracle+100+reviewed",),
    )  # fmt: skip
    before = planned(study, tmp_path)
    drawn = draw_set(tmp_path / before["synthetic oracle"].folder, tissue)
    assert planned(study, tmp_path) == before
    line = next(unreviewed(list(before.values()), tmp_path))
    assert line.startswith(f"synthetic oracle: 0 of {before['synthetic oracle'].count} patches are reviewed")
    Review(drawn, "ada").decide(3, "reject")
    after = planned(study, tmp_path)
    renamed = {name for name, cell in after.items() if cell.folder != before[name].folder}
    assert renamed == {"segmenter oracle+100+reviewed #0", "evaluation oracle+100+reviewed #0"}
    assert after["segmenter oracle+100+reviewed #0"].settings["left_out"] == [3]
    Review(drawn, "ada").decide(4, "accept")
    assert planned(study, tmp_path) == after


def test_what_nobody_planned_any_more_but_somebody_reviewed_is_kept(tissue, tmp_path):
    Review(draw_set(tmp_path / "synthetic-1", tissue), "ada").decide(3, "reject")
    draw_set(tmp_path / "synthetic-2", tissue)
    assert [leftover.folder.name for leftover in leftovers(tmp_path, ())] == ["synthetic-2"]


@pytest.mark.filterwarnings("ignore:split")
@pytest.mark.filterwarnings("ignore:no training region shows")
def test_a_set_of_held_out_masks_is_never_trained_on(tissue, tmp_path):
    phantom = cs.split(cs.make_phantom(tmp_path / "phantom", slides=5, regions=1, size_px=64))
    held_out = cs.synthesize(
        phantom, method="oracle", count=1, out=tmp_path / "set", split="test", preset="demo", size_px=64
    )
    assert set(held_out.patches["patient"]) == set(phantom.patients("test"))
    with pytest.raises(LeakageError, match="masks of the test part, for a reading test, and is never trained on"):
        cs.segment(phantom, synthetic=held_out, out=tmp_path / "segmenter", preset="demo", amount=0.01)


def test_the_command_line_keeps_decisions_and_shows_what_is_left(run, patches):
    status, printed, _ = run("review", patches.folder, "--reviewer", "ada", "--reject", "3,17", "--accept", "4")
    assert status == 0
    assert "3 of 64 patches reviewed: 1 accepted, 2 rejected, 0 unsure" in printed
    assert run("review", patches.folder, "--reviewer", "ada", "--undo")[0] == 0
    assert Review(patches).rejected == (3,)
    status, _, error = run("review", patches.folder, "--reviewer", "ada", "--accept", "5,99")
    assert (status, "patch 99: expected a number of 0 to 63" in error) == (2, True)
    status, _, error = run("review", patches.folder, "--reject", "5")
    assert (status, "a decision needs a reviewer" in error) == (2, True)
    assert len(Review(patches).history()) == 4
