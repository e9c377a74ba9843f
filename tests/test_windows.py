import numpy as np
import pytest
import torch
from drawn_requests import denoiser_config, drawn_by, first_stage_config, random_masks

from counterstain.errors import ConfigError
from counterstain.generators.autoencoder import Autoencoder
from counterstain.generators.conditioning import Condition
from counterstain.generators.diffusion import Diffusion
from counterstain.generators.diffusion_config import InpaintingConfig, NoiseConfig, SamplerConfig, WindowsConfig
from counterstain.generators.drawing import DiffusionGenerator
from counterstain.generators.samplers import sample
from counterstain.generators.windows import WindowGrid, extended, in_tiles, windowed

SAMPLER = SamplerConfig(name="dpmsolver++", steps=2, guidance=2.0, compute_batch=4)


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first_stage = Autoencoder(first_stage_config(kind="linear"), 32)
        first_stage.fit_components([torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)])
        return Diffusion(denoiser_config(sampler=SAMPLER), first_stage, 6)


@pytest.mark.parametrize("size", [(8, 8), (5, 30), (64, 17), (9, 8)])
@pytest.mark.parametrize("overlap", [0, 3, 7])
def test_the_weights_over_every_point_sum_to_one(size, overlap):
    grid = WindowGrid.over(*size, 8, overlap)
    total = torch.zeros(size, dtype=torch.float64)
    for (y, x), weight in zip(grid.places, grid.weights(), strict=True):
        total[y : y + grid.window_height, x : x + grid.window_width] += weight
    assert torch.allclose(total, torch.ones_like(total))


def test_neighbouring_windows_share_at_least_the_overlap():
    grid = WindowGrid.over(50, 8, 8, 3)
    assert max(b - a for a, b in zip(grid.rows, grid.rows[1:], strict=False)) <= 5
    assert grid.rows[-1] == 42
    assert len(WindowGrid.over(8, 8, 8, 3)) == 1


def test_a_patch_of_the_training_size_is_drawn_as_ever(model):
    masks, images, redraw = random_masks(2, 32, 32)
    for method in ("diffusion", "inpainting"):
        plain = drawn_by(DiffusionGenerator(model, method), masks, [0, 1], images, redraw)
        with_windows = drawn_by(DiffusionGenerator(model, method, trained_px=32), masks, [0, 1], images, redraw)
        assert np.array_equal(plain, with_windows)


@pytest.mark.parametrize("size", [(50, 33), (20, 20)])
def test_images_of_any_size_follow_from_their_seed_alone(model, size):
    masks, images, redraw = (np.resize(a, (2, *size, *a.shape[3:])) for a in random_masks(2, 80, 56))
    generator = DiffusionGenerator(model, "inpainting", trained_px=32, inpainting=InpaintingConfig(dilation_px=2))
    drawn = drawn_by(generator, masks, [0, 1], images, redraw)
    assert drawn.shape == images.shape
    assert np.array_equal(drawn[~redraw], images[~redraw])
    assert np.array_equal(drawn[1:], drawn_by(generator, masks[1:], [1], images[1:], redraw[1:]))


def test_an_analytic_denoiser_leaves_no_seam_at_the_windows_borders():
    # The data are independent normal numbers of mean 0.5, so the best prediction is known; what it is told of its
    # window adds a small error that differs from window to window, as a network's does.
    noise, size, window = NoiseConfig(), 64, 16
    betas = torch.linspace(noise.beta_start**0.5, noise.beta_end**0.5, noise.timesteps) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    sd, mean = 0.1, 0.5

    def denoise(x, t, condition):
        shade = condition.labels.mean((2, 3), keepdim=True)
        a, s = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        clean = mean + (x - a * mean) * a * sd**2 / (a**2 * sd**2 + s**2) + 0.1 * shade
        return (x - a * clean) / s

    labels = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(1)) * 8
    condition = Condition(labels=labels)

    def rise_at_borders(overlap):
        grid = WindowGrid.over(size, size, window, overlap)
        drawn = sample(
            windowed(denoise, condition, grid, 8), (1, size, size), [torch.Generator().manual_seed(0)], noise,
            SamplerConfig(steps=15), device=torch.device("cpu"),
        )  # fmt: skip
        steps = (drawn[0, 0, 1:] - drawn[0, 0, :-1]).abs().mean(1)
        borders = sorted({row - 1 for row in grid.rows[1:]} | {row + window - 1 for row in grid.rows[:-1]})
        elsewhere = [row for row in range(size - 1) if row not in borders]
        return (steps[borders].mean() / steps[elsewhere].mean()).item()

    assert rise_at_borders(window // 2) == pytest.approx(1, abs=0.05)
    assert rise_at_borders(0) > 1.2  # what the blending is there for


def test_tiles_of_a_linear_first_stage_decode_to_the_same_bits(model):
    latents, images = torch.randn(2, 4, 40, 27), torch.randint(0, 256, (1, 160, 108, 3), dtype=torch.uint8)
    model.tiles = None
    decoded, encoded = model.decode(latents), model.encode(images)
    model.tiles = WindowsConfig(decode_px=64)
    assert torch.equal(model.decode(latents), decoded)
    assert torch.equal(model.encode(images), encoded)


def test_a_first_stage_never_sees_more_than_a_tile():
    seen = []

    def apply(part):
        seen.append(part.shape)
        return part.repeat_interleave(2, 2).repeat_interleave(2, 3)

    plane = torch.randn(1, 3, 100, 70)
    decoded = in_tiles(apply, plane, WindowGrid.over(100, 70, 16, 4), writes=2, blend=True)
    assert max(shape.numel() for shape in seen) == 3 * 16 * 16
    assert torch.allclose(decoded, apply(plane), atol=1e-5)


def test_images_are_extended_to_whole_latents_and_at_least_a_window():
    assert extended(np.ones((30, 41)), 32, 4).shape == (32, 44)
    assert extended(np.ones((30, 41, 3)), 32, 4, by_edges=True).min() == 1


def test_a_window_that_the_network_cannot_halve_is_refused(model):
    generator = DiffusionGenerator(model, trained_px=32)
    with pytest.raises(ConfigError, match=r"windows\.window_px 36: must be a multiple of 8"):
        generator.draw_with(SAMPLER, InpaintingConfig(), WindowsConfig(window_px=36))
