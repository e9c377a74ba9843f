"""Which annotations and which patient belong to which slide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from counterstain.data.annotations import Annotation, AnnotationFile
from counterstain.data.csv_table import csv_rows
from counterstain.data.slide_files import slide_name
from counterstain.errors import InputError

SHOWN_NAMES = 5
DEEPZOOM_OF_EXACT = ".dzi"  # EXACT names some images so


@dataclass(frozen=True, slots=True)
class Patient:
    """Whose slide it is."""

    patient: str
    score: str | None = None
    """Score of the slide."""
    mpp_level0: float | None = None
    """Micrometres per level-0 pixel of the slide, where its file does not say."""


def match_annotations(slides: Iterable[str], files: Sequence[AnnotationFile]) -> dict[str, list[Annotation]]:
    """Give every slide its annotations.

    A file belongs to the slide whose name it has, whatever follows after a dot (``a.svs`` and ``a.qupath.json``); of
    several slides that fit, to that with the longest name. Annotations that name their slide themselves, as EXACT's
    do, belong to it.

    Raises
    ------
    InputError
        A slide without annotations or annotations without a slide; lists the names of both sides.
    """
    matched: dict[str, list[Annotation]] = {slide: [] for slide in slides}
    found: set[str] = set()
    strays: dict[str, None] = {}
    for file in files:
        for source in file.slides or (None,):
            name = source or file.path.name
            slide = _slide_of(name, matched)
            if slide is None:
                strays[name] = None
            else:
                found.add(slide)
                matched[slide].extend(file.of_slide(source))
    bare = [slide for slide in matched if slide not in found]
    if bare or strays:
        raise InputError(
            "slides and annotations do not match: "
            + ", ".join(f"no {what} for {_listed(of)}" for what, of in (("annotations", bare), ("slide", strays)) if of)
            + "; give both the same name, or move away what is not to be imported"
        )
    return matched


def read_patients(path: Path, slides: Iterable[str]) -> dict[str, Patient]:
    """Read whose slides they are from a CSV table with the columns slide, patient and perhaps score and mpp_level0.

    Raises
    ------
    InputError
        A column or a slide is missing, a field is empty, a resolution is not above 0, or a slide stands there twice.
    """
    patients: dict[str, Patient] = {}
    for place, row in csv_rows(path, ("slide", "patient"), ("score", "mpp_level0")):
        slide, patient = slide_name(row["slide"]), row["patient"]
        if not slide or not patient:
            raise InputError(f"{place}: slide or patient is empty; fill it in")
        if slide in patients:
            raise InputError(f"{place}: slide {slide} stands there twice; remove one row")
        patients[slide] = Patient(patient, row.get("score") or None, _resolution(place, row.get("mpp_level0")))
    missing = [slide for slide in slides if slide not in patients]
    if missing:
        raise InputError(f"{path}: no row for {_listed(missing)}; add one for every slide")
    return patients


def _resolution(place: str, text: str | None) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"{place}: mpp_level0 {text!r}: expected micrometres per pixel above 0, such as 0.25")
    return value


def _slide_of(name: str, slides: Mapping[str, object]) -> str | None:
    """Return the longest slide's name that ``name`` is or continues after a dot."""
    bare = slide_name(name.removesuffix(DEEPZOOM_OF_EXACT))
    fitting = [slide for slide in slides if bare == slide or name.startswith(f"{slide}.")]
    return max(fitting, key=len, default=None)


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
