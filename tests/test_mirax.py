from pathlib import Path

import numpy as np
import openslide
import pytest
from mirax import CELL_PX, write_mirax

from counterstain.errors import InputError
from counterstain.io.slides import Slide


def blocks(columns: int = 5, rows: int = 4, edge: int = 16) -> np.ndarray:
    colours = np.random.default_rng(0).integers(0, 256, (rows * CELL_PX // edge, columns * CELL_PX // edge, 3))
    return colours.repeat(edge, 0).repeat(edge, 1).astype(np.uint8)


@pytest.fixture
def slide_path(tmp_path: Path) -> Path:
    return write_mirax(tmp_path / "slide.mrxs", blocks(), offset_xy=(1000, 520))


def test_openslide_reads_what_was_written(slide_path: Path):
    with openslide.OpenSlide(slide_path) as file:
        assert file.properties["openslide.vendor"] == "mirax"
        assert file.properties["openslide.bounds-x"] == "1000"
        assert file.properties["openslide.bounds-y"] == "520"
        assert np.array_equal(np.asarray(file.read_region((1000, 520), 0, (320, 256)))[..., :3], blocks())
        assert np.asarray(file.read_region((990, 510), 0, (10, 10)))[..., 3].max() == 0


def test_the_scanned_area_lies_at_its_offset(slide_path: Path):
    with Slide.open(slide_path) as slide:
        assert slide.mpp_level0 == 0.25
        assert slide.bounds_level0_px == (1000, 520, 320, 256)
        assert np.array_equal(slide.read(1016, 536, 16, 16, mpp=0.25), blocks()[16:32, 16:32])


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_coarser_levels_show_the_same_place(slide_path: Path, factor: int):
    expected = blocks().reshape(256 // factor, factor, 320 // factor, factor, 3).mean((1, 3))
    with Slide.open(slide_path) as slide:
        read = slide.read(1000, 520, 320 // factor, 256 // factor, mpp=0.25 * factor)
    assert np.abs(read - expected).max() <= 1


def test_what_was_not_scanned_is_white_not_black(slide_path: Path):
    with Slide.open(slide_path) as slide:
        assert (slide.read(0, 0, 40, 40, mpp=8.0)[:, :20] == 255).all()
        frame = slide.read(998, 518, 326, 262, mpp=0.25)
    assert np.array_equal(frame, np.pad(blocks(), ((2, 4), (2, 4), (0, 0)), constant_values=255))


def test_a_thumbnail_shows_the_scanned_area_alone(slide_path: Path):
    with Slide.open(slide_path) as slide:
        image, *place = slide.thumbnail(20)
    assert place == [1000, 520, 16]
    assert np.abs(image.astype(int) - blocks()[::16, ::16]).max() <= 1


def test_jpeg_tiles_are_read(tmp_path: Path):
    path = write_mirax(tmp_path / "slide.mrxs", blocks(), offset_xy=(333, 77), kind="JPEG")
    with Slide.open(path) as slide:
        read = slide.read(333, 77, 320, 256, mpp=0.25)
    assert np.abs(read.astype(int) - blocks()).mean() < 5


def test_a_mirax_file_without_its_folder_is_told_so(tmp_path: Path):
    (tmp_path / "slide.mrxs").write_bytes(b"")
    with pytest.raises(InputError, match=r"its folder 'slide' with Slidedat.ini is missing beside it"):
        Slide.open(tmp_path / "slide.mrxs")


def test_a_damaged_tile_is_one_line_with_its_place(slide_path: Path):
    with (slide_path.with_suffix("") / "Data0000.dat").open("r+b") as data:
        data.seek(50)
        data.write(bytes(100))
    with Slide.open(slide_path) as slide, pytest.raises(InputError, match=r"mrxs: cannot be read at x 1000, y 520"):
        slide.read(1000, 520, 64, 64, mpp=0.25)
