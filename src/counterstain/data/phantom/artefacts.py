"""What goes wrong between bench and scanner: smears, folds, precipitate, places out of focus."""

from __future__ import annotations

import numpy as np

from counterstain.data.phantom.ground import Ground, Stains
from counterstain.data.phantom.noise import smoothstep
from counterstain.data.phantom.nuclei import make_nuclei, stamp

RATE_AREA_UM2 = 256.0**2  # rates of SlideStyle are per such area
FOCUS_LOSS_UM = 1.8  # standard deviation of the blur where focus is lost


def draw_artefacts(ground: Ground, stains: Stains) -> None:
    """Draw smears, folds and precipitate upon the stains."""
    _draw_smears(ground, stains)
    _draw_folds(ground, stains)
    _draw_precipitate(ground, stains)


def focus_loss(ground: Ground) -> np.ndarray | None:
    """Return how far out of focus each pixel is, (H, W) float32 of 0..1, or None where all is sharp."""
    places = _places(ground, "defocus", ground.style.defocus, reach_um=60.0)
    if not len(places):
        return None
    return np.asarray(np.max([_spot(ground, centre, radius_um=55.0) for centre in places], axis=0))


def _draw_smears(ground: Ground, stains: Stains) -> None:
    for number, centre in enumerate(_places(ground, "smears", ground.style.smears, reach_um=40.0)):
        rng = ground.rng("smear", number)
        spot = _spot(ground, centre, radius_um=rng.uniform(15, 60))
        streaks = smoothstep(ground.noise("streaks") + 1.5 * spot, 0.2, 2.0)
        stains.dab[...] += rng.uniform(0.08, 0.35) * streaks * spot


def _draw_folds(ground: Ground, stains: Stains) -> None:
    for number, centre in enumerate(_places(ground, "folds", ground.style.folds, reach_um=30.0)):
        rng = ground.rng("fold", number)
        theta, width = rng.uniform(0, np.pi), rng.uniform(5, 12)
        y, x = ground.axes_um(centre)
        across = np.float32(np.cos(theta)) * y - np.float32(np.sin(theta)) * x
        across += 12 * ground.noise("vigour")
        fold = 1 + 0.9 * smoothstep(width - np.abs(across), -1.0, 2.5)
        for stain in (stains.haematoxylin, stains.dab):
            stain[...] = stain * fold + 0.03 * (fold - 1)


def _draw_precipitate(ground: Ground, stains: Stains) -> None:
    for number, centre in enumerate(_places(ground, "precipitate", ground.style.precipitate, reach_um=10.0)):
        rng = ground.rng("grains", number)
        points = centre + rng.normal(0, 14 / ground.mpp, (int(rng.integers(2, 14)), 2))
        grains = make_nuclei(rng, points, radius_um=1.1, spread=0.45, amount=1.2, lumpiness=0.15, rim=0.0)
        coverage, amount = stamp(grains, ground.shape, ground.mpp)
        stains.cover(coverage, haematoxylin=stains.haematoxylin, dab=amount)


def _places(ground: Ground, name: str, rate: float, *, reach_um: float) -> np.ndarray:
    """Draw where artefacts lie, with those whose middle is outside but which reach in, (n, 2) in pixels."""
    rng = ground.rng(name)
    reach = reach_um / ground.mpp
    extent = np.array(ground.shape) + 2 * reach
    expected = rate * float(np.prod(extent)) * ground.mpp**2 / RATE_AREA_UM2
    return np.asarray(rng.uniform(-reach, extent - reach, (int(rng.poisson(expected)), 2)))


def _spot(ground: Ground, centre: np.ndarray, *, radius_um: float) -> np.ndarray:
    y, x = ground.axes_um(centre)
    return smoothstep(radius_um - np.sqrt(y * y + x * x), -0.4 * radius_um, 0.6 * radius_um)
