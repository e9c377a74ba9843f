"""Annotations of slides: EXACT, QuPath GeoJSON, ASAP XML and Aperio XML as labelled polygons in level-0 pixels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, get_args

from shapely.errors import GEOSException

from counterstain.errors import InputError
from counterstain.io.annotations.exact import read_exact
from counterstain.io.annotations.exact_server import ExactServer, fetch_exact
from counterstain.io.annotations.geojson import read_geojson
from counterstain.io.annotations.outlines import UNCLASSIFIED, Annotation, AnnotationFile
from counterstain.io.annotations.safe_parsing import read_bytes
from counterstain.io.annotations.xml_formats import read_aperio, read_asap

__all__ = [
    "FORMATS",
    "UNCLASSIFIED",
    "Annotation",
    "AnnotationFile",
    "ExactServer",
    "Format",
    "annotation_files",
    "fetch_exact",
    "files_of_other_formats",
    "looks_like",
    "read_annotations",
]


# Reads any annotation file; a file of another format than the one asked for is recognised.

Format = Literal["exact", "qupath", "asap", "aperio"]
FORMATS: tuple[Format, ...] = get_args(Format)
ENDINGS: dict[Format, tuple[str, ...]] = {
    "exact": (".json", ".json.gz"),
    "qupath": (".geojson", ".json", ".geojson.gz", ".json.gz"),
    "asap": (".xml", ".xml.gz"),
    "aperio": (".xml", ".xml.gz"),
}
LOOKED_AT_BYTES = 2**16

_ROOTS: dict[bytes, Format] = {b"ASAP_Annotations": "asap", b"Annotations": "aperio"}
_ROOT = re.compile(rb"<([A-Za-z_][\w.-]*)")
_QUPATH = re.compile(rb'"type"\s*:\s*"(FeatureCollection|Feature|GeometryCollection|(Multi)?Polygon)"')
_EXACT = re.compile(rb'"(annotation_type|vector)"\s*:|"results"\s*:\s*\[')


def read_annotations(path: Path, file_format: Format, *, types: Path | None = None) -> AnnotationFile:
    """Read an annotation file, packed with gzip or not.

    Parameters
    ----------
    path : Path
    file_format : ``exact``, ``qupath``, ``asap`` or ``aperio``
    types : Path, optional
        Names of EXACT's annotation types, see :func:`~counterstain.io.annotations.exact.read_exact`.

    Raises
    ------
    InputError
        One line with the file, the place in it, what was expected and the remedy. Nothing else is raised, whatever
        the file holds.
    """
    data = read_bytes(path)
    looks = looks_like(data)
    if looks is not None and looks != file_format:
        raise InputError(f"{path}: looks like {looks}, not {file_format}; give --format {looks}, or move it away")
    try:
        if file_format == "exact":
            return read_exact(path, data, types)
        return {"qupath": read_geojson, "asap": read_asap, "aperio": read_aperio}[file_format](path, data)
    except GEOSException as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: an outline cannot be made valid ({reason}); draw it anew") from error


def looks_like(data: bytes) -> Format | None:
    """Return the format that a file's beginning shows, or None where it shows none."""
    head = data[:LOOKED_AT_BYTES].lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(b"<"):
        root = _ROOT.search(head)
        return _ROOTS.get(root[1]) if root else None
    if head.startswith((b"{", b"[")):
        qupath, exact = _QUPATH.search(head), _EXACT.search(head)
        if qupath and exact:
            return "qupath" if qupath.start() < exact.start() else "exact"
        return "qupath" if qupath else "exact" if exact else None
    return None


def files_of_other_formats(folder_or_file: Path, file_format: Format) -> list[Path]:
    """Return the files of a folder that another format reads and this one leaves out, which should be said."""
    if not folder_or_file.is_dir():
        return []
    others = tuple({end for ends in ENDINGS.values() for end in ends} - set(ENDINGS[file_format]))
    own = ENDINGS[file_format]
    names = sorted(file for file in folder_or_file.iterdir() if file.is_file())
    return [file for file in names if file.name.lower().endswith(others) and not file.name.lower().endswith(own)]


def annotation_files(folder_or_file: Path, file_format: Format) -> list[Path]:
    """Return the annotation files of a folder, sorted by name, or the one file that was given.

    Raises
    ------
    InputError
        Nothing there.
    """
    if folder_or_file.is_file():
        return [folder_or_file]
    if not folder_or_file.is_dir():
        raise InputError(f"{folder_or_file}: no such file or folder; expected annotations in format {file_format}")
    endings = ENDINGS[file_format]
    found = sorted(f for f in folder_or_file.iterdir() if f.name.lower().endswith(endings) and f.is_file())
    if not found:
        raise InputError(
            f"{folder_or_file}: no annotation file; format {file_format} expects names that end in {', '.join(endings)}"
        )
    return found
