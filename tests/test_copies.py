from dataclasses import replace

import numpy as np
import pytest
from drawn_cohort import HER2, SPLIT, draw_region
from scipy import ndimage

from counterstain.audit.copies import CopyCheck, CopySearch, copy_table
from counterstain.data.cohort import CohortWriter
from counterstain.data.sampling import PatchSampler, SamplingConfig


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Discs that are told apart by their texture, as tissue is."""
    rng = np.random.default_rng(0)
    writer = CohortWriter(tmp_path_factory.mktemp("cohort") / "c", HER2, 0.5, {"kind": "textured"})
    for i in range(len(SPLIT)):
        region = draw_region(rng, f"p{i}-0", f"p{i}")
        texture = 400 * ndimage.gaussian_filter(rng.normal(size=(*region.image.shape[:2], 1)), (2.5, 2.5, 0))
        textured = np.clip(0.5 * region.image + texture + 60, 0, 255).astype(np.uint8)
        writer.add(f"p{i}", [replace(region, image=textured)])
    return writer.finish().write_split({f"p{i}": part for i, part in enumerate(SPLIT)})


@pytest.fixture(scope="module")
def search(cohort):
    return CopySearch(cohort, 32)


def patches(cohort, part, count=12):
    sampler = PatchSampler(cohort, part, 32, SamplingConfig(background_share=0.2), seed=3)
    return [sampler[i] for i in range(count)]


def test_the_similarity_is_pearson_s_correlation_of_the_compared_pixels(cohort, search):
    rng = np.random.default_rng(0)
    for patch in patches(cohort, "test", 4):
        mask = rng.random((32, 32)) < 0.7
        match = search.best(patch.image, mask)
        one, other = (image.mean(2)[mask] for image in (patch.image, search.crop(match)))
        assert match.similarity == pytest.approx(np.corrcoef(one, other)[0, 1], abs=1e-4)


def test_training_tissue_is_found_at_its_place_however_it_is_turned(cohort, search):
    names = cohort.regions["region"].tolist()
    for patch in patches(cohort, "train"):
        match = search.best(patch.image)
        assert match.similarity == pytest.approx(1, abs=1e-4)
        source = patch.source
        assert (names[match.region], match.y_px, match.x_px) == (source.region, source.y_px, source.x_px)
        assert np.array_equal(search.crop(match), patch.image)


def test_the_patch_that_a_mask_is_from_can_be_left_out(cohort, search):
    found = patches(cohort, "train")
    own, apart = copy_table(search, found), copy_table(search, found, own_tissue=False)
    assert own["similarity"].min() > 0.999
    assert apart["similarity"].max() < 0.9
    names = cohort.regions["region"].tolist()
    for row in apart.itertuples():
        source = found[row.image].source
        if names[row.region] == source.region:
            assert max(abs(row.y_px - source.y_px), abs(row.x_px - source.x_px)) >= 30  # to the shrunk pixel


def test_other_contrast_hides_no_copy_and_empty_images_are_none_of_empty_tissue(cohort, search):
    patch = patches(cohort, "train")[0]
    assert search.best((patch.image * 0.6 + 30).astype(np.uint8)).similarity > 0.99
    assert search.best(np.full((32, 32, 3), 230, np.uint8)).similarity < 0.5


def test_of_inpainted_images_only_what_was_drawn_is_compared(cohort, search):
    rng = np.random.default_rng(0)
    drawn = []
    for patch in patches(cohort, "train"):
        noise = rng.integers(0, 256, patch.image.shape, np.uint8)
        drawn.append(replace(patch, image=np.where((patch.instances > 0)[..., None], noise, patch.image)))
    assert copy_table(search, drawn, frozenset({255}))["similarity"].max() < 0.6


def test_patches_with_too_little_drawn_are_left_out(cohort, search):
    bare = [replace(p, instances=np.zeros_like(p.instances), subtypes={}) for p in patches(cohort, "train", 3)]
    assert copy_table(search, bare, frozenset()).empty
    kept = frozenset(range(1, 6))
    assert copy_table(search, patches(cohort, "train", 3), kept).empty


def test_a_set_of_copies_is_found_out_and_held_out_patches_are_not(cohort, search):
    check = CopyCheck(search, patches(cohort, "val"), most=8)
    assert check.look(patches(cohort, "train")).share == 1.0
    assert check.look(patches(cohort, "val")).share <= 0.125
    assert len(check.look(patches(cohort, "train")).table) == 8
