"""Datasets in the layouts of other tools: each layout is a function from its files to rows of a table.

A row names an image and its label file, as :mod:`counterstain.io.parts` writes them, and what else the dataset tells:
patient, slide, part, region.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from counterstain.errors import InputError
from counterstain.io.annotations import OF_IMAGES as SIGNS
from counterstain.io.annotations.image_formats import coco_content, coco_id
from counterstain.io.annotations.safe_parsing import file_name, parse_json, read_bytes
from counterstain.io.dataset_files import (
    IMAGE_ENDINGS,
    PARTS_BY_NAME,
    Dataset,
    Row,
    files_of,
    key_of,
    part_of,
    paths_in,
    read_pairs,
    split_rows,
)
from counterstain.io.instances import annotation_file
from counterstain.io.labels import LabelMap
from counterstain.io.parts import damage_named, ome_image, ome_labels
from counterstain.io.table import csv_rows
from counterstain.taxonomy import Taxonomy

Layout = Literal["export", "nnunet", "hf", "parquet", "coco", "pannuke", "ome-zarr", "deepliif", "pairs"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
CASE = re.compile(r"(.+)_(\d{4})")  # of nnU-Net, with the number of its channel
LABEL_COLUMNS = ("mask", "label", "labels", "annotation", "segmentation", "segmentation_mask", "gt", "ground_truth")
PANNUKE = ("Neoplastic", "Inflammatory", "Connective", "Dead", "Epithelial")
PANELS = 6  # of DeepLIIF: the IHC image first, its segmentation last


def layout_of(folder: Path) -> Layout:  # noqa: PLR0911 - a line for each layout
    """Return the layout that the files of a dataset show; InputError where there is no such folder or file."""
    if not folder.exists():
        raise InputError(f"{folder}: no such folder or file")
    names = {file.name for file in files_of(folder)}
    if (folder / "table.csv").is_file() and any((folder / name).is_file() for name in ("instances.csv", "export.json")):
        return "export"
    if (folder / "dataset.json").is_file() and (folder / "imagesTr").is_dir():
        return "nnunet"
    if any(file.name.startswith("metadata.") and file.suffix in {".csv", ".jsonl"} for file in files_of(folder)):
        return "hf"
    if any(name.endswith(".parquet") for name in names):
        return "parquet"
    if "images.npy" in names and "masks.npy" in names:
        return "pannuke"
    if _zarrs(folder):
        return "ome-zarr"
    return "coco" if _coco_files(folder) else "pairs"


def _json(path: Path) -> Any:
    return parse_json(path, read_bytes(path))


def read_export(folder: Path) -> Dataset:
    """Read what ``counterstain export`` wrote with ``--format png`` or ``ome-zarr``."""
    optional = ("region", "slide", "part", "score", "mpp", "mpp_level0", "x_level0_px", "y_level0_px")
    table = list(csv_rows(folder / "table.csv", ("image", "label", "instances", "patient"), optional))
    rows: list[Row] = []
    for where, row in table:
        wanted = ("image", "label", "instances", "patient", "region", "slide", "part", "score")
        numbers = {name: _number(where, name, row.get(name)) for name in optional[4:]}
        rows.append({name: row[name] for name in wanted if row.get(name)} | numbers)
    mpps = {row["mpp"] for row in rows}
    return Dataset(
        rows=rows,
        options={"labels": "ids"},
        taxonomy=Taxonomy.load(folder / "taxonomy.yaml"),
        mpp=_one_mpp(folder, mpps),
    )


def _one_mpp(folder: Path, given: Iterable[Any]) -> float | None:
    said = sorted({str(mpp) for mpp in given} - {"None", ""})
    if len(said) > 1:
        raise InputError(f"{folder}: rows of several mpp ({', '.join(said[:3])}); import them apart")
    return _number(str(folder), "mpp", said[0]) if said else None


def _number(where: str, name: str, text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError as error:
        raise InputError(f"{where}: {name} is {text!r}; expected a number") from error


def read_nnunet(folder: Path) -> Dataset:
    """Read a raw dataset of nnU-Net v2: RGB images, and label images with the ids of ``dataset.json``."""
    description = _json(folder / "dataset.json")
    said = description.get("labels") if isinstance(description, dict) else None
    if not isinstance(said, dict) or not all(type(value) is int for value in said.values()):
        raise InputError(
            f"{folder / 'dataset.json'}: labels are {json.dumps(said)[:80]}; expected one whole number for each name "
            "(regions such as [1, 2] overlap: write the labels that they are made of)"
        )
    if twice := [name for name, value in said.items() if list(said.values()).count(value) > 1]:
        raise InputError(f"{folder / 'dataset.json'}: labels {', '.join(twice)} have one number; give each its own")
    held_out = _validation_of(folder / "splits_final.json")
    rows, left_out = list[Row](), Counter[str]()
    for tr, part in (("Tr", "train"), ("Ts", "test")):
        labels = {file.name.removesuffix(file.suffix): file for file in _in(folder / f"labels{tr}")}
        cases: dict[str, list[Path]] = {}
        for file in _in(folder / f"images{tr}"):
            found = CASE.fullmatch(file.stem)
            if found:
                cases.setdefault(found[1], []).append(file)
            else:
                left_out[f"file of images{tr} whose name does not end in _0000"] += 1
        for case, files in cases.items():
            if len(files) > 1:
                raise InputError(
                    f"{files[1]}: a second channel of {case}; expected RGB images in a file each (NaturalImage2DIO); "
                    "save the colours of an image into one file"
                )
            if case not in labels:
                left_out[f"image of images{tr} without a label"] += 1
                continue
            of_part = "val" if case in held_out else part
            rows.append(paths_in(folder, files[0], labels[case]) | {"region": case, "part": of_part})
    if unknown := sorted(held_out - {row["region"] for row in rows}):
        raise InputError(
            f"{folder / 'splits_final.json'}: val names {unknown[0]}, of which there is no image and label"
        )
    legend = LabelMap(labels={str(value): name for name, value in said.items()})
    mpp = description.get("mpp")
    return Dataset(
        rows=split_rows(rows),
        options={"labels": "ids"},
        legend=legend,
        mpp=float(mpp) if isinstance(mpp, int | float) else None,
        left_out=left_out,
    )


def _in(folder: Path) -> list[Path]:
    return files_of(folder) if folder.is_dir() else []


def _validation_of(path: Path) -> set[str]:
    """Return the cases that the only fold of a dataset validates on; nothing where there are several folds."""
    folds = _json(path) if path.is_file() else []
    if not isinstance(folds, list) or not all(isinstance(fold, dict) for fold in folds):
        raise InputError(f"{path}: expected a list of folds with train and val; correct it, or move it away")
    one = folds[0].get("val") if len(folds) == 1 else []
    if not isinstance(one, list) or not all(isinstance(case, str) for case in one):
        raise InputError(f"{path}: val: expected a list of cases; correct it, or move it away")
    return set(one)


def read_hf(folder: Path) -> Dataset:
    """Read an image folder of Hugging Face: metadata.csv or .jsonl with file_name, and the file of the labels."""
    rows, left_out = list[Row](), Counter[str]()
    inside = folder.resolve()
    for file in (f for f in files_of(folder) if f.name in {"metadata.csv", "metadata.jsonl"}):
        at = file.parent.relative_to(folder)
        for where, line in _lines(file):
            label = _label_column(where, [name for name in line if name.endswith("_file_name")], line)
            if not line.get("file_name") or not line.get(label):
                left_out["line without an image or a label"] += 1
                continue
            for name in ("file_name", label):
                if not isinstance(line[name], str) or not (file.parent / line[name]).resolve().is_relative_to(inside):
                    raise InputError(f"{where}: {name} {str(line[name])[:80]!r} names no file of {folder}")
            row: Row = {"image": (at / line["file_name"]).as_posix(), "label": (at / line[label]).as_posix()}
            if label == "mask_file_name" and line.get("instances_file_name"):
                row["instances"] = (at / line["instances_file_name"]).as_posix()
            row |= {name: line[name] for name in ("patient", "slide", "score", "region") if line.get(name)}
            rows.append(row | {"part": part_of(at / "_"), "columns": line, "mpp": line.get("mpp")})
    return _of_tables(folder, rows, left_out)


def _of_tables(folder: Path, rows: list[Row], left_out: Counter[str]) -> Dataset:
    taxonomy = folder / "taxonomy.yaml"
    mpp = _one_mpp(folder, [row.pop("mpp", None) for row in rows])
    return Dataset(
        rows=rows,
        options={"labels": "ids"} if taxonomy.is_file() else {},
        taxonomy=Taxonomy.load(taxonomy) if taxonomy.is_file() else None,
        mpp=mpp,
        left_out=left_out,
    )


def _lines(file: Path) -> Iterator[tuple[str, Row]]:
    if file.suffix == ".csv":
        yield from csv_rows(file, ("file_name",), ())
        return
    for number, text in enumerate(read_bytes(file).splitlines(), start=1):
        line = parse_json(file, text, number) if text.strip() else None
        if line is not None and not isinstance(line, dict):
            raise InputError(f"{file} line {number}: expected a JSON object with file_name")
        if line is not None:
            yield f"{file} line {number}", line


def _label_column(where: str, columns: Iterable[str], known: Iterable[str]) -> str:
    """Return the one column of labels; of our own exports, that of the label images."""
    columns = list(columns)
    for name in LABEL_COLUMNS:
        for column in (f"{name}_file_name", name):
            if column in columns:
                return column
    if len(columns) == 1:
        return columns[0]
    raise InputError(
        f"{where}: which column names the label image is not certain; found {', '.join(known)}; expected one such as "
        "mask_file_name"
    )


def read_parquet(folder: Path) -> Dataset:
    """Read Parquet tables of Hugging Face: columns of images, ``image`` and one of labels, with a row for each."""
    import pyarrow.parquet as pq
    from pyarrow import types

    rows = list[Row]()
    root = folder.parent if folder.is_file() else folder
    for file in (f for f in files_of(folder) if f.suffix == ".parquet"):
        with damage_named(file):
            table = pq.ParquetFile(file)
            schema = table.schema_arrow
            images = [f.name for f in schema if types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
            if "image" not in images:
                raise InputError(f"{file}: no column 'image' of images; found {', '.join(schema.names)}")
            label = _label_column(str(file), [n for n in images if n not in {"image", "instances"}], schema.names)
            told = [n for n in schema.names if n not in images and not types.is_nested(schema.field(n).type)]
            lines = table.read(columns=told).to_pylist() if told else [{}] * table.metadata.num_rows
        name = file.relative_to(root).as_posix()
        part = PARTS_BY_NAME.get(file.stem.partition("-")[0].lower()) or part_of(Path(name))
        for number, line in enumerate(lines):
            row: Row = {"image": f"{name}[image,{number}]", "label": f"{name}[{label},{number}]", "part": part}
            if "instances" in images:
                row["instances"] = f"{name}[instances,{number}]"
            row |= {key: line[key] for key in ("patient", "slide", "score", "region") if line.get(key)}
            row.setdefault("region", f"{file.stem}-{number:05d}")
            rows.append(row | {"columns": line, "mpp": line.get("mpp")})
    return _of_tables(root, rows, Counter())


def _coco_files(folder: Path) -> list[Path]:
    found = []
    for file in (f for f in files_of(folder) if f.suffix == ".json"):
        with file.open("rb") as content:
            if SIGNS["coco"].search(content.read(2**16)):
                found.append(file)
    return found


def read_coco_dataset(folder: Path) -> Dataset:
    """Read COCO files with their images, which lie beside them, in a folder images, or anywhere once in the dataset."""
    rows, left_out = list[Row](), Counter[str]()
    root = folder.parent if folder.is_file() else folder
    by_name: dict[str, list[Path]] = {}
    for file in files_of(root):
        by_name.setdefault(file.name, []).append(file)
    for file in _coco_files(folder):
        content = coco_content(file, read_bytes(file))
        left_out += annotation_file(file, file.stat().st_mtime_ns, ("annotation",), None)[0].skipped
        annotated = {coco_id(row.get("image_id")) for row in content["annotations"] if isinstance(row, dict)}
        names: set[str] = set()
        for image in content["images"]:
            given = image.get("file_name") if isinstance(image, dict) else None
            if not isinstance(given, str):
                raise InputError(f"{file}: an image without a file_name; export it again")
            name = file_name(given, f"{file} file_name")
            if name is None:
                raise InputError(f"{file}: file_name {given!r} names no file; export it again")
            if name in names:
                raise InputError(f"{file}: two images are called {name!r}; rename one of them")
            names.add(name)
            places = [place / given for place in (file.parent, file.parent / "images", root, root / "images")]
            within = [place for place in places if place.is_file() and place.resolve().is_relative_to(root.resolve())]
            found = within[:1] or by_name.get(name, []) or by_name.get(re.split(r"[/\\]", given)[-1], [])
            if len(found) != 1:
                raise InputError(
                    f"{file}: image {given} is {'there twice' if found else 'not'} in {root}; put it beside"
                )
            left_out["image without an annotation, taken as background"] += coco_id(image.get("id")) not in annotated
            row = paths_in(root, found[0], file)
            part = part_of(found[0].relative_to(root))
            rows.append({"image": row["image"], "label": f"{row['label']}[{name}]", "part": part})
    return Dataset(rows=split_rows(rows), left_out=+left_out)


def read_pannuke(folder: Path) -> Dataset:
    """Read PanNuke: images.npy and masks.npy of each fold, (N, H, W, 3) and (N, H, W, 6)."""
    rows: list[Row] = []
    planes = set()
    masks = {key_of(folder, file)[0]: file for file in files_of(folder) if file.name == "masks.npy"}
    for file in (f for f in files_of(folder) if f.name == "images.npy"):
        fold = key_of(folder, file)[0]
        if fold not in masks:
            raise InputError(f"{file}: no masks.npy for it; expected masks/{'/'.join(fold)}/masks.npy")
        shapes = [_shape(array) for array in (file, masks[fold])]
        if len(shapes[0]) != 4 or len(shapes[1]) != 4 or shapes[0][0] != shapes[1][0]:
            raise InputError(
                f"{file}: {shapes[0]} and masks of {shapes[1]}; expected (N, H, W, 3) and (N, H, W, classes)"
            )
        planes.add(shapes[1][3])
        name = "-".join((*fold, "image"))
        row = paths_in(folder, file, masks[fold])
        rows += [
            {"image": f"{row['image']}[{i}]", "label": f"{row['label']}[{i}]", "region": f"{name}-{i:05d}"}
            for i in range(shapes[0][0])
        ]
    classes = {str(number): name for number, name in enumerate(PANNUKE)} | {"5": "background"}
    legend = LabelMap(labels=classes) if planes == {len(classes)} else None
    return Dataset(rows=rows, options={"labels": "planes"}, legend=legend)


def _shape(path: Path) -> tuple[int, ...]:
    with damage_named(path):
        return tuple(np.load(path, mmap_mode="r").shape)


def _zarrs(folder: Path) -> list[Path]:
    if folder.suffix == ".zarr":
        return [folder]
    places = [folder, *(place for place in sorted(folder.rglob("*")) if place.is_dir())] if folder.is_dir() else []
    return [
        place for place in places if place.suffix == ".zarr" and not any(p.suffix == ".zarr" for p in place.parents)
    ]


def read_ome_zarr(folder: Path) -> Dataset:
    """Read OME-Zarr images with one image of labels each; ``--labels`` says whether these number instances."""
    rows, mpps = list[Row](), set[float | None]()
    root = folder.parent if folder.suffix == ".zarr" else folder
    for store in _zarrs(folder):
        names = ome_labels(store)
        if len(names) != 1:
            found = f"several images of labels, {', '.join(names)}" if names else "no labels"
            raise InputError(
                f"{store}: {found}; list the images in a table for counterstain import table, with "
                f"{store.name}[labels/NAME] in its column label"
            )
        mpps.add(ome_image(store)[2])
        name = store.relative_to(root).as_posix()
        region = name.removesuffix(".zarr").removesuffix(".ome")
        rows.append({"image": name, "label": f"{name}[labels/{names[0]}]", "region": region})
    return Dataset(rows=rows, mpp=mpps.pop() if len(mpps) == 1 else None)


def read_deepliif(folder: Path) -> Dataset:
    """Read DeepLIIF's rows of pictures side by side: the IHC image is the first, its segmentation the last."""
    rows: list[Row] = []
    for file in (f for f in files_of(folder) if f.suffix.lower() in IMAGE_ENDINGS):
        name = paths_in(folder, file, file)["image"]
        row = {"image": f"{name}[1/{PANELS}]", "label": f"{name}[{PANELS}/{PANELS}]"}
        rows.append(row | {"region": Path(name).with_suffix("").as_posix(), "part": part_of(Path(name))})
    return Dataset(rows=split_rows(rows))


READERS: dict[Layout, Callable[[Path], Dataset]] = {
    "export": read_export,
    "nnunet": read_nnunet,
    "hf": read_hf,
    "parquet": read_parquet,
    "coco": read_coco_dataset,
    "pannuke": read_pannuke,
    "ome-zarr": read_ome_zarr,
    "deepliif": read_deepliif,
    "pairs": read_pairs,
}
