import copy
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from drawn_requests import denoiser_config, drawn_by, first_stage_config, random_masks

from counterstain.config import build
from counterstain.errors import ConfigError
from counterstain.generators.autoencoder import Autoencoder
from counterstain.generators.conditioning import (
    dilated,
    draw_redrawn,
    latent_redraw_mask,
    surroundings,
    to_tensor,
)
from counterstain.generators.diffusion import Diffusion
from counterstain.generators.diffusion_config import (
    AutoencoderConfig,
    DiffusionConfig,
    DistillationConfig,
    InpaintingConfig,
    NoiseConfig,
    SamplerConfig,
)
from counterstain.generators.drawing import DiffusionGenerator
from counterstain.generators.pipeline import shrink
from counterstain.generators.samplers import KnownLatents, build_scheduler, sample, step_walk
from counterstain.seeding import torch_generator
from counterstain.training import fit
from counterstain.training_config import TrainingConfig

SAMPLERS = [
    SamplerConfig(name="ddim", steps=3, eta=1.0, compute_batch=2),
    SamplerConfig(name="dpmsolver++", steps=3, guidance=2.0, compute_batch=2),
    SamplerConfig(name="unipc", steps=3, guidance=2.0, guidance_interval=(0.2, 0.8), compute_batch=2),
    SamplerConfig(name="few_step", steps=2, compute_batch=2),
]
OPTIONS = {
    "plain": InpaintingConfig(),
    "dilation": InpaintingConfig(dilation_px=3),
    "RePaint": InpaintingConfig(resamples=2, jump_length=1),
    "original": InpaintingConfig(start="original", strength=0.6),
    "all": InpaintingConfig(dilation_px=2, resamples=2, jump_length=1, start="original", strength=0.9),
}


def first_stage(**changes):
    return Autoencoder(first_stage_config(**{"kind": "kl"} | changes), 32).eval()


def denoiser(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Diffusion(denoiser_config(**changes), first_stage(), 6)


@pytest.fixture(scope="module")
def model():
    return denoiser()


@pytest.fixture(scope="module")
def seeing():
    """A network that is shown what is kept."""
    return denoiser(context_share=0.5)


def inputs(n=6):
    return random_masks(n, 32, 32)


def generator_for(model, sampler, method="inpainting", inpainting=None):
    """A generator; where few steps are asked for, of a network that passes for a distilled one."""
    if sampler.name == "few_step":
        model = copy.copy(model)
        model.config = model.config.model_copy(update={"sampler": sampler})
    return DiffusionGenerator(model, method, sampler=sampler, inpainting=inpainting)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.name)
def test_an_image_is_the_same_alone_and_in_a_batch(model, sampler):
    masks, _, _ = inputs()
    generator = generator_for(model, sampler, "diffusion")
    together = drawn_by(generator, masks, range(6))
    assert np.array_equal(together[4], drawn_by(generator, masks[4:5], [4])[0])
    assert not np.array_equal(together[4], drawn_by(generator, masks[4:5], [5])[0])


@pytest.mark.parametrize("network", ["model", "seeing"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.name)
def test_inpainting_keeps_every_other_byte_and_depends_on_nothing_but_its_seed(sampler, option, network, request):
    masks, images, redraw = inputs(3)
    generator = generator_for(request.getfixturevalue(network), sampler, inpainting=OPTIONS[option])
    drawn = drawn_by(generator, masks, range(3), images, redraw)
    assert np.array_equal(drawn[~redraw], images[~redraw])
    assert not np.array_equal(drawn[redraw], images[redraw])
    assert np.array_equal(drawn[2], drawn_by(generator, masks[2:], [2], images[2:], redraw[2:])[0])
    assert not np.array_equal(drawn[2], drawn_by(generator, masks[2:], [5], images[2:], redraw[2:])[0])


def test_without_the_composite_the_background_passes_through_the_autoencoder(model):
    masks, images, redraw = inputs(2)
    config = InpaintingConfig(composite=False)
    generator = DiffusionGenerator(model, "inpainting", sampler=SAMPLERS[1], inpainting=config)
    nothing = np.zeros_like(redraw)
    drawn = drawn_by(generator, masks, range(2), images, nothing)
    decoded = generator.model.decode(generator.model.encode(torch.from_numpy(images)))
    expected = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).numpy()
    assert np.abs(drawn.astype(int) - expected.astype(int)).max() <= 1


def gaussian_denoiser(noise, target, sd):
    """The best denoiser of independent Gaussians."""
    alphas = DDPMScheduler(**noise.scheduler_settings()).alphas_cumprod

    def denoise(x, t):
        alpha, sigma = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        clean = target + alpha * sd**2 / (alpha**2 * sd**2 + sigma**2) * (x - alpha * target)
        eps = (x - alpha * clean) / sigma
        return {"sample": clean, "epsilon": eps, "v_prediction": alpha * eps - sigma * clean}[noise.prediction]

    return denoise


def sampled_by(sampler, noise, sd, **changes):
    target = torch.linspace(-1, 1, 1024).reshape(1, 4, 16, 16)
    generators = [torch.Generator().manual_seed(i) for i in range(20)]
    denoise = gaussian_denoiser(noise, target, sd)
    drawn = sample(denoise, (4, 16, 16), generators, noise, sampler, device=torch.device("cpu"), **changes)
    return drawn - target


NOISES = [
    NoiseConfig(prediction=kind, zero_terminal_snr=zero)
    for kind, zero in (("epsilon", False), ("v_prediction", False), ("sample", False), ("v_prediction", True))
]


def test_ddim_leaves_its_first_step_after_pure_noise_a_direction():
    noise = NoiseConfig(prediction="v_prediction", zero_terminal_snr=True)
    for steps in range(2, 260):
        scheduler = build_scheduler(noise, SamplerConfig(name="ddim", steps=steps, eta=1.0))
        first = int(scheduler.timesteps[0])
        drawn = scheduler.step(torch.ones(1), first, torch.ones(1), eta=1.0, variance_noise=torch.ones(1))
        assert drawn.prev_sample.isfinite().all(), steps


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: f"{n.prediction}{'-zero' * n.zero_terminal_snr}")
@pytest.mark.parametrize(
    "sampler",
    [SamplerConfig(name="ddim", steps=200, eta=1.0)]
    + [SamplerConfig(name=name, steps=steps) for name in ("dpmsolver++", "unipc") for steps in (10, 15, 20, 25)],
    ids=lambda s: f"{s.name}-{s.steps}",
)
def test_samplers_keep_the_mean_and_the_variance_of_the_data(sampler, noise):
    for sd in (0.1, 0.5):
        found = sampled_by(sampler, noise, sd)
        assert found.mean((0, 1, 2, 3)).abs() < 0.05
        assert found.std(0).mean().item() == pytest.approx(sd, rel=0.15)


def test_few_even_steps_lose_the_fine_variation_that_closer_last_steps_keep():
    even = sampled_by(SamplerConfig(steps=20, spacing_power=1.0), NOISES[1], 0.1).std(0).mean()
    assert even < 0.04


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "unipc"])
def test_every_number_of_steps_gives_as_many_falling_timesteps(name):
    for steps in (1, 2, 7, 61, 103, 200, 206):
        noise = NoiseConfig(prediction="v_prediction", zero_terminal_snr=True)
        timesteps = build_scheduler(noise, SamplerConfig(name=name, steps=steps)).timesteps.tolist()
        assert len(timesteps) == steps
        assert timesteps == sorted(set(timesteps), reverse=True)
        assert timesteps[-1] >= 0


def test_resampling_walks_each_stretch_so_often_and_ends_at_the_clean_image():
    walk = step_walk(6, InpaintingConfig(resamples=3, jump_length=2))
    assert walk == [0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6]
    assert step_walk(3, InpaintingConfig()) == [0, 1, 2, 3]
    assert step_walk(10, InpaintingConfig(start="original", strength=0.3)) == [7, 8, 9, 10]


@pytest.mark.parametrize("sampler", [SamplerConfig(steps=10), SamplerConfig(name="ddim", steps=100, eta=1.0)])
def test_resampling_leaves_the_distribution_of_the_data_as_it_is(sampler):
    walk = step_walk(sampler.steps, InpaintingConfig(resamples=3, jump_length=sampler.steps // 5))
    found = sampled_by(sampler, NOISES[1], 0.5, walk=walk)
    assert found.std(0).mean().item() == pytest.approx(0.5, rel=0.1)


def test_resampling_brings_what_is_redrawn_into_line_with_what_is_kept():
    # Two latents that are always equal, 1 or -1, and one of them is known: each denoising sees both.
    noise, sampler = NoiseConfig(prediction="sample"), SamplerConfig(name="ddim", steps=20, eta=1.0)
    alphas = DDPMScheduler(**noise.scheduler_settings()).alphas_cumprod

    def denoise(x, t):
        both = x.sum((1, 2, 3), keepdim=True)
        return torch.tanh(alphas[t].sqrt() / (1 - alphas[t]) * both).expand_as(x)

    def agreeing(config):
        known, mask = torch.ones(400, 1, 1, 2), torch.tensor([0.0, 1.0]).expand(400, 1, 1, 2)
        of_known = [torch.Generator().manual_seed(1000 + i) for i in range(400)]
        blend = KnownLatents(known, mask, of_known)
        generators = [torch.Generator().manual_seed(i) for i in range(400)]
        walk = step_walk(20, config)
        drawn = sample(
            denoise, (1, 1, 2), generators, noise, sampler, device=torch.device("cpu"), blend=blend, walk=walk
        )
        return (drawn[..., 1] > 0).float().mean().item()

    once, often = agreeing(InpaintingConfig()), agreeing(InpaintingConfig(resamples=5, jump_length=4))
    assert 0.6 < once < often - 0.03


def test_what_is_kept_is_shown_without_what_is_redrawn():
    model = denoiser(context_share=1.0)
    _, images, _ = inputs(2)
    redraw = torch.zeros(2, 32, 32, dtype=torch.bool)
    redraw[:, 8:20, 8:20] = True
    other = torch.from_numpy(images).clone()
    other[redraw] = 7
    first = surroundings(model.encode, torch.from_numpy(images), redraw, 4)
    assert torch.equal(first, surroundings(model.encode, other, redraw, 4))
    assert first.shape == (2, 5, 8, 8)
    assert first[0, -1].sum() == 9
    assert (first[:, :-1] * first[:, -1:]).abs().max() == 0


def test_training_redraws_whole_instances_or_the_whole_image():
    instances = torch.zeros(200, 16, 16, dtype=torch.int32)
    instances[:, 2:6, 2:6], instances[:, 9:14, 9:14] = 1, 2
    generators = [torch.Generator().manual_seed(i) for i in range(200)]
    redraw = draw_redrawn(instances, 0.5, 0, generators)
    for one in redraw:
        inside = [one[2:6, 2:6], one[9:14, 9:14]]
        assert one.all() or (any(part.any() for part in inside) and not one[0].any())
        assert all(part.all() or not part.any() for part in inside)
    assert 0.4 < redraw.flatten(1).all(1).float().mean() < 0.65


def test_a_network_that_sees_what_is_kept_follows_the_asked_label_and_the_surroundings(tmp_path):
    # One grey disc on ground of any brightness; its label says how bright it is against the ground.
    def batch(step, size=16):
        ground = torch.randint(60, 190, (size, 1, 1, 1), generator=torch_generator(0, "ground", step))
        label = torch.randint(1, 3, (size, 1, 1), generator=torch_generator(0, "label", step))
        inside = torch.zeros(size, 16, 16, dtype=torch.int32)
        inside[:, 4:12, 4:12] = 1
        shift = torch.where(label == 1, -50, 50) * inside
        images = (ground + shift[..., None]).expand(size, 16, 16, 3).to(torch.uint8)
        return {"images": images, "labels": (label * inside).to(torch.uint8), "instances": inside}

    stage = first_stage(kind="linear", latent_channels=3)
    stage.fit_components(batch(step)["images"] for step in range(5))
    training = TrainingConfig(steps=150, batch_size=16, accelerator="cpu", precision="32")
    config = denoiser_config(
        training=training, context_share=0.8, lr=3e-3, noise=NoiseConfig(prediction="sample"), ema_decay=None,
        channels=16, lr_schedule="cosine", normalise_latents="none",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Diffusion(config, stage, 3)
    every = torch.cat([model.encode(batch(step)["images"]) for step in range(5)])
    model.latent_sd.fill_(every.std())
    fit(model, batch, tmp_path, training)
    real = batch(1000)
    redraw = real["instances"].numpy() > 0
    drawer = DiffusionGenerator(model, "inpainting", sampler=SamplerConfig(steps=10), device=torch.device("cpu"))

    def inside(label):
        asked = (label * redraw).astype(np.uint8)
        return drawn_by(drawer, asked, range(16), real["images"].numpy(), redraw)[:, 6:10, 6:10].mean((1, 2, 3))

    darker, lighter = inside(1), inside(2)
    ground = real["images"][:, 0, 0, 0].numpy()
    assert (lighter - darker).mean() > 50  # the asked labels lie 100 apart, whatever was there
    assert np.corrcoef(ground, darker + lighter)[0, 1] > 0.6


def test_the_area_condition_is_the_share_of_each_label_and_a_latent_is_redrawn_if_any_of_its_pixels_is():
    condition = torch.zeros(1, 1, 4, 4)
    condition[0, 0, 0, :3] = 1
    assert shrink(condition, 4, "area").item() == pytest.approx(3 / 16)
    redraw = torch.zeros(1, 8, 8, dtype=torch.bool)
    redraw[0, 3, 3] = True
    assert latent_redraw_mask(redraw, 4)[0, 0].tolist() == [[1, 0], [0, 0]]
    assert latent_redraw_mask(dilated(redraw, 1), 4)[0, 0].tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("loss", ["l1", "l2", "min-snr"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_loss_is_finite_and_trains_the_denoiser_alone(loss, prediction):
    model = denoiser(loss=loss, noise=NoiseConfig(prediction=prediction))
    masks, images, _ = inputs(2)
    batch = {"images": torch.from_numpy(images), "labels": torch.from_numpy(masks), "position": torch.arange(2)}
    value = model.losses(batch | {"step": torch.tensor(0)})["loss"]
    value.backward()
    assert math.isfinite(value.item())
    assert all(p.grad is not None for p in model.unet.parameters())
    assert all(p.grad is None for p in model.first_stage.parameters())


def test_guidance_needs_a_network_that_was_trained_without_masks_too():
    with pytest.raises(ConfigError, match="trained without condition_dropout"):
        DiffusionGenerator(denoiser(condition_dropout=0.0), sampler=SAMPLERS[1])


@pytest.mark.parametrize("kind", ["vq", "kl"])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_autoencoders_shrink_by_their_factor_and_back(kind, factor):
    model = first_stage(kind=kind, factor=factor, codebook_size=16)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = model.encode(images)
        assert latents.shape == (1, 4, 32 // factor, 32 // factor)
        assert model.decode(latents).shape == images.shape


def test_the_linear_autoencoder_keeps_images_of_few_components(tmp_path):
    rng = np.random.default_rng(0)
    components, weights = rng.standard_normal((3, 4, 4, 3)), rng.standard_normal((10, 8, 8, 3)) * 20
    blocks = np.einsum("nhwk,kabc->nhawbc", weights, components) + 128
    images = torch.from_numpy(blocks.reshape(10, 32, 32, 3).clip(0, 255).round().astype(np.uint8))
    model = first_stage(kind="linear", latent_channels=3)
    assert model.fit_components([images[:5], images[5:]]) > 0.95
    real = to_tensor(images)
    assert (model.decode(model.encode(real)) - real).pow(2).mean().sqrt() < 0.1


def test_components_do_not_depend_on_how_patches_are_batched():
    images = torch.randint(0, 256, (12, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole, parts = first_stage(kind="linear", latent_channels=3), first_stage(kind="linear", latent_channels=3)
    assert whole.fit_components([images]) == pytest.approx(parts.fit_components(images.split((5, 1, 6))))
    torch.testing.assert_close(whole.network.basis, parts.network.basis)
    torch.testing.assert_close(whole.network.mean, parts.network.mean)


def test_an_autoencoder_refuses_a_size_it_cannot_shrink():
    with pytest.raises(ConfigError, match="size_px 30: must be a multiple of the autoencoder's factor 4"):
        Autoencoder(first_stage_config(), 30)


def training_batch(step):
    images = torch.from_numpy(inputs(2)[1])
    return {"images": images, "step": torch.tensor(step), "position": torch.arange(2)}


def test_the_gan_pulls_at_the_last_layer_in_proportion_to_the_distance():
    gan = {"adversarial_weight": 0.5, "adversarial_start": 1, "discriminator_width": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = first_stage(kind="vq", codebook_size=16, **gan)
    last, gradients = model.network.decoder.conv_out.weight, []

    def minimise(loss, number):
        if number == 0:
            gradients.append(torch.autograd.grad(loss, last, retain_graph=True)[0])

    for step in (0, 1):
        model.training_step(training_batch(step), minimise)
    without, with_gan = gradients
    assert ((with_gan - without).norm() / without.norm()).item() == pytest.approx(0.5, rel=0.15)


def test_the_kl_term_weighs_sums_over_latents_against_sums_over_the_image():
    model = first_stage(kl_weight=1.0)
    batch = training_batch(0)
    found = model.training_step(batch, lambda loss, number: None)["loss_regulariser"]
    gaussians = model.network.encode(to_tensor(batch["images"])).latent_dist
    divergence = 0.5 * (gaussians.mean**2 + gaussians.var - 1 - gaussians.logvar).sum((1, 2, 3))
    assert found.item() == pytest.approx(divergence.mean().item() / (3 * 32 * 32), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (AutoencoderConfig, {"kind": "linear", "factor": 2, "latent_channels": 13}, "blocks of 2 x 2 have 12 values"),
        (AutoencoderConfig, {"factor": 8, "multipliers": [1, 2]}, "multipliers: factor 8 needs 4 of them"),
        (DiffusionConfig, {"sampler": {"guidance_interval": [0.7, 0.0]}}, r"guidance_interval \[0.7, 0\]: expected"),
        (DiffusionConfig, {"sampler": {"steps": 200}, "noise": {"timesteps": 100}}, "there are 100 noise.timesteps"),
        (DistillationConfig, {"teacher_steps": 8, "steps": 8}, "steps 8: must be fewer than teacher_steps 8"),
    ],
)
def test_settings_that_could_not_be_used_are_refused_before_training(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        build(kind, {"training": {"steps": 1}} | settings)
