"""A generator and relabelled masks -> a synthetic set, shard by shard; what a filter refuses is drawn again.

A patch of the set follows from the set's seed and the patch's number: where its mask is cut out, which subtypes its
instances get, and the seed of its image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd

import counterstain
from counterstain.checkpoints import CheckpointHeader, require_taxonomy
from counterstain.data.cohort import Cohort
from counterstain.data.composition import unseen_in_training
from counterstain.data.patch_set import JudgedInstance, PatchSet, PatchSetHeader, PatchSetWriter, SyntheticPatch
from counterstain.data.patches import Patch
from counterstain.data.split import check_no_leak
from counterstain.errors import ConfigError, MismatchError
from counterstain.generators.interface import DrawRequest, ImageGenerator
from counterstain.generators.methods import METHODS
from counterstain.generators.style import StyleDrawer, style_drawer
from counterstain.progress import bar
from counterstain.seeding import derive
from counterstain.storage import claimed
from counterstain.synthesis.masks import Layout, Layouts, SynthesisConfig
from counterstain.taxonomy import BACKGROUND, IGNORE, Taxonomy

Part = Literal["train", "val", "test"]
OTHER_MASKS = 2**32  # blocks between a mask and the one that takes its place; no set is so long


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a filter says of one drawn image."""

    kept: bool
    instances: tuple[tuple[int, bool], ...] = ()  # asked subtype of each judged instance, and whether it looks like it


class ImageFilter(Protocol):
    """A judge of drawn images, which belongs to the audit; what it says of one must not depend on the others."""

    @property
    def masks(self) -> int:
        """How many masks are tried at most for one patch."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that its verdicts depend on, for the record."""

    @property
    def patients_seen(self) -> Sequence[str]:
        """Patients that it learnt from."""

    def __call__(self, patches: Sequence[Patch], redraw: np.ndarray) -> list[Verdict]:
        """Judge images with their asked subtypes; ``redraw`` (n, H, W) bool says which pixels were drawn anew."""


@dataclass(frozen=True)
class Filters:
    """Several filters as one, all of which an image must pass."""

    filters: Sequence[ImageFilter]

    @classmethod
    def of(cls, *filters: ImageFilter | None) -> ImageFilter | None:
        """Join the filters that there are."""
        given = [one for one in filters if one is not None]
        return cls(given) if len(given) > 1 else next(iter(given), None)

    @property
    def masks(self) -> int:
        """How many masks are tried at most for one patch."""
        return max(one.masks for one in self.filters)

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that the verdicts depend on."""
        return {key: value for one in self.filters for key, value in one.settings.items()}

    @property
    def patients_seen(self) -> Sequence[str]:
        """Patients that any of them learnt from."""
        return sorted({patient for one in self.filters for patient in one.patients_seen})

    def __call__(self, patches: Sequence[Patch], redraw: np.ndarray) -> list[Verdict]:
        """Judge images by all filters."""
        verdicts = zip(*(one(patches, redraw) for one in self.filters), strict=True)
        return [
            Verdict(kept=all(v.kept for v in some), instances=tuple(i for v in some for i in v.instances))
            for some in verdicts
        ]


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
    part: Part = "train",
) -> PatchSet | None:
    """Write a synthetic set; finished shards are kept, the result is the same as without an interruption.

    No instance becomes a subtype that training :func:`never showed <never_seen>`.
    Only these ``shards`` and no header are written where they are given (to spread a set over processes); then None is
    returned. Images that the ``judge`` refuses are drawn again, so that the set has as many patches as without it.
    The masks are of a ``part`` of the split; those of val or test make a set for a reading test, never for training.

    Raises LeakageError where the generator saw a validation or test patient of this cohort; MismatchError where the
    generator draws another size, scale or taxonomy, or ``out`` belongs to another set.
    """
    require_generator_fits(generator, cohort, size_px)
    config = of_seen_subtypes(config, generator, cohort)
    if count < 1:
        raise ConfigError(f"count {count}: a synthetic set has at least one patch")
    header = PatchSetHeader(
        method=generator.method,
        taxonomy=cohort.taxonomy,
        size_px=size_px,
        mpp=cohort.mpp,
        count=count,
        seed=seed,
        cohort=cohort.fingerprint,
        generator="" if generator.header is None else generator.header.sha256,
        patients_seen=patients_behind(generator, cohort, judge.patients_seen if judge else (), part),
        settings=drawing_settings(generator, config) | ({} if judge is None else {"filter": judge.settings}),
        version=counterstain.__version__,
        part=part,
    )
    with claimed(out, "synthesize", header.model_dump(mode="json", exclude={"count"})):  # a set may grow
        writer = PatchSetWriter(out, header)
        layouts = Layouts.of(cohort, config, size_px=size_px, seed=seed, part=part)
        style = style_drawer(generator, cohort, config.style, size_px=size_px, seed=seed, part=part)
        draw = ShardDrawer(generator=generator, layouts=layouts, config=config, seed=seed, style=style, judge=judge)
    lengths = {shard: len(writer.indices(shard)) for shard in (range(writer.num_shards) if shards is None else shards)}
    missing = sorted(set(writer.missing_shards()) & set(lengths))
    done = sum(length for shard, length in lengths.items() if shard not in missing)
    with bar(f"synthesizing ({generator.method})", sum(lengths.values()), done) as advance:
        for shard in missing:
            writer.write(shard, draw(shard))
            advance(lengths[shard])
    return writer.finish() if shards is None else None


def never_seen(generator: ImageGenerator, cohort: Cohort) -> Sequence[str]:
    """Return the subtypes of which training showed no instance: as the checkpoint says, or else the cohort."""
    return unseen_in_training(cohort) if generator.header is None else generator.header.subtypes_unseen


def of_seen_subtypes(config: SynthesisConfig, generator: ImageGenerator, cohort: Cohort) -> SynthesisConfig:
    """Return settings by which no instance becomes a subtype that was never seen."""
    relabelling = config.relabel.without(never_seen(generator, cohort), cohort.taxonomy)
    return config if relabelling is config.relabel else config.model_copy(update={"relabel": relabelling})


def patients_behind(
    generator: ImageGenerator, cohort: Cohort, others: Sequence[str] = (), part: str = "train"
) -> tuple[str, ...]:
    """Return every patient whose tissue is in what a generator draws for the masks of a part of a cohort."""
    seen = generator.header.patients_seen if generator.header else ()
    return tuple(sorted({*cohort.patients(part), *seen, *others}))


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


@dataclass(frozen=True, kw_only=True)
class ShardDrawer:
    """Draws the patches of any shard of one set.

    A patch is drawn with further seeds until it passes, ``attempts`` times at most. Where a judge still refuses it,
    its place is given to another mask: that of a patch far beyond the end of any set, so that no mask is used twice.
    """

    generator: ImageGenerator
    layouts: Layouts
    config: SynthesisConfig
    seed: int
    style: StyleDrawer | None = None
    judge: ImageFilter | None = None

    def __call__(self, shard: int) -> list[SyntheticPatch]:
        """Draw a shard, in the order of its patches."""
        layouts = self.layouts(shard)
        drawn = self._draw(layouts)
        for mask in range(1, 1 if self.judge is None else self.judge.masks):
            refused = [i for i, patch in enumerate(drawn) if not patch.kept]
            if not refused:
                break
            others = self.layouts(shard + mask * OTHER_MASKS)
            for i, patch in zip(refused, self._draw([others[i] for i in refused]), strict=True):
                drawn[i] = _in_place_of(drawn[i], patch)
        return [replace(patch, index=layout.number) for layout, patch in zip(layouts, drawn, strict=True)]

    def _draw(self, layouts: Sequence[Layout]) -> list[SyntheticPatch]:
        """Draw patches, each until it passes or its attempts are used up."""
        styles = [self.style(layout.patch.source.slide, layout.number) if self.style else None for layout in layouts]
        drawn = [
            SyntheticPatch(
                index=layout.number,
                patch=layout.patch,
                subtypes_before=layout.before,
                moved=layout.moved,
                seed=0,
                attempts=0,
                style=() if style is None else style.mix,
                kept=False,
            )
            for layout, style in zip(layouts, styles, strict=True)
        ]
        for attempt in range(self.config.attempts):
            pending = [i for i, patch in enumerate(drawn) if not patch.kept]
            if not pending:
                break
            seeds = [derive(self.seed, "image", layouts[i].number, attempt) for i in pending]
            codes = [None if style is None else style.code for style in styles]
            images = self.generator.draw(
                [
                    DrawRequest.of(layouts[i].patch, seed, layouts[i].redraw, codes[i])
                    for i, seed in zip(pending, seeds, strict=True)
                ]
            )
            patches = [replace(layouts[i].patch, image=image) for i, image in zip(pending, images, strict=True)]
            verdicts = self._verdicts(patches, np.stack([layouts[i].redraw for i in pending]))
            for i, patch, seed, verdict in zip(pending, patches, seeds, verdicts, strict=True):
                drawn[i] = _after_attempt(drawn[i], patch, seed, verdict)
        return drawn

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


def _after_attempt(before: SyntheticPatch, patch: Patch, seed: int, verdict: Verdict) -> SyntheticPatch:
    """Return what has come of a patch with one more image."""
    judged = tuple(
        JudgedInstance(drawing=before.attempts, subtype=subtype, agreed=agreed, kept=verdict.kept)
        for subtype, agreed in verdict.instances
    )
    attempts, history = before.attempts + 1, before.judged + judged
    return replace(before, patch=patch, seed=seed, attempts=attempts, judged=history, kept=verdict.kept)


def _in_place_of(refused: SyntheticPatch, patch: SyntheticPatch) -> SyntheticPatch:
    """Return a patch that takes the place of a refused one, with the history of both."""
    later = tuple(replace(judged, drawing=judged.drawing + refused.attempts) for judged in patch.judged)
    return replace(patch, attempts=refused.attempts + patch.attempts, judged=refused.judged + later)


def rejections(judged: pd.DataFrame, taxonomy: Taxonomy) -> pd.DataFrame:
    """Count what a filter refused, by subtype.

    ``judged`` has a row per drawn and judged instance: ``subtype``, ``agreed``, ``kept`` (its image). The result has
    one per subtype: ``subtype`` (name), ``drawn`` (instances), ``disagreed`` (those that look like another subtype),
    ``refused`` (those in refused images), ``rejection_rate`` (refused / drawn; NaN where none was drawn).
    """
    rows = []
    for subtype in taxonomy.subtypes:
        of_subtype = judged[judged["subtype"] == subtype.id]
        drawn, refused = len(of_subtype), int((~of_subtype["kept"]).sum())
        rate = refused / drawn if drawn else float("nan")
        rows.append((subtype.name, drawn, int((~of_subtype["agreed"]).sum()), refused, rate))
    return pd.DataFrame(rows, columns=["subtype", "drawn", "disagreed", "refused", "rejection_rate"])
