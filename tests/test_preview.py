from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
from drawn_cohort import HER2, draw_cohort
from drawn_requests import FakeGenerator
from PIL import Image
from typer.testing import CliRunner

import counterstain as cs
from counterstain.cli import app
from counterstain.data.phantom import write_phantom
from counterstain.data.phantom.styles import PhantomConfig
from counterstain.data.relabel import RelabelConfig
from counterstain.data.sampling import SamplingConfig
from counterstain.data.split import SplitConfig, split_cohort
from counterstain.errors import CounterstainError, InputError
from counterstain.report.patch_figures import redrawn_as_every_subtype
from counterstain.synthesis.masks import SynthesisConfig
from counterstain.synthesis.redraw import preview
from counterstain.taxonomy import IGNORE


class Painter(FakeGenerator):
    """A generator that paints what is to be redrawn in the colour of its label."""

    method = "inpainting"

    def __init__(self):
        self.seeds = []

    def paint(self, label_masks, seeds, images, redraw):
        self.seeds.append(list(seeds))
        return np.where(redraw[..., None], HER2.palette[label_masks], images)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return draw_cohort(tmp_path_factory.mktemp("cohort") / "c")


@pytest.fixture(scope="module")
def small_phantom(tmp_path_factory):
    config = PhantomConfig(slides=12, regions_per_slide=1, size_px=64, mpp=2.0)
    folder = tmp_path_factory.mktemp("phantom") / "c"
    return split_cohort(write_phantom(config, folder), SplitConfig(train=10, val=1, test=1))[0]


def rows_of(cohort, *, generator=None, config=None, **changes):
    settings = {"size_px": 32, "seed": 0, "per_subtype": 2} | changes
    return preview(generator or Painter(), cohort, config or SynthesisConfig(), **settings)


def of_keeping(*names):
    return SynthesisConfig(relabel=RelabelConfig(keep=names))


def test_every_subtype_is_redrawn_as_every_subtype(cohort):
    rows = rows_of(cohort)
    assert [row.subtype for row in rows] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    for row in rows:
        assert (row.patch.label_mask == row.subtype).any()
        assert row.patch.source.patient in cohort.patients("train")
        inside = (row.patch.label_mask > 0) & (row.patch.label_mask != IGNORE)
        for subtype, image in row.drawn.items():
            assert (image[inside] == HER2.palette[subtype]).all()
            assert np.array_equal(image[~inside], row.patch.image[~inside])


def test_the_images_of_a_row_are_of_one_noise_and_those_of_another_seed_of_another(cohort):
    first, again, other = Painter(), Painter(), Painter()
    for painter, seed in ((first, 0), (again, 0), (other, 1)):
        rows_of(cohort, generator=painter, seed=seed)
    assert all(len(set(seeds)) == 1 for seeds in first.seeds)
    assert len({seeds[0] for seeds in first.seeds}) == len(first.seeds)
    assert first.seeds == again.seeds
    assert not set(map(tuple, first.seeds)) & set(map(tuple, other.seeds))


def test_more_patches_of_a_subtype_begin_with_the_fewer(cohort):
    few, more = rows_of(cohort, per_subtype=1), rows_of(cohort, per_subtype=2)
    assert [row.patch.source for row in few] == [row.patch.source for row in more[::2]]


def test_subtypes_that_keep_their_label_are_neither_redrawn_nor_asked_for(cohort):
    rows = rows_of(cohort, config=of_keeping("LCIS/DCIS", "HER2 0"))
    assert {row.subtype for row in rows} == {2, 3, 4}
    for row in rows:
        assert set(row.drawn) == {2, 3, 4}
        kept = np.isin(row.patch.label_mask, [1, 5])
        assert all(np.array_equal(image[kept], row.patch.image[kept]) for image in row.drawn.values())


def test_a_cohort_of_which_nothing_may_be_redrawn_says_so(cohort):
    sampling = SamplingConfig(background_share=1.0)
    config = of_keeping(*HER2.names).model_copy(update={"sampling": sampling})
    with pytest.raises(CounterstainError, match="no instance that may be redrawn"):
        rows_of(cohort, config=config)


def test_the_picture_names_the_subtypes_and_the_scale(cohort):
    figure = redrawn_as_every_subtype(rows_of(cohort), HER2, mpp=cohort.mpp)
    figure.draw_without_rendering()
    written = [text.get_text() for axes in figure.axes for text in axes.findobj(mpl.text.Text)]
    assert {"real", *HER2.names} <= set(written)
    assert written.count("HER2 0") == 3  # its column and its two rows
    assert any(text.endswith("µm") for text in written)


@pytest.mark.parametrize("name", ["look.png", "look.svg", "look.pdf"])
def test_the_command_writes_the_picture(small_phantom, tmp_path, name):
    out = tmp_path / name
    arguments = ["preview", str(small_phantom.folder), "--method", "oracle", "--out", str(out), "--size-px", "32"]
    result = CliRunner().invoke(app, [*arguments, "--per-subtype", "1"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "each redrawn as 5 subtypes" in result.output
    if out.suffix == ".png":
        with Image.open(out) as picture:
            assert picture.width == 1080
    elif out.suffix == ".svg":
        assert out.read_text().count("<image") > 20
    else:
        assert out.read_bytes().startswith(b"%PDF")


def test_a_notebook_shows_the_picture_and_not_its_pixels(small_phantom, tmp_path):
    out = tmp_path / "look.png"
    found = cs.preview(small_phantom, method="oracle", out=out, size_px=32, per_subtype=1)
    assert (found._repr_png_(), found._repr_svg_()) == (out.read_bytes(), None)
    assert repr(found) == f"Preview({out}: {len(found)} patches, each redrawn as 5 subtypes)"
    assert len(repr(found[0])) < 200


@pytest.mark.parametrize(("name", "message"), [("look.jpg", "expected .svg, .png or .pdf"), ("folder.png", "is a f")])
def test_a_picture_of_another_format_or_a_folder_is_refused(small_phantom, tmp_path, name, message):
    (tmp_path / "folder.png").mkdir()
    arguments = ["preview", str(small_phantom.folder), "--method", "oracle", "--out", str(tmp_path / name)]
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
