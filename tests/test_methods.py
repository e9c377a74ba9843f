from __future__ import annotations

import pytest
from drawn_results import draw_results

from counterstain.recipe import load_recipe
from counterstain.report.methods_section import methods_paragraphs, settings_table
from counterstain.report.results import FilterCount, read_results
from counterstain.study.arms import OF_SYNTHETIC, VARIANTS


@pytest.fixture
def study_of(tmp_path):
    def read(*arms, preset="demo", variants=None, methods=("spade",), settings=()):
        recipe = load_recipe(preset, None, list(settings)).model_dump(mode="json")
        config = {"recipe": recipe, "study": {"variants": variants or {}}}
        run = draw_results(tmp_path / str(arms), ("subtype", *arms), 1, methods=methods, config=config)
        return read_results(run).study

    return read


@pytest.fixture
def methods_of(study_of):
    return lambda *arms, **options: " ".join(methods_paragraphs(study_of(*arms, **options)))


def test_generators_that_no_arm_uses_are_not_told_of(methods_of):
    text = methods_of("spade+100")
    assert "SPADE (Park et al. 2019)" in text
    assert "Denoiser" not in text


def test_pixel_noise_of_spade_is_told(methods_of):
    assert " and pixel noise. Generator" in methods_of("spade+100")


def test_the_paper_s_spade_has_no_pixel_noise(methods_of):
    text = methods_of("spade+100", preset="paper")
    assert "SPADE" in text
    assert "pixel noise" not in text


def test_nuclei_that_are_kept_are_told(methods_of):
    shown = "diffusion.counterstain.other_stain=eosin"
    text = methods_of("inpainting+100", methods=("inpainting",), settings=[shown])
    assert "haematoxylin of the real patch, unmixed from eosin" in text


@pytest.mark.parametrize(
    ("shows", "words"),
    [("structure", "local standard deviation"), ("contrast", "in optical density, so that")],
)
def test_how_nuclei_are_shown_is_told(methods_of, shows, words):
    settings = [f"diffusion.counterstain.shows={shows}"]
    assert words in methods_of("diffusion+100", methods=("diffusion",), settings=settings)


def test_whose_style_images_are_drawn_in_is_told(methods_of):
    settings = ["diffusion.style.references=3", "synthesis.style.source=own"]
    text = methods_of("diffusion+100", methods=("diffusion",), settings=settings)
    assert "averaged over other patches of the slide" in text
    assert "the same masks, each in the style of its own slide" in text


@pytest.mark.parametrize(
    ("source", "values"),
    [("none", "random latent codes"), ("own", "the latent code of a patch with")],
)
def test_where_the_latent_values_of_spade_come_from_is_told(methods_of, source, values):
    text = methods_of("spade+100", settings=[f"synthesis.style.source={source}", "spade.counterstain.shows=contrast"])
    assert f"Images were drawn with {values}" in text
    assert "haematoxylin of the real patch" in text


def test_without_styles_none_is_told_of(methods_of):
    assert "style" not in methods_of("diffusion+100", methods=("diffusion",))


def test_a_denoiser_that_is_shown_no_nuclei_is_not_said_to_be(methods_of):
    assert "haematoxylin" not in methods_of("inpainting+100", methods=("inpainting",))


def test_every_variant_of_an_arm_is_told(methods_of):
    arms = [f"{'spade+100' if name in OF_SYNTHETIC else 'subtype'}+{name}" for name in VARIANTS]
    text = methods_of(*arms, variants={"mixup": 0.3, "stains": "eosin"}).replace("\N{NO-BREAK SPACE}", " ")
    for told in ("power of 1", "haematoxylin and eosin", "Beta(0.3, 0.3)", "50 % of the real patches"):
        assert told in text
    for told in ("75 % of its instances", "the first 50 %", "Annealed arms"):
        assert told in text


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("diffusion.context_share=0.25", "In 25 % of the samples it received the latents around some instances"),
        ("synthesis.sampling.background_share=0.1", "masks of training patches were taken (10 % centred on background"),
        ("synthesis.relabel.target={HER2 0: 2, HER2 3+: 0.5}", "in the proportions HER2 0 2, HER2 3+ 0.5; proportions"),
        ("synthesis.reject=none", "No image was rejected for its brightness"),
    ],
)
def test_what_else_the_recipe_asks_for_is_told(methods_of, setting, words):
    text = methods_of("diffusion+100", methods=("diffusion",), settings=[setting])
    assert words in text.replace("\N{NO-BREAK SPACE}", " ")


def test_arms_that_see_synthetic_patches_only_are_told_of(methods_of):
    assert "spade only were trained on synthetic patches only." in methods_of("spade+100", "spade+only")
    assert "patches only" not in methods_of("spade+100")


def test_stain_jitter_names_the_stains(methods_of):
    settings = ["segmenter.sampling.stain_jitter=0.05", "segmenter.sampling.stains=dab"]
    assert "optical density of haematoxylin and DAB was scaled" in methods_of("spade+100", settings=settings)


def test_the_white_filter_is_not_charged_with_what_a_judge_rejected(study_of):
    study = study_of("spade+100", "spade+100+filtered")
    counts = {"spade": FilterCount(drawn=100, rejected=1), "spade+filtered": FilterCount(drawn=100, rejected=50)}
    text = " ".join(methods_paragraphs(study.model_copy(update={"filter": counts}))).replace("\N{NO-BREAK SPACE}", " ")
    assert "rejected: spade 1.0 %." in text


@pytest.mark.parametrize(
    ("starts", "words"),
    [
        ((), "(initialised at random)"),
        (("imagenet", "imagenet"), "(from imagenet weights)"),
        (("random (no connection)",), "(initialised at random; no connection)"),
    ],
)
def test_what_the_encoder_really_started_from_is_told(study_of, starts, words):
    assert words in " ".join(methods_paragraphs(study_of("spade+100"), starts))


def test_settings_of_another_version_are_left_out(tmp_path):
    run = draw_results(tmp_path / "run", ("subtype",), 1, methods=(), config={"recipe": {"colour": 1}})
    text = " ".join(methods_paragraphs(read_results(run).study))
    assert text.startswith("Data: 40 patients")
    assert "Segmentation" not in text
    assert settings_table(read_results(run).study) is None


def test_every_setting_of_what_was_trained_is_in_a_table(study_of):
    table = settings_table(study_of("spade+100"))
    values = {row.head: row.cells[0].text for row in table.rows}
    assert {"spade.noise_channels": "8", "segmenter.encoder_weights": "off"}.items() <= values.items()
    assert not any(name.startswith("diffusion") for name in values)
