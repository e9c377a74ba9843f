"""A checkpoint of ours -> weights in the layout that other projects publish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counterstain.checkpoints import CheckpointHeader, load_checkpoint, read_header
from counterstain.config import build_stored
from counterstain.errors import MismatchError
from counterstain.generators.autoencoder_config import AutoencoderConfig
from counterstain.generators.diffusion_config import DiffusionConfig
from counterstain.generators.published import first_stage, spade, unet
from counterstain.generators.published.layouts import (
    Rule,
    State,
    to_published,
    with_prefix,
    without_prefix,
    write_state,
)

LDM_FILE = "model.ckpt"  # what CompVis' code looks for


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
        contents: dict[str, Any] = _spade(header, state, str(folder))
    elif kind == "autoencoder":
        config = build_stored(AutoencoderConfig, header.config, folder)
        contents = {LDM_FILE: {"state_dict": _first_stage(state, config, str(folder))}}
    else:
        contents = {LDM_FILE: {"state_dict": _diffusion(header, state, str(folder))}}
    for name, content in contents.items():
        write_state(out / name, content)
    return [out / name for name in contents]


def _spade(header: CheckpointHeader, state: State, source: str) -> dict[str, dict[str, Tensor]]:
    _refuse_inputs(header, ("noise_channels", "counterstain"), source)
    found = {}
    for part, name in spade.FILES.items():
        ours = without_prefix(state, f"{part}.")
        if ours:
            found[name] = to_published(spade.rules(ours), ours, source)
    return found


def _first_stage(state: State, config: AutoencoderConfig, source: str) -> dict[str, Tensor]:
    if config.kind == "linear":
        raise MismatchError(f"{source}: a linear first stage has no published layout; expected vq or kl")
    # How often codes were used is a matter of training.
    ours = {name: value for name, value in state.items() if name.startswith(("network.", "discriminator."))}
    return to_published(first_stage.rules(ours, config.factor.bit_length(), config.blocks), ours, source)


def _diffusion(header: CheckpointHeader, state: State, source: str) -> dict[str, Tensor]:
    _refuse_inputs(header, ("context_share", "counterstain"), source)
    config = build_stored(DiffusionConfig, header.config, source)
    stage_config = build_stored(AutoencoderConfig, header.notes["first_stage"], source)
    stage = without_prefix(state, "first_stage.")
    published = with_prefix(_first_stage(stage, stage_config, source), first_stage.PREFIX)
    ours = without_prefix(state, "unet.")
    rest = {name for name in state if not name.startswith(("unet.", "first_stage.", "latent_"))}
    if rest:
        raise MismatchError(f"{source}: has {min(rest)}, which published denoisers do not have; it cannot be exported")
    rules: list[Rule] = unet.rules(
        ours,
        scales=len(config.multipliers),
        blocks=config.blocks,
        head_width=max(1, config.channels * config.multipliers[-1] // config.heads),
    )
    published |= with_prefix(to_published(rules, ours, source), unet.PREFIX)
    return published | {"scale_factor": _scale_factor(state, source)}


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
