"""Slides and images in every way of storing pixels that tifffile and Pillow write, right, damaged or cut off."""

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageOps

TOLERANCE = 8  # mean difference that compression with losses makes
TRESTLE = {"software": "MedScan", "description": "Background Color=FFFFFF", "resolution": (0.5, 0.5)}
APERIO = {"description": "Aperio Image Library v11\n256x256 |AppMag = 20|MPP = 0.5"}
COMPRESSIONS = (None, "lzw", "deflate", "packbits", "zstd", "lzma", "jpeg2000", "jpeg", "webp")


def layouts(rng: np.random.Generator, folder: Path) -> Iterator[tuple[Path, np.ndarray | None]]:
    """Yield one file after the other with the (H, W, 3) uint8 pixels that its maker meant; None where it is damaged."""
    for number in itertools.count():
        write = (_tiff, _tiff, _tiff, _picture)[rng.integers(4)]
        try:
            with warnings.catch_warnings(action="ignore"):
                path, expected = write(rng, folder / f"{number}")
        except Exception:  # noqa: BLE001 # a combination that the writer does not know
            continue
        if rng.random() < 0.3:
            _damage(rng, path)
            expected = None
        yield path, expected


def _drawing(rng: np.random.Generator, channels: int) -> np.ndarray:
    """Draw smooth blobs, (H, W, channels) uint8."""
    height, width = rng.integers(40, 300, 2)
    coarse = rng.integers(0, 256, (-(-height // 20), -(-width // 20), channels), np.uint8)
    planes = [Image.fromarray(plane) for plane in np.moveaxis(coarse, -1, 0)]
    return np.stack([np.asarray(plane.resize((width, height), Image.Resampling.BILINEAR)) for plane in planes], axis=-1)


def _flat(rng: np.random.Generator, image: np.ndarray, channels: int) -> np.ndarray:
    """Return channels of one value each, of an image's size."""
    return np.broadcast_to(rng.integers(0, 256, channels, np.uint8), (*image.shape[:2], channels))


def _on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.rint(255 + (colours.astype(float) - 255) * (alpha / 255)).astype(np.uint8)


def _pixels(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, dict]:
    """Return what is stored, what is meant, and how the two belong together."""
    kind = rng.choice(["rgb", "rgb", "rgb", "alpha", "more", "grey", "inverted", "palette", "cmyk", "deep", "signed"])
    image = _drawing(rng, 3)
    if kind == "alpha":
        alpha = _flat(rng, image, 1)
        if rng.random() < 0.5:
            return np.dstack([image, alpha]), _on_white(image, alpha), {"extrasamples": ["unassalpha"]}
        premultiplied = np.rint(image * (alpha / 255)).astype(np.uint8)
        return np.dstack([premultiplied, alpha]), _on_white(image, alpha), {"extrasamples": ["assocalpha"]}
    if kind == "more":
        count = int(rng.integers(1, 3))
        return np.dstack([image, _flat(rng, image, count)]), image, {"extrasamples": [0] * count}
    grey = image[..., :1]
    if kind == "grey":
        return grey[..., 0], grey.repeat(3, -1), {"photometric": "minisblack"}
    if kind == "inverted":
        return 255 - grey[..., 0], grey.repeat(3, -1), {"photometric": "miniswhite"}
    if kind == "palette":
        colours = rng.integers(0, 256, (256, 3), np.uint8)
        return grey[..., 0], colours[grey[..., 0]], {"photometric": "palette", "colormap": colours.T * np.uint16(257)}
    if kind == "cmyk":
        return np.dstack([255 - image, 0 * grey]), image, {"photometric": "separated"}
    if kind == "deep":
        return image * np.uint16(257), image, {}
    if kind == "signed":
        return (image // 2).astype(np.int8), image // 2, {}
    return image, image, {}


def _shrunk(image: np.ndarray, factor: int) -> np.ndarray:
    height, width = image.shape[0] // factor, image.shape[1] // factor
    cut = image[: height * factor, : width * factor].astype(float)
    blocks = cut.reshape(height, factor, width, factor, *image.shape[2:])
    return np.floor(blocks.mean((1, 3)) + 0.5).astype(image.dtype)


def _tiff(rng: np.random.Generator, stem: Path) -> tuple[Path, np.ndarray]:
    stored, meant, how = _pixels(rng)
    plain = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    kind = rng.choice(["plain", "plain", "trestle", "aperio", "ome"])
    how = {"photometric": "rgb", "metadata": None, "compression": rng.choice(np.array(COMPRESSIONS, object))} | how
    how |= {"plain": plain, "trestle": TRESTLE, "aperio": APERIO, "ome": {}}[kind]
    if kind in {"trestle", "aperio"} or rng.random() < 0.6:
        how["tile"] = tuple(int(16 * side) for side in rng.integers(1, 9, 2))
    elif rng.random() < 0.5:
        how["rowsperstrip"] = int(rng.integers(1, 400))
    if how["compression"] in {"lzw", "deflate", "zstd"} and rng.random() < 0.3:
        how["predictor"] = True
    if rng.random() < 0.2 and meant is stored:
        how["photometric"] = "ycbcr"
        meant = np.asarray(Image.fromarray(stored, "YCbCr").convert("RGB"))
    planar = stored.ndim == 3 and rng.random() < 0.2
    if planar:
        how["planarconfig"] = "separate"
    orientation = int(rng.integers(1, 9)) if rng.random() < 0.1 else 1
    if orientation > 1:
        how["extratags"] = [(274, "H", 1, orientation, True)]
        meant = _turned(meant, orientation)
    levels = [stored, *(_shrunk(stored, factor) for factor in (2, 4)[: rng.integers(3)])]
    path = stem.with_suffix(".ome.tif" if kind == "ome" else ".svs" if kind == "aperio" else ".tif")
    form = {"bigtiff": bool(rng.random() < 0.2), "byteorder": rng.choice(["<", ">"]), "ome": kind == "ome"}
    with tifffile.TiffWriter(path, **form) as file:
        if kind == "plain" and rng.random() < 0.1:
            file.write(_shrunk(meant, 8), photometric="rgb", metadata=None, resolution=(2000, 2000))
        for number, level in enumerate(levels):
            pixels = np.moveaxis(level, -1, 0) if planar else level
            extra = {"subfiletype": int(number > 0)}
            if kind == "ome":
                size = {"axes": "SYX" if planar else "YXS"[: level.ndim], "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
                extra = {"subifds": len(levels) - 1, "metadata": size} if number == 0 else {"subfiletype": 1}
            file.write(pixels, **how | extra)
    return path, meant


def _turned(image: np.ndarray, orientation: int) -> np.ndarray:
    turned = Image.fromarray(image)
    turned.getexif()[274] = orientation
    return np.asarray(ImageOps.exif_transpose(turned))


def _picture(rng: np.random.Generator, stem: Path) -> tuple[Path, np.ndarray]:
    image = Image.fromarray(_drawing(rng, 3))
    mode = rng.choice(["RGB", "RGB", "RGBA", "L", "1", "P", "CMYK", "LAB", "YCbCr", "LA", "I;16"])
    image = image.convert("L").convert(mode) if mode in {"LA", "I;16"} else image.convert(mode)
    meant = image.convert("RGBA") if mode in {"RGBA", "LA"} else image
    meant = np.asarray(meant.convert("RGB"))
    path = stem.with_suffix(rng.choice([".png", ".jpg", ".tif", ".bmp", ".webp"]))
    orientation = int(rng.integers(1, 9)) if rng.random() < 0.2 and path.suffix != ".bmp" else 1
    how = {"lossless": True} if path.suffix == ".webp" else {}
    if orientation > 1:
        exif = Image.Exif()
        exif[274] = orientation
        how["exif"], meant = exif, _turned(meant, orientation)
    image.save(path, **how)
    return path, meant


def _damage(rng: np.random.Generator, path: Path) -> None:
    data = bytearray(path.read_bytes())
    if rng.random() < 0.4:
        del data[rng.integers(len(data)) :]
    else:
        reach = len(data) if rng.random() < 0.5 else min(len(data), 400)  # most is decided in the first bytes
        for place in rng.integers(reach, size=int(rng.integers(1, 6))):
            data[place] ^= 1 << rng.integers(8)
    path.write_bytes(data)
