"""What tells one kind of export from another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from counterstain.data.export.contents import Contents, Row
from counterstain.data.export.labels import ExportedLabels

IMAGE, LABELS, INSTANCES = "image", "labels", "instances"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A kind of export."""

    places: Callable[[Row], Mapping[str, str]]
    """Which files a row has: ``image``, ``labels`` and perhaps ``instances`` -> path in the export."""
    lookup: Callable[[ExportedLabels], np.ndarray]
    """Final value of every label, (256,) uint8."""
    check: Callable[[Path, Contents, ExportedLabels], None]
    """Raise InputError where the contents cannot be laid out so."""
    finish: Callable[[Path, Contents, ExportedLabels], None]
    """Write the tables, when all images are there."""
