"""Patches redrawn by hand: some instances at a time, with where each drawing is from, and a set to keep them in."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

import counterstain
from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import BY_HAND, SHARD_PATCHES, PatchSet, PatchSetHeader, PatchSetWriter, SyntheticPatch
from counterstain.data.patches import Patch, Source
from counterstain.errors import InputError, LeakageError
from counterstain.generators.interface import DrawRequest, ImageGenerator
from counterstain.storage import claim
from counterstain.synthesis.masks import SynthesisConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One drawing: which instances got which subtype, and all that the image depends on."""

    method: str
    generator: str
    """SHA-256 of the weights; empty where the method needs none."""
    instances: dict[int, tuple[str, str]]
    """Names of the subtype before and after, by instance."""
    seed: int
    guidance: float | None = None
    """Classifier-free guidance; None where the generator has none."""
    style: str | None = None
    """Slide whose style was given."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Redrawing:
    """A real patch and what became of it, drawing by drawing; each drawing starts from the one before.

    Examples
    --------
    >>> cohort = make_phantom("redrawn", slides=1, regions=1, size_px=64)
    >>> oracle = load_generator(method="oracle", cohort=cohort)
    >>> work = oracle.redraw(cohort.patch(0, 0, 0, 64), {1: "HER2 3+"}, seed=1)
    >>> work = oracle.redraw(work, {1: "HER2 0"}, seed=2)
    >>> work, work.undone().patch.taxonomy.name_of(work.undone().patch.subtypes[1])
    (Redrawing(64 x 64 px of region phantom-000-r00: 2 drawings), 'HER2 3+')
    """

    real: Patch
    steps: tuple[Step, ...] = ()
    patches: tuple[Patch, ...] = ()
    """The patch after each step."""
    patients: frozenset[str] = frozenset()
    """Every patient whose tissue its generators saw."""
    nuclei: bool = False
    """Whether a generator was shown the nuclei of the real patch."""

    @property
    def patch(self) -> Patch:
        """The patch as it is now."""
        return self.patches[-1] if self.patches else self.real

    def undone(self) -> Redrawing:
        """Return it without its last drawing."""
        return replace(self, steps=self.steps[:-1], patches=self.patches[:-1])

    def drawn(self, generator: ImageGenerator, asked: Patch, step: Step, style: np.ndarray | None) -> Redrawing:
        """Draw the instances of a step; methods that do not inpaint draw the whole patch anew.

        ``asked`` is the current patch with its new subtypes, ``style`` (S,) one of the generator's style codes.
        """
        redraw = np.isin(asked.instances, list(step.instances))
        image = generator.draw([DrawRequest.of(asked, step.seed, redraw, style)])[0]
        return replace(
            self,
            steps=(*self.steps, step),
            patches=(*self.patches, replace(asked, image=image)),
            patients=self.patients.union(generator.header.patients_seen if generator.header else ()),
            nuclei=self.nuclei or "counterstain" in generator.settings,
        )

    def png(self) -> bytes:
        """Return the image as PNG that says of itself where it is from."""
        about = {
            "drawn": bool(self.steps),
            "source": asdict(self.real.source),
            "steps": [asdict(step) for step in self.steps],
            "version": counterstain.__version__,
        }
        text, file = PngImagePlugin.PngInfo(), io.BytesIO()
        text.add_itxt("Software", "counterstain")
        text.add_itxt("Description", "Generated image, not real tissue" if self.steps else "Real tissue")
        text.add_itxt("counterstain", json.dumps(about))
        Image.fromarray(self.patch.image).save(file, "PNG", pnginfo=text)
        return file.getvalue()

    def __repr__(self) -> str:
        height, width = self.real.instances.shape
        return f"Redrawing({height} x {width} px of region {self.real.source.region}: {len(self.steps)} drawings)"


def keep(work: Redrawing, cohort: Cohort, out: Path) -> PatchSet:
    """Add a redrawn patch to a set of such patches, which is made where there is none; return the set.

    Its ``patches.parquet`` has the steps of each patch as JSON. Kill-safe: what was in the set stays in it.

    Raises InputError where nothing was drawn, or the set has this drawing, LeakageError for a patch that is not of the
    training part, MismatchError where the set has patches of another size or cohort, or ``out`` is something else.
    """
    source = work.real.source
    if not work.steps:
        raise InputError("nothing was drawn yet, so there is nothing to add to a set")
    split = cohort.regions.loc[cohort.regions["region"].astype(str) == source.region, "split"].iloc[0]
    if split != "train":
        raise LeakageError(f"region {source.region}: is not of the training part of {cohort.folder}; nothing was added")
    claim(out, BY_HAND, {"cohort": cohort.fingerprint, "size_px": len(work.real.image)})
    _restore(out)
    before = PatchSet.open(out) if (out / "set.json").exists() else None
    header = _header(work, cohort, before)
    steps = json.dumps([asdict(step) for step in work.steps])
    if before is not None and (same := _same(before, source, steps)) is not None:
        raise InputError(f"{out}: has this drawing already, as patch {same}; nothing was added")
    writer, index = PatchSetWriter(out, header), header.count - 1
    shard = index // SHARD_PATCHES
    kept = [] if before is None else [before.drawn_by_hand(i) for i in range(shard * SHARD_PATCHES, index)]
    new = SyntheticPatch(
        index=index,
        patch=work.patch,
        subtypes_before=work.real.subtypes,
        seed=work.steps[-1].seed,
        steps=steps,
    )
    full = [*kept, *(replace(new, index=i) for i in range(index, (shard + 1) * SHARD_PATCHES))]
    with _aside(out, shard):
        writer.write(shard, full)
    return writer.finish()


def _same(patches: PatchSet, source: Source, steps: str) -> int | None:
    """Return the number of the patch that was drawn by the same steps from the same place."""
    table = patches.patches
    places = zip(table["region"], table["y_px"], table["x_px"], table["steps"], strict=True)
    wanted = (source.region, source.y_px, source.x_px, steps)
    return next((number for number, place in enumerate(places) if place == wanted), None)


def _header(work: Redrawing, cohort: Cohort, before: PatchSet | None) -> PatchSetHeader:
    settings = {"synthesis": SynthesisConfig().model_dump(mode="json")}
    old = () if before is None else before.header.patients_seen
    if work.nuclei or (before is not None and "counterstain" in before.header.settings):
        settings["counterstain"] = {"shown": True}
    return PatchSetHeader(
        method=BY_HAND,
        taxonomy=cohort.taxonomy,
        size_px=len(work.real.image),
        mpp=cohort.mpp,
        count=1 if before is None else len(before) + 1,
        seed=0,
        cohort=cohort.fingerprint,
        generator="",
        patients_seen=tuple(sorted({*old, *work.patients, *cohort.patients("train")})),
        settings=settings,
        version=counterstain.__version__,
    )


@contextmanager
def _aside(out: Path, shard: int) -> Iterator[None]:
    """Keep the shard as it was until the block has written the new one, also where the process is killed in it."""
    folder = out / "shards" / f"{shard:05d}"
    if folder.exists():
        folder.rename(folder.with_suffix(".before"))
    try:
        yield
    finally:
        _restore(out)


def _restore(out: Path) -> None:
    """Put back a shard that was put aside and has no successor."""
    for before in (out / "shards").glob("*.before"):
        if before.with_suffix("").exists():
            shutil.rmtree(before)
        else:
            before.rename(before.with_suffix(""))
