"""Nuclei: many ellipses with a lumpy outline and a darker rim, stamped at once.

Shapes: n = nuclei, k = pixels of the window that the largest of them needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Nuclei:
    """Nuclei of one kind."""

    points: np.ndarray  # (n, 2) rows and columns in pixels
    radius_um: np.ndarray  # (n,), of a circle of the same area
    stretch: np.ndarray  # (n,), long axis over short axis
    angle: np.ndarray  # (n,), of the long axis, 0 = along a row
    amount: np.ndarray  # (n,), haematoxylin in optical density
    lumps: np.ndarray  # (n, 2), amplitudes of the outline's waves
    rim: float = 0.3
    """How much darker the rim is than the middle."""

    def chosen(self, keep: np.ndarray) -> Nuclei:
        """Return the nuclei that a mask or an index picks."""
        arrays = {name: getattr(self, name)[keep] for name in ("points", "radius_um", "stretch", "angle", "amount")}
        return Nuclei(**arrays, lumps=self.lumps[keep], rim=self.rim)


def make_nuclei(
    rng: np.random.Generator,
    points: np.ndarray,
    *,
    radius_um: float,
    spread: float,
    amount: float,
    stretch: tuple[float, float] = (1.0, 1.5),
    angle: np.ndarray | None = None,
    lumpiness: float = 0.06,
    rim: float = 0.3,
) -> Nuclei:
    """Draw nuclei about a typical size; ``spread`` is that of the logarithm of the radius."""
    n = len(points)
    return Nuclei(
        points=points,
        radius_um=radius_um * np.exp(spread * np.clip(rng.standard_normal(n), -2, 2)),
        stretch=rng.uniform(*stretch, n),
        angle=rng.uniform(0, np.pi, n) if angle is None else angle + rng.normal(0, 0.15, n),
        amount=amount * np.exp(rng.normal(0, 0.18, n)),
        lumps=rng.normal(0, lumpiness, (n, 2)),
        rim=rim,
    )


def stamp(nuclei: Nuclei, shape: tuple[int, int], mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw nuclei; where two overlap the stronger shows.

    Returns
    -------
    coverage : (H, W) float32 array
        0 outside, 1 inside.
    amount : (H, W) float32 array
        Haematoxylin in optical density.
    """
    coverage, amount = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    if not len(nuclei.points):
        return coverage, amount
    reach = int(np.ceil(float((nuclei.radius_um * np.sqrt(nuclei.stretch)).max()) * 1.15 / mpp)) + 1
    window = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)  # (2, k)
    nearest = np.rint(nuclei.points).astype(np.int32)
    y, x = (nearest[:, i, None] + window[i].astype(np.int32) for i in (0, 1))  # (n, k)
    rho = _radii(nuclei, y, x, mpp)
    softness = np.maximum(mpp, 0.7) / nuclei.radius_um[:, None].astype(np.float32)
    inside = np.clip((1 - rho) / softness + 0.5, 0, 1)
    shade = 1 - nuclei.rim / 2 + nuclei.rim * np.exp(-(((rho - 0.85) / 0.2) ** 2))
    hit = (inside > 0) & (y >= 0) & (x >= 0) & (y < shape[0]) & (x < shape[1])
    flat = (y * shape[1] + x)[hit]
    np.maximum.at(coverage.reshape(-1), flat, inside[hit])
    np.maximum.at(amount.reshape(-1), flat, (inside * shade * nuclei.amount[:, None].astype(np.float32))[hit])
    return coverage, amount


def _radii(nuclei: Nuclei, y: np.ndarray, x: np.ndarray, mpp: float) -> np.ndarray:
    """Return the distance of window pixels to the middle in units of the radius there, (n, k) float32."""
    points = nuclei.points.astype(np.float32)
    dy, dx = ((of_pixel - points[:, i, None]) * np.float32(mpp) for i, of_pixel in enumerate((y, x)))
    cos, sin = (f(nuclei.angle)[:, None].astype(np.float32) for f in (np.cos, np.sin))
    axis = np.sqrt(nuclei.stretch)[:, None].astype(np.float32)
    u, v = (cos * dx + sin * dy) / axis, (cos * dy - sin * dx) * axis
    square = u * u + v * v + np.float32(1e-6)
    r = np.sqrt(square)
    lumps, radius = nuclei.lumps.astype(np.float32), nuclei.radius_um[:, None].astype(np.float32)
    waves = ((3 * u * u - v * v) * v / r * lumps[:, :1] + 2 * u * v * lumps[:, 1:]) / square
    return np.asarray(r / radius * (1 + waves))
