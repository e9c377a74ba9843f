"""Drawing many images at once from arrays, and generators that tests make up."""

import numpy as np

from counterstain.generators.interface import DrawRequest


def draw_all(generator, masks, seeds, images=None, redraw=None, *, instances=None, slides=None, styles=None):
    """Return (n, H, W, 3) uint8 for masks (n, H, W)."""
    fields = {"image": images, "redraw": redraw, "instances": instances, "slide": slides, "style": styles}
    requests = [
        DrawRequest(mask=mask, seed=seed, **{name: values[i] for name, values in fields.items() if values is not None})
        for i, (mask, seed) in enumerate(zip(masks, seeds, strict=True))
    ]
    return np.stack(generator.draw(requests))


class Painter:
    """A generator of a test: ``paint(masks, seeds, images, redraw)`` draws all images of a call, (n, H, W, 3) uint8."""

    method, header, settings = "diffusion", None, {}

    def draw(self, requests):
        fields = [[getattr(r, name) for r in requests] for name in ("mask", "seed", "image", "redraw")]
        arrays = [np.stack(values) if values[0] is not None else None for values in fields]
        return list(self.paint(arrays[0], fields[1], arrays[2], arrays[3]))
