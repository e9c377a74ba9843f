"""Diffusion checkpoints as folders that diffusers opens, and back; first stages and denoisers of any such folder.

An export holds ``unet``, ``vae``, ``scheduler`` and perhaps ``style`` as diffusers saves them, ``model_index.json``
and the custom pipeline that draws (:mod:`counterstain.generators.pipeline`); :mod:`counterstain.sharing` adds the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DModel, VQModel
from torch import Tensor

from counterstain.checkpoints import CheckpointHeader
from counterstain.config import build
from counterstain.errors import InputError, MismatchError
from counterstain.generators import pipeline
from counterstain.generators.autoencoder import build_network
from counterstain.generators.conditioning import nuclei_settings
from counterstain.generators.diffusion import Diffusion, build_denoiser
from counterstain.generators.diffusion_config import AutoencoderConfig, DiffusionConfig
from counterstain.generators.drawing import DiffusionGenerator
from counterstain.generators.samplers import build_scheduler, spacing
from counterstain.hub import fetched, is_repo
from counterstain.storage import read_json, sha256_of, write_json, write_text

INDEX_FILE, CONFIG_FILE = "model_index.json", "config.json"
SHARED_FILE = "counterstain.json"  # what an export knows of its checkpoint
SCHEDULER_FILE = "scheduler/scheduler_config.json"
FIRST_STAGE_FOLDERS = ("vae", "vqvae")
CLASSES = {"kl": AutoencoderKL, "vq": VQModel, "linear": pipeline.LinearAutoencoder}
# Of first stages and denoisers: what says nothing about the network.
NO_MATTER = {"sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"}
NO_MATTER |= {"num_train_timesteps", "num_class_embeds", "dropout"}
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
FETCHED = [
    f"{folder}{name}"
    for folder in ("", "unet/", "vae/", "vqvae/", "scheduler/", "style/")
    for name in ("*.json", WEIGHTS_FILE)
]
State = dict[str, Tensor]


def located(source: Path) -> Path:
    """Return where a source of weights lies on this machine: a file, or a folder of diffusers.

    The files of a repository of the Hub (OWNER/NAME) are fetched; a network's file beside its ``config.json`` stands
    for their folder. Raises InputError where there is no such source.
    """
    if is_repo(source):
        source = fetched(str(source), FETCHED)
    elif source.name == WEIGHTS_FILE and (source.parent / CONFIG_FILE).is_file():
        source = source.parent
    if source.is_dir() and not any((source / name).is_file() for name in (INDEX_FILE, CONFIG_FILE)):
        raise InputError(f"{source}: no folder of diffusers, which has {INDEX_FILE} or {CONFIG_FILE}")
    if not source.exists():
        raise InputError(f"{source}: no such weights file, folder of diffusers or repository of the Hub (OWNER/NAME)")
    return source


def hashes(source: Path) -> dict[str, str]:
    """Return the hash of each file of weights of a located source, by its name."""
    files = sorted(source.rglob(WEIGHTS_FILE)) if source.is_dir() else [source]
    return {str(file.relative_to(source)) if source.is_dir() else file.name: sha256_of(file) for file in files}


def write_pipeline(checkpoint: Path, out: Path) -> None:
    """Write the networks of a diffusion checkpoint, scheduler and pipeline into the folder ``out``."""
    generator = DiffusionGenerator.load(checkpoint)
    model, header = generator.model.cpu(), generator.header
    assert header is not None
    config, first_stage = model.config, model.first_stage.network
    index: dict[str, Any] = {
        "_class_name": ["pipeline", pipeline.MaskToTissuePipeline.__name__],
        "_diffusers_version": diffusers.__version__,
        "drawing": _drawing(model, header),
        "style": [None, None],
    }
    parts: dict[str, Any] = {"unet": model.unet, "vae": first_stage} | ({"style": model.style} if model.style else {})
    if isinstance(first_stage, AutoencoderKL):  # as other pipelines read it: latents are normalised by these two
        scaled = {"latents_mean": model.latent_mean.tolist(), "latents_std": model.latent_sd.tolist()}
        first_stage.register_to_config(scaling_factor=1.0, **scaled)
    code = Path(pipeline.__file__).read_bytes()
    (out / "pipeline.py").write_bytes(code)
    for name, network in parts.items():
        network.save_pretrained(out / name)
        ours = type(network).__module__ == pipeline.__name__
        index[name] = ["pipeline" if ours else "diffusers", type(network).__name__]
        if ours:
            (out / name / "pipeline.py").write_bytes(code)
    scheduler = build_scheduler(config.noise, config.sampler)
    kind = type(scheduler).__name__.replace(pipeline.Ddim.__name__, "DDIMScheduler")
    index["scheduler"] = ["diffusers", kind]
    settings = scheduler.to_json_string().replace(f'"{type(scheduler).__name__}"', f'"{kind}"')
    write_text(out / SCHEDULER_FILE, settings)
    write_json(out / INDEX_FILE, index)


def _drawing(model: Diffusion, header: CheckpointHeader) -> dict[str, Any]:
    """Return what the pipeline must know beside its networks, as plain values."""
    config, sampler = model.config, model.config.sampler
    return {
        "labels": ["background", *header.taxonomy.names],
        "size_px": header.size_px,
        "mpp": header.mpp,
        "condition": config.condition,
        "latent_mean": model.latent_mean.tolist(),
        "latent_sd": model.latent_sd.tolist(),
        "steps": sampler.steps,
        "power": spacing(sampler),
        "eta": sampler.eta,
        "guidance": sampler.guidance,
        "guidance_interval": list(sampler.guidance_interval),
        "nuclei": None if config.counterstain is None else nuclei_settings(config.counterstain),
        "surroundings": bool(config.context_share),
    }


def read_pipeline(folder: Path, header: CheckpointHeader) -> State:
    """Return the weights of an export as those of the checkpoint that ``header`` describes.

    Raises InputError where a part is missing, MismatchError where one is of another network.
    """
    config = build(DiffusionConfig, header.config, folder)
    stage = build(AutoencoderConfig, header.notes.get("first_stage", {}), folder)
    networks = {"unet": UNet2DModel, "first_stage.network": CLASSES[stage.kind]}
    networks |= {"style": pipeline.StyleNetwork} if config.style else {}
    folders = {"first_stage.network": _first_stage_folder(folder)}
    state: State = {}
    for name, kind in networks.items():
        weights = opened(folders.get(name, folder / name), kind).state_dict()
        state |= {f"{name}.{key}": value for key, value in weights.items()}
    drawing = _json(folder / INDEX_FILE).get("drawing") or {}
    state |= {name: torch.tensor(drawing.get(name, [])) for name in ("latent_mean", "latent_sd")}
    return state


def first_stage(folder: Path, config: AutoencoderConfig) -> tuple[AutoencoderConfig, State, State]:
    """Return the first stage in a folder of diffusers: its settings, its weights, mean and deviation of its latents.

    ``config`` says what its training would need; sizes are the folder's. Mean and deviation, (z,) each, are those by
    which other pipelines normalise its latents (``scaling_factor``, ``shift_factor``, ``latents_mean``,
    ``latents_std``). Raises InputError where there is none, MismatchError where it is none of ours.
    """
    place = _first_stage_folder(folder)
    name = str(_json(place / CONFIG_FILE).get("_class_name"))
    kind = next((kind for kind, known in CLASSES.items() if known.__name__ == name), None)
    if kind is None:
        raise MismatchError(f"{place}: holds {name}; expected AutoencoderKL or VQModel")
    network = opened(place, CLASSES[kind])
    settings = network.config
    found: dict[str, Any] = {"kind": kind, "latent_channels": settings.latent_channels}
    if kind == "linear":
        found["factor"] = settings.factor
    else:
        widths = list(settings.block_out_channels)
        found |= {"factor": 2 ** (len(widths) - 1), "channels": widths[0], "blocks": settings.layers_per_block}
        found |= {"multipliers": [width // widths[0] for width in widths]}
        found |= {"attention": settings.mid_block_add_attention}
        found |= {"codebook_size": settings.num_vq_embeddings} if kind == "vq" else {}
        found |= {"plain_latents": not settings.use_quant_conv} if kind == "kl" else {}
    fitted = _fitted(config, found, place)
    with torch.device("meta"):
        _require_same(build_network(fitted), network, place)
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    return fitted, state, _normalisation(settings, fitted.latent_channels)


def _normalisation(settings: Mapping[str, Any], channels: int) -> State:
    scale, shift = settings.get("scaling_factor") or 1.0, settings.get("shift_factor") or 0.0
    mean, sd = settings.get("latents_mean") or [shift] * channels, settings.get("latents_std") or [1.0] * channels
    return {"latent_mean": torch.tensor(mean), "latent_sd": torch.tensor(sd) / scale}


def denoiser(folder: Path, config: DiffusionConfig, latents: int, labels: int) -> tuple[DiffusionConfig, State]:
    """Return the denoiser in a pipeline's folder: its settings, its weights.

    It must be a ``UNet2DModel`` that takes ``latents`` channels and then a channel for each of ``labels``.
    """
    network = opened(folder / "unet", UNet2DModel)
    settings, scheduler = network.config, _json(folder / SCHEDULER_FILE)
    widths = list(settings.block_out_channels)
    if scheduler.get("trained_betas"):
        raise MismatchError(f"{folder}: its noise is given step by step (trained_betas), which ours cannot be")
    found = {
        "channels": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "blocks": settings.layers_per_block,
        "attention_scales": sum("Attn" in kind for kind in settings.down_block_types),
        "heads": max(1, widths[-1] // (settings.attention_head_dim or widths[-1])),
        "noise": {
            "timesteps": scheduler.get("num_train_timesteps", 1000),
            "beta_start": scheduler.get("beta_start", 0.0001),
            "beta_end": scheduler.get("beta_end", 0.02),
            "schedule": scheduler.get("beta_schedule", "linear"),
            "prediction": scheduler.get("prediction_type", "epsilon"),
            "zero_terminal_snr": scheduler.get("rescale_betas_zero_snr", False),
        },
    }
    fitted = _fitted(config, found, folder)
    with torch.device("meta"):
        _require_same(build_denoiser(fitted, latents, labels), network, folder / "unet")
    return fitted, {f"unet.{key}": value for key, value in network.state_dict().items()}


def _first_stage_folder(folder: Path) -> Path:
    """Return where the first stage lies: in a pipeline's folder, or the folder itself."""
    found = [folder / name for name in FIRST_STAGE_FOLDERS if (folder / name / CONFIG_FILE).is_file()]
    if not found and not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{folder}: holds no first stage ({' or '.join(FIRST_STAGE_FOLDERS)}, with {CONFIG_FILE})")
    return found[0] if found else folder


def opened(folder: Path, kind: Any) -> Any:
    """Open a network as diffusers saved it, on the CPU in single precision; no code of the folder is run.

    Raises InputError where it cannot be opened, or not all weights are there.
    """
    options = {"low_cpu_mem_usage": False, "output_loading_info": True, "local_files_only": True}
    try:
        network, report = kind.from_pretrained(folder, use_safetensors=True, torch_dtype=torch.float32, **options)
    except Exception as error:  # whatever diffusers, or what it reads with, raises
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{folder}: cannot be opened as {kind.__name__} ({reason})") from error
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[fault])):
            raise InputError(f"{folder}: {fault.replace('_keys', '')} weights of {kind.__name__}: {names[0]} …")
    return network.eval()


def _json(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a JSON object")
    return content


def _fitted(config: Any, found: Mapping[str, Any], source: Path) -> Any:
    return build(type(config), config.model_dump(mode="json") | dict(found), str(source))


def _require_same(ours: Any, theirs: Any, source: Path) -> None:
    """Raise MismatchError where two networks of one class differ in a setting that matters."""
    plain, given = ({name: _plain(value) for name, value in network.config.items()} for network in (ours, theirs))
    for name in sorted(plain.keys() - NO_MATTER):
        default = name == "vq_embed_dim" and given[name] is None  # as many as there are latent channels
        if not name.startswith("_") and plain[name] != given.get(name) and not default:
            raise MismatchError(f"{source}: {name} is {given.get(name)}; ours would have {plain[name]}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
