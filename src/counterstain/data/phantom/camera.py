"""From stains to the picture: light through the dyes (Beer-Lambert), optics, veil and camera."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from counterstain.data.phantom.artefacts import FOCUS_LOSS_UM, focus_loss
from counterstain.data.phantom.ground import Ground, Stains
from counterstain.data.phantom.noise import white_noise


def photograph(ground: Ground, stains: Stains) -> np.ndarray:
    """Return the picture of stained tissue.

    Dyes absorb as in Ruifrok & Johnston (2001): the optical density (to base 10) of a channel is the sum over dyes of
    amount times the dye's vector.

    Returns
    -------
    (H, W, 3) uint8 array
    """
    style, rng = ground.style, ground.rng("camera")
    dyes = np.array([style.haematoxylin_vector, style.dab_vector], np.float32) * np.float32(-np.log(10))
    counter = stains.haematoxylin * np.float32(style.haematoxylin_strength)
    light = dyes[0, :, None, None] * counter  # (3, H, W), as all below
    light += dyes[1, :, None, None] * stains.dab
    np.exp(light, out=light)
    light *= np.array(style.glass, np.float32)[:, None, None]
    light = _through_optics(ground, light)
    light *= 1 - style.haze
    light += 0.93 * style.haze
    light *= _illumination(ground, rng)
    noise = white_noise(rng, light.shape)
    noise += white_noise(rng, light.shape)
    light += style.noise * np.sqrt(0.5) * (0.4 + 0.6 * light) * noise
    picture = np.minimum(np.maximum(np.rint(light * 255), 0), 255).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(picture, 0, -1))


def _through_optics(ground: Ground, light: np.ndarray) -> np.ndarray:
    blur_px = float(np.hypot(ground.style.blur_um / ground.mpp, 0.35))
    sharp = ndimage.gaussian_filter(light, (0, blur_px, blur_px), truncate=3.0)
    out_of_focus = focus_loss(ground)
    if out_of_focus is None:
        return np.asarray(sharp)
    more_px = FOCUS_LOSS_UM / ground.mpp
    return np.asarray(
        sharp + out_of_focus * (ndimage.gaussian_filter(sharp, (0, more_px, more_px), truncate=2.5) - sharp)
    )


def _illumination(ground: Ground, rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    y, x = (np.linspace(-0.5, 0.5, n, dtype=np.float32) for n in ground.shape)
    slope = np.float32(np.sin(angle)) * y[:, None] + np.float32(np.cos(angle)) * x
    return np.asarray(1 + np.float32(ground.style.illumination) * slope)
