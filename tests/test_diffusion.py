import math

import numpy as np
import pytest
import torch

from counterstain.errors import ConfigError
from counterstain.generators.autoencoder import Autoencoder, AutoencoderConfig
from counterstain.generators.conditioning import shrink
from counterstain.generators.diffusion import Diffusion, DiffusionConfig, DiffusionGenerator
from counterstain.generators.inpainting import InpaintingConfig, latent_redraw_mask
from counterstain.generators.samplers import NoiseConfig, SamplerConfig, sample
from counterstain.training import TrainingConfig

ONE = TrainingConfig(steps=1, batch_size=2)
SAMPLERS = [
    SamplerConfig(name="ddim", steps=3, eta=1.0, compute_batch=4),
    SamplerConfig(name="dpmsolver++", steps=3, guidance=2.0, compute_batch=4),
    SamplerConfig(name="unipc", steps=3, guidance=2.0, guidance_interval=(0.2, 0.8), compute_batch=4),
]


def first_stage(**changes):
    settings = {"channels": 8, "blocks": 1, "attention": False, "latent_channels": 4, "kind": "kl"}
    return Autoencoder(
        AutoencoderConfig(training=ONE, lpips_weight=0, adversarial_weight=0, **settings | changes), 32
    ).eval()


def tiny(**changes):
    settings = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "heads": 2}
    return DiffusionConfig(training=ONE, **settings | changes)


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Diffusion(tiny(), first_stage(), 6)


def inputs(n=6, size=32):
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 6, (n, 4, 4), dtype=np.uint8).repeat(size // 4, 1).repeat(size // 4, 2)
    images = rng.integers(0, 255, (n, size, size, 3), dtype=np.uint8)
    return masks, images, masks > 2


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.name)
@pytest.mark.parametrize("method", ["diffusion", "inpainting"])
def test_an_image_is_the_same_alone_and_in_a_batch(model, sampler, method):
    masks, images, redraw = inputs()
    generator = DiffusionGenerator(model, method, sampler=sampler)
    together = generator.generate(masks, range(6), images, redraw)
    alone = generator.generate(masks[4:5], [4], images[4:5], redraw[4:5])
    assert np.array_equal(together[4], alone[0])
    assert not np.array_equal(together[4], generator.generate(masks[4:5], [5], images[4:5], redraw[4:5])[0])


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.name)
def test_inpainting_leaves_every_byte_outside_the_redrawn_instances(model, sampler):
    masks, images, redraw = inputs()
    generator = DiffusionGenerator(model, "inpainting", sampler=sampler, inpainting=InpaintingConfig(dilation_px=3))
    drawn = generator.generate(masks, range(6), images, redraw)
    assert np.array_equal(drawn[~redraw], images[~redraw])
    assert not np.array_equal(drawn[redraw], images[redraw])


def test_without_the_composite_the_background_passes_through_the_autoencoder(model):
    masks, images, redraw = inputs(2)
    config = InpaintingConfig(composite=False)
    generator = DiffusionGenerator(model, "inpainting", sampler=SAMPLERS[1], inpainting=config)
    nothing = np.zeros_like(redraw)
    drawn = generator.generate(masks, range(2), images, nothing)
    decoded = generator.model.decode(generator.model.encode(torch.from_numpy(images)))
    expected = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).numpy()
    assert np.abs(drawn.astype(int) - expected.astype(int)).max() <= 1


def test_a_perfect_denoiser_leads_every_sampler_to_the_data():
    noise = NoiseConfig()
    target = torch.linspace(-1, 1, 32).reshape(1, 2, 4, 4)
    betas = torch.linspace(noise.beta_start**0.5, noise.beta_end**0.5, 1000) ** 2
    alphas = torch.cumprod(1 - betas, 0)

    def denoise(x, t):
        return (x - alphas[t].sqrt() * target) / (1 - alphas[t]).sqrt()

    for sampler in (
        SamplerConfig(name="ddim", steps=50),
        SamplerConfig(name="dpmsolver++", steps=20),
        SamplerConfig(name="unipc", steps=20),
    ):
        generators = [torch.Generator().manual_seed(0)]
        drawn = sample(denoise, (2, 4, 4), generators, noise, sampler, device=torch.device("cpu"))
        assert torch.allclose(drawn, target, atol=0.15), sampler.name


def test_the_area_condition_is_the_share_of_each_label():
    condition = torch.zeros(1, 1, 4, 4)
    condition[0, 0, 0, :3] = 1
    assert shrink(condition, 4, "area").item() == pytest.approx(3 / 16)


def test_a_latent_is_redrawn_if_any_of_its_pixels_is():
    redraw = torch.zeros(1, 8, 8, dtype=torch.bool)
    redraw[0, 3, 3] = True
    assert latent_redraw_mask(redraw, 4, 0)[0, 0].tolist() == [[1, 0], [0, 0]]
    assert latent_redraw_mask(redraw, 4, 1)[0, 0].tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("loss", ["l1", "l2", "min-snr"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_loss_is_finite_and_trains_the_denoiser_alone(loss, prediction):
    model = Diffusion(tiny(loss=loss, noise=NoiseConfig(prediction=prediction)), first_stage(), 6)
    masks, images, _ = inputs(2)
    batch = {"images": torch.from_numpy(images), "labels": torch.from_numpy(masks), "position": torch.arange(2)}
    value = model.loss(batch | {"step": torch.tensor(0)})
    value.backward()
    assert math.isfinite(value.item())
    assert all(p.grad is not None for p in model.unet.parameters())
    assert all(p.grad is None for p in model.first_stage.parameters())


def test_guidance_needs_a_network_that_was_trained_without_masks_too():
    model = Diffusion(tiny(condition_dropout=0.0), first_stage(), 6)
    with pytest.raises(ConfigError, match="trained without condition_dropout"):
        DiffusionGenerator(model, sampler=SAMPLERS[1])


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
    components = rng.standard_normal((3, 4, 4, 3))
    weights = rng.standard_normal((10, 8, 8, 3)) * 20
    blocks = np.einsum("nhwk,kabc->nhawbc", weights, components) + 128
    images = torch.from_numpy(blocks.reshape(10, 32, 32, 3).clip(0, 255).round().astype(np.uint8))
    model = first_stage(kind="linear", latent_channels=3)
    assert model.fit_components([images[:5], images[5:]]) > 0.95
    restored = model.decode(model.encode(images.movedim(-1, 1) / 127.5 - 1))
    assert (restored - (images.movedim(-1, 1) / 127.5 - 1)).pow(2).mean().sqrt() < 0.1


def test_more_components_than_pixels_are_refused():
    with pytest.raises(ValueError, match="blocks of 2 x 2 have 12 values"):
        AutoencoderConfig(training=ONE, kind="linear", factor=2, latent_channels=13)


def test_an_autoencoder_refuses_a_size_it_cannot_shrink():
    with pytest.raises(ConfigError, match="size_px 30: must be a multiple of the autoencoder's factor 4"):
        Autoencoder(AutoencoderConfig(training=ONE, lpips_weight=0), 30)


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_at_the_last_layer():
    model = first_stage()
    distance = model.decode(torch.ones(1, 4, 8, 8)).abs().mean()
    assert model._adaptive_weight(distance, 4 * distance).item() == pytest.approx(0.25, rel=1e-2)
    assert model._adaptive_weight(distance, 0 * distance).item() <= 1e4


def test_the_kl_term_weighs_sums_over_latents_against_sums_over_the_image():
    model = first_stage(kl_weight=1.0)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    batch = {"step": torch.tensor(0), "position": torch.arange(2)}
    with torch.no_grad():
        gaussians = model.network.encode(images).latent_dist
        found = model._reconstruct(images, batch).regulariser
    divergence = 0.5 * (gaussians.mean**2 + gaussians.var - 1 - gaussians.logvar).sum((1, 2, 3))
    assert found.item() == pytest.approx(divergence.mean().item() / (3 * 32 * 32), rel=1e-4)


def test_widths_of_a_first_stage_need_not_double():
    network = first_stage(factor=8, channels=16, multipliers=(1, 2, 4, 4)).network
    assert network.encoder.conv_out.weight.shape[1] == 64
    with pytest.raises(ValueError, match="multipliers: factor 8 needs 4 of them"):
        first_stage(factor=8, multipliers=(1, 2))
