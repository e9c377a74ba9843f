import numpy as np

from counterstain.io.thumbnails import TissueConfig, otsu, saturation, tissue_mask


def glass(height: int = 120, width: int = 160) -> np.ndarray:
    noise = np.random.default_rng(0).integers(-3, 4, (height, width, 3))
    return (np.array([243, 242, 244]) + noise).astype(np.uint8)


def with_tissue(colour: tuple[int, int, int]) -> np.ndarray:
    image = glass()
    image[30:90, 40:120] = colour
    return image


def test_a_blank_slide_has_no_tissue():
    assert not tissue_mask(glass()).any()


def test_stained_tissue_is_found_and_glass_is_not():
    for colour in [(150, 90, 50), (215, 205, 225), (200, 120, 170)]:  # DAB, pale haematoxylin, eosin
        mask = tissue_mask(with_tissue(colour))
        assert mask[32:88, 42:118].mean() > 0.99
        assert mask[:25].sum() == 0


def test_a_strong_stain_does_not_hide_pale_tissue():
    image = with_tissue((190, 150, 190))
    image[35:80, 45:80] = (110, 50, 20)
    assert tissue_mask(image)[35:80, 85:115].mean() > 0.95


def test_black_borders_and_dust_are_no_tissue():
    image = glass()
    image[:, :20] = (4, 0, 0)
    image[60:62, 80:82] = (150, 90, 50)
    assert not tissue_mask(image, TissueConfig(min_area_share=1e-3)).any()


def test_tissue_at_the_border_is_kept():
    image = glass()
    image[:40, :40] = (150, 90, 50)
    assert tissue_mask(image)[:38, :38].all()


def test_saturation_is_that_of_hsv():
    assert saturation(np.array([[[200, 100, 50], [9, 9, 9], [0, 0, 0]]], np.uint8)).tolist() == [[0.75, 0, 0]]


def test_otsu_parts_two_classes():
    assert 0.1 < otsu(np.array([0.1] * 50 + [0.6] * 20)) < 0.6
