"""The stages of a study, in the order of the data."""

from __future__ import annotations

from typing import Literal, get_args

Stage = Literal[
    "cohort", "autoencoder", "diffusion", "spade", "judge", "shards", "synthetic", "segmenter", "evaluation"
]
STAGES: tuple[Stage, ...] = get_args(Stage)
