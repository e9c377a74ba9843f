"""Shared models: weights of others, and checkpoints to and from the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from counterstain.api import PathLike, Settings, open_cohort, recipe_of, verb
from counterstain.errors import ConfigError, InputError

if TYPE_CHECKING:
    from counterstain.checkpoints import CheckpointHeader
    from counterstain.data.cohort import Cohort
    from counterstain.data.patch_set import PatchSet
    from counterstain.generators.published_weights import Facts

KINDS = ("spade", "autoencoder", "diffusion")


@verb
def import_weights(
    files: Sequence[PathLike],
    *,
    kind: str,
    out: PathLike,
    size_px: int | None = None,
    patients_seen: str | None = None,
    taxonomy: str | None = None,
    cohort: PathLike | Cohort | None = None,
    mpp: float | None = None,
    autoencoder: PathLike | None = None,
    averaged: bool = False,
    head_channels: int | None = None,
    scale_factor: float | None = None,
    preset: str = "paper",
    config: PathLike | None = None,
    settings: Settings | None = None,
) -> CheckpointHeader:
    """Make a checkpoint from weights that others published; sizes of the networks are read off the weights.

    An export for diffusers tells all about itself, and needs kind and out alone.

    Parameters
    ----------
    files : sequence of str or Path
        latest_net_G.pth and _E, _D; one model.ckpt; a folder of diffusers, or OWNER/NAME of one on the Hub.
    kind : str
        spade (of NVlabs), autoencoder or diffusion (of CompVis or diffusers).
    out : str or Path
        Folder of the checkpoint.
    size_px : int, optional
        Edge of the training patches in pixels.
    patients_seen : str, optional
        none, or a file with one patient per line: whose tissue the weights were trained on. Synthetic images drawn with
        them are refused where one of these patients is in validation or test.
    taxonomy : str, optional
        her2 or a YAML file: the labels, in order.
    cohort : str, Path or Cohort, optional
        Cohort to take taxonomy and mpp from.
    mpp : float, optional
        Micrometres per pixel of the training images.
    autoencoder : str or Path, optional
        diffusion: checkpoint of the first stage, where the files hold none.
    averaged : bool
        diffusion: take the moving average of the weights.
    head_channels : int, optional
        diffusion: num_head_channels of their config, which attention at several scales needs.
    scale_factor : float, optional
        diffusion: scale_factor of their config, where the file holds none.
    preset : str
        Recipe for what weights do not tell: heads, noise, sampler.
    config, settings
        As for :func:`train`.
    """
    from counterstain import sharing
    from counterstain.generators import published_weights
    from counterstain.generators.published_diffusers import located

    if kind not in KINDS:
        raise ConfigError(f"--kind {kind}: expected one of {', '.join(KINDS)}")
    if kind != "diffusion" and (averaged or (autoencoder, head_channels, scale_factor) != (None, None, None)):
        raise ConfigError(f"--kind {kind}: takes no --autoencoder, --averaged, --head-channels or --scale-factor")
    places = [located(Path(file)) for file in files]
    if len(places) == 1 and sharing.exported(places[0]):
        if config is not None or settings or any((size_px, patients_seen, taxonomy, cohort, mpp)):
            raise ConfigError(f"{files[0]}: tells all about itself; give --kind and --out alone")
        return sharing.import_exported(places[0], Path(out), kind)
    recipe, opened = recipe_of(preset, config, settings), None if cohort is None else open_cohort(cohort)
    facts = _facts(taxonomy, opened, mpp, size_px, patients_seen)
    facts = replace(facts, head_channels=head_channels, scale_factor=scale_factor)
    return published_weights.import_weights(
        places,
        Path(out),
        getattr(recipe, kind),
        facts,
        first_stage=recipe.autoencoder,
        autoencoder=None if autoencoder is None else Path(autoencoder),
        averaged=averaged,
    )


def _facts(
    taxonomy: str | None, cohort: Cohort | None, mpp: float | None, size_px: int | None, patients_seen: str | None
) -> Facts:
    from counterstain.data.split import NOBODY, read_patients_seen
    from counterstain.generators.published_weights import Facts
    from counterstain.taxonomy import Taxonomy

    if taxonomy is None and cohort is None:
        raise ConfigError("the labels of the network are not known: give --taxonomy or --cohort")
    spacing = mpp if mpp is not None or cohort is None else cohort.mpp
    if spacing is None or not 0.01 <= spacing <= 100:
        raise ConfigError(f"--mpp {spacing}: give the micrometres per pixel of the training (0.01 to 100), or --cohort")
    if patients_seen is None:
        raise ConfigError(f"--patients-seen: whose tissue were they trained on? Give {NOBODY} or a file with the names")
    if size_px is None or not 1 <= size_px <= 65_536:
        raise ConfigError(f"--size-px {size_px}: expected the edge of the training patches in pixels")
    try:
        seen = () if patients_seen == NOBODY else read_patients_seen(Path(patients_seen))
    except InputError as error:
        raise InputError(f"--patients-seen {error}; say {NOBODY} if nobody of yours was seen") from error
    labels = cohort.taxonomy if taxonomy is None and cohort is not None else Taxonomy.load(str(taxonomy))
    return Facts(taxonomy=labels, mpp=spacing, size_px=size_px, patients_seen=seen)


@verb
def push(
    source: PathLike,
    repo_id: str,
    *,
    public: bool = False,
    with_patient_ids: bool = False,
    with_real_tissue: bool = False,
) -> str:
    """Push a checkpoint, an export of one or a synthetic set to the Hugging Face Hub; private unless --public.

    Names of patients are replaced by pseudonyms whose key stays with you. The token comes from HF_TOKEN.

    Parameters
    ----------
    source : str or Path
        A checkpoint, its export for diffusers or smp, or a synthetic set.
    repo_id : str
        OWNER/NAME.
    public : bool
        Let everybody see it.
    with_patient_ids : bool
        Push what names patients, such as the tables of a synthetic set.
    with_real_tissue : bool
        Push images that are real tissue in part, such as inpainted ones.

    Returns
    -------
    str
        Address of the repository.
    """
    from counterstain.sharing import push as send

    return send(Path(source), repo_id, public=public, patient_ids=with_patient_ids, real_tissue=with_real_tissue)


@verb
def release(
    patches: PathLike | PatchSet,
    *,
    out: PathLike,
    trace: PathLike | None = None,
    untraced: bool = False,
    with_real_tissue: bool = False,
    with_alarm: bool = False,
) -> Path:
    """Write what of a synthetic set may leave the hospital: images, masks, a card, and nothing that leads back.

    The set must have been traced. In the set, releases.jsonl keeps which image is which patch.

    Parameters
    ----------
    patches : str, Path or PatchSet
        Folder of the synthetic set.
    out : str or Path
        New folder of the release; its name is the title of the card.
    trace : str or Path, optional
        Folder of its trace [default: SET/trace].
    untraced : bool
        Release a set that was not traced; the card says so.
    with_real_tissue : bool
        Release images that are real tissue in part (inpainting, kept nuclei); the card says so.
    with_alarm : bool
        Release a set whose trace raised an alarm about its images; the card says so.

    Returns
    -------
    Path
        The folder.
    """
    from counterstain.data.patch_set import PatchSet
    from counterstain.progress import bar
    from counterstain.release import release as write

    opened = patches if isinstance(patches, PatchSet) else PatchSet.open(patches)
    with bar("images", len(opened)) as advance:
        choices = {"untraced": untraced, "with_real_tissue": with_real_tissue, "with_alarm": with_alarm}
        place = None if trace is None else Path(trace)
        write(opened, Path(out), trace_folder=place, advance=advance, **choices)
    return Path(out)


@verb
def pull(repo_id: str, *, out: PathLike) -> str:
    """Fetch a checkpoint, an export or a synthetic set from the Hugging Face Hub; no code is fetched.

    Parameters
    ----------
    repo_id : str
        OWNER/NAME.
    out : str or Path
        New folder for it.

    Returns
    -------
    str
        What it is.
    """
    from counterstain.sharing import pull as fetch

    return fetch(repo_id, Path(out))
