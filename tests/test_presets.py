import numpy as np
import pytest
import torch
from drawn_requests import drawn_by

from counterstain.errors import ConfigError
from counterstain.generators.autoencoder import Autoencoder, build_network
from counterstain.generators.diffusion import Diffusion, build_denoiser
from counterstain.generators.diffusion_config import SamplerConfig
from counterstain.generators.drawing import DiffusionGenerator
from counterstain.generators.spade import Spade, SpadeGenerator
from counterstain.recipe import PRESETS, load_recipe

PAPER = load_recipe("paper")


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def paper_batch(size=512):
    rng = np.random.default_rng(0)
    return {
        "images": torch.from_numpy(rng.integers(0, 255, (1, size, size, 3), dtype=np.uint8)),
        "labels": torch.from_numpy(rng.integers(0, 6, (1, 8, 8), dtype=np.uint8)).repeat(1, size // 8, size // 8),
        "instances": torch.zeros((1, size, size), dtype=torch.int32),
        "step": torch.tensor(0),
        "position": torch.arange(1),
    }


def without_downloads(config):
    changes = {name: 0.0 for name in ("vgg_weight", "lpips_weight") if hasattr(config, name)}
    return config.model_copy(update=changes)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_recipe(preset):
    assert load_recipe(preset).size_px in {512, 256, 64}


def test_the_paper_preset_builds_the_published_networks():
    with torch.device("meta"):
        spade = Spade(without_downloads(PAPER.spade), 6, PAPER.size_px)
        denoiser = build_denoiser(PAPER.diffusion, 3, 6)
        first_stage = build_network(PAPER.autoencoder)
    assert parameters(spade.generator) == 159_484_867
    assert parameters(spade.encoder) == 10_463_424
    assert parameters(spade.discriminator) == 5_542_018
    assert parameters(denoiser) == 53_835_907
    assert (parameters(first_stage.encoder), parameters(first_stage.decoder)) == (1_337_059, 2_002_243)


def test_the_authors_smaller_denoiser_has_its_published_size():
    with torch.device("meta"):
        assert parameters(build_denoiser(PAPER.diffusion.model_copy(update={"channels": 32}), 3, 6)) == 13_472_835


@pytest.mark.slow
def test_spade_of_the_paper_takes_a_step_and_draws_at_512_px():
    model = Spade(without_downloads(PAPER.spade), 6, 512)
    batch = paper_batch()
    real = torch.rand(1, 3, 512, 512) * 2 - 1
    losses = model.generator_losses(real, model.condition(batch["labels"], batch["instances"]), batch)
    torch.stack(list(losses.values())).sum().backward()
    assert all(value.isfinite() for value in losses.values())
    model.config = model.config.model_copy(update={"compute_batch": 1})
    drawn = drawn_by(SpadeGenerator(model, torch.device("cpu")), batch["labels"].numpy(), [0])
    assert drawn.shape == (1, 512, 512, 3)


@pytest.mark.slow
def test_diffusion_of_the_paper_takes_a_step_and_draws_at_512_px():
    first_stage = Autoencoder(without_downloads(PAPER.autoencoder), 512)
    model = Diffusion(PAPER.diffusion, first_stage, 6)
    batch = paper_batch()
    loss = model.losses(batch)["loss"]
    loss.backward()
    assert loss.isfinite()
    sampler = PAPER.diffusion.sampler.model_copy(update={"steps": 2, "compute_batch": 1})
    redraw = np.zeros((1, 512, 512), bool)
    redraw[:, 100:200, 100:200] = True
    for method in ("diffusion", "inpainting"):
        generator = DiffusionGenerator(model, method, sampler=sampler, device=torch.device("cpu"))
        drawn = drawn_by(generator, batch["labels"].numpy(), [0], batch["images"].numpy(), redraw)
        assert drawn.shape == (1, 512, 512, 3)


def test_settings_on_the_command_line_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("spade: {latent: 7, hidden: 9}\n")
    recipe = load_recipe("demo", file, ["spade.latent=5"])
    assert (recipe.spade.latent, recipe.spade.hidden, recipe.spade.generator_width) == (5, 9, 16)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["spade.laten=5"], r"spade.laten: unknown key; did you mean latent\?"),
        (["size_px=8"], "size_px: Input should be greater than or equal to 32"),
        (["diffusion.condition_dropout=0"], "guidance other than 1 needs condition_dropout above 0"),
        (["spade"], "expected KEY=VALUE"),
    ],
)
def test_wrong_settings_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("demo", None, overrides)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match="preset 'mine': expected one of paper, best, demo"):
        load_recipe("mine")


def test_a_sampler_without_steps_is_refused():
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        SamplerConfig(steps=0)
