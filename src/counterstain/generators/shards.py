"""Draw the images of a synthetic set, shard by shard; what a filter refuses is drawn again.

A patch is drawn anew with further seeds, ``attempts`` times at most. Where a judge still refuses it, its place is given
to another mask: that of a patch far beyond the end of any set, so that no mask is used twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from counterstain.data.patch_set import SHARD_PATCHES, JudgedInstance, SyntheticPatch
from counterstain.data.patches import Patch
from counterstain.data.sampling import PatchSampler
from counterstain.generators.image_filter import ImageFilter, Verdict
from counterstain.generators.interface import ImageGenerator
from counterstain.generators.layouts import Layouts, SynthesisConfig, draw_layouts
from counterstain.generators.style_drawing import StyleDrawer
from counterstain.seeding import derive
from counterstain.taxonomy import BACKGROUND, IGNORE

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
