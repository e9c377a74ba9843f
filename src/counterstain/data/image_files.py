"""Ordinary image files (PNG, TIFF, JPEG) as arrays, with one clear error for each that cannot be used.

Shapes: H, W = rows and columns in pixels.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from counterstain.errors import InputError


def image_size(path: Path) -> tuple[int, int]:
    """Return rows and columns from the header alone; checks what :func:`read_image` checks but for the pixels.

    Raises
    ------
    InputError
        The file is missing, is not an image, has more than 8 bits a channel or several pages, or is far too large.
    """
    with _opened(path) as image:
        return image.height, image.width


def read_image(path: Path) -> np.ndarray:
    """Read an image as (H, W, 3) uint8; grey becomes RGB, transparent becomes white.

    Raises
    ------
    InputError
        As :func:`image_size`, or the file is cut off.
    """
    with _opened(path) as image:
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            return np.asarray(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"))
        return np.asarray(image.convert("RGB"))


def read_label_image(path: Path, *, palette_ids: bool = False) -> np.ndarray:
    """Read a label image as (H, W) uint8.

    Parameters
    ----------
    path : Path
    palette_ids : bool
        Whether the numbers of a palette image's colours are its labels; otherwise their greys are.

    Raises
    ------
    InputError
        As :func:`read_image`, or the image has colours.
    """
    with _opened(path) as image:
        if palette_ids and image.mode in {"1", "P"}:
            return np.asarray(image).astype(np.uint8)
        if palette_ids and re.search("L;[24]", _decoder(image)):  # Pillow spreads them over 0 to 255
            raise InputError(f"{path}: has 2 or 4 bits a pixel, in which ids cannot be read; save it with 8 bits")
        if image.mode in {"1", "L"}:
            return np.asarray(image.convert("L"))
        channels = np.asarray(image.convert("RGB"))
    if (channels != channels[..., :1]).any():
        raise InputError(f"{path}: has colours; expected a grey label image, so save it with one channel")
    return channels[..., 0]


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # half the size that is an error
            with Image.open(path) as image:
                _check_layout(path, image)
                yield image
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{path}: more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; cut it into regions of at most "
            "10,000 x 10,000 px"
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not an image that can be read; expected PNG, TIFF or JPEG") from error
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise on damaged files
        raise InputError(f"{path}: damaged or cut off ({error}); export it again") from error


def _check_layout(path: Path, image: Image.Image) -> None:
    if image.mode.startswith(("I", "F")) or ";16" in _decoder(image):  # colours of 16 bits have no mode in Pillow
        raise InputError(f"{path}: has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
    pages = getattr(image, "n_frames", 1)
    if pages > 1:
        raise InputError(f"{path}: has {pages} pages; save the one to be imported as a file of its own")


def _decoder(image: Image.Image) -> str:
    """Return how the pixels are stored, in Pillow's words."""
    return str([tile[3] for tile in getattr(image, "tile", [])])
