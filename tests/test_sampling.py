import itertools
from dataclasses import replace

import numpy as np
import pytest
from drawn_cohort import boxes, store

from counterstain.data.cohort import Cohort
from counterstain.data.patches import turn_back
from counterstain.data.sampling import PatchSampler, SamplingConfig
from counterstain.errors import InputError, TaxonomyError
from counterstain.taxonomy import IGNORE

PLAIN = {"flip": False, "quarter_turns": False}
ON_TUMOUR = PLAIN | {"background_share": 0}


def sampler(drawn, size_px=16, *, seed=0, **config):
    return PatchSampler(drawn, "train", size_px, SamplingConfig(**config), seed)


def first(n, stream):
    return [stream[i] for i in range(n)]


@pytest.fixture
def two_slides(tmp_path):
    """One slide nearly full of 3+, another with a speck of 0 and something to ignore."""
    return store(
        tmp_path / "cohort",
        boxes("a", (4, 0, 0, 60, 60), slide="s1"),
        boxes("b", (1, 10, 10, 14, 14), (IGNORE, 30, 30, 60, 60), slide="s2"),
    )


def centres(stream, n):
    """Return the label under the centre of patches that no edge has shifted."""
    half = stream.size_px // 2
    return np.array([patch.label_mask[half, half] for patch in first(n, stream)])


def test_slides_are_drawn_as_often_as_their_weights_say(two_slides):
    def slides(weights):
        stream = PatchSampler(two_slides, "train", 16, SamplingConfig(background_share=1.0), 0, slides=weights)
        return [patch.source.slide for patch in first(200, stream)]

    assert 130 < slides({"s1": 3, "s2": 1}).count("s1") < 170
    assert set(slides({"s2": 1})) == {"s2"}


def test_a_patch_depends_on_the_seed_and_its_number_alone(two_slides):
    in_order = first(8, sampler(two_slides, seed=7, stain_jitter=0.1))
    again = sampler(Cohort.open(two_slides.folder), seed=7, stain_jitter=0.1)
    for i in reversed(range(8)):
        np.testing.assert_array_equal(again[i].image, in_order[i].image)
        np.testing.assert_array_equal(again[i].instances, in_order[i].instances)
        assert again[i].source == in_order[i].source
    assert [p.source for p in first(8, sampler(two_slides, seed=8))] != [p.source for p in in_order]


def test_subtype_mode_draws_every_subtype_equally_often(two_slides):
    labels = centres(sampler(two_slides, 2, **ON_TUMOUR), 1000)
    assert np.mean(labels == 1) == pytest.approx(0.5, abs=0.05)


def test_tumor_mode_draws_slides_equally_and_their_pixels_by_area(tmp_path):
    drawn = store(
        tmp_path / "cohort",
        boxes("a", (4, 0, 0, 40, 40), slide="s1"),
        boxes("b", (4, 0, 0, 30, 30), (1, 40, 40, 50, 50), slide="s2"),
    )
    patches = first(2000, sampler(drawn, 2, mode="tumor", **ON_TUMOUR))
    on_second = [p.label_mask[1, 1] for p in patches if p.source.slide == "s2"]
    assert len(on_second) / 2000 == pytest.approx(0.5, abs=0.04)
    assert np.mean(np.array(on_second) == 1) == pytest.approx(0.1, abs=0.03)


def test_background_share_of_the_patches_is_centred_on_background_and_none_on_what_is_ignored(two_slides):
    labels = centres(sampler(two_slides, 2, background_share=0.3, **PLAIN), 1000)
    assert np.mean(labels == 0) == pytest.approx(0.3, abs=0.05)
    assert IGNORE not in labels


def test_positions_are_uniform_over_an_instance(tmp_path):
    stream = sampler(store(tmp_path / "cohort", boxes("a", (1, 20, 8, 40, 56))), 2, **ON_TUMOUR)
    counts, _ = np.histogram([p.source.x_px + 1 for p in first(1000, stream)], bins=4, range=(8, 56))
    assert counts.min() > 200


def test_an_instance_that_fills_almost_none_of_its_box_is_found(tmp_path):
    region = boxes("a")
    region.instances[0, 0] = region.instances[63, 63] = 1
    drawn = store(tmp_path / "cohort", replace(region, subtypes={1: 2}))
    assert sampler(drawn, 8, background_share=0)[0].subtypes == {1: 2}


def test_patches_lie_inside_their_region_and_list_just_the_instances_that_they_show(two_slides):
    for patch in first(50, sampler(two_slides, 48)):
        assert patch.image.shape == (48, 48, 3)
        assert 0 <= patch.source.y_px <= 16
        assert 0 <= patch.source.x_px <= 16
        assert set(patch.subtypes) == set(np.unique(patch.instances).tolist()) - {0}


def test_a_turned_patch_turns_back_to_where_it_was_cut(two_slides):
    seen = set()
    for patch in first(100, sampler(two_slides)):
        source = patch.source
        position = two_slides.regions["region"].tolist().index(source.region)
        cut = two_slides.patch(position, source.y_px, source.x_px, 16)
        turns = {"flipped": source.flipped, "quarter_turns": source.quarter_turns}
        np.testing.assert_array_equal(turn_back(patch.image, **turns), cut.image)
        np.testing.assert_array_equal(turn_back(patch.instances, **turns), cut.instances)
        seen.add(tuple(turns.values()))
    assert len(seen) == 8


def test_writing_into_a_patch_leaves_the_cohort_as_it_is(two_slides):
    before = two_slides.read(0)[0].copy()
    sampler(two_slides, 64, **PLAIN)[0].image[:] = 0
    np.testing.assert_array_equal(two_slides.read(0)[0], before)


def test_stain_jitter_changes_colours_but_neither_place_nor_labels(two_slides):
    plain, jittered = sampler(two_slides)[3], sampler(two_slides, stain_jitter=0.1)[3]
    assert jittered.source == plain.source
    np.testing.assert_array_equal(jittered.instances, plain.instances)
    assert 1 < np.abs(jittered.image.astype(int) - plain.image).mean() < 40


def test_only_the_chosen_subtypes_are_centred_on_and_those_without_a_pixel_are_named(two_slides):
    assert sampler(two_slides).missing_subtypes == ("HER2 1+", "HER2 2+", "LCIS/DCIS")
    for mode in ("tumor", "subtype"):
        assert set(centres(sampler(two_slides, 2, mode=mode, subtypes=("HER2 0",), **ON_TUMOUR), 20)) == {1}


def test_parts_regions_and_patches_that_there_are_not_are_named(two_slides):
    with pytest.raises(InputError, match="split 'trian': expected train, val or test"):
        PatchSampler(two_slides.folder, "trian", 16)
    with pytest.raises(InputError, match="expected train, val or test"):
        two_slides.patients("training")
    with pytest.raises(InputError, match="no region 2; they are numbered from 0 to 1"):
        two_slides.read(2)
    for place in ((0, 0, 65), (60, 0, 8), (0, -1, 8), (0, 0, 0)):
        with pytest.raises(InputError, match="in region a, which is 64 x 64 px"):
            two_slides.patch(0, *place)


@pytest.mark.parametrize(
    ("size_px", "subtype", "error", "message"),
    [
        (16, "HER2 4+", TaxonomyError, r"unknown subtype 'HER2 4\+'; her2 has HER2 0, HER2 1\+"),
        (16, "HER2 1+", InputError, r"split 'train' has no pixel of HER2 1\+; choose other subtypes"),
        (0, "HER2 0", InputError, "size_px 0: expected a whole number of pixels"),
        (96, "HER2 0", InputError, r"2 of 2 regions .* patch of 96 px: a \(64 x 64 px\), .* size_px=64"),
    ],
)
def test_a_part_that_cannot_be_sampled_is_an_error_with_the_remedy(two_slides, size_px, subtype, error, message):
    with pytest.raises(error, match=message):
        sampler(two_slides, size_px, subtypes=(subtype,))


def test_a_part_without_background_is_an_error_with_the_remedy(tmp_path):
    drawn = store(tmp_path / "cohort", boxes("a", (1, 0, 0, 64, 64)))
    with pytest.raises(InputError, match="no background pixel; set background_share to 0"):
        sampler(drawn)
    assert sampler(drawn, background_share=0)[0].subtypes == {1: 1}


def test_a_sampler_has_neither_negative_numbers_nor_an_end_and_says_so(two_slides):
    stream = sampler(two_slides, **PLAIN)
    with pytest.raises(IndexError, match="numbered 0, 1, 2"):
        stream[-1]
    with pytest.raises(TypeError, match=r"no end.*islice\(sampler\.stream\(\), n\)"):
        list(stream)
    streamed = list(itertools.islice(stream.stream(5), 2))
    assert [p.source for p in streamed] == [stream[5].source, stream[6].source]
