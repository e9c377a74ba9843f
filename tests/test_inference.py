import numpy as np
import pytest
import torch

from counterstain.segmentation.inference import Strip, bands, filled, read_ahead, sliding_window_inference
from counterstain.segmentation.segmenter_config import Windows


class Redness:
    """A segmenter that looks at each pixel alone: the logit is the red channel, centred and scaled."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def tumour_logits(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images))
        return (images[..., 0].float() - 128) / 32


class Position:
    """A segmenter whose logit is large at the edge of its window and -4 inside."""

    def tumour_logits(self, images: torch.Tensor) -> torch.Tensor:
        logits = torch.full(images.shape[:3], 40.0)
        logits[:, 4:-4, 4:-4] = -4.0
        return logits


def region(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def predict(segmenter, *images: np.ndarray, size_px: int = 32, overlap_px: int = 8, batch_size: int = 4):
    return list(sliding_window_inference(segmenter, images, Windows(size_px, overlap_px, batch_size)))


def expected(image: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-(image[..., 0].astype(np.float64) - 128) / 32))


@pytest.mark.parametrize("shape", [(32, 32), (96, 64), (77, 41), (5, 90), (1, 1), (33, 32)])
def test_every_pixel_of_any_region_gets_the_probability_of_its_logit(shape) -> None:
    image = region(*shape)
    (found,) = predict(Redness(), image)
    assert found.shape == shape
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected(image), atol=1e-5)


def test_regions_come_back_in_their_order_and_as_if_alone() -> None:
    images = [region(40 + 30 * i, 50, seed=i) for i in range(4)]
    together = predict(Redness(), *images, batch_size=5)
    alone = [predict(Redness(), image, batch_size=3)[0] for image in images]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))


def strips(image: np.ndarray, windows: Windows, read: list[int]):
    above = None
    for band in bands(len(image), windows):
        read.append(band.height_px)
        rows = image[band.top_px : band.top_px + band.height_px]
        yield (above := Strip(rows, windows, band, len(image), above))


@pytest.mark.parametrize("overlap_px", [0, 8, 27])  # 27: more than half of a window
@pytest.mark.parametrize("shape", [(32, 32), (97, 64), (150, 41), (5, 90), (90, 5), (33, 32)])
def test_a_region_seen_row_of_windows_by_row_of_windows_is_predicted_as_if_whole(shape, overlap_px) -> None:
    image, windows, read = region(*shape), Windows(32, overlap_px, 4), []
    found = [strip.probability() for strip in filled(Redness(), strips(image, windows, read), 4)]
    (whole,) = predict(Redness(), image, overlap_px=overlap_px)
    # the end of an array is computed by other instructions
    np.testing.assert_array_max_ulp(np.concatenate(found), whole, maxulp=4)
    assert np.array_equal(np.concatenate(found) > 0.5, whole > 0.5)
    assert max(read) <= 32


def test_small_regions_share_full_batches() -> None:
    model = Redness()
    predict(model, *(region(32, 32) for _ in range(10)))
    assert model.batches == [4, 4, 4]
    assert predict(model) == []


def test_regions_are_read_as_they_are_needed() -> None:
    read = []
    regions = (read.append(i) or region(32, 32) for i in range(9))
    next(sliding_window_inference(Redness(), regions, Windows(32, 8, 2)))
    assert len(read) == 2


def test_tasks_are_done_ahead_in_their_order_but_not_far_and_their_errors_arrive() -> None:
    begun = []
    tasks = (lambda number=number: begun.append(number) or 6 / number for number in (3, 2, 1, 0, -1))
    results = read_ahead(tasks)
    assert next(results) == 2.0
    assert len(begun) <= 2
    assert [next(results), next(results)] == [3.0, 6.0]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_the_middle_of_a_window_outweighs_the_edge_of_its_neighbour() -> None:
    (found,) = predict(Position(), region(96, 96), size_px=64, overlap_px=32)
    assert (found[10:-10, 10:-10] < 0.5).all()
