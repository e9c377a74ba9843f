"""The registry of methods: all that makes a way of drawing images, in one entry each.

Plans, commands, checkpoints and reports loop over :data:`METHODS` and name no method. Entries are lazy, so that this
module imports neither torch nor any network. Another package adds a method by an entry point of the group
``counterstain.methods`` whose object is a :class:`Method`; a test or a notebook by :func:`register`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from counterstain.config import Config
from counterstain.errors import ConfigError

if TYPE_CHECKING:
    from counterstain.data.cohort import Cohort
    from counterstain.generators.interface import ImageGenerator

GROUP = "counterstain.methods"


@dataclass(frozen=True)
class Lazy:
    """A function or class that is imported on first use.

    Examples
    --------
    >>> Lazy("math:sqrt")(9.0)
    3.0
    """

    target: str  # package.module:attribute

    @property
    def loaded(self) -> Any:
        """The function or class."""
        module, _, name = self.target.partition(":")
        return getattr(import_module(module), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Import and call it."""
        return self.loaded(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training that a method needs; its checkpoint can be shared by several methods.

    Attributes
    ----------
    stage
        Name of its settings in a recipe, kind of its checkpoint, and name of its cells in a study.
    config
        Class of its settings.
    train
        Called as ``train(cohort, config, out, *, size_px, seed, **needs)``; writes a checkpoint into the folder
        ``out`` and leaves a finished one as it is.
    needs
        Stages of earlier trainings, whose checkpoint folders ``train`` is given under these names.
    drawing
        Fields of its settings that only say how images are drawn; changing one needs no new training.
    version
        Raised when the code changes what the training makes; studies then train anew.
    missing
        Given its settings, what of this machine the training would not find, a line each.
    describe
        Given a recipe, the paragraph of a methods section.
    timed_with
        Settings with which a few steps of it are timed: without what is done rarely beside the steps, and without
        weights that would have to be fetched. Where its settings have no ``training``, the whole is timed.

    Examples
    --------
    >>> def train(cohort, config, out, *, size_px, seed): ...
    >>> Training(stage="colours", title="Mean colours", config=SamplingConfig, train=train).needs
    ()
    """

    stage: str
    title: str
    config: Lazy | type[Config]
    train: Callable[..., Any]
    needs: tuple[str, ...] = ()
    drawing: tuple[str, ...] = ()
    version: int = 1
    missing: Callable[[Any], Iterable[str]] = lambda _: ()
    describe: Callable[[Any], str] | None = None
    timed_with: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config_class(self) -> type[Config]:
        """Class of its settings."""
        found: type[Config] = self.config.loaded if isinstance(self.config, Lazy) else self.config
        return found


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of drawing images for label masks.

    Attributes
    ----------
    name
        As users write it.
    colour
        ``#rrggbb``, the same in every figure.
    load
        Given the checkpoint of the last training (None without trainings), the cohort whose masks are drawn and
        the settings of drawing, plain values as in :attr:`drawing`; those that are not given are the
        checkpoint's own.
    trainings
        In their order; the last one makes the generator.
    check
        Given a recipe, raises ConfigError where patches of its size cannot be drawn.
    describe
        Given a recipe, the paragraph of a methods section on drawing, beside those of the trainings.
    data_sheet
        Given the settings that a synthetic set records and its recipe, both plain, entries of its data sheet:
        ``Method`` (what an image is drawn from) and ``Drawn with``.
    draws_with
        Which of the last training's ``drawing`` fields it uses; None = all.
    ceiling
        Whether it draws phantoms only, by their own renderer: the best that any generator could do.
    inpaints
        Whether it redraws instances inside a real image and keeps the rest.
    any_size
        Whether it draws images of other sizes than those of its training.

    See Also
    --------
    counterstain.ImageGenerator : what ``load`` returns.

    Examples
    --------
    >>> def load(checkpoint, cohort, settings): ...
    >>> Method(name="flat", title="Flat colours", colour="#0072b2", load=load).trainings
    ()
    """

    name: str
    title: str
    colour: str
    load: Callable[[Path | None, Cohort, Mapping[str, Any]], ImageGenerator]
    trainings: tuple[Training, ...] = ()
    check: Callable[[Any], None] = lambda _: None
    describe: Callable[[Any], str] | None = None
    data_sheet: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, str]] | None = None
    draws_with: tuple[str, ...] | None = None
    ceiling: bool = False
    inpaints: bool = False
    any_size: bool = True

    @property
    def drawing(self) -> tuple[str, ...]:
        """Fields of the last training's settings that say how images are drawn."""
        if not self.trainings:
            return ()
        return self.trainings[-1].drawing if self.draws_with is None else self.draws_with

    @property
    def kind(self) -> str | None:
        """Kind of the checkpoint that it draws with; None where it needs none."""
        return self.trainings[-1].stage if self.trainings else None


class Registry(Mapping[str, Method]):
    """Methods by name: those of this package, of other installed packages, and registered ones."""

    def __init__(self, built_in: tuple[Method, ...]) -> None:
        self.built_in = built_in

    def __getitem__(self, name: str) -> Method:
        return self._methods[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)

    @property
    def trainings(self) -> dict[str, Training]:
        """All trainings by their stage, each after those that it needs."""
        return {training.stage: training for method in self.values() for training in method.trainings}

    def named(self, name: str, source: str) -> Method:
        """Return the method of a name, or raise ConfigError that lists those there are."""
        if name not in self:
            near = difflib.get_close_matches(name, list(self), n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"{source} {name}: {meant}expected one of {', '.join(self)}")
        return self[name]

    def register(self, method: Method) -> ExitStack:
        """Add a method, for the rest of the process or for the length of a ``with`` block.

        Raises ConfigError where there is a method of that name, or another training of the same stage.
        """
        _add(method, self._methods)
        block = ExitStack()
        block.callback(self._methods.pop, method.name)
        return block

    @cached_property
    def _methods(self) -> dict[str, Method]:
        found = {method.name: method for method in self.built_in}
        for point in entry_points(group=GROUP):
            _add(point.load(), found)
        return found


def _add(method: Method, others: dict[str, Method]) -> None:
    if method.name in others:
        raise ConfigError(f"method {method.name}: registered already")
    known = {training.stage: training for other in others.values() for training in other.trainings}
    for training in method.trainings:
        if known.get(training.stage, training) != training:
            raise ConfigError(f"method {method.name}: another method has a training of the stage {training.stage!r}")
    others[method.name] = method


def missing_file(key: str, path: str | None) -> Iterator[str]:
    """Say that a file of weights is missing; ``imagenet`` and None are no files."""
    if path not in {None, "imagenet"} and not Path(str(path)).is_file():
        yield f"{key}: {path}: no such file"


def _missing_of_autoencoder(config: Any) -> Iterator[str]:
    if config.pretrained is not None:
        if config.pretrained_patients is None and not Path(config.pretrained).exists():
            yield "autoencoder.pretrained_patients: say none, or give a file of the patients whose tissue it saw"
        return
    if config.lpips_weight:
        yield from missing_file("autoencoder.lpips_weights", config.lpips_weights)
    if config.lpips_weight and find_spec("lpips") is None:
        yield (
            "autoencoder.lpips_weight is above 0, but lpips is not installed: pip install 'counterstain[lpips]', "
            "or --set recipe.autoencoder.lpips_weight=0"
        )


def _check_diffusion(recipe: Any) -> None:
    recipe.autoencoder.check_size(recipe.size_px)
    recipe.diffusion.check_size(recipe.size_px, recipe.autoencoder.factor)


def _ours(target: str) -> Lazy:
    return Lazy(f"counterstain.generators.{target}")


SPADE = Training(
    stage="spade",
    title="SPADE",
    config=_ours("spade_config:SpadeConfig"),
    train=_ours("train:train_spade"),
    version=2,
    missing=lambda config: missing_file("spade.vgg_weights", config.vgg_weights if config.vgg_weight else None),
    describe=_ours("descriptions:spade"),
    timed_with={"vgg_weights": "random", "monitor_masks": 0},
)
AUTOENCODER = Training(
    stage="autoencoder",
    title="autoencoder",
    config=_ours("diffusion_config:AutoencoderConfig"),
    train=_ours("train:train_autoencoder"),
    version=2,
    missing=_missing_of_autoencoder,
    describe=_ours("descriptions:autoencoder"),
    timed_with={"lpips_weights": "random", "validation_patches": 0, "adversarial_start": 0},
)
DIFFUSION = Training(
    stage="diffusion",
    title="diffusion",
    config=_ours("diffusion_config:DiffusionConfig"),
    train=_ours("train:train_diffusion"),
    needs=("autoencoder",),
    drawing=("sampler", "inpainting", "windows"),
    describe=_ours("descriptions:diffusion"),
)
_latent_diffusion = partial(Method, trainings=(AUTOENCODER, DIFFUSION), check=_check_diffusion)
METHODS = Registry(
    (
        Method(
            name="spade",
            title="SPADE",
            colour="#0072b2",  # this and the next two: Okabe and Ito's, in an order in which they differ in lightness
            trainings=(SPADE,),
            load=lambda checkpoint, *_: _ours("spade:SpadeGenerator").loaded.load(checkpoint),
            check=lambda recipe: recipe.spade.check_size(recipe.size_px),
            data_sheet=_ours("descriptions:spade_sheet"),
            any_size=False,
        ),
        _latent_diffusion(
            name="diffusion",
            title="Latent diffusion",
            colour="#d55e00",
            load=partial(_ours("drawing:open_diffusion"), method="diffusion"),
            data_sheet=_ours("descriptions:diffusion_sheet"),
            draws_with=("sampler", "windows"),
        ),
        _latent_diffusion(
            name="inpainting",
            title="Latent diffusion inpainting",
            colour="#009e73",
            load=partial(_ours("drawing:open_diffusion"), method="inpainting"),
            describe=_ours("descriptions:inpainting"),
            data_sheet=_ours("descriptions:inpainting_sheet"),
            inpaints=True,
        ),
        Method(
            name="oracle",
            title="Oracle",
            colour="#3d3d3d",
            load=lambda _, cohort, __: _ours("interface:OracleGenerator")(cohort),
            describe=_ours("descriptions:oracle"),
            data_sheet=_ours("descriptions:oracle_sheet"),
            ceiling=True,
        ),
    )
)
"""Every method, by name."""
register = METHODS.register
DEFAULT_METHODS = tuple(method.name for method in METHODS.built_in if not method.ceiling)
"""What a study compares where it does not say."""
