"""A recipe: everything that decides how models are trained and images drawn, from presets, a file and overrides.

``paper`` is what the paper says, read literally where it can be; ``best`` is what we advise today; ``demo`` is
``best`` shrunk to minutes on two CPU cores.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import Field, create_model
from pydantic_core import to_json

from counterstain.audit import JudgeConfig
from counterstain.config import Config, build, build_stored, merge, parse_overrides, read_yaml
from counterstain.errors import ConfigError
from counterstain.generators.diffusion_config import AutoencoderConfig, DiffusionConfig, DistillationConfig
from counterstain.generators.methods import METHODS, Method, Training
from counterstain.generators.spade_config import SpadeConfig
from counterstain.segmentation.segmenter_config import SegmenterConfig
from counterstain.synthesis.masks import SynthesisConfig

if TYPE_CHECKING:
    from counterstain.checkpoints import CheckpointHeader
    from counterstain.data.patch_set import PatchSetHeader

OTHER_SECTIONS: dict[str, type[Config]] = {
    "segmenter": SegmenterConfig, "judge": JudgeConfig, "distillation": DistillationConfig,
}  # fmt: skip
PRESETS = ("paper", "best", "demo")
DEFAULT_PRESET = "best"
OF_A_MACHINE = re.compile(r".*\.training\.(workers|logger)")  # on which no result depends


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


def training_command(header: CheckpointHeader) -> str:
    """Return the command that trains such a network, in words and Markdown, with all settings that are no preset's."""
    notes, sections = header.notes, METHODS.trainings
    if (header.kind not in sections and header.kind not in OTHER_SECTIONS) or "imported" in notes:
        return "Imported from weights that others published, not trained with counterstain."
    section, config, words = header.kind, header.config, ["train", header.kind, "COHORT"]
    if "distillation" in notes:
        section, config = "distillation", notes["distillation"]
        words = ["train", "distilled", "COHORT", "--teacher", "DIFFUSION"]
    elif header.kind == "segmenter":
        words = ["segment", "COHORT", *(["--synthetic", "SET"] if notes.get("synthetic") else [])]
    elif header.kind in sections:
        words += [word for name in sections[header.kind].needs for word in (f"--{name}", name.upper())]
        words += ["--init", "CHECKPOINT"] if "init_sha256" in notes else []
    config_class = sections[section].config_class if section in sections else OTHER_SECTIONS[section]
    known = {"size_px": header.size_px, section: build_stored(config_class, config, header.kind)}
    return _command([*words, "--out", "DIR", "--seed", str(header.seed)], known)


def drawing_command(header: PatchSetHeader) -> str:
    """Return the command that draws such a set, in words and Markdown, with all settings that are no preset's."""
    method, settings = METHODS.get(header.method), header.settings
    if method is None or "synthesis" not in settings:
        return f"Drawn by {header.method}, with no settings of a recipe."
    words = ["synthesize", "COHORT", "--method", header.method, "--out", "SET"]
    words += ["--generator", "CHECKPOINT"] if header.generator else []
    words += ["--count", str(header.count), "--size-px", str(header.size_px), "--seed", str(header.seed)]
    words += ["--judge", "JUDGE", "--agreement", f"{settings['filter']['agreement']:g}"] if "filter" in settings else []
    drawing = {name: settings[name] for name in method.drawing if name in settings}
    known = {"synthesis": build_stored(SynthesisConfig, settings["synthesis"], "set.json")}
    return _command(words, known | ({str(method.kind): drawing} if drawing else {}))


def _command(words: Sequence[str], known: Mapping[str, Any]) -> str:
    """Return a command with the nearest preset and the assignments that amount to parts of a recipe, by their names."""
    changes = {preset: list(_changes(known, load_recipe(preset), "")) for preset in PRESETS}
    nearest = min((DEFAULT_PRESET, *PRESETS), key=lambda preset: len(changes[preset]))
    options = [f"--preset {nearest}", *(f"--set {shlex.quote(change)}" for change in changes[nearest])]
    command = " \\\n    ".join([" ".join(["counterstain", *words]), *options])
    return f"All settings that are not those of the preset are named:\n```bash\n{command}\n```"


def _changes(own: Any, preset: Any, place: str) -> Iterator[str]:
    """Yield what assignments turn settings of a preset into others; of a mapping, only what is in it."""
    both = isinstance(own, Config) and type(own) is type(preset)
    if both or (isinstance(own, Mapping) and isinstance(preset, Config)):
        for name in type(own).model_fields if both else own:
            if not OF_A_MACHINE.fullmatch(place + name):
                given = getattr(own, name) if both else own[name]
                yield from _changes(given, getattr(preset, name, None), f"{place}{name}.")
    elif (plain := _plain(own)) != _plain(preset):
        yield f"{place.removesuffix('.')}={json.dumps(plain)}"


def _plain(value: Any) -> Any:
    return json.loads(to_json(value))


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
