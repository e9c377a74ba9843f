import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from counterstain.cli import phantom as command
from counterstain.data.cohort import Cohort
from counterstain.data.patches import label_mask
from counterstain.data.phantom import (
    PhantomConfig,
    SlideStyle,
    index_of,
    lay_out,
    regions_of_slide,
    render,
    slide_name,
    slide_style,
    write_phantom,
)
from counterstain.errors import ConfigError, InputError, MismatchError

SMALL = PhantomConfig(slides=3, regions_per_slide=2, size_px=64)


def disc(size=96, radius=34):
    y, x = np.ogrid[:size, :size]
    return (np.hypot(y - size / 2, x - size / 2) < radius).astype(np.int32)


def dab_amount(image, style):
    """Amount of DAB by colour deconvolution (Ruifrok & Johnston 2001)."""
    density = -np.log10(np.maximum(image / 255 / style.glass, 1e-2))
    dyes = np.array([style.haematoxylin_vector, style.dab_vector])
    return (density @ np.linalg.pinv(dyes))[..., 1]


def app():
    application = typer.Typer()
    command.register(application)
    return application


def test_same_arguments_give_the_same_picture():
    nest = disc()
    pictures = [render(nest * 3, nest, SlideStyle(), 7, mpp=1.0) for _ in range(2)]
    assert np.array_equal(*pictures)


def test_another_seed_gives_another_picture():
    nest = disc()
    assert not np.array_equal(*(render(nest * 3, nest, SlideStyle(), seed, mpp=1.0) for seed in (7, 8)))


def test_dab_grows_with_the_score():
    nest = disc()
    for style in (SlideStyle(), slide_style(PhantomConfig(), 4)):
        pictures = [render(nest * label, nest, style, 3, mpp=1.0) for label in (1, 2, 3, 4)]
        amounts = [dab_amount(picture, style)[nest > 0].mean() for picture in pictures]
        assert np.all(np.diff(amounts) > 0.01)
