"""Settings of style: how a denoiser learns it, and whose style images are drawn in."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from counterstain.config import Config

REFERENCES_OF_A_SLIDE = 64  # that those of a style are chosen from


class StyleConfig(Config):
    """A denoiser that is also given a style."""

    width: Annotated[int, Field(ge=4)] = 32
    """Features of the encoder's first layer."""
    code: Annotated[int, Field(ge=1)] = 16
    """Length of the learned code; six statistics of the stain are added to it."""
    references: Annotated[int, Field(ge=1, le=REFERENCES_OF_A_SLIDE)] = 8
    """Reference patches whose styles are averaged. One alone hardly says how strong a slide is stained, and what is
    drawn after it varies less between slides than tissue does."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of training samples without a style, so that images can be drawn without one."""


class StyleChoice(Config):
    """Whose style images are drawn in; slides other than an image's own are drawn by its seed."""

    source: Literal["none", "own", "other", "mixture", "beyond"] = "none"
    """``none``: no style is given (SPADE: a random code; the oracle: ``own``); ``own``: of the slide that the mask is
    from; ``other``: of another training slide; ``mixture``: between two training slides, in any ratio; ``beyond``: from
    one training slide through a second and past it."""
    step: Annotated[float, Field(gt=0, le=2)] = 0.3
    """How far past the second slide ``beyond`` goes, as a share of the way between the two."""
