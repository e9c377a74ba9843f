"""OME-Zarr images with labels, as napari opens them: every label with its colour and its properties.

Images and maps of labels are written piece by piece, so that a whole slide is never in memory, in levels that are each
half as large as the one before: images by the mean of 2 x 2 pixels, labels by every second pixel.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from counterstain.config import to_yaml
from counterstain.data.region_store import OMERO, ZSTD_LEVEL, PixelWindow, multiscales
from counterstain.io.export_contents import Contents, Layout, Sample
from counterstain.storage import committing, write_csv, write_text
from counterstain.taxonomy import BACKGROUND, IGNORE, Taxonomy

CHUNK_PX = 512
LARGEST_LEVEL_PX = 1024  # longer side of the coarsest level


class Labels(NamedTuple):
    """A map of labels on an image."""

    name: str
    pixels: np.ndarray | PixelWindow  # (H, W) integer, 0 = background
    dtype: str
    properties: Mapping[int, Mapping[str, Any]]  # label -> what is known of it
    colours: Mapping[int, Sequence[int]]  # label -> red, green, blue, 0..255


def write_store(
    store: Path, image: np.ndarray | PixelWindow, labels: Sequence[Labels], *, name: str, mpp: float
) -> None:
    """Write an image, (H, W, 3) uint8, with maps of labels of its size, as one OME-Zarr store in one step.

    ``mpp`` is micrometres per pixel.
    """
    levels = 1
    while max(image.shape[:2]) >> (levels - 1) > LARGEST_LEVEL_PX:
        levels += 1
    with committing(store) as folder:
        root = zarr.open_group(folder, mode="w", zarr_format=3)
        root.attrs["ome"] = multiscales(name, "cyx", mpp, levels) | {"omero": OMERO}
        _write_levels(root, image, levels, "uint8")
        if labels:
            root.create_group("labels").attrs["ome"] = {"version": "0.5", "labels": [of.name for of in labels]}
        for of in labels:
            group = root.create_group(f"labels/{of.name}")
            known = [{"label-value": label, **properties} for label, properties in of.properties.items()]
            colours = [{"label-value": label, "rgba": [*map(int, rgb), 255]} for label, rgb in of.colours.items()]
            about = {"colors": colours, "properties": known, "source": {"image": "../../"}}
            group.attrs["ome"] = multiscales(of.name, "yx", mpp, levels) | {
                "image-label": {key: value for key, value in about.items() if value}
            }
            _write_levels(group, of.pixels, levels, of.dtype)


def _write_levels(group: zarr.Group, pixels: np.ndarray | PixelWindow, levels: int, dtype: str) -> None:
    """Write an image, channels first, or a map of labels in all of its levels, a square of chunks at a time."""
    (height, width), channels = pixels.shape[:2], pixels.shape[2:]
    before: Any = None
    for level in range(levels):
        size = tuple(max(1, side >> level) for side in (height, width))
        chunks = (*channels, *(min(side, CHUNK_PX) for side in size))
        array = group.create_array(
            str(level), shape=(*channels, *size), chunks=chunks, dtype=dtype,
            compressors=ZstdCodec(level=ZSTD_LEVEL, checksum=True), dimension_names=("cyx" if channels else "yx"),
        )  # fmt: skip
        for y, x in itertools.product(range(0, size[0], CHUNK_PX), range(0, size[1], CHUNK_PX)):
            rows, columns = min(CHUNK_PX, size[0] - y), min(CHUNK_PX, size[1] - x)
            if level:
                block = before[..., 2 * y : 2 * (y + rows), 2 * x : 2 * (x + columns)]
                found = _halved(block, rows, columns) if channels else block[::2, ::2][:rows, :columns]
            else:
                found = _read(pixels, y, x, rows, columns)
            array[..., y : y + rows, x : x + columns] = found
        before = array


def _read(pixels: np.ndarray | PixelWindow, y: int, x: int, rows: int, columns: int) -> np.ndarray:
    block = (
        pixels[y : y + rows, x : x + columns] if isinstance(pixels, np.ndarray) else pixels.read(y, x, rows, columns)
    )
    return np.moveaxis(block, -1, 0) if block.ndim == 3 else np.asarray(block)


def _halved(block: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return the means of 2 x 2 pixels, (C, rows, columns) uint8; an image of one row or column repeats it."""
    even = np.pad(block, [(0, 0), (0, 2 * rows - block.shape[1]), (0, 2 * columns - block.shape[2])], mode="edge")
    means = even.reshape(len(block), rows, 2, columns, 2).mean(axis=(2, 4), dtype=np.float32)
    return np.asarray((means + 0.5).astype(np.uint8))


# Export of a cohort or a synthetic set


def _write_sample(path: Path, sample: Sample) -> None:
    taxonomy, areas = sample.taxonomy, np.bincount(sample.instances.ravel())
    known = {i: {"subtype": taxonomy.name_of(s), "area_px": int(areas[i])} for i, s in sample.subtypes.items()}
    colours = {i: taxonomy.palette[s].tolist() for i, s in sample.subtypes.items()}
    labels = [Labels("instances", sample.instances, "int32", known, colours), subtype_labels(taxonomy, sample.labels)]
    write_store(path, sample.image, labels, name=sample.name, mpp=sample.mpp)


def subtype_labels(taxonomy: Taxonomy, pixels: np.ndarray) -> Labels:
    """Return a label mask, (H, W) uint8, in the names and colours of a taxonomy."""
    found = [label for label in np.unique(pixels).tolist() if label != BACKGROUND]
    names = {label: {"subtype": taxonomy.name_of(label)} for label in [*range(1, taxonomy.num_labels), IGNORE]}
    shown = {label: names[label] for label in names if label != IGNORE or IGNORE in found}
    return Labels("subtypes", pixels, "uint8", shown, {label: taxonomy.palette[label].tolist() for label in shown})


def _write_tables(out: Path, contents: Contents) -> None:
    write_text(out / "taxonomy.yaml", to_yaml(contents.taxonomy))
    write_csv(out / "table.csv", STORES.table(contents))


STORES = Layout(
    files={"image": "{name}.ome.zarr"},
    writers={"image": _write_sample},
    write_tables=_write_tables,
)
