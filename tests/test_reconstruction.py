import numpy as np
import pytest
import torch
from drawn_requests import first_stage_config
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from counterstain.generators.autoencoder import Autoencoder
from counterstain.generators.training_monitors import psnr, reconstruction_figures, ssim


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
