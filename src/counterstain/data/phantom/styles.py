"""How the slides of a phantom differ, drawn from the seed and the number of the slide alone.

Every quantity that is positive varies log-normally about a median, so that its spread is one number.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, model_validator

from counterstain.config import Config
from counterstain.errors import InputError
from counterstain.seeding import numpy_generator

Share = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(ge=0, le=1000)]
Size = Annotated[float, Field(gt=0, le=1000)]
Vector = tuple[float, float, float]

GOLDEN = 0.6180339887498949  # its multiples fill 0..1 evenly, so any number of slides has the wanted scores
# Optical density of red, green, blue. Ruifrok & Johnston 2001 give 0.650, 0.704, 0.286 and 0.268, 0.570, 0.776; slide
# scanners show haematoxylin a little bluer and DAB a little less red.
HAEMATOXYLIN = (0.698, 0.652, 0.296)
DAB = (0.322, 0.571, 0.755)
GLASS = (0.950, 0.947, 0.955)  # light that passes where there is no tissue


class PhantomConfig(Config):
    """A cohort of procedural HER2 tissue."""

    slides: Annotated[int, Field(ge=1, le=1000)] = 40
    """Slides, one per patient."""
    regions_per_slide: Annotated[int, Field(ge=1, le=100)] = 10
    """Regions of every slide."""
    size_px: Annotated[int, Field(ge=16, le=4096)] = 256
    """Edge of the square regions in pixels."""
    mpp: Annotated[float, Field(ge=0.1, le=4)] = 1.0
    """Micrometres per pixel."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Every slide follows from this number and its own; a larger cohort begins with the slides of a smaller one."""
    prevalence: tuple[Share, Share, Share, Share] = (0.12, 0.23, 0.30, 0.35)
    """Share of the slides whose dominant score is 0, 1+, 2+, 3+; they sum to 1."""
    purity: Share = 0.9
    """Probability that an invasive nest has the dominant score of its slide."""
    style_strength: Factor = 1.0
    """How strongly slides differ: 0 = all alike."""
    pleomorphism: Factor = 1.0
    """Factor on how much tumour nuclei differ from benign ones in size and texture; smaller is harder."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if abs(sum(self.prevalence) - 1) > 1e-6:
            raise ValueError(f"prevalence must sum to 1, found {sum(self.prevalence):g} of {list(self.prevalence)}")
        return self


class SlideStyle(Config):
    """Everything by which one slide differs from another; densities are optical densities, rates per 256 um square."""

    dominant_score: Annotated[int, Field(ge=0, le=3)] = 2  # HER2 score of most nests
    purity: Share = 0.9  # probability that an invasive nest has the dominant score
    duct_share: Share = 0.15  # probability that an instance is an LCIS/DCIS duct
    tumour_share: Share = 0.36  # share of a region that is tumour, on average
    nest_radius_um: Size = 24.0  # half the width of a typical nest
    nest_length: Factor = 1.0  # length of the nests beyond their width, in radii: 0 = round, 4 = cords
    haematoxylin_vector: Vector = HAEMATOXYLIN  # optical density of red, green and blue at a unit of haematoxylin
    dab_vector: Vector = DAB  # optical density of red, green and blue at a unit of DAB
    haematoxylin_strength: Factor = 1.0  # factor on the counterstain
    dab_strength: Factor = 1.0  # factor on the membrane stain
    dab_background: Factor = 0.03  # DAB that lies on everything
    edge_staining: Factor = 0.03  # DAB of stroma that is stained in places
    glass: Vector = GLASS  # light that passes where there is no tissue
    haze: Factor = 0.03  # share of the light that is veil
    illumination: Factor = 0.02  # rise of the light over a region
    blur_um: Factor = 0.55  # standard deviation of the optics' point spread
    noise: Factor = 0.012  # standard deviation of the camera's noise, as a share of the full scale
    cell_size_um: Size = 13.5  # distance of neighbouring tumour cells
    nucleus_share: Factor = 0.32  # radius of a tumour nucleus as a share of the cell size
    pleomorphism: Factor = 0.18  # spread of the logarithm of nuclear radii
    nucleoli: Factor = 0.6  # strength of nucleoli and coarse chromatin
    cytoplasm: Factor = 0.11  # counterstain of tumour cytoplasm
    clefts: Factor = 0.3  # how often nests have shrunk away from the stroma
    stroma_density: Factor = 1.0  # factor on the counterstain of fibres
    fibre_wave_um: Factor = 9.0  # amplitude of the waves of fibres
    fibroblasts: Factor = 1.0  # factor on the number of spindle cells
    lymphocytes: Factor = 1.0  # factor on the number of lymphocytes
    benign: Factor = 1.0  # factor on the number of benign glands
    fat: Factor = 1.0  # factor on the number of fat cells and gaps
    smears: Factor = 0.25  # brown smears
    folds: Factor = 0.06  # folds
    defocus: Factor = 0.15  # places out of focus
    precipitate: Factor = 0.3  # clusters of DAB precipitate


# Spread of the logarithm over slides; the median is the default of SlideStyle.
_SPREADS = {
    "tumour_share": 0.15, "nest_radius_um": 0.25, "nest_length": 0.7,
    "haematoxylin_strength": 0.28, "dab_strength": 0.16, "dab_background": 0.6, "edge_staining": 0.9,
    "haze": 0.7, "illumination": 0.7, "blur_um": 0.3, "noise": 0.3,
    "cell_size_um": 0.12, "nucleus_share": 0.06, "pleomorphism": 0.3, "nucleoli": 0.4,
    "cytoplasm": 0.25, "clefts": 0.7,
    "stroma_density": 0.3, "fibre_wave_um": 0.4, "fibroblasts": 0.35, "lymphocytes": 0.6, "benign": 0.5, "fat": 0.7,
    "smears": 0.7, "folds": 0.5, "defocus": 0.6, "precipitate": 0.7, "duct_share": 0.5,
}  # fmt: skip

_OF_LAYOUT = {"tumour_share", "nest_radius_um", "nest_length", "duct_share"}
_VISIBLE = tuple(name for name in _SPREADS if name not in _OF_LAYOUT)
_COLOURS = ("haematoxylin_vector", "dab_vector", "glass")
_SMALLEST, _LARGEST = 1e-6, 1e3  # what logarithms of quantities that are 0 become; what a SlideStyle takes


def slide_name(index: int) -> str:
    """Return the name of a slide, ``phantom-007``."""
    return f"phantom-{index:03d}"


def patient_name(seed: int, index: int) -> str:
    """Return the name of the patient of a slide, ``P0-007``; cohorts of different seeds share no patient."""
    return f"P{seed}-{index:03d}"


def index_of(slide: str) -> int:
    """Return the number of a slide from its name; raises InputError where no slide of a phantom has such a name."""
    prefix, _, number = slide.rpartition("-")
    if prefix != "phantom" or not (number.isascii() and number.isdigit()):
        raise InputError(f"slide {slide!r}: not a slide of a phantom; expected a name such as {slide_name(7)}")
    return int(number)


def slide_style(config: PhantomConfig, slide_index: int) -> SlideStyle:
    """Draw the style of a slide."""

    def deviate(name: str) -> float:
        rng = numpy_generator(config.seed, "style", slide_index, name)
        return float(np.clip(rng.standard_normal(), -2, 2)) * config.style_strength

    defaults = SlideStyle().model_dump()
    values: dict[str, Any] = {
        name: defaults[name] * np.exp(spread * deviate(name) - (spread**2 / 2 if name == "duct_share" else 0))
        for name, spread in _SPREADS.items()
    }
    values["pleomorphism"] *= config.pleomorphism
    values["nucleoli"] *= config.pleomorphism
    values["duct_share"] = min(values["duct_share"], 1.0)
    values["tumour_share"] = min(values["tumour_share"], 0.9)
    place = (numpy_generator(config.seed, "scores").random() + GOLDEN * slide_index) % 1.0
    glass = np.clip(np.array(GLASS) + [0.012 * deviate(f"glass {c}") for c in "rgb"], 0.8, 0.99).round(6)
    return SlideStyle(
        **{name: round(float(value), 6) for name, value in values.items()},
        purity=config.purity,
        dominant_score=int(np.searchsorted(np.cumsum(config.prevalence)[:3], place, side="right")),
        haematoxylin_vector=_tinted(HAEMATOXYLIN, [0.045 * deviate(f"haematoxylin {c}") for c in "rgb"]),
        dab_vector=_tinted(DAB, [0.04 * deviate(f"dab {c}") for c in "rgb"]),
        glass=tuple(glass.tolist()),
    )


def style_vector(style: SlideStyle) -> np.ndarray:
    """Return what of a style shows in a picture, (S,) float: logarithms of quantities, then the colours."""
    quantities = [np.log(max(getattr(style, name), _SMALLEST)) for name in _VISIBLE]
    return np.array([*quantities, *(value for name in _COLOURS for value in getattr(style, name))])


def style_from_vector(vector: np.ndarray) -> SlideStyle:
    """Return the style that a vector stands for; those between and beyond two styles' vectors are styles as well."""
    quantities = np.exp(vector[: len(_VISIBLE)].astype(np.float64)).clip(_SMALLEST, _LARGEST)
    colours = vector[len(_VISIBLE) :].astype(np.float64).reshape(len(_COLOURS), 3)
    haematoxylin, dab, glass = (tuple(colour.tolist()) for colour in colours)
    return SlideStyle(
        **dict(zip(_VISIBLE, quantities.tolist(), strict=True)),
        haematoxylin_vector=_tinted(haematoxylin, [0.0] * 3),
        dab_vector=_tinted(dab, [0.0] * 3),
        glass=glass,
    )


def _tinted(vector: Vector, shift: list[float]) -> Vector:
    tinted = np.clip(np.array(vector) + shift, 0.05, None)
    red, green, blue = (tinted / np.linalg.norm(tinted)).round(6).tolist()
    return red, green, blue
