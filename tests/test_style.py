import itertools

import numpy as np
import pytest
import torch
from drawn_cohort import draw_cohort
from drawn_requests import denoiser_config, drawn_by, first_stage_config

from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import PatchSet
from counterstain.data.phantom import write_phantom
from counterstain.data.phantom.styles import PhantomConfig, slide_style, style_from_vector, style_vector
from counterstain.data.sampling import SamplingConfig
from counterstain.data.split import SplitConfig, split_cohort
from counterstain.errors import ConfigError, InputError, LeakageError, MismatchError
from counterstain.generators.diffusion_config import SamplerConfig, StyleChoice, StyleConfig
from counterstain.generators.drawing import DiffusionGenerator
from counterstain.generators.interface import OracleGenerator
from counterstain.generators.pipeline import stain_statistics, without_tumour
from counterstain.generators.spade import Spade, SpadeGenerator
from counterstain.generators.spade_config import SpadeConfig
from counterstain.generators.style import StyleDrawer, StyleReferences
from counterstain.generators.train import train_autoencoder, train_diffusion
from counterstain.synthesis.masks import SynthesisConfig
from counterstain.synthesis.redraw import redraw_regions
from counterstain.synthesis.synthesize import synthesize
from counterstain.taxonomy import BACKGROUND
from counterstain.training_config import TrainingConfig

FEW = TrainingConfig(steps=4, batch_size=4)
SYNTHESIS = SynthesisConfig(sampling=SamplingConfig(background_share=0.2))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return draw_cohort(tmp_path_factory.mktemp("cohort") / "c")


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("models")
    stage = first_stage_config(training=FEW, kind="linear", validation_patches=0)
    train_autoencoder(cohort, stage, out / "ae", size_px=32, seed=0)
    config = denoiser_config(
        training=FEW, latent_pool=8, lr=1e-2, ema_decay=None, style=StyleConfig(width=4, code=3),
        sampler=SamplerConfig(steps=2, compute_batch=16),
    )  # fmt: skip
    return train_diffusion(cohort, config, out / "dm", autoencoder=out / "ae", size_px=32, seed=0)


def references(cohort):
    return StyleReferences(cohort, 32, 0)


def test_a_style_does_not_change_when_the_tumour_of_its_reference_does(cohort):
    patch = references(cohort)[1]
    tumour = patch.instances != BACKGROUND
    repainted = np.where(tumour[..., None], 7, patch.image).astype(np.uint8)
    assert tumour.any()
    for taken in (without_tumour, stain_statistics):
        assert np.array_equal(taken(repainted, patch.label_mask), taken(patch.image, patch.label_mask))


def test_stain_statistics_are_means_and_deviations_of_the_backgrounds_optical_density():
    image = np.full((2, 2, 3), 255, np.uint8)
    image[0, 0], image[1] = 51, 0
    mask = np.array([[0, 0], [3, 255]], np.uint8)
    expected = np.log(5) / 2
    assert stain_statistics(image, mask) == pytest.approx([expected] * 6)
    assert not stain_statistics(image, np.ones_like(mask)).any()


def test_references_are_cut_from_their_slide_and_from_training_slides_alone(cohort):
    found = references(cohort)
    assert found.slides == ["p0", "p1", "p2"]
    chosen = found.choose("p1", 5, 0)
    assert len(set(chosen)) == 5
    assert {found[n].source.slide for n in chosen} == {"p1"}
    assert chosen == references(cohort).choose("p1", 5, 0) != found.choose("p1", 5, 1)
    assert np.array_equal(found[chosen[0]].image, references(cohort)[chosen[0]].image)
    with pytest.raises(LeakageError, match="slide p4: is not of the training part"):
        found.choose("p4", 1, 0)


def test_references_of_regions_that_are_smaller_than_patches_are_brought_to_their_size(tmp_path):
    found = StyleReferences(draw_cohort(tmp_path / "small", size_px=48), 60, 0)
    assert found[0].image.shape == (48, 48, 3)
    described = found.described(torch.tensor([[0, 1], [70, 130]]))
    assert described["style_seen"].shape == (2, 2, 3, 60, 60)
    assert described["style_stain"].shape == (2, 2, 6)


def test_a_style_is_the_mean_of_its_references(cohort, trained):
    generator = DiffusionGenerator.load(trained)
    found = references(cohort)
    assert generator.references_per_style == StyleConfig().references == 8
    chosen = found.choose("p1", 8, "image", 5)
    expected = np.mean([generator.style_codes([found[number]])[0] for number in chosen], axis=0)
    assert StyleDrawer(generator, found, StyleChoice(source="own"))("p1", 5).code == pytest.approx(expected)


def test_styles_are_mixed_as_asked(cohort, trained):
    generator = DiffusionGenerator.load(trained)
    for source, slides in (("own", 1), ("other", 1), ("mixture", 2), ("beyond", 2)):
        drawer = StyleDrawer(generator, references(cohort), StyleChoice(source=source, step=0.5))
        styles = [drawer("p0", number) for number in range(6)]
        mixes = [style.mix for style in styles]
        assert all(sum(w for _, w in mix) == pytest.approx(1) and len(mix) == slides for mix in mixes)
        assert [style.code[-1] for style in styles] == pytest.approx([1] * 6)  # a style is given, whatever its weights
        assert np.array_equal(drawer("p0", 4).code, styles[4].code)
        if source == "own":
            assert {slide for mix in mixes for slide, _ in mix} == {"p0"}
        if source == "other":
            assert "p0" not in {slide for mix in mixes for slide, _ in mix}
        if source == "beyond":
            assert [w for _, w in mixes[0]] == pytest.approx([-0.5, 1.5])


def test_the_style_of_every_patch_is_on_record_and_changes_its_image(cohort, trained, tmp_path):
    generator = DiffusionGenerator.load(trained)
    sets = {}
    for source in ("none", "own", "mixture"):
        config = SYNTHESIS.model_copy(update={"style": StyleChoice(source=source)})
        sets[source] = synthesize(generator, cohort, tmp_path / source, config, count=64, size_px=32, seed=0)
    assert "style_slides" not in sets["none"].patches
    own = sets["own"].patches
    assert [list(slides) for slides in own["style_slides"]] == [[slide] for slide in own["slide"]]
    mixed = PatchSet.open(tmp_path / "mixture").patches
    assert mixed["style_weights"].map(sum).to_numpy() == pytest.approx(1)
    assert any(not np.array_equal(a.image, b.image) for a, b in zip(sets["own"], sets["mixture"], strict=True))


def test_the_encoder_of_styles_learns(cohort, trained):
    generator = DiffusionGenerator.load(trained)
    style = generator.model.style
    assert style.embedding[-1].weight.abs().max() > 0  # it starts at 0
    batch = {"latents": torch.randn(2, 4, 8, 8), "labels": torch.zeros(2, 32, 32, dtype=torch.uint8)}
    batch |= references(cohort).described(torch.arange(6).reshape(2, 3))
    batch |= {"step": torch.tensor(0), "position": torch.arange(2)}
    generator.model.losses(batch)["loss"].backward()
    assert all(p.grad is not None for p in style.parameters())


def spade(**changes):
    widths = {"generator_width": 4, "discriminator_width": 4, "hidden": 8, "latent": 8}
    return SpadeGenerator(Spade(SpadeConfig(training=FEW, vgg_weight=0.0, **widths, **changes), 6, 32))


def test_spade_draws_in_the_style_that_its_encoder_finds(cohort):
    generator = spade(compute_batch=4)
    found = references(cohort)
    styles = generator.style_codes([found[found.choose(slide, 1, "image", 0)[0]] for slide in found.slides[:2]])
    first, second = drawn_by(generator, np.zeros((2, 32, 32), np.uint8), [0, 0], styles=styles)
    assert not np.array_equal(first, second)


def test_a_generator_without_styles_says_so(cohort):
    drawer = StyleDrawer(spade(use_vae=False), references(cohort), StyleChoice(source="own"))
    with pytest.raises(ConfigError, match="trained with use_vae: false"):
        drawer("p0", 0)
    with pytest.raises(ConfigError, match="this generator takes no styles"):
        StyleDrawer(object(), references(cohort), StyleChoice(source="own"))


def test_regions_are_redrawn_whole_with_their_provenance(cohort, trained, tmp_path):
    generator = DiffusionGenerator.load(trained, "inpainting")
    config = SYNTHESIS.model_copy(update={"style": StyleChoice(source="other")})
    drawn = redraw_regions(generator, cohort, tmp_path / "r", config, seed=3, regions=["p1-0"])
    image, instances = drawn.read(0)
    original = cohort.read(int(cohort.positions("train")[2]))
    assert drawn.regions["region"].tolist() == ["p1-0-redrawn-3"]
    assert np.array_equal(instances, original[1])
    assert np.array_equal(image[instances == 0], original[0][instances == 0])
    assert not np.array_equal(image, original[0])
    assert drawn.patients("train") == ["p0", "p1", "p2"]  # all that the generator saw
    tables = [Cohort.open(tmp_path / "r").folder / f"redrawn_{name}.parquet" for name in ("regions", "instances")]
    assert all(table.exists() for table in tables)
    everything = redraw_regions(generator, cohort, tmp_path / "all", config, seed=3)
    position = everything.regions["region"].tolist().index("p1-0-redrawn-3")
    assert np.array_equal(everything.read(position)[0], image)


@pytest.mark.parametrize(
    ("region", "error", "message"),
    [("p4-0", LeakageError, "is not of the training part"), ("p9", InputError, "no region 'p9'")],
)
def test_only_training_regions_are_redrawn(cohort, trained, tmp_path, region, error, message):
    generator = DiffusionGenerator.load(trained)
    with pytest.raises(error, match=message):
        redraw_regions(generator, cohort, tmp_path / "r", SYNTHESIS, seed=0, regions=[region])
    assert not (tmp_path / "r").exists()


def test_spade_does_not_redraw_regions(cohort, tmp_path):
    generator = object.__new__(SpadeGenerator)
    with pytest.raises(MismatchError, match="redraw regions with diffusion or inpainting"):
        redraw_regions(generator, cohort, tmp_path / "r", SYNTHESIS, seed=0)


def test_the_oracle_draws_in_the_styles_of_other_slides_and_between_them(tmp_path):
    config = PhantomConfig(slides=6, regions_per_slide=1, size_px=96, style_strength=2.0)
    phantom = split_cohort(write_phantom(config, tmp_path / "c"), SplitConfig(train=4, val=1, test=1))[0]
    oracle = OracleGenerator(phantom)
    first, second = (
        references(phantom)[references(phantom).choose(slide, 1)[0]] for slide in references(phantom).slides[:2]
    )
    codes = oracle.style_codes([first, second])
    asked = {"masks": first.label_mask[None], "seeds": [3], "instances": first.instances[None]}
    own, other = (drawn_by(oracle, **asked, slides=[p.source.slide]) for p in (first, second))
    drawn = {
        name: drawn_by(oracle, **asked, slides=[first.source.slide], styles=code[None])
        for name, code in {"own": codes[0], "other": codes[1], "between": codes.mean(0)}.items()
    }
    assert np.abs(drawn["own"].astype(int) - own).max() <= 1  # styles are given in single precision
    assert np.abs(drawn["other"].astype(int) - other).max() <= 1
    means = {name: image.mean((0, 1, 2)) for name, image in drawn.items()}
    low, high = np.minimum(means["own"], means["other"]), np.maximum(means["own"], means["other"])
    assert (high - low).max() > 5
    assert (means["between"] > low - 2).all()
    assert (means["between"] < high + 2).all()


def test_a_style_beyond_two_slides_is_a_style(tmp_path):
    config = PhantomConfig(slides=8, style_strength=3.0)
    vectors = [style_vector(slide_style(config, index)) for index in range(8)]
    for first, second in itertools.combinations(vectors, 2):
        beyond = style_from_vector(first + 3.0 * (second - first))
        assert min(beyond.blur_um, beyond.haze, *beyond.haematoxylin_vector, *beyond.glass) >= 0


def test_a_styles_vector_gives_the_style_back():
    style = slide_style(PhantomConfig(), 3)
    again = style_from_vector(style_vector(style))
    layout = {"dominant_score", "purity", "duct_share", "tumour_share", "nest_radius_um", "nest_length"}
    for name, value in style.model_dump(exclude=layout).items():
        assert getattr(again, name) == pytest.approx(value, rel=1e-5), name
