"""Published weights -> a checkpoint of ours, with what is known about them."""

from __future__ import annotations

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
    require_taxonomy,
    save_checkpoint,
)
from counterstain.config import Config, build, build_stored
from counterstain.errors import ConfigError, InputError, MismatchError
from counterstain.generators.autoencoder import Autoencoder
from counterstain.generators.autoencoder_config import AutoencoderConfig
from counterstain.generators.diffusion import Diffusion
from counterstain.generators.diffusion_config import DiffusionConfig
from counterstain.generators.published import first_stage, spade, unet
from counterstain.generators.published.layouts import State, read_state, to_ours, with_prefix, without_prefix
from counterstain.generators.spade import Spade
from counterstain.generators.spade_config import SpadeConfig
from counterstain.storage import claim, sha256_of
from counterstain.taxonomy import Taxonomy

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
    """Make a checkpoint of NVlabs' ``latest_net_G.pth``, with ``…_E.pth`` and ``…_D.pth`` where they are given.

    Parameters
    ----------
    files : sequence of Path
        In any order; which is which follows from what they hold.
    out : Path
        Folder of the checkpoint.
    config : SpadeConfig
        Everything that the tensors do not tell; sizes are read off the tensors.
    facts : Facts

    Raises
    ------
    InputError
        A file is missing, cannot be read, or none holds a generator.
    MismatchError
        A file is of another layout, or does not fit the taxonomy or the size.
    """

    def make() -> _Made:
        states, sources = _spade_parts(files)
        found = spade.settings(states, sources)
        fitted = _spade_config(config, found, facts, sources["generator"])
        # Not on the meta device: the power iterations of the spectral norms take longer there.
        with torch.random.fork_rng():
            plain = fitted.model_copy(update={"vgg_weight": 0.0, "initial_gain": None})
            model = Spade(plain, facts.taxonomy.num_labels, facts.size_px)
        state: dict[str, Tensor] = {}
        for part, published in states.items():
            network: nn.Module = getattr(model, part)
            ours = network.state_dict()
            state |= with_prefix(to_ours(spade.rules(ours), published, ours, sources[part]), f"{part}.")
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
        Everything that the tensors do not tell: heads, noise, how the mask is shrunk, how images are drawn.
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
        weights = without_prefix(published, unet.PREFIX) or published
        found = unet.settings(weights, source)
        fitted = _diffusion_config(config, found, stage, facts, source)
        with torch.device("meta"):
            model = Diffusion(fitted, Autoencoder(stage, facts.size_px), facts.taxonomy.num_labels)
        ours = model.unet.state_dict()
        rules = unet.rules(
            ours,
            scales=len(fitted.multipliers),
            blocks=fitted.blocks,
            head_width=max(1, fitted.channels * fitted.multipliers[-1] // fitted.heads),
        )
        if averaged:
            weights = unet.averaged(published, [rule.published for rule in rules], source)
        state = with_prefix(to_ours(rules, weights, ours, source), "unet.")
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
    patients = sorted({*facts.patients_seen, *seen})
    common = {"mpp": facts.mpp, "size_px": facts.size_px, "patients_seen": patients}
    identity = {"kind": kind, "files": origin, "taxonomy": facts.taxonomy.model_dump(mode="json")}
    if is_finished(out):
        claim(out, "import weights", identity | common | {"config": config.model_dump(mode="json")})
        return read_header(out)
    made = make()  # before anything is written
    claim(out, "import weights", identity | common | {"config": config.model_dump(mode="json")})
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


def _spade_parts(files: Sequence[Path]) -> tuple[dict[spade.Part, State], dict[spade.Part, str]]:
    states: dict[spade.Part, State] = {}
    sources: dict[spade.Part, str] = {}
    for path in files:
        state = read_state(path)
        part = spade.part_of(state, str(path))
        if part in states:
            raise InputError(f"{path}: is a {part}, and so is {sources[part]}; give one of them")
        states[part], sources[part] = spade.completed(state), str(path)
    if "generator" not in states:
        raise InputError(f"{', '.join(map(str, files))}: holds no generator; give {spade.FILES['generator']} as well")
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
    published = without_prefix(state, first_stage.PREFIX) or state
    published = {name: value for name, value in published.items() if not name.startswith(first_stage.NOT_OURS)}
    fitted = _fitted(config, first_stage.settings(published, source), source)
    judged = first_stage.has_discriminator(published)
    with torch.device("meta"):
        model = Autoencoder(fitted.for_use().model_copy(update={"adversarial_weight": float(judged)}), size_px)
    ours = model.state_dict()
    rules = first_stage.rules(ours, fitted.factor.bit_length(), fitted.blocks)
    return fitted, to_ours(rules, published, ours, source)


def _stage_of(
    published: State, autoencoder: Path | None, config: AutoencoderConfig, facts: Facts, source: str
) -> tuple[AutoencoderConfig, dict[str, Tensor], dict[str, Any]]:
    """Return the first stage's settings, its network and what the header says of it."""
    inside = any(name.startswith(first_stage.PREFIX) for name in published)
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
