"""A generator and relabelled masks -> a synthetic set, shard by shard.

A patch of the set follows from the set's seed and the patch's number: where its mask is cut out, which subtypes its
instances get, and the seed of its image. Masks do not depend on the method, so the methods are compared on the same
masks, and a larger set begins with the smaller one of the same seed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

import counterstain
from counterstain.checkpoints import CheckpointHeader, require_taxonomy
from counterstain.config import Config
from counterstain.data.cohort import Cohort
from counterstain.data.leakage import check_no_leak
from counterstain.data.patch_set import (
    SHARD_PATCHES,
    PatchSet,
    PatchSetHeader,
    PatchSetWriter,
    SyntheticPatch,
)
from counterstain.data.patches import Patch
from counterstain.data.relabel import Instance, RelabelConfig, relabel
from counterstain.data.sampling import PatchSampler, SamplingConfig
from counterstain.errors import ConfigError, MismatchError
from counterstain.generators.interface import ImageGenerator
from counterstain.generators.style_drawing import StyleChoice, StyleDrawer, style_drawer
from counterstain.progress import bar
from counterstain.seeding import derive
from counterstain.storage import claim
from counterstain.taxonomy import BACKGROUND, IGNORE


class SynthesisConfig(Config):
    """Which masks are drawn from, how they are relabelled and which images are refused."""

    sampling: SamplingConfig = SamplingConfig()
    """Which patches give their masks."""
    relabel: RelabelConfig = RelabelConfig()
    """Which subtypes their instances get."""
    reject: Literal["none", "near_white"] = "none"
    """Images to draw again: ``near_white`` = brighter than ``white_level`` although the mask shows tissue."""
    white_level: Annotated[float, Field(gt=0, le=255)] = 235.0
    """Mean grey level (0..255) inside the instances above which an image counts as near white."""
    style: StyleChoice = StyleChoice()
    """Whose style images are drawn in."""
    attempts: Annotated[int, Field(ge=1, le=100)] = 5
    """Images drawn at most for one patch; the last one is kept."""


@dataclass(frozen=True)
class Layouts:
    """The relabelled masks of a block of patches."""

    first: int
    """Number of the block's first patch."""
    patches: list[Patch]
    """Real patches with their new subtypes; their images are the real ones."""
    before: list[dict[int, int]]
    """The subtypes that they had."""
    redraw: np.ndarray  # (n, H, W) bool: pixels of instances that got a new label


def draw_layouts(sampler: PatchSampler, config: SynthesisConfig, seed: int, block: int) -> Layouts:
    """Cut masks out and relabel them: patches ``block * SHARD_PATCHES`` and the following."""
    first = block * SHARD_PATCHES
    real = [sampler[first + i] for i in range(SHARD_PATCHES)]
    taxonomy = sampler.cohort.taxonomy
    instances = [
        Instance(patch=i, instance=instance, subtype=patch.subtypes[instance], area_px=area)
        for i, patch in enumerate(real)
        for instance, area in patch.areas_px.items()
    ]
    labels = relabel(instances, config.relabel, taxonomy, seed, block)
    kept = {taxonomy.id_of(name) for name in config.relabel.keep} | {IGNORE}
    patches, redraw = [], []
    for i, patch in enumerate(real):
        patches.append(patch.relabelled({instance: labels[i, instance] for instance in patch.subtypes}))
        fixed = [instance for instance, subtype in patch.subtypes.items() if subtype in kept]
        redraw.append((patch.instances != BACKGROUND) & ~np.isin(patch.instances, fixed))
    return Layouts(first, patches, [patch.subtypes for patch in real], np.stack(redraw))


def synthesize(
    generator: ImageGenerator,
    cohort: Cohort,
    out: Path,
    config: SynthesisConfig,
    *,
    count: int,
    size_px: int,
    seed: int,
    header: CheckpointHeader | None = None,
    shards: Iterable[int] | None = None,
) -> PatchSet | None:
    """Write a synthetic set; finished shards are kept, the result is the same as without an interruption.

    Parameters
    ----------
    generator : ImageGenerator
    header : CheckpointHeader, optional
        Of the generator's checkpoint; None for the oracle.
    count : int
        Number of patches.
    shards : iterable of int, optional
        Write only these shards and no header; for spreading a set over processes.

    Returns
    -------
    PatchSet, or None where ``shards`` is given

    Raises
    ------
    LeakageError
        The generator saw a validation or test patient of this cohort.
    MismatchError
        The generator draws another size, scale or taxonomy, or ``out`` belongs to another set.
    """
    if header is not None:
        require_generator_fits(header, cohort, size_px)
    if count < 1:
        raise ConfigError(f"count {count}: a synthetic set has at least one patch")
    set_header = PatchSetHeader(
        method=generator.method,
        taxonomy=cohort.taxonomy,
        size_px=size_px,
        mpp=cohort.mpp,
        count=count,
        seed=seed,
        cohort=cohort.fingerprint,
        generator="" if header is None else header.sha256,
        patients_seen=tuple(sorted({*cohort.patients("train"), *(header.patients_seen if header else ())})),
        settings=drawing_settings(generator, config),
        version=counterstain.__version__,
    )
    claim(out, "synthesize", set_header.model_dump(mode="json", exclude={"count"}))  # a set may grow
    writer = PatchSetWriter(out, set_header)
    sampler = PatchSampler(cohort, "train", size_px, config.sampling, derive(seed, "masks"))
    reference_px = size_px if header is None else header.size_px
    drawer = style_drawer(generator, cohort, config.style, size_px=reference_px, seed=seed)
    wanted = range(writer.num_shards) if shards is None else list(shards)
    missing = sorted(set(writer.missing_shards()) & set(wanted))
    done = sum(len(writer.indices(shard)) for shard in wanted if shard not in missing)
    total = sum(len(writer.indices(shard)) for shard in wanted)
    with bar(f"synthesizing ({generator.method})", total, done) as advance:
        for shard in missing:
            layouts = draw_layouts(sampler, config, seed, shard)
            writer.write(shard, _draw(generator, layouts, config, seed, writer.indices(shard), drawer=drawer))
            advance(len(writer.indices(shard)))
    return writer.finish() if shards is None else None


def _draw(
    generator: ImageGenerator,
    layouts: Layouts,
    config: SynthesisConfig,
    seed: int,
    indices: range,
    *,
    drawer: StyleDrawer | None,
) -> list[SyntheticPatch]:
    patches = layouts.patches
    masks = np.stack([patch.label_mask for patch in patches])
    real = np.stack([patch.image for patch in patches])
    instances = np.stack([patch.instances for patch in patches])
    slides = [patch.source.slide for patch in patches]
    styles = None if drawer is None else drawer(slides, indices)
    seeds = [derive(seed, "image", index, 0) for index in indices]
    attempts = [1] * len(patches)
    images = np.empty_like(real)
    pending = list(range(len(patches)))
    while pending:
        images[pending] = generator.generate(
            masks[pending],
            [seeds[i] for i in pending],
            real[pending],
            layouts.redraw[pending],
            instances=instances[pending],
            slides=[slides[i] for i in pending],
            **({} if styles is None else {"styles": styles.codes[pending]}),
        )
        refused = _refused(images, masks, config)
        pending = [i for i in pending if refused[i] and attempts[i] < config.attempts]
        for i in pending:
            seeds[i] = derive(seed, "image", indices[i], attempts[i])
            attempts[i] += 1
    return [
        SyntheticPatch(
            index=index,
            patch=Patch(image=image, instances=patch.instances, subtypes=patch.subtypes, source=patch.source),
            subtypes_before=before,
            seed=image_seed,
            attempts=tries,
            style=() if styles is None else styles.mixes[index - indices[0]],
        )
        for index, image, patch, before, image_seed, tries in zip(
            indices, images, patches, layouts.before, seeds, attempts, strict=True
        )
    ]


def _refused(images: np.ndarray, masks: np.ndarray, config: SynthesisConfig) -> np.ndarray:
    """Say for each image whether the filter refuses it, (n,) bool."""
    if config.reject == "none":
        return np.zeros(len(images), bool)
    tissue = (masks != BACKGROUND) & (masks != IGNORE)
    grey = images.mean(axis=3)
    area = tissue.sum((1, 2))
    mean_inside = (grey * tissue).sum((1, 2)) / np.maximum(area, 1)
    return np.asarray((area > 0) & (mean_inside > config.white_level))


def drawing_settings(generator: ImageGenerator, config: SynthesisConfig) -> dict[str, Any]:
    """Return how images are drawn, for the record: all that a generator's weights do not say."""
    settings: dict[str, Any] = {"synthesis": config.model_dump(mode="json")}
    names = {"diffusion": ("sampler", "windows"), "inpainting": ("sampler", "windows", "inpainting")}
    for name in names.get(generator.method, ()):
        settings[name] = getattr(generator, name).model_dump(mode="json")
    return settings


def require_generator_fits(header: CheckpointHeader, cohort: Cohort, size_px: int) -> None:
    """Raise an error unless a checkpoint may draw images of this size from the masks of a cohort."""
    require_taxonomy(Path(header.kind), header, cohort.taxonomy)
    if header.kind == "spade" and header.size_px != size_px:
        raise MismatchError(
            f"this SPADE checkpoint draws {header.size_px} px, {size_px} px were asked for; train one at that size"
        )
    if abs(header.mpp - cohort.mpp) > 0.05 * cohort.mpp:
        raise MismatchError(f"the generator was trained at {header.mpp} um/px, this cohort is at {cohort.mpp}")
    held_out = {part: cohort.patients(part) for part in ("val", "test")}
    check_no_leak(header.patients_seen, held_out, f"the {header.kind} checkpoint {header.sha256[:12]}")
