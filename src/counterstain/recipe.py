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
from pydantic import Field, create_model

from counterstain.audit import JudgeConfig
from counterstain.config import Config, build, build_stored, merge, parse_overrides, read_yaml
from counterstain.errors import ConfigError
from counterstain.generators.diffusion_config import AutoencoderConfig, DiffusionConfig, DistillationConfig
from counterstain.generators.methods import METHODS, Method, Training
from counterstain.generators.spade_config import SpadeConfig
from counterstain.segmentation.segmenter_config import SegmenterConfig
from counterstain.synthesis.masks import SynthesisConfig

PRESETS = ("paper", "best", "demo")
DEFAULT_PRESET = "best"


class Recipe(Config):
    """How every model of a study is trained; methods of other packages add settings of their own.

    Examples
    --------
    >>> load_recipe("demo")
    Recipe(size_px=64, …)
    """

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

    def __repr__(self) -> str:
        return f"Recipe(size_px={self.size_px}, …)"

    def settings_of(self, training: Training) -> Config:
        """Return the settings of a training; those of another package's method are its defaults where not given.

        Raises ConfigError where they have no defaults.
        """
        found: Config | None = getattr(self, training.stage, None)
        return build(training.config_class, {}, f"recipe: {training.stage}") if found is None else found

    def drawing(self, method: Method) -> dict[str, Any]:
        """Return how a method's images are drawn, as plain values, for its ``load``."""
        if not method.drawing:
            return {}
        return self.settings_of(method.trainings[-1]).model_dump(mode="json", include=set(method.drawing))


def recipe_class() -> type[Recipe]:
    """Return the class of recipes with the settings of every registered method."""
    others = {
        stage: (training.config_class | None, None)
        for stage, training in METHODS.trainings.items()
        if stage not in Recipe.model_fields
    }
    return create_model("Recipe", __base__=Recipe, **others) if others else Recipe  # type: ignore[call-overload]


def load_recipe(preset: str = DEFAULT_PRESET, file: str | Path | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """Build a recipe from a preset, the settings of a YAML file over it, and ``--set`` assignments over both.

    Raises ConfigError where there is no such preset, or a file or setting is wrong.
    """
    return _built(preset_settings(preset), f"preset {preset}", file, overrides)


def drawing_recipe(
    method: Method,
    checkpoint: Path | None,
    *,
    preset: str | None = None,
    file: Path | None = None,
    overrides: Iterable[str] = (),
) -> Recipe:
    """Build the recipe to draw with, as :func:`load_recipe` does; without a preset, from what the checkpoint knows.

    What it was trained with (the size of patches, the sampler, ...) then replaces the default preset's settings.
    """
    if preset is not None or checkpoint is None or method.kind is None:
        return load_recipe(preset or DEFAULT_PRESET, file, overrides)
    from counterstain.checkpoints import read_header  # imports torch

    header = read_header(checkpoint)
    if header.kind != method.kind:  # said by load_generator
        return load_recipe(DEFAULT_PRESET, file, overrides)
    own = build_stored(method.trainings[-1].config_class, header.config, checkpoint)
    known = {"size_px": header.size_px, header.kind: own.model_dump(mode="json")}
    return _built(preset_settings(DEFAULT_PRESET) | known, str(checkpoint), file, overrides)


def preset_settings(preset: str) -> dict[str, Any]:
    """Return the settings of a preset as plain values."""
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
    file = resources.files("counterstain") / "presets" / f"{preset}.yaml"
    settings: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return settings


def _built(content: Mapping[str, Any], source: str, file: str | Path | None, overrides: Iterable[str]) -> Recipe:
    if file is not None:
        content, source = merge(content, read_yaml(Path(file))), str(file)
    assignments = [overrides] if isinstance(overrides, str) else list(overrides)
    if assignments:
        content, source = merge(content, parse_overrides(assignments)), f"{source} with --set {' '.join(assignments)}"
    return build(recipe_class(), content, source)
