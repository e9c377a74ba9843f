"""Slide files: which reader opens one, which resolution holds, which slides lie in a folder."""

from __future__ import annotations

import math
from pathlib import Path

import openslide
import tifffile

from counterstain.data.slide_openslide import OpenSlideSource
from counterstain.data.slide_source import SlideSource, reason
from counterstain.data.slide_tiff import TiffSource
from counterstain.errors import InputError

PLAUSIBLE_MPP = (0.01, 20.0)  # outside, the file's value is a screen's or printer's resolution, not a scanner's
MAX_ANISOTROPY = 0.01
MAX_CONTRADICTION = 0.05
SUFFIXES = (
    ".bif", ".dcm", ".mrxs", ".ndpi", ".ome.tif", ".ome.tiff", ".scn", ".svs", ".svslide", ".tif", ".tiff", ".vms",
    ".vmu",
)  # fmt: skip
_TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def list_slides(folder: Path) -> dict[str, Path]:
    """Return the slides of a folder, or the one slide that is given, by name.

    A slide's name is its file's without the suffix. A subfolder of DICOM files is one slide with the folder's name.

    Raises
    ------
    InputError
        No such folder, no slide in it, or two slides of one name.
    """
    if folder.is_file():
        return {slide_name(folder): folder}
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of slides")
    slides: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        file = _dicom_of(path) if path.is_dir() else path
        if file is None or not file.name.lower().endswith(SUFFIXES) or path.name.startswith("."):
            continue
        name = path.name if path.is_dir() else slide_name(path)
        if name in slides:
            raise InputError(f"{folder}: {slides[name].name} and {path.name} are both slide {name!r}; rename one")
        slides[name] = file
    if not slides:
        raise InputError(f"{folder}: no slide in it; expected files ending in {', '.join(SUFFIXES)}")
    return slides


def slide_name(path: str | Path) -> str:
    """Return a file's name without the suffix of a slide (``a.b.ome.tiff`` is ``a.b``)."""
    name = Path(path).name
    suffix = max((end for end in SUFFIXES if name.lower().endswith(end)), key=len, default="")
    return name[: len(name) - len(suffix)] or name


def _dicom_of(folder: Path) -> Path | None:
    """Return a DICOM file of a folder; OpenSlide finds the other levels beside it."""
    return min(folder.glob("*.dcm"), default=None)


def open_source(path: Path) -> SlideSource:
    """Open a slide file with the reader that serves it best.

    Raises
    ------
    InputError
        The file is missing, damaged or no slide.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such slide file")
    if not _is_tiff(path):
        return _open_openslide(path)
    if _is_ome(path):
        return _open_tifffile(path)  # OpenSlide does not know OME's resolution
    if openslide.OpenSlide.detect_format(path) in {None, "generic-tiff"}:
        return _open_plain_tiff(path)
    return _open_openslide(path)


def _open_openslide(path: Path) -> SlideSource:
    try:
        return OpenSlideSource(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        if path.suffix.lower() == ".mrxs" and not (path.with_suffix("") / "Slidedat.ini").is_file():
            raise InputError(
                f"{path}: its folder {path.stem!r} with Slidedat.ini is missing beside it; copy both"
            ) from error
        raise InputError(
            f"{path}: not a slide that can be read; expected a format of OpenSlide (MIRAX, SVS, NDPI, BIF, DICOM, …), "
            "OME-TIFF or RGB TIFF"
        ) from error
    except openslide.OpenSlideError as error:
        raise InputError(f"{path}: damaged or not whole ({reason(error)}); copy or export the slide again") from error


def _open_plain_tiff(path: Path) -> SlideSource:
    """Open a TIFF of no known vendor; OpenSlide reads tiled ones, tifffile those in strips."""
    try:
        return OpenSlideSource(path)
    except openslide.OpenSlideError:
        return _open_tifffile(path)


def _open_tifffile(path: Path) -> SlideSource:
    try:
        return TiffSource(path)
    except InputError:
        raise
    except Exception as error:  # what tifffile raises on damaged files is not its own errors alone
        raise InputError(f"{path}: damaged or not whole ({reason(error)}); copy or export the slide again") from error


def _is_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in _TIFF_MAGICS


def _is_ome(path: Path) -> bool:
    try:
        with tifffile.TiffFile(path) as file:
            return bool(file.is_ome)
    except Exception:  # noqa: BLE001 # damaged in a way that the readers will name
        return False


def resolve_mpp(path: Path, found: tuple[float, float] | None, given: float | None) -> float:
    """Return the micrometres per level-0 pixel that hold: the user's where given, otherwise the file's.

    Raises
    ------
    InputError
        There is no value, the two contradict each other by more than 5 %, or the file's differ by more than 1 %
        between x and y.
    """
    if given is not None and not 0 < given < math.inf:
        raise InputError(f"{path}: --mpp-level0 {given}: expected micrometres per pixel above 0")
    if found is None or not all(PLAUSIBLE_MPP[0] <= value <= PLAUSIBLE_MPP[1] for value in found):
        if given is None:
            said = "" if found is None else f" that can be true ({found[0]:.4g})"
            raise InputError(f"{path}: the file has no resolution{said}; give it with --mpp-level0")
        return given
    mean = sum(found) / 2
    if abs(found[0] - found[1]) > MAX_ANISOTROPY * mean:
        raise InputError(
            f"{path}: pixels are not square, {found[0]:g} x {found[1]:g} mpp; save the slide with square pixels"
        )
    if given is not None and abs(given - mean) > MAX_CONTRADICTION * mean:
        raise InputError(
            f"{path}: --mpp-level0 {given:g} contradicts the file's {mean:g} mpp; "
            "leave the option away, or mend the file"
        )
    return mean if given is None else given
