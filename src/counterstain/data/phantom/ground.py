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

    @property
    def area_um2(self) -> float:
        """Area of the region."""
        return self.labels.size * self.mpp**2

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

    def rng(self, name: str, *keys: int) -> np.random.Generator:
        """Return the generator of one thing that is drawn; it does not depend on labels."""
        return numpy_generator(self.seed, name, *keys)

    @cached_property
    def grain(self) -> np.ndarray:
        """Noise of the finest structures, chromatin and granules, (H, W) float32."""
        return self.noise("grain", 1.5)

    def noise(self, name: str, scale_um: float) -> np.ndarray:
        """Return smooth noise of mean 0 and spread about 1, (H, W) float32."""
        return smooth_noise(self.rng(name), self.shape, scale_um / self.mpp)

    def scatter(self, name: str, spacing_um: float, *, jitter: float, margin_um: float) -> np.ndarray:
        """Return points of a shaken lattice, (n, 2) rows and columns in pixels."""
        margin_px = margin_um / self.mpp
        return scatter(self.rng(name), self.shape, spacing_um / self.mpp, jitter=jitter, margin_px=margin_px)

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
