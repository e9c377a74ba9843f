"""Annotations of slides: EXACT, QuPath GeoJSON, ASAP XML and Aperio XML as labelled polygons in level-0 pixels."""

from counterstain.data.annotations.exact_live import ExactServer, fetch_exact
from counterstain.data.annotations.read import (
    FORMATS,
    Format,
    annotation_files,
    files_of_other_formats,
    looks_like,
    read_annotations,
)
from counterstain.data.annotations.records import UNCLASSIFIED, Annotation, AnnotationFile

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
