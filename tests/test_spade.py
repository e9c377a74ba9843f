import numpy as np
import pytest
import torch
from drawn_requests import drawn_by

from counterstain.errors import ConfigError, InputError, StorageError
from counterstain.generators.conditioning import counterstain_map, edges
from counterstain.generators.diffusion_config import CounterstainConfig
from counterstain.generators.networks import VggDistance
from counterstain.generators.pipeline import one_hot
from counterstain.generators.spade import Spade, SpadeGenerator
from counterstain.generators.spade_config import SpadeConfig
from counterstain.training_config import TrainingConfig

ONE = TrainingConfig(steps=1, batch_size=2)


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def tiny(**changes):
    settings = {"generator_width": 4, "discriminator_width": 4, "hidden": 8, "latent": 8, "vgg_weight": 0.0}
    return SpadeConfig(training=ONE, **settings | changes)


def batch():
    rng = np.random.default_rng(0)
    return {
        "images": torch.from_numpy(rng.integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)),
        "labels": torch.from_numpy(rng.integers(0, 6, (2, 32, 32), dtype=np.uint8)),
        "instances": torch.from_numpy(rng.integers(0, 3, (2, 32, 32), dtype=np.int32)),
        "step": torch.tensor(0),
        "position": torch.arange(2),
    }


def test_edges_lie_on_both_sides_of_a_border():
    instances = torch.zeros(1, 4, 4, dtype=torch.int32)
    instances[:, :, 2:] = 1
    assert edges(instances)[0, 0].tolist() == [[0, 1, 1, 0]] * 4


def test_ignored_pixels_are_shown_as_background():
    assert one_hot(torch.tensor([[[255, 1]]], dtype=torch.uint8), 3)[0, :, 0].T.tolist() == [[1, 0, 0], [0, 1, 0]]


def test_losses_are_finite_and_reach_every_part_of_generator_and_encoder():
    model = Spade(tiny(), 6, 32)
    data = batch()
    real = torch.rand(2, 3, 32, 32) * 2 - 1
    losses = model.generator_losses(real, model.condition(data["labels"], data["instances"]), data)
    assert set(losses) == {"gan", "features", "kl"}
    torch.stack(list(losses.values())).sum().backward()
    trained = [*model.generator.parameters(), *model.encoder.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_the_perceptual_term_needs_weights_or_says_how_to_do_without(monkeypatch):
    def unreachable(**_):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models.vgg19", unreachable)
    with pytest.raises(
        InputError, match=r"VGG19 cannot be fetched; give spade.vgg_weights=FILE, .* spade.vgg_weight=0"
    ):
        VggDistance("imagenet")


def test_vgg_weights_are_read_from_a_local_file(tmp_path):
    from torchvision.models import vgg19

    torch.save(vgg19().state_dict(), tmp_path / "vgg.pth")
    distance = VggDistance(str(tmp_path / "vgg.pth"))
    images = torch.rand(1, 3, 32, 32)
    assert distance(images, images) == 0
    assert distance(images, -images) > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no weights", "not a file of weights, or damaged"),
        ({"a": torch.zeros(1)}, "not the weights of VGG as torchvision"),
        ({"a": torch.tensor([0.0, torch.nan])}, "1 of 2 values of a are NaN"),
    ],
)
def test_a_file_without_vggs_weights_is_one_line(tmp_path, content, message):
    if isinstance(content, bytes):
        (tmp_path / "vgg.pth").write_bytes(content)
    else:
        torch.save(content, tmp_path / "vgg.pth")
    with pytest.raises((InputError, StorageError), match=message):
        VggDistance(str(tmp_path / "vgg.pth"))


def test_a_size_that_spade_cannot_draw_is_refused():
    with pytest.raises(ConfigError, match="size_px 48: SPADE draws patches whose edge is a multiple of 32"):
        Spade(tiny(), 6, 48)


def test_pixel_noise_changes_places_within_an_image_and_follows_the_seed():
    torch.manual_seed(0)
    generator = SpadeGenerator(Spade(tiny(noise_channels=4), 6, 32), torch.device("cpu"))
    flat, styles = np.ones((1, 32, 32), np.uint8), np.zeros((1, 8), np.float32)
    drawn = [drawn_by(generator, flat, [seed], styles=styles) for seed in (1, 1, 2)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_the_discriminator_does_not_see_pixel_noise():
    plain, noisy = (Spade(tiny(noise_channels=n), 6, 32) for n in (0, 4))
    assert parameters(plain.discriminator) == parameters(noisy.discriminator)
    assert parameters(plain.generator) < parameters(noisy.generator)


def test_generator_and_discriminator_are_shown_the_nuclei_where_asked():
    model = Spade(tiny(counterstain=CounterstainConfig(local_px=4)), 6, 32)
    given = batch()
    plain = model.condition(given["labels"], given["instances"])
    shown = model.condition(given["labels"], given["instances"], given["images"])
    assert plain.shape == shown.shape == (2, 6 + 1 + 2, 32, 32)
    assert torch.equal(plain[:, :7], shown[:, :7])
    assert not plain[:, 7:].any()
    assert torch.equal(shown[:, 7:8], counterstain_map(given["images"], model.config.counterstain))
    assert (shown[:, 8] == 1).all()


def test_some_training_samples_are_shown_no_nuclei():
    model = Spade(tiny(counterstain=CounterstainConfig(local_px=4, dropout=0.5)), 6, 32)
    shown = [model.training_condition(batch() | {"step": torch.tensor(step)})[:, 8, 0, 0] for step in range(40)]
    assert torch.stack(shown).mean().item() == pytest.approx(0.5, abs=0.2)
    assert torch.equal(shown[3], model.training_condition(batch() | {"step": torch.tensor(3)})[:, 8, 0, 0])


def test_images_follow_the_nuclei_of_real_ones_where_asked_and_not_otherwise():
    images = batch()["images"].numpy()
    masks = batch()["labels"].numpy()
    for shown, follows in ((CounterstainConfig(local_px=4), True), (None, False)):
        generator = SpadeGenerator(Spade(tiny(counterstain=shown), 6, 32), torch.device("cpu"))
        drawn = drawn_by(generator, masks, [0, 1], images)
        assert np.array_equal(drawn, drawn_by(generator, masks, [0, 1], images[::-1])) is not follows
        assert ("counterstain" in generator.settings) is follows
