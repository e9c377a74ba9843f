"""Label images as their files store them: the values of the pixels, and what the file says of how they are drawn."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from counterstain.errors import InputError
from counterstain.io.parts import Source, array_of, panel_of, stored_file, whole
from counterstain.io.pixel_readers import ORIENTATION, PHOTOMETRIC, SAMPLE_FORMAT, decoder_of, opened_image

SHOWN_LEVELS = 5
LOSSY = "was compressed with losses (JPEG or similar), which change values"
LOSSY_FORMATS = {"JPEG", "MPO"}
LOSSY_TIFF = {"jpeg", "tiff_jpeg", "webp", "jpeg2000"}
MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16", "I;16B", "I;16L", "I;16N"}
WHITE_IS_ZERO, WHITE = 0, 0xFFFFFF
Drawn = dict[int, tuple[int, Source]]  # values of the files read so far: colour, 0xrrggbb, and the first such file


@dataclass(frozen=True, slots=True)
class StoredLabels:
    """The pixels of a label image as its file stores them."""

    values: np.ndarray  # (H, W) integers; 0xrrggbb where coloured
    highest: int = 255  # that a pixel of this format can hold
    coloured: bool = False
    palette: np.ndarray | None = None  # colours of the values, (n, 3) uint8
    white_is_zero: bool = False
    lossy: bool = False

    @property
    def colours(self) -> np.ndarray:
        """(H, W) colours as 0xrrggbb, the way that the image is drawn."""
        if self.coloured:
            return self.values
        if self.palette is not None:
            return packed(self.palette[self.values])
        values = self.highest - self.values if self.white_is_zero else self.values
        return np.asarray(values, np.int64) * 255 // self.highest * 0x010101

    def drawn(self) -> dict[int, int]:
        """Return the colour, 0xrrggbb, of every value that occurs in a palette; of 0 in a grey image."""
        values = levels_of(self.values)[0]
        if self.palette is None:
            return {0: WHITE if self.white_is_zero else 0} if values[0] == 0 else {}
        return {value: int(colour) for value, colour in zip(values, packed(self.palette[values]), strict=True)}

    def shares(self) -> str:
        """Say which values there are and how much of the image each covers."""
        levels, counts = levels_of(self.values)
        ranked = sorted(zip(counts, levels, strict=True), key=lambda item: (-item[0], item[1]))
        named = [
            f"{f'#{level:06x}' if self.coloured else level} ({count / self.values.size:.1%})"
            for count, level in ranked[:SHOWN_LEVELS]
        ]
        return ", ".join(named) + (f" and {len(ranked) - SHOWN_LEVELS} more" if len(ranked) > SHOWN_LEVELS else "")


def levels_of(values: np.ndarray) -> tuple[list[int], list[int]]:
    """Return the values of an image and how many pixels have each; counting is faster than sorting."""
    if values.dtype != np.uint8:
        levels, counts = np.unique(values, return_counts=True)
        return levels.tolist(), counts.tolist()
    found = np.bincount(values.ravel())
    return found.nonzero()[0].tolist(), found[found > 0].tolist()


def read_stored(path: Source) -> StoredLabels:
    """Read a label image or array as it is stored; raises InputError where its layout cannot hold labels."""
    array = array_of(path)
    stored = _stored_in_file(path) if array is None else _stored_in_array(path, array)
    columns = panel_of(path, stored.values.shape[1]) if array is None else slice(None)
    return replace(stored, values=stored.values[:, columns])


def _stored_in_array(path: Source, array: np.ndarray) -> StoredLabels:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8:
        return _of_channels(array, lossy=False)
    if array.ndim != 2 or not whole(array) or array.min() < 0 or int(array.max()) >= 2**63:
        raise InputError(
            f"{path}: an array of {array.shape}, {array.dtype}{'' if whole(array) else ' with fractions'} is no label "
            "image; expected whole numbers from 0 on, (rows, columns). Of several channels, save the one that is meant "
            "(channels that number the instances of a class each: --labels planes)"
        )
    if array.dtype == np.uint8:
        return StoredLabels(array)
    return StoredLabels(numbers := array.astype(np.int64), 1 if array.dtype == bool else _highest(numbers))


def _highest(numbers: np.ndarray) -> int:
    return next((most for most in (2**16 - 1, 2**31 - 1, 2**32 - 1) if numbers.max(initial=0) <= most), 2**63 - 1)


def _of_channels(pixels: np.ndarray, *, lossy: bool) -> StoredLabels:
    if (pixels == pixels[..., :1]).all():
        return StoredLabels(pixels[..., 0], lossy=lossy)
    return StoredLabels(packed(pixels), 0xFFFFFF, coloured=True, lossy=lossy)


def _stored_in_file(path: Source) -> StoredLabels:
    with opened_image(path, labels=True) as image:
        decoder = decoder_of(image)
        _check_layout(path, image, decoder)
        lossy = image.format in LOSSY_FORMATS or image.info.get("compression") in LOSSY_TIFF
        lossy |= image.format == "WEBP" and b"VP8 " in _bytes(path)  # the chunk without losses is VP8L
        white_is_zero = image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO  # type: ignore[attr-defined]
        if image.mode == "P":
            colours = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            palette = np.pad(colours, ((0, 256 - len(colours)), (0, 0)))
            return StoredLabels(np.asarray(image), palette=palette, lossy=lossy)
        if image.mode.startswith("I"):
            numbers = np.asarray(image).astype(np.int64)
            if image.format == "TIFF" and image.tag_v2.get(SAMPLE_FORMAT, (1,)) == (1,):  # type: ignore[attr-defined]
                numbers %= 2**32  # Pillow gives 32 bits a sign
            return StoredLabels(numbers, _highest(numbers), white_is_zero=white_is_zero, lossy=lossy)
        if image.mode in {"1", "L", "LA"}:
            few = re.search(r"L;([24])", decoder)  # Pillow spreads them
            highest = 1 if image.mode == "1" else 2 ** int(few[1]) - 1 if few else 255
            shown = np.asarray(image.convert("L")) // (255 // highest)
            return StoredLabels(highest - shown if white_is_zero else shown, highest, False, None, white_is_zero, lossy)
        return _of_channels(np.asarray(image.convert("RGB")), lossy=lossy)


def _bytes(source: Source) -> bytes:
    file = stored_file(source)
    return file.read_bytes() if isinstance(file, Path) else file.getvalue()


def _check_layout(path: Source, image: Image.Image, decoder: str) -> None:
    if getattr(image, "n_frames", 1) > 1:
        raise InputError(f"{path}: has {image.n_frames} pages; save the one to be imported as a file of its own")  # type: ignore[attr-defined]
    if image.mode not in MODES or (";16" in decoder and not image.mode.startswith("I")):
        raise InputError(
            f"{path}: {image.mode} pixels are not read as labels; save whole numbers in one channel as PNG"
        )
    if image.getexif().get(ORIENTATION, 1) != 1:
        raise InputError(f"{path}: is stored turned or mirrored (EXIF orientation); save it upright, as PNG")
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise InputError(f"{path}: has transparent pixels, whose label is not certain; save it without transparency")


def packed(pixels: np.ndarray) -> np.ndarray:
    """Turn (..., 3) uint8 into (...) 0xrrggbb."""
    red, green, blue = (pixels[..., channel].astype(np.int32) for channel in range(3))
    return np.asarray(red << 16 | green << 8 | blue)


def check_drawn(path: Source, stored: StoredLabels, drawn: Drawn) -> None:
    """Raise InputError where an earlier file drew a value in another colour, so that it may mean something else."""
    for value, colour in stored.drawn().items():
        known, first = drawn.setdefault(value, (colour, path))
        if known != colour:
            raise InputError(
                f"{path}: draws {value} as #{colour:06x} but {first.name} as #{known:06x}, so the number may mean two "
                "things; give --mask-values by colours, as in #000000=background, or save all label images alike"
            )
