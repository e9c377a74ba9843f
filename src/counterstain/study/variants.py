"""What the variants of arms change in a segmenter's settings, and how strongly.

An arm without a variant is not touched by its settings, so that changing one renames only the cells that have it.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from counterstain.audit.judge_config import JudgeFilterConfig
from counterstain.config import Config
from counterstain.data.copy_paste import CopyPasteConfig
from counterstain.data.stains import Stains
from counterstain.study.arms import Arm


class VariantsConfig(Config):
    """How strong the variants of arms are."""

    weighted: Annotated[float, Field(gt=0, le=1)] = 1.0
    """``+weighted``: power of the inverse frequency of a subtype's pixels."""
    stain: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    """``+stain``: standard deviation of the factor and of the offset of each stain's optical density."""
    stains: Stains = "dab"
    """``+stain``: the stains that are jittered."""
    mixup: Annotated[float, Field(gt=0)] = 0.4
    """``+mixup``: alpha of the Beta distribution from which shares are drawn."""
    copypaste: CopyPasteConfig = CopyPasteConfig()
    """``+copypaste``: what is pasted, and how much."""
    filtered: JudgeFilterConfig = JudgeFilterConfig()
    """``+filtered``: which synthetic patches a judge lets pass, the same for all methods."""
    pretrain: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """``+pretrain``: share of the steps on synthetic patches."""


def segmenter_changes(arm: Arm, variants: VariantsConfig) -> dict[str, Any]:
    """Return what an arm changes in the segmenter's settings, to be merged over them."""
    sampling: dict[str, Any] = {"mode": arm.mode}
    changes: dict[str, Any] = {"sampling": sampling}
    if "weighted" in arm.variants:
        changes["subtype_weighting"] = variants.weighted
    if "stain" in arm.variants:
        sampling |= {"stain_jitter": variants.stain, "stains": variants.stains}
    if "mixup" in arm.variants:
        changes["mixup_alpha"] = variants.mixup
    if "copypaste" in arm.variants:
        changes["copy_paste"] = variants.copypaste.model_dump(mode="json")
    if "pretrain" in arm.variants:
        changes["mixing"] = {"schedule": "pretrain", "pretrain_share": variants.pretrain}
    if "anneal" in arm.variants:
        changes["mixing"] = {"schedule": "anneal"}
    return changes
