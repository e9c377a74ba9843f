"""Exports to look at: a QuPath project, and OME-Zarr images with labels, as napari opens them.

QuPath keeps the objects of an image in a file of Java's own (``data/NUMBER/data.qpdata``), which nothing else should
write. The project's list of images and its classes are JSON; scripts, which QuPath lists under Automate > Project
scripts, read the outlines into it and write them out again.

OME-Zarr images and maps of labels are written piece by piece, so that a whole slide is never in memory, in levels that
are each half as large as the one before: images by the mean of 2 x 2 pixels, labels by every second pixel.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
import zarr
from zarr.codecs import ZstdCodec

from counterstain.config import to_yaml
from counterstain.data.region_store import OMERO, ZSTD_LEVEL, PixelWindow, multiscales
from counterstain.errors import InputError
from counterstain.io.export_contents import Contents, Layout, Sample
from counterstain.io.labels import LabelMap
from counterstain.io.outlines import RGB, Outlined, instance_outlines, write_geojson
from counterstain.io.regions import COLUMNS
from counterstain.storage import committing, replacing, write_csv, write_json, write_text
from counterstain.taxonomy import BACKGROUND, IGNORE, Taxonomy

PROJECT_FILE = "project.qpproj"
OUTLINES, PREDICTIONS, EDITED = "outlines", "predictions", "edited"
IGNORED = "Ignore*"  # QuPath's own class for what is left out
TILE_PX, LEAST_LEVEL_PX = 512, 2048
_NAMESPACE = uuid.UUID("0c5b7a0e-3a56-4d0b-8f0e-6a1f0c2f5a37")

IMPORT_SCRIPT = """\
// Adds the outlines of the folders {outlines} and {predictions} to the images of this project.
// Open an image and choose Run, or Run > Run for project for all of them; outlines that are there already are left out.
import qupath.lib.io.PathIO

def folder = getProject().getPath().getParent()
def name = getProjectEntry().getImageName()
def known = getCurrentHierarchy().getFlattenedObjectList(null).collect {{ it.getID() }} as Set
["{outlines}", "{predictions}"].each {{
    def file = folder.resolve(it).resolve(name + ".geojson").toFile()
    if (file.exists())
        addObjects(PathIO.readObjects(file).findAll {{ !known.contains(it.getID()) }})
}}
fireHierarchyUpdate()
"""
EXPORT_SCRIPT = """\
// Writes the annotations of the images of this project to the folder {edited}, a GeoJSON file each.
// Open an image and choose Run, or Run > Run for project for all of them.
import qupath.lib.io.PathIO

def folder = getProject().getPath().getParent().resolve("{edited}").toFile()
folder.mkdirs()
def file = new File(folder, getProjectEntry().getImageName() + ".geojson")
PathIO.exportObjectsAsGeoJSON(file, getAnnotationObjects(), PathIO.GeoJsonExportOptions.FEATURE_COLLECTION)
"""


class ProjectImage(NamedTuple):
    """An image of a project."""

    name: str  # in the project, and of its files of outlines
    path: Path  # of a slide or an image that QuPath opens


def write_project(folder: Path, images: Sequence[ProjectImage], classes: Mapping[str, RGB]) -> None:
    """Write what makes a folder a QuPath project; a project that is there already is left as QuPath saved it.

    Images are named by absolute paths; QuPath asks for them, or finds those in the project, after a move.
    """
    now = int(time.time() * 1000)
    entries = [
        {
            "serverBuilder": {"builderType": "uri", "uri": image.path.resolve().as_uri(), "args": []},
            "entryID": number,
            "imageName": image.name,
            "metadata": {},
        }
        for number, image in enumerate(images, start=1)
    ]
    about = {"createTimestamp": now, "modifyTimestamp": now, "uri": (folder / PROJECT_FILE).resolve().as_uri()}
    places = {"outlines": OUTLINES, "predictions": PREDICTIONS, "edited": EDITED}
    files: dict[str, Any] = {
        "scripts/import_outlines.groovy": IMPORT_SCRIPT.format(**places),
        "scripts/export_outlines.groovy": EXPORT_SCRIPT.format(**places),
        "classifiers/classes.json": {
            "pathClasses": [{"name": name, "color": _packed(colour)} for name, colour in classes.items()]
        },
        PROJECT_FILE: about | {"lastID": len(images), "images": entries},
    }
    for name, content in files.items():
        if not (folder / name).exists():
            (write_text if isinstance(content, str) else write_json)(folder / name, content)


def _packed(colour: RGB) -> int:
    """Return an opaque colour as Java's signed number of 32 bits."""
    red, green, blue = colour
    return (0xFF << 24 | red << 16 | green << 8 | blue) - 2**32


def _classes(taxonomy: Taxonomy) -> dict[int, str]:
    """Return the class of every label."""
    return {**dict(enumerate(taxonomy.names, start=1)), IGNORE: IGNORED}


def class_colours(taxonomy: Taxonomy) -> dict[str, RGB]:
    """Return the classes of a project with their colours: subtypes, and what is ignored."""
    named = {name: taxonomy.palette[label].tolist() for label, name in _classes(taxonomy).items()}
    return {name: (red, green, blue) for name, (red, green, blue) in named.items()}


def write_ome_tiff(path: Path, image: np.ndarray, mpp: float) -> None:
    """Write an image, (H, W, 3) uint8, as OME-TIFF in one step: without losses, in tiles, with a pyramid if large.

    The same image has the same bytes.
    """
    levels = [image]
    while max(levels[-1].shape[:2]) > LEAST_LEVEL_PX:
        height, width = (side // 2 for side in levels[-1].shape[:2])
        even = np.moveaxis(levels[-1][: 2 * height, : 2 * width], -1, 0)
        levels.append(np.moveaxis(_means(even, height, width), 0, -1))
    name = path.name.removesuffix(".ome.tif")
    sizes = {f"PhysicalSize{axis}{what}": value for axis in "XY" for what, value in (("", mpp), ("Unit", "µm"))}
    about = {"axes": "YXS", "Name": name, "UUID": str(uuid.uuid5(_NAMESPACE, name)), "Creator": "counterstain", **sizes}
    options: dict[str, Any] = {"photometric": "rgb", "tile": (TILE_PX, TILE_PX), "compression": "deflate"}
    with replacing(path) as partial, tifffile.TiffWriter(partial, ome=True, bigtiff=image.nbytes > 2**31) as file:
        for number, level in enumerate(levels):
            resolution = (10_000 / (mpp * 2**number),) * 2
            file.write(
                level, subifds=len(levels) - 1 if number == 0 else 0, subfiletype=int(number > 0),
                metadata=about if number == 0 else None, resolution=resolution, resolutionunit="CENTIMETER", **options,
            )  # fmt: skip


def _write_outlines(path: Path, sample: Sample) -> None:
    named = _classes(sample.taxonomy)
    areas = [
        Outlined(outline, None, outline.area * sample.mpp**2, named[sample.subtypes[i]], {"instance": str(i)})
        for i, outline in instance_outlines(sample.instances)
    ]
    about = {"image": sample.name, "mpp": sample.mpp, "taxonomy": sample.taxonomy.name}
    options: dict[str, Any] = {"object_type": "annotation", "offset_xy_level0_px": (0, 0)}
    write_geojson(path, areas, colours=class_colours(sample.taxonomy), about=about, **options)


def _check(_out: Path, contents: Contents) -> None:
    if named := [name for name in contents.taxonomy.names if ":" in name]:
        raise InputError(
            f"{contents.source}: QuPath takes {named[0]!r} for a class within a class; rename that subtype"
        )


def _write_tables(out: Path, contents: Contents) -> None:
    classes, table = class_colours(contents.taxonomy), contents.table.assign(slide=contents.table["name"])
    labels = {name: "ignore" if name == IGNORED else name for name in classes}
    colours = {name: "#{:02x}{:02x}{:02x}".format(*colour) for name, colour in classes.items()}
    write_text(out / "taxonomy.yaml", to_yaml(contents.taxonomy))
    write_text(out / "LABELS.yaml", to_yaml(LabelMap(labels=labels, colours=colours)))
    write_csv(out / "patients.csv", table[["slide", "patient", "score"]])
    images = [ProjectImage(name, out / "images" / f"{name}.ome.tif") for name in table["name"]]
    boxes = table.rename(columns={"width_px": "width_level0_px", "height_px": "height_level0_px"})
    boxes = boxes.assign(x_level0_px=0, y_level0_px=0, region="whole")
    write_csv(out / "regions.csv", boxes[[*COLUMNS, "region"]])
    write_project(out, images, classes)


PROJECT = Layout(
    files={"image": "images/{name}.ome.tif", OUTLINES: OUTLINES + "/{name}.geojson"},
    writers={
        "image": lambda path, sample: write_ome_tiff(path, sample.image, sample.mpp),
        OUTLINES: _write_outlines,
    },
    write_tables=_write_tables,
    check=_check,
    of_others=(PROJECT_FILE, "classifiers/", "data/", f"{EDITED}/", f"{PREDICTIONS}/", "scripts/"),
)


# OME-Zarr

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
                found = _means(block, rows, columns) if channels else block[::2, ::2][:rows, :columns]
            else:
                found = _read(pixels, y, x, rows, columns)
            array[..., y : y + rows, x : x + columns] = found
        before = array


def _read(pixels: np.ndarray | PixelWindow, y: int, x: int, rows: int, columns: int) -> np.ndarray:
    block = (
        pixels[y : y + rows, x : x + columns] if isinstance(pixels, np.ndarray) else pixels.read(y, x, rows, columns)
    )
    return np.moveaxis(block, -1, 0) if block.ndim == 3 else np.asarray(block)


def _means(block: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return the means of 2 x 2 pixels, (C, rows, columns) uint8; an image of one row or column repeats it."""
    even = np.pad(block, [(0, 0), (0, 2 * rows - block.shape[1]), (0, 2 * columns - block.shape[2])], mode="edge")
    means = even.reshape(len(block), rows, 2, columns, 2).mean(axis=(2, 4), dtype=np.float32)
    return np.asarray((means + 0.5).astype(np.uint8))


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


def _write_table(out: Path, contents: Contents) -> None:
    write_text(out / "taxonomy.yaml", to_yaml(contents.taxonomy))
    table = STORES.table(contents)
    for place, (column, name) in enumerate((("label", "subtypes"), ("instances", "instances")), start=1):
        table.insert(place, column, table["image"] + f"[labels/{name}]")
    write_csv(out / "table.csv", table)


STORES = Layout(
    files={"image": "{name}.ome.zarr"},
    writers={"image": _write_sample},
    write_tables=_write_table,
)
