"""Label images: masks of one tissue class, and images that hold the id of a subtype in every pixel.

What a value means is decided for each file, from its values as they are stored. Where that is not certain (0 drawn
white, palettes, several grey levels, losses of compression), an InputError asks for ``--mask-values``.
Shapes: H, W = rows and columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from counterstain.errors import ConfigError, InputError, TaxonomyError
from counterstain.io.pixel_readers import ORIENTATION, PHOTOMETRIC, SAMPLE_FORMAT, decoder_of, opened_image
from counterstain.taxonomy import BACKGROUND, IGNORE, Taxonomy

TISSUE = 1  # label of the tissue class in what read_mask returns
THRESHOLD = 127
FEW_LEVELS = 8  # a mask with more grey levels was smeared by interpolation or compression
MIDDLE_OF_FEW, MIDDLE_OF_MANY = (0, 240), (40, 215)  # grey levels in between are neither background nor tissue
ALONE, LEAST_OBJECT_PX = 0.3, 4  # share of grey levels that lie alone, and pixels of such a level: see _holds_ids
ON_BLOCKS, SIDES = 0.3, 4
SHOWN_LEVELS = 5
LOSSY_FORMATS = {"JPEG", "MPO"}
LOSSY_TIFF = {"jpeg", "tiff_jpeg", "webp", "jpeg2000"}
LOSSY = "was compressed with losses (JPEG or similar), which change values"
MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16", "I;16B", "I;16L", "I;16N"}
WHITE_IS_ZERO, WHITE = 0, 0xFFFFFF
Drawn = dict[int, tuple[int, Path]]  # values of the files read so far: colour, 0xrrggbb, and the first such file
KEY = re.compile(r"(?P<low>\d{1,10})(?:\s*-\s*(?P<high>\d{1,10}))?|#(?P<colour>[0-9a-fA-F]{6})")


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
            return _packed(self.palette[self.values])
        values = self.highest - self.values if self.white_is_zero else self.values
        return np.asarray(values, np.int64) * 255 // self.highest * 0x010101

    def drawn(self) -> dict[int, int]:
        """Return the colour, 0xrrggbb, of every value that occurs in a palette; of 0 in a grey image."""
        values = _levels(self.values)[0]
        if self.palette is None:
            return {0: WHITE if self.white_is_zero else 0} if values[0] == 0 else {}
        return {value: int(colour) for value, colour in zip(values, _packed(self.palette[values]), strict=True)}

    def shares(self) -> str:
        """Say which values there are and how much of the image each covers."""
        levels, counts = _levels(self.values)
        ranked = sorted(zip(counts, levels, strict=True), key=lambda item: (-item[0], item[1]))
        named = [
            f"{f'#{level:06x}' if self.coloured else level} ({count / self.values.size:.1%})"
            for count, level in ranked[:SHOWN_LEVELS]
        ]
        return ", ".join(named) + (f" and {len(ranked) - SHOWN_LEVELS} more" if len(ranked) > SHOWN_LEVELS else "")


def _levels(values: np.ndarray) -> tuple[list[int], list[int]]:
    """Return the values of an image and how many pixels have each; counting is faster than sorting."""
    if values.dtype != np.uint8:
        levels, counts = np.unique(values, return_counts=True)
        return levels.tolist(), counts.tolist()
    found = np.bincount(values.ravel())
    return found.nonzero()[0].tolist(), found[found > 0].tolist()


def read_stored(path: Path) -> StoredLabels:
    """Read a label image as it is stored; raises InputError where its layout cannot hold labels."""
    with opened_image(path, labels=True) as image:
        decoder = decoder_of(image)
        _check_layout(path, image, decoder)
        lossy = image.format in LOSSY_FORMATS or image.info.get("compression") in LOSSY_TIFF
        lossy |= image.format == "WEBP" and b"VP8 " in path.read_bytes()  # the chunk without losses is VP8L
        white_is_zero = image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO  # type: ignore[attr-defined]
        if image.mode == "P":
            colours = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            palette = np.pad(colours, ((0, 256 - len(colours)), (0, 0)))
            return StoredLabels(np.asarray(image), palette=palette, lossy=lossy)
        if image.mode.startswith("I"):
            numbers = np.asarray(image).astype(np.int64)
            if image.format == "TIFF" and image.tag_v2.get(SAMPLE_FORMAT, (1,)) == (1,):  # type: ignore[attr-defined]
                numbers %= 2**32  # Pillow gives 32 bits a sign
            highest = next(most for most in (2**16 - 1, 2**31 - 1, 2**32 - 1) if numbers.max() <= most)
            return StoredLabels(numbers, highest, white_is_zero=white_is_zero, lossy=lossy)
        if image.mode in {"1", "L", "LA"}:
            few = re.search(r"L;([24])", decoder)  # Pillow spreads them
            highest = 1 if image.mode == "1" else 2 ** int(few[1]) - 1 if few else 255
            shown = np.asarray(image.convert("L")) // (255 // highest)
            return StoredLabels(highest - shown if white_is_zero else shown, highest, False, None, white_is_zero, lossy)
        pixels = np.asarray(image.convert("RGB"))
    if (pixels == pixels[..., :1]).all():
        return StoredLabels(pixels[..., 0], lossy=lossy)
    return StoredLabels(_packed(pixels), 0xFFFFFF, coloured=True, lossy=lossy)


def _check_layout(path: Path, image: Image.Image, decoder: str) -> None:
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


def _packed(pixels: np.ndarray) -> np.ndarray:
    """Turn (..., 3) uint8 into (...) 0xrrggbb."""
    red, green, blue = (pixels[..., channel].astype(np.int32) for channel in range(3))
    return np.asarray(red << 16 | green << 8 | blue)


class ValueMeanings:
    """What users say that values mean: ``0=background,1-254=tissue,255=ignore`` or ``#ff0000=tissue,#ffffff=ignore``.

    A value is a number, a range or a colour; ``labels`` holds the label of every meaning that is allowed.
    """

    def __init__(self, given: str, labels: Mapping[str, int]) -> None:
        pairs = [part.partition("=")[::2] for part in given.split(",")]
        self._ranges = [self._range(key.strip(), meaning.strip(), labels) for key, meaning in pairs]
        self._coloured = {coloured for *_, coloured in self._ranges} == {True}
        ordered = sorted(self._ranges)
        if len({coloured for *_, coloured in ordered}) > 1:
            raise ConfigError("--mask-values: numbers and colours together; give one kind")
        for (_, high, _, _), (low, *_) in pairwise(ordered):
            if low <= high:
                raise ConfigError(f"--mask-values: {self._named(low)} is there twice; give each value one meaning")

    @staticmethod
    def _range(key: str, meaning: str, labels: Mapping[str, int]) -> tuple[int, int, int, bool]:
        found = KEY.fullmatch(key)
        if found is None:
            raise ConfigError(f"--mask-values: {key!r} is no value; expected 255, 1-254 or #ff0000, as in 255=tissue")
        if meaning not in labels:
            raise ConfigError(f"--mask-values: {key}={meaning}: unknown meaning; expected {', '.join(labels)}")
        if found["colour"]:
            low = high = int(found["colour"], 16)
        else:
            low, high = int(found["low"]), int(found["high"] or found["low"])
        if low > high:
            raise ConfigError(f"--mask-values: {key}: the range ends before it begins")
        return low, high, labels[meaning], bool(found["colour"])

    def _named(self, value: int) -> str:
        return f"#{value:06x}" if self._coloured else str(value)

    def labels(self, path: Path, stored: StoredLabels, drawn: Drawn) -> np.ndarray:
        """Return the (H, W) uint8 labels of an image.

        Raises InputError where a value was given no meaning, or numbers were given and ``drawn`` has other colours.
        """
        if stored.lossy:
            raise InputError(f"{path}: {LOSSY}; save it as PNG")
        if stored.coloured and not self._coloured:
            raise InputError(
                f"{path}: has colours, {stored.shares()}; give --mask-values colours, as in #ff0000=tissue"
            )
        if not self._coloured:
            _check_drawn(path, stored, drawn)
        values = stored.colours if self._coloured else stored.values
        labels = np.full(values.shape, -1, np.int16)
        for low, high, label, _ in self._ranges:
            labels[(values >= low) & (values <= high)] = label
        missing = values[labels < 0]
        if missing.size:
            raise InputError(
                f"{path}: --mask-values does not say what {self._named(int(missing.min()))} means, which covers "
                f"{(values == missing.min()).mean():.1%} of the image; add it"
            )
        return labels.astype(np.uint8)


def read_mask(
    path: Path,
    threshold: int | None = None,
    meanings: ValueMeanings | None = None,
    drawn: Drawn | None = None,
) -> tuple[np.ndarray, str]:
    """Read a mask: (H, W) uint8 with 0 = background, 1 = tissue, 255 = ignore; and in words what kind of mask it was.

    Values above ``threshold`` are tissue. Without one, grey levels are only taken for soft edges where no area, 3 x 3
    pixels, has a level between black and white. ``drawn`` is filled in; pass the same to all files of a table, so that
    a number that two of them draw in different colours is refused.

    Raises InputError as :func:`read_stored`, or where it is not certain what the values mean.
    """
    stored = read_stored(path)
    if meanings is not None:
        return meanings.labels(path, stored, {} if drawn is None else drawn), "read by --mask-values"
    values = _brightness(path, stored)
    levels, cut = set(_levels(values)[0]), THRESHOLD if threshold is None else threshold
    if levels == {0}:
        return values.astype(np.uint8), "without tissue"
    if stored.lossy and max(levels) <= cut:
        raise InputError(f"{path}: {LOSSY}; none is above {cut}, found {stored.shares()}; save masks as PNG")
    for white in (1, 255, stored.highest):
        if levels <= {0, white}:
            blocks = ", in blocks of 8 px as JPEG leaves them" if white == 1 and _as_jpeg_leaves(values) else ""
            return (values > 0).astype(np.uint8), f"of 0 and {white}{blocks}"
    if stored.highest != 255 or (
        threshold is None and (max(levels) <= cut or _has_middle_area(values, len(levels)) or _holds_ids(values))
    ):
        raise InputError(
            f"{path}: a mask has two values, 0 and 1 or 0 and 255; found {stored.shares()}. Say what they mean, as in "
            f"--mask-values 0=background,1-{stored.highest}=tissue{_OTHERWISE[stored.highest == 255]}"
        )
    return (values > cut).astype(np.uint8), f"with grey levels, {'cut at' if max(levels) > cut else 'none above'} {cut}"


_OTHERWISE = (
    ". If they are the numbers of instances, do not convert the image to 8 bits, which changes them",
    ", or cut them with --threshold; if they are the ids of subtypes, give --labels ids",
)


def _has_middle_area(values: np.ndarray, levels: int) -> bool:
    """Whether 3 x 3 pixels have one level between black and white, as no soft edge has."""
    low, high = MIDDLE_OF_FEW if levels <= FEW_LEVELS else MIDDLE_OF_MANY
    flat = _around(np.minimum, values) == _around(np.maximum, values)
    return bool((flat & (values > low) & (values < high))[1:-1, 1:-1].any())


def _around(function: np.ufunc, values: np.ndarray) -> np.ndarray:
    """Return the least or largest of every pixel and its eight neighbours, (H, W); far faster than scipy's filters."""
    padded = np.pad(values, 1, mode="edge")
    rows = function(function(padded[:-2], padded[1:-1]), padded[2:])
    return np.asarray(function(function(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:]))


def _holds_ids(values: np.ndarray) -> bool:
    """Whether grey levels lie alone, as ids do: most pixels of such a level touch no level but 0 and their own.

    So do 36 % or more of the levels of instances, crowded ones too, and 23 % at most of those of soft edges and JPEG.
    """
    lowest = _around(np.minimum, np.where(values > 0, values, values.dtype.type(255)))
    alone = (lowest == _around(np.maximum, values)) & (values > 0)
    counts, lone = (np.bincount(levels.ravel(), minlength=256)[1:255] for levels in (values, values[alone]))
    return bool(((2 * lone >= counts) & (lone >= LEAST_OBJECT_PX)).sum() > ALONE * (counts > 0).sum())


def _as_jpeg_leaves(mask: np.ndarray) -> bool:
    """Whether edges, of more than one box, lie on the borders of JPEG's blocks: 32 % or more, where chance gives 12."""
    across, down = (mask[:, 1:] != mask[:, :-1]).sum(0), (mask[1:] != mask[:-1]).sum(1)
    on_blocks = across[7::8].sum() + down[7::8].sum() > ON_BLOCKS * (across.sum() + down.sum())
    return bool(on_blocks and np.count_nonzero(across) + np.count_nonzero(down) > SIDES)


def read_ids(
    path: Path, taxonomy: Taxonomy, meanings: ValueMeanings | None = None, drawn: Drawn | None = None
) -> np.ndarray:
    """Read an image that holds an id of the taxonomy in every pixel, (H, W) uint8; ``drawn`` as in :func:`read_mask`.

    Raises InputError as :func:`read_stored`, or where it is not certain what the values mean; TaxonomyError where a
    value is no id.
    """
    stored, drawn = read_stored(path), {} if drawn is None else drawn
    if meanings is not None:
        return meanings.labels(path, stored, drawn)
    values = stored.values
    _check_certain(path, stored, taxonomy.names[0])
    _check_indices(path, stored, taxonomy)
    _check_drawn(path, stored, drawn)
    if stored.lossy:
        raise InputError(f"{path}: {LOSSY}, so ids cannot be read; save it as PNG")
    known = [BACKGROUND, IGNORE, *(subtype.id for subtype in taxonomy.subtypes)]
    wrong = np.argwhere(np.isin(values, known, invert=True))
    if len(wrong):
        y, x = wrong[0]
        names = ", ".join(f"{subtype.id} {subtype.name}" for subtype in taxonomy.subtypes)
        raise TaxonomyError(
            f"{path}: unknown id {values[y, x]} at row {y}, column {x} ({len(wrong)} pixels in all); "
            f"{taxonomy.name} has 0 background, {names}, 255 ignore"
        )
    return values.astype(np.uint8)


def _check_certain(path: Path, stored: StoredLabels, meaning: str) -> None:
    """Raise InputError where colours or MINISWHITE leave open what the values mean."""
    if stored.coloured:
        raise InputError(
            f"{path}: has colours, {stored.shares()}; say what they mean, as in --mask-values "
            f"#000000=background,#ff0000={meaning}. Do not convert it to grey, which makes other values of them"
        )
    if stored.white_is_zero:
        raise InputError(
            f"{path}: its file draws 0 white and {stored.highest} black (MINISWHITE), so what is tissue is open; "
            f"stored are {stored.shares()}. Say which, as in --mask-values 0=background,{stored.highest}={meaning}"
        )


def _brightness(path: Path, stored: StoredLabels) -> np.ndarray:
    """Return values in which more is brighter; raises InputError where values and colours disagree on that."""
    _check_certain(path, stored, "tissue")
    if stored.palette is None:
        return stored.values
    used = stored.palette[: max(1, int(stored.values.max())) + 1].astype(int)
    greys = used[:, 0]
    if (used != used[:, :1]).any() or (np.diff(greys) <= 0).any():
        darkest = min(_packed(used[[0, 1, *stored.drawn()]]), key=lambda colour: sum(int(colour).to_bytes(3)))
        raise _either(
            path,
            stored,
            lambda colour: "background" if colour == darkest else "tissue",
            lambda value: "tissue" if value else "background",
        )
    return stored.values if len(used) == 2 else greys[stored.values]


def _check_indices(path: Path, stored: StoredLabels, taxonomy: Taxonomy) -> None:
    """Raise InputError where the numbers of a palette are perhaps no ids, but in the order that a program gave them."""
    if stored.palette is None or all(colour == value * 0x010101 for value, colour in stored.drawn().items()):
        return
    first, grey = int(_packed(stored.palette[0])), (stored.palette == stored.palette[:, :1]).all()
    if grey or first not in {0, WHITE} or (first == WHITE and 0 in stored.drawn().values()):
        names = {BACKGROUND: "background", IGNORE: "ignore"} | {each.id: each.name for each in taxonomy.subtypes}
        raise _either(
            path,
            stored,
            lambda colour: names.get(colour % 256, "…") if colour % 0x010101 == 0 else "…",
            lambda value: names.get(value, "…"),
        )


def _either(
    path: Path, stored: StoredLabels, by_colour: Callable[[int], str], by_value: Callable[[int], str]
) -> InputError:
    """Return the question whether colours of a palette count or values, with what each would mean."""
    assert stored.palette is not None
    values = sorted({0, 1, *stored.drawn()})[:SHOWN_LEVELS]
    colours = {value: int(_packed(stored.palette[value])) for value in values}
    more = ",…" if len(stored.drawn()) > len(values) else ""
    drawn = ", ".join(f"{value} as #{colour:06x}" for value, colour in colours.items())
    readings = []
    for meaning, keys, pixels in (
        (by_colour, {f"#{colour:06x}": colour for colour in colours.values()}, stored.colours),
        (by_value, {str(value): value for value in values}, stored.values),
    ):
        given = ",".join(f"{key}={meaning(value)}" for key, value in sorted(keys.items()))
        levels, counts = np.unique(pixels, return_counts=True)
        background = sum(count for level, count in zip(levels, counts, strict=True) if meaning(level) == "background")
        readings.append(f"--mask-values {given}{more} ({background / pixels.size:.1%} background)")
    return InputError(
        f"{path}: its palette draws {drawn}, so whether values or colours count is not certain; stored are "
        f"{stored.shares()}. If colours count, give {readings[0]}; if values count, as in QuPath's label images, "
        f"give {readings[1]}"
    )


def _check_drawn(path: Path, stored: StoredLabels, drawn: Drawn) -> None:
    """Raise InputError where an earlier file drew a value in another colour, so that it may mean something else."""
    for value, colour in stored.drawn().items():
        known, first = drawn.setdefault(value, (colour, path))
        if known != colour:
            raise InputError(
                f"{path}: draws {value} as #{colour:06x} but {first.name} as #{known:06x}, so the number may mean two "
                "things; give --mask-values by colours, as in #000000=background, or save all label images alike"
            )
