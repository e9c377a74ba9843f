"""Ask generators for many images at once, and small generators to ask in tests."""

from types import MappingProxyType

import numpy as np

from counterstain.generators.diffusion_config import AutoencoderConfig, DiffusionConfig
from counterstain.generators.interface import DrawRequest
from counterstain.training_config import TrainingConfig

ONE = TrainingConfig(steps=1, batch_size=2)


def first_stage_config(**changes):
    """A small first stage without perceptual and adversarial loss."""
    settings = {"training": ONE, "channels": 8, "blocks": 1, "attention": False, "latent_channels": 4}
    return AutoencoderConfig(**settings | {"lpips_weight": 0, "adversarial_weight": 0} | changes)


def denoiser_config(**changes):
    """A small denoiser."""
    return DiffusionConfig(**{"training": ONE, "channels": 8, "multipliers": (1, 2), "blocks": 1, "heads": 2} | changes)


def random_masks(n, height, width):
    """Masks of 4 x 4 blocks of labels, random images, and which pixels to redraw: labels above 2."""
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 6, (n, height // 4, width // 4), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    return masks, rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8), masks > 2


def requests(masks, seeds, images=None, redraw=None, *, instances=None, slides=None, styles=None):
    parts = {"image": images, "redraw": redraw, "instances": instances, "slide": slides, "style": styles}
    return [
        DrawRequest(mask=mask, seed=seed, **{name: part[i] for name, part in parts.items() if part is not None})
        for i, (mask, seed) in enumerate(zip(masks, seeds, strict=True))
    ]


def drawn_by(generator, *arrays, **more):
    """Draw one image for each mask, (n, H, W, 3)."""
    return np.stack(generator.draw(requests(*arrays, **more)))


class FakeGenerator:
    """Draws by its ``paint``, from arrays of masks, seeds, images and what is redrawn."""

    method = "spade"
    header = None
    settings = MappingProxyType({})

    def draw(self, asked):
        parts = ([getattr(one, name) for one in asked] for name in ("mask", "seed", "image", "redraw"))
        masks, seeds, images, redraw = parts
        return list(self.paint(np.stack(masks), seeds, np.stack(images), np.stack(redraw)))
