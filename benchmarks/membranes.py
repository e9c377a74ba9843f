"""How far DAB lies in lines around cells rather than in blotches: the anisotropy of the DAB map.

    python membranes.py IMAGE.png [IMAGE.png ...] --mpp 0.5

Elongated second-derivative filters look for lines in eight directions. In a line one direction answers and the others
do not; in a blotch all answer alike. ``lines`` is the energy of the best direction over the mean energy of all. A map
of the same spectrum with random phases has no lines: ``null``. The difference is ``membranous``: 0 in blotches. The
darkest and palest DAB is clipped before, so that a few dark spots do not decide.

Shapes: H, W = rows and columns in pixels, K = directions. All widths are in micrometres.
"""

from __future__ import annotations

import argparse
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

Floats = NDArray[np.float64]
STAINS = np.array([(0.65, 0.70, 0.29), (0.27, 0.57, 0.78)])  # haematoxylin, DAB (Ruifrok & Johnston 2001)
WIDTH_UM, LENGTH_UM = 1.0, 4.0  # standard deviations across and along a filter; a membrane is 2 to 3 um wide
SMOOTH_UM = 0.5  # noise of single pixels is no line
DIRECTIONS = 8
CLIP = (0.05, 0.9)  # quantiles inside the mask
FINE_UM = 3.0  # what is finer than this is texture
BORDER_UM = 3.0  # not looked at: the filters see no surroundings there
LEAST_UM2 = 200.0
SCRAMBLES = 3


def stain_maps(image: NDArray[np.uint8]) -> tuple[Floats, Floats]:
    """Return haematoxylin and DAB, (H, W) each, in natural optical density."""
    pure = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
    residual = np.cross(*pure)
    unmixing = np.linalg.inv(np.stack([*pure, residual / np.linalg.norm(residual)]))
    amounts = -np.log(np.maximum(image, 1) / 255.0) @ unmixing
    return amounts[..., 0], amounts[..., 1]


@lru_cache
def line_filters(mpp: float) -> Floats:
    """Return filters that answer to dark lines, (K, h, w), each with sum 0."""
    reach = round(3 * LENGTH_UM / mpp)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1] * mpp
    filters = []
    for angle in np.pi * np.arange(DIRECTIONS) / DIRECTIONS:
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        bell = np.exp(-(along**2) / (2 * LENGTH_UM**2) - across**2 / (2 * WIDTH_UM**2))
        profile = (1 - across**2 / WIDTH_UM**2) * bell
        filters.append((profile - profile.mean()) / bell.sum())
    return np.stack(filters)


@lru_cache
def _spectra(mpp: float, height: int, width: int) -> NDArray[np.complex128]:
    return np.asarray(fft.rfft2(line_filters(mpp), (height, width)))


def responses(dab: Floats, mpp: float) -> Floats:
    """Return what the filters answer, (K, H, W)."""
    reach = line_filters(mpp).shape[1] // 2
    padded = np.pad(dab, reach, mode="reflect")
    height, width = (fft.next_fast_len(n, real=True) for n in padded.shape)
    spectrum = fft.rfft2(padded, (height, width)) * _spectra(mpp, height, width)
    whole = fft.irfft2(spectrum, (height, width))
    return np.asarray(whole[:, 2 * reach : 2 * reach + dab.shape[0], 2 * reach : 2 * reach + dab.shape[1]])


def anisotropy(dab: Floats, mask: NDArray[np.bool_], mpp: float) -> float:
    """Return the energy of the best direction over the mean of all, inside a mask: 1..K."""
    found = responses(dab, mpp)[:, mask]
    return float((np.maximum(found.max(0), 0) ** 2).sum() / ((found**2).mean(0).sum() + 1e-12))


def scrambled(dab: Floats, rng: np.random.Generator) -> Floats:
    """Return a map with the same power spectrum and random phases."""
    noise = np.fft.fft2(rng.standard_normal(dab.shape))
    spectrum = np.abs(np.fft.fft2(dab - dab.mean()))
    return np.asarray(np.fft.ifft2(spectrum * noise / np.abs(noise)).real + dab.mean())


def mean_null(dab: Floats, mask: NDArray[np.bool_], mpp: float) -> float:
    """Return the mean anisotropy of maps with the same spectrum and random phases."""
    maps = (scrambled(dab, np.random.default_rng(i)) for i in range(SCRAMBLES))
    return float(np.mean([anisotropy(of, mask, mpp) for of in maps]))


def inner(mask: NDArray[np.bool_], mpp: float) -> NDArray[np.bool_]:
    """Return a mask without the border of its image."""
    edge = round(BORDER_UM / mpp)
    within = np.zeros_like(mask)
    within[edge:-edge, edge:-edge] = True
    return mask & within


def figures(
    image: NDArray[np.uint8], mask: NDArray[np.bool_], mpp: float, nuclei: Floats | None = None
) -> dict[str, float]:
    """Measure the DAB inside a mask.

    Parameters
    ----------
    image : (H, W, 3) uint8
    mask : (H, W) bool
        The tumour.
    mpp : float
    nuclei : (H, W), optional
        Haematoxylin of the real patch whose nuclei the image keeps; None = of the image itself.

    Returns
    -------
    dict
        ``dab``: mean density. ``fine``: standard deviation of what is finer than 3 um. ``lines``, ``null`` and
        ``membranous``: see the module. ``pale``: the same of pale lines in the density of both stains, which stay
        where membranes were wiped off; below 0 where there are none. ``in_nuclei``: mean DAB where haematoxylin is
        among the highest quarter over mean DAB where it is in the lower half. Empty where the mask is too small.
    """
    mask = inner(mask, mpp)
    if mask.sum() * mpp**2 < LEAST_UM2:
        return {}
    haematoxylin, dab = stain_maps(image)
    clipped = ndimage.gaussian_filter(np.clip(dab, *np.quantile(dab[mask], CLIP)), SMOOTH_UM / mpp)
    lines = anisotropy(clipped, mask, mpp)
    null = mean_null(clipped, mask, mpp)
    bright = -ndimage.gaussian_filter(-np.log(np.maximum(image, 1) / 255.0).mean(2), SMOOTH_UM / mpp)
    kept = ndimage.gaussian_filter(haematoxylin if nuclei is None else nuclei, 1.0 / mpp)
    dark, pale = kept >= np.quantile(kept[mask], 0.75), kept <= np.quantile(kept[mask], 0.5)
    return {
        "dab": float(dab[mask].mean()),
        "fine": float((dab - ndimage.gaussian_filter(dab, FINE_UM / mpp))[mask].std()),
        "lines": lines,
        "null": null,
        "membranous": float(lines - null),
        "pale": anisotropy(bright, mask, mpp) - mean_null(bright, mask, mpp),
        "in_nuclei": float(dab[mask & dark].mean() / max(dab[mask & pale].mean(), 1e-3)),
    }


def main() -> None:
    """Print the figures of whole images."""
    from PIL import Image

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--mpp", type=float, required=True)
    arguments = parser.parse_args()
    for file in arguments.images:
        image = np.asarray(Image.open(file).convert("RGB"))
        found = figures(image, np.ones(image.shape[:2], bool), arguments.mpp)
        print(file, " ".join(f"{name} {value:.3f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
