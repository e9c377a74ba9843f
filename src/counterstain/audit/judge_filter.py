"""A filter of drawn images: kept is what the judge takes for the subtypes that were asked for.

Shapes: n = images, H, W = rows and columns in pixels, L = labels (background and subtypes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from counterstain.audit.judge import Judge, load_judge
from counterstain.audit.judge_config import JudgeFilterConfig
from counterstain.checkpoints import CheckpointHeader, require_taxonomy
from counterstain.data.cohort import Cohort
from counterstain.data.leakage import check_no_leak
from counterstain.data.patches import Patch
from counterstain.errors import MismatchError
from counterstain.generators.image_filter import Verdict
from counterstain.generators.interface import evaluation_device, fixed_batches, on_device
from counterstain.taxonomy import BACKGROUND, IGNORE

BATCH = 32


class JudgeFilter:
    """Asks a judge; an :class:`counterstain.generators.image_filter.ImageFilter`.

    An image's verdict does not depend on the others: images are judged in batches of one fixed size.
    """

    def __init__(self, judge: Judge, header: CheckpointHeader, config: JudgeFilterConfig) -> None:
        self._judge = judge.eval().to(evaluation_device())
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
        held_out = {part: cohort.patients(part) for part in ("val", "test")}
        check_no_leak(header.patients_seen, held_out, f"the judge {folder}")
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
        images = np.stack([patch.image for patch in patches])
        batches = fixed_batches(self._log_probabilities, BATCH, range(len(patches)), images)
        scores = (one for batch in batches for one in batch)
        return [self._verdict(*judged) for judged in zip(patches, redraw, scores, strict=True)]

    @torch.no_grad()
    def _log_probabilities(self, seeds: Sequence[int], images: np.ndarray) -> np.ndarray:
        del seeds  # nothing is drawn at random
        scores = self._judge(on_device(images, self._judge.device)).float()
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
