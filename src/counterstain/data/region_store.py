"""Regions of slides, and the packs that hold their pixels: OME-Zarr images with labels, few files for many regions.

A pack holds regions of one size. Axes c, z, y, x; z steps through the regions.
Shapes: H, W = rows and columns of a region in pixels, n = regions of a pack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr

from counterstain.data.patches import instance_boxes

REGION_COLUMNS = (
    "region", "slide", "patient", "score", "split", "height_px", "width_px",
    "mpp_level0", "x_level0_px", "y_level0_px", "pack", "index",
)  # fmt: skip
INSTANCE_COLUMNS = ("region", "instance", "subtype", "area_px", "y0", "x0", "y1", "x1")
INTEGER_COLUMNS = (*INSTANCE_COLUMNS[1:], "height_px", "width_px", "index")
CHUNK_PX = 512
SHARD_BYTES = 64 * 2**20  # packs up to this size are one file each


class ImageWindow(Protocol):
    """An image that is read piece by piece, such as a region of a slide."""

    @property
    def shape(self) -> tuple[int, ...]:
        """H, W, 3."""

    def read(self, y_px: int, x_px: int, height_px: int, width_px: int) -> np.ndarray:
        """Return a piece at a place in the image, (height_px, width_px, 3) uint8."""


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

    region: str
    """Name, unique in the cohort."""
    slide: str
    patient: str
    image: np.ndarray | ImageWindow  # (H, W, 3) uint8
    instances: np.ndarray  # (H, W) int32, 0 = background, ids unique in the region
    subtypes: dict[int, int]
    """Subtype of every instance."""
    score: str | None = None
    """Score of the slide; splits are stratified by it."""
    split: str | None = None
    """``train``, ``val``, ``test`` or None."""
    mpp_level0: float | None = None
    origin_xy_level0_px: tuple[int, int] = (0, 0)

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        shown = f"{height} x {width} px, {len(self.subtypes)} instance{'' if len(self.subtypes) == 1 else 's'}"
        return f"Region({self.region} of slide {self.slide}, patient {self.patient}: {shown})"


def region_row(region: Region, pack: str, index: int) -> dict[str, Any]:
    """Return the row of a region in ``regions.parquet``."""
    named = {name: getattr(region, name) for name in ("region", "slide", "patient", "score", "split", "mpp_level0")}
    height, width = region.image.shape[:2]
    x, y = region.origin_xy_level0_px
    place = {"height_px": height, "width_px": width, "x_level0_px": x, "y_level0_px": y}
    return named | place | {"pack": pack, "index": index}


def instance_rows(region: Region) -> Iterator[dict[str, Any]]:
    """Yield the rows of a region's instances in ``instances.parquet``."""
    for instance, area, box in instance_boxes(region.instances):
        values = (region.region, instance, region.subtypes[instance], area, *box)
        yield dict(zip(INSTANCE_COLUMNS, values, strict=True))


def write_pack(
    store: Path,
    *,
    name: str,
    images: Sequence[np.ndarray | ImageWindow],
    instances: Sequence[np.ndarray],
    regions: Sequence[str],
    mpp: float,
    taxonomy: str,
) -> None:
    """Write images, n of (H, W, 3) uint8, and instances, n of (H, W) int32, with the regions' names as metadata.

    Packs too large for one file are written in bands, so that an image that is read piece by piece is never in memory
    as a whole.
    """
    height, width = instances[0].shape
    n = len(images)
    root = zarr.open_group(store, mode="w", zarr_format=3)
    root.attrs["ome"] = _multiscales(name, "czyx", mpp) | {"omero": _OMERO}
    root.attrs["counterstain"] = {"regions": list(regions)}
    image = _create_array(root, "0", (3, n, height, width), "uint8", "czyx")
    labels = root.create_group("labels")
    labels.attrs["ome"] = {"version": "0.5", "labels": ["instances"]}
    instance_group = labels.create_group("instances")
    instance_group.attrs["ome"] = _multiscales("instances", "zyx", mpp) | {
        "image-label": {"source": {"image": "../../"}}
    }
    instance_group.attrs["counterstain"] = {"taxonomy": taxonomy}
    instance_map = _create_array(instance_group, "0", (n, height, width), "int32", "zyx")
    if image.shards:  # one file: written in one piece
        image[:] = np.stack([np.moveaxis(_rows(pixels, 0, height), -1, 0) for pixels in images], axis=1)
    else:
        for index, pixels in enumerate(images):
            for y in range(0, height, CHUNK_PX):
                stop = min(y + CHUNK_PX, height)
                image[:, index, y:stop] = np.moveaxis(_rows(pixels, y, stop), -1, 0)
    if instance_map.shards:
        instance_map[:] = np.stack(instances)
    else:
        for index, pixels in enumerate(instances):
            instance_map[index] = pixels


def read_pack(store: Path, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Read one region: image, (H, W, 3) uint8, and instances, (H, W) int32.

    Raises
    ------
    OSError, ValueError, KeyError, RuntimeError
        A file of the pack is missing or damaged; which one depends on zarr and its codecs.
    """
    group: Any = zarr.open_group(store, mode="r")
    stored = group["0"], group["labels/instances/0"]
    channels, instances = np.asarray(stored[0][:, index]), np.asarray(stored[1][index])
    for array, pixels in zip(stored, (channels, instances), strict=True):
        if (array.shards is None or not pixels.any()) and array.nchunks_initialized < array.nchunks:
            raise KeyError(f"{array.path}: a chunk is missing")  # zarr reads it as zeros
    return np.ascontiguousarray(np.moveaxis(channels, 0, -1)), instances


def _rows(image: np.ndarray | ImageWindow, start: int, stop: int) -> np.ndarray:
    if isinstance(image, np.ndarray):
        return image[start:stop]
    return image.read(start, 0, stop - start, image.shape[1])


_OMERO = {
    "channels": [
        {"label": label, "color": colour, "active": True, "window": {"start": 0, "end": 255, "min": 0, "max": 255}}
        for label, colour in (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"))
    ]
}


def _multiscales(name: str, axes: str, mpp: float) -> dict[str, Any]:
    kinds: dict[str, dict[str, str]] = {
        "c": {"name": "c", "type": "channel"},
        "z": {"name": "z", "type": "space"},
        "y": {"name": "y", "type": "space", "unit": "micrometer"},
        "x": {"name": "x", "type": "space", "unit": "micrometer"},
    }
    scale = [mpp if axis in "yx" else 1.0 for axis in axes]
    dataset = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]}
    return {
        "version": "0.5",
        "multiscales": [{"name": name, "axes": [kinds[axis] for axis in axes], "datasets": [dataset]}],
    }


def _create_array(group: zarr.Group, path: str, shape: tuple[int, ...], dtype: str, axes: str) -> Any:
    chunk = tuple(
        {"c": length, "z": 1}.get(axis, min(length, CHUNK_PX)) for axis, length in zip(axes, shape, strict=True)
    )
    whole = tuple(-(-length // size) * size for length, size in zip(shape, chunk, strict=True))
    fits = np.prod(shape) * np.dtype(dtype).itemsize <= SHARD_BYTES
    return group.create_array(
        path,
        shape=shape,
        dtype=dtype,
        chunks=chunk,
        shards=whole if fits else None,
        dimension_names=tuple(axes),
        config={"write_empty_chunks": True},  # so that a chunk that is missing later is known to be lost
    )
