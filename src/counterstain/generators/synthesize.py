"""A generator and relabelled masks -> a synthetic set, shard by shard.

A patch of the set follows from the set's seed and the patch's number: where its mask is cut out, which subtypes its
instances get, and the seed of its image.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import counterstain
from counterstain.checkpoints import CheckpointHeader, require_taxonomy
from counterstain.data.cohort import Cohort
from counterstain.data.leakage import check_no_leak
from counterstain.data.patch_set import PatchSet, PatchSetHeader, PatchSetWriter
from counterstain.data.sampling import PatchSampler
from counterstain.errors import ConfigError, MismatchError
from counterstain.generators.image_filter import ImageFilter
from counterstain.generators.interface import ImageGenerator
from counterstain.generators.layouts import SynthesisConfig
from counterstain.generators.shards import ShardDrawer
from counterstain.generators.style_drawing import style_drawer
from counterstain.progress import bar
from counterstain.seeding import derive
from counterstain.storage import claimed


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
    judge: ImageFilter | None = None,
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
    judge : ImageFilter, optional
        Images that it refuses are drawn again, so that the set has as many patches as without it.

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
    seen = {*cohort.patients("train"), *(header.patients_seen if header else ())}
    set_header = PatchSetHeader(
        method=generator.method,
        taxonomy=cohort.taxonomy,
        size_px=size_px,
        mpp=cohort.mpp,
        count=count,
        seed=seed,
        cohort=cohort.fingerprint,
        generator="" if header is None else header.sha256,
        patients_seen=tuple(sorted({*seen, *(judge.patients_seen if judge else ())})),
        settings=drawing_settings(generator, config) | ({} if judge is None else {"filter": judge.settings}),
        version=counterstain.__version__,
    )
    with claimed(out, "synthesize", set_header.model_dump(mode="json", exclude={"count"})):  # a set may grow
        writer = PatchSetWriter(out, set_header)
        sampler = PatchSampler(cohort, "train", size_px, config.sampling, derive(seed, "masks"))
        reference_px = size_px if header is None else header.size_px
        style = style_drawer(generator, cohort, config.style, size_px=reference_px, seed=seed)
        draw = ShardDrawer(generator=generator, sampler=sampler, config=config, seed=seed, style=style, judge=judge)
    wanted = range(writer.num_shards) if shards is None else list(shards)
    missing = sorted(set(writer.missing_shards()) & set(wanted))
    done = sum(len(writer.indices(shard)) for shard in wanted if shard not in missing)
    total = sum(len(writer.indices(shard)) for shard in wanted)
    with bar(f"synthesizing ({generator.method})", total, done) as advance:
        for shard in missing:
            writer.write(shard, draw(shard))
            advance(len(writer.indices(shard)))
    return writer.finish() if shards is None else None


def drawing_settings(generator: ImageGenerator, config: SynthesisConfig) -> dict[str, Any]:
    """Return how images are drawn, for the record: all that a generator's weights do not say.

    ``counterstain`` is among it where images share the nuclei of their real patches, which an audit has to know.
    """
    settings: dict[str, Any] = {"synthesis": config.model_dump(mode="json")}
    names = {"diffusion": ("sampler", "windows"), "inpainting": ("sampler", "windows", "inpainting")}
    for name in names.get(generator.method, ()):
        settings[name] = getattr(generator, name).model_dump(mode="json")
    counterstain = getattr(generator, "counterstain", None)
    return settings | ({} if counterstain is None else {"counterstain": counterstain.model_dump(mode="json")})


def require_generator_fits(header: CheckpointHeader, cohort: Cohort, size_px: int) -> None:
    """Raise an error unless a checkpoint may draw images of this size from the masks of a cohort."""
    require_taxonomy(Path(header.kind), header, cohort.taxonomy)
    if header.kind == "spade" and header.size_px != size_px:
        raise MismatchError(
            f"this SPADE checkpoint draws {header.size_px} px, {size_px} px were asked for; train one at that size"
        )
    if not cohort.is_at(header.mpp):
        raise MismatchError(f"the generator was trained at {header.mpp} um/px, this cohort is at {cohort.mpp}")
    held_out = {part: cohort.patients(part) for part in ("val", "test")}
    check_no_leak(header.patients_seen, held_out, f"the {header.kind} checkpoint {header.sha256[:12]}")
