"""Regions of slides, and the packs that hold their pixels: OME-Zarr images with labels, few files for many regions.

A pack holds n regions of one size, H x W pixels, along the axis z of c, z, y, x.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr

CHUNK_PX = 512
SHARD_BYTES = 64 * 2**20  # packs up to this size are one file each


class ImageWindow(Protocol):
    """An image of ``shape`` H, W, 3 that is read piece by piece, such as a region of a slide."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    def read(self, y_px: int, x_px: int, height_px: int, width_px: int) -> np.ndarray:
        """Return a piece of the image, (height_px, width_px, 3) uint8."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Region:
    """A rectangle of a slide with its instances, as it enters a cohort.

    Examples
    --------
    >>> instances = np.zeros((64, 96), np.int32)
    >>> instances[8:20, 30:50] = 1
    >>> image = np.full((64, 96, 3), 230, np.uint8)
    >>> Region(region="r1", slide="s1", patient="p1", image=image, instances=instances, subtypes={1: 4})
    Region(r1 of slide s1, patient p1: 64 x 96 px, 1 instance)
    """

    region: str  # name, unique in the cohort
    slide: str
    patient: str
    image: np.ndarray | ImageWindow  # (H, W, 3) uint8
    instances: np.ndarray  # (H, W) int32, 0 = background, ids unique in the region
    subtypes: dict[int, int]  # subtype of every instance
    score: str | None = None  # score of the slide; splits are stratified by it
    split: str | None = None  # train, val, test or None
    mpp_level0: float | None = None
    origin_xy_level0_px: tuple[int, int] = (0, 0)

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        shown = f"{height} x {width} px, {len(self.subtypes)} instance{'' if len(self.subtypes) == 1 else 's'}"
        return f"Region({self.region} of slide {self.slide}, patient {self.patient}: {shown})"


def write_pack(store: Path, name: str, regions: Sequence[Region], *, mpp: float, taxonomy: str) -> None:
    """Write the pixels of regions of one size.

    Packs too large for one file are written in bands, so that an image that is read piece by piece is never in memory
    as a whole.
    """
    n, (height, width) = len(regions), regions[0].instances.shape
    root = zarr.open_group(store, mode="w", zarr_format=3)
    root.attrs["ome"] = _multiscales(name, "czyx", mpp) | {"omero": _OMERO}
    root.attrs["counterstain"] = {"regions": [region.region for region in regions]}
    image = _create_array(root, "0", (3, n, height, width), "uint8", "czyx")
    labels = root.create_group("labels")
    labels.attrs["ome"] = {"version": "0.5", "labels": ["instances"]}
    group = labels.create_group("instances")
    group.attrs["ome"] = _multiscales("instances", "zyx", mpp) | {"image-label": {"source": {"image": "../../"}}}
    group.attrs["counterstain"] = {"taxonomy": taxonomy}
    instances = _create_array(group, "0", (n, height, width), "int32", "zyx")
    if image.shards:  # one file: written in one piece
        image[:] = np.stack([_rows(region.image, 0, height) for region in regions], axis=1)
    else:
        for index, y in itertools.product(range(n), range(0, height, CHUNK_PX)):
            stop = min(y + CHUNK_PX, height)
            image[:, index, y:stop] = _rows(regions[index].image, y, stop)
    if instances.shards:
        instances[:] = np.stack([region.instances for region in regions])
    else:
        for index, region in enumerate(regions):
            instances[index] = region.instances


def read_pack(store: Path, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Read one region: image, (H, W, 3) uint8, and instances, (H, W) int32.

    Raises OSError, ValueError, KeyError or RuntimeError, as zarr and its codecs do, where a file is missing or damaged.
    """
    group: Any = zarr.open_group(store, mode="r")
    stored = group["0"], group["labels/instances/0"]
    channels, instances = np.asarray(stored[0][:, index]), np.asarray(stored[1][index])
    for array, pixels in zip(stored, (channels, instances), strict=True):
        if (array.shards is None or not pixels.any()) and array.nchunks_initialized < array.nchunks:
            raise KeyError(f"{array.path}: a chunk is missing")  # zarr reads it as zeros
    return np.ascontiguousarray(np.moveaxis(channels, 0, -1)), instances


def _rows(image: np.ndarray | ImageWindow, start: int, stop: int) -> np.ndarray:  # (3, rows, W)
    if isinstance(image, np.ndarray):
        return np.moveaxis(image[start:stop], -1, 0)
    return np.moveaxis(image.read(start, 0, stop - start, image.shape[1]), -1, 0)


_OMERO = {
    "channels": [
        {"label": label, "color": colour, "active": True, "window": {"start": 0, "end": 255, "min": 0, "max": 255}}
        for label, colour in (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"))
    ]
}


_AXES = {
    "c": {"name": "c", "type": "channel"},
    "z": {"name": "z", "type": "space"},
    "y": {"name": "y", "type": "space", "unit": "micrometer"},
    "x": {"name": "x", "type": "space", "unit": "micrometer"},
}


def _multiscales(name: str, axes: str, mpp: float) -> dict[str, Any]:
    scale = [mpp if axis in "yx" else 1.0 for axis in axes]
    dataset = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}
    multiscale = {"name": name, "axes": [_AXES[axis] for axis in axes], "datasets": [dataset]}
    return {"version": "0.5", "multiscales": [multiscale]}


def _create_array(group: zarr.Group, path: str, shape: tuple[int, ...], dtype: str, axes: str) -> Any:
    sizes = dict(zip(axes, shape, strict=True))
    chunk = tuple({"c": n, "z": 1}.get(axis, min(n, CHUNK_PX)) for axis, n in sizes.items())
    whole = tuple(-(-length // size) * size for length, size in zip(shape, chunk, strict=True))
    shards = whole if np.prod(shape) * np.dtype(dtype).itemsize <= SHARD_BYTES else None
    layout: Any = {"chunks": chunk, "shards": shards, "dimension_names": tuple(axes)}
    # empty chunks are written, so that a chunk that is missing later is known to be lost
    return group.create_array(path, shape=shape, dtype=dtype, config={"write_empty_chunks": True}, **layout)
