"""A QuPath project: images, outlines in GeoJSON for each, classes with their colours, scripts that carry outlines over.

QuPath keeps the objects of an image in a file of Java's own (``data/NUMBER/data.qpdata``), which nothing else should
write. The project's list of images and its classes are JSON; scripts, which QuPath lists under Automate > Project
scripts, read the outlines into it and write them out again.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile

from counterstain.config import to_yaml
from counterstain.errors import InputError
from counterstain.io.export_contents import Contents, Layout, Sample
from counterstain.io.labels import LabelMap
from counterstain.io.outlines import RGB, Outlined, instance_outlines, write_geojson
from counterstain.io.regions import COLUMNS
from counterstain.storage import replacing, write_csv, write_json, write_text
from counterstain.taxonomy import IGNORE, Taxonomy

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
        levels.append(_halved(levels[-1]))
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


def _halved(image: np.ndarray) -> np.ndarray:
    height, width = (side // 2 for side in image.shape[:2])
    blocks = image[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3)
    return np.asarray((blocks.mean(axis=(1, 3), dtype=np.float32) + 0.5).astype(np.uint8))


# Export of a cohort or a synthetic set


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
