"""Stroma: wavy fibres that flow around nests, spindle cells between them, lymphocytes and their aggregates."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from counterstain.data.phantom.ground import Ground, Stains
from counterstain.data.phantom.noise import level_angle, lookup, smoothstep
from counterstain.data.phantom.nuclei import Nuclei, make_nuclei, stamp

LYMPHOCYTE_RADIUS_UM = 2.9
FIBRE_TABLE = (64, 48)  # random values across and along fibres; wraps around


def draw_fibres(ground: Ground) -> tuple[Stains, np.ndarray]:
    """Draw the fibres that everything else lies on.

    Returns
    -------
    stains : Stains
    across_um : (H, W) float32 array
        Coordinate across the fibres, whose gradient gives spindle cells their direction.
    """
    style = ground.style
    rng = ground.rng("fibres")
    theta = rng.uniform(0, np.pi)
    y, x = np.ogrid[: ground.shape[0], : ground.shape[1]]
    along = (np.cos(theta) * x + np.sin(theta) * y) * ground.mpp
    across = (np.cos(theta) * y - np.sin(theta) * x) * ground.mpp
    across = across + style.fibre_wave_um * ground.noise("long waves", 70.0) + 2.0 * ground.noise("short waves", 16.0)
    across -= 22.0 * np.exp(-ground.outside_um / 14.0)  # fibres run along the outlines of nests
    fine = _fibre_texture(rng, across / 2.4, along / 34.0)
    bundles = _fibre_texture(rng, across / 8.0, along / 60.0)
    density = smoothstep(0.55 * bundles + 0.35 * fine + 0.5 * ground.noise("oedema", 45.0), -1.3, 0.9)
    grain = 1 + 0.12 * ground.noise("grain", 1.5)
    haematoxylin = style.stroma_density * (0.02 + 0.125 * density + 0.035 * fine * density) * grain
    dab = (style.dab_background + style.edge_staining * smoothstep(ground.noise("staining", 50.0), 0.2, 2.0)) * (
        0.35 + 0.65 * density
    )
    stains = Stains(
        np.clip(haematoxylin, 0, None).astype(np.float32), np.clip(dab + 0.012 * density, 0, None).astype(np.float32)
    )
    return stains, across.astype(np.float32)


def draw_stroma_cells(ground: Ground, stains: Stains, across_um: np.ndarray, free: np.ndarray) -> None:
    """Draw spindle cells and lymphocytes where ``free``, an (H, W) boolean array, leaves room for them."""
    for nuclei in (_fibroblasts(ground, across_um), _lymphocytes(ground)):
        seen = nuclei.chosen(lookup(free, nuclei.points))
        coverage, amount = stamp(seen, ground.shape, ground.mpp)
        texture = 1 + 0.12 * ground.noise("stroma chromatin", 1.2)
        stains.cover(
            coverage, haematoxylin=np.maximum(amount * texture, stains.haematoxylin), dab=stains.dab * np.float32(0.7)
        )


def _fibre_texture(rng: np.random.Generator, across: np.ndarray, along: np.ndarray) -> np.ndarray:
    table = rng.standard_normal(FIBRE_TABLE, dtype=np.float32)
    where = np.stack([across, along + 0.15 * across])
    return np.asarray(ndimage.map_coordinates(table, where, order=1, mode="grid-wrap", prefilter=False)) * 1.4


def _fibroblasts(ground: Ground, across_um: np.ndarray) -> Nuclei:
    points = ground.scatter("fibroblasts", 17.0, jitter=0.45, margin_um=6.0)
    rng = ground.rng("fibroblast nuclei")
    points = points[rng.random(len(points)) < 0.55 * ground.style.fibroblasts]
    return make_nuclei(
        rng,
        points,
        radius_um=2.5,
        spread=0.2,
        amount=0.42,
        stretch=(2.2, 6.0),
        angle=level_angle(across_um, points),
        lumpiness=0.04,
    )


def _lymphocytes(ground: Ground) -> Nuclei:
    points = ground.scatter("lymphocytes", 7.0, jitter=0.4, margin_um=4.0)
    rng = ground.rng("lymphocyte nuclei")
    crowd = lookup(ground.noise("aggregates", 55.0), points)
    near_nests = np.exp(-lookup(ground.outside_um, points) / 20.0)
    density = ground.style.lymphocytes * (0.035 + 0.05 * near_nests + 0.9 * smoothstep(crowd, 1.1, 2.1))
    points = points[rng.random(len(points)) < density]
    return make_nuclei(
        rng,
        points,
        radius_um=LYMPHOCYTE_RADIUS_UM,
        spread=0.1,
        amount=0.72,
        stretch=(1.0, 1.25),
        lumpiness=0.03,
        rim=0.12,
    )
