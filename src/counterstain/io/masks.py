"""Label images: masks of one tissue class, and images that hold the id of a subtype in every pixel.

What a value means is decided for each file, from its values as they are stored. Where that is not certain (0 drawn
white, palettes, several grey levels, losses of compression), an InputError asks for ``--mask-values``.
Shapes: H, W = rows and columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np

from counterstain.errors import ConfigError, InputError, TaxonomyError
from counterstain.io.parts import Source
from counterstain.io.stored_labels import (
    LOSSY,
    SHOWN_LEVELS,
    WHITE,
    Drawn,
    StoredLabels,
    check_drawn,
    levels_of,
    packed,
    read_stored,
)
from counterstain.taxonomy import BACKGROUND, IGNORE, Taxonomy

TISSUE = 1  # label of the tissue class in what read_mask returns
THRESHOLD = 127
FEW_LEVELS = 8  # a mask with more grey levels was smeared by interpolation or compression
MIDDLE_OF_FEW, MIDDLE_OF_MANY = (0, 240), (40, 215)  # grey levels in between are neither background nor tissue
ALONE, LEAST_OBJECT_PX = 0.3, 4  # share of grey levels that lie alone, and pixels of such a level: see _holds_ids
ON_BLOCKS, SIDES = 0.3, 4
MANY_UNKNOWN = 8  # values without a meaning
KEY = re.compile(r"(?P<low>\d{1,10})(?:\s*-\s*(?P<high>\d{1,10}))?|#(?P<colour>[0-9a-fA-F]{6})")


class ValueMeanings:
    """What users say that values mean: ``0=background,1-254=tissue,255=ignore`` or ``#ff0000=tissue,#ffffff=ignore``.

    A value is a number, a range or a colour; ``labels`` holds the label of every meaning that is allowed. ``said`` is
    the option or the file that says so, a mapping in a file.
    """

    def __init__(
        self, given: str | Mapping[str, str], labels: Mapping[str, int], said: str | Path = "--mask-values"
    ) -> None:
        pairs = [part.partition("=")[::2] for part in given.split(",")] if isinstance(given, str) else given.items()
        self._said = said
        self._ranges = [self._range(key.strip(), meaning.strip(), labels) for key, meaning in pairs]
        self._coloured = {coloured for *_, coloured in self._ranges} == {True}
        ordered = sorted(self._ranges)
        if len({coloured for *_, coloured in ordered}) > 1:
            raise ConfigError(f"{said}: numbers and colours together; give one kind")
        for (_, high, _, _), (low, *_) in pairwise(ordered):
            if low <= high:
                raise ConfigError(f"{said}: {self._named(low)} is there twice; give each value one meaning")

    def _range(self, key: str, meaning: str, labels: Mapping[str, int]) -> tuple[int, int, int, bool]:
        found = KEY.fullmatch(key)
        if found is None:
            raise ConfigError(f"{self._said}: {key!r} is no value; expected 255, 1-254 or #ff0000, as in 255=tissue")
        if meaning not in labels:
            raise ConfigError(f"{self._said}: {key}={meaning}: unknown meaning; expected {', '.join(labels)}")
        if found["colour"]:
            low = high = int(found["colour"], 16)
        else:
            low, high = int(found["low"]), int(found["high"] or found["low"])
        if low > high:
            raise ConfigError(f"{self._said}: {key}: the range ends before it begins")
        return low, high, labels[meaning], bool(found["colour"])

    def _named(self, value: int) -> str:
        return f"#{value:06x}" if self._coloured else str(value)

    def labels(self, path: Source, stored: StoredLabels, drawn: Drawn) -> np.ndarray:
        """Return the (H, W) uint8 labels of an image.

        Raises InputError where a value was given no meaning, or numbers were given and ``drawn`` has other colours.
        """
        if stored.lossy:
            raise InputError(f"{path}: {LOSSY}; save it as PNG")
        if stored.coloured and not self._coloured:
            raise InputError(
                f"{path}: has colours, {stored.shares()}; give --mask-values colours, as in #ff0000=tissue"
            )
        if self._coloured and not stored.coloured and stored.highest > IGNORE:
            raise InputError(
                f"{path}: holds numbers, {stored.shares()}, where {self._said} names colours; name numbers"
            )
        if not self._coloured:
            check_drawn(path, stored, drawn)
        values = stored.colours if self._coloured else stored.values
        labels = np.full(values.shape, -1, np.int16)
        for low, high, label, _ in self._ranges:
            labels[(values >= low) & (values <= high)] = label
        unknown, counts = np.unique(values[labels < 0], return_counts=True)
        if unknown.size:
            found = values == unknown[0]
            y, x = np.argwhere(found)[0]
            many = f". So it is with {len(unknown) - 1:,} more values: was it resized or saved as JPEG before?"
            raise InputError(
                f"{path}: {self._said} does not say what {self._named(int(unknown[0]))} means, which covers "
                f"{found.mean():.1%} of the image ({counts[0]:,} pixels, the first in row {y}, column {x}); add it"
                + (many if len(unknown) > MANY_UNKNOWN else "")
            )
        return labels.astype(np.uint8)


def read_mask(
    path: Source,
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
    levels, cut = set(levels_of(values)[0]), THRESHOLD if threshold is None else threshold
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
    path: Source, taxonomy: Taxonomy, meanings: ValueMeanings | None = None, drawn: Drawn | None = None
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
    check_drawn(path, stored, drawn)
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


def _check_certain(path: Source, stored: StoredLabels, meaning: str) -> None:
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


def _brightness(path: Source, stored: StoredLabels) -> np.ndarray:
    """Return values in which more is brighter; raises InputError where values and colours disagree on that."""
    _check_certain(path, stored, "tissue")
    if stored.palette is None:
        return stored.values
    used = stored.palette[: max(1, int(stored.values.max())) + 1].astype(int)
    greys = used[:, 0]
    if (used != used[:, :1]).any() or (np.diff(greys) <= 0).any():
        darkest = min(packed(used[[0, 1, *stored.drawn()]]), key=lambda colour: sum(int(colour).to_bytes(3)))
        raise _either(
            path,
            stored,
            lambda colour: "background" if colour == darkest else "tissue",
            lambda value: "tissue" if value else "background",
        )
    return stored.values if len(used) == 2 else greys[stored.values]


def _check_indices(path: Source, stored: StoredLabels, taxonomy: Taxonomy) -> None:
    """Raise InputError where the numbers of a palette are perhaps no ids, but in the order that a program gave them."""
    if stored.palette is None or all(colour == value * 0x010101 for value, colour in stored.drawn().items()):
        return
    first, grey = int(packed(stored.palette[0])), (stored.palette == stored.palette[:, :1]).all()
    if grey or first not in {0, WHITE} or (first == WHITE and 0 in stored.drawn().values()):
        names = {BACKGROUND: "background", IGNORE: "ignore"} | {each.id: each.name for each in taxonomy.subtypes}
        raise _either(
            path,
            stored,
            lambda colour: names.get(colour % 256, "…") if colour % 0x010101 == 0 else "…",
            lambda value: names.get(value, "…"),
        )


def _either(
    path: Source, stored: StoredLabels, by_colour: Callable[[int], str], by_value: Callable[[int], str]
) -> InputError:
    """Return the question whether colours of a palette count or values, with what each would mean."""
    assert stored.palette is not None
    values = sorted({0, 1, *stored.drawn()})[:SHOWN_LEVELS]
    colours = {value: int(packed(stored.palette[value])) for value in values}
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
