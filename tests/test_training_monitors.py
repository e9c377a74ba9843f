import math

import numpy as np
import pytest
import torch
from drawn_requests import first_stage_config
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from counterstain.generators.autoencoder import Autoencoder, CodebookUpkeep, usage_of
from counterstain.generators.training_monitors import (
    code_diversity,
    psnr,
    reconstruction_figures,
    repetition,
    ssim,
    warnings_of,
    white_share,
)


def pair():
    rng = np.random.default_rng(0)
    smooth = rng.random((2, 3, 8, 8)).repeat(5, 2).repeat(5, 3) * 2 - 1
    return smooth, np.clip(smooth + 0.2 * rng.standard_normal(smooth.shape), -1, 1)


def test_psnr_and_ssim_are_those_of_scikit_image():
    real, drawn = pair()
    found = psnr(torch.from_numpy(drawn), torch.from_numpy(real)), ssim(torch.from_numpy(drawn), torch.from_numpy(real))
    settings = {"data_range": 2.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for i in range(2):
        expected = structural_similarity(drawn[i], real[i], channel_axis=0, **settings)
        assert found[0][i].item() == pytest.approx(peak_signal_noise_ratio(real[i], drawn[i], data_range=2.0))
        assert found[1][i].item() == pytest.approx(expected, abs=1e-6)


def first_stage(**changes):
    return Autoencoder(first_stage_config(**{"factor": 2, "codebook_size": 32} | changes), 32).eval()


def images(n=10):
    return np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def test_what_is_given_back_unchanged_has_the_best_figures():
    model = first_stage(kind="linear", latent_channels=12)
    model.fit_components([torch.from_numpy(images())])
    figures = reconstruction_figures(model, images())
    assert figures["psnr"] > 60
    assert figures["ssim"] == pytest.approx(1.0, abs=1e-4)


def test_the_codebook_and_a_perceptual_distance_are_measured_where_there_are_such():
    figures = reconstruction_figures(
        first_stage(kind="vq"), images(), lambda a, b: (a - b).abs().mean((1, 2, 3), keepdim=True)
    )
    assert set(figures) == {"psnr", "ssim", "lpips", "codebook_usage", "codebook_perplexity"}
    assert 1 <= figures["codebook_perplexity"] <= 32 * figures["codebook_usage"]
    assert set(reconstruction_figures(first_stage(kind="kl"), images())) == {"psnr", "ssim"}


CENTRES = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0], [5.0, 5.0]])


def latents(step):
    """Four clouds of latents, (1, 2, 8, 8)."""
    generator = torch.Generator().manual_seed(step)
    clouds = CENTRES.repeat(16, 1) + 0.1 * torch.randn(64, 2, generator=generator)
    return clouds.T.reshape(1, 2, 8, 8)


def run(codes, steps, **settings):
    upkeep, revived = CodebookUpkeep(codes, 0.9, **settings), 0
    for step in range(steps):
        drawn = latents(step)
        chosen = torch.cdist(drawn.movedim(1, -1).flatten(0, -2), codes).argmin(1)
        revived += upkeep.update(codes, drawn, chosen, torch.Generator().manual_seed(step))
    return upkeep, revived


def test_averaged_codes_go_to_the_means_of_the_latents_that_choose_them():
    codes = CENTRES + torch.tensor([1.0, -1.0])
    upkeep, _ = run(codes, 100, averaged=True, revive_below=None)
    assert torch.allclose(codes, CENTRES, atol=0.1)
    assert torch.allclose(upkeep.usage, torch.ones(4), atol=1e-4)


def test_codes_without_upkeep_collapse_and_revived_ones_find_every_cloud():
    far = torch.tensor([[2.0, 2.0], [90.0, 0.0], [0.0, 90.0], [90.0, 90.0]])
    collapsed, revived = far.clone(), far.clone()
    run(collapsed, 100, averaged=True, revive_below=None)
    assert torch.equal(collapsed[0].round(decimals=1), torch.tensor([2.5, 2.5]))
    _, times = run(revived, 300, averaged=True, revive_below=0.1)
    assert times >= 3
    assert torch.cdist(CENTRES, revived).min(1).values.max() < 0.5


def test_the_usage_is_known_where_codes_follow_the_gradient():
    codes = torch.cat([CENTRES, torch.full((4, 2), 99.0)])
    before = codes.clone()
    upkeep, revived = run(codes, 60, averaged=False, revive_below=None)
    assert revived == 0
    assert torch.equal(codes, before)
    assert upkeep.usage[:4].tolist() == pytest.approx([2.0] * 4, abs=0.01)
    assert upkeep.usage[4:].max() < 0.01


def test_perplexity_is_the_number_of_codes_that_would_do():
    assert usage_of(torch.arange(8), 16) == (0.5, pytest.approx(8.0))
    share, perplexity = usage_of(torch.tensor([0, 0, 0, 1]), 16)
    assert share == 2 / 16
    assert perplexity == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


def tissue(seed, size=128):
    """Dark nuclei strewn over bright ground."""
    rng = np.random.default_rng(seed)
    seeds = np.zeros((size, size))
    seeds[rng.integers(0, size, size), rng.integers(0, size, size)] = 1
    nuclei = ndimage.gaussian_filter(seeds, 2, mode="wrap") * 25
    grey = 220 - 150 * np.minimum(nuclei, 1) + 4 * rng.standard_normal((size, size))
    return grey.clip(0, 255).astype(np.uint8)[..., None].repeat(3, axis=2)


def figures(**changes):
    return {"code_diversity": 9.0, "white_share": 0.0, "repetition": 0.2} | changes


def test_codes_that_change_nothing_are_noticed():
    alive = np.stack([[tissue(10 * mask + code) for code in range(3)] for mask in range(2)])
    collapsed = alive[:, :1].repeat(3, axis=1)
    assert code_diversity(collapsed) == 0
    assert code_diversity(alive) > 10
    assert warnings_of(figures(code_diversity=code_diversity(alive))) == []
    assert "z has collapsed" in warnings_of(figures(code_diversity=code_diversity(collapsed)))[0]


def test_white_images_are_counted():
    images = np.stack([np.full((64, 64, 3), 245, np.uint8), *(tissue(i, 64) for i in range(3))])
    assert white_share(images) == 0.25
    assert warnings_of(figures(white_share=0.25)) == ["25% of the images are near white"]


def test_white_images_are_no_fault_where_real_patches_are_white_as_often():
    assert warnings_of(figures(white_share=0.25, real_white_share=0.2)) == []


@pytest.mark.parametrize("period", [16, 32, 64])
def test_a_tile_that_is_repeated_is_noticed(period):
    tile = tissue(0)[:period, :period]
    tiled = np.tile(tile, (128 // period, 128 // period, 1))
    noisy = (tiled + np.random.default_rng(0).normal(0, 8, tiled.shape)).clip(0, 255).astype(np.uint8)
    scores = repetition(np.stack([tiled, noisy]))
    assert scores.min() > 0.7
    assert "texture repeats itself" in warnings_of(figures(repetition=float(scores.mean()), real_repetition=0.2))[0]


def test_tissue_a_smooth_spot_an_edge_and_plain_ground_do_not_count_as_repeated():
    y, x = np.mgrid[:128, :128]
    grain = np.random.default_rng(0).normal(0, 4, x.shape)
    spot = 240 + grain - 200 * np.exp(-((y - 60) ** 2 + (x - 70) ** 2) / 800)
    edge = np.where(x + y < 140, 100, 220) + grain
    others = [np.stack([grey.astype(np.uint8)] * 3, axis=-1) for grey in (spot, edge, np.full((128, 128), 200))]
    scores = repetition(np.stack([*(tissue(i) for i in range(5)), *others]))
    assert scores.max() < 0.35
    assert warnings_of(figures(repetition=float(scores.max()))) == []
