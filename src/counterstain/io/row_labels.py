"""What the label files of a table mean: from a row to the labels, or the instances, of its image.

Shapes: H, W = rows and columns of an image in pixels.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from counterstain.config import Config
from counterstain.data.patches import components
from counterstain.errors import ConfigError, CounterstainWarning, InputError, TaxonomyError
from counterstain.io.annotations import first_names
from counterstain.io.instances import Reading, classes_of, commonest_under, names_other_image, read_instances
from counterstain.io.labels import LabelMap, taxonomy_of, taxonomy_of_labels
from counterstain.io.masks import TISSUE, ValueMeanings, read_ids, read_mask
from counterstain.io.parts import Source, array_of, is_pixels
from counterstain.io.stored_labels import Drawn
from counterstain.io.table import Columns, csv_rows
from counterstain.taxonomy import IGNORE, MEANINGS, Taxonomy

LISTED = 10  # classes in a message
NO_INSTANCE = "rows of the table of instances without an instance in its image"
Row = dict[str, Any]


class TableConfig(Config):
    """How a table of images becomes a cohort."""

    mpp: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)]
    """Micrometres per pixel of the images."""
    shrink: Annotated[int, Field(ge=1, le=64)] = 1
    """Whole number by which images are shrunk: 2 makes a cohort of 0.5 from images of 0.25 um per pixel. Colours are
    averaged; a pixel of the cohort gets the label, or the instance, of most of its area. Incomplete blocks at the right
    and lower edge are cut off."""
    tissue_class: Annotated[str, Field(min_length=1, max_length=80)] = "tumour"
    """Name of all subtypes together, where no taxonomy is given."""
    labels: Literal["mask", "ids", "instances", "planes"] = "mask"
    """``mask``: the tissue class is white, or 1 where there is no other value; ``ids``: each pixel holds a subtype's
    id; ``instances``: it holds the number of an instance; ``planes``: a channel for each class does."""
    threshold: Annotated[int, Field(ge=0, le=254)] | None = None
    """Masks with grey levels: values above it are tissue class. Without it, 127 for masks with soft edges; other grey
    levels are an error. Masks of 0 and 1 are recognised whatever the threshold."""
    mask_values: str = ""
    """What values of label images mean, ``0=background,1-254=tissue,255=ignore``: a value, a range or a colour
    (``#ff0000``) is background, ignore, and tissue in masks or a subtype in images of ids."""
    merge: str | None = None
    """Merge of the taxonomy by which its subtypes are put together."""
    min_area_px: Annotated[int, Field(ge=0)] = 0
    """Smaller components, in pixels of the cohort, become background; they are counted in ``import.json``."""
    columns: Columns = Columns()
    """Names of the table's columns."""
    objects: tuple[str, ...] = ("annotation",)
    """GeoJSON of QuPath: types of the objects to read."""
    point_um: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Width of the discs that are drawn for points, in micrometres; without it, points are left out."""

    def identity(self) -> dict[str, Any]:
        """Return the settings that tell an import from another, as version 0.1 wrote them where none is newer."""
        said = self.model_dump(mode="json")
        newer = {"objects": ["annotation"], "point_um": None}
        said["columns"] = {name: column for name, column in said["columns"].items() if column}
        return {name: value for name, value in said.items() if newer.get(name, ...) != value}


@dataclass(frozen=True)
class Labels:
    """The labels of an image, (H, W) uint8; or its instances, (H, W) int32, with the label of each."""

    pixels: np.ndarray
    of_instances: dict[int, int] | None = None
    kind: str | None = None  # of a mask, in words
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> objects


class RowLabels:
    """Reads the labels of rows of a table, and knows the taxonomy of all.

    ``legend`` is a file like LABELS.yaml that says what values, colours or classes mean, ``instance_table`` a CSV table
    of image, instance and subtype. Raises InputError or ConfigError where these do not fit the rows.
    """

    def __init__(
        self,
        table: Path,
        rows: pd.DataFrame,
        config: TableConfig,
        *,
        taxonomy: Taxonomy | None,
        legend: str | Path | None = None,
        instance_table: str | Path | None = None,
        legend_map: LabelMap | None = None,
    ) -> None:
        self.table, self.rows, self.config = table, rows, config
        self._legend_file = Path(legend or table)
        self._legend = LabelMap.legend(self._legend_file) if legend else legend_map
        self._reading = Reading(
            planes=config.labels == "planes",
            objects=config.objects,
            point_px=None if config.point_um is None else config.point_um / config.mpp,
        )
        self._of_instances = _instance_table(Path(instance_table)) if instance_table else None
        self._by_pixel = config.labels in {"mask", "ids"}
        self._ids = config.labels == "ids" or (config.labels == "mask" and self._legend is not None)
        self._drawn: Drawn = {}
        self._check_options()
        self._found = self._classes_found(rows)
        self.known = self._taxonomy(rows, taxonomy)
        self.taxonomy = self.known.merged(config.merge) if config.merge else self.known
        self._merged = self.known.merge_lookup(config.merge) if config.merge else np.arange(256, dtype=np.uint8)
        self._meanings = self._meanings_of_values() if any(map(is_pixels, rows["label"])) and self._by_pixel else None
        self._classes = self._meanings_of_classes(rows)
        masks = not self._ids and self._by_pixel
        for row in rows["row"][rows["subtype"].isna() & rows["label"].map(is_pixels)] if masks else ():
            raise InputError(
                f"{table} {row}: of which subtype the tissue of its mask is, is not said; give a column 'subtype' "
                "(datasets: in the table of --patients), or --legend FILE, or say with --labels what its values are"
            )

    @property
    def depends_on_order(self) -> bool:
        """Whether reading an image takes note of the colours that values are drawn in, for those that follow."""
        return bool(self.config.mask_values) or self._ids

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What else tells an import from another."""
        said = {"legend": self._legend.labels if self._legend else None, "instance_table": self._of_instances}
        return {name: value for name, value in said.items() if value}

    def read(self, row: Row) -> Labels:
        """Return the labels of the image of a row; InputError or TaxonomyError where they are not certain."""
        if not self._by_pixel or not is_pixels(row["label"]):
            return self._instances(row)
        kind = None
        if self._ids:
            labels = self._merged[read_ids(row["label"], self.known, self._meanings, self._drawn)]
        else:
            mask, kind = read_mask(row["label"], self.config.threshold, self._meanings, self._drawn)
            tissue = self._merged[self.known.id_of(row["subtype"])]
            labels = np.array([0, tissue, *[IGNORE] * 254], np.uint8)[mask]
        return Labels(labels, kind=kind) if row["instances"] is None else self._kept_apart(row, labels)

    def _instances(self, row: Row) -> Labels:
        found = read_instances(row["label"], (row["height_px"], row["width_px"]), self._reading, self._classes)
        if self._of_instances is not None:
            table = self._of_instances.get(self._name_in_table(row), {})
            if missing := [number for number in found.classes if str(number) not in table]:
                raise InputError(
                    f"{row['label']}: instance {missing[0]} is not in the table of instances ({len(missing)} of "
                    f"{len(found.classes)} are not); add it"
                )
            classes = {number: table[str(number)] for number in found.classes}
            found.left_out.update({NO_INSTANCE: len(table) - len(classes)} if len(table) > len(classes) else {})
        else:
            classes = found.classes
        labels = {number: int(self._merged[self._label_of(row, name)]) for number, name in classes.items()}
        return Labels(found.ids, labels, left_out=found.left_out)

    def _kept_apart(self, row: Row, labels: np.ndarray) -> Labels:
        """Give the instances of a map beside a label image its labels; what is in no instance is one of its own."""
        source, shape = row["instances"], (row["height_px"], row["width_px"])
        ids = read_instances(source, shape, Reading(), {}).ids
        of_instances = commonest_under(source, ids, labels)
        more = components(np.where(ids == 0, labels, 0).astype(np.uint8))
        first = int(ids.max(initial=0))
        of_instances |= {first + number: label for number, label in more.labels.items()}
        return Labels(np.where(more.instances > 0, more.instances + first, ids).astype(np.int32), of_instances)

    def _label_of(self, row: Row, name: str) -> int:
        label = self._classes.get(name)
        if label is None and row["subtype"] is not None and self._legend is None:
            label = self.known.id_of(row["subtype"])
        if label is None:
            what = (
                f"class {name!r} has no meaning; add it to the legend"
                if name
                else ("its instances have no classes; give the table a column of subtypes, or --instance-table")
            )
            raise InputError(f"{row['label']}: {what}")
        return label

    def _name_in_table(self, row: Row) -> str:
        assert self._of_instances is not None
        fitting = list(_names_of(row["image"], row["label"]) & self._of_instances.keys())
        if len(fitting) != 1:
            found = "rows of two images" if fitting else "no row"
            raise InputError(
                f"{self.table} {row['row']}: {found} in the table of instances for {row['image'].name}; its column "
                "image holds the names of the images"
            )
        return fitting[0]

    def _check_options(self) -> None:
        config = self.config
        if config.threshold is not None and (config.mask_values or config.labels != "mask" or self._legend):
            raise ConfigError(
                "--threshold: not together with --mask-values, --legend or --labels ids, which say what values mean"
            )
        if config.mask_values and self._legend:
            raise ConfigError("--mask-values and --legend: give one of them")
        if config.mask_values and not self._by_pixel:
            raise ConfigError(f"--mask-values: not together with --labels {config.labels}; give --legend FILE")
        if self._of_instances is not None and config.labels != "instances":
            raise ConfigError("--instance-table: needs --labels instances")
        if config.columns.instances and not self._by_pixel:
            raise ConfigError("--instances-column: the label images are instance maps already; leave it out")

    def _classes_found(self, rows: pd.DataFrame) -> Counter[str]:
        """Return class -> instances of all label files that name classes, and warn of odd objects."""
        found: Counter[str] = Counter()
        if self._of_instances is not None:
            known = set[str]().union(*itertools.starmap(_names_of, rows[["image", "label"]].to_numpy()))
            if strange := self._of_instances.keys() - known:
                said = (
                    f"{self.table}: the table of instances has rows for other images: {first_names(strange)}; left out"
                )
                warnings.warn(said, CounterstainWarning, stacklevel=5)
            return Counter(name for image in self._of_instances for name in self._of_instances[image].values())
        others: list[str] = []
        for image, label in rows[["image", "label"]].to_numpy() if self.config.labels != "planes" else ():
            if not (self._by_pixel and is_pixels(label)):
                found += classes_of(label, self._reading)
                others += [label.name] if names_other_image(label, image, self._reading) else []
        if others:
            said = f"{self.table}: imagePath of {first_names(others)} is another image; taken as renamed"
            warnings.warn(said, CounterstainWarning, stacklevel=5)
        if self.config.labels == "planes":
            first = array_of(rows["label"].iloc[0])
            found |= Counter(map(str, range(first.shape[2] if first is not None and first.ndim == 3 else 0)))
        return found

    def _taxonomy(self, rows: pd.DataFrame, given: Taxonomy | None) -> Taxonomy:
        path, config = self.table, self.config
        if given is not None:
            for row, subtype in zip(rows["row"], rows["subtype"], strict=True):
                if subtype is not None and subtype not in given.names and config.labels != "ids":
                    known = ", ".join(given.names)
                    raise TaxonomyError(f"{path} {row}: unknown subtype {subtype!r}; {given.name} has {known}")
            return given
        if self._legend is not None:
            return taxonomy_of_labels(self._legend, self._legend_file, config.tissue_class)
        if config.labels == "ids":
            raise InputError(
                f"{path}: label images of ids need a taxonomy that names the ids; give one with --taxonomy, or --legend"
            )
        if not rows["subtype"].isna().all():
            place = f"{path}: column {config.columns.subtype!r}"
            return taxonomy_of(sorted(rows["subtype"].dropna().unique()), path.stem, place, config.tissue_class)
        names = sorted(self._found.keys() - {*MEANINGS, ""})
        if not names or any(name.isdecimal() for name in names):
            listed = f"numbers: {', '.join(names[:LISTED])}" if names else "not named"
            raise InputError(
                f"{path}: the classes of its instances are {listed}; say what they mean with --legend FILE, or name "
                "the subtype of each image in a column 'subtype' (datasets: in the table of --patients)"
            )
        return taxonomy_of(names, path.stem, f"{path}: classes of the labels", config.tissue_class)

    def _meanings_of_values(self) -> ValueMeanings | None:
        known = self.known
        names = {"tissue": TISSUE} if not self._ids else {name: known.id_of(name) for name in known.names}
        if self._legend is not None:
            self._legend.check(known, self._legend_file)
            return ValueMeanings(self._legend.labels, MEANINGS | names, self._legend_file)
        return ValueMeanings(self.config.mask_values, MEANINGS | names) if self.config.mask_values else None

    def _meanings_of_classes(self, rows: pd.DataFrame) -> dict[str, int]:
        """Return class -> label of the taxonomy before it is merged."""
        named = Counter({name: count for name, count in self._found.items() if name})
        if self._legend is not None:
            own = {name: label for name, label in MEANINGS.items() if name not in self._legend.labels}
            asked = Counter({name: count for name, count in named.items() if name not in own})
            return own | self._legend.resolve(asked, self.known, self._legend_file)
        if not rows["subtype"].isna().all():
            return dict(MEANINGS)
        if unknown := sorted(set(named) - {*MEANINGS, *self.known.names}):
            listed = ", ".join(f"{name!r} ({named[name]:,})" for name in unknown[:LISTED])
            raise InputError(
                f"{self.table}: classes {listed} are no subtypes of {self.known.name} ({', '.join(self.known.names)})"
                "; say what they mean with --legend FILE"
            )
        return MEANINGS | {name: self.known.id_of(name) for name in self.known.names}


def _names_of(*files: Source) -> set[str]:
    """Return what files may be called, with more or fewer of their folders."""
    parts = [str(file).replace("\\", "/").split("/") for file in files]
    return {"/".join(names[i:]) for names in parts for i in range(len(names))}


def _instance_table(path: Path) -> dict[str, dict[str, str]]:
    """Return image -> instance -> subtype."""
    found: dict[str, dict[str, str]] = {}
    for where, row in csv_rows(path, ("image", "instance", "subtype"), ()):
        number = row["instance"].removesuffix(".0")
        if not number.isdecimal() or not int(number) or not row["image"] or not row["subtype"]:
            raise InputError(f"{where}: expected an image, the number of an instance from 1 on, and its subtype")
        of_image = found.setdefault(row["image"].replace("\\", "/").removeprefix("./"), {})
        if of_image.setdefault(str(int(number)), row["subtype"]) != row["subtype"]:
            raise InputError(f"{where}: instance {number} of {row['image']} has another subtype in a row before")
    return found
