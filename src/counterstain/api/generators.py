"""Generators: train one, draw with it, look at what it draws."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from counterstain.api import PathLike, Settings, assignments, open_cohort, recipe_of, verb
from counterstain.errors import ConfigError, CounterstainWarning

if TYPE_CHECKING:
    from counterstain.data.cohort import Cohort
    from counterstain.data.patch_set import PatchSet
    from counterstain.generators.interface import ImageGenerator
    from counterstain.recipe import Recipe
    from counterstain.synthesis.masks import SynthesisConfig
    from counterstain.synthesis.redraw import Redrawn


@verb
def train(
    network: str,
    cohort: PathLike | Cohort,
    *,
    out: PathLike,
    autoencoder: PathLike | None = None,
    teacher: PathLike | None = None,
    init: PathLike | None = None,
    preset: str | None = "best",
    config: PathLike | None = None,
    settings: Settings | None = None,
    seed: int = 0,
    logger: str | None = None,
) -> Path:
    """Train a generator, or the judge of generated images, on the training part of a cohort.

    If interrupted, the same command continues; a finished checkpoint is left as it is.

    Parameters
    ----------
    network : str
        spade (SPADE with its VAE), autoencoder (the first stage of latent diffusion), diffusion (latent diffusion, for
        whole images and for inpainting), distilled (a diffusion network that draws in a few steps), judge (says which
        subtype tissue looks like), or a network of another package's method.
    cohort : str, Path or Cohort
        A cohort with a split.
    out : str or Path
        Folder of the checkpoint.
    autoencoder : str or Path, optional
        diffusion: checkpoint of 'train autoencoder'.
    teacher : str or Path, optional
        distilled: checkpoint of 'train diffusion'.
    init : str or Path, optional
        Checkpoint whose weights the training starts from.
    preset : str, optional
        Recipe to start from: paper, best or demo.
    config : str or Path, optional
        YAML with changes to the preset.
    settings : mapping or sequence of str, optional
        A change over both, such as spade.latent=64 or segmenter.training.steps=500.
    seed : int
        Another number makes other random choices.
    logger : str, optional
        Send curves to mlflow or wandb as well; TensorBoard and CSV are always written.
    """
    from counterstain.checkpoints import read_header
    from counterstain.data.stains import check_stains, named_stains
    from counterstain.generators.methods import METHODS

    opened, out = open_cohort(cohort), Path(out)
    recipe = recipe_of(preset, config, settings, logger)
    check_stains(opened, named_stains(recipe.model_dump(mode="json", include={network})))
    inputs = {"autoencoder": autoencoder, "teacher": teacher, "init": init}
    given = {name: Path(path) for name, path in inputs.items() if path is not None}
    if network == "judge":
        from counterstain.audit.judge import train_judge

        _require_inputs(network, given, needs=(), may=())
        train_judge(opened, recipe.judge, out, size_px=recipe.size_px, seed=seed)
    elif network == "distilled":
        from counterstain.generators.train import train_distilled

        _require_inputs(network, given, needs=("teacher",), may=())
        if recipe.distillation is None:
            raise ConfigError("distillation: null; give its settings, for example --set distillation.steps=4")
        train_distilled(opened, recipe.distillation, out, teacher=given["teacher"], seed=seed)
    else:
        trainings = METHODS.trainings
        if network not in trainings:
            raise ConfigError(f"train {network}: expected one of {', '.join((*trainings, 'distilled', 'judge'))}")
        training = trainings[network]
        _require_inputs(network, given, needs=training.needs, may=("init",))
        training.train(opened, recipe.settings_of(training), out, size_px=recipe.size_px, seed=seed, **given)
    for warning in read_header(out).notes.get("warnings", ()):
        warnings.warn(warning, CounterstainWarning, stacklevel=3)
    return out


def _require_inputs(network: str, given: dict[str, Path], *, needs: Sequence[str], may: Sequence[str]) -> None:
    for name in needs:
        if name not in given:
            made_by = {"teacher": "diffusion"}.get(name, name)
            raise ConfigError(f"train {network}: give --{name} DIR, made by 'counterstain train {made_by}'")
    for name in sorted(set(given) - {*needs, *may}):
        raise ConfigError(f"train {network}: takes no --{name}")


@verb
def synthesize(
    cohort: PathLike | Cohort,
    *,
    out: PathLike,
    method: str,
    count: int,
    generator: PathLike | None = None,
    size_px: int | None = None,
    judge: PathLike | None = None,
    agreement: float = 0.75,
    novel: bool = False,
    split: str = "train",
    preset: str | None = None,
    config: PathLike | None = None,
    settings: Settings | None = None,
    seed: int = 0,
) -> PatchSet:
    """Give the instances of real masks new subtypes and draw an image for each new mask.

    If interrupted, the same command continues; finished shards are kept.

    Parameters
    ----------
    cohort : str, Path or Cohort
        A cohort with a split.
    out : str or Path
        Folder of the synthetic set.
    method : str
        How to draw: spade, diffusion, inpainting or oracle (phantoms only).
    count : int
        Patches to draw; a finished set can be given a larger count.
    generator : str or Path, optional
        Checkpoint to draw with; none for the oracle.
    size_px : int, optional
        Edge of the patches; diffusion draws any size [default: as the checkpoint, or the recipe].
    judge : str or Path, optional
        Draw again what this judge takes for another subtype.
    agreement : float
        Share of an image's instances that the judge must agree on.
    novel : bool
        Draw again what is nearer to training tissue than 99 % of real patches are to that of other patients.
    split : str
        train; or val or test, for a reading test: such a set is never trained on.
    preset : str, optional
        Recipe to draw by: paper, best or demo [default: what the checkpoint was trained with].
    config : str or Path, optional
        YAML with changes to the recipe.
    settings : mapping or sequence of str, optional
        A change over both, for example diffusion.sampler.steps=20.
    seed : int
        Another number makes other random choices.
    """
    from counterstain.audit import NOVEL, JudgeFilterConfig
    from counterstain.audit.copies import NoveltyFilter
    from counterstain.audit.judge import JudgeFilter
    from counterstain.config import build
    from counterstain.synthesis.synthesize import Filters
    from counterstain.synthesis.synthesize import synthesize as draw_set

    tissue, drawer, recipe = opened_generator(
        cohort, method, generator, preset=preset, config=config, settings=settings
    )
    _warn_of_unseen(drawer, tissue, recipe.synthesis)
    size_px = recipe.size_px if size_px is None else size_px
    filter_ = nearness = None
    if judge is not None:
        wanted = build(JudgeFilterConfig, {"agreement": agreement}, "--agreement")
        filter_ = JudgeFilter.load(Path(judge), tissue, wanted, size_px=size_px)
    if novel:
        nearness = NoveltyFilter.of(drawer, tissue, size_px, NOVEL)
    filters = Filters.of(filter_, nearness)
    options: Any = {"count": count, "size_px": size_px, "seed": seed, "judge": filters, "part": split}
    found = draw_set(drawer, tissue, Path(out), recipe.synthesis, **options)
    assert found is not None
    return found


@dataclass(frozen=True, repr=False)
class Preview(Sequence["Redrawn"]):
    """Training patches of every subtype, each redrawn as every subtype; a notebook shows the picture of them."""

    rows: tuple[Redrawn, ...]
    picture: Path

    @overload
    def __getitem__(self, index: int) -> Redrawn: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Redrawn, ...]: ...
    def __getitem__(self, index: int | slice) -> Redrawn | tuple[Redrawn, ...]:
        """Return the row of a patch."""
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Preview({self.picture}: {len(self)} patches, each redrawn as {len(self.rows[0].drawn)} subtypes)"

    def _repr_png_(self) -> bytes | None:
        return self.picture.read_bytes() if self.picture.suffix.lower() == ".png" else None

    def _repr_svg_(self) -> str | None:
        return self.picture.read_text(encoding="utf-8") if self.picture.suffix.lower() == ".svg" else None


@verb
def preview(
    cohort: PathLike | Cohort,
    *,
    method: str,
    out: PathLike,
    generator: PathLike | None = None,
    per_subtype: int = 2,
    size_px: int | None = None,
    preset: str | None = None,
    config: PathLike | None = None,
    settings: Settings | None = None,
    seed: int = 0,
) -> Preview:
    """Look at a generator: training patches of every subtype, redrawn as every subtype from the same noise.

    Parameters
    ----------
    out : str or Path
        Picture to write (svg, png or pdf).
    per_subtype : int
        Training patches of each subtype, 1 to 20.
    cohort, method, generator, size_px, preset, config, settings, seed
        As for :func:`synthesize`.
    """
    from counterstain.report.figures import figure_kind, save_figure
    from counterstain.report.patch_figures import redrawn_as_every_subtype
    from counterstain.synthesis.redraw import preview as redrawn

    if not 1 <= per_subtype <= 20:
        raise ConfigError(f"per_subtype {per_subtype}: expected 1 to 20 patches")
    figure_kind(Path(out))
    tissue, drawer, recipe = opened_generator(
        cohort, method, generator, preset=preset, config=config, settings=settings
    )
    _warn_of_unseen(drawer, tissue, recipe.synthesis)
    size_px = recipe.size_px if size_px is None else size_px
    rows = redrawn(drawer, tissue, recipe.synthesis, size_px=size_px, seed=seed, per_subtype=per_subtype)
    save_figure(redrawn_as_every_subtype(rows, tissue.taxonomy, mpp=tissue.mpp), Path(out))
    return Preview(tuple(rows), Path(out))


@verb
def redraw(
    cohort: PathLike | Cohort,
    *,
    out: PathLike,
    method: str,
    generator: PathLike | None = None,
    region: Sequence[str] | None = None,
    preset: str | None = None,
    config: PathLike | None = None,
    settings: Settings | None = None,
    seed: int = 0,
) -> Cohort:
    """Give the instances of whole training regions new subtypes and draw the regions, of any size, as a new cohort.

    If interrupted, the same command continues; finished regions are kept.

    Parameters
    ----------
    out : str or Path
        Folder of the new cohort.
    method : str
        How to draw: diffusion, inpainting or oracle (phantoms only).
    region : sequence of str, optional
        Training regions [default: all].
    cohort, generator, preset, config, settings, seed
        As for :func:`synthesize`.
    """
    from counterstain.synthesis.redraw import redraw_regions

    tissue, drawer, recipe = opened_generator(
        cohort, method, generator, preset=preset, config=config, settings=settings
    )
    _warn_of_unseen(drawer, tissue, recipe.synthesis)
    return redraw_regions(drawer, tissue, Path(out), recipe.synthesis, seed=seed, regions=region or ())


def opened_generator(
    cohort: PathLike | Cohort,
    method: str,
    checkpoint: PathLike | None,
    *,
    preset: str | None,
    config: PathLike | None,
    settings: Settings | None,
) -> tuple[Cohort, ImageGenerator, Recipe]:
    """Open a cohort, a generator and the recipe that it draws by."""
    from counterstain.generators.interface import load_generator as load
    from counterstain.generators.methods import METHODS
    from counterstain.recipe import drawing_recipe

    entry = METHODS.named(method, "--method")
    folder, file = (None if path is None else Path(path) for path in (checkpoint, config))
    recipe = drawing_recipe(entry, folder, preset=preset, file=file, overrides=assignments(settings))
    tissue = open_cohort(cohort)
    return tissue, load(method, folder, tissue, recipe.drawing(entry)), recipe


def _warn_of_unseen(generator: ImageGenerator, cohort: Cohort, config: SynthesisConfig) -> None:
    from counterstain.synthesis.synthesize import never_seen

    if unseen := [name for name in never_seen(generator, cohort) if config.relabel.asks_for(name)]:
        them = "it" if len(unseen) == 1 else "them"
        message = f"no training region shows {', '.join(unseen)}, so nothing is drawn as {them}"
        warnings.warn(message, CounterstainWarning, stacklevel=4)
