"""Search all tissue of a part of a cohort for the place that a drawn image resembles most, pixel by pixel.

A copy may come from anywhere in a region, and be turned or mirrored, as patches cut for training are. A sample of
training patches would miss nearly all copies; this search covers every position. It first compares images shrunk to
few pixels, then the best places at full size. It compares grey levels or, since drawn images share the outlines of
their masks with real ones, the texture that is left when all that a mask tells is taken out.

Shapes: H, W = rows and columns of a region, h, w = those of a template, n = regions of one size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import fft, ndimage

from counterstain.data.cohort import Cohort
from counterstain.data.patches import Patch, Source, turn, turn_back
from counterstain.data.relabel import redrawn_pixels
from counterstain.data.sampling import PatchSampler, SamplingConfig
from counterstain.errors import InputError
from counterstain.generators.interface import ImageGenerator
from counterstain.generators.methods import METHODS
from counterstain.seeding import derive
from counterstain.synthesis.synthesize import Verdict
from counterstain.taxonomy import BACKGROUND

COARSE_PX = 16  # edge of a patch in the first search
CANDIDATES = 24  # places that are compared at full size
APART_PX = 4  # shrunk pixels: places that are nearer to each other may count as one
FLAT = 2.0  # grey levels: what varies less counts as empty, not as alike
FLAT_TEXTURE = 0.2  # standard deviations of texture, likewise
TEXTURE_PX = 32  # edge of a patch in the first search for texture
DEPTHS_PX = (-16, -8, -4, -2, -1, 1, 2, 4, 8, 16)  # from the border of an instance; between them, a mask tells the mean
LEVELS = 31  # of a standard deviation of texture, in memory
LEAST = 1e-3  # similarity that counts as none
LEAST_PATIENTS, REAL_PATCHES = 3, 200  # of a novelty filter
PER_PATIENT = 4  # places of each patient's tissue that are compared at full size
COPY_QUANTILE = 0.99  # of the held-out patches resemble training tissue less than what counts as a copy
LEAST_SHARE = 0.1  # of a patch's pixels: fewer are alike by chance

Shown = Mapping[int, Sequence[Source]]  # the places of the tissue that a generator was shown, by the number of an image
NOTHING_SHOWN: Shown = MappingProxyType({})
Turn = tuple[bool, int]
TURNS: tuple[Turn, ...] = tuple((flipped, turns) for flipped in (False, True) for turns in range(4))


@dataclass(frozen=True, slots=True)
class Match:
    """The place of the training tissue that an image resembles most."""

    similarity: float  # correlation of the grey levels, -1 to 1; 1 is a copy, whatever its brightness and contrast
    region: int  # position of the region in the cohort
    y_px: int
    x_px: int
    flipped: bool
    quarter_turns: int  # how the tissue was mirrored and turned, as in :class:`~counterstain.data.patches.Source`


class _Place(NamedTuple):
    similarity: float
    region: int
    y: int  # in shrunk pixels
    x: int
    how: Turn


class CopySearch:
    """The tissue of some parts of a cohort, ready to be searched for patches of ``size_px``.

    With ``texture``, what is compared is the texture of patches (see :func:`texture_of`) instead of their grey levels.
    """

    def __init__(
        self, cohort: Cohort, size_px: int, *, parts: Sequence[str] = ("train",), texture: bool = False
    ) -> None:
        self._cohort, self._size_px, self._texture = cohort, size_px, texture
        self._shrink = max(1, size_px // (TEXTURE_PX if texture else COARSE_PX))
        self._flat = FLAT_TEXTURE if texture else FLAT
        self._names = {str(name): position for position, name in enumerate(cohort.regions["region"])}
        self._patients = cohort.regions["patient"].astype(str).tolist()
        self._textures: dict[int, np.ndarray] = {}  # by position, a byte per pixel
        by_shape: dict[tuple[int, ...], dict[int, np.ndarray]] = {}
        for position in np.concatenate([cohort.positions(part) for part in parts]).tolist():
            seen = self._seen(*cohort.read(position))
            if texture and self._shrink > 1:
                self._textures[position] = np.rint(seen.clip(-4, 4) * LEVELS).astype(np.int8)
            coarse = _shrunk(seen, self._shrink)
            by_shape.setdefault(coarse.shape, {})[position] = coarse
        self._stacks = [(list(regions), _Stack(np.stack(list(regions.values())))) for regions in by_shape.values()]

    def best(
        self, image: np.ndarray, mask: np.ndarray | None = None, *, apart_from: Sequence[Source] = ()
    ) -> Match | None:
        """Find the place that an image, (size_px, size_px, 3) uint8, resembles most in its grey levels.

        Only the pixels of ``mask`` (size_px, size_px) bool are compared, where given; None where these are less than a
        tenth. Windows that overlap one of the patches ``apart_from`` are left out.
        """
        inside = _weights(image.shape[:2], mask)
        if inside is None:
            return None
        seen = _grey(image)
        found = (place for scores in self._scored(seen, inside, apart_from) for place in _peaks(*scores))
        places = sorted(found, key=lambda place: -place.similarity)
        return max((self._refined(seen, inside, p) for p in places[:CANDIDATES]), key=lambda match: match.similarity)

    def by_patient(self, patch: Patch, mask: np.ndarray | None = None) -> dict[str, Match]:
        """Find, for each patient, the place of their tissue that a patch resembles most; see :meth:`best`.

        Empty where less than a tenth of the patch is compared.
        """
        inside = _weights(patch.instances.shape, mask)
        if inside is None:
            return {}
        seen = self._seen(patch.image, patch.instances)
        places: dict[str, list[_Place]] = {}
        for positions, scores, how in self._scored(seen, inside, ()):
            for position, of_region in zip(positions, scores, strict=True):
                y, x = divmod(int(of_region.argmax()), of_region.shape[1])
                place = _Place(float(of_region[y, x]), position, y, x, how)
                places.setdefault(self._patients[position], []).append(place)
        nearest = {who: sorted(some, key=lambda place: -place.similarity)[:PER_PATIENT] for who, some in places.items()}
        return {
            who: max((self._refined(seen, inside, place) for place in some), key=lambda match: match.similarity)
            for who, some in nearest.items()
        }

    def crop(self, match: Match) -> np.ndarray:
        """Return the tissue of a match, turned like the image, (size_px, size_px, 3) uint8."""
        window = self._cohort.patch(match.region, match.y_px, match.x_px, self._size_px).image
        return turn(window, flipped=match.flipped, quarter_turns=match.quarter_turns)

    def name_of(self, match: Match) -> str:
        """Return the name of the region where a match lies."""
        return str(self._cohort.regions["region"].iloc[match.region])

    def _seen(self, image: np.ndarray, instances: np.ndarray) -> np.ndarray:
        return texture_of(image, instances) if self._texture else _grey(image)

    def _scored(
        self, seen: np.ndarray, inside: np.ndarray, apart_from: Sequence[Source]
    ) -> Iterator[tuple[list[int], np.ndarray, Turn]]:
        """Yield regions (positions) with the scores of all their places, (n, rows, columns), for every way to turn."""
        for how in TURNS:
            weights = _turned(inside, how)
            share = _shrunk(weights, self._shrink)
            coarse = _shrunk(_turned(seen, how) * weights, self._shrink) / np.maximum(share, 1e-6)
            for positions, stack in self._stacks:
                scores = stack.correlation(coarse, share, self._flat)
                for source in apart_from:
                    own = self._names.get(source.region)  # none where regions have pseudonyms
                    if own in positions:
                        self._leave_out(scores[positions.index(own)], source)
                yield positions, scores, how

    def _leave_out(self, scores: np.ndarray, source: Source) -> None:
        """Exclude the windows that overlap a patch from a region's scores."""
        reach = -(-self._size_px // self._shrink)
        y, x = source.y_px // self._shrink, source.x_px // self._shrink
        scores[max(0, y - reach + 1) : y + reach, max(0, x - reach + 1) : x + reach] = -np.inf

    def _refined(self, seen: np.ndarray, inside: np.ndarray, place: _Place) -> Match:
        """Search around a place at full size."""
        size, shrink, (flipped, turns) = self._size_px, self._shrink, place.how
        if shrink == 1:
            return Match(place.similarity, place.region, place.y, place.x, flipped, turns)
        height, width = self._cohort.regions[["height_px", "width_px"]].iloc[place.region].tolist()
        y0 = min(max(0, (place.y - 1) * shrink), height - size)
        x0 = min(max(0, (place.x - 1) * shrink), width - size)
        rows, columns = min(size + 2 * shrink, height - y0), min(size + 2 * shrink, width - x0)
        if self._texture:
            around = self._textures[place.region][y0 : y0 + rows, x0 : x0 + columns] / np.float32(LEVELS)
        else:
            around = _grey(self._cohort.cut(place.region, y0, x0, rows, columns).image)
        stack = _Stack(around[None])
        scores = stack.correlation(_turned(seen, place.how), _turned(inside, place.how), self._flat)[0]
        y, x = divmod(int(scores.argmax()), scores.shape[1])
        return Match(float(scores[y, x]), place.region, y0 + y, x0 + x, flipped, turns)


def texture_of(image: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """Return what a mask does not tell of an image, (H, W) float32: grey levels standardised along the borders.

    Pixels of one instance, or of background, that are about as far from its border have mean 0 and standard deviation 1
    (less where they hardly vary). So two images of one mask are not alike for that.
    """
    grey = _grey(image)
    inside = instances != BACKGROUND
    depth = ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)
    pixels = np.stack([instances.ravel(), np.digitize(depth, DEPTHS_PX).ravel()])
    _, group = np.unique(pixels[0].astype(np.int64) * (len(DEPTHS_PX) + 1) + pixels[1], return_inverse=True)
    count = np.bincount(group)
    residual = grey.ravel() - (np.bincount(group, grey.ravel()) / count)[group]
    spread = np.sqrt(np.bincount(group, residual**2) / count)
    return np.asarray((residual / np.maximum(spread, FLAT)[group]).reshape(grey.shape), np.float32)


def _weights(shape: tuple[int, ...], mask: np.ndarray | None) -> np.ndarray | None:
    inside = np.ones(shape, np.float32) if mask is None else mask.astype(np.float32)
    return None if inside.mean() < LEAST_SHARE else inside


class _Stack:
    """Regions (n, H, W) of one size with their Fourier transforms."""

    def __init__(self, regions: np.ndarray) -> None:
        self.shape = regions.shape[1:]
        self._padded = tuple(fft.next_fast_len(length, real=True) for length in self.shape)
        self._type = regions.dtype
        centred = regions - regions.mean()  # sums of squares keep their digits
        self._values, self._squares = fft.rfft2(centred, self._padded), fft.rfft2(centred**2, self._padded)
        self._moments = lru_cache(len(TURNS))(self._moments_of)

    def correlation(self, template: np.ndarray, weights: np.ndarray, flat: float) -> np.ndarray:
        """Return Pearson's correlation of a weighted template (h, w) with every window, (n, H - h + 1, W - w + 1).

        What varies less than ``flat`` counts as empty.
        """
        total = float(weights.sum())
        deviation = weights * (template - (weights * template).sum() / total)
        floor = flat**2 * total
        spread = np.maximum(self._moments(weights.astype(np.float32).tobytes(), weights.shape), floor)
        scale = np.sqrt(max(float((deviation * template).sum()), floor) * spread)
        return np.asarray(self._slid(self._values, deviation) / scale)

    def _moments_of(self, weights: bytes, shape: tuple[int, int]) -> np.ndarray:
        """Return the weighted sum of squared deviations of every window."""
        given = np.frombuffer(weights, np.float32).reshape(shape)
        return self._slid(self._squares, given) - self._slid(self._values, given) ** 2 / float(given.sum())

    def _slid(self, transformed: np.ndarray, template: np.ndarray) -> np.ndarray:
        product = transformed * np.conj(fft.rfft2(template.astype(self._type), self._padded))
        rows, columns = (length - edge + 1 for length, edge in zip(self.shape, template.shape, strict=True))
        return np.asarray(fft.irfft2(product, self._padded)[:, :rows, :columns])


def _peaks(positions: Sequence[int], scores: np.ndarray, how: Turn) -> Iterator[_Place]:
    """Yield the highest of (n, H, W) scores, one of each small square at most."""
    count, height, width = scores.shape
    rows, columns = -(-height // APART_PX), -(-width // APART_PX)
    padded = np.full((count, rows * APART_PX, columns * APART_PX), -np.inf)
    padded[:, :height, :width] = scores
    squares = padded.reshape(count, rows, APART_PX, columns, APART_PX).swapaxes(2, 3).reshape(-1, APART_PX**2)
    best = squares.max(1)
    for square in np.argsort(-best, kind="stable")[:CANDIDATES].tolist():
        member, row, column = (int(i) for i in np.unravel_index(square, (count, rows, columns)))
        y, x = divmod(int(squares[square].argmax()), APART_PX)
        yield _Place(float(best[square]), positions[member], row * APART_PX + y, column * APART_PX + x, how)


def _grey(image: np.ndarray) -> np.ndarray:
    return np.asarray(image.mean(axis=2, dtype=np.float32), np.float64)


def _turned(array: np.ndarray, how: Turn) -> np.ndarray:
    return turn_back(array, flipped=how[0], quarter_turns=how[1])


def _shrunk(values: np.ndarray, factor: int) -> np.ndarray:
    """Average (H, W) over squares of ``factor`` pixels; the remainder at the far edges is cut off."""
    height, width = (length // factor for length in values.shape)
    whole = values[: height * factor, : width * factor]
    return np.asarray(whole.reshape(height, factor, width, factor).mean((1, 3)))


def copy_table(
    search: CopySearch, patches: Sequence[Patch], kept: Collection[int] | None = None, *, shown: Shown = NOTHING_SHOWN
) -> pd.DataFrame:
    """Search for every patch of a sequence.

    Where ``kept``, the subtypes that inpainting does not draw, is given, only the pixels of all other instances are
    compared: the rest of an inpainted image is a copy, as it should be. An image is not compared with the places that
    its generator was ``shown``, by its number. Returns a row per patch that could be compared, the most similar first:
    image (number), similarity, region (position), y_px, x_px, flipped, quarter_turns.
    """
    rows = []
    for number, patch in enumerate(patches):
        compared = None if kept is None else redrawn_pixels(patch.instances, patch.subtypes, kept)
        match = search.best(patch.image, compared, apart_from=shown.get(number, ()))
        if match is not None:
            rows.append({"image": number} | asdict(match))
    return _table(rows).sort_values("similarity", ascending=False, ignore_index=True)


def _table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["image", *Match.__dataclass_fields__])


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiesFound:
    """How similar images are to the training tissue that they resemble most."""

    share: float = float("nan")
    """Share of the images that are more similar, pixel by pixel, than 99 % of the held-out ones. Of inpainted images
    what was drawn is compared, of the held-out ones then the instances. NaN where nothing was searched for."""
    table: pd.DataFrame = field(default_factory=lambda: _table([]))  # see :func:`copy_table`


class CopyCheck:
    """A search that knows how similar ``held_out`` tissue of other patients is; ``most`` patches of a kind each."""

    def __init__(self, search: CopySearch, held_out: Sequence[Patch], most: int) -> None:
        self.search, self._held_out, self._most = search, held_out, most
        self._limits: dict[frozenset[int] | None, float] = {}

    def look(
        self, patches: Sequence[Patch], kept: frozenset[int] | None = None, *, shown: Shown = NOTHING_SHOWN
    ) -> CopiesFound:
        """Search for patches, or, where ``kept`` is given, for what inpainting drew of them; see :func:`copy_table`."""
        if kept not in self._limits:
            of_held_out = copy_table(self.search, self._first(self._held_out), kept)
            self._limits[kept] = float(of_held_out["similarity"].quantile(COPY_QUANTILE))  # NaN where none is compared
        table = copy_table(self.search, self._first(patches), kept, shown=shown)
        compared = len(table) and np.isfinite(self._limits[kept])
        share = float((table["similarity"] > self._limits[kept]).mean()) if compared else float("nan")
        return CopiesFound(share=share, table=table)

    def _first(self, patches: Sequence[Patch]) -> list[Patch]:
        return [patches[i] for i in range(min(self._most, len(patches)))]


class NoveltyFilter:
    """Refuses drawn images that are too near to training tissue; an ImageFilter of synthesis.

    An image is too near if it stands out by one training patient (similarity to the nearest over that to the median
    one) as only ``share`` of real training patches stand out by another patient. Of inpainted images, what was redrawn
    is compared; where images keep the nuclei of real ones (``shown``), their own patients are left out.
    """

    masks = 4  # tried for one patch

    @classmethod
    def of(cls, generator: ImageGenerator, cohort: Cohort, size_px: int, share: float) -> NoveltyFilter:
        """Make the filter for the images of a generator; InputError for fewer than three training patients."""
        inpaints = generator.method in METHODS and METHODS[generator.method].inpaints
        return cls(cohort, size_px, share, inpaints=inpaints, shown="counterstain" in generator.settings)

    def __init__(self, cohort: Cohort, size_px: int, share: float, *, inpaints: bool, shown: bool) -> None:
        if len(cohort.patients("train")) < LEAST_PATIENTS:
            raise InputError(f"{cohort.folder}: novelty needs {LEAST_PATIENTS} training patients at least")
        self._search = CopySearch(cohort, size_px, texture=True)
        self._inpaints, self._shown = inpaints, shown
        real = PatchSampler(cohort, "train", size_px, SamplingConfig(), derive(0, "novel"))
        found = [self._stands_out(real[i], None, apart_from=real[i].source.patient) for i in range(REAL_PATCHES)]
        self._limit = float(np.quantile(found, 1 - share))
        self.settings: Mapping[str, Any] = {"novel": share, "limit": self._limit}
        self.patients_seen: Sequence[str] = cohort.patients("train")

    def __call__(self, patches: Sequence[Patch], redraw: np.ndarray) -> list[Verdict]:
        """Judge images; ``redraw`` (n, H, W) bool says which pixels were drawn anew."""
        return [
            Verdict(
                kept=self._stands_out(
                    patch, mask if self._inpaints else None, apart_from=patch.source.patient if self._shown else None
                )
                <= self._limit
            )
            for patch, mask in zip(patches, redraw, strict=True)
        ]

    def _stands_out(self, patch: Patch, mask: np.ndarray | None, *, apart_from: str | None) -> float:
        found = self._search.by_patient(patch, mask)
        near = [match.similarity for patient, match in found.items() if patient != apart_from]
        return float(max(near) / max(np.median(near), LEAST)) if near else 0.0
