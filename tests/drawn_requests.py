"""Ask generators for many images at once, and generators to ask in tests."""

from types import MappingProxyType

import numpy as np

from counterstain.generators.interface import DrawRequest


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
