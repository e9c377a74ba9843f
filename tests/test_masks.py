import re
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from counterstain.errors import InputError, TaxonomyError
from counterstain.io.masks import ValueMeanings, read_ids, read_mask
from counterstain.taxonomy import MEANINGS, Taxonomy

HER2 = Taxonomy.named("her2")
TISSUE = np.zeros((40, 40), np.uint8)
TISSUE[10:30, 5:15] = 1
IDS = TISSUE + np.tri(40, 40, -25, np.uint8) * 2
MASK = MEANINGS | {"tissue": 1}


def saved(folder, content, name="a.png", **options):
    path = folder / name
    (content if isinstance(content, Image.Image) else Image.fromarray(content)).save(path, **options)
    return path


def rgb(*channels):
    return Image.fromarray(np.stack(channels, axis=-1))


def indexed(*colours):
    image = Image.fromarray(TISSUE, "P") if not colours else Image.new("P", TISSUE.shape[::-1])
    image.putdata(TISSUE.ravel().tolist())
    image.putpalette([channel for colour in colours for channel in colour])
    return image


def grey_png(bits, pixels):
    """A PNG of one row with 2 or 4 bits a pixel, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = bytes(
        sum(value << (8 - bits * (place + 1)) for place, value in enumerate(pixels[i : i + 8 // bits]))
        for i in range(0, len(pixels), 8 // bits)
    )
    header = struct.pack(">IIBBBBB", len(pixels), 1, bits, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + packed))
        + chunk(b"IEND", b"")
    )  # fmt: skip


CERTAIN = {
    "0 and 1": (TISSUE, "a.png", "of 0 and 1"),
    "0 and 255": (TISSUE * 255, "a.png", "of 0 and 255"),
    "0 and 255 in grey RGB": (np.stack([TISSUE * 255] * 3, axis=-1), "a.png", "of 0 and 255"),
    "0 and 65535": (TISSUE.astype(np.uint16) * 65_535, "a.png", "of 0 and 65535"),
    "one bit": (TISSUE.astype(bool), "a.png", "of 0 and 1"),
    "one bit of TIFF": (TISSUE.astype(bool), "a.tif", "of 0 and 1"),
    "a grey palette": (indexed((0, 0, 0), (255, 255, 255)), "a.png", "of 0 and 1"),
    "JPEG": (TISSUE * 255, "a.jpg", "with grey levels, cut at 127"),
    "soft edges": (Image.fromarray(TISSUE * 255).resize((90, 90), Image.Resampling.BICUBIC), "a.png", "with grey lev"),
}


@pytest.mark.parametrize("case", CERTAIN)
def test_a_mask_means_what_its_maker_meant(tmp_path, case):
    content, name, kind = CERTAIN[case]
    mask, found = read_mask(saved(tmp_path, content, name))
    assert found.startswith(kind)
    assert mask.mean() == pytest.approx(TISSUE.mean(), abs=0.01)


UNCERTAIN = {
    "one grey level": (TISSUE * 100, "a.png", r"two values, 0 and 1 or 0 and 255; found 0 \(87.5%\), 100 \(12.5%\)"),
    "three grey levels": (TISSUE * 128 + np.tri(40, 40, -25, np.uint8) * 127, "a.png", "found .*, 128 .* --threshold"),
    "ids": (TISSUE * 2, "a.png", "2 .12.5%.* give --labels ids"),
    "ids with 255": (TISSUE * 3 + np.tri(40, 40, -25, np.uint8) * 252, "a.png", "3 .12.*; if they are the ids of"),
    "instances": (TISSUE.astype(np.uint16) * 300, "a.png", "numbers of instances, do not convert .* to 8 bits"),
    "colours": (np.stack([TISSUE * 255, TISSUE, TISSUE], axis=-1), "a.png", "#ff0101 .* --mask-values .*grey"),
    "0 and 1 in JPEG": (TISSUE, "a.jpg", r"compressed with losses .*; none is above 127, found 0 .* save masks as PNG"),
    "an inverted palette": (indexed((255,) * 3, (0,) * 3), "a.png", "palette draws 0 as #ffffff, 1 as #000000.*1=tis"),
    "a coloured palette": (indexed((0,) * 3, (200, 0, 0)), "a.png", "palette draws 0 as #000000, 1 as #c80000"),
    "fractions": (TISSUE.astype(np.float32), "a.tif", "F pixels are not read as labels"),
    "turned": (TISSUE, "a.tif", "stored turned or mirrored"),
    "transparent": (np.stack([TISSUE * 255] * 4, axis=-1), "a.png", "has transparent pixels"),
}


@pytest.mark.parametrize("case", UNCERTAIN)
def test_a_mask_that_could_mean_two_things_is_asked_about(tmp_path, case):
    content, name, message = UNCERTAIN[case]
    options = {"tiffinfo": {274: 6}} if case == "turned" else {}
    with pytest.raises(InputError, match=rf"a\.\w+: .*{message}"):
        read_mask(saved(tmp_path, content, name, **options))


@pytest.mark.parametrize("pixels", [TISSUE.astype(bool), TISSUE * 255])
def test_a_tiff_that_draws_0_white_is_asked_about(tmp_path, pixels):
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="miniswhite")
    for read in (read_mask, lambda path: read_ids(path, HER2)):
        with pytest.raises(InputError, match=r"draws 0 white and \d+ black .* stored are 0 \(87.5%\).* 0=background"):
            read(tmp_path / "a.tif")


def test_a_palette_is_asked_about_with_what_either_reading_gives(tmp_path):
    inverted = saved(tmp_path, rgb(*[TISSUE * 255] * 3).quantize(2))
    advice = r"colours count, give --mask-values (\S+) \(87.5% .* values count.* give --mask-values (\S+) \(12.5% back"
    with pytest.raises(InputError, match=advice) as error:
        read_mask(inverted)
    by_colour, by_value = re.search(advice, str(error.value)).groups()
    assert (read_mask(inverted, meanings=ValueMeanings(by_colour, MASK))[0] == TISSUE).all()
    assert (read_mask(inverted, meanings=ValueMeanings(by_value, MASK))[0] == 1 - TISSUE).all()


def test_numbers_are_refused_where_files_draw_them_in_different_colours(tmp_path):
    black, white, red, pink = (0,) * 3, (255,) * 3, (200, 0, 0), (255, 0, 200)
    by_value, drawn = ValueMeanings("0=background,1=tissue", MASK), {}
    read_mask(saved(tmp_path, indexed(black, white)), meanings=by_value, drawn=drawn)
    read_mask(saved(tmp_path, TISSUE, "grey.png"), meanings=by_value, drawn=drawn)
    with pytest.raises(InputError, match=r"b.png: draws 0 as #ffffff but a.png as #000000.* by colours"):
        read_mask(saved(tmp_path, indexed(white, black), "b.png"), meanings=by_value, drawn=drawn)
    drawn = {}
    read_ids(saved(tmp_path, indexed(black, red)), HER2, drawn=drawn)
    with pytest.raises(InputError, match=r"draws 1 as #ff00c8 but a.png as #c80000"):
        read_ids(saved(tmp_path, indexed(black, pink), "b.png"), HER2, drawn=drawn)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (rgb(IDS, IDS, IDS).quantize(3), "#000000=background.*#020202=HER2 1.*0=background,1=HER2 0"),
        (rgb(IDS * 100, IDS, 255 - IDS * 9).convert("P", palette=Image.Palette.ADAPTIVE), "…"),
        (indexed((2,) * 3, (1,) * 3, (0,) * 3), "#010101=HER2 0,#020202=HER2 1. "),
        (indexed((255,) * 3, (0,) * 3, (200, 0, 0)), "#ffffff=ignore"),
        (indexed((200,) * 3, (0, 99, 0)), "#c8c8c8=…"),
    ],
)  # fmt: skip
def test_ids_in_the_order_of_a_palette_that_a_program_made_are_asked_about(tmp_path, content, message):
    for name in ("a.png", "a.gif"):
        with pytest.raises(InputError, match=f"its palette draws .*{message}"):
            read_ids(saved(tmp_path, content, name), HER2)


def test_a_small_object_of_a_low_value_is_asked_about_and_not_lost(tmp_path):
    for value, width in ((1, 2), (100, 2), (7, 5)):
        labels = TISSUE * 255
        labels[34:36, 30 : 30 + width] = value
        with pytest.raises(InputError, match=f"found .*{value} "):
            read_mask(saved(tmp_path, labels))


def test_numbers_of_instances_are_asked_about_however_many_and_thin(tmp_path):
    for thickness in (1, 2, 4):
        labels = np.zeros((80, 40), np.uint8)
        for place, number in enumerate((3, 5, 9, 12, 20, 25, 30, 33, 38, 220, 230)):
            labels[7 * place : 7 * place + thickness, 5:25] = number
        with pytest.raises(InputError, match=r"found 0 .* and 7 more\. Say what they mean.*0=background,1-255=tissue"):
            read_mask(saved(tmp_path, labels))


@pytest.mark.parametrize("quality", [30, 60, 75, 90])
def test_what_jpeg_did_to_a_mask_of_0_and_255_is_cut_in_a_copy_without_losses(tmp_path, quality):
    smeared = Image.open(saved(tmp_path, TISSUE * 255, "a.jpg", quality=quality))
    mask, kind = read_mask(saved(tmp_path, smeared, "a.png"))
    assert kind == "with grey levels, cut at 127"
    assert (mask == TISSUE).mean() > 0.98


def test_what_jpeg_left_of_a_mask_of_0_and_1_is_said(tmp_path):
    y, x = np.mgrid[:64, :64]
    disc = ((y - 30) ** 2 + (x - 33) ** 2 < 400).astype(np.uint8)
    assert read_mask(saved(tmp_path, disc))[1] == "of 0 and 1"
    smeared = Image.open(saved(tmp_path, disc, "a.jpg", quality=60))
    assert read_mask(saved(tmp_path, smeared))[1] == "of 0 and 1, in blocks of 8 px as JPEG leaves them"


def test_webp_is_read_where_it_has_no_losses(tmp_path):
    for name, options in {"a.webp": {"lossless": True}, "b.webp": {"lossless": True, "exif": b"Exif\0\0"}}.items():
        assert (read_mask(saved(tmp_path, rgb(*[TISSUE] * 3), name, **options))[0] == TISSUE).all()
    with pytest.raises(InputError, match="compressed with losses"):
        read_mask(saved(tmp_path, rgb(*[TISSUE] * 3), "c.webp"))


@pytest.mark.parametrize("number", [70_000, 2**31 + 5])
def test_numbers_of_32_bits_are_read_as_advised(tmp_path, number):
    tifffile.imwrite(tmp_path / "a.tif", TISSUE.astype(np.uint32) * np.uint32(number))
    with pytest.raises(InputError, match=rf"{number} \(12.*--mask-values (0=background,1-\d+=tissue)\.") as error:
        read_mask(tmp_path / "a.tif")
    advice = re.search(r"0=\S+tissue", str(error.value))[0]
    assert (read_mask(tmp_path / "a.tif", meanings=ValueMeanings(advice, MASK))[0] == TISSUE).all()


def test_a_threshold_cuts_grey_levels_without_a_question(tmp_path):
    levels = np.array([[0, 100, 101, 255]] * 4, np.uint8)
    assert read_mask(saved(tmp_path, levels), 100)[0][0].tolist() == [0, 0, 1, 1]
    assert read_mask(saved(tmp_path, levels // 3), 100)[1] == "with grey levels, none above 100"


def test_ids_are_the_stored_values_whatever_their_number_of_bits(tmp_path):
    for bits in (2, 4):
        (tmp_path / "a.png").write_bytes(grey_png(bits, [0, 1, 2, 3]))
        assert read_ids(tmp_path / "a.png", HER2).tolist() == [[0, 1, 2, 3]]
    for content in (TISSUE * 4, TISSUE.astype(np.uint16) * 4):
        assert (read_ids(saved(tmp_path, content), HER2) == TISSUE * 4).all()
    assert (read_ids(saved(tmp_path, indexed((255,) * 3, (0, 99, 0))), HER2) == TISSUE).all()


@pytest.mark.parametrize(
    ("content", "name", "error", "message"),
    [
        (TISSUE.astype(np.uint16) * 300, "a.png", TaxonomyError, "unknown id 300 at row 10, column 5 .200 pixels"),
        (TISSUE, "a.jpg", InputError, "compressed with losses .* so ids cannot be read; save it as PNG"),
        (
            np.stack([TISSUE * 9, TISSUE, TISSUE], axis=-1),
            "a.png",
            InputError,
            "has colours, .*=HER2 0. Do not convert",
        ),
    ],
)
def test_values_that_are_no_ids_are_an_error(tmp_path, content, name, error, message):
    with pytest.raises(error, match=message):
        read_ids(saved(tmp_path, content, name), HER2)


def test_two_pages_are_an_error(tmp_path):
    page = Image.fromarray(TISSUE)
    page.save(tmp_path / "a.tif", save_all=True, append_images=[page])
    with pytest.raises(InputError, match="has 2 pages; save the one to be imported"):
        read_mask(tmp_path / "a.tif")
