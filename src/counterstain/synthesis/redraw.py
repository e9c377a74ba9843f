"""Redraw training tissue: patches as every subtype, to look at a generator, or whole regions as a cohort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

import counterstain
from counterstain.data.cohort import Cohort, CohortWriter
from counterstain.data.patches import Patch, label_mask
from counterstain.data.region_store import Region
from counterstain.data.relabel import Instance, redrawn_pixels, relabel
from counterstain.data.sampling import PatchSampler
from counterstain.errors import InputError, LeakageError, MismatchError
from counterstain.generators.interface import DrawRequest, ImageGenerator
from counterstain.generators.methods import METHODS
from counterstain.generators.style import Mix, StyleDrawer, style_drawer
from counterstain.progress import bar
from counterstain.seeding import derive
from counterstain.storage import write_parquet
from counterstain.synthesis.masks import SynthesisConfig
from counterstain.synthesis.synthesize import (
    drawing_settings,
    never_seen,
    of_seen_subtypes,
    patients_behind,
    require_generator_fits,
)

CANDIDATES = 8  # patches that the one with the most of its subtype is chosen from


@dataclass(frozen=True, kw_only=True, repr=False)
class Redrawn:
    """A real patch, redrawn as each subtype."""

    patch: Patch
    subtype: int  # what it was chosen for
    drawn: dict[int, np.ndarray]  # images (H, W, 3) uint8 by the subtype that was asked for

    def __repr__(self) -> str:
        return f"Redrawn({self.patch!r}, drawn as {len(self.drawn)} subtypes)"


def preview(
    generator: ImageGenerator,
    cohort: Cohort,
    config: SynthesisConfig,
    *,
    size_px: int,
    seed: int,
    per_subtype: int = 2,
) -> list[Redrawn]:
    """Redraw training patches of every subtype as each subtype in turn, from the same noise.

    It shows what a generator makes of every subtype before a set is drawn or a study run. The subtypes of
    ``config.relabel.keep`` are neither redrawn nor asked for, those that training never showed are not asked for.

    Raises InputError where the training part has no instance that may be redrawn; LeakageError or MismatchError as
    :func:`counterstain.synthesis.synthesize.synthesize`.
    """
    require_generator_fits(generator, cohort, size_px)
    style = style_drawer(generator, cohort, config.style, size_px=size_px, seed=seed)
    chosen = _chosen(cohort, config, size_px, seed, per_subtype)
    if not chosen:
        raise InputError(f"{cohort.folder}: its training part has no instance that may be redrawn")
    kept = config.relabel.kept(cohort.taxonomy)
    unseen = never_seen(generator, cohort)
    asked = [s.id for s in cohort.taxonomy.subtypes if s.id not in kept and s.name not in unseen]
    rows = []
    for number, (subtype, patch) in enumerate(chosen):
        redraw = redrawn_pixels(patch.instances, patch.subtypes, kept)
        code = None if style is None else style(patch.source.slide, number).code
        real = DrawRequest.of(patch, derive(seed, "image", number, 0), redraw, code)
        masks = [np.where(redraw, new, patch.label_mask).astype(np.uint8) for new in asked]
        images = generator.draw([replace(real, mask=mask) for mask in masks])
        rows.append(Redrawn(patch=patch, subtype=subtype, drawn=dict(zip(asked, images, strict=True))))
    return rows


def _chosen(
    cohort: Cohort, config: SynthesisConfig, size_px: int, seed: int, per_subtype: int
) -> list[tuple[int, Patch]]:
    """Return patches and the subtype that each is chosen for: of some candidates the ones that show most of it."""
    found = []
    centred = config.sampling.model_copy(update={"mode": "subtype", "background_share": 0.0, "subtypes": None})
    missing = PatchSampler(cohort, "train", size_px, centred, seed).missing_subtypes
    for subtype in cohort.taxonomy.subtypes:
        if subtype.name in {*missing, *config.relabel.keep}:
            continue
        of_one = centred.model_copy(update={"subtypes": (subtype.name,)})
        sampler = PatchSampler(cohort, "train", size_px, of_one, derive(seed, "preview", subtype.name))
        for first in range(0, per_subtype * CANDIDATES, CANDIDATES):
            candidates = [sampler[i] for i in range(first, first + CANDIDATES)]
            found.append((subtype.id, max(candidates, key=lambda patch: int((patch.label_mask == subtype.id).sum()))))
    return found


def redraw_regions(
    generator: ImageGenerator,
    cohort: Cohort,
    out: Path,
    config: SynthesisConfig,
    *,
    seed: int,
    regions: Sequence[str] = (),
) -> Cohort:
    """Give the instances of whole regions new subtypes and draw the regions; finished ones are kept.

    A region of the new cohort follows from the seed and its source region alone. Beside the tables of every cohort,
    ``redrawn_regions.parquet`` holds a row per region (region, source_region, seed, style_slides, style_weights) and
    ``redrawn_instances.parquet`` a row per instance (region, instance, subtype_before, subtype). The cohort's source
    names the generator, the settings and every patient behind the images, so that leaks are noticed as with sets.

    The generator's method must draw images of any size; of the settings only ``relabel`` and ``style`` are used;
    ``regions`` are names of training regions, all of them where not given. The cohort has the patients and slides of
    the sources, all in its training part.

    Raises LeakageError where a region is not of the training part, or the generator saw a validation or test patient;
    InputError where there is no region of such a name; MismatchError where the generator does not fit, or ``out``
    belongs to another run.
    """
    if generator.method in METHODS and not METHODS[generator.method].any_size:
        others = " or ".join(name for name, method in METHODS.items() if method.any_size and not method.ceiling)
        raise MismatchError(f"method {generator.method}: draws patches of one size; redraw regions with {others}")
    require_generator_fits(generator, cohort)
    config = of_seen_subtypes(config, generator, cohort)
    positions = _positions(cohort, regions)
    drawer = style_drawer(generator, cohort, config.style, size_px=64, seed=seed)
    tasks = [_Task.of(cohort, position, config, seed, drawer) for position in positions]
    origin = {
        "kind": "redrawn",
        "method": generator.method,
        "generator": "" if generator.header is None else generator.header.sha256,
        "cohort": cohort.fingerprint,
        "seed": seed,
        "settings": drawing_settings(generator, config),
        "regions": [task.name for task in tasks],
        "patients_seen": list(patients_behind(generator, cohort)),
        "version": counterstain.__version__,
    }
    writer = CohortWriter(out, cohort.taxonomy, cohort.mpp, origin)
    with bar(f"redrawing regions ({generator.method})", len(tasks)) as advance:
        for task in tasks:
            if not writer.finished and not writer.has(task.name):
                writer.add(task.name, [task.drawn(generator, cohort, config, drawer)])
            advance(1)
    if not writer.finished:
        _write_tables(tasks, out)
    return writer.finish(len(tasks))


@dataclass(frozen=True)
class _Task:
    """A region to be drawn anew."""

    source: str
    name: str
    position: int
    seed: int
    before: dict[int, int]  # the subtypes of the instances, and what they become
    subtypes: dict[int, int]
    mix: Mix

    @classmethod
    def of(cls, cohort: Cohort, position: int, config: SynthesisConfig, seed: int, drawer: StyleDrawer | None) -> Self:
        row = cohort.regions.iloc[position]
        region = str(row["region"])
        own = derive(seed, "region", region)
        table = cohort.instances[cohort.instances["region"] == region]
        columns = (table[name].tolist() for name in ("instance", "subtype", "area_px"))
        instances = [
            Instance(patch=0, instance=instance, subtype=subtype, area_px=area)
            for instance, subtype, area in zip(*columns, strict=True)
        ]
        labels = relabel(instances, config.relabel, cohort.taxonomy, own, 0)
        subtypes = {instance: subtype for (_, instance), subtype in labels.items()}
        mix = () if drawer is None else drawer.mix(str(row["slide"]), own)
        return cls(region, f"{region}-redrawn-{seed}", position, own, cohort.subtypes(position), subtypes, mix)

    def drawn(
        self, generator: ImageGenerator, cohort: Cohort, config: SynthesisConfig, drawer: StyleDrawer | None
    ) -> Region:
        row = cohort.regions.iloc[self.position]
        slide = str(row["slide"])
        image, instances = cohort.read(self.position)
        request = DrawRequest(
            mask=label_mask(instances, self.subtypes),
            seed=self.seed,
            instances=instances,
            image=image,
            redraw=redrawn_pixels(instances, self.before, config.relabel.kept(cohort.taxonomy)),
            slide=slide,
            style=None if drawer is None else drawer(slide, self.seed).code,
        )
        return Region(
            region=self.name,
            slide=slide,
            patient=str(row["patient"]),
            image=generator.draw([request])[0],
            instances=instances,
            subtypes=self.subtypes,
            score=None if pd.isna(row["score"]) else str(row["score"]),
            split="train",
            mpp_level0=None if pd.isna(row["mpp_level0"]) else float(row["mpp_level0"]),
            origin_xy_level0_px=(int(row["x_level0_px"]), int(row["y_level0_px"])),
        )


def _write_tables(tasks: Sequence[_Task], out: Path) -> None:
    regions = [
        (task.name, task.source, task.seed, [slide for slide, _ in task.mix], [weight for _, weight in task.mix])
        for task in tasks
    ]
    columns = ["region", "source_region", "seed", "style_slides", "style_weights"]
    write_parquet(out / "redrawn_regions.parquet", pd.DataFrame(regions, columns=columns))
    instances = [(task.name, i, task.before[i], new) for task in tasks for i, new in sorted(task.subtypes.items())]
    columns = ["region", "instance", "subtype_before", "subtype"]
    write_parquet(out / "redrawn_instances.parquet", pd.DataFrame(instances, columns=columns))


def _positions(cohort: Cohort, regions: Sequence[str]) -> list[int]:
    training = [int(position) for position in cohort.positions("train")]
    names = cohort.regions["region"].astype(str).tolist()
    unknown = sorted(set(regions) - set(names))
    if unknown:
        raise InputError(f"{cohort.folder}: no region {unknown[0]!r}; its regions.parquet lists them")
    held_out = sorted(set(regions) - {names[position] for position in training})
    if held_out:
        raise LeakageError(
            f"region {held_out[0]}: is not of the training part of {cohort.folder}; redraw training regions alone"
        )
    return [position for position in training if not regions or names[position] in regions]
