"""Models to share: exports of checkpoints for other tools, each with a model card, and repositories of the Hub.

No name of a patient leaves unless the user asks for it: a header that is shared holds pseudonyms
(:mod:`counterstain.data.pseudonyms`), by which its owner's check for leaks still works.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from counterstain.checkpoints import (
    HEADER_FILE,
    WEIGHTS_FILE,
    CheckpointHeader,
    is_finished,
    load_checkpoint,
    read_header,
    rebuilt,
    save_checkpoint,
    write_header,
)
from counterstain.config import build, build_stored
from counterstain.data import patch_set
from counterstain.data.patch_set import PatchSet
from counterstain.data.pseudonyms import pseudonyms
from counterstain.data.review import REVIEW_FILE
from counterstain.data.split import PATIENTS_SEEN_FILE, patient_key
from counterstain.errors import ConfigError, InputError, MismatchError
from counterstain.generators import published_diffusers
from counterstain.generators import published_layouts as layouts
from counterstain.generators.autoencoder import Autoencoder
from counterstain.generators.diffusion import Diffusion
from counterstain.generators.diffusion_config import AutoencoderConfig, DiffusionConfig
from counterstain.generators.methods import METHODS
from counterstain.generators.published_diffusers import SHARED_FILE
from counterstain.generators.published_layouts import State, to_published
from counterstain.generators.published_weights import with_prefix, without_prefix
from counterstain.hub import RepoType, fetched, push_folder
from counterstain.io.export_contents import contents_of
from counterstain.io.export_datasets import dataset_card
from counterstain.recipe import drawing_command, training_command
from counterstain.segmentation.model import IMAGENET_MEAN, IMAGENET_SD, load_segmenter
from counterstain.segmentation.predict import classes_of
from counterstain.storage import claim, committing, read_sealed, replacing, write_sealed, write_text

CARD_FILE = "README.md"
STAY = (REVIEW_FILE, "releases.jsonl", "trace")  # in a set: what names people and places
SHORT_NAME = 3  # patients with shorter names are found only as whole strings
LDM_FILE = "model.ckpt"  # what CompVis' code looks for
CARD = """\
---
library_name: {library}
tags:
- histopathology
- counterstain
license: other
license_name: to-be-filled-in
---
# {title}

| | |
|---|---|
| cohort | {cohort} |
| patients seen | {patients} |
| subtypes | {subtypes} |
| training patches | {size_px} px at {mpp:g} micrometres per pixel |
| weights | sha256 {digest} |
| made with | counterstain {version} |
| licence | **fill in**: who may use this, and for what |

{use}

## Recipe
{recipe}

Not for diagnosis. Patients are listed in no file by name; those who hold the key of the pseudonyms can check whether a
patient of theirs was seen.
"""
SET_USE = "`counterstain pull OWNER/NAME --out SET`, then SET is a synthetic set as any other."
USE_DIFFUSERS = """\
## Draw
```python
import numpy as np
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER or OWNER/NAME", trust_remote_code=True)  # runs its pipeline.py
mask = np.zeros(({size_px}, {size_px}), np.uint8)  # {labels}
mask[{quarter}:-{quarter}, {quarter}:-{quarter}] = 1
pipeline(mask).images[0].save("drawn.png")
```
{more}
Masks of other sizes are drawn in one piece. counterstain draws large ones in windows and inpaints as well:
`counterstain import weights FOLDER --kind diffusion --out CHECKPOINT`."""
USE_SMP = """\
## Segment
```python
import segmentation_models_pytorch as smp
import torch

network = smp.from_pretrained("FOLDER or OWNER/NAME").eval()
image = torch.rand(1, 3, {size_px}, {size_px})  # RGB, 0 to 1, at {mpp:g} micrometres per pixel
mean, sd = (torch.tensor(values)[:, None, None] for values in ({mean}, {sd}))
probability = network((image - mean) / sd).softmax(1)  # {outputs}
tumour = {tumour}
```
Images must be normalised as above; the outputs are logits."""
USE_COUNTERSTAIN = """\
## Use
`counterstain pull OWNER/NAME --out FOLDER`, then FOLDER is a checkpoint of kind {kind} as any other."""


# Exports of checkpoints


def export_checkpoint(folder: Path, out: Path, form: str) -> list[Path]:
    """Write a checkpoint for another tool and return the files: ``weights``, ``diffusers`` or ``smp``.

    Raises MismatchError where the tool has no such networks, or ``out`` holds something else.
    """
    if form == "weights":
        return export_weights(folder, out)
    writers: dict[str, tuple[str, Callable[[Path, CheckpointHeader, Path], None]]] = {
        "diffusers": ("diffusion", _write_diffusers),
        "smp": ("segmenter", _write_smp),
    }
    header, (kind, write) = read_header(folder), writers[form]
    if header.kind != kind:
        raise MismatchError(f"{folder}: is a {header.kind}; --format {form} takes a {kind}")
    if out.exists() and any(out.iterdir()):
        if (out / SHARED_FILE).is_file() and read_sealed(out / SHARED_FILE).get("sha256") == header.sha256:
            return sorted(file for file in out.rglob("*") if file.is_file())
        raise MismatchError(f"{out}: holds something else already; give another output folder")
    with committing(out) as partial:
        write(folder, header, partial)
        write_sealed(partial / SHARED_FILE, shared(header, folder).model_dump(mode="json"))
    return sorted(file for file in out.rglob("*") if file.is_file())


def _write_diffusers(folder: Path, header: CheckpointHeader, out: Path) -> None:
    published_diffusers.write_pipeline(folder, out)
    labels = ", ".join(f"{number} = {name}" for number, name in enumerate(["background", *header.taxonomy.names]))
    more = ""
    if header.config.get("counterstain"):
        more += "`pipeline(masks, images=IMAGES)` keeps the nuclei of real images (H, W, 3) uint8.\n"
    if header.config.get("style"):
        more += "`pipeline(masks, references=[(IMAGE, MASK), …])` draws in the style of reference patches.\n"
    use = USE_DIFFUSERS.format(size_px=header.size_px, quarter=header.size_px // 4, labels=labels, more=more)
    write_text(out / CARD_FILE, card(header, use, "diffusers"))


def _write_smp(folder: Path, header: CheckpointHeader, out: Path) -> None:
    network: Any = load_segmenter(folder)[0].network.to(memory_format=torch.contiguous_format)
    names = ("background", *classes_of(header))
    told = {
        "mean": IMAGENET_MEAN, "sd": IMAGENET_SD, "size_px": header.size_px, "mpp": header.mpp,
        "outputs": ", ".join(f"{number} = {name}" for number, name in enumerate(names)),
        "tumour": "probability[:, 1]" if len(names) == 2 else "1 - probability[:, 0]",
    }  # fmt: skip
    write_text(out / CARD_FILE, card(header, USE_SMP.format(**told), "segmentation-models-pytorch"))
    network.save_pretrained(out)


def card(header: CheckpointHeader, use: str, library: str) -> str:
    """Return the model card of a checkpoint; what only its owner knows is to be filled in."""
    name = header.notes.get("cohort_name", "**fill in**")
    return CARD.format(
        library=library,
        title=f"{header.kind.capitalize()} of {', '.join(header.taxonomy.names)}",
        cohort=f"{name} (fingerprint {header.cohort[:16]})",
        patients=len(header.patients_seen),
        subtypes=", ".join(header.taxonomy.names),
        size_px=header.size_px,
        mpp=header.mpp,
        digest=header.sha256,
        version=header.version,
        use=use,
        recipe=training_command(header.model_copy(update={"config": _without_folders(header.config)})),
    )


def shared(header: CheckpointHeader, source: Path) -> CheckpointHeader:
    """Return a header to share: with pseudonyms of the patients, and of paths the last part alone.

    Raises MismatchError where a patient's name stands elsewhere in it.
    """
    hidden = pseudonyms(patient_key(name) for name in header.patients_seen)
    plain = _without_folders(header.model_dump(mode="json")) | {"patients_seen": hidden}
    _refuse_names(source, header.patients_seen, [plain["config"], plain["notes"]])
    return build(CheckpointHeader, plain, source)


def _refuse_names(source: Path, patients: Iterable[str], told: Any) -> None:
    text = json.dumps(told, ensure_ascii=False).casefold()
    for name in patients:
        pattern = re.escape(name.casefold())
        pattern = f'"{pattern}"' if len(name) < SHORT_NAME else rf"(?<![^\W_]){pattern}(?![^\W_])"  # no part of a word
        if not name.startswith("pseudonym:") and re.search(pattern, text):
            raise MismatchError(f"{source}: names patient {name} beside patients_seen; it cannot be shared as it is")


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


def exported(folder: Path) -> bool:
    """Whether a folder is an export of a diffusion checkpoint, which tells all about itself."""
    return folder.is_dir() and all((folder / name).is_file() for name in (SHARED_FILE, published_diffusers.INDEX_FILE))


def import_exported(folder: Path, out: Path, kind: str) -> CheckpointHeader:
    """Make a checkpoint of an export: of the whole, or (``autoencoder``) of its first stage; once."""
    header = build(CheckpointHeader, read_sealed(folder / SHARED_FILE), folder / SHARED_FILE)
    if kind not in {"diffusion", "autoencoder"}:
        raise MismatchError(f"{folder}: is a {header.kind}, not a {kind}; give --kind diffusion or autoencoder")
    identity = {"kind": kind, "files": published_diffusers.hashes(folder)}
    if is_finished(out):
        claim(out, "import weights", identity)
        return read_header(out)
    state = published_diffusers.read_pipeline(folder, header)
    stage = build(AutoencoderConfig, header.notes["first_stage"], folder).for_use()
    config, labels = build(DiffusionConfig, header.config, folder), header.taxonomy.num_labels
    first_stage = without_prefix(state, "first_stage.")
    rest = {name: value for name, value in state.items() if name not in with_prefix(first_stage, "first_stage.")}
    rebuilt(lambda: Diffusion(config, Autoencoder(stage, header.size_px), labels), rest, folder)
    claim(out, "import weights", identity)  # of an export that is whole
    if kind == "autoencoder":
        settings = stage.model_dump(mode="json")
        return save_checkpoint(out, first_stage, header.model_copy(update={"kind": kind, "config": settings}))
    return save_checkpoint(out, state, header)


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
        parts = {name: without_prefix(state, f"{part}.") for part, name in layouts.SPADE_FILES.items()}
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
    stage = _published_first_stage(without_prefix(state, "first_stage."), header.notes["first_stage"], source)
    ours = without_prefix(state, "unet.")
    denoiser = to_published(layouts.denoiser_layout(ours, build_stored(DiffusionConfig, header.config, source)), ours)
    mean, sd = state["latent_mean"], state["latent_sd"]
    if mean.abs().max() > 0 or not torch.allclose(sd, sd[:1].expand_as(sd)):
        raise MismatchError(
            f"{source}: normalises latents by more than one factor; train with diffusion.normalise_latents=none to "
            "export it"
        )
    parts = with_prefix(stage, layouts.FIRST_STAGE_PREFIX) | with_prefix(denoiser, layouts.DENOISER_PREFIX)
    return parts | {"scale_factor": 1 / sd[0]}


def _refuse_inputs(header: CheckpointHeader, names: tuple[str, ...], source: str) -> None:
    """Refuse networks that are shown more than labels: their input channels would be taken for labels."""
    for name in names:
        if header.config.get(name):
            raise MismatchError(f"{source}: was trained with {name}, which published networks lack; train without it")


# The Hub


def push(source: Path, repo: str, *, public: bool, patient_ids: bool, real_tissue: bool) -> str:
    """Push a checkpoint, an export or a synthetic set to a repository of the Hub and return its address.

    It is private unless ``public``. Raises ConfigError where it holds names of patients, or pixels of real tissue, and
    the user does not say that they may leave; InputError where ``source`` is nothing of this kind.
    """
    kind: RepoType = "model"
    with tempfile.TemporaryDirectory() as name:
        staged = Path(name) / "staged"
        if is_finished(source):
            _stage_checkpoint(source, staged, patient_ids=patient_ids)
        elif (source / patch_set.HEADER_FILE).is_file():
            kind = "dataset"
            _stage_set(PatchSet.open(source), staged, patient_ids=patient_ids, real_tissue=real_tissue)
        elif (source / SHARED_FILE).is_file():
            if (source / PATIENTS_SEEN_FILE).exists() and not patient_ids:
                raise ConfigError(
                    f"{source / PATIENTS_SEEN_FILE}: names patients; remove it, or give --with-patient-ids"
                )
            shutil.copytree(source, staged, ignore=shutil.ignore_patterns(".*"))
        else:
            raise InputError(f"{source}: no checkpoint, synthetic set or export (--format diffusers or smp) to push")
        return push_folder(staged, repo, kind=kind, public=public)


def _stage_checkpoint(source: Path, staged: Path, *, patient_ids: bool) -> None:
    header = read_header(source)
    load_checkpoint(source, header.kind)  # whole and undamaged
    staged.mkdir()
    shutil.copyfile(source / WEIGHTS_FILE, staged / WEIGHTS_FILE)
    write_header(staged, header if patient_ids else shared(header, source))
    use = USE_COUNTERSTAIN.format(kind=header.kind)
    write_text(staged / CARD_FILE, card(header, use, "counterstain"))


def _stage_set(found: PatchSet, staged: Path, *, patient_ids: bool, real_tissue: bool) -> None:
    header, method = found.header, METHODS.get(found.header.method)
    if not real_tissue and (method is None or method.inpaints):
        raise ConfigError(
            f"{found.folder}: around redrawn instances its images are real tissue; give --with-real-tissue if that "
            "may leave"
        )
    shutil.copytree(found.folder, staged, ignore=shutil.ignore_patterns(".*", "run.json", *STAY))
    if not patient_ids:
        plain = _without_folders(header.settings)
        _refuse_names(found.folder, {*header.patients_seen, *found.patients}, plain)
        seen = tuple(pseudonyms(map(patient_key, header.patients_seen)))
        hidden = header.model_copy(update={"patients_seen": seen, "settings": plain})
        patch_set.rename(staged, hidden, _pseudonym_of)
    write_text(
        staged / CARD_FILE,
        dataset_card(replace(contents_of(staged), source=found.folder), use=SET_USE, recipe=drawing_command(header)),
    )


@lru_cache(maxsize=2**16)
def _pseudonym_of(what: str, name: str) -> str:
    return pseudonyms([patient_key(name) if what == "patient" else f"{what} {name}"])[0]


def pull(repo: str, out: Path) -> str:
    """Fetch a repository of the Hub into the new folder ``out``, check it, and say what it is; files with code stay."""
    if out.exists():
        raise InputError(f"{out}: exists already; give another output folder")
    with committing(out) as partial:
        fetched(repo, kinds=("model", "dataset"), into=partial)
        shutil.rmtree(partial / ".cache", ignore_errors=True)  # the client's own
        if (partial / HEADER_FILE).exists():
            header = read_header(partial)
            load_checkpoint(partial, header.kind)
            names = ", ".join(header.taxonomy.names)
            return f"{out}: {header.kind} of {names}, {header.size_px} px at {header.mpp:g} um/px"
        if (partial / patch_set.HEADER_FILE).exists():
            found = PatchSet.open(partial)
            return f"{out}: {len(found)} synthetic patches ({found.header.method})"
        if exported(partial):
            return f"{out}: a folder of diffusers; next: counterstain import weights {out} --kind diffusion --out DIR"
        if (partial / SHARED_FILE).is_file() and read_sealed(partial / SHARED_FILE).get("kind") == "segmenter":
            return f"{out}: a folder of segmentation_models_pytorch; its card says how it is opened"
        raise InputError(f"{repo}: holds nothing of counterstain; to fetch other files, use 'hf download {repo}'")
