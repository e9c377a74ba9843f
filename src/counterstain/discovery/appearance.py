"""What instances look like: stains inside and at the rim, lines of stain, nuclei, texture; or a network's features.

An instance is looked at in parts: one window where it is small, tiles where it is large. What is no tumour is described
alike, slide by slide: it shows what the staining of a slide does, whatever the subtypes of its tumour.

Shapes: H, W = rows and columns in pixels, n = parts, d = features.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import ndimage
from skimage.feature import hessian_matrix, hessian_matrix_eigvals, peak_local_max
from skimage.filters import threshold_otsu

from counterstain.data.cohort import Cohort
from counterstain.data.patches import Patch
from counterstain.data.stains import Stain, amounts
from counterstain.taxonomy import IGNORE

TILE_UM, MARGIN_UM = 128.0, 12.0  # edge of a part, and what is looked at around it
MOST_PARTS = 64  # of an instance, spread over it
LEAST_PX = 16  # of a part
RIM_UM, CLEAR_UM = 6.0, 8.0  # width of the rim; what lies nearer to an instance is no reference
LEAST_UM2 = 200.0  # of a reference in one window
LINE_UM, FINE_UM = 1.0, 3.0  # standard deviation across a line (a membrane is 2 to 3 um wide); finer is texture
NUCLEUS_UM = 1.5  # smoothing before nuclei are counted
STAINED, TISSUE = 0.12, 0.15  # optical densities from which a pixel is stained, and from which it is tissue
SQUARES = 2  # of a region, that a network is shown as its non-tumour tissue
BATCH = 32

MEASURED = (
    "stain", "stained_share", "stain_high", "stain_spread", "rim", "lines",
    "nuclear", "nuclear_spread", "nuclei", "nucleus_um", "texture",
)  # fmt: skip
"""Of the stain beside haematoxylin: mean, share of stained pixels, highest tenth, standard deviation, by how much the
rim is stronger, how far it lies in lines (0 to 1). Of haematoxylin: mean, standard deviation; nuclei in a
square of 100 um, their diameter; standard deviation of what is finer than 3 um. Stains are optical densities."""
PART = ["position", "instance", "y_px", "x_px", "height_px", "width_px"]
Network = Callable[[Sequence[Patch]], np.ndarray]  # squares of one size -> features (n, d)


def list_parts(cohort: Cohort) -> pd.DataFrame:
    """List the windows in which instances are looked at, a row each: position of the region, instance, rectangle.

    Instances to be ignored are left out.
    """
    edge = max(8, round(TILE_UM / cohort.mpp))
    position_of = {region: i for i, region in enumerate(cohort.regions["region"])}
    known = cohort.instances[cohort.instances["subtype"] != IGNORE]
    rows = []
    for region, instance, y0, x0, y1, x1 in known[["region", "instance", "y0", "x0", "y1", "x1"]].to_numpy().tolist():
        cells = list(itertools.product(_cells(y0, y1, edge), _cells(x0, x1, edge)))
        chosen = np.unique(np.linspace(0, len(cells) - 1, min(len(cells), MOST_PARTS)).astype(int))
        for (y, height), (x, width) in (cells[i] for i in chosen):
            rows.append((position_of[region], instance, y, x, height, width))
    return pd.DataFrame(rows, columns=PART)


def _cells(start: int, end: int, edge: int) -> list[tuple[int, int]]:
    """Divide a length into equal cells of an edge at most: start and length of each."""
    cuts = np.linspace(start, end, -(-(end - start) // edge) + 1).round().astype(int).tolist()
    return [(low, high - low) for low, high in itertools.pairwise(cuts)]


def measure_stains(
    cohort: Cohort, parts: pd.DataFrame, other: Stain, advance: Callable[[int], None] = lambda _: None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure the stains of parts and, in the same windows, of non-tumour tissue.

    Returns the parts with ``area_px`` and :data:`MEASURED`, without those that show fewer than 16 pixels of their
    instance, and a row per slide with :data:`MEASURED` of its non-tumour tissue, empty where there is none.
    """
    sizes, slides = cohort.regions[["height_px", "width_px"]].to_numpy(), cohort.regions["slide"].tolist()
    margin = round(MARGIN_UM / cohort.mpp)
    found, reference = [], []
    for part in parts[PART].itertuples(index=False):
        position, instance, y, x, height, width = part
        y0, x0 = max(y - margin, 0), max(x - margin, 0)
        y1, x1 = np.minimum([y + height + margin, x + width + margin], sizes[position]).tolist()
        window = cohort.cut(position, y0, x0, y1 - y0, x1 - x0)
        shown = np.zeros(window.instances.shape, bool)
        shown[y - y0 : y - y0 + height, x - x0 : x - x0 + width] = True
        shown &= window.instances == instance
        maps = _StainMaps(window, other, cohort.mpp)
        if shown.sum() >= LEAST_PX:
            found.append((*part, int(shown.sum()), *maps.within(shown)))
        clear = maps.clear()
        if clear.sum() * cohort.mpp**2 >= LEAST_UM2:
            reference.append((slides[position], int(clear.sum()), *maps.within(clear)))
        advance(1)
    of_windows = pd.DataFrame(reference, columns=["slide", "area_px", *MEASURED])
    return pd.DataFrame(found, columns=[*PART, "area_px", *MEASURED]), _by_slide(of_windows, cohort)


def _by_slide(windows: pd.DataFrame, cohort: Cohort) -> pd.DataFrame:
    """Return the mean of every slide, weighted by area."""
    columns = [name for name in windows if name not in {"slide", "area_px"}]
    weighted = windows[columns].mul(windows["area_px"], axis=0).groupby(windows["slide"]).sum()
    means = weighted.div(windows.groupby("slide")["area_px"].sum(), axis=0)
    return means.reindex(cohort.regions["slide"].unique()).rename_axis("slide").reset_index()


class _StainMaps:
    """What is measured at every pixel of a window."""

    def __init__(self, window: Patch, other: Stain, mpp: float) -> None:
        self.instances, self.mpp = window.instances, mpp
        self.counter, self.stain = amounts(window.image, other)
        curves = hessian_matrix(self.stain, sigma=LINE_UM / mpp, mode="nearest", use_gaussian_derivatives=False)
        low, high = np.sort(np.stack(hessian_matrix_eigvals(curves)), axis=0)  # of a dark line: far below 0, near 0
        self.line, self.curved = np.maximum(-low - np.abs(high), 0), np.abs(low) + np.abs(high)
        self.smooth = ndimage.gaussian_filter(self.counter, NUCLEUS_UM / mpp)
        self.fine = self.counter - ndimage.gaussian_filter(self.counter, FINE_UM / mpp)

    def clear(self) -> np.ndarray:
        """Return the tissue that is far from every instance, (H, W) bool."""
        far = ndimage.distance_transform_edt(self.instances == 0) * self.mpp > CLEAR_UM
        return np.asarray(far & (self.counter + self.stain > TISSUE))

    def within(self, mask: np.ndarray) -> tuple[float, ...]:
        """Measure the pixels of a mask, (H, W) bool; the values of :data:`MEASURED`."""
        stain, counter, smooth = self.stain[mask], self.counter[mask], self.smooth[mask]
        area_um2 = mask.sum() * self.mpp**2
        depth = ndimage.distance_transform_edt(np.pad(mask, 1, mode="edge"))[1:-1, 1:-1] * self.mpp
        rim, inner = mask & (depth <= RIM_UM), mask & (depth > RIM_UM)
        dark = mask & (self.smooth > (threshold_otsu(smooth) if np.ptp(smooth) > 0 else np.inf))
        apart = max(1, round(2 * NUCLEUS_UM / self.mpp))
        nuclei = len(peak_local_max(self.smooth, min_distance=apart, labels=dark.astype(int), exclude_border=False))
        values = (
            stain.mean(),
            (stain > STAINED).mean(),
            np.quantile(stain, 0.9),
            stain.std(),
            self.stain[rim].mean() - self.stain[inner].mean() if rim.any() and inner.any() else 0.0,
            self.line[mask].sum() / max(self.curved[mask].sum(), 1e-9),
            counter.mean(),
            counter.std(),
            nuclei / area_um2 * 1e4,
            2 * np.sqrt(dark.sum() * self.mpp**2 / max(nuclei, 1) / np.pi),
            self.fine[mask].std(),
        )
        return tuple(map(float, values))


def measure_by_network(
    cohort: Cohort, parts: pd.DataFrame, network: Network, advance: Callable[[int], None] = lambda _: None
) -> tuple[np.ndarray, pd.DataFrame]:
    """Describe squares around parts, (n, d), and of every slide those squares that show least tumour.

    A square shows what surrounds its instance too.
    """
    edge = square_px(cohort)
    middles = parts[["y_px", "x_px"]].to_numpy() + parts[["height_px", "width_px"]].to_numpy() // 2
    places = list(zip(parts["position"].tolist(), (middles - edge // 2).tolist(), strict=True))
    quiet = [(position, place) for position in range(len(cohort)) for place in _quiet_squares(cohort, position, edge)]
    features = _described(cohort, [*places, *quiet], edge, network, advance)
    table = pd.DataFrame(features[len(places) :]).assign(area_px=1)
    table["slide"] = [cohort.regions["slide"].iloc[position] for position, _ in quiet]
    return features[: len(places)], _by_slide(table, cohort)


def square_px(cohort: Cohort, multiple: int = 32) -> int:
    """Return the edge of the squares that are shown of a cohort: 128 um, or what its smallest region has."""
    smallest = int(cohort.regions[["height_px", "width_px"]].to_numpy().min())
    edge = min(round(TILE_UM / cohort.mpp), smallest)
    return max(edge // multiple * multiple, min(multiple, smallest))


def square_at(cohort: Cohort, position: int, y_px: int, x_px: int, edge: int) -> Patch:
    """Cut a square, moved into its region where it reaches over the edge."""
    height, width = cohort.regions[["height_px", "width_px"]].iloc[position].tolist()
    return cohort.patch(position, min(max(y_px, 0), height - edge), min(max(x_px, 0), width - edge), edge)


def _quiet_squares(cohort: Cohort, position: int, edge: int) -> list[list[int]]:
    height, width = cohort.regions[["height_px", "width_px"]].iloc[position].tolist()
    grid = [[y, x] for y in range(0, height - edge + 1, edge) for x in range(0, width - edge + 1, edge)]
    tumour = [(cohort.instance_map(position, y, x, edge, edge) > 0).mean() for y, x in grid]
    return [grid[i] for i in np.argsort(tumour, kind="stable")[:SQUARES]]


def _described(
    cohort: Cohort, places: Sequence[Any], edge: int, network: Network, advance: Callable[[int], None]
) -> np.ndarray:
    found = []
    for first in range(0, len(places), BATCH):
        batch = places[first : first + BATCH]
        found.append(network([square_at(cohort, position, y, x, edge) for position, (y, x) in batch]))
        advance(len(batch))
    return np.concatenate(found)
