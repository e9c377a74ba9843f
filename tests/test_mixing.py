import numpy as np
import pytest
import torch

from counterstain.data.patches import Patch, Source, turn
from counterstain.data.sampling import SamplingConfig, vary
from counterstain.errors import InputError
from counterstain.segmentation.mixing import (
    MixedPatches,
    MixingConfig,
    ShareSchedule,
    synthetic_count,
    synthetic_share,
    training_steps,
)
from counterstain.segmentation.model import cross_entropy_loss, dice_loss
from counterstain.segmentation.train import MixupBatches, count_labels, label_weights

PLAIN = SamplingConfig(flip=False, quarter_turns=False)


def patch(region: str, value: int = 0) -> Patch:
    source = Source(region=region, slide="s", patient="p", y_px=0, x_px=0)
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) + np.uint8(value)
    return Patch(image=image, instances=np.arange(16, dtype=np.int32).reshape(4, 4), subtypes={}, source=source)


class Real:
    def __getitem__(self, index: int) -> Patch:
        return patch(f"real {index}")


SYNTHETIC = [patch(f"synthetic {i}", i) for i in range(10)]


def mixed(share: float, count: int = 10, seed: int = 0, sampling: SamplingConfig = PLAIN) -> MixedPatches:
    return MixedPatches(Real(), SYNTHETIC, sampling, numbers=range(count), share=lambda _: share, seed=seed)


def regions(stream: MixedPatches, n: int) -> list[str]:
    return [stream[i].source.region for i in range(n)]


@pytest.mark.parametrize("amount", [0.5, 1.0, 4.0])
def test_the_share_of_synthetic_patches_follows_the_amount(amount) -> None:
    stream = mixed(synthetic_share(amount))
    share = np.mean([stream.is_synthetic(i) for i in range(4000)])
    assert share == pytest.approx(amount / (1 + amount), abs=0.03)


def test_real_patches_keep_their_positions_in_every_mixture() -> None:
    assert regions(mixed(0.0), 50) == [f"real {i}" for i in range(50)]
    for i, region in enumerate(regions(mixed(0.5), 100)):
        assert region.startswith("synthetic") or region == f"real {i}"


def test_only_the_first_patches_of_the_set_are_used_and_all_of_them() -> None:
    assert set(regions(mixed(1.0, count=4), 200)) == {f"synthetic {i}" for i in range(4)}


def test_a_larger_share_keeps_the_synthetic_positions_of_a_smaller_one() -> None:
    small, large = mixed(0.3), mixed(0.6)
    assert all(large.is_synthetic(i) for i in range(200) if small.is_synthetic(i))


def test_equal_seeds_give_equal_streams_in_any_order() -> None:
    forward = [mixed(0.5, sampling=SamplingConfig())[i].image for i in range(20)]
    stream = mixed(0.5, sampling=SamplingConfig())
    backward = [stream[i].image for i in reversed(range(20))][::-1]
    assert np.array_equal(forward, backward)
    assert regions(mixed(0.5, seed=1), 50) != regions(mixed(0.5), 50)


def test_synthetic_patches_are_mirrored_turned_and_stained() -> None:
    stream = mixed(1.0, count=1, sampling=SamplingConfig(stain_jitter=0.1))
    seen = [stream[i] for i in range(64)]
    assert {(p.source.flipped, p.source.quarter_turns) for p in seen} == {(f, q) for f in (0, 1) for q in range(4)}
    assert len({p.image.tobytes() for p in seen}) == 64


def test_a_patch_varied_twice_still_knows_how_it_lies_in_its_region() -> None:
    rng = np.random.default_rng(0)
    original = patch("r")
    for _ in range(40):
        twice = vary(vary(original, SamplingConfig(), rng), SamplingConfig(), rng)
        lies = {"flipped": twice.source.flipped, "quarter_turns": twice.source.quarter_turns}
        assert np.array_equal(twice.instances, turn(original.instances, **lies))
        assert np.array_equal(twice.image, turn(original.image, **lies))


def test_an_amount_is_a_number_of_patches_and_one_out_of_range_is_refused() -> None:
    config = MixingConfig(epoch_patches=300)
    assert [synthetic_count(amount, config) for amount in (0, 0.5, 1, 4)] == [0, 150, 300, 1200]
    for amount in (-0.5, float("nan"), float("inf")):
        with pytest.raises(InputError, match=rf"amount {amount}: expected 0 or more"):
            synthetic_count(amount, config)
    with pytest.raises(InputError, match="less than one of 300 patches"):
        synthetic_count(0.001, config)
    with pytest.raises(InputError, match=r"share 1.5: expected 0"):
        synthetic_share(1.0, 1.5)


def test_all_arms_take_equal_steps_unless_asked_otherwise() -> None:
    assert training_steps(100, 2.0, MixingConfig()) == 100
    assert training_steps(100, 2.0, MixingConfig(steps="per_epoch")) == 300


def schedule(name: str, share: float = 0.5, steps: int = 100, **changes: float) -> ShareSchedule:
    return ShareSchedule(share=share, steps=steps, batch_size=4, config=MixingConfig(schedule=name, **changes))


def test_annealing_falls_linearly_to_nothing_and_shows_as_many_synthetic_patches() -> None:
    shares = np.array([schedule("anneal").of_step(step) for step in range(100)])
    assert shares[0] == 1.0
    assert np.allclose(np.diff(shares), -0.01)
    assert shares.mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("share", [0.2, 0.5, 2 / 3, 0.8, 1.0])
def test_annealing_shows_as_many_synthetic_patches_whatever_the_share(share) -> None:
    falling = schedule("anneal", share, steps=1000)
    assert falling.mean() == pytest.approx(share, abs=0.001)
    assert max(falling.of_step(step) for step in range(1000)) <= 1


def test_the_mean_share_of_pre_training_is_its_share_of_the_steps() -> None:
    assert schedule("pretrain", 0.8, pretrain_share=0.25).mean() == 0.25
    assert schedule("constant", 0.8).mean() == schedule("constant", 0.8).of_step(7) == 0.8


def test_a_stream_follows_its_schedule_step_by_step() -> None:
    stream = MixedPatches(Real(), SYNTHETIC, PLAIN, numbers=range(10), share=schedule("pretrain", steps=10), seed=0)
    assert [stream.is_synthetic(i) for i in range(40)] == [True] * 20 + [False] * 20
    falling = MixedPatches(Real(), SYNTHETIC, PLAIN, numbers=range(10), share=schedule("anneal", steps=1000), seed=0)
    thirds = [np.mean([falling.is_synthetic(i) for i in range(first, first + 1300)]) for first in (0, 1350, 2700)]
    assert thirds == pytest.approx([5 / 6, 1 / 2, 1 / 6], abs=0.05)


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
