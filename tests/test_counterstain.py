import numpy as np
import pytest
import torch
from drawn_requests import drawn_by
from scipy import ndimage

from counterstain.data.phantom import render
from counterstain.data.phantom.styles import PhantomConfig, slide_style
from counterstain.data.stains import STAIN_VECTORS
from counterstain.generators.autoencoder import Autoencoder
from counterstain.generators.conditioning import counterstain_map, nuclei_shown
from counterstain.generators.diffusion import Diffusion
from counterstain.generators.diffusion_config import (
    AutoencoderConfig,
    CounterstainConfig,
    DiffusionConfig,
    InpaintingConfig,
    NoiseConfig,
    SamplerConfig,
)
from counterstain.generators.drawing import DiffusionGenerator
from counterstain.generators.pipeline import nuclei_channels
from counterstain.training import fit
from counterstain.training_config import TrainingConfig

SAMPLER = SamplerConfig(steps=3, guidance=2.0, compute_batch=2)
SHOWN = CounterstainConfig(local_px=4)
CONTRAST = CounterstainConfig(shows="contrast", local_px=4)
ONE = TrainingConfig(steps=1, batch_size=2)


def linear(channels, factor):
    return AutoencoderConfig(
        training=ONE, kind="linear", latent_channels=channels, factor=factor, lpips_weight=0, adversarial_weight=0
    )


def discs(step, size=16):
    """Discs with three nuclei each; label 1 is unstained, 2 is brown."""
    rng = np.random.default_rng((0, step))
    y, x = np.mgrid[:16, :16]
    label = rng.integers(1, 3, (size, 1, 1))
    inside = np.broadcast_to((y - 8) ** 2 + (x - 8) ** 2 < 49, (size, 16, 16))
    centres = rng.integers(4, 12, (size, 3, 2, 1, 1))
    nuclei = (((centres - np.stack([y, x])) ** 2).sum(2) <= 2).any(1)
    density = 0.7 * nuclei[..., None] * np.array(STAIN_VECTORS["haematoxylin"])
    density = density + (0.5 * (label == 2) * inside)[..., None] * np.array(STAIN_VECTORS["dab"]) + 0.05
    return {
        "images": torch.from_numpy(np.rint(255 * np.exp(-density)).astype(np.uint8)),
        "labels": torch.from_numpy((label * inside).astype(np.uint8)),
        "nuclei": torch.from_numpy(nuclei),
    }


def first_stage():
    settings = {"channels": 8, "blocks": 1, "attention": False, "latent_channels": 4, "kind": "kl", "factor": 2}
    return Autoencoder(AutoencoderConfig(training=ONE, lpips_weight=0, adversarial_weight=0, **settings), 16).eval()


def tiny(**changes):
    settings = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "heads": 2, "counterstain": SHOWN}
    return DiffusionConfig(**{"training": ONE} | settings | changes)


def nest(label, style, seed=3):
    """One phantom nest of a label, (48, 48, 3), and its mask."""
    y, x = np.mgrid[:48, :48]
    instances = ((y - 24) ** 2 + (x - 24) ** 2 < 18**2).astype(np.int32)
    image = render((label * instances).astype(np.uint8), instances, style, seed, mpp=2.0)
    return torch.from_numpy(image)[None], instances > 0


def smooth(spots):
    """A Gaussian mean over the pixels of the image alone."""
    weights = ndimage.gaussian_filter(spots * 0 + 1, 4, mode="constant")
    return ndimage.gaussian_filter(spots, 4, mode="constant") / weights


def alike(one, other):
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Diffusion(tiny(), first_stage(), 6)


def inputs(n=4, size=16):
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 6, (n, 4, 4), dtype=np.uint8).repeat(size // 4, 1).repeat(size // 4, 2)
    return masks, rng.integers(0, 255, (n, size, size, 3), dtype=np.uint8), masks > 2


def maps_of_scores(slide, config):
    """The maps inside one nest of a slide, by the score that it is rendered in."""
    style = slide_style(PhantomConfig(slides=8, pleomorphism=0.8), slide)
    nests = {label: nest(label, style) for label in (1, 2, 3, 4)}
    return {label: counterstain_map(image, config)[0, 0].numpy()[inside] for label, (image, inside) in nests.items()}


@pytest.mark.parametrize("slide", range(4))
def test_the_map_of_a_nest_is_nearly_the_same_whatever_its_subtype(slide):
    maps = maps_of_scores(slide, SHOWN)
    assert min(alike(maps[1], maps[label]) for label in (2, 3)) > 0.9
    assert alike(maps[1], maps[4]) > 0.75
    maps = maps_of_scores(slide, CONTRAST)
    for label in (2, 3, 4):
        assert maps[label].std() == pytest.approx(maps[1].std(), rel=0.2)
        assert alike(maps[1], maps[label]) > 0.8


def test_the_contrast_is_in_optical_density():
    def spread(amount):
        spots = ndimage.gaussian_filter(np.eye(32), 1.0) * amount
        blue = np.array(STAIN_VECTORS["haematoxylin"])
        density = np.multiply.outer(spots, blue / np.linalg.norm(blue))
        image = torch.from_numpy(np.rint(255 * np.exp(-density)).astype(np.uint8))
        return float(1.5 * counterstain_map(image[None], CONTRAST).std() / (spots - smooth(spots)).std())

    assert [spread(0.5), spread(1.5)] == pytest.approx([1, 1], abs=0.03)


@pytest.mark.parametrize("other", ["dab", "eosin"])
def test_the_map_shows_nuclei_and_no_other_stain_and_not_how_strong_it_is(other):
    config = CounterstainConfig(other_stain=other, local_px=4)
    nuclei, strands = np.zeros((2, 32, 32))
    nuclei[4:28:8, 4:28:8] = 1
    strands[8:24, 8:24:6] = 1
    nuclei, strands = (ndimage.gaussian_filter(spots, 1.2) * 8 for spots in (nuclei, strands))

    def shown(blue, further):
        density = np.multiply.outer(blue * nuclei, STAIN_VECTORS["haematoxylin"])
        density += np.multiply.outer(further * strands, STAIN_VECTORS[other])
        image = torch.from_numpy(np.rint(255 * np.exp(-density)).astype(np.uint8))
        return counterstain_map(image[None], config)[0, 0].numpy()

    assert alike(shown(0.8, 0.0), nuclei) > 0.9
    assert alike(shown(0.8, 0.0), shown(0.4, 0.0)) > 0.99
    assert alike(shown(0.8, 0.0), shown(0.8, 0.6)) > 0.93
    assert np.abs(shown(0.0, 0.0)).max() < 1e-5
    assert np.abs(shown(0.8, 0.6)).max() <= 1


def test_membranes_that_hide_nuclei_are_filled_in_from_around():
    rng = np.random.default_rng(0)
    nuclei = ndimage.gaussian_filter((rng.random((64, 64)) > 0.99).astype(float), 2.5) * 30
    membranes = np.zeros((64, 64))
    membranes[8:56:12, 8:56] = membranes[8:56, 8:56:12] = 2.0
    brown = STAIN_VECTORS["dab"] + 0.3 * np.array(STAIN_VECTORS["haematoxylin"])  # darker than what is unmixed

    def shown(hidden, amount):
        density = np.multiply.outer(0.2 * nuclei, STAIN_VECTORS["haematoxylin"])
        density += np.multiply.outer(amount * membranes, brown)
        image = torch.from_numpy(np.rint(255 * np.exp(-density)).astype(np.uint8))
        return counterstain_map(image[None], CONTRAST.model_copy(update={"hidden": hidden}))[0, 0].numpy()

    for hidden in ("scaled", "filled"):
        assert alike(shown(hidden, 0), nuclei) > 0.9
    assert alike(shown("scaled", 1), shown("scaled", 0)) < 0.7
    assert alike(shown("filled", 1), shown("filled", 0)) > 0.95


def test_surroundings_are_as_wide_at_every_scale_unless_told():
    assert [CounterstainConfig().at(mpp).local_px for mpp in (0.25, 0.5, 2.0)] == [32.0, 16.0, 4.0]
    assert SHOWN.at(0.25).local_px == 4
    assert tiny().at(0.25).counterstain == SHOWN
    assert DiffusionConfig(training=ONE).at(0.25).counterstain is None


def test_the_border_of_an_image_looks_as_it_does_in_a_larger_one():
    image, _ = nest(3, slide_style(PhantomConfig(slides=2), 0))
    whole = counterstain_map(image, SHOWN)[0, 0, :32, :32].numpy()
    assert alike(whole, counterstain_map(image[:, :32, :32], SHOWN)[0, 0].numpy()) > 0.97


def test_maps_come_to_the_latents_without_loss():
    images = torch.randint(0, 256, (2, 6, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    config = CounterstainConfig(local_px=1)
    shown = nuclei_shown(images, config, 2, images)
    assert shown.shape == (2, nuclei_channels(2), 3, 2)
    assert torch.equal(torch.nn.functional.pixel_shuffle(shown[:, :4], 2), counterstain_map(images, config))
    assert (shown[:, 4] == 1).all()
    absent = nuclei_shown(None, config, 2, shown)
    assert absent.shape == shown.shape
    assert not absent.any()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network that learnt discs whose label says how brown they are, and whose nuclei lie anywhere."""
    stage = Autoencoder(linear(12, factor=2), 16).eval()
    stage.fit_components(discs(step)["images"] for step in range(5))
    training = TrainingConfig(steps=250, batch_size=16, accelerator="cpu", precision="32")
    config = tiny(
        training=training, lr=3e-3, noise=NoiseConfig(prediction="sample"), ema_decay=None, channels=16,
        lr_schedule="cosine", normalise_latents="none",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Diffusion(config, stage, 3)
    model.latent_sd.fill_(torch.cat([model.encode(discs(step)["images"]) for step in range(5)]).std())
    fit(model, discs, tmp_path_factory.mktemp("trained"), training)
    return model


@pytest.mark.parametrize("method", ["diffusion", "inpainting"])
def test_a_relabelled_disc_gets_the_stain_of_its_label_and_keeps_its_nuclei(trained, method):
    real = discs(1000)
    redraw = real["labels"].numpy() > 0
    drawer = DiffusionGenerator(trained, method, sampler=SamplerConfig(steps=10), device=torch.device("cpu"))

    def drawn(label):
        return drawn_by(drawer, (label * redraw).astype(np.uint8), range(16), real["images"].numpy(), redraw)

    pale, brown = drawn(1), drawn(2)
    inside = np.broadcast_to(redraw, (16, 16, 16))
    blueness = [image[..., 2].astype(float) - image[..., 0] for image in (pale, brown)]
    assert (blueness[0] - blueness[1])[inside].mean() > 40
    places = real["nuclei"].numpy()
    for image in (pale, brown):
        red = image[..., 0].astype(float)
        assert np.mean([red[i][~places[i] & inside[i]].mean() - red[i][places[i]].mean() for i in range(16)]) > 15


def test_masks_alone_are_drawn_without_nuclei_to_follow(model):
    masks, _, _ = inputs()
    drawn = drawn_by(DiffusionGenerator(model, "diffusion", sampler=SAMPLER), masks, range(4))
    assert drawn.shape == (4, 16, 16, 3)


def test_larger_images_are_drawn_in_windows_that_see_their_part_of_the_nuclei(model):
    masks, images, redraw = inputs(1, 40)
    windows = DiffusionGenerator(model, "inpainting", sampler=SAMPLER, trained_px=16)
    windows.draw_with(SAMPLER, InpaintingConfig(), windows.windows.model_copy(update={"window_px": 32}))
    drawn = drawn_by(windows, masks, [0], images, redraw)
    assert drawn.shape == (1, 40, 40, 3)
    assert np.array_equal(drawn[~redraw], images[~redraw])
