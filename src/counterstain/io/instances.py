"""Label files that number instances: instance maps with the class of each instance, and outlines.

Classes are named as the source names them; what they mean is said by a legend. Shapes: H, W = rows and columns.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from counterstain.data.patches import Components, areas_of
from counterstain.errors import InputError
from counterstain.io.annotations import read_annotations
from counterstain.io.annotations.outlines import Annotation, AnnotationFile
from counterstain.io.parts import (
    MAP,
    MOST_VALUES,
    Part,
    Source,
    array_of,
    arrays_in,
    damage_named,
    is_outlines,
    is_pixels,
    ome_classes,
    whole,
)
from counterstain.io.regions import rasterise
from counterstain.io.stored_labels import LOSSY, read_stored
from counterstain.taxonomy import BACKGROUND, IGNORE

HIGHEST = 2**31 - 1
MOST_CONTRADICTIONS = 0.1  # share of the instances of a file whose type is said twice, differently
HDF5_OF_MATLAB = b"MATLAB 7.3 MAT-file"
NUMBERS, TYPES = ("inst_uid", "id"), ("inst_type", "class")  # of HoVer-Net and CoNSeP, of Lizard
OFF = "outlines beside the image"
HIDDEN = "instances hidden by others or smaller than a pixel"


@dataclass(frozen=True, slots=True)
class Instances:
    """An instance map with the class of each instance, as its source names it (nothing where it names none)."""

    ids: np.ndarray  # (H, W) int32, 0 = background
    classes: dict[int, str]
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> objects


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How label files that number instances are read."""

    planes: bool = False  # an array has a channel for each class
    objects: Collection[str] = ("annotation",)  # of QuPath
    point_px: float | None = None  # width of the discs that are drawn for points

    @property
    def of_file(self) -> tuple[tuple[str, ...], float | None]:
        """What tells two readings of a file of annotations apart."""
        return tuple(self.objects), self.point_px


def read_instances(source: Source, shape: tuple[int, int], reading: Reading, meaning: Mapping[str, int]) -> Instances:
    """Read the instances of an image of ``shape`` H, W; outlines that mean background are cut out of those below them.

    Raises InputError where the file is no instance map, has another size, or its classes are not certain.
    """
    if is_outlines(source):
        return _painted(source, shape, reading, meaning)
    if named := named_arrays(source):
        found = _with_types(source, named)
    elif reading.planes:
        found = _of_planes(source)
    else:
        stored = read_stored(source)
        if stored.coloured or stored.palette is not None or stored.lossy or stored.white_is_zero:
            why = LOSSY if stored.lossy else "has colours, a palette, or 0 drawn white"
            raise InputError(
                f"{source}: {why}, so the numbers of instances are not certain; save them in 16 bits, grey"
            )
        ids = _ids(source, stored.values)
        named_classes = ome_classes(source)
        found = Instances(ids, {number: named_classes.get(number, "") for number in areas_of(ids)[0].tolist()})
    check_size(source, found.ids.shape, shape)
    return found


def check_size(source: Source, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raise InputError where a label file is not of the size of its image."""
    if tuple(found) != tuple(shape):
        raise InputError(
            f"{source}: is {' x '.join(map(str, found))} px but its image is {shape[0]} x {shape[1]} px (rows x "
            "columns); export both at the same scale"
        )


def classes_of(source: Source, reading: Reading) -> Counter[str]:
    """Return class -> instances of a label file that names classes; nothing of other files."""
    if is_outlines(source):
        return Counter(annotation.label for annotation in _annotations(source, reading)[0])
    named = named_arrays(source)
    return Counter((_with_types(source, named).classes if named else ome_classes(source)).values())


def names_other_image(source: Source, image: Source, reading: Reading) -> bool:
    """Whether a labelme file says that it is of another image; InputError where that one is there as well."""
    if not isinstance(source, Path) or not is_outlines(source):
        return False
    said = re.split(r"[/\\]", annotation_file(source, source.stat().st_mtime_ns, *reading.of_file)[0].image or "")[-1]
    stems = {Path(place.name.partition("[")[0]).stem.casefold() for place in (image, source)}
    if not said or Path(said).stem.casefold() in stems:
        return False
    if any((folder / said).is_file() for folder in {source.parent, Path(str(image)).parent}):
        raise InputError(
            f"{source}: its imagePath is {said}, not {image.name}, and both are there; give each image its own file, "
            "or correct imagePath"
        )
    return True


def shows_labels(source: Source) -> bool:
    """Whether a label file shows more than one value, as those of images without tissue do not."""
    if not is_pixels(source):
        return bool(classes_of(source, Reading()))
    array = array_of(source)
    return bool(np.ptp(read_stored(source).values if array is None or array.ndim == 2 else array))


def named_arrays(source: Source) -> dict[str, np.ndarray] | None:
    """Return the arrays of a file of HoVer-Net, CoNSeP or Lizard by their names; None of files of another kind."""
    if isinstance(source, Part):
        return None
    if source.suffix.lower() == ".mat":
        from scipy.io import loadmat, whosmat

        with damage_named(source):
            with source.open("rb") as file:
                if file.read(len(HDF5_OF_MATLAB)) == HDF5_OF_MATLAB:
                    raise InputError(f"{source}: is of MATLAB 7.3 (HDF5), which is not read; save it with '-v7'")
            if sum(math.prod(shape) for _, shape, _ in whosmat(source)) > MOST_VALUES:
                raise InputError(f"{source}: larger than can be read at once; save each image into a file of its own")
            named = {key: value for key, value in loadmat(source).items() if isinstance(value, np.ndarray)}
    elif source.suffix == ".npz" and MAP in arrays_in(source):
        named = dict(arrays_in(source))
    else:
        return None
    if MAP not in named:
        raise InputError(f"{source}: has no {MAP}; found {', '.join(sorted(named)) or 'nothing'}")
    return named


def _ids(source: Source, values: np.ndarray) -> np.ndarray:
    if values.ndim != 2 or not whole(values) or values.min(initial=0) < 0 or values.max(initial=0) > HIGHEST:
        raise InputError(
            f"{source}: {values.shape} of {values.dtype} is no instance map; expected whole numbers from 0 to "
            f"{HIGHEST:,}"
        )
    return values.astype(np.int32)


def _with_types(source: Source, named: Mapping[str, np.ndarray]) -> Instances:
    """Give the instances of a map the types that a list gives them in the order of their numbers, or a map of types."""
    ids = _ids(source, named[MAP])
    present = areas_of(ids)[0].tolist()
    listed = next((named[key].ravel() for key in TYPES if key in named), None)
    if listed is not None:
        numbers: list[int] = next((named[key].ravel().tolist() for key in NUMBERS if key in named), present)
        if numbers is present and len(listed) != len(present) and len(listed) == max(present, default=0):
            numbers = list(range(1, len(listed) + 1))  # of which some are hidden by others
        if len(numbers) != len(listed) or len(set(numbers)) < len(numbers) or not set(present) <= set(numbers):
            raise InputError(
                f"{source}: {len(present)} instances but {len(listed)} types, so it is not certain which is whose; "
                "save inst_type in the order of the numbers, or a type_map"
            )
        types = dict(zip(numbers, map(_text, listed.tolist()), strict=True))
        return _agreed(source, ids, {number: types[number] for number in present}, named.get("type_map"))
    if "type_map" in named:
        return Instances(ids, _of_map(source, ids, named["type_map"]))
    return Instances(ids, dict.fromkeys(present, ""))


def _of_map(source: Source, ids: np.ndarray, values: np.ndarray, *, ties: bool = True) -> dict[int, str]:
    check_size(source, values.shape, ids.shape)
    return {i: _text(value) for i, value in commonest_under(source, ids, values, ties=ties).items()}


def _agreed(source: Source, ids: np.ndarray, types: dict[int, str], type_map: np.ndarray | None) -> Instances:
    """Ignore instances whose types in a list and in a map of types differ; InputError where that is more than a few."""
    of_map = types if type_map is None else _of_map(source, ids, type_map, ties=False)
    other = [number for number, name in types.items() if of_map[number] != name]
    if len(other) > MOST_CONTRADICTIONS * len(types):
        raise InputError(
            f"{source}: type_map gives instance {other[0]} the type {of_map[other[0]]}, the list {types[other[0]]} "
            f"(as with {len(other)} of {len(types)}); correct one of them, or remove it"
        )
    left_out = Counter({"instances ignored, as type_map and the list of types contradict each other": len(other)})
    return Instances(ids, types | dict.fromkeys(other, "ignore"), +left_out)


def _text(value: Any) -> str:
    while isinstance(value, np.ndarray) and value.size == 1:  # text in a cell of MATLAB
        value = value.item()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def commonest_under(source: Source, ids: np.ndarray, values: np.ndarray, *, ties: bool = True) -> dict[int, int]:
    """Return the value of most pixels of each instance; InputError where two have as many, if ``ties`` matter."""
    if not whole(values):
        raise InputError(f"{source}: types with fractions; expected whole numbers")
    inside = ids > 0
    pairs, counts = np.unique(
        np.stack([ids[inside], values[inside].astype(np.int64)], axis=1).astype(np.int64), axis=0, return_counts=True
    )
    found: dict[int, tuple[int, int]] = {}
    for (instance, value), count in sorted(zip(pairs.tolist(), counts.tolist(), strict=True), key=lambda row: row[1]):
        if ties and instance in found and found[instance][1] == count:
            raise InputError(
                f"{source}: instance {instance} has as many pixels of type {found[instance][0]} as of {value}, so its "
                "type is not certain; correct it"
            )
        found[instance] = (value, count)
    return {instance: value for instance, (value, _) in found.items()}


def _of_planes(source: Source) -> Instances:
    """Return the instances of all channels, whose number is the class; of two in a place the smaller shows."""
    array = array_of(source)
    if array is None or array.ndim != 3 or not whole(array) or array.min() < 0 or array.max() > HIGHEST:
        found = "an image" if array is None else f"an array of {array.shape}, {array.dtype}"
        raise InputError(f"{source}: {found}; expected (rows, columns, classes), whole numbers from 0 on")
    ids, classes, area_of = np.zeros(array.shape[:2], np.int32), dict[int, str](), [0]
    for channel in range(array.shape[2]):
        plane = array[..., channel].astype(np.int64)
        numbers, areas = areas_of(plane)
        renumbered = np.where(plane > 0, np.searchsorted(numbers, plane) + len(area_of), 0).astype(np.int32)
        area_of += areas.tolist()
        known = np.array(area_of)
        shows = (renumbered > 0) & ((ids == 0) | (known[renumbered] < known[ids]))
        ids[shows] = renumbered[shows]
        classes |= dict.fromkeys(range(len(area_of) - len(areas), len(area_of)), str(channel))
    present = set(areas_of(ids)[0].tolist())
    left_out = Counter({HIDDEN: len(classes) - len(present)})
    return Instances(ids, {i: name for i, name in classes.items() if i in present}, +left_out)


def _painted(source: Source, shape: tuple[int, int], reading: Reading, meaning: Mapping[str, int]) -> Instances:
    annotations, size, skipped = _annotations(source, reading)
    if size is not None:
        check_size(source, size, shape)
    window = shapely.box(0, 0, shape[1], shape[0])
    inside = [a for a in annotations if a.polygon.intersection(window).area > 0]
    if 2 * len(inside) < len(annotations):
        x, y = np.max([a.polygon.bounds[2:] for a in annotations], axis=0).tolist()
        raise InputError(
            f"{source}: most outlines lie beside the image: they reach to x {x:.0f}, y {y:.0f}, and it is {shape[1]} x "
            f"{shape[0]} px (width x height); export both at the same scale and from the same corner"
        )
    drawn = [
        (BACKGROUND if meaning.get(a.label) == BACKGROUND else number, a.polygon)
        for number, a in enumerate(inside, start=1)
    ]
    ids = rasterise(drawn, shape) if drawn else np.zeros(shape, np.int32)
    present = areas_of(ids)[0].tolist()
    hidden = sum(number != BACKGROUND for number, _ in drawn) - len(present)
    left_out = skipped + Counter({OFF: len(annotations) - len(inside), HIDDEN: hidden})
    return Instances(ids, {number: inside[number - 1].label for number in present}, +left_out)


def _annotations(source: Source, reading: Reading) -> tuple[Sequence[Annotation], tuple[int, int] | None, Counter[str]]:
    """Return the annotations of an image, its size where the file says it, and what was left out."""
    path = source if isinstance(source, Path) else source.path
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    file, of_images = annotation_file(path, path.stat().st_mtime_ns, *reading.of_file)
    if isinstance(source, Part):  # what the file leaves out is counted once for all of its images
        return of_images.get(source.key, []), file.sizes.get(source.key), Counter()
    if len(file.slides) > 1 or len(file.sizes) > 1:
        raise InputError(f"{source}: annotations of several images; name one, as in {path.name}[IMAGE]")
    return file.annotations, next(iter(file.sizes.values()), None), file.skipped


@lru_cache(maxsize=2)
def annotation_file(
    path: Path, _: int, objects: tuple[str, ...], point_px: float | None
) -> tuple[AnnotationFile, dict[str | None, list[Annotation]]]:
    """Read a file of annotations, also by image; ``_`` is the time at which the file was changed."""
    file = read_annotations(path, None, objects=objects, point_px=point_px)
    of_images: dict[str | None, list[Annotation]] = {}
    for annotation in file.annotations:
        of_images.setdefault(annotation.slide, []).append(annotation)
    return file, of_images


def kept(ids: np.ndarray, labels: Mapping[int, int], min_area_px: int) -> Components:
    """Return the instances of an (H, W) map that are of no background and not below the smallest area."""
    numbers, areas = areas_of(ids)
    of_label = {number: labels[number] for number in numbers.tolist() if labels[number] != BACKGROUND}
    small = {
        number: area
        for number, area in zip(numbers.tolist(), areas.tolist(), strict=True)
        if area < min_area_px and of_label.get(number, IGNORE) != IGNORE
    }
    stay = {number: label for number, label in of_label.items() if number not in small}
    if len(stay) < len(numbers):
        ids = np.where(np.isin(ids, list(stay)), ids, BACKGROUND).astype(np.int32)
    return Components(instances=ids, labels=stay, dropped=len(small), dropped_px=sum(small.values()))


def commonest(ids: np.ndarray, factor: int) -> np.ndarray:
    """Shrink (H, W) integers: each block of factor x factor pixels gets its commonest number, the lowest of equals."""
    height, width = (side // factor for side in ids.shape)
    blocks = ids[: height * factor, : width * factor].reshape(height, factor, width, factor)
    places = np.sort(blocks.transpose(1, 3, 0, 2).reshape(factor * factor, height, width), axis=0)
    best, run = places[0].copy(), np.ones((height, width), np.int32)
    longest = run.copy()
    for before, place in itertools.pairwise(places):
        run = np.where(place == before, run + 1, 1)
        best, longest = np.where(run > longest, place, best), np.maximum(run, longest)
    return np.asarray(best)
