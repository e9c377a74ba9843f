"""Annotation files of annotation tools, of COCO and labelme as labelled polygons in level-0 pixels, or of an image."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

from shapely.errors import GEOSException

from counterstain.errors import CounterstainWarning, InputError
from counterstain.io.annotations.image_formats import read_coco, read_labelme, read_points
from counterstain.io.annotations.json_formats import ANNOTATION, OBJECTS, read_exact, read_geojson
from counterstain.io.annotations.outlines import Annotation, AnnotationFile
from counterstain.io.annotations.safe_parsing import read_bytes
from counterstain.io.annotations.sliderunner import read_sliderunner
from counterstain.io.annotations.xml_formats import read_aperio, read_asap
from counterstain.io.slides import slide_name

Format = Literal["exact", "qupath", "asap", "aperio", "halo", "sliderunner", "coco", "labelme", "points"]
FORMATS: tuple[Format, ...] = get_args(Format)[:-1]  # points have an area only in an image of a known resolution
ENDINGS: dict[Format, tuple[str, ...]] = {
    "exact": (".json", ".json.gz"),
    "qupath": (".geojson", ".json", ".geojson.gz", ".json.gz", ".zip"),
    "asap": (".xml", ".xml.gz"),
    "aperio": (".xml", ".xml.gz"),
    "halo": (".annotations", ".annotations.gz"),
    "sliderunner": (".sqlite",),
    "coco": (".json", ".json.gz"),
    "labelme": (".json",),
    "points": (".json",),
}
ROOT = re.compile(rb"<([A-Za-z_][\w.-]*)")
QUPATH = re.compile(rb'"type"\s*:\s*"(FeatureCollection|Feature|GeometryCollection|(Multi)?Polygon)"')
EXACT = re.compile(rb'"(annotation_type|vector)"\s*:|"results"\s*:\s*\[')
OF_IMAGES: dict[Format, re.Pattern[bytes]] = {
    "labelme": re.compile(rb'"(shape_type|imagePath)"\s*:|"shapes"\s*:\s*\['),
    "coco": re.compile(rb'"(category_id|supercategory|categories|coco_url)"\s*:|"images"\s*:\s*\['),
    "points": re.compile(rb'\[\s*\{[^{}\[\]]*"label_id"\s*:'),
}
HALO = re.compile(rb"<V\s|\bHasEndcaps=|\bVisible=.(True|False)\b")
APERIO = re.compile(rb"<Vertex\s|\bMicronsPerPixel=|<Attributes\b|\bReadOnly=")
SQLITE = b"SQLite format 3\0"
DEEPZOOM_OF_EXACT = ".dzi"  # EXACT gives some images this ending
NUMBERED = re.compile(r"\.\d+(\.|$)")
SHOWN_NAMES = 5
BLANK = b"\xef\xbb\xbf \t\r\n"
OTHERS = {  # what else people give, by its first bytes
    re.compile(
        rb"[{[].{,9999}\"(slots|slot_names|schema_ref|workview_url|complex_polygon)\"", re.DOTALL
    ): "a file of V7 Darwin",
    re.compile(rb"[{[].{,9999}\"(bounding_box|polygon)\"\s*:\s*\{", re.DOTALL): "a file of V7 Darwin",
    re.compile(rb"(<\?xml[^>]*>\s*)?<annotations[\s>]"): "a file of Hamamatsu's NDP.view",
    re.compile(rb"<(!doctype )?html", re.IGNORECASE): "a web page",
    re.compile(rb"\x89PNG|\xff\xd8\xff|II[*+]\0|MM\0[*+]"): "an image",
    re.compile(rb"PK\x03\x04|\x1f\x8b"): "a packed file in a packed file",
    re.compile(rb"%PDF"): "a PDF",
    re.compile(rb"\x89HDF"): "an HDF5 file",
}


def read_annotations(
    path: str | Path,
    file_format: Format | None,
    *,
    types: str | Path | None = None,
    objects: Collection[str] = (ANNOTATION,),
    point_px: float | None = None,
) -> AnnotationFile:
    """Read an annotation file, compressed with gzip or zip or not; without a format, the one that it looks like.

    ``types`` is a file with names of EXACT's annotation types, see
    :func:`~counterstain.io.annotations.json_formats.read_exact`, ``objects`` the types of QuPath's objects to read.
    Points of labelme and in lists become discs ``point_px`` wide, where that is given.

    Raises InputError, one line with the file, the place in it, what was expected and the remedy. Nothing else is
    raised, whatever the file holds. An odd object among others is no error: it is skipped, counted and described in the
    result.
    """
    path = Path(path)
    unknown = sorted(set(objects) - set(OBJECTS))
    if unknown or not objects:
        raise InputError(
            f"--objects {','.join(unknown)}: expected names of {', '.join(OBJECTS)} with commas between them"
        )
    data = read_bytes(path)
    looks = looks_like(data)
    if file_format is None:
        as_named = path.name.lower().endswith((".geojson", ".geojson.gz")) or data.strip() == b"[]"
        file_format = looks or ("qupath" if as_named else None)
    if looks is not None and looks != file_format:
        raise InputError(f"{path}: looks like {looks}, not {file_format}; give --format {looks}, or move it away")
    other = next((kind for start, kind in OTHERS.items() if start.match(data[: 2**16].lstrip(BLANK))), None)
    if looks is None and other is not None:
        raise InputError(f"{path}: is {other}, which is not read; export the outlines as GeoJSON for --format qupath")
    if file_format is None:
        raise InputError(f"{path}: its format is not known; expected one of {', '.join(FORMATS)}")
    try:
        if file_format == "exact":
            return read_exact(path, data, Path(types) if types is not None else None)
        if file_format == "qupath":
            return read_geojson(path, data, objects)
        if file_format in {"labelme", "points"}:
            return (read_labelme if file_format == "labelme" else read_points)(path, data, point_px)
        readers = {
            "asap": read_asap,
            "aperio": read_aperio,
            "halo": read_aperio,
            "sliderunner": read_sliderunner,
            "coco": read_coco,
        }
        return readers[file_format](path, data)
    except GEOSException as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: an outline cannot be made valid ({reason}); draw it again") from error


def read_all(
    folder_or_file: str | Path,
    file_format: Format,
    *,
    types: str | Path | None = None,
    objects: Collection[str] = (ANNOTATION,),
) -> list[AnnotationFile]:
    """Read the annotation files of a folder, or one file; objects without any annotation are an InputError."""
    paths = annotation_files(folder_or_file, file_format)
    files = [read_annotations(path, file_format, types=types, objects=objects) for path in paths]
    skipped: Counter[str] = sum((file.skipped for file in files), Counter())
    if skipped and not any(file.annotations for file in files):
        found = ", ".join(f"{count:,} x {reason}" for reason, count in sorted(skipped.items()))
        raise InputError(f"{folder_or_file}: no annotation with an area; found {found}")
    return files


def looks_like(data: bytes) -> Format | None:
    """Return the format that the beginning of a file shows, or None."""
    if data.startswith(SQLITE):
        return "sliderunner"
    head = data[: 2**16].lstrip(BLANK)
    if head.startswith(b"<"):
        root = ROOT.search(head)
        if root is None or root[1] != b"Annotations":
            return "asap" if root and root[1] == b"ASAP_Annotations" else None
        return "halo" if HALO.search(head) else "aperio" if APERIO.search(head) else None
    if head.startswith((b"{", b"[")):
        qupath, exact = QUPATH.search(head), EXACT.search(head)
        if qupath and exact:
            return "qupath" if qupath.start() < exact.start() else "exact"
        of_images = (kind for kind, sign in OF_IMAGES.items() if sign.search(head))
        return "qupath" if qupath else "exact" if exact else next(of_images, None)
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
    """Return the files of a folder without hidden ones, such as those that macOS puts beside each file."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(file for file in files if file.is_file() and not file.name.startswith("."))


def match_annotations(slides: Iterable[str], files: Sequence[AnnotationFile]) -> dict[str, list[Annotation]]:
    """Give every slide its annotations.

    A file belongs to the slide whose name it has, whatever but a number follows after a dot (``a.svs`` and
    ``a.qupath.json``); if several fit, to the slide with the longest name. Annotations that name their slide, as
    EXACT's do, belong to it.

    Raises InputError where a slide has no annotations or annotations no slide, with the names of both sides.
    """
    matched: dict[str, list[Annotation]] = {slide: [] for slide in slides}
    found: dict[str, list[str]] = {}  # files of each slide
    strays: set[str] = set()
    for file in files:
        for source in file.slides or (None,):
            name = source or file.path.name
            slide = slide_of(name, matched)
            if slide is None:
                strays.add(name)
            else:
                _check_repeated(
                    slide, found.setdefault(slide, []), file.path.name, matched[slide], file.of_slide(source)
                )
                matched[slide].extend(file.of_slide(source))
    bare = matched.keys() - found.keys()
    if bare or strays:
        faults = [f"no {what} for {first_names(of)}" for what, of in (("annotations", bare), ("slide", strays)) if of]
        cased = next(((n, s) for n in sorted(strays) for s in bare if slide_of(n.lower(), [s.lower()])), ())
        raise InputError(
            f"slides and annotations do not match: {', '.join(faults)}; give both the same name, "
            + (f"in capitals and small letters too ({cased[0]} for {cased[1]}), " if cased else "")
            + "or move files that are not to be imported to another folder"
        )
    return matched


def _check_repeated(
    slide: str, before: list[str], name: str, known: Sequence[Annotation], more: Sequence[Annotation]
) -> None:
    """Say that a slide has a further file of annotations; raise InputError where an outline is in both."""
    if before and name not in before:
        outlines = {(a.label, a.polygon.wkb) for a in known}
        twice = sum((a.label, a.polygon.wkb) in outlines for a in more)
        if twice:
            raise InputError(
                f"slide {slide}: {name} repeats {twice} outlines of {before[0]}; move the older file to another folder"
            )
        warnings.warn(
            f"slide {slide} has several files of annotations, {', '.join([*before, name])}; all are imported",
            CounterstainWarning,
            stacklevel=2,
        )
    before.append(name)


def slide_of(name: str, slides: Iterable[str]) -> str | None:
    """Return the longest slide's name that ``name`` is or continues after a dot; not with a number (12, 12.1)."""
    name = unicodedata.normalize("NFC", name)
    bare = slide_name(name.removesuffix(DEEPZOOM_OF_EXACT))
    fitting = (s for s in slides if bare == s or (name.startswith(f"{s}.") and not NUMBERED.match(name[len(s) :])))
    return max(fitting, key=len, default=None)


def first_names(names: Iterable[str]) -> str:
    """Return the first of some names in their order, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
