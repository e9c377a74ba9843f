import itertools
from dataclasses import replace

import numpy as np
import pytest

from counterstain.data.cohort import Cohort, CohortWriter
from counterstain.data.patches import turn_back
from counterstain.data.region_store import Region
from counterstain.data.sampling import PatchSampler, SamplingConfig
from counterstain.errors import InputError, TaxonomyError
from counterstain.taxonomy import IGNORE, Taxonomy

HER2 = Taxonomy.named("her2")
PLAIN = SamplingConfig(flip=False, quarter_turns=False)


def region(name, *, boxes, size=64, slide="s1"):
    """Draw boxes of (subtype, y0, x0, y1, x1)."""
    instances = np.zeros((size, size), np.int32)
    image = np.random.default_rng(len(name)).integers(0, 256, (size, size, 3), dtype=np.uint8)
    for i, (_, y0, x0, y1, x1) in enumerate(boxes, start=1):
        instances[y0:y1, x0:x1] = i
    subtypes = {i: box[0] for i, box in enumerate(boxes, start=1)}
    return Region(
        region=name, slide=slide, patient=slide, image=image, instances=instances, subtypes=subtypes, split="train"
    )


def cohort(folder, *regions) -> Cohort:
    writer = CohortWriter(folder / "cohort", taxonomy=HER2, mpp=0.5, source={})
    writer.add("all", regions)
    return writer.finish()


@pytest.fixture
def two_slides(tmp_path):
    """One slide nearly full of 3+, another with a speck of 0 and something to ignore."""
    return cohort(
        tmp_path,
        region("a", boxes=[(4, 0, 0, 60, 60)], slide="s1"),
        region("b", boxes=[(1, 10, 10, 14, 14), (IGNORE, 30, 30, 60, 60)], slide="s2"),
    )


def centres(sampler, n):
    """Return the label under the centre of patches that no edge has shifted."""
    half = sampler.size_px // 2
    return np.array([sampler[i].label_mask[half, half] for i in range(n)])


def test_a_patch_depends_on_the_seed_and_its_number_alone(two_slides):
    sampler = PatchSampler(two_slides, "train", 16, SamplingConfig(stain_jitter=0.1), 7)
    in_order = [sampler[i] for i in range(8)]
    again = PatchSampler(Cohort.open(two_slides.folder), "train", 16, SamplingConfig(stain_jitter=0.1), 7)
    for i in reversed(range(8)):
        np.testing.assert_array_equal(again[i].image, in_order[i].image)
        np.testing.assert_array_equal(again[i].instances, in_order[i].instances)
        assert again[i].source == in_order[i].source


def test_another_seed_draws_other_patches(two_slides):
    first, second = (PatchSampler(two_slides, "train", 16, PLAIN, seed) for seed in (0, 1))
    assert [first[i].source for i in range(8)] != [second[i].source for i in range(8)]


def test_subtype_mode_draws_every_subtype_equally_often(two_slides):
    config = SamplingConfig(background_share=0, flip=False, quarter_turns=False)
    labels = centres(PatchSampler(two_slides, "train", 2, config, 0), 1000)
    assert np.mean(labels == 1) == pytest.approx(0.5, abs=0.05)


def test_tumor_mode_draws_slides_equally_and_their_pixels_by_area(tmp_path):
    drawn = cohort(
        tmp_path,
        region("a", boxes=[(4, 0, 0, 40, 40)], slide="s1"),
        region("b", boxes=[(4, 0, 0, 30, 30), (1, 40, 40, 50, 50)], slide="s2"),
    )
    config = SamplingConfig(mode="tumor", background_share=0, flip=False, quarter_turns=False)
    sampler = PatchSampler(drawn, "train", 2, config, 0)
    patches = [sampler[i] for i in range(2000)]
    on_second = [p.label_mask[1, 1] for p in patches if p.source.slide == "s2"]
    assert len(on_second) / 2000 == pytest.approx(0.5, abs=0.04)
    assert np.mean(np.array(on_second) == 1) == pytest.approx(0.1, abs=0.03)


def test_background_share_of_the_patches_is_centred_on_background(two_slides):
    config = SamplingConfig(background_share=0.3, flip=False, quarter_turns=False)
    labels = centres(PatchSampler(two_slides, "train", 2, config, 0), 1000)
    assert np.mean(labels == 0) == pytest.approx(0.3, abs=0.05)


def test_nothing_to_be_ignored_is_ever_centred_on(two_slides):
    labels = centres(PatchSampler(two_slides, "train", 2, PLAIN, 0), 500)
    assert IGNORE not in labels


def test_positions_are_uniform_over_an_instance(tmp_path):
    drawn = cohort(tmp_path, region("a", boxes=[(1, 20, 8, 40, 56)]))
    config = SamplingConfig(background_share=0, flip=False, quarter_turns=False)
    sampler = PatchSampler(drawn, "train", 2, config, 0)
    columns = [sampler[i].source.x_px + 1 for i in range(1000)]
    counts, _ = np.histogram(columns, bins=4, range=(8, 56))
    assert counts.min() > 200


def test_an_instance_that_fills_almost_none_of_its_box_is_found(tmp_path):
    drawn_region = region("a", boxes=[])
    drawn_region.instances[0, 0] = drawn_region.instances[63, 63] = 1
    drawn = cohort(tmp_path, replace(drawn_region, subtypes={1: 2}))
    sampler = PatchSampler(drawn, "train", 8, SamplingConfig(background_share=0), 0)
    assert sampler[0].subtypes == {1: 2}


def test_patches_lie_inside_their_region(two_slides):
    sampler = PatchSampler(two_slides, "train", 48, SamplingConfig(), 0)
    for i in range(50):
        patch = sampler[i]
        assert patch.image.shape == (48, 48, 3)
        assert 0 <= patch.source.y_px <= 16
        assert 0 <= patch.source.x_px <= 16


def test_a_turned_patch_turns_back_to_where_it_was_cut(two_slides):
    sampler = PatchSampler(two_slides, "train", 16, SamplingConfig(), 0)
    seen = set()
    for i in range(100):
        patch = sampler[i]
        source = patch.source
        position = two_slides.regions["region"].tolist().index(source.region)
        cut = two_slides.patch(position, source.y_px, source.x_px, 16)
        turns = {"flipped": source.flipped, "quarter_turns": source.quarter_turns}
        np.testing.assert_array_equal(turn_back(patch.image, **turns), cut.image)
        np.testing.assert_array_equal(turn_back(patch.instances, **turns), cut.instances)
        seen.add((source.flipped, source.quarter_turns))
    assert len(seen) == 8


def test_a_patch_lists_just_the_instances_that_it_shows(two_slides):
    sampler = PatchSampler(two_slides, "train", 8, SamplingConfig(), 0)
    for i in range(30):
        patch = sampler[i]
        assert set(patch.subtypes) == set(np.unique(patch.instances).tolist()) - {0}


def test_writing_into_a_patch_leaves_the_cohort_as_it_is(tmp_path):
    drawn = cohort(tmp_path, region("a", boxes=[(1, 0, 0, 9, 9)], size=16))
    before = drawn.read(0)[0].copy()
    PatchSampler(drawn, "train", 16, PLAIN, 0)[0].image[:] = 0
    np.testing.assert_array_equal(drawn.read(0)[0], before)


def test_stain_jitter_changes_colours_but_neither_place_nor_labels(two_slides):
    plain = PatchSampler(two_slides, "train", 16, SamplingConfig(), 0)[3]
    jittered = PatchSampler(two_slides, "train", 16, SamplingConfig(stain_jitter=0.1), 0)[3]
    assert jittered.source == plain.source
    np.testing.assert_array_equal(jittered.instances, plain.instances)
    assert 1 < np.abs(jittered.image.astype(int) - plain.image).mean() < 40


def test_subtypes_without_a_pixel_are_named(two_slides):
    sampler = PatchSampler(two_slides, "train", 16, SamplingConfig(), 0)
    assert sampler.missing_subtypes == ("HER2 1+", "HER2 2+", "LCIS/DCIS")


def test_only_the_chosen_subtypes_are_centred_on(two_slides):
    for mode in ("tumor", "subtype"):
        config = SamplingConfig(mode=mode, background_share=0, subtypes=("HER2 0",), flip=False, quarter_turns=False)
        assert set(centres(PatchSampler(two_slides, "train", 2, config, 0), 20)) == {1}


def test_an_unknown_subtype_is_an_error_that_names_the_known_ones(two_slides):
    with pytest.raises(TaxonomyError, match=r"unknown subtype 'HER2 4\+'; her2 has HER2 0, HER2 1\+"):
        PatchSampler(two_slides, "train", 16, SamplingConfig(subtypes=("HER2 4+",)), 0)


def test_a_region_smaller_than_a_patch_is_named_with_its_size(two_slides):
    with pytest.raises(InputError, match=r"region a is 64 x 64 px \(and 1 more\), smaller than .* 64 px or less"):
        PatchSampler(two_slides, "train", 96, SamplingConfig(), 0)


def test_a_part_without_any_of_the_subtypes_is_an_error(two_slides):
    with pytest.raises(InputError, match=r"part 'train' has no pixel of HER2 1\+; choose other subtypes"):
        PatchSampler(two_slides, "train", 16, SamplingConfig(subtypes=("HER2 1+",)), 0)


def test_a_part_without_background_is_an_error_with_the_remedy(tmp_path):
    drawn = cohort(tmp_path, region("a", boxes=[(1, 0, 0, 64, 64)]))
    with pytest.raises(InputError, match="no background pixel; set background_share to 0"):
        PatchSampler(drawn, "train", 16, SamplingConfig(), 0)
    assert PatchSampler(drawn, "train", 16, SamplingConfig(background_share=0), 0)[0].subtypes == {1: 1}


def test_patches_have_no_negative_numbers(two_slides):
    with pytest.raises(IndexError, match="numbered 0, 1, 2"):
        PatchSampler(two_slides, "train", 16, SamplingConfig(), 0)[-1]


def test_a_sampler_has_no_end_and_says_so(two_slides):
    sampler = PatchSampler(two_slides, "train", 16, PLAIN, seed=0)
    with pytest.raises(TypeError, match=r"no end.*islice\(sampler\.stream\(\), n\)"):
        list(sampler)
    streamed = list(itertools.islice(sampler.stream(5), 2))
    assert [p.source for p in streamed] == [sampler[5].source, sampler[6].source]
