import numpy as np
import pytest
from PIL import Image

from counterstain.errors import InputError
from counterstain.io.pixel_readers import image_size, read_image

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_colours_are_read_as_they_are(tmp_path, kind):
    image = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / f"a.{kind}")
    np.testing.assert_array_equal(read_image(tmp_path / f"a.{kind}"), image)
    assert image_size(tmp_path / f"a.{kind}") == (3, 4)


def test_grey_becomes_rgb_and_what_is_transparent_white(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), np.stack([GREY] * 3, axis=-1))
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 255).all()


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


def test_a_decompression_bomb_is_not_unpacked(tmp_path, monkeypatch):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(InputError, match=r"a\.png: more than 10 pixels; cut it into regions"):
        image_size(tmp_path / "a.png")
