from collections import Counter
from itertools import islice

import numpy as np
import pytest
import tifffile
from drawn_layouts import TOLERANCE, layouts
from PIL import Image

from counterstain.errors import InputError
from counterstain.io import pixel_readers
from counterstain.io.pixel_readers import image_size, read_image
from counterstain.io.slides import Slide

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
AS_GREY = {"photometric": "minisblack", "planarconfig": "contig"}


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_colours_are_read_as_they_are(tmp_path, kind):
    image = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / f"a.{kind}")
    np.testing.assert_array_equal(read_image(tmp_path / f"a.{kind}"), image)
    assert image_size(tmp_path / f"a.{kind}") == (3, 4)


def test_grey_becomes_rgb_and_what_is_transparent_white(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), np.stack([GREY] * 3, axis=-1))
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    clear.putpixel((0, 0), (9, 9, 9, 255))
    clear.save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png")[..., 0].tolist() == [[9, 255], [255, 255]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_image_that_is_transparent_everywhere_is_an_error(tmp_path, mode):
    for name in ("a.png", "a.tif"):
        clear = Image.new(mode, (40, 40), 0)
        clear.save(tmp_path / name)
        with pytest.raises(InputError, match=f"{name}: is transparent everywhere"):
            read_image(tmp_path / name)
    if mode == "RGBA":
        with pytest.raises(InputError, match="is transparent everywhere"):
            Slide.open(tmp_path / "a.tif", mpp_level0=0.5)


def test_grey_with_associated_transparency_is_read(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.full((9, 9, 2), (20, 51), np.uint8), extrasamples=["assocalpha"], **AS_GREY)
    assert np.abs(read_image(tmp_path / "a.tif").astype(int) - 224).max() <= 1


def test_a_palette_of_8_bits_in_a_tiff_has_its_colours(tmp_path):
    palette = np.arange(768).reshape(3, 256) % 256
    tifffile.imwrite(tmp_path / "a.tif", GREY, photometric="palette", colormap=palette.astype(np.uint16))
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), np.stack([GREY] * 3, axis=-1))


def save_two_pages(path):
    page = Image.fromarray(GREY)
    page.save(path, "TIFF", save_all=True, append_images=[page])


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (Image.fromarray(GREY.astype(np.uint16) * 99).save, "more than 8 bits a channel .* convert it to 8 bits"),
        (save_two_pages, "has 2 pages; save the one to be imported"),
        (lambda path: path.write_text("not an image"), "not an image that can be read; expected PNG, TIFF or JPEG"),
        (lambda _path: None, "no such file"),
    ],
)
def test_a_file_that_cannot_be_read_for_certain_is_an_error(tmp_path, write, words):
    write(tmp_path / "a.png")
    with pytest.raises(InputError, match=rf"a\.png: {words}"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["png", "tif", "jpg"])
def test_a_file_that_is_cut_off_is_an_error(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a.{kind}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"a\.{kind}: (damaged or cut off|not an image)"):
        read_image(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_an_image_of_many_rows_is_read_in_bands(tmp_path, monkeypatch, mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 40, 4), dtype=np.uint8)).convert(mode)
    image.save(tmp_path / "a.png", **({"transparency": 3} if mode == "P" else {}))
    whole = read_image(tmp_path / "a.png")
    monkeypatch.setattr(pixel_readers, "ROWS_AT_ONCE", 64)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), whole)


def test_a_decompression_bomb_is_not_unpacked(tmp_path, monkeypatch):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(InputError, match=r"a\.png: more than 10 pixels; cut it into regions"):
        image_size(tmp_path / "a.png")


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[274] = orientation
    return found


def png_with_exif_behind_its_pixels(path):
    Image.fromarray(COLOURS).save(path, exif=exif(6))
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
    path.write_bytes(data[:start] + data[stop:-12] + data[start:stop] + data[-12:])


COLOURS = np.zeros((16, 16, 3), np.uint8)


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("a.jpg", lambda path: Image.fromarray(COLOURS).save(path, exif=exif(3)), r"turned .* \(orientation 3\)"),
        ("a.png", lambda path: Image.fromarray(COLOURS).save(path, exif=exif(2)), r"turned .* \(orientation 2\)"),
        ("a.png", png_with_exif_behind_its_pixels, r"turned .* \(orientation 6\)"),
        ("a.tif", lambda path: Image.fromarray(COLOURS).save(path, tiffinfo={274: 3}), r"turned .* \(orientation 3\)"),
        ("a.tif", lambda path: Image.new("CMYK", (9, 9)).save(path), "not RGB, grey or palette .*CMYK"),
        ("a.jpg", lambda path: Image.new("CMYK", (9, 9)).save(path), "not RGB, grey or palette .*CMYK"),
        ("a.tif", lambda path: Image.new("LAB", (9, 9)).save(path), "not RGB, grey or palette .*CIELab"),
        ("a.ppm", Image.fromarray(COLOURS).save, "not an image that can be read"),
    ],
)
def test_pixels_that_would_not_be_read_as_their_maker_meant_them_are_an_error(tmp_path, name, write, words):
    write(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name}: .*{words}"):
        read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("image", "how", "words"),
    [
        (np.zeros((3, 16, 16), np.uint16), {"planarconfig": "separate"}, "more than 8 bits a channel"),
        (COLOURS.astype(np.uint16), {"compression": "deflate"}, "more than 8 bits a channel"),
        (COLOURS[..., 0], {"photometric": "miniswhite"}, "inverted grey"),
        (np.zeros((9, 9, 4), np.uint8), {"extrasamples": [0]}, "a channel beside its colours"),
        (iter([b""]), {"shape": COLOURS.shape, "dtype": np.uint8, "compression": "lzw", "rowsperstrip": 16}, "without"),
    ],
)
def test_a_tiff_of_a_table_is_refused_as_one_of_a_slide_is(tmp_path, image, how, words):
    tifffile.imwrite(tmp_path / "a.tif", image, **{"photometric": "rgb"} | how)
    with pytest.raises(InputError, match=rf"a.tif: .*{words}"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
def test_both_kinds_of_transparency_are_laid_on_white(tmp_path, kind):
    pixel = [100, 100, 100, 51] if kind == "unassalpha" else [20, 20, 20, 51]
    image = np.full((9, 9, 4), pixel, np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", extrasamples=[kind])
    assert np.abs(read_image(tmp_path / "a.tif").astype(int) - 224).max() <= 1


def test_every_layout_gives_the_pixels_that_its_maker_meant_or_one_line(tmp_path):
    outcomes = Counter()
    for path, meant in islice(layouts(np.random.default_rng(0), tmp_path), 60):
        for reader in (read_image, read_slide):
            try:
                found = reader(path)
            except InputError as error:
                assert "\n" not in str(error)  # noqa: PT017 # either outcome is right
                outcomes["refused"] += 1
                continue
            if meant is not None:
                assert np.abs(found.astype(int) - meant).mean() <= TOLERANCE, path
                outcomes["right"] += 1
    assert min(outcomes["right"], outcomes["refused"]) > 10


def read_slide(path):
    with Slide.open(path, mpp_level0=0.5) as slide:
        return slide.read(0, 0, *slide.size_level0_px, mpp=0.5)
