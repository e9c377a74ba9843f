"""What a filter of drawn images answers, and how often it refused what.

The filter itself belongs to the audit; drawing only asks it. So the same filter serves every method.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

import counterstain
from counterstain.checkpoints import CheckpointHeader, require_taxonomy
from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import (
    SHARD_PATCHES,
    JudgedInstance,
    PatchSet,
    PatchSetHeader,
    PatchSetWriter,
    SyntheticPatch,
)
from counterstain.data.patches import Patch
from counterstain.data.sampling import PatchSampler
from counterstain.data.split import check_no_leak
from counterstain.errors import ConfigError, MismatchError
from counterstain.generators.interface import ImageGenerator
from counterstain.progress import bar
from counterstain.seeding import derive
from counterstain.storage import claimed
from counterstain.synthesis.masks import Layouts, SynthesisConfig, draw_layouts
from counterstain.synthesis.styles import StyleDrawer, style_drawer
from counterstain.taxonomy import BACKGROUND, IGNORE, Taxonomy


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a filter says of one drawn image."""

    kept: bool
    instances: tuple[tuple[int, bool], ...]
    """Asked subtype of each judged instance, and whether it looks like it."""


class ImageFilter(Protocol):
    """A judge of drawn images; what it says of one must not depend on the others."""

    @property
    def masks(self) -> int:
        """How many masks are tried at most for one patch."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that its verdicts depend on, for the record."""

    @property
    def patients_seen(self) -> Sequence[str]:
        """Patients that it learnt from."""

    def __call__(self, patches: Sequence[Patch], redraw: np.ndarray) -> list[Verdict]:
        """Judge images with their asked subtypes; ``redraw`` (n, H, W) bool says which pixels were drawn anew."""


def rejections(judged: pd.DataFrame, taxonomy: Taxonomy) -> pd.DataFrame:
    """Count what a filter refused, by subtype.

    Parameters
    ----------
    judged : pandas.DataFrame
        A row per drawn and judged instance: ``index``, ``drawing``, ``subtype``, ``agreed``, ``kept`` (its image).

    Returns
    -------
    pandas.DataFrame
        A row per subtype: ``subtype`` (name), ``drawn`` (instances), ``disagreed`` (those that look like another
        subtype), ``refused`` (those in refused images), ``rejection_rate`` (refused / drawn; NaN where none was drawn).
    """
    rows = []
    for subtype in taxonomy.subtypes:
        of_subtype = judged[judged["subtype"] == subtype.id]
        drawn, refused = len(of_subtype), int((~of_subtype["kept"]).sum())
        rate = refused / drawn if drawn else float("nan")
        rows.append((subtype.name, drawn, int((~of_subtype["agreed"]).sum()), refused, rate))
    return pd.DataFrame(rows, columns=["subtype", "drawn", "disagreed", "refused", "rejection_rate"])


# Draw the images of a synthetic set, shard by shard; what a filter refuses is drawn again.
#
# A patch is drawn anew with further seeds, ``attempts`` times at most. Where a judge still refuses it, its place is
# given to another mask: that of a patch far beyond the end of any set, so that no mask is used twice.

OTHER_MASKS = 2**32  # blocks between a mask and the one that takes its place; no set is so long


@dataclass(frozen=True, kw_only=True)
class ShardDrawer:
    """Draws the patches of any shard of one set."""

    generator: ImageGenerator
    sampler: PatchSampler
    config: SynthesisConfig
    seed: int
    style: StyleDrawer | None = None
    judge: ImageFilter | None = None

    def __call__(self, shard: int) -> list[SyntheticPatch]:
        """Draw a shard, in the order of its patches."""
        layouts = draw_layouts(self.sampler, self.config, self.seed, shard)
        drawn = self._draw(layouts, range(SHARD_PATCHES))
        for mask in range(1, 1 if self.judge is None else self.judge.masks):
            refused = [i for i, patch in enumerate(drawn) if not patch.kept]
            if not refused:
                break
            others = draw_layouts(self.sampler, self.config, self.seed, shard + mask * OTHER_MASKS)
            for i, patch in zip(refused, self._draw(others, refused), strict=True):
                drawn[i] = _after(drawn[i], patch)
        return [replace(patch, index=layouts.first + i) for i, patch in enumerate(drawn)]

    def _draw(self, layouts: Layouts, places: Sequence[int]) -> list[SyntheticPatch]:
        """Draw the patches at some places of a block, each until it passes or its attempts are used up."""
        numbers = [layouts.first + place for place in places]
        patches = [layouts.patches[place] for place in places]
        redraw = layouts.redraw[list(places)]
        slides = [patch.source.slide for patch in patches]
        styles = None if self.style is None else self.style(slides, numbers)
        seeds = [derive(self.seed, "image", number, 0) for number in numbers]
        attempts = [1] * len(patches)
        judged: list[tuple[JudgedInstance, ...]] = [()] * len(patches)
        kept = [True] * len(patches)
        drawn = list(patches)
        pending = list(range(len(patches)))
        while pending:
            codes = None if styles is None else styles.codes[pending]
            images = self._images([patches[i] for i in pending], [seeds[i] for i in pending], redraw[pending], codes)
            for i, image in zip(pending, images, strict=True):
                drawn[i] = replace(patches[i], image=image)
            verdicts = self._verdicts([drawn[i] for i in pending], redraw[pending])
            for i, verdict in zip(pending, verdicts, strict=True):
                judged[i] += _judged(verdict, attempts[i] - 1)
                kept[i] = verdict.kept
            refused = [i for i, verdict in zip(pending, verdicts, strict=True) if not verdict.kept]
            pending = [i for i in refused if attempts[i] < self.config.attempts]
            for i in pending:
                seeds[i] = derive(self.seed, "image", numbers[i], attempts[i])
                attempts[i] += 1
        return [
            SyntheticPatch(
                index=number,
                patch=drawn[i],
                subtypes_before=layouts.before[place],
                seed=seeds[i],
                attempts=attempts[i],
                style=() if styles is None else styles.mixes[i],
                judged=judged[i],
                kept=kept[i],
            )
            for i, (place, number) in enumerate(zip(places, numbers, strict=True))
        ]

    def _images(
        self, patches: Sequence[Patch], seeds: Sequence[int], redraw: np.ndarray, codes: np.ndarray | None
    ) -> np.ndarray:
        return self.generator.generate(
            np.stack([patch.label_mask for patch in patches]),
            seeds,
            np.stack([patch.image for patch in patches]),
            redraw,
            instances=np.stack([patch.instances for patch in patches]),
            slides=[patch.source.slide for patch in patches],
            **({} if codes is None else {"styles": codes}),
        )

    def _verdicts(self, patches: Sequence[Patch], redraw: np.ndarray) -> list[Verdict]:
        white = near_white(patches, self.config)
        if self.judge is None:
            return [Verdict(kept=not refused, instances=()) for refused in white]
        verdicts = self.judge(patches, redraw)
        return [replace(v, kept=v.kept and not refused) for v, refused in zip(verdicts, white, strict=True)]


def near_white(patches: Sequence[Patch], config: SynthesisConfig) -> list[bool]:
    """Say for each image whether it is nearly white although its mask shows tissue; never where that is allowed."""
    if config.reject == "none":
        return [False] * len(patches)
    images = np.stack([patch.image for patch in patches])
    masks = np.stack([patch.label_mask for patch in patches])
    tissue = (masks != BACKGROUND) & (masks != IGNORE)
    grey = images.mean(axis=3)
    area = tissue.sum((1, 2))
    mean_inside = (grey * tissue).sum((1, 2)) / np.maximum(area, 1)
    return [bool(refused) for refused in (area > 0) & (mean_inside > config.white_level)]


def _judged(verdict: Verdict, drawing: int) -> tuple[JudgedInstance, ...]:
    return tuple(
        JudgedInstance(drawing=drawing, subtype=subtype, agreed=agreed, kept=verdict.kept)
        for subtype, agreed in verdict.instances
    )


def _after(refused: SyntheticPatch, patch: SyntheticPatch) -> SyntheticPatch:
    """Return a patch that takes the place of a refused one, with the history of both."""
    later = tuple(replace(judged, drawing=judged.drawing + refused.attempts) for judged in patch.judged)
    return replace(patch, attempts=refused.attempts + patch.attempts, judged=refused.judged + later)


# A generator and relabelled masks -> a synthetic set, shard by shard.
#
# A patch of the set follows from the set's seed and the patch's number: where its mask is cut out, which subtypes its
# instances get, and the seed of its image.


def synthesize(
    generator: ImageGenerator,
    cohort: Cohort,
    out: Path,
    config: SynthesisConfig,
    *,
    count: int,
    size_px: int,
    seed: int,
    header: CheckpointHeader | None = None,
    shards: Iterable[int] | None = None,
    judge: ImageFilter | None = None,
) -> PatchSet | None:
    """Write a synthetic set; finished shards are kept, the result is the same as without an interruption.

    Parameters
    ----------
    generator : ImageGenerator
    header : CheckpointHeader, optional
        Of the generator's checkpoint; None for the oracle.
    count : int
        Number of patches.
    shards : iterable of int, optional
        Write only these shards and no header; for spreading a set over processes.
    judge : ImageFilter, optional
        Images that it refuses are drawn again, so that the set has as many patches as without it.

    Returns
    -------
    PatchSet, or None where ``shards`` is given

    Raises
    ------
    LeakageError
        The generator saw a validation or test patient of this cohort.
    MismatchError
        The generator draws another size, scale or taxonomy, or ``out`` belongs to another set.
    """
    if header is not None:
        require_generator_fits(header, cohort, size_px)
    if count < 1:
        raise ConfigError(f"count {count}: a synthetic set has at least one patch")
    seen = {*cohort.patients("train"), *(header.patients_seen if header else ())}
    set_header = PatchSetHeader(
        method=generator.method,
        taxonomy=cohort.taxonomy,
        size_px=size_px,
        mpp=cohort.mpp,
        count=count,
        seed=seed,
        cohort=cohort.fingerprint,
        generator="" if header is None else header.sha256,
        patients_seen=tuple(sorted({*seen, *(judge.patients_seen if judge else ())})),
        settings=drawing_settings(generator, config) | ({} if judge is None else {"filter": judge.settings}),
        version=counterstain.__version__,
    )
    with claimed(out, "synthesize", set_header.model_dump(mode="json", exclude={"count"})):  # a set may grow
        writer = PatchSetWriter(out, set_header)
        sampler = PatchSampler(cohort, "train", size_px, config.sampling, derive(seed, "masks"))
        reference_px = size_px if header is None else header.size_px
        style = style_drawer(generator, cohort, config.style, size_px=reference_px, seed=seed)
        draw = ShardDrawer(generator=generator, sampler=sampler, config=config, seed=seed, style=style, judge=judge)
    wanted = range(writer.num_shards) if shards is None else list(shards)
    missing = sorted(set(writer.missing_shards()) & set(wanted))
    done = sum(len(writer.indices(shard)) for shard in wanted if shard not in missing)
    total = sum(len(writer.indices(shard)) for shard in wanted)
    with bar(f"synthesizing ({generator.method})", total, done) as advance:
        for shard in missing:
            writer.write(shard, draw(shard))
            advance(len(writer.indices(shard)))
    return writer.finish() if shards is None else None


def drawing_settings(generator: ImageGenerator, config: SynthesisConfig) -> dict[str, Any]:
    """Return how images are drawn, for the record: all that a generator's weights do not say.

    ``counterstain`` is among it where images share the nuclei of their real patches, which an audit has to know.
    """
    settings: dict[str, Any] = {"synthesis": config.model_dump(mode="json")}
    names = {"diffusion": ("sampler", "windows"), "inpainting": ("sampler", "windows", "inpainting")}
    for name in names.get(generator.method, ()):
        settings[name] = getattr(generator, name).model_dump(mode="json")
    counterstain = getattr(generator, "counterstain", None)
    return settings | ({} if counterstain is None else {"counterstain": counterstain.model_dump(mode="json")})


def require_generator_fits(header: CheckpointHeader, cohort: Cohort, size_px: int) -> None:
    """Raise an error unless a checkpoint may draw images of this size from the masks of a cohort."""
    require_taxonomy(Path(header.kind), header, cohort.taxonomy)
    if header.kind == "spade" and header.size_px != size_px:
        raise MismatchError(
            f"this SPADE checkpoint draws {header.size_px} px, {size_px} px were asked for; train one at that size"
        )
    if not cohort.is_at(header.mpp):
        raise MismatchError(f"the generator was trained at {header.mpp} um/px, this cohort is at {cohort.mpp}")
    check_no_leak(header.patients_seen, cohort, f"the {header.kind} checkpoint {header.sha256[:12]}")
