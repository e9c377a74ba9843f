"""Weights that other projects publish -> a checkpoint of ours, and back; ``published_layouts`` knows the layouts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from counterstain.checkpoints import (
    CheckpointHeader,
    is_finished,
    load_checkpoint,
    read_header,
    read_state,
    require_taxonomy,
    save_checkpoint,
)
from counterstain.config import Config, build, build_stored
from counterstain.data.split import PATIENTS_SEEN_FILE, read_patients_seen
from counterstain.errors import ConfigError, InputError, MismatchError
from counterstain.generators import published_layouts as layouts
from counterstain.generators.autoencoder import Autoencoder
from counterstain.generators.diffusion import Diffusion
from counterstain.generators.diffusion_config import AutoencoderConfig, DiffusionConfig
from counterstain.generators.published_layouts import SpadePart, State, to_ours, to_published
from counterstain.generators.spade import Spade
from counterstain.generators.spade_config import SpadeConfig
from counterstain.storage import claim, replacing, sha256_of, write_text
from counterstain.taxonomy import Taxonomy

LDM_FILE = "model.ckpt"  # what CompVis' code looks for
ConfigT = TypeVar("ConfigT", bound=Config)
Stage = tuple[AutoencoderConfig, dict[str, Tensor]]  # a first stage: its settings, its tensors


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What weights do not tell about themselves."""

    taxonomy: Taxonomy
    """In the order of the labels that the network was trained on."""
    mpp: float
    """Micrometres per pixel of the images that it was trained on."""
    size_px: int
    """Edge of its training patches."""
    patients_seen: tuple[str, ...] = ()
    """Every patient whose tissue it was trained on; empty = none of any cohort."""


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

    Parameters
    ----------
    files : sequence of Path
        For SPADE NVlabs' ``latest_net_G.pth``, with ``…_E.pth`` and ``…_D.pth`` where given, in any order. For an
        autoencoder a first stage of CompVis, perhaps inside a latent diffusion; for diffusion a latent diffusion.
    config : SpadeConfig, AutoencoderConfig or DiffusionConfig
        Says which network it is, and all that the tensors do not tell: heads, noise, how images are drawn.
    first_stage : AutoencoderConfig
        For a first stage inside the file of a latent diffusion.
    autoencoder : Path, optional
        Checkpoint of ours to take the first stage from, where a latent diffusion's file has none.
    averaged : bool
        Take the moving average of a denoiser's weights instead of the last ones.

    Raises
    ------
    InputError
        A file is missing, cannot be read, or holds no generator or no first stage.
    MismatchError
        A file is of another layout, or does not fit the taxonomy or the size.
    """
    for path in files:
        if not path.is_file():
            raise InputError(f"{path}: no such weights file")
    made = None
    if not is_finished(out):  # before anything is written
        match config:
            case SpadeConfig():
                made = _spade(files, config, facts)
            case AutoencoderConfig():
                made = _Made(*_first_stage(read_state(_only(files)), config, facts.size_px, str(files[0])))
            case DiffusionConfig():
                made = _diffusion(_only(files), config, facts, first_stage, autoencoder, averaged=averaged)
    kind = type(config).__name__.removesuffix("Config").lower()
    origin = {path.name: sha256_of(path) for path in files}
    seen = set(read_header(autoencoder).patients_seen if autoencoder else ())
    for folder in {path.parent for path in files if (path.parent / PATIENTS_SEEN_FILE).exists()}:
        seen.update(read_patients_seen(folder / PATIENTS_SEEN_FILE))  # as export_weights writes it
    common = {"mpp": facts.mpp, "size_px": facts.size_px, "patients_seen": sorted({*facts.patients_seen, *seen})}
    identity = {"kind": kind, "files": origin, "taxonomy": facts.taxonomy.model_dump(mode="json")}
    claim(out, "import weights", identity | common | {"config": config.model_dump(mode="json")})
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
        raise MismatchError(f"{source}: draws images of {size_px} px, not {facts.size_px}; give --size {size_px}")
    fitted = _fitted(config, found | {"edge_channel": channels == labels + 1}, source)
    # Not on the meta device: the power iterations of the spectral norms take longer there.
    with torch.random.fork_rng():
        model = Spade(fitted.model_copy(update={"vgg_weight": 0.0, "initial_gain": None}), labels, size_px)
    state: dict[str, Tensor] = {}
    for part, published in states.items():
        network: nn.Module = getattr(model, part)
        state |= _with_prefix(to_ours(layouts.SPADE, published, network.state_dict(), sources[part]), f"{part}.")
    return _Made(fitted, state, {"parts": sorted(states)})


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


def _first_stage(state: State, config: AutoencoderConfig, size_px: int, source: str) -> Stage:
    published = _without_prefix(state, layouts.FIRST_STAGE_PREFIX) or state
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
        header, state = load_checkpoint(autoencoder, "autoencoder")
        require_taxonomy(autoencoder, header, facts.taxonomy)
        stage, digest = build_stored(AutoencoderConfig, header.config, autoencoder), header.sha256
    elif any(name.startswith(layouts.FIRST_STAGE_PREFIX) for name in published):
        (stage, state), digest = _first_stage(published, first_stage, facts.size_px, source), ""
    else:
        raise InputError(f"{source}: holds no first stage; give one with --autoencoder CHECKPOINT")
    stage = stage.for_use()
    stage_state = {f"first_stage.{name}": value for name, value in state.items() if name.startswith("network.")}
    weights = _without_prefix(published, layouts.DENOISER_PREFIX) or published
    fitted = _diffusion_config(config, layouts.denoiser_settings(weights, source), stage, facts, source)
    with torch.device("meta"):
        model = Diffusion(fitted, Autoencoder(stage, facts.size_px), labels)
    ours = model.unet.state_dict()
    layout = layouts.denoiser_layout(ours, fitted)
    if averaged:
        weights = layouts.averaged_denoiser(published, layout.groups(ours), source)
    made = _with_prefix(to_ours(layout, weights, ours, source), "unet.")
    made["latent_mean"] = torch.zeros(stage.latent_channels)
    made["latent_sd"] = torch.full((stage.latent_channels,), 1 / float(published.get("scale_factor", 1.0)))
    if missing := set(model.state_dict()) - set(made):
        raise MismatchError(
            f"{source}: the recipe asks for {min(missing)}, which published denoisers do not have; use --preset paper"
        )
    notes = {"first_stage": stage.model_dump(mode="json"), "first_stage_sha256": digest, "averaged": averaged}
    return _Made(fitted, made | stage_state, notes)


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
    fitted = _fitted(config, found, source)
    widths = [fitted.channels * m for m in fitted.multipliers]
    attending = widths[-max(1, fitted.attention_scales) :]
    if widths[-1] % fitted.heads or any(width % (widths[-1] // fitted.heads) for width in attending):
        raise ConfigError(
            f"diffusion.heads {fitted.heads}: {source} attends with {', '.join(map(str, attending))} features, which "
            "equally wide heads cannot share; give the number of heads at the lowest scale by --set diffusion.heads=N"
        )
    return fitted


def export_weights(folder: Path, out: Path) -> list[Path]:
    """Write the weights of the checkpoint in ``folder`` in their published layout and return the files in ``out``.

    They are ``latest_net_G/E/D.pth`` for SPADE, ``model.ckpt`` for autoencoder and diffusion, and beside them
    ``patients_seen.txt``, which the import reads. MismatchError is raised
    where there is no published layout for this kind of network, or the network has parts that it lacks.
    """
    kind, source = read_header(folder).kind, str(folder)
    if kind == "segmenter":
        raise MismatchError(f"{folder}: a segmenter has no published layout; expected spade, autoencoder or diffusion")
    header, state = load_checkpoint(folder, kind)
    if kind == "spade":
        _refuse_inputs(header, ("noise_channels", "counterstain"), source)
        parts = {name: _without_prefix(state, f"{part}.") for part, name in layouts.SPADE_FILES.items()}
        contents: dict[str, Any] = {name: to_published(layouts.SPADE, ours) for name, ours in parts.items() if ours}
    elif kind == "autoencoder":
        contents = {LDM_FILE: {"state_dict": _published_first_stage(state, header.config, source)}}
    else:
        contents = {LDM_FILE: {"state_dict": _published_diffusion(header, state, source)}}
    if header.patients_seen:  # before any weights that could be imported without it
        write_text(out / PATIENTS_SEEN_FILE, "\n".join(header.patients_seen) + "\n")
    for name, content in contents.items():
        buffer = io.BytesIO()  # torch's own writer hides that a disk is full
        torch.save(content, buffer)
        with replacing(out / name) as partial:
            partial.write_bytes(buffer.getbuffer())
    return [out / name for name in contents]


def _published_first_stage(state: State, settings: dict[str, Any], source: str) -> dict[str, Tensor]:
    config = build_stored(AutoencoderConfig, settings, source)
    if config.kind == "linear":
        raise MismatchError(f"{source}: a linear first stage has no published layout; expected vq or kl")
    # How often codes were used is a matter of training.
    ours = {name: value for name, value in state.items() if name.startswith(("network.", "discriminator."))}
    return to_published(layouts.first_stage_layout(config), ours)


def _published_diffusion(header: CheckpointHeader, state: State, source: str) -> dict[str, Tensor]:
    _refuse_inputs(header, ("context_share", "counterstain"), source)
    if rest := {name for name in state if not name.startswith(("unet.", "first_stage.", "latent_"))}:
        raise MismatchError(f"{source}: has {min(rest)}, which published denoisers do not have; it cannot be exported")
    stage = _published_first_stage(_without_prefix(state, "first_stage."), header.notes["first_stage"], source)
    ours = _without_prefix(state, "unet.")
    denoiser = to_published(layouts.denoiser_layout(ours, build_stored(DiffusionConfig, header.config, source)), ours)
    mean, sd = state["latent_mean"], state["latent_sd"]
    if mean.abs().max() > 0 or not torch.allclose(sd, sd[:1].expand_as(sd)):
        raise MismatchError(
            f"{source}: normalises latents by more than one factor; train with diffusion.normalise_latents=none to "
            "export it"
        )
    parts = _with_prefix(stage, layouts.FIRST_STAGE_PREFIX) | _with_prefix(denoiser, layouts.DENOISER_PREFIX)
    return parts | {"scale_factor": 1 / sd[0]}


def _refuse_inputs(header: CheckpointHeader, names: tuple[str, ...], source: str) -> None:
    """Refuse networks that are shown more than labels: their input channels would be taken for labels."""
    for name in names:
        if header.config.get(name):
            raise MismatchError(f"{source}: was trained with {name}, which published networks lack; train without it")


def _without_prefix(state: State, prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _with_prefix(state: State, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}
