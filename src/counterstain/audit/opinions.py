"""What the judge takes every instance for.

Shapes: L = labels (background and subtypes), H, W = rows and columns in pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from counterstain.audit.judge import BATCH, Judge, image_batches
from counterstain.data.patches import Patch
from counterstain.taxonomy import IGNORE


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
