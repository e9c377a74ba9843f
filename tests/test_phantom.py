from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest

from counterstain.config import build, build_stored
from counterstain.data.patches import label_mask
from counterstain.data.phantom import regions_of_slide, render, write_phantom
from counterstain.data.phantom.nests import lay_out
from counterstain.data.phantom.styles import PhantomConfig, SlideStyle, index_of, slide_style
from counterstain.errors import ConfigError, InputError, MismatchError


def disc(size=96, radius=34):
    y, x = np.ogrid[:size, :size]
    return (np.hypot(y - size / 2, x - size / 2) < radius).astype(np.int32)


def dab_amount(image, style):
    """Amount of DAB by colour deconvolution (Ruifrok & Johnston 2001)."""
    density = -np.log10(np.maximum(image / 255 / style.glass, 1e-2))
    dyes = np.array([style.haematoxylin_vector, style.dab_vector])
    return (density @ np.linalg.pinv(dyes))[..., 1]


def without_artefacts(style):
    return style.model_copy(update=dict.fromkeys(("smears", "folds", "defocus", "precipitate"), 0.0))


def test_a_picture_follows_from_its_seed():
    nest = disc()
    first, again, other = (render(nest * 5, nest, SlideStyle(), seed, mpp=1.0) for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("slide", [0, 4, 9])
def test_dab_grows_with_the_score(slide):
    nest, style = disc(), without_artefacts(slide_style(PhantomConfig(), slide))
    pictures = [render(nest * label, nest, style, 3, mpp=1.0) for label in (1, 2, 3, 4)]
    amounts = [dab_amount(picture, style)[nest > 0].mean() for picture in pictures]
    assert np.all(np.diff(amounts) > 0.01)


def test_relabelling_leaves_the_tissue_around_and_the_nuclei_as_they_were():
    nest, style = disc(), without_artefacts(SlideStyle(noise=0.0))
    zero, one, three = (render(nest * label, nest, style, 5, mpp=1.0).astype(int) for label in (1, 2, 4))
    assert np.abs(zero - three)[disc(radius=40) == 0].max() <= 1
    assert np.abs(zero - three)[nest > 0].mean() > 10
    red = [picture[..., 0][nest > 0] for picture in (zero, one)]  # DAB hardly absorbs red
    assert np.corrcoef(*red)[0, 1] > 0.9


def test_background_has_no_tumour_cells_and_is_drawn_where_pixels_are_ignored():
    nest, empty, style = disc(), np.zeros((96, 96), np.int32), without_artefacts(SlideStyle())
    background = render(empty, empty, style, 2, mpp=1.0)
    assert dab_amount(background, style).mean() < 0.12
    assert np.array_equal(render(nest * 255, nest, style, 2, mpp=1.0), background)


@pytest.mark.parametrize("shape", [(64, 64), (40, 130), (1, 1), (3, 200)])
@pytest.mark.parametrize("label", [0, 1, 5])
def test_masks_of_any_shape_are_drawn(shape, label):
    everywhere = np.ones(shape, np.int32)
    picture = render(everywhere * label, everywhere, SlideStyle(), 0, mpp=1.0)
    assert picture.shape == (*shape, 3)
    assert picture.dtype == np.uint8


def test_an_instance_too_slight_for_the_lattice_gets_a_cell():
    nest, style = np.zeros((64, 64), np.int32), without_artefacts(SlideStyle())
    nest[30:36, 30:36] = 9
    stained = dab_amount(render(nest * 4 // 9, nest, style, 0, mpp=1.0), style)
    assert stained[nest > 0].max() > 0.3


@pytest.mark.parametrize("mpp", [0.25, 0.5, 2.0])
def test_sizes_follow_the_resolution(mpp):
    instances, subtypes = lay_out((96, 96), SlideStyle(), 3, mpp)
    picture = render(label_mask(instances, subtypes), instances, SlideStyle(), 3, mpp=mpp)
    assert picture.std() > 5


@pytest.mark.parametrize(
    ("labels", "instances", "message"),
    [
        (disc() * 7, disc(), r"found labels \[0, 7\]; the phantom draws 0..5"),
        (disc(), disc(64), r"shape \(96, 96\), instances of \(64, 64\)"),
    ],
)
def test_masks_that_cannot_be_drawn_are_refused(labels, instances, message):
    with pytest.raises(InputError, match=message):
        render(labels, instances, SlideStyle(), 0, mpp=1.0)


def test_a_style_depends_on_seed_and_slide_alone():
    assert slide_style(PhantomConfig(slides=3), 2) == slide_style(PhantomConfig(slides=300, size_px=64), 2)
    assert slide_style(PhantomConfig(), 2) != slide_style(PhantomConfig(), 3)
    assert slide_style(PhantomConfig(), 2) != slide_style(PhantomConfig(seed=1), 2)


def test_without_strength_slides_differ_in_their_score_only():
    styles = [slide_style(PhantomConfig(style_strength=0), slide) for slide in range(6)]
    assert len({style.model_copy(update={"dominant_score": 0}).model_dump_json() for style in styles}) == 1


def test_scores_of_slides_have_the_wanted_prevalence():
    config = PhantomConfig(slides=40)
    scores = [slide_style(config, slide).dominant_score for slide in range(config.slides)]
    assert np.abs(np.bincount(scores, minlength=4) / 40 - config.prevalence).max() <= 0.05


def test_pure_slides_hold_their_score_and_ducts_and_as_much_tumour_as_the_style_asks_for():
    shares = []
    for seed in range(12):
        instances, subtypes = lay_out((256, 256), SlideStyle(dominant_score=0, purity=1.0), seed, 1.0)
        assert sorted(subtypes) == [i for i in np.unique(instances).tolist() if i]
        assert set(subtypes.values()) <= {1, 5}
        shares.append((instances > 0).mean())
    assert 0.25 < np.mean(shares) < 0.45


def test_names_lead_back_to_slides():
    regions = regions_of_slide(PhantomConfig(regions_per_slide=2, size_px=48), 3)
    assert [region.region for region in regions] == ["phantom-003-r00", "phantom-003-r01"]
    assert {(region.slide, region.patient) for region in regions} == {("phantom-003", "P0-003")}
    assert regions[0].score in {"0", "1+", "2+", "3+"}
    assert index_of(regions[0].slide) == 3
    with pytest.raises(InputError, match="not a slide of a phantom; expected a name such as phantom-007"):
        index_of("case-17")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"prevalence": [0.5, 0.5, 0.5, 0]}, "must sum to 1, found 1.5"),
        ({"slides": 0}, "slides: Input should be greater than or equal to 1"),
        ({"purety": 1}, "unknown key; did you mean purity"),
    ],
)
def test_bad_settings_are_one_line(setting, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(PhantomConfig, setting, "phantom")
    assert "\n" not in str(error.value)


def test_phantoms_that_an_earlier_version_made_are_still_known():
    stored = PhantomConfig(seed=3).model_dump(mode="json")
    assert build_stored(PhantomConfig, stored | {"haze": 1.0, "duct_share": 0.15}) == PhantomConfig(seed=3)
    with pytest.raises(ConfigError, match=r"haze is 2\.0, but is always 1\.0"):
        build_stored(PhantomConfig, stored | {"haze": 2.0})


SMALL = PhantomConfig(slides=3, regions_per_slide=2, size_px=48)


def test_a_cohort_resumed_after_a_kill_equals_an_uninterrupted_one(tmp_path):
    whole = write_phantom(SMALL, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        write_phantom(SMALL, tmp_path / "resumed", Mock(side_effect=[None, KeyboardInterrupt]))
    resumed = write_phantom(SMALL, tmp_path / "resumed")
    pd.testing.assert_frame_equal(whole.regions, resumed.regions)
    pd.testing.assert_frame_equal(whole.instances, resumed.instances)
    for position in range(len(whole)):
        for one, other in zip(whole.read(position), resumed.read(position), strict=True):
            assert np.array_equal(one, other)


def test_a_larger_cohort_begins_with_the_slides_of_a_smaller_one(tmp_path):
    small = write_phantom(SMALL.model_copy(update={"slides": 1}), tmp_path / "small")
    large = write_phantom(SMALL, tmp_path / "large")
    assert np.array_equal(small.read(0)[0], large.read(0)[0])


def test_progress_is_called_for_every_slide_also_when_all_is_done(tmp_path):
    progress = Mock()
    for _ in range(2):
        cohort = write_phantom(SMALL, tmp_path / "cohort", progress)
    assert progress.call_count == len(cohort) == 6


def test_a_folder_of_another_phantom_is_left_alone(tmp_path):
    write_phantom(SMALL, tmp_path)
    with pytest.raises(MismatchError, match=r"belongs to another run \(cohort: source.config.seed was 0, now 1\)"):
        write_phantom(SMALL.model_copy(update={"seed": 1}), tmp_path)


def test_the_command_says_what_it_made_and_what_comes_next_and_refuses_values_out_of_range(tmp_path, run):
    status, _, errors = run("phantom", tmp_path / "p", "--slides", 0)
    assert (status, "slides" in errors, (tmp_path / "p").exists()) == (2, True, False)
    status, out, _ = run("phantom", tmp_path / "p", "--slides", 1, "--regions", 1, "--size-px", 48, "--set", "purity=1")
    assert status == 0
    assert "1 slides, 1 regions of 48 px at 1 mpp" in out
    assert "counterstain split" in out
