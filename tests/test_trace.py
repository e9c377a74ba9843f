"""Can drawn images be traced to patients? On phantoms of sixteen patients, whose renderer draws tissue of its own."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from drawn_cohort import draw_set

import counterstain
from counterstain.audit.copies import CopySearch, texture_of
from counterstain.audit.trace import trace_set
from counterstain.audit.trace_result import holm, reidentified, told_apart
from counterstain.data.patch_set import PatchSet, PatchSetWriter, SyntheticPatch
from counterstain.data.patches import turn
from counterstain.data.phantom import write_phantom
from counterstain.data.phantom.styles import PhantomConfig
from counterstain.data.split import SplitConfig, split_cohort
from counterstain.errors import InputError, LeakageError, MismatchError
from counterstain.generators.interface import OracleGenerator
from counterstain.generators.methods import Method, register
from counterstain.storage import read_json
from counterstain.synthesis.masks import SynthesisConfig
from counterstain.synthesis.synthesize import Filters, Verdict, synthesize

SIZE_PX, COUNT = 48, 24


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort") / "c"
    whole = write_phantom(PhantomConfig(slides=12, regions_per_slide=1, size_px=96, seed=100), folder)
    return split_cohort(whole, SplitConfig(train=6, val=3, test=3))[0]


@pytest.fixture(scope="module")
def oracle(cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("sets") / "oracle"
    return synthesize(OracleGenerator(cohort), cohort, out, SynthesisConfig(), count=COUNT, size_px=SIZE_PX, seed=0)


def with_images(found, images, out):
    """The same set with other images in some places."""
    patches = [found[i % COUNT] for i in range(64)]
    writer = PatchSetWriter(out, found.header)
    changed = [replace(p, image=images.get(i, p.image)) for i, p in enumerate(patches)]
    writer.write(
        0, [SyntheticPatch(index=i, patch=p, subtypes_before=p.subtypes, seed=i) for i, p in enumerate(changed)]
    )
    return writer.finish()


def test_a_set_of_tissue_of_its_own_raises_no_alarm(cohort, oracle):
    found = trace_set(oracle, cohort, patches=COUNT)
    assert found.alarms == []
    assert found.tests["test"].tolist() == ["copies", "closeness", "re-identification"]
    assert found.tests.set_index("test").loc["closeness", ["low", "high"]].between(0, 1).all()
    assert "No trace" in found.verdict
    assert "give --generator" in found.verdict


def test_copies_are_found_however_they_were_changed_and_their_patients_named(cohort, oracle, tmp_path):
    regions = cohort.positions("train")[:3].tolist()
    real = [cohort.patch(region, 20, 33, SIZE_PX) for region in regions]
    pale = (real[2].image * 0.6 + 60).astype(np.uint8)
    planted = {3: turn(real[0].image, flipped=True, quarter_turns=1), 8: real[1].image, 11: pale}
    found = trace_set(with_images(oracle, planted, tmp_path / "planted"), cohort, patches=COUNT)
    table = found.images.set_index("image")
    assert "copies" in found.alarms
    assert set(table.index[table["copy"]]) == set(planted)
    assert table.loc[[*planted], "training_patient"].tolist() == [p.source.patient for p in real]
    assert table.loc[8, ["y_px", "x_px"]].tolist() == [20, 33]
    assert (table.loc[3, "flipped"], table.loc[3, "quarter_turns"]) == (True, 1)
    assert "Do not share the images" in found.verdict


def test_images_that_point_to_the_patients_of_their_masks_are_found(cohort, oracle, tmp_path):
    images = {}
    for i in range(64):
        source = oracle[i % COUNT].source
        position = cohort.regions["region"].tolist().index(source.region)
        own = cohort.patch(position, source.y_px, source.x_px, SIZE_PX).image
        own = turn(own, flipped=source.flipped, quarter_turns=source.quarter_turns)
        images[i] = (oracle[i % COUNT].image / 2 + own / 2).astype(np.uint8)
    found = trace_set(with_images(oracle, images, tmp_path / "own"), cohort, patches=COUNT)
    assert {"closeness", "re-identification"} <= set(found.alarms)
    assert found.figures["in_place"] > 0.8


def test_texture_does_not_tell_the_mask():
    rng = np.random.default_rng(0)
    instances = np.zeros((64, 64), np.int32)
    instances[10:40, 20:50] = 1
    images = [
        np.clip(np.where(instances, 90, 220) + rng.normal(0, 12, (64, 64)), 0, 255)[..., None].repeat(3, 2)
        for _ in range(2)
    ]
    grey = np.corrcoef(images[0].ravel(), images[1].ravel())[0, 1]
    texture = np.corrcoef(*(texture_of(image.astype(np.uint8), instances).ravel() for image in images))[0, 1]
    assert grey > 0.9
    assert abs(texture) < 0.05


def test_training_patients_are_told_from_others_by_a_denoiser_that_knows_them(cohort, oracle, tmp_path, run):
    known = set(cohort.patients("train"))

    class Knowing(OracleGenerator):
        def patch_losses(self, patches, seed):
            noise = np.random.default_rng(seed).normal(1, 0.01, (len(patches), 2))
            return noise - 0.1 * np.array([[p.source.patient in known] for p in patches])

    # The set says it is the oracle's: a stand-in whose checkpoint nobody needs.
    found = trace_set(oracle, cohort, generator=Knowing(cohort), patches=COUNT)
    assert found.alarms == ["membership"]
    assert found.tests.set_index("test").loc["membership", "value"] == 1
    assert "Do not share the generator" in found.verdict


def test_scores_are_told_apart_over_patients_not_patches():
    rng = np.random.default_rng(0)
    patients = pd.Series([f"p{i}" for i in range(8)]).repeat(200)
    scores = pd.Series(rng.normal(size=8)).repeat(200) + rng.normal(0, 0.01, 1600)
    first = np.repeat(np.arange(8) < 4, 200)
    found = told_apart("closeness", scores, patients, first, seed=0)
    assert found["least_p"] == pytest.approx(1 / 70)
    assert found["p"] > found["least_p"]
    assert found["high"] - found["low"] > 0.4  # as of eight cases, not of 1,600


def test_a_patient_whom_all_images_resemble_is_no_re_identification():
    patients = pd.Series(list("abcd") * 5)
    hub = pd.Series(["a"] * 20)
    ranks = pd.Series(np.where(patients == "a", 1, 2))
    assert reidentified(patients, hub, ranks, seed=0)["p"] == 1
    right = reidentified(patients, patients, pd.Series(1, patients.index), seed=0)
    assert right["p"] == pytest.approx(1 / 24)


def test_what_is_by_design_raises_no_alarm_and_costs_the_other_tests_nothing():
    rows = [{"test": t, "value": 1, "low": 0, "high": 1, "p": p, "least_p": 0} for t, p in (("a", 0.02), ("b", 1e-9))]
    assert holm(rows)["alarm"].tolist() == [True, True]
    assert holm(rows, {"b"})["alarm"].tolist() == [True, False]
    assert holm(rows, {"b"})["p_holm"].iloc[0] == 0.02


def test_the_command_writes_into_the_set_and_says_what_may_be_shared(cohort, oracle, run, tmp_path):
    status, printed, _ = run("trace", oracle.folder, "--cohort", cohort.folder, "--patches", 12)
    assert status == 0
    assert "No trace of training patients" in " ".join(printed.split())
    about = read_json(oracle.folder / "trace" / "trace.json")
    assert about["verdict"] == about["found"][-1]
    assert len(pd.read_csv(oracle.folder / "trace" / "trace.csv")) == 12
    assert (oracle.folder / "trace" / "trace.png").exists()
    assert len(PatchSet.open(oracle.folder)) == COUNT


def test_sets_that_cannot_be_traced_are_refused(cohort, oracle, tmp_path, run):
    with pytest.raises(InputError, match="no checkpoint to test; give no --generator"):
        counterstain.trace(oracle, cohort=cohort, generator=tmp_path, out=tmp_path / "t")
    with pytest.raises(InputError, match="only one training or one held-out patient"):
        counterstain.trace(oracle, cohort=cohort, patches=1, out=tmp_path / "one")
    with pytest.raises(InputError, match="no such folder; pass the folder of a study"):
        counterstain.trace(oracle, cohort=cohort, study=tmp_path / "none", out=tmp_path / "none-yet")
    assert not (tmp_path / "none-yet").exists()
    held_out = synthesize(
        OracleGenerator(cohort), cohort, tmp_path / "val", SynthesisConfig(), count=1, size_px=48, seed=0, part="val"
    )
    with pytest.raises(LeakageError, match="holds masks of val"):
        counterstain.trace(held_out, cohort=cohort)
    other = write_phantom(PhantomConfig(slides=6, regions_per_slide=1, size_px=64, seed=300), tmp_path / "other")
    other = split_cohort(other, SplitConfig(train=4, val=1, test=1))[0]
    with pytest.raises(MismatchError, match="made from another cohort"):
        counterstain.trace(oracle, cohort=other)
    alone = split_cohort(other, SplitConfig(train=5, val=1, test=0), force=True)[0]
    with pytest.raises(InputError, match="1 held-out patients; a trace needs two of each"):
        counterstain.trace(draw_set(tmp_path / "s", alone, settings=oracle.header.settings), cohort=alone)


class Copier(OracleGenerator):
    """Hands out real tissue at every second attempt."""

    def draw(self, requests):
        return [
            one.image if one.seed % 2 else drawn for one, drawn in zip(requests, super().draw(requests), strict=True)
        ]


@pytest.mark.filterwarnings("ignore:no training region shows")
def test_a_novel_set_has_no_copies_and_keeps_what_was_novel(cohort, tmp_path):
    method = Method(name="copier", title="Copier", colour="#0072b2", load=lambda *_: Copier(cohort))
    with register(method):
        options = {"method": "copier", "count": COUNT, "size_px": SIZE_PX}
        plain = counterstain.synthesize(cohort, out=tmp_path / "plain", **options)
        novel = counterstain.synthesize(cohort, out=tmp_path / "novel", novel=True, **options)
    search = CopySearch(cohort, SIZE_PX, texture=True)

    def closest(patch):
        return max(match.similarity for match in search.by_patient(patch).values())

    copied = [i for i in range(COUNT) if closest(plain[i]) > 0.9]
    assert len(copied) > 5
    assert max(closest(patch) for patch in novel) < 0.9
    assert novel.patches["kept"].all()
    kept = novel.patches.loc[novel.patches["attempts"] == 1, "index"].tolist()
    assert len(kept) > 5
    assert all(np.array_equal(plain[i].image, novel[i].image) for i in kept)
    assert novel.header.settings["filter"]["novel"] == 0.01


def test_an_image_must_pass_every_filter():
    class Says:
        masks, settings, patients_seen = 2, {"a": 1}, ("p",)

        def __init__(self, *kept):
            self.kept = kept

        def __call__(self, patches, redraw):
            return [Verdict(kept=kept, instances=((1, kept),)) for kept in self.kept]

    both = Filters.of(Says(True, True), None, Says(True, False))
    assert [verdict.kept for verdict in both([None, None], None)] == [True, False]
    assert Filters.of(None, None) is None
    assert both.masks == 2
