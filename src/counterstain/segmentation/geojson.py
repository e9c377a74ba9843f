"""Areas of tumour as GeoJSON that QuPath opens (File > Import objects, or by dropping the file on the slide).

Measurements are a list of name and value, as QuPath wrote it before version 0.4: newer ones read both, older ones no
other.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from shapely import Polygon

from counterstain.storage import replacing

ObjectType = Literal["annotation", "detection"]
DECIMALS = 2  # of a level-0 pixel
TUMOUR_COLOUR = (200, 0, 0)  # QuPath's own for tumour
HEAD_BYTES = 4096
_NAMESPACE = uuid.UUID("5f0c1bd4-6a40-4c1e-9f53-2d0f9b7d6a11")


class Outlined(NamedTuple):
    """An area of tumour on a slide."""

    polygon: Polygon
    """In level-0 pixels."""
    mean_probability: float
    area_um2: float
    region: str


def write_geojson(
    path: Path,
    areas: Iterable[Outlined],
    *,
    label: str,
    object_type: ObjectType,
    offset_xy_level0_px: tuple[int, int],
    about: dict[str, Any],
) -> None:
    """Write areas in one step.

    Parameters
    ----------
    path : Path
    areas : iterable of Outlined
    label : str
        Class of all of them.
    object_type : ``annotation`` or ``detection``
    offset_xy_level0_px : x, y
        Where the coordinates of the file begin on the canvas.
    about : dict
        Where they come from; stands at the beginning, QuPath passes over it.
    """
    head = json.dumps({"type": "FeatureCollection", "counterstain": about}, ensure_ascii=False)
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(head[:-1] + ', "features": [')
        for number, area in enumerate(areas):
            feature = _feature(area, offset_xy_level0_px, str(uuid.uuid5(_NAMESPACE, f"{about} {number}")))
            feature["properties"] |= {
                "objectType": object_type,
                "classification": {"name": label, "color": list(TUMOUR_COLOUR)},
            }
            file.write((",\n" if number else "\n") + json.dumps(feature, ensure_ascii=False, allow_nan=False))
        file.write("\n]}\n")


def is_written(path: Path, fingerprint: str) -> bool:
    """Whether a file holds the areas that this fingerprint, part of its ``about``, stands for."""
    with path.open("rb") as file:
        return fingerprint.encode() in file.read(HEAD_BYTES)


def _feature(area: Outlined, offset: tuple[int, int], identifier: str) -> dict[str, Any]:
    rings = [area.polygon.exterior, *area.polygon.interiors]
    measurements = {
        "Mean probability": round(area.mean_probability, 4),
        "Area um^2": round(area.area_um2, 2),
    }
    return {
        "type": "Feature",
        "id": identifier,
        "geometry": {
            "type": "Polygon",
            "coordinates": [np.round(np.asarray(ring.coords) - offset, DECIMALS).tolist() for ring in rings],
        },
        "properties": {
            "isLocked": False,
            "measurements": [{"name": name, "value": value} for name, value in measurements.items()],
            "metadata": {"region": area.region},
        },
    }
