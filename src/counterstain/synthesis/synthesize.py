"""A generator and relabelled masks -> a synthetic set, shard by shard; what a filter refuses is drawn again.

A patch of the set follows from the set's seed and the patch's number: where its mask is cut out, which subtypes its
instances get, and the seed of its image.
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
from counterstain.generators.interface import DrawRequest, ImageGenerator
from counterstain.generators.methods import METHODS
from counterstain.progress import bar
from counterstain.seeding import derive
from counterstain.storage import claimed
from counterstain.synthesis.masks import Layout, SynthesisConfig, draw_layouts
from counterstain.synthesis.styles import DrawnStyle, StyleDrawer, style_drawer
from counterstain.taxonomy import BACKGROUND, IGNORE, Taxonomy

OTHER_MASKS = 2**32  # blocks between a mask and the one that takes its place; no set is so long


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a filter says of one drawn image."""

    kept: bool
    instances: tuple[tuple[int, bool], ...] = ()
    """Asked subtype of each judged instance, and whether it looks like it."""


class ImageFilter(Protocol):
    """A judge of drawn images, which belongs to the audit; what it says of one must not depend on the others."""

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


def synthesize(
    generator: ImageGenerator,
    cohort: Cohort,
    out: Path,
    config: SynthesisConfig,
    *,
    count: int,
    size_px: int,
    seed: int,
    shards: Iterable[int] | None = None,
    judge: ImageFilter | None = None,
) -> PatchSet | None:
    """Write a synthetic set; finished shards are kept, the result is the same as without an interruption.

    Parameters
    ----------
    generator : ImageGenerator
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
    require_generator_fits(generator, cohort, size_px)
    if count < 1:
        raise ConfigError(f"count {count}: a synthetic set has at least one patch")
    set_header = _header(generator, cohort, config, count=count, size_px=size_px, seed=seed, judge=judge)
    with claimed(out, "synthesize", set_header.model_dump(mode="json", exclude={"count"})):  # a set may grow
        writer = PatchSetWriter(out, set_header)
        sampler = PatchSampler(cohort, "train", size_px, config.sampling, derive(seed, "masks"))
        style = style_drawer(generator, cohort, config.style, size_px=size_px, seed=seed)
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


def _header(
    generator: ImageGenerator,
    cohort: Cohort,
    config: SynthesisConfig,
    *,
    count: int,
    size_px: int,
    seed: int,
    judge: ImageFilter | None,
) -> PatchSetHeader:
    return PatchSetHeader(
        method=generator.method,
        taxonomy=cohort.taxonomy,
        size_px=size_px,
        mpp=cohort.mpp,
        count=count,
        seed=seed,
        cohort=cohort.fingerprint,
        generator="" if generator.header is None else generator.header.sha256,
        patients_seen=patients_behind(generator, cohort, judge.patients_seen if judge else ()),
        settings=drawing_settings(generator, config) | ({} if judge is None else {"filter": judge.settings}),
        version=counterstain.__version__,
    )


def patients_behind(generator: ImageGenerator, cohort: Cohort, others: Sequence[str] = ()) -> tuple[str, ...]:
    """Return every patient whose tissue is in what a generator draws for the masks of a cohort."""
    seen = generator.header.patients_seen if generator.header else ()
    return tuple(sorted({*cohort.patients("train"), *seen, *others}))


def drawing_settings(generator: ImageGenerator, config: SynthesisConfig) -> dict[str, Any]:
    """Return how images are drawn, for the record: all that a generator's weights do not say.

    ``counterstain`` is among it where images share the nuclei of their real patches, which an audit has to know.
    """
    return {"synthesis": config.model_dump(mode="json"), **generator.settings}


def require_generator_fits(generator: ImageGenerator, cohort: Cohort, size_px: int | None = None) -> None:
    """Raise an error unless a generator may draw images of a size (None = any) from the masks of a cohort."""
    header: CheckpointHeader | None = generator.header
    if header is None:
        return
    require_taxonomy(Path(header.kind), header, cohort.taxonomy)
    any_size = generator.method not in METHODS or METHODS[generator.method].any_size
    if size_px not in {None, header.size_px} and not any_size:
        raise MismatchError(
            f"method {generator.method}: this checkpoint draws {header.size_px} px, {size_px} px were asked for; train "
            "one at that size"
        )
    if not cohort.is_at(header.mpp):
        raise MismatchError(f"the generator was trained at {header.mpp} um/px, this cohort is at {cohort.mpp}")
    check_no_leak(header.patients_seen, cohort, f"the {header.kind} checkpoint {header.sha256[:12]}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawing:
    """A patch on its way into a set: what is asked for, and what has come of it so far."""

    layout: Layout
    style: DrawnStyle | None
    drawn: SyntheticPatch

    def request(self, seed: int) -> DrawRequest:
        code = None if self.style is None else self.style.code
        return DrawRequest.of(self.layout.patch, seed, self.layout.redraw, code)

    def after(self, image: np.ndarray, seed: int, verdict: Verdict) -> _Drawing:
        """Return what has come of it with one more image."""
        judged = tuple(
            JudgedInstance(drawing=self.drawn.attempts, subtype=subtype, agreed=agreed, kept=verdict.kept)
            for subtype, agreed in verdict.instances
        )
        drawn = replace(
            self.drawn,
            patch=replace(self.layout.patch, image=image),
            seed=seed,
            attempts=self.drawn.attempts + 1,
            judged=self.drawn.judged + judged,
            kept=verdict.kept,
        )
        return replace(self, drawn=drawn)


@dataclass(frozen=True, kw_only=True)
class ShardDrawer:
    """Draws the patches of any shard of one set.

    A patch is drawn with further seeds until it passes, ``attempts`` times at most. Where a judge still refuses it,
    its place is given to another mask: that of a patch far beyond the end of any set, so that no mask is used twice.
    """

    generator: ImageGenerator
    sampler: PatchSampler
    config: SynthesisConfig
    seed: int
    style: StyleDrawer | None = None
    judge: ImageFilter | None = None

    def __call__(self, shard: int) -> list[SyntheticPatch]:
        """Draw a shard, in the order of its patches."""
        layouts = draw_layouts(self.sampler, self.config, self.seed, shard)
        drawn = self._draw(layouts)
        for mask in range(1, 1 if self.judge is None else self.judge.masks):
            refused = [i for i, patch in enumerate(drawn) if not patch.kept]
            if not refused:
                break
            others = draw_layouts(self.sampler, self.config, self.seed, shard + mask * OTHER_MASKS)
            for i, patch in zip(refused, self._draw([others[i] for i in refused]), strict=True):
                drawn[i] = _after(drawn[i], patch)
        return [replace(patch, index=layout.number) for layout, patch in zip(layouts, drawn, strict=True)]

    def _draw(self, layouts: Sequence[Layout]) -> list[SyntheticPatch]:
        """Draw patches, each until it passes or its attempts are used up."""
        drawings = [self._asked(layout) for layout in layouts]
        for attempt in range(self.config.attempts):
            pending = [i for i, drawing in enumerate(drawings) if not drawing.drawn.kept]
            if not pending:
                break
            for i, drawing in zip(pending, self._attempt([drawings[i] for i in pending], attempt), strict=True):
                drawings[i] = drawing
        return [drawing.drawn for drawing in drawings]

    def _asked(self, layout: Layout) -> _Drawing:
        style = None if self.style is None else self.style(layout.patch.source.slide, layout.number)
        nothing = SyntheticPatch(
            index=layout.number,
            patch=layout.patch,
            subtypes_before=layout.before,
            seed=0,
            attempts=0,
            style=() if style is None else style.mix,
            kept=False,
        )
        return _Drawing(layout=layout, style=style, drawn=nothing)

    def _attempt(self, drawings: Sequence[_Drawing], attempt: int) -> list[_Drawing]:
        seeds = [derive(self.seed, "image", drawing.layout.number, attempt) for drawing in drawings]
        images = self.generator.draw([d.request(seed) for d, seed in zip(drawings, seeds, strict=True)])
        patches = [replace(d.layout.patch, image=image) for d, image in zip(drawings, images, strict=True)]
        verdicts = self._verdicts(patches, np.stack([drawing.layout.redraw for drawing in drawings]))
        return [
            drawing.after(image, seed, verdict)
            for drawing, image, seed, verdict in zip(drawings, images, seeds, verdicts, strict=True)
        ]

    def _verdicts(self, patches: Sequence[Patch], redraw: np.ndarray) -> list[Verdict]:
        white = [_near_white(patch, self.config) for patch in patches]
        if self.judge is None:
            return [Verdict(kept=not refused) for refused in white]
        verdicts = self.judge(patches, redraw)
        return [replace(v, kept=v.kept and not refused) for v, refused in zip(verdicts, white, strict=True)]


def _near_white(patch: Patch, config: SynthesisConfig) -> bool:
    """Whether an image is to be refused: nearly white although its mask shows tissue."""
    mask = patch.label_mask
    tissue = (mask != BACKGROUND) & (mask != IGNORE)
    if config.reject == "none" or not tissue.any():
        return False
    grey = patch.image.mean(axis=2)
    return bool((grey * tissue).sum() / tissue.sum() > config.white_level)


def _after(refused: SyntheticPatch, patch: SyntheticPatch) -> SyntheticPatch:
    """Return a patch that takes the place of a refused one, with the history of both."""
    later = tuple(replace(judged, drawing=judged.drawing + refused.attempts) for judged in patch.judged)
    return replace(patch, attempts=refused.attempts + patch.attempts, judged=refused.judged + later)


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
