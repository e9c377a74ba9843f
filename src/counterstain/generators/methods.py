"""The registry of methods: all that makes a way of drawing images, in one entry each.

Plans, commands, checkpoints and reports loop over :data:`METHODS` and name no method. Entries are lazy, so that this
module imports neither torch nor any network. Another package adds a method by an entry point of the group
``counterstain.methods`` whose object is a :class:`Method`; a test or a notebook by :func:`register`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
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

    Parameters
    ----------
    target : str
        ``package.module:attribute``.

    Examples
    --------
    >>> Lazy("math:sqrt")(9.0)
    3.0
    """

    target: str

    @property
    def loaded(self) -> Any:
        """The function or class."""
        module, _, path = self.target.partition(":")
        found: Any = import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Import and call it."""
        return self.loaded(*args, **kwargs)


def _nothing(_: Any) -> Iterator[str]:
    return iter(())


def _fits(_: Any) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training that a method needs; its checkpoint can be shared by several methods.

    Examples
    --------
    >>> def train(cohort, config, out, *, size_px, seed): ...
    >>> Training(stage="colours", title="Mean colours", config=SamplingConfig, train=train).needs
    ()
    """

    stage: str
    """Name of its settings in a recipe, kind of its checkpoint, and name of its cells in a study."""
    title: str
    """As people read it."""
    config: Lazy | type[Config]
    """Class of its settings."""
    train: Callable[..., Any]
    """Called as ``train(cohort, config, out, *, size_px, seed, **needs)``; writes a checkpoint into the folder ``out``
    and leaves a finished one as it is."""
    needs: tuple[str, ...] = ()
    """Stages of earlier trainings, whose checkpoint folders ``train`` is given under these names."""
    drawing: tuple[str, ...] = ()
    """Fields of its settings that only say how images are drawn; changing one needs no new training."""
    version: int = 1
    """Raised when the code changes what the training makes; studies then train anew."""
    missing: Callable[[Any], Iterator[str]] = _nothing
    """Given its settings, what of this machine the training would not find, a line each."""
    describe: Callable[[Any], str] | None = None
    """Given a recipe, the paragraph of a methods section."""

    @property
    def config_class(self) -> type[Config]:
        """Class of its settings."""
        found: type[Config] = self.config.loaded if isinstance(self.config, Lazy) else self.config
        return found


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of drawing images for label masks.

    See Also
    --------
    counterstain.generators.interface.ImageGenerator : what ``load`` returns.

    Examples
    --------
    >>> def load(checkpoint, cohort, settings): ...
    >>> Method(name="flat", title="Flat colours", colour="#0072b2", load=load).trainings
    ()
    """

    name: str
    """As users write it."""
    title: str
    """As people read it."""
    colour: str
    """``#rrggbb``, the same in every figure."""
    load: Callable[[Path | None, Cohort, Mapping[str, Any]], ImageGenerator]
    """Given the checkpoint of the last training (None without trainings), the cohort whose masks are drawn and the
    settings of drawing, plain values as in :attr:`drawing`; those that are not given are the checkpoint's own."""
    trainings: tuple[Training, ...] = ()
    """In their order; the last one makes the generator."""
    check: Callable[[Any], None] = _fits
    """Given a recipe, raises ConfigError where patches of its size cannot be drawn."""
    describe: Callable[[Any], str] | None = None
    """Given a recipe, the paragraph of a methods section on drawing, beside those of the trainings."""
    data_sheet: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, str]] | None = None
    """Given the settings that a synthetic set records and its recipe, both plain, entries of its data sheet:
    ``Method`` (what an image is drawn from) and ``Drawn with``."""
    draws_with: tuple[str, ...] | None = None
    """Which of the last training's ``drawing`` fields it uses; None = all."""
    ceiling: bool = False
    """Whether it draws phantoms only, by their own renderer: the best that any generator could do."""
    inpaints: bool = False
    """Whether it redraws instances inside a real image and keeps the rest."""
    any_size: bool = True
    """Whether it draws images of other sizes than those of its training."""

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
        self._found: dict[str, Method] | None = None

    def __getitem__(self, name: str) -> Method:
        """Return the method of a name."""
        return self._methods[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, this package's first."""
        return iter(self._methods)

    def __len__(self) -> int:
        """Return how many methods there are."""
        return len(self._methods)

    @property
    def trainings(self) -> dict[str, Training]:
        """All trainings by their stage, each after those that it needs."""
        return {training.stage: training for method in self.values() for training in method.trainings}

    def named(self, name: str, source: str) -> Method:
        """Return the method of a name, or raise ConfigError that lists those there are."""
        if name not in self:
            raise ConfigError(f"{source} {name}: expected one of {', '.join(self)}")
        return self[name]

    def add(self, method: Method) -> None:
        """Add a method.

        Raises
        ------
        ConfigError
            There is a method of that name, or another training of the same stage.
        """
        _require_new(method, self._methods)
        self._methods[method.name] = method

    def remove(self, name: str) -> None:
        """Take a method out again."""
        del self._methods[name]

    @property
    def _methods(self) -> dict[str, Method]:
        if self._found is None:
            found = {method.name: method for method in self.built_in}
            for point in entry_points(group=GROUP):
                method = point.load()
                _require_new(method, found)
                found[method.name] = method
            self._found = found
        return self._found


def _require_new(method: Method, others: Mapping[str, Method]) -> None:
    if method.name in others:
        raise ConfigError(f"method {method.name}: registered already")
    known = {training.stage: training for other in others.values() for training in other.trainings}
    for training in method.trainings:
        if known.get(training.stage, training) != training:
            raise ConfigError(f"method {method.name}: another method has a training of the stage {training.stage!r}")


def register(method: Method) -> ExitStack:
    """Add a method to :data:`METHODS`, for the rest of the process or for the length of a ``with`` block.

    Raises
    ------
    ConfigError
        There is a method of that name.
    """
    METHODS.add(method)
    block = ExitStack()
    block.callback(METHODS.remove, method.name)
    return block


def missing_file(key: str, path: str | None) -> Iterator[str]:
    """Say that a file of weights is missing; ``imagenet`` and None are no files."""
    if path not in {None, "imagenet"} and not Path(str(path)).is_file():
        yield f"{key}: {path}: no such file"


def _missing_of_spade(config: Any) -> Iterator[str]:
    if config.vgg_weight:
        yield from missing_file("spade.vgg_weights", config.vgg_weights)


def _missing_of_autoencoder(config: Any) -> Iterator[str]:
    if config.lpips_weight:
        yield from missing_file("autoencoder.lpips_weights", config.lpips_weights)
    if config.lpips_weight and find_spec("lpips") is None:
        yield (
            "autoencoder.lpips_weight is above 0, but lpips is not installed: pip install 'counterstain[lpips]', "
            "or --set recipe.autoencoder.lpips_weight=0"
        )


def _check_spade(recipe: Any) -> None:
    recipe.spade.check_size(recipe.size_px)


def _check_diffusion(recipe: Any) -> None:
    recipe.autoencoder.check_size(recipe.size_px)
    recipe.diffusion.check_size(recipe.size_px, recipe.autoencoder.factor)


SPADE = Training(
    stage="spade",
    title="SPADE",
    config=Lazy("counterstain.generators.spade_config:SpadeConfig"),
    train=Lazy("counterstain.generators.train:train_spade"),
    version=2,
    missing=_missing_of_spade,
    describe=Lazy("counterstain.generators.descriptions:spade"),
)
AUTOENCODER = Training(
    stage="autoencoder",
    title="autoencoder",
    config=Lazy("counterstain.generators.autoencoder_config:AutoencoderConfig"),
    train=Lazy("counterstain.generators.train:train_autoencoder"),
    version=2,
    missing=_missing_of_autoencoder,
    describe=Lazy("counterstain.generators.descriptions:autoencoder"),
)
DIFFUSION = Training(
    stage="diffusion",
    title="diffusion",
    config=Lazy("counterstain.generators.diffusion_config:DiffusionConfig"),
    train=Lazy("counterstain.generators.train:train_diffusion"),
    needs=("autoencoder",),
    drawing=("sampler", "inpainting", "windows"),
    describe=Lazy("counterstain.generators.descriptions:diffusion"),
)
METHODS = Registry(
    (
        Method(
            name="spade",
            title="SPADE",
            colour="#0072b2",  # this and the next two: Okabe and Ito's, in an order in which they differ in lightness
            trainings=(SPADE,),
            load=Lazy("counterstain.generators.spade:open_spade"),
            check=_check_spade,
            data_sheet=Lazy("counterstain.generators.descriptions:spade_sheet"),
            any_size=False,
        ),
        Method(
            name="diffusion",
            title="Latent diffusion",
            colour="#d55e00",
            trainings=(AUTOENCODER, DIFFUSION),
            load=partial(Lazy("counterstain.generators.drawing:open_diffusion"), method="diffusion"),
            check=_check_diffusion,
            data_sheet=Lazy("counterstain.generators.descriptions:diffusion_sheet"),
            draws_with=("sampler", "windows"),
        ),
        Method(
            name="inpainting",
            title="Latent diffusion inpainting",
            colour="#009e73",
            trainings=(AUTOENCODER, DIFFUSION),
            load=partial(Lazy("counterstain.generators.drawing:open_diffusion"), method="inpainting"),
            check=_check_diffusion,
            describe=Lazy("counterstain.generators.descriptions:inpainting"),
            data_sheet=Lazy("counterstain.generators.descriptions:inpainting_sheet"),
            inpaints=True,
        ),
        Method(
            name="oracle",
            title="Oracle",
            colour="#3d3d3d",
            load=Lazy("counterstain.generators.oracle:open_oracle"),
            describe=Lazy("counterstain.generators.descriptions:oracle"),
            data_sheet=Lazy("counterstain.generators.descriptions:oracle_sheet"),
            ceiling=True,
        ),
    )
)
"""Every method, by name."""
DEFAULT_METHODS = tuple(method.name for method in METHODS.built_in if not method.ceiling)
"""What a study compares where it does not say."""
