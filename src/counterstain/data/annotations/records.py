"""What every annotation format becomes: labelled polygons in level-0 pixels."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shapely import MultiPolygon, Polygon

Shape = Literal["polygon", "multipolygon", "rectangle", "ellipse", "spline"]
UNCLASSIFIED = "Unclassified"


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """One outlined instance, or the rectangle of a region."""

    id: str
    """Unique in its file and the same every time the file is read."""
    label: str
    """As the source names it; ``LABELS.yaml`` says which subtype that is."""
    polygon: Polygon | MultiPolygon
    """Valid, with an area, in level-0 pixels: pixel (column 0, row 0) covers x 0..1 and y 0..1."""
    slide: str | None = None
    """File name of the slide as the source gives it, without folders; None where the format has none."""
    kind: Shape = "polygon"
    """What was drawn; ``rectangle`` whenever the outline is one, upright."""
    colour: str | None = None
    """As ``#rrggbb``."""


@dataclass(frozen=True, kw_only=True)
class AnnotationFile:
    """The annotations of one file, with what was left out."""

    path: Path
    file_format: str
    annotations: tuple[Annotation, ...]
    skipped: Counter[str] = field(default_factory=Counter)
    """Reason -> objects that cannot become an instance: points, lines, deleted rows, outlines without area."""
    repaired: int = 0
    """Polygons that crossed themselves and were made valid."""

    @property
    def slides(self) -> tuple[str, ...]:
        """Names of the slides that the source gives, in order of appearance; empty where the format has none."""
        return tuple(dict.fromkeys(a.slide for a in self.annotations if a.slide is not None))

    @property
    def labels(self) -> Counter[str]:
        """Label -> annotations that carry it."""
        return Counter(a.label for a in self.annotations)

    def of_slide(self, slide: str | None) -> tuple[Annotation, ...]:
        """Return the annotations of one slide; None gives those without a slide's name."""
        return tuple(a for a in self.annotations if a.slide == slide)
