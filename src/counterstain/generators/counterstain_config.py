"""Settings of the counterstain that a denoiser is shown."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from counterstain.config import Config


class CounterstainConfig(Config):
    """A denoiser that is also shown where the nuclei of the real patch lie."""

    other_stain: Literal["dab", "eosin"] = "dab"
    """What haematoxylin is unmixed from."""
    local_px: Annotated[float, Field(gt=0, le=64)] = 4.0
    """Standard deviation in pixels of the surroundings that haematoxylin is compared with: about a nucleus."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of training samples without it, so that images can be drawn for masks alone."""
