"""The gallery of patches: pictures with what is known of them, as the page's template and script want it."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from counterstain.errors import StorageError
from counterstain.report.arms import CEILING, is_oracle
from counterstain.taxonomy import BACKGROUND, IGNORE, Taxonomy

REAL = "real"
_COLUMNS = (
    "number", "method", "image", "mask", "source", "region", "slide", "patient", "y_px", "x_px", "attempts",
    "before", "after", "area_px",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One patch."""

    number: int
    method: str
    """``real``, or the name of a synthetic set."""
    image: str
    """Data URI."""
    mask: str
    """Data URI of its labels in the taxonomy's colours."""
    source: int
    """Number of the real patch whose mask it has, with other labels."""
    region: str
    slide: str
    patient: str
    y_px: int
    x_px: int
    attempts: int
    """Images drawn until the filter let one pass; 0 for real patches."""
    labels: tuple[tuple[str, str, int], ...]
    """Old subtype, new subtype and area in pixels of every instance."""

    @property
    def subtypes(self) -> tuple[str, ...]:
        """What it shows, the largest area first."""
        areas: dict[str, int] = {}
        for _, after, area in self.labels:
            areas[after] = areas.get(after, 0) + area
        return tuple(sorted(areas, key=lambda name: (-areas[name], name)))

    @property
    def is_real(self) -> bool:
        """Whether it is no synthetic one."""
        return self.method == REAL

    @property
    def about(self) -> dict[str, Any]:
        """What the page's script shows when it is clicked on."""
        names = ("number", "method", "mask", "source", "region", "slide", "patient", "y_px", "x_px", "attempts")
        return {name: getattr(self, name) for name in (*names, "labels")}


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """All pictures of a page."""

    pictures: tuple[Picture, ...]
    taxonomy: Taxonomy

    @property
    def filters(self) -> dict[str, list[str]]:
        """What can be chosen by: name -> values."""
        return {
            "method": list(dict.fromkeys(picture.method for picture in self.sorted)),
            "subtype": [name for name in self.taxonomy.names if any(name in p.subtypes for p in self.pictures)],
            "slide": sorted({picture.slide for picture in self.pictures}),
            "patient": sorted({picture.patient for picture in self.pictures}),
        }

    @cached_property
    def sorted(self) -> list[Picture]:
        """Each real patch followed by what was made of it."""
        return sorted(self.pictures, key=lambda picture: (picture.source, not picture.is_real, picture.number))

    @property
    def colours(self) -> dict[str, str]:
        """Subtype -> colour in the masks."""
        return {subtype.name: subtype.colour for subtype in self.taxonomy.subtypes}

    def label_of(self, method: str) -> str:
        """Return a method as the page writes it."""
        return f"{method} ({CEILING})" if is_oracle(method) else method


def read_gallery(folder: Path, taxonomy: Taxonomy) -> Gallery:
    """Read ``gallery.parquet`` of a results folder; empty where it is missing.

    Raises
    ------
    StorageError
        It is damaged.
    """
    path = folder / "gallery.parquet"
    if not path.exists():
        return Gallery(pictures=(), taxonomy=taxonomy)
    try:
        table = pd.read_parquet(path, columns=list(_COLUMNS))
        pictures = tuple(_picture(row, taxonomy) for row in table.to_dict("records"))
    except (ValueError, OSError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise StorageError(f"{path}: damaged ({reason}); delete it and give the study's command again") from error
    return Gallery(pictures=pictures, taxonomy=taxonomy)


def _picture(row: dict[Any, Any], taxonomy: Taxonomy) -> Picture:
    labels = zip(row["before"], row["after"], row["area_px"], strict=True)
    values: dict[str, Any] = {name: str(row[name]) for name in ("method", "region", "slide", "patient")}
    values |= {name: int(row[name]) for name in ("number", "source", "y_px", "x_px", "attempts")}
    return Picture(
        **values,
        image=_data_uri(row["image"], "webp"),
        mask=_data_uri(row["mask"], "png"),
        labels=tuple((_name(before, taxonomy), _name(after, taxonomy), int(area)) for before, after, area in labels),
    )


def _data_uri(content: bytes, form: str) -> str:
    return f"data:image/{form};base64,{base64.b64encode(content).decode()}"


def _name(label: int, taxonomy: Taxonomy) -> str:
    return {BACKGROUND: "background", IGNORE: "ignored"}.get(int(label)) or taxonomy.name_of(int(label))
