from __future__ import annotations

import pytest
from drawn_results import draw_results

from counterstain.recipe import load_recipe
from counterstain.report.methods_section import methods_paragraphs, settings_table
from counterstain.report.results import FilterCount, read_results
from counterstain.study.arms import OF_SYNTHETIC, VARIANTS

SPACE = "\N{NO-BREAK SPACE}"


@pytest.fixture
def study_of(tmp_path):
    def read(*arms, preset="demo", variants=None, settings=()):
        recipe = load_recipe(preset, None, list(settings)).model_dump(mode="json")
        config = {"recipe": recipe, "study": {"variants": variants or {}}}
        methods = dict.fromkeys(arm.partition("+")[0] for arm in arms if not arm.startswith("subtype"))
        run = draw_results(tmp_path / str(arms)[:100], ("subtype", *arms), 1, methods=tuple(methods), config=config)
        return read_results(run).study

    return read


@pytest.fixture
def methods_of(study_of):
    return lambda *arms, **options: " ".join(methods_paragraphs(study_of(*arms, **options))).replace(SPACE, " ")


@pytest.mark.parametrize(
    ("arm", "settings", "words"),
    [
        ("spade+100", (), "SPADE (Park et al. 2019)"),
        ("spade+100", (), " and pixel noise. Generator"),
        ("spade+100", ("synthesis.style.source=none",), "Images were drawn with random latent codes"),
        ("spade+100", ("synthesis.style.source=own",), "Images were drawn with the latent code of a patch with"),
        ("spade+100", ("spade.counterstain.shows=contrast",), "haematoxylin of the real patch"),
        ("spade+100", ("segmenter.sampling.stain_jitter=0.05", "segmenter.sampling.stains=dab"),
         "optical density of haematoxylin and DAB was scaled"),
        ("inpainting+100", ("diffusion.counterstain.other_stain=eosin",),
         "haematoxylin of the real patch, unmixed from eosin"),
        ("diffusion+100", ("diffusion.counterstain.shows=structure",), "local standard deviation"),
        ("diffusion+100", ("diffusion.counterstain.shows=contrast",), "in optical density, so that"),
        ("diffusion+100", ("diffusion.style.references=3",), "averaged over other patches of the slide"),
        ("diffusion+100", ("diffusion.style.references=3", "synthesis.style.source=own"),
         "the same masks, each in the style of its own slide"),
        ("diffusion+100", ("diffusion.context_share=0.25",),
         "In 25 % of the samples it received the latents around some instances"),
        ("diffusion+100", ("synthesis.sampling.background_share=0.1",),
         "masks of training patches were taken (10 % centred on background"),
        ("diffusion+100", ("synthesis.relabel.target={HER2 0: 2, HER2 3+: 0.5}",),
         "in the proportions HER2 0 2, HER2 3+ 0.5; proportions"),
        ("diffusion+100", ("synthesis.reject=none",), "No image was rejected for its brightness"),
    ],
)  # fmt: skip
def test_what_the_recipe_asks_for_is_told(methods_of, arm, settings, words):
    assert words in methods_of(arm, settings=settings)


@pytest.mark.parametrize(
    ("arm", "preset", "words"),
    [
        ("spade+100", "demo", "Denoiser"),
        ("spade+100", "paper", "pixel noise"),
        ("diffusion+100", "demo", "style"),
        ("inpainting+100", "demo", "haematoxylin"),
        ("spade+100", "demo", "patches only"),
    ],
)
def test_what_a_study_does_without_is_not_told_of(methods_of, arm, preset, words):
    assert words not in methods_of(arm, preset=preset)


def test_every_variant_of_an_arm_is_told(methods_of):
    arms = [f"{'spade+100' if name in OF_SYNTHETIC else 'subtype'}+{name}" for name in VARIANTS]
    text = methods_of("spade+only", *arms, variants={"mixup": 0.3, "stains": "eosin"})
    for told in ("power of 1", "haematoxylin and eosin", "Beta(0.3, 0.3)", "50 % of the real patches"):
        assert told in text
    for told in ("75 % of its instances", "the first 50 %", "Annealed arms"):
        assert told in text
    assert "spade only were trained on synthetic patches only." in text


def test_the_white_filter_is_not_charged_with_what_a_judge_rejected(study_of):
    study = study_of("spade+100", "spade+100+filtered")
    counts = {"spade": FilterCount(drawn=100, rejected=1), "spade+filtered": FilterCount(drawn=100, rejected=50)}
    text = " ".join(methods_paragraphs(study.model_copy(update={"filter": counts}))).replace(SPACE, " ")
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
