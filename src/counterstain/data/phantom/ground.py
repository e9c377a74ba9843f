"""What the tissue of one region is drawn on: the mask, distances to its outlines, seeded noise, and the two stains.

Shapes: H, W = rows and columns of the region in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import ndimage

from counterstain.data.phantom.noise import scatter, smooth_noise
from counterstain.data.phantom.styles import SlideStyle
from counterstain.seeding import numpy_generator

# Fields of smooth noise by their scale; those of one scale are drawn at once.
SCALES_UM = {
    50.0: ("long waves", "oedema", "staining", "aggregates", "vigour", "necrosis"),
    18.0: ("short waves", "slack", "clefts"),
    9.0: ("lumen outline", "streaks"),
    5.5: ("wobble y", "wobble x", "fragments"),
    1.5: ("grain",),
}
_SCALE_OF = {name: scale for scale, names in SCALES_UM.items() for name in names}

FAR_UM = 500.0  # distance where there is nothing to be distant from


@dataclass(frozen=True, kw_only=True)
class Ground:
    """The mask of a region, its scale, its style and its seed."""

    labels: np.ndarray  # (H, W) uint8, 0 = background, 1..4 = HER2 0..3+, 5 = LCIS/DCIS
    instances: np.ndarray  # (H, W) integer
    style: SlideStyle
    seed: int
    mpp: float

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.labels.shape[0], self.labels.shape[1]

    @cached_property
    def depth_um(self) -> np.ndarray:
        """Distance of a pixel of a nest to its outline; the edges of the region are no outline. (H, W) float32."""
        inner = self.labels != 0
        ids = self.instances
        inner[1:] &= ids[1:] == ids[:-1]
        inner[:, 1:] &= ids[:, 1:] == ids[:, :-1]
        return self._distance_um(inner)

    @cached_property
    def outside_um(self) -> np.ndarray:
        """Distance of a pixel of the background to the nearest nest, (H, W) float32."""
        return self._distance_um(self.labels == 0)

    def axes_um(self, origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return rows (H, 1) and columns (1, W) as distances from an origin in pixels, float32."""
        y, x = ((np.arange(n) - zero) * self.mpp for n, zero in zip(self.shape, origin, strict=True))
        return y.astype(np.float32)[:, None], x.astype(np.float32)[None]

    def rng(self, name: str, *keys: int) -> np.random.Generator:
        """Return the generator of one thing that is drawn; it does not depend on labels."""
        return numpy_generator(self.seed, name, *keys)

    def noise(self, name: str) -> np.ndarray:
        """Return one of the fields of ``SCALES_UM``, mean 0 and spread about 1, (H, W) float32."""
        scale_um = _SCALE_OF[name]
        names = SCALES_UM[scale_um]
        if scale_um not in self._fields:
            rng = self.rng(names[0])
            self._fields[scale_um] = smooth_noise(rng, self.shape, scale_um / self.mpp, count=len(names))
        return np.asarray(self._fields[scale_um][names.index(name)])

    def scatter(self, rng: np.random.Generator, spacing_um: float, *, jitter: float, margin_um: float) -> np.ndarray:
        """Return points of a shaken lattice, (n, 2) rows and columns in pixels."""
        margin_px = margin_um / self.mpp
        return scatter(rng, self.shape, spacing_um / self.mpp, jitter=jitter, margin_px=margin_px)

    @cached_property
    def _fields(self) -> dict[float, np.ndarray]:
        return {}

    def _distance_um(self, inside: np.ndarray) -> np.ndarray:
        if inside.all():
            return np.full(self.shape, FAR_UM, np.float32)
        distance_um = ndimage.distance_transform_edt(inside).astype(np.float32) * np.float32(self.mpp)
        return np.asarray(np.minimum(distance_um, FAR_UM))


@dataclass(frozen=True)
class Stains:
    """Amounts of the two stains in optical density, drawn upon in place."""

    haematoxylin: np.ndarray  # (H, W) float32
    dab: np.ndarray  # (H, W) float32

    def cover(self, coverage: np.ndarray, *, haematoxylin: np.ndarray | float, dab: np.ndarray | float) -> None:
        """Lay something over what is there; ``coverage`` 1 hides it, 0 leaves it."""
        self.haematoxylin[...] += coverage * (haematoxylin - self.haematoxylin)
        self.dab[...] += coverage * (dab - self.dab)
