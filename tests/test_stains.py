from unittest.mock import Mock

import numpy as np
import pytest

from counterstain.data.stains import STAIN_VECTORS, jitter_stains, macenko_vectors


def unit(name):
    return np.array(STAIN_VECTORS[name]) / np.linalg.norm(STAIN_VECTORS[name])


def stained(*, blue=0.5, brown=0.5, size_px=64, noise=0.0):
    """Haematoxylin in varying amounts on the left, DAB on the right."""
    rng = np.random.default_rng(0)
    amounts = rng.uniform(0.5, 1.0, (size_px, size_px, 1))
    left = np.arange(size_px)[None, :, None] < size_px // 2
    density = 2 * amounts * np.where(left, blue * unit("haematoxylin"), brown * unit("dab"))
    return np.rint(255 * np.exp(-density) + noise * rng.standard_normal(density.shape)).clip(0, 255).astype(np.uint8)


def density(image):
    return -np.log(np.maximum(image, 1) / 255)


def jittered(image, stains, sd, seed=0):
    return jitter_stains(image, stains, sd, np.random.default_rng(seed))


@pytest.mark.parametrize("stains", ["channels", "dab", "eosin", "macenko"])
def test_jitter_follows_from_its_generator_and_its_spread_alone(stains):
    image = stained()
    once, again, other = (jittered(image, stains, 0.1, seed) for seed in (0, 0, 1))
    assert once.dtype == np.uint8
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)
    assert np.array_equal(jittered(image, stains, 0.0), image)


def test_jitter_of_stains_keeps_the_hue_of_a_pure_stain():
    image = stained(brown=0.0)  # pure haematoxylin on white
    factors = Mock(**{"standard_normal.return_value": np.array([[2.5, 0.0], [0.0, 0.0]])})
    changed = density(jitter_stains(image, "dab", 0.2, factors))[:, :32].reshape(-1, 3)
    along = changed @ unit("haematoxylin")
    assert np.abs(changed - along[:, None] * unit("haematoxylin")).max() < 0.02
    assert along.mean() == pytest.approx(1.5 * (density(image)[:, :32] @ unit("haematoxylin")).mean(), rel=0.02)


def test_the_colours_of_two_stains_are_read_off_an_image():
    found = macenko_vectors(stained(noise=1.0))
    assert found[0] @ unit("haematoxylin") > 0.995
    assert found[1] @ unit("dab") > 0.995


@pytest.mark.parametrize("image", [np.full((32, 32, 3), 250, np.uint8), stained(brown=0.0)[:, :32]])
def test_images_without_two_stains_are_jittered_by_channel(image):
    assert macenko_vectors(image) is None
    assert np.array_equal(jittered(image, "macenko", 0.1), jittered(image, "channels", 0.1))
