"""Annotation files of EXACT, QuPath, ASAP and Aperio as labelled polygons in level-0 pixels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, get_args

from shapely.errors import GEOSException

from counterstain.errors import InputError
from counterstain.io.annotations.json_formats import read_exact, read_geojson
from counterstain.io.annotations.outlines import AnnotationFile
from counterstain.io.annotations.safe_parsing import read_bytes
from counterstain.io.annotations.xml_formats import read_aperio, read_asap

Format = Literal["exact", "qupath", "asap", "aperio"]
FORMATS: tuple[Format, ...] = get_args(Format)
ENDINGS: dict[Format, tuple[str, ...]] = {
    "exact": (".json", ".json.gz"),
    "qupath": (".geojson", ".json", ".geojson.gz", ".json.gz"),
    "asap": (".xml", ".xml.gz"),
    "aperio": (".xml", ".xml.gz"),
}
ROOTS: dict[bytes, Format] = {b"ASAP_Annotations": "asap", b"Annotations": "aperio"}
ROOT = re.compile(rb"<([A-Za-z_][\w.-]*)")
QUPATH = re.compile(rb'"type"\s*:\s*"(FeatureCollection|Feature|GeometryCollection|(Multi)?Polygon)"')
EXACT = re.compile(rb'"(annotation_type|vector)"\s*:|"results"\s*:\s*\[')


def read_annotations(path: str | Path, file_format: Format, *, types: str | Path | None = None) -> AnnotationFile:
    """Read an annotation file, compressed with gzip or not.

    ``types`` is a file with names of EXACT's annotation types, see
    :func:`~counterstain.io.annotations.json_formats.read_exact`.

    Raises
    ------
    InputError
        One line with the file, the place in it, what was expected and the remedy. Nothing else is raised, whatever
        the file holds.
    """
    path = Path(path)
    data = read_bytes(path)
    looks = looks_like(data)
    if looks is not None and looks != file_format:
        raise InputError(f"{path}: looks like {looks}, not {file_format}; give --format {looks}, or move it away")
    try:
        if file_format == "exact":
            return read_exact(path, data, Path(types) if types is not None else None)
        return {"qupath": read_geojson, "asap": read_asap, "aperio": read_aperio}[file_format](path, data)
    except GEOSException as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: an outline cannot be made valid ({reason}); draw it again") from error


def looks_like(data: bytes) -> Format | None:
    """Return the format that the beginning of a file shows, or None."""
    head = data[: 2**16].lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(b"<"):
        root = ROOT.search(head)
        return ROOTS.get(root[1]) if root else None
    if head.startswith((b"{", b"[")):
        qupath, exact = QUPATH.search(head), EXACT.search(head)
        if qupath and exact:
            return "qupath" if qupath.start() < exact.start() else "exact"
        return "qupath" if qupath else "exact" if exact else None
    return None


def annotation_files(folder_or_file: str | Path, file_format: Format) -> list[Path]:
    """Return the annotation files of a folder, sorted by name, or the one file given; none is an InputError."""
    place, endings = Path(folder_or_file), ENDINGS[file_format]
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise InputError(f"{place}: no such file or folder; expected annotations in format {file_format}")
    found = [file for file in _files(place) if file.name.lower().endswith(endings)]
    if not found:
        raise InputError(
            f"{place}: no annotation file; format {file_format} expects names that end in {', '.join(endings)}"
        )
    return found


def files_of_other_formats(folder_or_file: str | Path, file_format: Format) -> list[Path]:
    """Return the files of a folder that this format skips but another format reads."""
    own, others = ENDINGS[file_format], tuple({end for ends in ENDINGS.values() for end in ends})
    files = _files(Path(folder_or_file))
    return [file for file in files if file.name.lower().endswith(others) and not file.name.lower().endswith(own)]


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
