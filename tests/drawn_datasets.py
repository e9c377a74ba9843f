"""Small datasets in the layouts of other tools, drawn with the libraries of the field.

Every image shows the same tissue: two boxes that touch, of subtypes A and B, and one of A alone.
"""

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
from PIL import Image

SHAPE = (40, 48)
BOXES = {1: (2, 2, 8, 10), 2: (2, 10, 8, 16), 3: (20, 20, 30, 34)}  # y0, x0, y1, x1; 1 and 2 touch
CLASSES = {1: "A", 2: "B", 3: "A"}
IDS = {"A": 1, "B": 2}
AREAS = {"A": [48, 140], "B": [36]}
RED, BLUE = (255, 0, 0), (0, 0, 255)


def boxes(name=""):
    """The boxes of an image, each image's a bit lower than another's."""
    down = sum(name.encode()) % 9
    return {number: (y0 + down, x0, y1 + down, x1) for number, (y0, x0, y1, x1) in BOXES.items()}


def instance_map(dtype=np.int32, name=""):
    drawn = np.zeros(SHAPE, dtype)
    for number, (y0, x0, y1, x1) in boxes(name).items():
        drawn[y0:y1, x0:x1] = number
    return drawn


def of_instances(values, dtype=np.uint8, name=""):
    """Return a map of the value of each instance's class."""
    drawn = np.zeros((*SHAPE, *np.shape(next(iter(values.values())))), dtype)
    for number, subtype in CLASSES.items():
        drawn[instance_map(name=name) == number] = values[subtype]
    return drawn


def colours(name=""):
    return of_instances({"A": RED, "B": BLUE}, name=name)


def noise(name, shape=SHAPE):
    return np.random.default_rng([*name.encode()]).integers(0, 256, (*shape, 3), dtype=np.uint8)


def save(path: Path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def ring(box):
    y0, x0, y1, x1 = box
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def aperio(path: Path, names=("Epithelial", "Lymphocyte"), name=""):
    """A layer for each class with its name in an attribute, as in MoNuSAC."""
    root = ET.Element("Annotations", MicronsPerPixel="0.250000")
    for number, group in enumerate(names, start=1):
        layer = ET.SubElement(root, "Annotation", Id=str(number), Name="", ReadOnly="0", Visible="1")
        attributes = ET.SubElement(layer, "Attributes")
        ET.SubElement(attributes, "Attribute", Name=group, Id="0", Value="")
        regions = ET.SubElement(layer, "Regions")
        for instance, box in boxes(name).items():
            if IDS[CLASSES[instance]] == number:
                region = ET.SubElement(regions, "Region", Id=str(instance), Type="0", NegativeROA="0")
                vertices = ET.SubElement(region, "Vertices")
                for x, y in ring(box):
                    ET.SubElement(vertices, "Vertex", X=str(float(x)), Y=str(float(y)), Z="0")
    path.parent.mkdir(parents=True, exist_ok=True)
    ET.ElementTree(root).write(path)


def coco(images, *, segmentation=None, **more):
    """A COCO file of the boxes of all images."""
    annotations = [
        {
            "id": 10 * image + number,
            "image_id": image,
            "category_id": IDS[CLASSES[number]],
            "iscrowd": 0,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (y1 - y0) * (x1 - x0),
            "segmentation": segmentation(number)
            if segmentation
            else [[float(v) for point in ring(BOXES[number]) for v in point]],
            **more,
        }
        for image in range(len(images))
        for number, (y0, x0, y1, x1) in BOXES.items()
    ]
    return json.dumps(
        {
            "info": {},
            "images": [
                {"id": i, "file_name": name, "height": SHAPE[0], "width": SHAPE[1]} for i, name in enumerate(images)
            ],
            "categories": [{"id": number, "name": name, "supercategory": "cell"} for name, number in IDS.items()],
            "annotations": annotations,
        }
    )


LABELME = json.dumps(  # as labelme 6.3.1 writes it
    {
        "version": "6.3.1",
        "flags": {},
        "shapes": [
            {"label": label, "points": points, "group_id": group, "description": "", "shape_type": kind, "flags": {}}
            | {"mask": mask}
            for label, points, group, kind, mask in [
                ("A", [[2.0, 2.0], [10.0, 2.0], [10.0, 8.0], [2.0, 8.0]], None, "polygon", None),
                ("B", [[10.0, 2.0], [16.0, 8.0]], None, "rectangle", None),
                (
                    "A", [[20.0, 20.0], [23.0, 22.0]], None, "mask",
                    "iVBORw0KGgoAAAANSUhEUgAAAAQAAAADAQAAAACcj5NrAAAADklEQVR4nGMoYPjAxAAABQoBY/KOqfQAAAAASUVORK5CYII=",
                ),
                ("B", [[30.0, 4.0], [33.0, 4.0], [33.0, 7.0], [30.0, 7.0]], 1, "polygon", None),
                ("B", [[36.0, 4.0], [39.0, 4.0], [39.0, 7.0], [36.0, 7.0]], 1, "polygon", None),
                ("A", [[5.0, 30.0]], None, "point", None),
            ]
        ],
        "imagePath": "a.png",
        "imageData": None,
        "imageHeight": 40,
        "imageWidth": 48,
    }
)  # fmt: skip
NNUNET = {  # as nnunetv2 2.8.1 writes it
    "channel_names": {"0": "R", "1": "G", "2": "B"},
    "labels": {"background": 0, "A": 1, "B": 2, "ignore": 3},
    "numTraining": 2,
    "file_ending": ".png",
    "licence": "Whoever converted this dataset was lazy and didn't look it up!",
    "converted_by": "Please enter your name, especially when sharing datasets with others in a common infrastructure!",
    "name": "Dataset007_Cells",
}
