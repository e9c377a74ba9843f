import numpy as np
import pytest
import torch
from drawn_cohort import draw_cohort
from drawn_requests import denoiser_config, drawn_by, first_stage_config, random_masks

from counterstain.checkpoints import read_header
from counterstain.errors import ConfigError, MismatchError
from counterstain.generators.conditioning import Condition
from counterstain.generators.diffusion_config import DiffusionConfig, DistillationConfig, NoiseConfig, SamplerConfig
from counterstain.generators.distillation import Distillation, student_config
from counterstain.generators.drawing import DiffusionGenerator
from counterstain.generators.pipeline import power_spacing
from counterstain.generators.samplers import sample
from counterstain.generators.train import train_autoencoder, train_diffusion, train_distilled
from counterstain.seeding import torch_generator
from counterstain.training import Trainable, fit
from counterstain.training_config import TrainingConfig

CENTRES = torch.tensor([[1.5, 0.0], [-1.5, 0.0], [0.0, 1.5]])  # of the labels 0, 1, 2
SD = 0.3


class Exact(Trainable):
    """The best denoiser of a mixture of three Gaussians in the plane; a label says which one, no label all three."""

    style = None

    def __init__(self, config):
        super().__init__()
        self.config = config
        betas = torch.linspace(config.noise.beta_start**0.5, config.noise.beta_end**0.5, 1000) ** 2
        self.alphas = torch.cumprod(1 - betas, 0)

    def predict(self, latents, timesteps, condition):
        a = self.alphas[timesteps].reshape(-1, 1)
        x, labels = latents.flatten(1), condition.labels.flatten(1)
        variance = a * SD**2 + 1 - a
        logits = -(x[:, None] - a.sqrt()[:, None] * CENTRES).square().sum(2) / (2 * variance)
        logits = torch.where(labels.sum(1, keepdim=True) > 0, torch.where(labels > 0, 0.0, -1e9), logits)
        means = CENTRES + a.sqrt()[:, None] * SD**2 / variance[:, None] * (x[:, None] - a.sqrt()[:, None] * CENTRES)
        clean = (logits.softmax(1)[..., None] * means).sum(1)
        noise = (x - a.sqrt() * clean) / (1 - a).sqrt()
        kinds = {"sample": clean, "epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * clean}
        return kinds[self.config.noise.prediction].reshape(latents.shape)


class Learnt(Exact):
    """The exact denoiser with a small network over it, to be trained."""

    def __init__(self, config):
        super().__init__(config)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            widths = [(7, 128), (128, 128)]
            layers = [layer for width in widths for layer in (torch.nn.Linear(*width), torch.nn.SiLU())]
            self.unet = torch.nn.Sequential(*layers, torch.nn.Linear(128, 2))
        torch.nn.init.zeros_(self.unet[-1].weight)
        torch.nn.init.zeros_(self.unet[-1].bias)

    def clean_latents(self, batch):
        return batch["latents"]

    def training_condition(self, batch):
        return Condition(labels=batch["labels"])

    def predict(self, latents, timesteps, condition):
        a = self.alphas[timesteps].reshape(-1, 1).expand(len(latents), 1)
        x = torch.cat([latents.flatten(1), condition.labels.flatten(1), a.sqrt(), a.log()], 1)
        return super().predict(latents, timesteps, condition) + self.unet(x).reshape(latents.shape)


def mixture(step, size=96):
    generator = torch_generator(0, "mixture", step)
    labels = torch.randint(3, (size,), generator=generator)
    latents = CENTRES[labels] + SD * torch.randn(size, 2, generator=generator)
    shown = torch.nn.functional.one_hot(labels, 3).float()
    return {"latents": latents.reshape(size, 2, 1, 1), "labels": shown.reshape(size, 3, 1, 1)}


def settings(**changes):
    training = TrainingConfig(steps=150, batch_size=96, precision="32", accelerator="cpu")
    return DistillationConfig(**{"training": training, "teacher_steps": 16, "steps": 2, "lr": 5e-3} | changes)


def drawn(network, labels, config, sampler, guidance=1.0):
    condition = Condition(labels=labels)

    def denoise(x, t):
        free = network.predict(x, torch.full((len(x),), t), condition.without_labels())
        return free + guidance * (network.predict(x, torch.full((len(x),), t), condition) - free)

    with torch.no_grad():
        generators = [torch_generator(7, i) for i in range(len(labels))]
        return sample(denoise, (2, 1, 1), generators, config.noise, sampler, device=torch.device("cpu")).flatten(1)


# A noise-predicting teacher is halved once: the exact part of the toy's second teacher would still predict noise.
@pytest.mark.parametrize(("prediction", "before", "after"), [("sample", 8, 2), ("epsilon", 8, 4)])
def test_a_student_draws_what_its_guided_teacher_draws_in_more_steps(tmp_path, prediction, before, after):
    base = DiffusionConfig(training=TrainingConfig(steps=1), noise=NoiseConfig(prediction=prediction))
    config = settings(guidance=2.0, teacher_steps=before, steps=after)
    own = student_config(base, config)
    distillation = Distillation(config, Learnt(base), Learnt(own))
    fit(distillation, mixture, tmp_path, own.training)
    labels = mixture(99, 512)["labels"]
    expected = drawn(Learnt(base), labels, base, SamplerConfig(name="few_step", steps=before), guidance=2.0)
    found = drawn(distillation.student, labels, own, SamplerConfig(name="few_step", steps=after))
    untrained = drawn(Learnt(own), labels, own, SamplerConfig(name="few_step", steps=after))
    asked = labels.flatten(1).argmax(1)
    for label in range(3):
        theirs, ours = expected[asked == label], found[asked == label]
        assert torch.allclose(theirs.mean(0), ours.mean(0), atol=0.1)
        assert torch.allclose(theirs.std(0), ours.std(0), atol=0.1)
    assert (found - expected).square().mean() < 0.3 * (untrained - expected).square().mean()


def test_the_grid_of_half_as_many_steps_is_every_second_step():
    for steps in (4, 8, 16, 32):
        assert power_spacing(1000, steps, 2.0)[::2] == power_spacing(1000, steps // 2, 2.0)


ONE = TrainingConfig(steps=1, batch_size=4, accelerator="cpu", precision="32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A cohort and a teacher on it."""
    folder = tmp_path_factory.mktemp("teacher")
    cohort = draw_cohort(folder / "cohort")
    train_autoencoder(cohort, first_stage_config(training=ONE, kind="linear"), folder / "first", size_px=32, seed=0)
    config = denoiser_config(training=ONE, context_share=0.5, latent_pool=8)
    train_diffusion(cohort, config, folder / "teacher", autoencoder=folder / "first", size_px=32, seed=0)
    return cohort, folder / "teacher"


def distil(trained, out, **changes):
    cohort, teacher = trained
    training = ONE.model_copy(update={"steps": 3, "checkpoint_every_steps": 1})
    config = DistillationConfig(**{"training": training, "teacher_steps": 8, "steps": 2, "latent_pool": 8} | changes)
    return train_distilled(cohort, config, out, teacher=teacher, seed=0)


def test_a_distilled_checkpoint_says_where_it_comes_from_and_draws_in_its_own_steps(trained, tmp_path):
    header, teacher = read_header(distil(trained, tmp_path)), read_header(trained[1])
    assert header.notes["teacher_sha256"] == teacher.sha256
    assert header.notes["first_stage_sha256"] == teacher.notes["first_stage_sha256"]
    assert header.patients_seen == teacher.patients_seen
    masks, images, redraw = random_masks(3, 32, 32)
    for method in ("diffusion", "inpainting"):
        generator = DiffusionGenerator.load(tmp_path, method, sampler=SamplerConfig(steps=20, guidance=2.0))
        assert (generator.sampler.name, generator.sampler.steps, generator.sampler.guidance) == ("few_step", 2, 1.0)
        image = drawn_by(generator, masks, [1, 2, 3], images, redraw)
        alone = drawn_by(generator, masks[2:], [3], images[2:], redraw[2:])
        assert np.array_equal(image[2], alone[0])
    assert np.array_equal(image[~redraw], images[~redraw])


def test_a_distillation_that_was_stopped_in_its_second_halving_ends_like_one_that_ran_through(
    trained, tmp_path, monkeypatch
):
    whole = read_header(distil(trained, tmp_path / "whole"))
    losses = Distillation.losses

    def stopped(self, batch):
        if int(batch["step"]) == 4:
            raise KeyboardInterrupt
        return losses(self, batch)

    monkeypatch.setattr(Distillation, "losses", stopped)
    with pytest.raises(KeyboardInterrupt):
        distil(trained, tmp_path / "stopped")
    monkeypatch.undo()
    assert read_header(distil(trained, tmp_path / "stopped")).sha256 == whole.sha256


def test_only_distilled_networks_take_few_steps_and_are_distilled_once(trained, tmp_path):
    with pytest.raises(ConfigError, match="this network is not distilled; run 'counterstain train distilled'"):
        DiffusionGenerator.load(trained[1], sampler=SamplerConfig(name="few_step", steps=2))
    distil(trained, tmp_path / "once")
    with pytest.raises(MismatchError, match="is distilled already"):
        distil((trained[0], tmp_path / "once"), tmp_path / "twice")
