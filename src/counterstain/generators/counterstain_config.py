"""Settings of the counterstain that a denoiser is shown."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from counterstain.config import Config

NUCLEUS_UM = 8.0


class CounterstainConfig(Config):
    """A denoiser that is also shown where the nuclei of the real patch lie."""

    other_stain: Literal["dab", "eosin"] = "dab"
    """What haematoxylin is unmixed from."""
    shows: Literal["structure", "contrast"] = "structure"
    """Differences to the surroundings in units of their spread, or in optical density. The second keeps how dark nuclei
    are, which a mask and a style tell badly; it suits where unmixing makes no nucleus paler under another stain."""
    local_px: Annotated[float, Field(gt=0, le=256)] | None = None
    """Standard deviation in pixels of the surroundings that haematoxylin is compared with; None = 8 um, about a
    nucleus, at the scale of the cohort."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of training samples without it, so that images can be drawn for masks alone."""

    def at(self, mpp: float) -> CounterstainConfig:
        """Return these settings with a width in pixels, at a scale in micrometres per pixel."""
        return self if self.local_px is not None else self.model_copy(update={"local_px": NUCLEUS_UM / mpp})
