import numpy as np
import pytest
from scipy import ndimage

from counterstain.generators.training_monitors import code_diversity, repetition, warnings_of, white_share


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
