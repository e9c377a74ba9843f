import numpy as np
import pytest
from drawn_cohort import HER2, draw_cohort

from counterstain.data.patches import turn_back
from counterstain.data.sampling import CopyPasteConfig, PastedPatches, PatchSampler, SamplingConfig
from counterstain.errors import InputError, LeakageError, TaxonomyError
from counterstain.taxonomy import BACKGROUND

PX = 48
PLAIN = SamplingConfig(flip=False, quarter_turns=False)
ALWAYS = CopyPasteConfig(share=1.0, instances=1)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return draw_cohort(tmp_path_factory.mktemp("cohort") / "c")


def real(cohort):
    return PatchSampler(cohort, "train", PX, PLAIN, seed=0)


def paste(cohort, config=ALWAYS, sampling=PLAIN, seed=0, source=None):
    return PastedPatches(source or real(cohort), cohort, size_px=PX, config=config, sampling=sampling, seed=seed)


def pairs(n, stream, source):
    """Yield patches before and after, and which pixels are new."""
    for i in range(n):
        before, after = source[i], stream[i]
        yield before, after, after.instances != before.instances


def test_outside_what_was_pasted_every_byte_is_kept(cohort):
    changed = 0
    for before, after, inside in pairs(40, paste(cohort), real(cohort)):
        changed += inside.any()
        assert np.array_equal(before.image[~inside], after.image[~inside])
        assert (before.instances[inside] == BACKGROUND).all()  # no instance is covered
        assert after.source == before.source
    assert changed > 20


def test_a_pasted_instance_has_its_pixels_and_its_label_from_one_training_instance(cohort):
    donors = [
        (subtype, {tuple(p) for p in image[instances == instance].tolist()})
        for position in cohort.positions("train").tolist()
        for image, instances in [cohort.read(position)]
        for instance, subtype in cohort.subtypes(position).items()
    ]
    shown = [(after, inside) for _, after, inside in pairs(20, paste(cohort), real(cohort)) if inside.any()]
    assert len(shown) > 5
    for after, inside in shown:
        (new,) = np.unique(after.instances[inside]).tolist()
        pixels = {tuple(p) for p in after.image[inside].tolist()}
        assert any(subtype == after.subtypes[new] and pixels <= donor for subtype, donor in donors)


def test_instances_are_mirrored_and_turned_by_right_angles(cohort):
    stream, found, regions = paste(cohort), set(), cohort.regions["region"].tolist()
    for i in range(50):
        cut_out = stream.cut_out("nowhere", np.random.default_rng(i))
        source = cut_out.source
        turns = {"flipped": source.flipped, "quarter_turns": source.quarter_turns}
        found.add(tuple(turns.values()))
        straight = turn_back(cut_out.image, **turns)
        original = cohort.cut(regions.index(source.region), source.y_px, source.x_px, *straight.shape[:2]).image
        assert np.array_equal(straight, original)
    assert len(found) == 8


def test_a_patch_follows_from_the_seed_and_its_number(cohort):
    stream, again, other = paste(cohort), paste(cohort), paste(cohort, seed=1)
    forward = [stream[i].image for i in range(10)]
    assert all(np.array_equal(forward[i], again[i].image) for i in reversed(range(10)))
    assert any(not np.array_equal(forward[i], other[i].image) for i in range(10))


def test_rare_subtypes_are_pasted_more_often_unless_asked_otherwise(cohort):
    train = cohort.instances[cohort.instances["region"].isin(cohort.regions["region"].iloc[cohort.positions("train")])]
    counts = train["subtype"].value_counts()
    inverse = paste(cohort).shares
    assert sum(inverse.values()) == pytest.approx(1)
    assert max(inverse, key=inverse.get) == counts.idxmin()
    assert set(paste(cohort, CopyPasteConfig(target="uniform")).shares.values()) == {0.2}
    assert paste(cohort, CopyPasteConfig(target={"HER2 0": 3, "HER2 3+": 1})).shares == {1: 0.75, 4: 0.25}


def test_cut_outs_are_stained_as_patches_are(cohort):
    plain, stained = (paste(cohort, sampling=s)[3].image for s in (PLAIN, SamplingConfig(stain_jitter=0.3)))
    assert not np.array_equal(plain, stained)


def test_the_share_of_changed_patches_follows_the_setting(cohort):
    stream = paste(cohort, CopyPasteConfig(share=0.3, min_visible=0.05))
    changed = [inside.any() for *_, inside in pairs(200, stream, real(cohort))]
    assert np.mean(changed) == pytest.approx(0.3, abs=0.1)


def test_a_held_out_patient_among_the_training_regions_is_refused(tmp_path):
    cohort = draw_cohort(tmp_path / "c")
    cohort.regions.loc[cohort.regions["region"] == "p0-0", "patient"] = "p4"
    with pytest.raises(LeakageError, match="its training part has seen p4 of the test split"):
        paste(cohort, source=[])


def test_subtypes_that_cannot_be_pasted_are_named(cohort):
    with pytest.raises(TaxonomyError, match="HER2 9"):
        paste(cohort, CopyPasteConfig(target={"HER2 9": 1}))
    bare = cohort.instances
    cohort.instances = bare[bare["subtype"] != HER2.id_of("HER2 0")]
    try:
        with pytest.raises(InputError, match="the training part has no instance of HER2 0 to paste"):
            paste(cohort, CopyPasteConfig(target={"HER2 0": 1}))
    finally:
        cohort.instances = bare
