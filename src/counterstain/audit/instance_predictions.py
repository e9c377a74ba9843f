"""What the judge takes each instance for, and the filter that keeps an image if the judge agrees with it.

Shapes: L = labels (background and subtypes), H, W = rows and columns in pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from counterstain.audit.judge import BATCH, Judge, image_batches, load_judge
from counterstain.audit.judge_config import JudgeFilterConfig
from counterstain.checkpoints import CheckpointHeader, require_taxonomy
from counterstain.data.cohort import Cohort
from counterstain.data.patches import Patch
from counterstain.data.split import check_no_leak
from counterstain.devices import choose_device
from counterstain.errors import MismatchError
from counterstain.generators.interface import fixed_batches, on_device
from counterstain.synthesis.synthesize import Verdict
from counterstain.taxonomy import BACKGROUND, IGNORE


@torch.no_grad()
def instance_probabilities(
    judge: Judge,
    patches: Sequence[Patch],
    *,
    kept: Collection[int] = (),
    min_area_px: int = 1,
    batch_size: int = BATCH,
) -> pd.DataFrame:
    """Say what the judge takes every instance for, and with what probability.

    Parameters
    ----------
    judge : Judge
        On the device that it is to run on, in evaluation mode.
    patches : sequence of Patch
    kept : collection of int
        Subtypes whose instances are left out, beside those to be ignored: what relabelling kept was not redrawn.
    min_area_px : int
        Smaller instances, or what a patch shows of one, are left out.

    Returns
    -------
    DataFrame
        A row per instance: image (number of the patch), instance, asked (subtype), area_px, seen (the likeliest
        subtype), tissue (share of its pixels that look like any subtype rather than background), and
        ``probability_1`` … for every subtype; these sum to 1.
    """
    rows: list[dict[str, Any]] = []
    first = 0
    for images, part in image_batches(patches, batch_size, judge.device):
        log_probabilities = torch.log_softmax(judge(images).float(), dim=1).cpu().numpy()
        for number, (patch, scores) in enumerate(zip(part, log_probabilities, strict=True), first):
            rows += ({"image": number} | row for row in _rows(patch, scores, {*kept, IGNORE}, min_area_px))
        first += len(part)
    columns = ["image", "instance", "asked", "area_px", "seen", "tissue", *_names(judge.num_labels)]
    return pd.DataFrame(rows, columns=columns)


def _rows(patch: Patch, scores: np.ndarray, left_out: Collection[int], min_area_px: int) -> Iterator[dict[str, Any]]:
    for instance, area in patch.areas_px.items():
        asked = patch.subtypes[instance]
        if asked in left_out or area < min_area_px:
            continue
        inside = scores[:, patch.instances == instance]
        # The mean over pixels that see the same tissue, as in training: each is an opinion, not one of many witnesses.
        means = inside[1:].mean(1)
        shares = np.exp(means - means.max())
        yield {
            "instance": instance,
            "asked": asked,
            "area_px": area,
            "seen": int(means.argmax()) + 1,
            "tissue": float((inside.argmax(0) > 0).mean()),
        } | dict(zip(_names(len(scores)), (shares / shares.sum()).tolist(), strict=True))


def _names(num_labels: int) -> list[str]:
    return [f"probability_{subtype}" for subtype in range(1, num_labels)]


# A filter of drawn images: kept is what the judge takes for the subtypes that were asked for.
#
# Shapes: n = images, H, W = rows and columns in pixels, L = labels (background and subtypes).

BATCH = 32


class JudgeFilter:
    """Asks a judge; an :class:`counterstain.synthesis.synthesize.ImageFilter`.

    An image's verdict does not depend on the others: images are judged in batches of one fixed size.
    """

    def __init__(self, judge: Judge, header: CheckpointHeader, config: JudgeFilterConfig) -> None:
        self._judge = judge.eval().to(choose_device())
        self._header, self._config = header, config

    @classmethod
    def load(cls, folder: Path, cohort: Cohort, config: JudgeFilterConfig, *, size_px: int) -> JudgeFilter:
        """Open a judge for the images of a cohort.

        Raises
        ------
        MismatchError
            The judge is of another taxonomy, size or resolution.
        LeakageError
            It saw a validation or test patient of the cohort.
        """
        judge, header = load_judge(folder)
        require_taxonomy(folder, header, cohort.taxonomy)
        if header.size_px != size_px or not cohort.is_at(header.mpp):
            raise MismatchError(
                f"{folder}: the judge learnt from {header.size_px} px at {header.mpp:g} um/px, the images are of "
                f"{size_px} px at {cohort.mpp:g} um/px; train one that fits"
            )
        check_no_leak(header.patients_seen, cohort, f"the judge {folder}")
        return cls(judge, header, config)

    @property
    def masks(self) -> int:
        """How many masks are tried at most for one patch."""
        return self._config.masks

    @property
    def settings(self) -> dict[str, Any]:
        """All that its verdicts depend on."""
        return {"judge": self._header.sha256} | self._config.model_dump(mode="json")

    @property
    def patients_seen(self) -> Sequence[str]:
        """Patients that the judge learnt from."""
        return self._header.patients_seen

    def __call__(self, patches: Sequence[Patch], redraw: np.ndarray) -> list[Verdict]:
        """Judge images with their asked subtypes; ``redraw`` (n, H, W) bool says which pixels were drawn anew."""
        if not patches:
            return []
        scores = fixed_batches(self._log_probabilities, BATCH, [patch.image for patch in patches])
        return [self._verdict(*judged) for judged in zip(patches, redraw, scores, strict=True)]

    @torch.no_grad()
    def _log_probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        scores = self._judge(on_device(np.stack(images), self._judge.device)).float()
        return np.asarray(torch.log_softmax(scores, dim=1).cpu().numpy())

    def _verdict(self, patch: Patch, redraw: np.ndarray, scores: np.ndarray) -> Verdict:
        instances = tuple(self._instances(patch, redraw, scores))
        agreed = sum(looks_like_it for _, looks_like_it in instances)
        return Verdict(kept=agreed >= self._config.agreement * len(instances), instances=instances)

    def _instances(self, patch: Patch, redraw: np.ndarray, scores: np.ndarray) -> Iterator[tuple[int, bool]]:
        drawn = np.where(redraw, patch.instances, BACKGROUND)
        for instance, area in zip(*np.unique(drawn[drawn != BACKGROUND], return_counts=True), strict=True):
            asked = patch.subtypes[int(instance)]
            if area >= self._config.min_area_px and asked != IGNORE:
                looks_like = int(scores[1:, drawn == instance].mean(1).argmax()) + 1
                yield asked, looks_like == asked
