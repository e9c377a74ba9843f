"""Single patches: draw them, redraw instances one by one, look at what came of it, and keep what is good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from counterstain.api import PathLike, Settings, assignments, open_cohort, verb
from counterstain.api.generators import opened_generator
from counterstain.errors import ConfigError, CounterstainError, InputError

if TYPE_CHECKING:
    import pandas as pd

    from counterstain.audit.judge import Judge
    from counterstain.data.cohort import Cohort
    from counterstain.data.patch_set import PatchSet
    from counterstain.data.patches import Patch
    from counterstain.generators.interface import ImageGenerator
    from counterstain.generators.style import StyleDrawer
    from counterstain.synthesis.by_hand import Redrawing
    from counterstain.taxonomy import Taxonomy


@dataclass(frozen=True)
class Generator:
    """A trained generator, ready to draw single patches.

    Examples
    --------
    >>> cohort = make_phantom("phantom", slides=1, regions=1, size_px=64)
    >>> generator = load_generator(method="oracle", cohort=cohort)
    >>> patch = cohort.patch(0, 0, 0, 64)
    >>> drawn = generator.draw(patch.relabelled(dict.fromkeys(patch.subtypes, "HER2 0")), seed=0)
    >>> drawn.image.shape, set(drawn.subtypes.values())
    ((64, 64, 3), {1})
    """

    drawer: ImageGenerator
    cohort: Cohort | None = None

    def __repr__(self) -> str:
        """Return the method and the checkpoint."""
        header = self.drawer.header
        return f"Generator({self.drawer.method}" + (f", {header.sha256[:12]})" if header else ")")

    @property
    def guidance(self) -> float | None:
        """Its classifier-free guidance; None where it was not trained for any."""
        from counterstain.generators.interface import GuidedGenerator

        return self.drawer.guidance if isinstance(self.drawer, GuidedGenerator) else None

    @property
    def size_px(self) -> int | None:
        """Edge of the patches that it draws; None where it draws any."""
        from counterstain.generators.methods import METHODS

        header, method = self.drawer.header, METHODS.get(self.drawer.method)
        return None if header is None or method is None or method.any_size else header.size_px

    @cached_property
    def styles(self) -> tuple[str, ...]:
        """Training slides whose style it can be given; none where it takes no styles."""
        try:
            slides = self._style_drawer.slides
            self._style_drawer(slides[0], 0)
        except CounterstainError:
            return ()
        return slides

    @cached_property
    def _style_drawer(self) -> StyleDrawer:
        from counterstain.generators.diffusion_config import StyleChoice
        from counterstain.generators.style import style_drawer

        if self.cohort is None:
            raise InputError("styles come from a cohort; open the generator with load_generator(..., cohort=...)")
        found = style_drawer(self.drawer, self.cohort, StyleChoice(source="own"), size_px=64, seed=0)
        assert found is not None
        return found

    def draw(self, patch: Patch, *, seed: int = 0) -> Patch:
        """Return a patch with a new image drawn for its mask; inpainting redraws its instances and keeps the rest."""
        from counterstain.data.relabel import redrawn_pixels
        from counterstain.generators.interface import DrawRequest

        redraw = redrawn_pixels(patch.instances, patch.subtypes, frozenset())
        return replace(patch, image=self.drawer.draw([DrawRequest.of(patch, seed, redraw)])[0])

    def redraw(
        self,
        patch: Patch | Redrawing,
        subtypes: Mapping[int, int | str],
        *,
        seed: int = 0,
        guidance: float | None = None,
        style: str | None = None,
    ) -> Redrawing:
        """Give instances new subtypes and draw them: inpainting these alone, other methods the whole patch.

        Parameters
        ----------
        patch : Patch or Redrawing
            A real patch, or one that was redrawn before, to go on with.
        subtypes : mapping
            Instance -> new subtype (name or id); the one that it has draws it anew.
        seed : int
            Another number draws another image.
        guidance : float, optional
            Classifier-free guidance, 1 = none [default: the generator's own].
        style : str, optional
            Training slide whose style is given [default: none].

        Raises
        ------
        InputError
            Where the patch shows no such instance, none is given, or the generator was trained on tissue without the
            new subtype.
        ConfigError
            Where the generator takes no guidance or no styles.
        """
        from counterstain.synthesis.by_hand import Redrawing, Step

        work = patch if isinstance(patch, Redrawing) else Redrawing(real=patch)
        if not subtypes:
            raise InputError("no instance to redraw; choose one at least")
        drawer, taxonomy = self._guided(guidance), work.real.taxonomy
        asked = work.patch.relabelled(subtypes)
        assert taxonomy is not None
        changes = {i: tuple(taxonomy.name_of(p.subtypes[i]) for p in (work.patch, asked)) for i in sorted(subtypes)}
        header = drawer.header
        if header is not None and (unseen := {p for _, p in changes.values()}.intersection(header.subtypes_unseen)):
            names = ", ".join(sorted(unseen))
            raise InputError(f"{names}: the generator's training tissue showed none; choose another subtype")
        step = Step(
            method=drawer.method,
            generator="" if header is None else header.sha256,
            instances=changes,  # type: ignore[arg-type]
            seed=seed,
            guidance=self.guidance if guidance is None else guidance,
            style=style,
        )
        return work.drawn(drawer, asked, step, None if style is None else self._style_drawer(style, seed).code)

    def _guided(self, guidance: float | None) -> ImageGenerator:
        from counterstain.generators.interface import GuidedGenerator

        if guidance is None or guidance == self.guidance:
            return self.drawer
        if self.guidance is None or not isinstance(self.drawer, GuidedGenerator):
            raise ConfigError(f"guidance {guidance:g}: this generator was not trained for any; leave it out")
        return self.drawer.guided(guidance)


@verb
def load_generator(
    generator: PathLike | None = None,
    *,
    method: str,
    cohort: PathLike | Cohort,
    preset: str | None = None,
    config: PathLike | None = None,
    settings: Settings | None = None,
) -> Generator:
    """Open a trained generator, to draw single patches with it.

    Parameters
    ----------
    cohort : str, Path or Cohort
        The cohort whose masks are drawn.
    generator, method, preset, config, settings
        As for :func:`synthesize`.
    """
    tissue, drawer, _ = opened_generator(cohort, method, generator, preset=preset, config=config, settings=settings)
    return Generator(drawer, tissue)


def ways_to_draw(
    cohort: PathLike | Cohort, checkpoints: Sequence[PathLike], *, settings: Settings | None = None
) -> dict[str, Generator]:
    """Open every method that some checkpoints draw with, and on phantoms the oracle, by what to call it.

    ``settings`` change how each draws, where it has such a setting. Images are drawn one at a time, whatever number the
    checkpoints draw at once.

    Raises MismatchError or LeakageError where a checkpoint does not fit the cohort, InputError where there is nothing
    to draw with.
    """
    from counterstain.checkpoints import read_header
    from counterstain.generators.methods import METHODS
    from counterstain.synthesis.synthesize import require_generator_fits

    tissue, found = open_cohort(cohort), dict[str, Generator]()
    for checkpoint in map(Path, checkpoints):
        kind = read_header(checkpoint).kind
        methods = [method for method in METHODS.values() if method.kind == kind]
        if not methods:
            raise InputError(f"--generator {checkpoint}: is a {kind} checkpoint, which draws nothing")
        for method in methods:
            alone = [f"{kind}.sampler.compute_batch=1"] if "sampler" in method.drawing else []
            opened = load_generator(
                checkpoint, method=method.name, cohort=tissue, settings=[*alone, *assignments(settings)]
            )
            require_generator_fits(opened.drawer, tissue)
            nuclei = ", nuclei kept" if "counterstain" in opened.drawer.settings else ""
            found[_free(f"{method.title}{nuclei}", checkpoint.name, found)] = opened
    if tissue.source.get("kind") == "phantom":
        found |= {m.title: load_generator(method=m.name, cohort=tissue) for m in METHODS.values() if m.ceiling}
    if not found:
        raise InputError("give --generator DIR, made by 'counterstain train'")
    return found


def _free(title: str, checkpoint: str, others: Mapping[str, Generator]) -> str:
    """Return what to call a generator: its title, with its folder and a number as far as needed."""
    names = [title, f"{title} ({checkpoint})", *(f"{title} ({checkpoint}, {i})" for i in range(2, len(others) + 3))]
    return next(name for name in names if name not in others)


@verb
def add_to_set(work: Redrawing, cohort: PathLike | Cohort, *, out: PathLike) -> PatchSet:
    """Add a redrawn training patch to a set of such patches, with all that it was drawn from.

    Parameters
    ----------
    work : Redrawing
        The patch, as :meth:`Generator.redraw` returns it.
    cohort : str, Path or Cohort
        The cohort that it is from.
    out : str or Path
        Folder of the set; made where there is none.
    """
    from counterstain.synthesis.by_hand import keep

    return keep(work, open_cohort(cohort), Path(out))


def open_judge(judge: PathLike, taxonomy: Taxonomy, mpp: float) -> Judge:
    """Open a judge that says what instances of some tissue look like.

    Raises MismatchError where it is of another taxonomy or resolution.
    """
    from counterstain.audit.judge import load_judge
    from counterstain.checkpoints import require_taxonomy
    from counterstain.errors import MismatchError

    opened, header = load_judge(Path(judge))
    require_taxonomy(Path(judge), header, taxonomy)
    if abs(header.mpp - mpp) > 0.05 * mpp:  # as Cohort.is_at
        raise MismatchError(f"{judge}: the judge learnt at {header.mpp:g} um/px, the tissue is at {mpp:g}")
    return opened


def instance_table(patch: Patch, judge: Judge | None = None) -> pd.DataFrame:
    """Return a row per instance of a patch: instance, subtype (name), area_px, dab (mean optical density).

    With a judge also ``judge``, the subtype that it takes the instance for, and ``probability``, how certain it is.
    """
    import numpy as np
    import pandas as pd

    from counterstain.audit.findings import stain_density
    from counterstain.audit.judge import instance_probabilities

    assert patch.taxonomy is not None
    density = stain_density(patch.image, "dab")
    rows = [
        (i, patch.taxonomy.name_of(patch.subtypes[i]), area, float(density[patch.instances == i].mean()))
        for i, area in sorted(patch.areas_px.items())
    ]
    table = pd.DataFrame(rows, columns=["instance", "subtype", "area_px", "dab"])
    if judge is None:
        return table
    judged = instance_probabilities(judge, [patch]).set_index("instance")
    names = judged["seen"].map(patch.taxonomy.name_of)
    likeliest = judged.filter(like="probability_").to_numpy(np.float64).max(axis=1, initial=0.0)
    return table.merge(
        pd.DataFrame({"judge": names, "probability": likeliest}), left_on="instance", right_index=True, how="left"
    )
