import numpy as np
import pandas as pd
import pytest
import torch
from drawn_cohort import boxes, draw_cohort, store
from drawn_requests import denoiser_config, drawn_by
from torch.nn.utils import parametrize
from typer.testing import CliRunner

import counterstain as cs
import counterstain.generators.autoencoder as autoencoder_module
import counterstain.generators.diffusion as diffusion_module
import counterstain.generators.spade as spade_module
import counterstain.generators.train as train_module
import counterstain.training as training_loop
from counterstain.checkpoints import load_checkpoint, read_header, save_checkpoint
from counterstain.cli import app
from counterstain.data.patch_set import PatchSet
from counterstain.errors import ConfigError, CounterstainWarning, LeakageError, MismatchError, StorageError
from counterstain.generators.autoencoder import Autoencoder
from counterstain.generators.diffusion import Diffusion
from counterstain.generators.diffusion_config import (
    AutoencoderConfig,
    CounterstainConfig,
    DiffusionConfig,
    SamplerConfig,
    StyleConfig,
    WindowsConfig,
)
from counterstain.generators.drawing import DiffusionGenerator
from counterstain.generators.interface import DrawRequest
from counterstain.generators.methods import METHODS
from counterstain.generators.spade import SpadeGenerator
from counterstain.generators.spade_config import SpadeConfig
from counterstain.generators.train import load_autoencoder, train_autoencoder, train_diffusion, train_spade
from counterstain.recipe import drawing_recipe, load_recipe
from counterstain.training_config import TrainingConfig

COMMON = {"size_px": 32, "seed": 0}


def training(steps=3, **changes):
    return TrainingConfig(steps=steps, batch_size=2, accelerator="cpu", precision="32", log_every_steps=1, **changes)


def spade(steps=3, **changes):
    settings = {"generator_width": 4, "discriminator_width": 4, "hidden": 8, "latent": 8, "vgg_weight": 0.0}
    settings |= {"monitor_masks": 2, "monitor_every_steps": 2, "compute_batch": 2}
    return SpadeConfig(training=training(steps), **settings | changes)


def autoencoder(steps=3, **changes):
    settings = {"channels": 8, "blocks": 1, "attention": False, "factor": 2, "codebook_size": 16, "lr": 1e-3}
    settings |= {"lpips_weight": 0.0, "adversarial_weight": 0.0, "validation_patches": 4, "validate_every_steps": 2}
    training_changes = {"checkpoint_every_steps": changes.pop("checkpoint_every_steps", 500)}
    return AutoencoderConfig(training=training(steps, **training_changes), **settings | changes)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return draw_cohort(tmp_path_factory.mktemp("cohort") / "c")


@pytest.fixture(scope="module")
def trained_spade(cohort, tmp_path_factory):
    return train_spade(cohort, spade(ema_decay=0.9), tmp_path_factory.mktemp("spade") / "s", **COMMON)


@pytest.fixture(scope="module")
def trained_autoencoder(cohort, tmp_path_factory):
    config = autoencoder(codebook_update="average", revive_codes_below=0.1)
    return train_autoencoder(cohort, config, tmp_path_factory.mktemp("ae") / "a", **COMMON)


def logged(folder, name):
    losses = pd.read_csv(folder / "losses.csv")
    return losses[losses["name"] == name].set_index("step")["value"]


def test_spade_is_watched_while_it_trains_and_at_the_end(trained_spade):
    for name in ("code_diversity", "white_share", "repetition"):
        assert logged(trained_spade, name).index.tolist() == [2, 3]
    notes = read_header(trained_spade).notes
    assert notes["monitors"]["repetition"] == logged(trained_spade, "repetition")[3]
    assert notes["monitors"]["real_white_share"] == 0
    assert isinstance(notes["warnings"], list)


def test_a_checkpoint_knows_the_subtypes_that_its_training_tissue_lacked(trained_spade, tmp_path):
    assert read_header(trained_spade).subtypes_unseen == ()
    rare = store(tmp_path / "c", boxes("a", (1, 4, 4, 30, 30)), boxes("b", (4, 4, 4, 30, 30), slide="t", split="test"))
    anew = train_spade(rare, spade(1), tmp_path / "anew", **COMMON)
    assert read_header(anew).subtypes_unseen == ("HER2 1+", "HER2 2+", "HER2 3+", "LCIS/DCIS")
    with pytest.warns(CounterstainWarning, match=r"shows HER2 1\+, .*, so nothing is drawn as them"):
        cs.preview(rare, method="spade", generator=anew, out=tmp_path / "look.png", per_subtype=1)
    further = train_spade(rare, spade(2, ema_decay=0.9), tmp_path / "further", init=trained_spade, **COMMON)
    assert read_header(further).subtypes_unseen == ()


def test_averaged_weights_have_spectral_norms_of_their_own(trained_spade):
    generator = SpadeGenerator.load(trained_spade)
    normalised = [m for m in generator.model.generator.modules() if parametrize.is_parametrized(m, "weight")]
    norms = [torch.linalg.matrix_norm(m.weight.detach().flatten(1), 2).item() for m in normalised]
    assert norms == pytest.approx([1.0] * len(norms), rel=0.02)


def test_published_initial_weights_are_small_and_without_bias():
    from counterstain.generators.spade import Spade

    network = Spade(spade(), 6, 32).generator
    assert network.conv_img.weight.std().item() == pytest.approx(0.02 * (2 / (7 * 9)) ** 0.5, rel=0.3)
    assert all(not bias.any() for name, bias in network.named_parameters() if name.endswith("bias"))


def test_spade_goes_on_from_given_weights_and_counts_their_patients(cohort, trained_spade, tmp_path):
    header, state = load_checkpoint(trained_spade, "spade")
    without_critic = {name: value for name, value in state.items() if not name.startswith("discriminator.")}
    elsewhere = header.model_copy(update={"patients_seen": ("from elsewhere",)})
    save_checkpoint(tmp_path / "given", without_critic, elsewhere)
    slow = spade(1, lr_generator=1e-12, lr_discriminator=1e-12)
    out = train_spade(cohort, slow, tmp_path / "next", init=tmp_path / "given", **COMMON)
    found, after = load_checkpoint(out, "spade")
    name = "generator.up_0.norm_0.mlp_gamma.weight"
    assert torch.allclose(after[name], state[name], atol=1e-6)
    assert found.patients_seen == ("from elsewhere", "p0", "p1", "p2")


def test_spade_without_an_encoder_is_read_back(cohort, tmp_path):
    out = train_spade(cohort, spade(1, use_vae=False), tmp_path / "s", **COMMON)
    assert SpadeGenerator.load(out).header.config["use_vae"] is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_clip": 1.0}, "gradient_clip 1: Spade clips no gradients"),
        ({"accumulate": 2}, "accumulate 2: Spade cannot accumulate"),
        ({"num_nodes": 2}, "num_nodes 2: start the command on every node"),
    ],
)
def test_what_a_gan_cannot_be_trained_with_leaves_its_folder_free(cohort, tmp_path, changes, message):
    config = spade().model_copy(update={"training": training(1, **changes)})
    with pytest.raises(ConfigError, match=message):
        train_spade(cohort, config, tmp_path / "s", **COMMON)
    assert not (tmp_path / "s").exists()
    train_spade(cohort, spade(1), tmp_path / "s", **COMMON)


def test_a_codebook_that_was_given_is_kept_when_its_upkeep_begins(cohort, tmp_path):
    first = train_autoencoder(cohort, autoencoder(1), tmp_path / "first", **COMMON)
    still = autoencoder(1, codebook_update="average", lr=1e-12)
    second = train_autoencoder(cohort, still, tmp_path / "second", init=first, **COMMON)
    codes = [load_checkpoint(out, "autoencoder")[1]["network.quantize.embedding.weight"] for out in (first, second)]
    assert (codes[1] - codes[0]).abs().mean() < 0.1 * codes[0].abs().mean()


def test_a_size_that_the_denoiser_cannot_halve_is_refused_before_anything_is_written(
    cohort, trained_autoencoder, tmp_path
):
    config = DiffusionConfig(training=training(1), channels=8, multipliers=(1, 2), heads=1)
    with pytest.raises(ConfigError, match=r"size_px 34: .* need a multiple of 4"):
        train_diffusion(cohort, config, tmp_path / "d", autoencoder=trained_autoencoder, size_px=34, seed=0)
    assert not (tmp_path / "d").exists()


def test_weights_that_saw_a_test_patient_are_no_start(cohort, trained_spade, tmp_path):
    header, state = load_checkpoint(trained_spade, "spade")
    save_checkpoint(tmp_path / "given", state, header.model_copy(update={"patients_seen": ("p4",)}))
    with pytest.raises(LeakageError, match="given has seen p4 of the test split"):
        train_spade(cohort, spade(), tmp_path / "next", init=tmp_path / "given", **COMMON)


def test_weights_of_other_sizes_are_no_start(cohort, trained_spade, tmp_path):
    with pytest.raises(MismatchError, match=r"is \(8, 256\), the recipe asks for \(8, 512\);.*by --config or --set"):
        train_spade(cohort, spade(generator_width=8), tmp_path / "next", init=trained_spade, **COMMON)
    assert not (tmp_path / "next").exists()


def test_a_first_stage_is_validated_while_it_trains_and_at_the_end(trained_autoencoder):
    for name in ("val_psnr", "val_ssim", "val_codebook_usage", "val_codebook_perplexity"):
        assert logged(trained_autoencoder, name).index.tolist() == [2, 3]
    assert (
        read_header(trained_autoencoder).notes["validation"]["val_psnr"] == logged(trained_autoencoder, "val_psnr")[3]
    )
    assert logged(trained_autoencoder, "codes_revived").sum() >= 0


def test_the_use_of_codes_is_kept_and_not_needed_to_draw(trained_autoencoder):
    _, state = load_checkpoint(trained_autoencoder, "autoencoder")
    assert state["codebook.usage"].shape == (16,)
    model, _ = load_autoencoder(trained_autoencoder)
    assert model.codebook is None


def test_a_first_stage_with_averaged_codes_that_was_stopped_ends_like_one_that_ran_through(
    cohort, tmp_path, monkeypatch
):
    config = autoencoder(4, codebook_update="average", revive_codes_below=0.5, checkpoint_every_steps=2)
    whole = load_checkpoint(train_autoencoder(cohort, config, tmp_path / "whole", **COMMON), "autoencoder")[1]
    step = Autoencoder.training_step

    def stopped(self, batch, minimise):
        if int(batch["step"]) == 3:
            raise KeyboardInterrupt
        return step(self, batch, minimise)

    monkeypatch.setattr(Autoencoder, "training_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(cohort, config, tmp_path / "again", **COMMON)
    monkeypatch.undo()
    again = load_checkpoint(train_autoencoder(cohort, config, tmp_path / "again", **COMMON), "autoencoder")[1]
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert (tmp_path / "whole/losses.csv").read_text() == (tmp_path / "again/losses.csv").read_text()


def test_the_patch_gan_sets_in_after_its_warm_start(cohort, tmp_path):
    config = autoencoder(3, kind="kl", adversarial_weight=0.5, adversarial_start=2, discriminator_width=4)
    out = train_autoencoder(cohort, config, tmp_path / "a", **COMMON)
    assert logged(out, "loss_d")[[1, 2]].tolist() == [0, 0]
    assert logged(out, "loss_d")[3] > 0
    assert logged(out, "adaptive_weight").index.tolist() == [3]


def test_a_cohort_without_validation_part_trains_all_the_same(tmp_path):
    cohort = draw_cohort(tmp_path / "c").write_split({f"p{i}": "train" for i in range(5)})
    out = train_autoencoder(cohort, autoencoder(1), tmp_path / "a", **COMMON)
    assert read_header(out).notes["validation"] == {}


def test_diffusion_goes_on_with_the_latents_of_its_own_first_stage_only(cohort, trained_autoencoder, tmp_path):
    config = DiffusionConfig(training=training(1), channels=8, multipliers=(1, 2), blocks=1, heads=2)
    first = train_diffusion(cohort, config, tmp_path / "d", autoencoder=trained_autoencoder, **COMMON)
    second = train_diffusion(cohort, config, tmp_path / "next", autoencoder=trained_autoencoder, init=first, **COMMON)
    states = [load_checkpoint(folder, "diffusion")[1] for folder in (first, second)]
    assert torch.equal(states[0]["latent_sd"], states[1]["latent_sd"])
    DiffusionGenerator.load(second)
    other = train_autoencoder(cohort, autoencoder(1), tmp_path / "other", **COMMON)
    with pytest.raises(MismatchError, match="latents of another first stage"):
        train_diffusion(cohort, config, tmp_path / "x", autoencoder=other, init=first, **COMMON)


def test_a_pool_of_latents_is_encoded_once_and_an_interrupted_one_goes_on(
    cohort, trained_autoencoder, tmp_path, monkeypatch
):
    config = denoiser_config(training=training(2), latent_pool=130, normalise_latents="none")
    options = {"autoencoder": trained_autoencoder, **COMMON}
    whole = train_diffusion(cohort, config, tmp_path / "whole", **options)
    encode, encoded = Diffusion.encode, []

    def interrupted(model, images):
        encoded.append(len(images))
        if len(encoded) == 2:
            raise KeyboardInterrupt
        return encode(model, images)

    monkeypatch.setattr(Diffusion, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_diffusion(cohort, config, tmp_path / "again", **options)
    again = train_diffusion(cohort, config, tmp_path / "again", **options)
    assert encoded == [64, 64, 64, 2]
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert {file.name for file in again.iterdir()} == {file.name for file in whole.iterdir()}
    assert not (again / "latents").exists()


def test_a_damaged_pool_of_latents_is_named(cohort, trained_autoencoder, tmp_path, monkeypatch):
    config = denoiser_config(training=training(2), latent_pool=2)
    options = {"autoencoder": trained_autoencoder, **COMMON}
    monkeypatch.setattr(Diffusion, "losses", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_diffusion(cohort, config, tmp_path / "d", **options)
    (file,) = (tmp_path / "d" / "latents").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StorageError, match=r"latents/000000000.pt: cannot be read .* delete it and run"):
        train_diffusion(cohort, config, tmp_path / "d", **options)


def interrupt(*_):
    raise KeyboardInterrupt


TRAININGS = {
    "spade": lambda cohort, out, _: train_spade(cohort, spade(2), out, **COMMON),
    "vq": lambda cohort, out, _: train_autoencoder(
        cohort, autoencoder(2, adversarial_weight=0.5, adversarial_start=1, discriminator_width=4), out, **COMMON
    ),
    "kl": lambda cohort, out, _: train_autoencoder(cohort, autoencoder(2, kind="kl"), out, **COMMON),
    "diffusion": lambda cohort, out, first: train_diffusion(
        cohort, denoiser_config(training=training(2), context_share=0.5, style=StyleConfig(width=4, code=4)), out,
        autoencoder=first, **COMMON,
    ),
}  # fmt: skip


@pytest.fixture
def layout_of_gpus(monkeypatch):
    """Weights that are laid out channels-last, on the CPU."""

    def switch_on():
        for module in (training_loop, autoencoder_module, diffusion_module, spade_module, train_module):
            monkeypatch.setattr(module, "place", lambda network, _: network.to(memory_format=torch.channels_last))

    return switch_on


def assert_equal_losses(first, second):
    losses = [pd.read_csv(folder / "losses.csv").query("name.str.startswith('loss')") for folder in (first, second)]
    np.testing.assert_allclose(losses[1]["value"], losses[0]["value"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", TRAININGS)
def test_networks_learn_the_same_in_the_layout_of_gpus(cohort, trained_autoencoder, tmp_path, layout_of_gpus, kind):
    plain = TRAININGS[kind](cohort, tmp_path / "plain", trained_autoencoder)
    layout_of_gpus()
    assert_equal_losses(plain, TRAININGS[kind](cohort, tmp_path / "last", trained_autoencoder))


def test_a_training_that_was_begun_on_a_cpu_goes_on_in_the_layout_of_gpus(
    cohort, tmp_path, layout_of_gpus, monkeypatch
):
    config = autoencoder(6, kind="kl", checkpoint_every_steps=3)
    whole = train_autoencoder(cohort, config, tmp_path / "whole", **COMMON)
    learn = Autoencoder.training_step
    with monkeypatch.context() as patched:
        patched.setattr(
            Autoencoder, "training_step", lambda *args: interrupt() if args[1]["step"] == 4 else learn(*args)
        )
        with pytest.raises(KeyboardInterrupt):
            train_autoencoder(cohort, config, tmp_path / "again", **COMMON)
    layout_of_gpus()
    assert_equal_losses(whole, train_autoencoder(cohort, config, tmp_path / "again", **COMMON))


@pytest.mark.parametrize("pool", [None, 4])
def test_a_denoiser_that_is_shown_nuclei_remembers_how_wide_they_are(cohort, trained_autoencoder, tmp_path, pool):
    config = DiffusionConfig(
        training=training(2), channels=8, multipliers=(1, 2), blocks=1, heads=2, latent_pool=pool,
        counterstain=CounterstainConfig(), context_share=0.5, style=StyleConfig(width=4, code=4),
    )  # fmt: skip
    out = train_diffusion(cohort, config, tmp_path / "d", autoencoder=trained_autoencoder, **COMMON)
    generator = DiffusionGenerator.load(out, "inpainting")
    header = generator.header
    assert header.config["counterstain"]["local_px"] == 8 / cohort.mpp
    losses = logged(out, "loss")
    assert len(losses) == 2
    patch = cohort.patch(int(cohort.positions("train")[0]), 0, 0, 32)
    redraw = patch.instances > 0
    drawn = drawn_by(generator, patch.label_mask[None], [0], patch.image[None], redraw[None])
    assert np.array_equal(drawn[0][~redraw], patch.image[~redraw])


def test_a_checkpoint_draws_as_it_was_trained_and_a_given_setting_goes_over_it(cohort, trained_autoencoder, tmp_path):
    config = DiffusionConfig(
        training=training(1), channels=8, multipliers=(1, 2), blocks=1, heads=2,
        sampler=SamplerConfig(name="ddim", steps=3), windows=WindowsConfig(overlap=0.25),
    )  # fmt: skip
    out = train_diffusion(cohort, config, tmp_path / "d", autoencoder=trained_autoencoder, **COMMON)
    own = drawing_recipe(METHODS["diffusion"], out)
    assert (own.size_px, own.diffusion.sampler, own.diffusion.windows) == (32, config.sampler, config.windows)
    changed = drawing_recipe(METHODS["diffusion"], out, overrides=["diffusion.sampler.steps=2"])
    assert changed.diffusion.sampler == config.sampler.model_copy(update={"steps": 2})
    assert drawing_recipe(METHODS["diffusion"], out, preset="demo") == load_recipe("demo")
    command = ["synthesize", cohort.folder, "--method", "diffusion", "--generator", out, "--count", 64]
    command += ["--set", "diffusion.sampler.steps=2", "--out", tmp_path / "set"]
    assert CliRunner().invoke(app, [str(word) for word in command]).exit_code == 0
    header = PatchSet.open(tmp_path / "set").header
    assert header.size_px == 32
    assert header.settings["sampler"] == changed.diffusion.sampler.model_dump(mode="json")


def test_spade_refuses_masks_of_another_size(trained_spade):
    with pytest.raises(MismatchError, match="this SPADE draws 32 px, the mask is 16 x 16 px"):
        SpadeGenerator.load(trained_spade).draw([DrawRequest(mask=np.zeros((16, 16), np.uint8), seed=0)])
