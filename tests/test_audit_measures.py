from dataclasses import replace

import numpy as np
import pytest
from drawn_cohort import HER2, SPLIT, draw_region
from scipy import ndimage

from counterstain.audit.copies import CopyCheck, CopySearch, copy_table
from counterstain.audit.fidelity import Sample, frechet_distance, groups_of, jackknife, kernel_distance
from counterstain.data.cohort import CohortWriter
from counterstain.data.patches import Patch, Source
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
    own, apart = (copy_table(search, found, shown=s) for s in ({}, {i: [p.source] for i, p in enumerate(found)}))
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


def difference(real, drawn):
    return float(real.mean() - drawn.mean())


def sample(seed, groups=8, each=20, shift=0.0, name="p"):
    rng = np.random.default_rng(seed)
    of_group = rng.normal(size=(groups, 1, 3))
    features = (of_group + rng.normal(size=(groups, each, 3)) + shift).reshape(-1, 3)
    return Sample(features=features, groups=np.repeat([f"{name}{i}" for i in range(groups)], each))


def test_of_a_mean_it_is_the_interval_over_the_means_of_groups():
    real, drawn = sample(0, name="a"), sample(1, name="b")
    found = jackknife(difference, real, drawn)
    means = [s.features.reshape(8, -1).mean(1) for s in (real, drawn)]
    variance = sum(m.var(ddof=1) / 8 for m in means)
    assert found.value == pytest.approx(means[0].mean() - means[1].mean())
    reach = (found.high - found.low) / 2
    assert 2.14 <= reach / np.sqrt(variance) <= 2.37  # Student's quantile for 14 and for 7 degrees of freedom


def test_groups_of_both_samples_are_left_out_together_those_of_one_alone():
    real = sample(0)
    drawn = Sample(features=real.features + 1, groups=real.groups)
    found = jackknife(difference, real, drawn)
    assert found.high - found.low == pytest.approx(0, abs=1e-9)
    found = jackknife(difference, real, sample(1, groups=9))
    assert found.low < found.value < found.high


def test_groups_of_unequal_size_count_by_their_size():
    even = sample(0, groups=6)
    doubled = np.concatenate([even.features, even.features[-20:]])
    uneven = Sample(features=doubled, groups=np.append(even.groups, even.groups[-20:]))
    other = Sample(features=np.zeros((4, 3)), groups=np.array(["x", "x", "y", "y"]))
    found = jackknife(difference, uneven, other)
    shares = np.array([1, 1, 1, 1, 1, 2]) / 7
    means = even.features.reshape(6, -1).mean(1)
    expected = np.mean((means - means.mean()) ** 2 / (1 / shares - 1))
    # Welch: the other sample's groups are all alike and add nothing.
    assert (found.high - found.value) == pytest.approx(2.5706 * np.sqrt(expected), rel=0.01)


def test_an_interval_shrinks_with_more_patients():
    few = jackknife(frechet_distance, sample(0, 8, name="a"), sample(1, 8, shift=1, name="b"))
    many = jackknife(frechet_distance, sample(0, 64, name="a"), sample(1, 64, shift=1, name="b"))
    assert few.low < few.value < few.high
    assert many.high - many.low < 0.6 * (few.high - few.low)


def test_a_frechet_distance_is_never_below_nothing_and_one_group_has_no_interval():
    assert jackknife(frechet_distance, sample(0, name="a"), sample(1, name="b"), least=0).low >= 0
    found = jackknife(kernel_distance, sample(0), sample(1, groups=1, name="b"))
    assert np.isfinite(found.value)
    assert np.isnan(found.low)


def test_few_patients_are_replaced_by_their_regions():
    def patch(patient, region):
        source = Source(region=region, slide=patient, patient=patient, y_px=0, x_px=0)
        image, instances = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.int32)
        return Patch(image=image, instances=instances, subtypes={}, source=source)

    many = [patch(f"p{i}", f"r{i}") for i in range(6)]
    few = [patch("q", f"q{i}") for i in range(6)]
    assert groups_of(many, many)[0].tolist() == [f"p{i}" for i in range(6)]
    assert groups_of(many, few)[1].tolist() == [f"q{i}" for i in range(6)]
