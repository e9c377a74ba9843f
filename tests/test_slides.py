import re
import zlib
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from mirax import CELL_PX, write_mirax
from PIL import Image

from counterstain.errors import CounterstainWarning, InputError
from counterstain.io import tiff_files
from counterstain.io.pixel_readers import levels_of
from counterstain.io.regions import tissue_mask
from counterstain.io.slides import Box, Slide, area_average, list_slides, slide_name

REAL = Path(__file__).parents[2] / "shared" / "data" / "slides"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="needs the real slides in ../shared/data")


def noise(height: int = 300, width: int = 420) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def means(image: np.ndarray, factor: int) -> np.ndarray:
    height, width = image.shape[0] // factor, image.shape[1] // factor
    cut = image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return np.floor(cut.mean((1, 3)) + 0.5).astype(np.uint8)


def write_ome(path: Path, image: np.ndarray, mpp: float = 0.25, unit: str = "µm", levels: int = 2) -> Path:
    size = {"PhysicalSizeX": mpp, "PhysicalSizeY": mpp, "PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    with tifffile.TiffWriter(path) as file:
        for level in range(levels):
            first = {"subifds": levels - 1, "metadata": {"axes": "YXS"} | size} if level == 0 else {"subfiletype": 1}
            file.write(
                means(image, 2**level), tile=(64, 64), compression="deflate", photometric="rgb",
                **first,
            )  # fmt: skip
    return path


def write_pyramid(path: Path, *levels: np.ndarray, kind: str = "plain", mpp: float = 0.25, **how) -> Path:
    """Write a tiled pyramid: plain or an SVS, which tifffile reads, or one of Trestle's, which OpenSlide reads."""
    of_kind = {
        "plain": {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"},
        "svs": {"description": f"Aperio Image Library v11.2.1|AppMag = 20|MPP = {mpp}"},
        "trestle": {"resolution": (mpp, mpp), "software": "MedScan", "description": "Background Color=FFFFFF"},
    }
    usual = {"tile": (64, 64), "compression": "deflate", "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels):
            file.write(level, subfiletype=int(number > 0 and kind != "svs"), **usual | of_kind[kind] | how)
    return path


@pytest.fixture(params=["plain", "svs", "trestle"])
def drawn(request: pytest.FixtureRequest, tmp_path: Path):
    """Write a slide of the kind named."""
    return lambda *levels, **how: write_pyramid(tmp_path / "a.tif", *levels, **{"kind": request.param} | how)


def test_a_cell_is_the_mean_of_the_area_under_it_with_parts_of_pixels_counted_in_part():
    row = np.array([[[10], [20], [40]]], np.uint8)
    halves = area_average(row, np.array([0.0, 1.0]), np.array([0.5, 1.75, 3.0]))
    assert halves.ravel().tolist() == [int((0.5 * 10 + 0.75 * 20) / 1.25 + 0.5), int((0.25 * 20 + 40) / 1.25 + 0.5)]


@pytest.mark.parametrize("factor", [1, 2, 3, 7, 20])
def test_at_integer_factors_a_pixel_is_the_mean_of_its_level_0_pixels(drawn, factor: int):
    with Slide.open(drawn(noise(), mpp=0.3)) as slide:
        read = slide.read(21, 14, 30, 20, mpp=0.3 * factor)
    white = np.pad(noise()[14:, 21:], ((0, 200), (0, 300), (0, 0)), constant_values=255)
    assert np.array_equal(read, means(white, factor)[:20, :30])


def test_the_coarsest_level_that_is_not_coarser_than_the_output_is_read(drawn):
    image = noise()
    with Slide.open(drawn(image, means(image, 2))) as slide:
        assert np.array_equal(slide.read(40, 20, 30, 25, mpp=1.0), means(means(image, 2)[10:, 20:], 2)[:25, :30])
        assert np.array_equal(slide.read(40, 20, 30, 25, mpp=0.25), image[20:45, 40:70])


def test_outside_of_the_slide_is_white(drawn):
    with Slide.open(drawn(noise(), mpp=0.5)) as slide:
        read = slide.read(-10, -5, 20, 12, mpp=0.5)
        assert (read[:5] == 255).all()
        assert (read[:, :10] == 255).all()
        assert np.array_equal(read[5:, 10:], noise()[:7, :10])
        assert (slide.read(5000, 5000, 9, 9, mpp=2.0) == 255).all()


@pytest.mark.parametrize("mpp", [0.2, 0.26, 0.5, 1.1, 6.0])
def test_a_region_read_in_tiles_equals_the_region_read_in_one_piece(drawn, mpp: float):
    box = Box(-30, 11, 400, 350, "a")
    with Slide.open(drawn(noise(), means(noise(), 2))) as slide:
        window = slide.window(box, mpp)
        whole = slide.read(box.x, box.y, window.shape[1], window.shape[0], mpp)
        tiled = np.zeros(window.shape, np.uint8)
        for y, x in np.ndindex(-(-window.shape[0] // 37), -(-window.shape[1] // 37)):
            tile = tiled[37 * y : 37 * y + 37, 37 * x : 37 * x + 37]
            tile[:] = window.read(37 * y, 37 * x, *tile.shape[:2])
    assert np.array_equal(tiled, whole)


def test_sides_rounded_when_a_level_was_made_do_not_shift_it(drawn):
    image = noise(401, 803)  # OpenSlide takes the factor for 2.0037, and would show pixels between the stored ones
    with Slide.open(drawn(image, means(image, 2))) as slide:
        assert np.array_equal(slide.read(0, 0, 401, 200, mpp=0.5), means(image, 2))


def test_a_level_of_no_whole_factor_is_read_as_stored_or_a_finer_one_is(drawn):
    image, edges = noise(400, 600), np.arange(241) * 2.5
    shrunk = area_average(image, edges[:161], edges)
    with Slide.open(drawn(image, shrunk)) as slide:
        window = slide.window(Box(0, 0, 600, 400), mpp=0.625)
        assert np.array_equal(window.read(0, 0, 160, 240), shrunk)
        assert np.array_equal(window.read(50, 60, 90, 110), shrunk[50:140, 60:170])


def test_a_level_padded_to_whole_tiles_is_left_out(drawn):
    image = noise(400, 600)
    padded = np.pad(means(image, 2), ((0, 56), (0, 20), (0, 0)))  # 256 x 320
    with Slide.open(drawn(image, padded)) as slide:
        assert np.array_equal(slide.read(100, 200, 90, 70, mpp=0.5), means(image, 2)[100:170, 50:140])


@pytest.mark.parametrize("side", [400, 410, 500])
@pytest.mark.parametrize("fill", [0, 255])
def test_a_padded_level_of_a_square_slide_is_left_out(drawn, side: int, fill: int):
    image = noise(side, side)
    half = means(image, 2)
    pad = -len(half) % 64
    padded = np.pad(half, ((0, pad), (0, pad), (0, 0)), constant_values=fill)
    with Slide.open(drawn(image, padded)) as slide:
        assert np.array_equal(slide.read(100, 200, 90, 70, mpp=0.5), half[100:170, 50:140])
        x, y = slide.thumbnail(side // 2).image.shape[:2]
        assert np.array_equal(slide.thumbnail(side // 2).image, half[:y, :x])


def test_factors_of_padded_levels_are_right_or_not_used_for_pixels():
    draw = np.random.default_rng(0)
    exact = 0
    for _ in range(3000):
        size, true = draw.integers(2000, 120_000, 2), int(draw.choice([2, 3, 4, 8, 16, 32, 64, 256]))
        cut = -(-size // true) if draw.random() < 0.5 else size // true
        tile, padding = draw.choice([240, 256, 512]), draw.random() < 0.5
        shown = -(-cut // tile) * tile if padding else cut
        sizes = [tuple(size.tolist()), tuple(shown.tolist())]
        for level in levels_of(sizes, [(tile, tile)] * 2)[1:]:
            assert not level.exact or level.downsample == true, (sizes, true)
            exact += level.exact
    assert exact > 1300  # those that are not padded, apart from ones whose sides are whole tiles by chance


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
def test_transparent_pixels_are_laid_on_white(drawn, kind: str):
    alpha = np.repeat(np.uint8([0, 51, 255, 255]), 40)[:, None, None].repeat(200, 1)
    colours = np.full((160, 200, 3), 100, np.uint8)
    stored = colours if kind == "unassalpha" else (colours * (alpha / 255)).astype(np.uint8)
    with Slide.open(drawn(np.dstack([stored, alpha]), extrasamples=[kind])) as slide:
        rows = slide.read(0, 0, 200, 160, mpp=0.25)[::40, 0, 0]
    assert np.abs(rows - np.array([255, 224, 100, 100])).max() <= 1


def test_tiles_that_are_not_stored_are_white(tmp_path: Path):
    tile = zlib.compress(bytes(64 * 64 * 3))
    path = tmp_path / "a.tif"
    with Slide.open(write_pyramid(path, iter([tile, b"", b"", tile]), shape=(128, 128, 3), dtype=np.uint8)) as slide:
        assert slide.read(0, 0, 128, 128, mpp=0.25)[::64, ::64, 0].tolist() == [[0, 255], [255, 0]]


def test_aperios_jpeg_2000_is_turned_into_rgb(tmp_path: Path):
    image = Image.fromarray(means(noise(), 20).repeat(20, 0).repeat(20, 1))
    how = {"compression": 33003, "compressionargs": {"level": 0, "reversible": True, "mct": False}}
    path = write_pyramid(tmp_path / "a.svs", np.asarray(image.convert("YCbCr")), kind="svs", **how)
    with Slide.open(path) as slide:
        read = slide.read(0, 0, *image.size, mpp=0.25)
    assert np.abs(read.astype(int) - image).mean() < 3
    plain = write_pyramid(tmp_path / "a.tif", np.asarray(image), **how)
    with pytest.raises(InputError, match="Aperio's JPEG 2000 outside of a slide of Aperio"):
        Slide.open(plain)


def test_a_thumbnail_shows_the_scanned_area(drawn):
    with Slide.open(drawn(noise())) as slide:
        thumbnail = slide.thumbnail(105)
    assert thumbnail.image.shape == (75, 105, 3)
    assert np.array_equal(thumbnail.image, means(noise(), 4))
    assert thumbnail.downsample == 4


def test_pixels_and_resolution_come_from_the_same_page(tmp_path: Path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for image, mpp in ((means(noise(), 4), 1.0), (noise(), 0.25)):
            file.write(image, photometric="rgb", resolution=(1e4 / mpp, 1e4 / mpp), resolutionunit="CENTIMETER")
    with Slide.open(tmp_path / "a.tif") as slide:
        assert (slide.size_level0_px, slide.mpp_level0) == ((420, 300), pytest.approx(0.25))


def test_pixels_and_resolution_come_from_the_same_image_of_an_ome_tiff(tmp_path: Path):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as file:
        for image, mpp in ((means(noise(), 4), 1.0), (noise(), 0.25)):
            size = {"PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
            file.write(image, photometric="rgb", tile=(64, 64), metadata={"axes": "YXS"} | size)
    with Slide.open(tmp_path / "a.ome.tif") as slide:
        assert (slide.size_level0_px, slide.mpp_level0) == ((420, 300), pytest.approx(0.25))
        assert np.array_equal(slide.read(10, 20, 30, 40, mpp=0.25), noise()[20:60, 10:40])


@pytest.mark.parametrize(("unit", "size"), [("µm", 0.25), ("nm", 250.0), ("mm", 0.00025)])
def test_ome_sizes_are_read_in_their_unit(tmp_path: Path, unit: str, size: float):
    with Slide.open(write_ome(tmp_path / "a.ome.tif", noise(), size, unit)) as slide:
        assert slide.mpp_level0 == pytest.approx(0.25)


def write_tiff(path: Path, resolution: tuple[float, float], unit: str) -> Path:
    tifffile.imwrite(path, noise(), photometric="rgb", resolution=resolution, resolutionunit=unit)
    return path


def test_a_tiffs_resolution_is_read_from_its_tags(tmp_path: Path):
    with Slide.open(write_tiff(tmp_path / "a.tif", (20_000, 20_000), "CENTIMETER")) as slide:
        assert slide.mpp_level0 == pytest.approx(0.5)


@pytest.mark.parametrize("segment", [{"tile": None, "rowsperstrip": 300}, {"tile": (304, 432)}])
def test_one_compressed_strip_or_tile_for_the_whole_slide_is_refused_where_it_is_huge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segment: dict
):
    path = write_pyramid(tmp_path / "a.tif", noise(), **segment)
    with Slide.open(path) as slide:
        assert np.array_equal(slide.read(40, 30, 60, 50, mpp=0.25), noise()[30:80, 40:100])
    monkeypatch.setattr(tiff_files, "MAX_SEGMENT_BYTES", 300_000)
    with pytest.raises(
        InputError, match=r"a.tif: is compressed in a (strip|tile) of 4\d\d x 30\d px.* save it in tiles"
    ):
        Slide.open(path)


def test_planar_and_compressed_strips_are_read(tmp_path: Path):
    tifffile.imwrite(
        tmp_path / "a.tif", np.moveaxis(noise(), -1, 0), photometric="rgb", planarconfig="separate",
        compression="deflate",
    )  # fmt: skip
    with Slide.open(tmp_path / "a.tif", mpp_level0=1) as slide:
        assert np.array_equal(slide.read(3, 4, 50, 60, mpp=1), noise()[4:64, 3:53])


@pytest.mark.parametrize(
    ("resolution", "unit", "words"),
    [
        ((1, 1), "NONE", r"a.tif: the file has no resolution; give it with --mpp-level0"),
        ((72, 72), "INCH", r"no resolution that is plausible \(352.8 mpp\); give it with --mpp-level0"),
        ((2e4, 3e4), "CENTIMETER", r"not square, 0.5 x 0.333333 mpp; save the slide with square pixels"),
    ],
)
def test_a_resolution_that_is_missing_or_not_a_scanners_is_an_error(tmp_path: Path, resolution, unit: str, words: str):
    with pytest.raises(InputError, match=words):
        Slide.open(write_tiff(tmp_path / "a.tif", resolution, unit))


def test_a_given_resolution_overrules_the_file_and_says_so(drawn):
    with pytest.warns(CounterstainWarning, match=r"a.tif: --mpp-level0 0.5 overrules the file's 0.25 mpp"):
        slide = Slide.open(path := drawn(noise()), mpp_level0=0.5)
    with slide, pytest.warns(CounterstainWarning, match=r"a.tif: the table's 0.2 overrules the file's 0.25 mpp"):
        Slide.open(path, mpp_level0=0.2, given_by="the table's").close()
    assert slide.mpp_level0 == 0.5
    with Slide.open(path, mpp_level0=0.2501) as slide:
        assert slide.mpp_level0 == 0.2501


@pytest.mark.parametrize("mpp", [1e-9, 1e6, -0.25, float("nan")])
def test_a_resolution_that_no_microscope_has_is_an_error(drawn, mpp: float):
    with pytest.raises(
        InputError, match=rf"a.tif: --mpp-level0 {re.escape(f'{mpp:g}')}: expected 0.01 to 20 micrometres"
    ):
        Slide.open(drawn(noise()), mpp_level0=mpp)


@pytest.mark.parametrize(
    ("image", "how", "words"),
    [
        (
            np.zeros((64, 80), np.uint8),
            {"photometric": "minisblack"},
            r"not RGB \(uint8 pixels, axes YX, 64 x 80, grey",
        ),
        (
            np.zeros((64, 80), np.uint8),
            {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)},
            "not RGB",
        ),
        (np.zeros((64, 80, 3), np.uint8), {"photometric": "ycbcr"}, r"not RGB \(.* YCbCr"),
        (np.zeros((64, 80, 3), np.uint8), {"photometric": "cielab"}, r"not RGB \(.* CIELab"),
        (np.zeros((64, 80, 4), np.uint8), {"photometric": "separated"}, r"not RGB \(.* CMYK"),
        (np.zeros((64, 80, 3), np.uint16), {}, r"more than 8 bits a channel \(uint16 pixels"),
        (np.zeros((3, 64, 80), np.uint16), {"planarconfig": "separate"}, r"more than 8 bits a channel \(uint16 pixels"),
        (np.zeros((64, 80, 3), np.int8), {}, "signed numbers"),
        (np.zeros((64, 80, 4), np.uint8), {"extrasamples": [0]}, "a channel beside its colours"),
        (np.zeros((64, 80, 5), np.uint8), {"extrasamples": [2, 0]}, "a channel beside its colours"),
        (
            np.zeros((64, 80, 3), np.uint8),
            {"extratags": [(274, "H", 1, 3, True)]},
            r"turned or mirrored \(orientation 3",
        ),
        (np.zeros((64, 80, 3), np.uint8), {"compression": "jpegxl"}, "compression 50002 is not read"),
    ],
)
@pytest.mark.parametrize("tile", [(64, 64), None])
def test_other_pixels_than_8_bits_rgb_are_refused_in_tiles_and_strips(drawn, image, how: dict, words: str, tile):
    path = drawn(image, **({"tile": tile} if tile else {"tile": None, "kind": "plain"}) | how)
    with pytest.raises(InputError, match=rf"a\.tif: .*{words}") as error:
        Slide.open(path, mpp_level0=1)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_one_that_is_no_slide_are_one_line_each(tmp_path: Path):
    with pytest.raises(InputError, match=r"a.svs: no such slide file"):
        Slide.open(tmp_path / "a.svs")
    (tmp_path / "a.svs").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match=r"a.svs: not a slide that can be read; expected a format of OpenSlide"):
        Slide.open(tmp_path / "a.svs")


@pytest.mark.parametrize("share", [1e-5, 0.001, 0.1, 0.9])
def test_a_tiff_that_is_cut_off_is_one_line(drawn, share: float):
    path = drawn(noise())
    path.write_bytes(path.read_bytes()[: 4 + int(share * path.stat().st_size)])
    with pytest.raises(InputError, match=r"a.tif: (damaged|not RGB|not a slide|cannot)") as error:
        Slide.open(path, mpp_level0=1).read(0, 0, 420, 300, mpp=1)
    assert "\n" not in str(error.value)


def test_a_slide_damaged_anywhere_is_one_line_or_readable(tmp_path: Path):
    rng = np.random.default_rng(0)
    good = write_ome(tmp_path / "a.ome.tif", noise(100, 100)).read_bytes()
    for _ in range(60):
        data = bytearray(good if rng.integers(2) else good[: rng.integers(len(good))])
        for place in rng.integers(len(data) or 1, size=5 if data else 0):
            data[place] = rng.integers(256)
        (tmp_path / "a.ome.tif").write_bytes(data)
        try:
            with Slide.open(tmp_path / "a.ome.tif", mpp_level0=0.25) as slide:
                slide.read(0, 0, 100, 100, mpp=0.25)
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017 # either outcome is right


@pytest.mark.parametrize(
    ("compression", "tolerance"), [("raw", 0), ("packbits", 0), ("tiff_lzw", 0), ("tiff_deflate", 0), ("jpeg", 30)]
)
def test_untiled_tiff_is_read_whatever_its_compression(tmp_path: Path, compression: str, tolerance: int):
    smooth = means(noise(800, 800), 8).repeat(4, 0).repeat(4, 1)
    Image.fromarray(smooth).save(tmp_path / "a.tif", compression=compression)
    with Slide.open(tmp_path / "a.tif", mpp_level0=1) as slide:
        read = slide.read(37, 150, 200, 180, mpp=1).astype(int)
    assert np.abs(read - smooth[150:330, 37:237]).max() <= tolerance


def test_slides_of_a_folder_are_listed_by_name(tmp_path: Path):
    for name in ("b.svs", "a.1.ome.tiff", "notes.txt", ".hidden.svs", "dicom/1.dcm", "dicom/2.dcm", "b/Slidedat.ini"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert {name: path.name for name, path in list_slides(tmp_path).items()} == {
        "a.1": "a.1.ome.tiff", "b": "b.svs", "dicom": "1.dcm",
    }  # fmt: skip
    assert slide_name("x/TCGA.01.svs") == "TCGA.01"


def test_a_folder_that_does_not_hold_one_slide_a_name_is_an_error(tmp_path: Path):
    with pytest.raises(InputError, match=r"no such folder of slides"):
        list_slides(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no slide in it; expected files ending in .bif"):
        list_slides(tmp_path)
    (tmp_path / "a.svs").write_bytes(b"")
    (tmp_path / "a.tif").write_bytes(b"")
    with pytest.raises(InputError, match=r"a.svs and a.tif are both slide 'a'; rename one"):
        list_slides(tmp_path)


def glass() -> np.ndarray:
    noise = np.random.default_rng(0).integers(-3, 4, (120, 160, 3))
    return (np.array([243, 242, 244]) + noise).astype(np.uint8)


def test_a_blank_slide_black_borders_and_dust_are_no_tissue():
    image = glass()
    assert not tissue_mask(image).any()
    image[:, :20] = (4, 0, 0)
    image[60:62, 80:82] = (150, 90, 50)
    assert not tissue_mask(image).any()


@pytest.mark.parametrize("colour", [(150, 90, 50), (215, 205, 225), (200, 120, 170)])  # DAB, pale haematoxylin, eosin
def test_stained_tissue_is_found_up_to_the_border_and_glass_is_not(colour: tuple[int, int, int]):
    image = glass()
    image[:60, :80] = colour
    mask = tissue_mask(image)
    assert mask[:58, :78].mean() > 0.99
    assert not mask[65:].any()
    assert not mask[:, 85:].any()


def test_a_strong_stain_does_not_hide_pale_tissue():
    image = glass()
    image[30:90, 40:120] = (190, 150, 190)
    image[35:80, 45:80] = (110, 50, 20)
    assert tissue_mask(image)[35:80, 85:115].mean() > 0.95


@needs_real
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_an_svs_equals_openslides_own_reading_up_to_resampling(factor: int):
    with openslide.OpenSlide(REAL / "CMU-1-Small-Region.svs") as file:
        level0 = np.asarray(file.read_region((600, 1200), 0, (800, 800)).convert("RGB"))
    with Slide.open(REAL / "CMU-1-Small-Region.svs") as slide:
        read = slide.read(600, 1200, 800 // factor, 800 // factor, 0.499 * factor)
    assert np.array_equal(read, means(level0, factor))


@needs_real
def test_the_real_files_open_or_say_why_not():
    with Slide.open(REAL / "highdicom_sm_image.dcm") as slide:
        assert slide.size_level0_px == (50, 50)
        assert slide.read(0, 0, 25, 25, mpp=0.998).shape == (25, 25, 3)
    with Slide.open(REAL / "kidney-48-5.tif", mpp_level0=0.5) as slide:
        assert np.array_equal(slide.read(100, 50, 64, 32, mpp=0.5), tifffile.imread(slide.path)[50:82, 100:164])
    with pytest.raises(InputError, match="give it with --mpp-level0"):
        Slide.open(REAL / "kidney-48-5.tif")
    with pytest.raises(InputError, match=r"broken.svs: not a slide that can be read"):
        Slide.open(REAL / "broken.svs")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("Aperio|MPP = 1,25", "no resolution"),
        ("Aperio|MPP = 0.25 um", 0.25),
        ("Aperio|MPP = 2.5e-1|AppMag = 40", 0.25),
        ("Aperio\r\n840x600 [0,0 840x600] (64x64)|MPP = 0.25", "is that of 840 x 600 px"),
        ("made by a script|MPP = 0.1", "says 0.1 mpp, its resolution tags say 0.25"),
    ],
)
def test_a_description_that_cannot_be_read_or_is_contradicted_is_asked_about(tmp_path: Path, said: str, words):
    path = write_pyramid(tmp_path / "a.tif", noise(), description=said)
    if isinstance(words, float):
        with Slide.open(path) as slide:
            assert slide.mpp_level0 == words
        return
    with pytest.raises(InputError, match=words):
        Slide.open(path)
    Slide.open(path, 0.5, given_by="").close()


@pytest.mark.parametrize("width", [420, 410])
def test_further_images_of_an_ome_tiff_are_refused_or_said(tmp_path: Path, width: int):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as file:
        for image in (noise(), noise(width=width)):
            file.write(
                image,
                photometric="rgb",
                tile=(64, 64),
                metadata={"axes": "YXS", "PhysicalSizeX": 1, "PhysicalSizeY": 1},
            )
    if width == 420:
        with pytest.raises(InputError, match="has 2 images, several of 420 x 300 px"):
            Slide.open(tmp_path / "a.ome.tif")
    else:
        with pytest.warns(CounterstainWarning, match="one of 410 x 300 px is left out"):
            Slide.open(tmp_path / "a.ome.tif").close()


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
