"""A recipe: everything that decides how models are trained and images drawn, from presets, a file and overrides.

``paper`` is what the paper says, read literally where it can be; ``best`` is what we advise today; ``demo`` is
``best`` shrunk to minutes on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from counterstain.audit.judge_config import JudgeConfig
from counterstain.config import Config, build, merge, parse_overrides, read_yaml
from counterstain.errors import ConfigError
from counterstain.generators.autoencoder_config import AutoencoderConfig
from counterstain.generators.diffusion_config import DiffusionConfig, DistillationConfig
from counterstain.generators.spade_config import SpadeConfig
from counterstain.segmentation.segmenter_config import SegmenterConfig
from counterstain.synthesis.masks import SynthesisConfig

PRESETS = ("paper", "best", "demo")


class Recipe(Config):
    """How every model of a study is trained."""

    size_px: Annotated[int, Field(ge=32)]
    """Edge of the patches that all models see."""
    autoencoder: AutoencoderConfig
    """The first stage of latent diffusion."""
    diffusion: DiffusionConfig
    """The denoiser, for diffusion and inpainting."""
    distillation: DistillationConfig | None = None
    """Few-step drawing, for ``train distilled``; studies do not use it."""
    spade: SpadeConfig
    """SPADE with its VAE."""
    synthesis: SynthesisConfig
    """Which masks are relabelled, and how."""
    segmenter: SegmenterConfig
    """The segmenter, the same in all arms but for its data."""
    judge: JudgeConfig = JudgeConfig()
    """The network that audits synthetic sets."""


def load_recipe(preset: str = "best", file: Path | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """Build a recipe from a preset, the settings of a YAML file over it, and ``--set`` assignments over both.

    Raises
    ------
    ConfigError
        No such preset; a wrong file or setting.
    """
    content = preset_settings(preset)
    source = f"preset {preset}"
    if file is not None:
        content, source = merge(content, read_yaml(file)), str(file)
    assignments = list(overrides)
    if assignments:
        content, source = merge(content, parse_overrides(assignments)), f"{source} with --set {' '.join(assignments)}"
    return build(Recipe, content, source)


def recipe_from(preset: str, changes: Mapping[str, Any], source: str | Path) -> Recipe:
    """Build a recipe from a preset and a mapping of changes."""
    return build(Recipe, merge(preset_settings(preset), changes), source)


def preset_settings(preset: str) -> dict[str, Any]:
    """Return the settings of a preset as plain values."""
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
    file = resources.files("counterstain") / "presets" / f"{preset}.yaml"
    settings: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return settings
