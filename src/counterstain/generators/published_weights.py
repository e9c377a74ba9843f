"""Weights that other projects publish -> a checkpoint of ours; ``published_layouts`` knows the layouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from counterstain.checkpoints import (
    CheckpointHeader,
    is_finished,
    load_checkpoint,
    read_header,
    read_state,
    require_finite,
    require_taxonomy,
    save_checkpoint,
)
from counterstain.config import Config, build, build_stored
from counterstain.data.split import PATIENTS_SEEN_FILE, read_patients_seen
from counterstain.errors import ConfigError, CounterstainError, InputError, MismatchError
from counterstain.generators import published_diffusers as diffusers
from counterstain.generators import published_layouts as layouts
from counterstain.generators.autoencoder import Autoencoder
from counterstain.generators.diffusion import Diffusion
from counterstain.generators.diffusion_config import AutoencoderConfig, DiffusionConfig, NoiseConfig
from counterstain.generators.published_layouts import SpadePart, State, to_ours
from counterstain.generators.spade import Spade
from counterstain.generators.spade_config import SpadeConfig
from counterstain.storage import claim
from counterstain.taxonomy import Taxonomy

SCALING = ("latent_mean", "latent_sd")  # notes of a first stage
ConfigT = TypeVar("ConfigT", bound=Config)
Stage = tuple[AutoencoderConfig, dict[str, Tensor]]  # a first stage: its settings, its tensors


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What weights do not tell about themselves."""

    taxonomy: Taxonomy  # in the order of the labels that the network was trained on
    mpp: float  # micrometres per pixel of the images that it was trained on
    size_px: int  # edge of its training patches
    patients_seen: tuple[str, ...] = ()  # every patient whose tissue it was trained on; empty = none of any cohort
    head_channels: int | None = None
    """Features of an attention head of a denoiser (``num_head_channels``); None = by the number of heads."""
    scale_factor: float | None = None  # what a denoiser's latents are multiplied by, where the file does not tell


@dataclass(frozen=True)
class _Made:
    config: Config
    state: dict[str, Tensor]
    notes: dict[str, Any] = field(default_factory=dict)


def import_weights(
    files: Sequence[Path],
    out: Path,
    config: SpadeConfig | AutoencoderConfig | DiffusionConfig,
    facts: Facts,
    *,
    first_stage: AutoencoderConfig,
    autoencoder: Path | None = None,
    averaged: bool = False,
) -> CheckpointHeader:
    """Make a checkpoint of published weights, once; the same call on a finished folder reads its header.

    ``files`` are, for SPADE, NVlabs' ``latest_net_G.pth``, with ``…_E.pth`` and ``…_D.pth`` where given, in any order;
    for an autoencoder a first stage of CompVis, perhaps inside a latent diffusion; for diffusion a latent diffusion;
    for both also a folder of diffusers, or the name of a repository of the Hub that holds one.
    ``config`` says which network it is, and all that the tensors do not tell: heads, noise, how images are drawn;
    ``first_stage`` the same of a first stage inside a latent diffusion's file, which ``autoencoder``, a checkpoint of
    ours, replaces where the file has none. ``averaged`` takes the moving average of a denoiser's weights instead of the
    last.

    Raises InputError where a file is missing, cannot be read, or holds no generator or no first stage; MismatchError
    where a file is of another layout, or does not fit the taxonomy or the size.
    """
    files, made = [diffusers.located(path) for path in files], None
    if not is_finished(out):  # before anything is written
        with _odd_shapes_named(files):
            match config:
                case SpadeConfig():
                    made = _spade(files, config, facts)
                case AutoencoderConfig():
                    made = _Made(*first_stage_of(_only(files), config, facts.size_px))
                case DiffusionConfig() if _only(files).is_dir():
                    made = _diffusion_folder(files[0], config, facts, first_stage, autoencoder)
                case DiffusionConfig():
                    made = _diffusion(_only(files), config, facts, first_stage, autoencoder, averaged=averaged)
        require_finite(made.state, ", ".join(map(str, files)))
    kind = type(config).__name__.removesuffix("Config").lower()
    origin = {name: digest for path in files for name, digest in diffusers.hashes(path).items()}
    seen = set(read_header(autoencoder).patients_seen if autoencoder else ())
    for folder in {path if path.is_dir() else path.parent for path in files}:
        if (folder / PATIENTS_SEEN_FILE).exists():
            seen.update(read_patients_seen(folder / PATIENTS_SEEN_FILE))  # as export_weights writes it
    common = {"mpp": facts.mpp, "size_px": facts.size_px, "patients_seen": sorted({*facts.patients_seen, *seen})}
    identity = {"kind": kind, "files": origin, "taxonomy": facts.taxonomy.model_dump(mode="json")}
    stated = {"head_channels": facts.head_channels, "scale_factor": facts.scale_factor}
    told = {name: value for name, value in stated.items() if value is not None}
    claim(out, "import weights", identity | common | told | {"config": config.model_dump(mode="json")})
    if made is None:
        return read_header(out)
    header = CheckpointHeader(
        kind=kind,
        taxonomy=facts.taxonomy,
        config=made.config.model_dump(mode="json"),
        seed=0,
        cohort="imported",
        notes={"imported": origin} | made.notes,
        **common,
    )
    return save_checkpoint(out, made.state, header)


@contextmanager
def _odd_shapes_named(files: Sequence[Path]) -> Iterator[None]:
    try:
        yield
    except CounterstainError:
        raise
    except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise MismatchError(
            f"{', '.join(map(str, files))}: has tensors of shapes that the published layout does not have ({reason})"
        ) from error


def _only(files: Sequence[Path]) -> Path:
    if len(files) != 1:
        raise InputError(f"{len(files)} files: expected one, the whole network")
    return files[0]


def _fitted(config: ConfigT, found: dict[str, Any], source: str) -> ConfigT:
    return build(type(config), config.model_dump(mode="json") | found, source)


def _spade(files: Sequence[Path], config: SpadeConfig, facts: Facts) -> _Made:
    states, sources = _spade_parts(files)
    found, source = layouts.spade_settings(states, sources["generator"]), sources["generator"]
    size_px, channels, labels = found.pop("size_px"), found.pop("channels"), facts.taxonomy.num_labels
    if channels not in {labels, labels + 1}:
        raise MismatchError(
            f"{source}: was trained on {channels} label channels; taxonomy {facts.taxonomy.name} has {labels} labels "
            f"with background, so {labels} or, with instance edges, {labels + 1}"
        )
    if size_px != facts.size_px:
        raise MismatchError(
            f"{source}: draws images of {size_px} px, not {facts.size_px}; give --size-px {size_px} (a network trained "
            "with another --num_upsampling_layers than normal cannot be used)"
        )
    fitted = _fitted(config, found | {"edge_channel": channels == labels + 1}, source)
    with torch.device("meta"):
        model = Spade(fitted.model_copy(update={"vgg_weight": 0.0, "initial_gain": None}), labels, size_px)
    state: dict[str, Tensor] = {}
    for part, published in states.items():
        network: nn.Module = getattr(model, part)
        state |= with_prefix(to_ours(layouts.SPADE, published, network.state_dict(), sources[part]), f"{part}.")
    assumed = ["the last channel shows borders between instances"] if fitted.edge_channel else []
    return _Made(fitted, state, {"parts": sorted(states), "assumed": assumed})


def _spade_parts(files: Sequence[Path]) -> tuple[dict[SpadePart, State], dict[SpadePart, str]]:
    states: dict[SpadePart, State] = {}
    sources: dict[SpadePart, str] = {}
    for path in files:
        state = read_state(path)
        part = layouts.spade_part(state, str(path))
        if part in states:
            raise InputError(f"{path}: is a {part}, and so is {sources[part]}; give one of them")
        states[part], sources[part] = layouts.spade_completed(state), str(path)
    if "generator" not in states:
        raise InputError(
            f"{', '.join(map(str, files))}: holds no generator; give {layouts.SPADE_FILES['generator']} as well"
        )
    return states, sources


def first_stage_of(source: Path, config: AutoencoderConfig, size_px: int) -> tuple[AutoencoderConfig, Any, Any]:
    """Return the first stage of a located source: its settings, its weights, and what to note of it."""
    if not source.is_dir():
        return (*_first_stage(read_state(source), config, size_px, str(source)), {})
    fitted, state, scaling = diffusers.first_stage(source, config)
    return fitted, state, {name: values.tolist() for name, values in scaling.items()}


def _first_stage(state: State, config: AutoencoderConfig, size_px: int, source: str) -> Stage:
    published = without_prefix(state, layouts.FIRST_STAGE_PREFIX) or state
    published = {name: value for name, value in published.items() if not name.startswith(layouts.NOT_OURS)}
    found = layouts.first_stage_settings(published, source)
    fitted, judged = _fitted(config, found, source), "discriminator_width" in found
    with torch.device("meta"):
        model = Autoencoder(fitted.for_use().model_copy(update={"adversarial_weight": float(judged)}), size_px)
    return fitted, to_ours(layouts.first_stage_layout(fitted), published, model.state_dict(), source)


def _diffusion(
    path: Path,
    config: DiffusionConfig,
    facts: Facts,
    first_stage: AutoencoderConfig,
    autoencoder: Path | None,
    *,
    averaged: bool,
) -> _Made:
    published, source, labels = read_state(path), str(path), facts.taxonomy.num_labels
    if autoencoder is not None:
        (stage, state), digest, _ = _given_stage(autoencoder, facts)
    elif any(name.startswith(layouts.FIRST_STAGE_PREFIX) for name in published):
        (stage, state), digest = _first_stage(published, first_stage, facts.size_px, source), ""
    else:
        raise InputError(f"{source}: holds no first stage; give one with --autoencoder CHECKPOINT")
    stage, stage_state = stage.for_use(), _stage_state(state)
    weights = without_prefix(published, layouts.DENOISER_PREFIX) or published
    if conditioner := without_prefix(published, "cond_stage_model."):
        raise MismatchError(
            f"{source}: shows its network what a network of its own makes of the mask (cond_stage_model, "
            f"{len(conditioner)} tensors); ours is shown the share of each label"
        )
    found = layouts.denoiser_settings(weights, source) | _noise_settings(published, config.noise, source)
    fitted = _diffusion_config(config, found, stage, facts, source)
    with torch.device("meta"):
        model = Diffusion(fitted, Autoencoder(stage, facts.size_px), labels)
    ours = model.unet.state_dict()
    layout = layouts.denoiser_layout(ours, fitted)
    if averaged:
        weights = layouts.averaged_denoiser(published, layout.groups(ours), source)
    made = with_prefix(to_ours(layout, weights, ours, source), "unet.")
    made["latent_mean"] = torch.zeros(stage.latent_channels)
    scale_factor = _scale_factor(published, stage, facts, source)
    made["latent_sd"] = torch.full((stage.latent_channels,), 1 / scale_factor)
    if missing := set(model.state_dict()) - set(made):
        raise MismatchError(
            f"{source}: the recipe asks for {min(missing)}, which published denoisers do not have; use --preset paper"
        )
    assumed = [f"{fitted.heads} attention heads", f"predicts {fitted.noise.prediction}"]
    assumed += [] if "betas" in published else [f"noise from {fitted.noise.beta_start:g} to {fitted.noise.beta_end:g}"]
    assumed += [] if "scale_factor" in published else [f"scale factor {scale_factor:g}"]
    if not averaged and any(name.startswith(layouts.AVERAGED_PREFIX) for name in published):
        assumed.append("the last weights, not their moving average")
    notes = {"first_stage": stage.model_dump(mode="json"), "first_stage_sha256": digest, "averaged": averaged}
    return _Made(fitted, made | stage_state, notes | {"assumed": assumed})


def _diffusion_folder(
    folder: Path, config: DiffusionConfig, facts: Facts, first_stage: AutoencoderConfig, autoencoder: Path | None
) -> _Made:
    """Take a denoiser, its noise and its first stage from a pipeline's folder."""
    digest = ""
    if autoencoder is not None:
        (stage, state), digest, notes = _given_stage(autoencoder, facts)
        scaling = {"latent_mean": [0.0] * stage.latent_channels, "latent_sd": [1.0] * stage.latent_channels} | notes
    else:
        stage, state, scaling = first_stage_of(folder, first_stage, facts.size_px)
    stage = stage.for_use()
    fitted, made = diffusers.denoiser(folder, config, stage.latent_channels, facts.taxonomy.num_labels)
    made |= {name: torch.tensor(values) for name, values in scaling.items()} | _stage_state(state)
    return _Made(fitted, made, {"first_stage": stage.model_dump(mode="json"), "first_stage_sha256": digest})


def _given_stage(autoencoder: Path, facts: Facts) -> tuple[Stage, str, dict[str, Any]]:
    """Return the first stage of a checkpoint of ours, its hash, and how others normalise its latents."""
    header, state = load_checkpoint(autoencoder, "autoencoder")
    require_taxonomy(autoencoder, header, facts.taxonomy)
    scaling: dict[str, Any] = {name: header.notes[name] for name in SCALING if name in header.notes}
    return (build_stored(AutoencoderConfig, header.config, autoencoder), state), header.sha256, scaling


def _stage_state(state: State) -> dict[str, Tensor]:
    return {f"first_stage.{name}": value for name, value in state.items() if name.startswith("network.")}


def _noise_settings(published: State, noise: NoiseConfig, source: str) -> dict[str, Any]:
    """Read the noising process off a file that holds it."""
    if "betas" not in published:
        return {}
    betas = published["betas"].float()
    ends = {"beta_start": float(f"{betas[0]:.6g}"), "beta_end": float(f"{betas[-1]:.6g}")}
    for schedule in ("scaled_linear", "linear", "squaredcos_cap_v2"):
        changes: dict[str, Any] = {"timesteps": len(betas), "schedule": schedule, "zero_terminal_snr": False}
        changes |= {} if schedule == "squaredcos_cap_v2" else ends
        found = build(NoiseConfig, noise.model_dump(mode="json") | changes, f"{source}: betas")
        if torch.allclose(DDPMScheduler(**found.scheduler_settings()).betas, betas, rtol=1e-3, atol=1e-8):
            return {"noise": found.model_dump(mode="json")}
    raise MismatchError(f"{source}: its betas rise from {betas[0]:g} to {betas[-1]:g} in a way that ours do not know")


def _scale_factor(published: State, stage: AutoencoderConfig, facts: Facts, source: str) -> float:
    stated, asked = published.get("scale_factor"), facts.scale_factor
    found = asked if stated is None else float(stated)
    if found is None and stage.kind == "kl":
        raise ConfigError(
            f"{source}: holds no scale_factor, which denoisers of kl latents have; give --scale-factor as in their "
            "config, or 1 where it has none"
        )
    if stated is not None and asked is not None and abs(asked / float(stated) - 1) > 1e-3:
        raise MismatchError(f"{source}: holds scale_factor {float(stated):g}, not {asked:g}; leave --scale-factor out")
    found = 1.0 if found is None else found
    if not 1e-6 < found < 1e6:
        raise ConfigError(f"{source}: scale_factor {found:g}: expected a number above 0")
    return found


def _diffusion_config(
    config: DiffusionConfig, found: dict[str, Any], stage: AutoencoderConfig, facts: Facts, source: str
) -> DiffusionConfig:
    inputs, latents, labels = found.pop("in_channels"), found.pop("out_channels"), facts.taxonomy.num_labels
    if latents != stage.latent_channels:
        raise MismatchError(f"{source}: draws {latents} latent channels, its first stage has {stage.latent_channels}")
    if inputs != latents + labels:
        raise MismatchError(
            f"{source}: takes {inputs - latents} channels beside the latents; taxonomy {facts.taxonomy.name} has "
            f"{labels} labels with background"
        )
    widths = [found["channels"] * m for m in found["multipliers"]]
    attending, width = widths[-max(1, found["attention_scales"]) :], facts.head_channels
    features = f"{source} attends with {' and '.join(map(str, attending))} features"
    if width is None and len(set(attending)) > 1:
        raise ConfigError(
            f"{features}, and does not tell how heads share them: give --head-channels N where their config has "
            "num_head_channels: N; heads of num_heads differ in width between the scales, which ours cannot"
        )
    if width is not None:
        if width < 1 or any(of_scale % width for of_scale in attending):
            raise ConfigError(f"--head-channels {width}: {features}, which such heads cannot share")
        found["heads"] = widths[-1] // width
    fitted = _fitted(config, found, source)
    if widths[-1] % fitted.heads:
        raise ConfigError(
            f"diffusion.heads {fitted.heads}: {features}, which so many heads cannot share; give their number as in "
            "their config (num_heads) by --set diffusion.heads=N"
        )
    return fitted


def without_prefix(state: State, prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def with_prefix(state: State, prefix: str) -> dict[str, Tensor]:
    """Return the tensors with a prefix before their names."""
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}
