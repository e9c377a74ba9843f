"""Procedural HER2 tissue with exact masks: the cohort that anybody can make."""

from counterstain.data.phantom.layout import lay_out
from counterstain.data.phantom.render import regions_of_slide, render, write_phantom
from counterstain.data.phantom.styles import (
    PhantomConfig,
    SlideStyle,
    index_of,
    slide_name,
    slide_style,
    style_from_vector,
    style_vector,
)

__all__ = [
    "PhantomConfig",
    "SlideStyle",
    "index_of",
    "lay_out",
    "regions_of_slide",
    "render",
    "slide_name",
    "slide_style",
    "style_from_vector",
    "style_vector",
    "write_phantom",
]
