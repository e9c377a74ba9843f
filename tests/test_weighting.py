import numpy as np
import pytest
import torch

from counterstain.data.patches import Patch, Source
from counterstain.segmentation.model import cross_entropy_loss, dice_loss
from counterstain.segmentation.train import MixupBatches, count_labels, label_weights

SOURCE = Source(region="r", slide="s", patient="p", y_px=0, x_px=0)


def test_subtypes_weigh_the_same_in_sum_and_the_tissue_class_as_before():
    pixels = np.array([1000, 300, 60, 0, 40])
    weights = label_weights(pixels, 1.0)
    assert weights[[0, 3]].tolist() == [1, 1]  # background, and what does not occur
    sums = (weights * pixels)[[1, 2, 4]]
    assert sums == pytest.approx(np.full(3, 400 / 3))
    assert label_weights(np.array([5, 0, 0]), 1.0).tolist() == [1, 1, 1]


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_the_mean_weight_of_subtypes_is_one_and_rare_ones_weigh_more(strength):
    pixels = np.array([50, 300, 60, 40])
    weights = label_weights(pixels, strength)
    assert (weights[1:] * pixels[1:]).sum() / pixels[1:].sum() == pytest.approx(1)
    assert weights[1] < 1 < weights[2] < weights[3]


def test_labels_are_counted_over_the_whole_stream():
    stream = [_patch(1 if i < 500 else 2) for i in range(1000)] + [_patch(3)] * 10
    pixels = count_labels(stream, 1000, num_labels=4)
    assert pixels.sum() == 512 * 16
    assert pixels[3] == 0
    assert pixels[1] == pytest.approx(pixels[2], rel=0.02)


def _patch(subtype):
    instances = np.ones((4, 4), np.int32)
    return Patch(image=np.zeros((4, 4, 3), np.uint8), instances=instances, subtypes={1: subtype}, source=SOURCE)


def test_a_pixel_of_weight_two_counts_like_two():
    labels = torch.tensor([[[0, 1, 1], [0, 2, 2]]], dtype=torch.uint8)
    logits = torch.randn((1, 2, 2, 3), generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 1.0, 2.0])[labels.long()]
    twice_logits = torch.cat([logits.flatten(2), logits[:, :, 1, 1:]], dim=2)[:, :, None]
    twice_labels = torch.cat([labels.flatten(1), labels[:, 1, 1:]], dim=1)[:, None]
    assert dice_loss(logits, labels, weights).item() == pytest.approx(dice_loss(twice_logits, twice_labels).item())
    weighted = cross_entropy_loss(logits, labels, weights).item()
    assert weighted == pytest.approx(cross_entropy_loss(twice_logits, twice_labels).item() * 8 / 6, rel=1e-5)


def batches(step):
    images = torch.randint(0, 256, (6, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
    return {"images": images, "labels": (images[..., 0] > 128).to(torch.uint8)}


def test_mixup_blends_images_and_remembers_both_labels():
    batch, plain = MixupBatches(batches, alpha=1.0, seed=0)(7), batches(7)
    share = batch["kept_share"][0].item()
    assert batch["kept_share"].tolist() == [pytest.approx(share)] * 6
    assert torch.equal(batch["labels"], plain["labels"])
    partner = [next(j for j in range(6) if torch.equal(plain["labels"][j], m)) for m in batch["mixed_labels"]]
    assert sorted(partner) == list(range(6))
    expected = share * plain["images"].float() + (1 - share) * plain["images"][partner].float()
    assert (batch["images"].float() - expected).abs().max() <= 0.51
