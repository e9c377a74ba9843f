"""Weights that other projects publish -> a checkpoint of ours, and back; ``published_layouts`` knows the layouts."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from counterstain.checkpoints import (
    CheckpointHeader,
    Kind,
    is_finished,
    load_checkpoint,
    read_header,
    read_state,
    require_taxonomy,
    save_checkpoint,
)
from counterstain.config import Config, build, build_stored
from counterstain.errors import ConfigError, InputError, MismatchError
from counterstain.generators import published_layouts as layouts
from counterstain.generators.autoencoder import Autoencoder
from counterstain.generators.autoencoder_config import AutoencoderConfig
from counterstain.generators.diffusion import Diffusion
from counterstain.generators.diffusion_config import DiffusionConfig
from counterstain.generators.published_layouts import Layout, SpadePart, State, to_ours, to_published
from counterstain.generators.spade import Spade
from counterstain.generators.spade_config import SpadeConfig
from counterstain.storage import claim, replacing, sha256_of
from counterstain.taxonomy import Taxonomy

LDM_FILE = "model.ckpt"  # what CompVis' code looks for
ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What weights do not tell about themselves.

    Parameters
    ----------
    taxonomy : Taxonomy
        In the order of the labels that the network was trained on.
    mpp : float
        Micrometres per pixel of the images that it was trained on.
    size_px : int
        Edge of its training patches.
    patients_seen : tuple of str
        Every patient whose tissue it was trained on; empty = none of any cohort.
    """

    taxonomy: Taxonomy
    mpp: float
    size_px: int
    patients_seen: tuple[str, ...] = field(default=())


def import_spade(files: Sequence[Path], out: Path, config: SpadeConfig, facts: Facts) -> CheckpointHeader:
    """Make a checkpoint in ``out`` of NVlabs' ``latest_net_G.pth``, with ``…_E.pth`` and ``…_D.pth`` where given.

    The files may come in any order. Sizes are read off the tensors, everything else is taken from ``config``.

    Raises
    ------
    InputError
        A file is missing, cannot be read, or none holds a generator.
    MismatchError
        A file is of another layout, or does not fit the taxonomy or the size.
    """

    def make() -> _Made:
        states, sources = _spade_parts(files)
        found = layouts.spade_settings(states, sources["generator"])
        fitted = _spade_config(config, found, facts, sources["generator"])
        # Not on the meta device: the power iterations of the spectral norms take longer there.
        with torch.random.fork_rng():
            plain = fitted.model_copy(update={"vgg_weight": 0.0, "initial_gain": None})
            model = Spade(plain, facts.taxonomy.num_labels, facts.size_px)
        state: dict[str, Tensor] = {}
        for part, published in states.items():
            network: nn.Module = getattr(model, part)
            ours = network.state_dict()
            state |= with_prefix(to_ours(layouts.SPADE, published, ours, sources[part]), f"{part}.")
        return _Made(fitted, state, {"parts": sorted(states)})

    return _imported("spade", files, out, config=config, facts=facts, make=make)


def import_autoencoder(files: Sequence[Path], out: Path, config: AutoencoderConfig, facts: Facts) -> CheckpointHeader:
    """Make a checkpoint of a first stage of CompVis; of a whole latent diffusion, its first stage is taken."""

    def make() -> _Made:
        path = _only(files)
        fitted, state = _first_stage(read_state(path), config, facts.size_px, str(path))
        return _Made(fitted, state, {})

    return _imported("autoencoder", files, out, config=config, facts=facts, make=make)


def import_diffusion(
    files: Sequence[Path],
    out: Path,
    config: DiffusionConfig,
    facts: Facts,
    *,
    first_stage_config: AutoencoderConfig,
    autoencoder: Path | None = None,
    averaged: bool = False,
) -> CheckpointHeader:
    """Make a checkpoint of a latent diffusion of CompVis.

    Parameters
    ----------
    config : DiffusionConfig
        All that the tensors do not tell: heads, noise, how the mask is shrunk, how images are drawn.
    first_stage_config : AutoencoderConfig
        For a first stage inside the file.
    autoencoder : Path, optional
        Checkpoint of ours to take the first stage from, where the file has none.
    averaged : bool
        Take the moving average of the weights instead of the last ones.
    """

    def make() -> _Made:
        path = _only(files)
        published, source = read_state(path), str(path)
        stage, stage_state, stage_notes = _stage_of(published, autoencoder, first_stage_config, facts, source)
        weights = without_prefix(published, layouts.DENOISER_PREFIX) or published
        found = layouts.denoiser_settings(weights, source)
        fitted = _diffusion_config(config, found, stage, facts, source)
        with torch.device("meta"):
            model = Diffusion(fitted, Autoencoder(stage, facts.size_px), facts.taxonomy.num_labels)
        ours = model.unet.state_dict()
        layout = _denoiser_layout(ours, fitted)
        if averaged:
            weights = layouts.averaged_denoiser(published, layout.groups(ours), source)
        state = with_prefix(to_ours(layout, weights, ours, source), "unet.")
        scale = float(published.get("scale_factor", torch.ones(())))
        state["latent_mean"] = torch.zeros(stage.latent_channels)
        state["latent_sd"] = torch.full((stage.latent_channels,), 1 / scale)
        _require_all_parts(model, state, source)
        return _Made(fitted, state | with_prefix(stage_state, "first_stage."), stage_notes | {"averaged": averaged})

    seen = read_header(autoencoder).patients_seen if autoencoder else ()
    return _imported("diffusion", files, out, config=config, facts=facts, make=make, seen=seen)


@dataclass(frozen=True)
class _Made:
    config: Config
    state: dict[str, Tensor]
    notes: dict[str, Any]


def _imported(
    kind: Kind,
    files: Sequence[Path],
    out: Path,
    *,
    config: Config,
    facts: Facts,
    make: Callable[[], _Made],
    seen: tuple[str, ...] = (),
) -> CheckpointHeader:
    """Make and save a checkpoint, once; the same call on a finished folder reads its header."""
    for path in files:
        if not path.is_file():
            raise InputError(f"{path}: no such weights file")
    origin = {path.name: sha256_of(path) for path in files}
    common = {"mpp": facts.mpp, "size_px": facts.size_px, "patients_seen": sorted({*facts.patients_seen, *seen})}
    identity = {"kind": kind, "files": origin, "taxonomy": facts.taxonomy.model_dump(mode="json")}
    made = None if is_finished(out) else make()  # before anything is written
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


def _spade_config(config: SpadeConfig, found: dict[str, Any], facts: Facts, source: str) -> SpadeConfig:
    size_px, channels = found.pop("size_px"), found.pop("channels")
    labels = facts.taxonomy.num_labels
    if channels not in {labels, labels + 1}:
        raise MismatchError(
            f"{source}: was trained on {channels} label channels; taxonomy {facts.taxonomy.name} has {labels} labels "
            f"with background, so {labels} or, with instance edges, {labels + 1}"
        )
    if size_px != facts.size_px:
        raise MismatchError(f"{source}: draws images of {size_px} px, not {facts.size_px}; give --size {size_px}")
    found["edge_channel"] = channels == labels + 1
    return _fitted(config, found, source)


def _first_stage(
    state: State, config: AutoencoderConfig, size_px: int, source: str
) -> tuple[AutoencoderConfig, dict[str, Tensor]]:
    published = without_prefix(state, layouts.FIRST_STAGE_PREFIX) or state
    published = {name: value for name, value in published.items() if not name.startswith(layouts.NOT_OURS)}
    fitted = _fitted(config, layouts.first_stage_settings(published, source), source)
    judged = layouts.has_discriminator(published)
    with torch.device("meta"):
        model = Autoencoder(fitted.for_use().model_copy(update={"adversarial_weight": float(judged)}), size_px)
    layout = layouts.first_stage_layout(len(fitted.widths))
    return fitted, to_ours(layout, published, model.state_dict(), source)


def _stage_of(
    published: State, autoencoder: Path | None, config: AutoencoderConfig, facts: Facts, source: str
) -> tuple[AutoencoderConfig, dict[str, Tensor], dict[str, Any]]:
    """Return the first stage's settings, its network and what the header says of it."""
    inside = any(name.startswith(layouts.FIRST_STAGE_PREFIX) for name in published)
    if autoencoder is not None:
        header, state = load_checkpoint(autoencoder, "autoencoder")
        require_taxonomy(autoencoder, header, facts.taxonomy)
        fitted, digest = build_stored(AutoencoderConfig, header.config, autoencoder), header.sha256
    elif inside:
        fitted, state = _first_stage(published, config, facts.size_px, source)
        digest = ""
    else:
        raise InputError(f"{source}: holds no first stage; give one with --autoencoder CHECKPOINT")
    without_losses = fitted.for_use()
    network = {name: value for name, value in state.items() if name.startswith("network.")}
    notes = {"first_stage": without_losses.model_dump(mode="json"), "first_stage_sha256": digest}
    return without_losses, network, notes


def _diffusion_config(
    config: DiffusionConfig, found: dict[str, Any], stage: AutoencoderConfig, facts: Facts, source: str
) -> DiffusionConfig:
    inputs, latents = found.pop("in_channels"), found.pop("out_channels")
    if latents != stage.latent_channels:
        raise MismatchError(f"{source}: draws {latents} latent channels, its first stage has {stage.latent_channels}")
    labels = facts.taxonomy.num_labels
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


def _require_all_parts(model: Diffusion, state: dict[str, Tensor], source: str) -> None:
    missing = sorted(set(model.state_dict()) - set(state))
    if missing:
        raise MismatchError(
            f"{source}: the recipe asks for {missing[0]}, which published denoisers do not have; use --preset paper"
        )


def export_weights(folder: Path, out: Path) -> list[Path]:
    """Write the weights of a SPADE, autoencoder or diffusion checkpoint in their published layout.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    out : Path
        Folder of the files: ``latest_net_G/E/D.pth`` for SPADE, ``model.ckpt`` for the others.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    MismatchError
        There is no published layout for this kind of network, or the network has parts that it lacks.
    """
    kind = read_header(folder).kind
    if kind == "segmenter":
        raise MismatchError(f"{folder}: a segmenter has no published layout; expected spade, autoencoder or diffusion")
    header, state = load_checkpoint(folder, kind)
    if kind == "spade":
        contents: dict[str, Any] = _published_spade(header, state, str(folder))
    elif kind == "autoencoder":
        config = build_stored(AutoencoderConfig, header.config, folder)
        contents = {LDM_FILE: {"state_dict": _published_first_stage(state, config, str(folder))}}
    else:
        contents = {LDM_FILE: {"state_dict": _published_diffusion(header, state, str(folder))}}
    for name, content in contents.items():
        buffer = io.BytesIO()  # torch's own writer hides that a disk is full
        torch.save(content, buffer)
        with replacing(out / name) as partial:
            partial.write_bytes(buffer.getbuffer())
    return [out / name for name in contents]


def _published_spade(header: CheckpointHeader, state: State, source: str) -> dict[str, dict[str, Tensor]]:
    _refuse_inputs(header, ("noise_channels", "counterstain"), source)
    parts = {name: without_prefix(state, f"{part}.") for part, name in layouts.SPADE_FILES.items()}
    return {name: to_published(layouts.SPADE, ours) for name, ours in parts.items() if ours}


def _published_first_stage(state: State, config: AutoencoderConfig, source: str) -> dict[str, Tensor]:
    if config.kind == "linear":
        raise MismatchError(f"{source}: a linear first stage has no published layout; expected vq or kl")
    # How often codes were used is a matter of training.
    ours = {name: value for name, value in state.items() if name.startswith(("network.", "discriminator."))}
    return to_published(layouts.first_stage_layout(len(config.widths)), ours)


def _published_diffusion(header: CheckpointHeader, state: State, source: str) -> dict[str, Tensor]:
    _refuse_inputs(header, ("context_share", "counterstain"), source)
    rest = {name for name in state if not name.startswith(("unet.", "first_stage.", "latent_"))}
    if rest:
        raise MismatchError(f"{source}: has {min(rest)}, which published denoisers do not have; it cannot be exported")
    stage_config = build_stored(AutoencoderConfig, header.notes["first_stage"], source)
    stage = _published_first_stage(without_prefix(state, "first_stage."), stage_config, source)
    ours = without_prefix(state, "unet.")
    denoiser = to_published(_denoiser_layout(ours, build_stored(DiffusionConfig, header.config, source)), ours)
    return {
        **with_prefix(stage, layouts.FIRST_STAGE_PREFIX),
        **with_prefix(denoiser, layouts.DENOISER_PREFIX),
        "scale_factor": _scale_factor(state, source),
    }


def _denoiser_layout(ours: State, config: DiffusionConfig) -> Layout:
    head_width = max(1, config.channels * config.multipliers[-1] // config.heads)
    return layouts.denoiser_layout(ours, blocks=config.blocks, head_width=head_width)


def _refuse_inputs(header: CheckpointHeader, names: tuple[str, ...], source: str) -> None:
    """Refuse networks that are shown more than labels: their input channels would be taken for labels."""
    for name in names:
        if header.config.get(name):
            raise MismatchError(f"{source}: was trained with {name}, which published networks lack; train without it")


def _scale_factor(state: State, source: str) -> Tensor:
    """Return the one factor that the published code multiplies latents by."""
    mean, sd = state["latent_mean"], state["latent_sd"]
    if mean.abs().max() > 0 or not torch.allclose(sd, sd[:1].expand_as(sd)):
        raise MismatchError(
            f"{source}: normalises latents by more than one factor; train with diffusion.normalise_latents=none to "
            "export it"
        )
    return 1 / sd[0]


def without_prefix(state: State, prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def with_prefix(state: State, prefix: str) -> dict[str, Tensor]:
    """Return a state dict with a prefix before every name."""
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}
