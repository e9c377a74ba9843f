"""Make the table of docs/generators.md: what each generator and sampler is worth, and what an image costs.

    python benchmarks/generator_quality.py PLAN.yaml --out OUT

The plan (see generator_quality.yaml) names a cohort, generators to train from presets or finished checkpoints, and the
rows of the table: a method, a generator, and how it draws. Everything is kept in OUT, so a plan that grows or was
interrupted goes on. ``OUT/table.md`` is the table, ``OUT/ROW.png`` a grid of masks and images for each row, and
``OUT/audit`` all else that the audit found.
"""

import argparse
import re
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from PIL import Image
from pydantic import Field

from counterstain.audit.audit import audit_sets, write_audit
from counterstain.audit.findings import Audit, AuditConfig, Findings
from counterstain.audit.judge import train_judge
from counterstain.config import Config, build, read_yaml
from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import PatchSet
from counterstain.data.phantom import write_phantom
from counterstain.data.phantom.styles import PhantomConfig
from counterstain.data.split import SplitConfig, split_cohort
from counterstain.generators.diffusion_config import InpaintingConfig, SamplerConfig, StyleChoice
from counterstain.generators.drawing import DiffusionGenerator
from counterstain.generators.interface import DrawRequest, ImageGenerator, load_generator
from counterstain.generators.train import train_autoencoder, train_diffusion, train_distilled, train_spade
from counterstain.recipe import load_recipe
from counterstain.storage import write_text
from counterstain.synthesis.masks import Layouts, SynthesisConfig
from counterstain.synthesis.synthesize import synthesize

COLUMNS, GAP_PX = 12, 2  # of a picture: pairs of a mask and an image in a row, pixels between them
ROWS = 4


class DrawnCohort(Config):
    """A cohort on disk, or a phantom that is made for the table."""

    path: Path | None = None
    phantom: PhantomConfig | None = None
    split: SplitConfig = SplitConfig()


class Trained(Config):
    """A finished checkpoint, or how one is trained."""

    kind: Literal["spade", "diffusion", "distilled", "judge"] = "judge"
    checkpoint: Path | None = None
    preset: str = "best"
    set: tuple[str, ...] = ()
    teacher: str = ""
    seed: int = 0


class Row(Config):
    """A line of the table; ``sampler`` and ``inpainting`` are changes to the generator's own."""

    method: str
    generator: str | None = None
    style: StyleChoice = StyleChoice()
    sampler: dict[str, Any] = Field(default_factory=dict)
    inpainting: dict[str, Any] = Field(default_factory=dict)


class Plan(Config):
    """All of it; ``timed`` images are drawn at once when the time is taken, rows in turns, the median counts."""

    cohort: DrawnCohort
    size_px: int = 64
    count: int = 1000
    judge: Trained = Trained()
    generators: dict[str, Trained] = Field(default_factory=dict)
    rows: dict[str, Row]
    synthesis: SynthesisConfig = SynthesisConfig(reject="near_white")
    audit: AuditConfig = AuditConfig()
    timed: int = 16
    rounds: int = 3


def open_cohort(wanted: DrawnCohort, out: Path) -> Cohort:
    if wanted.path is not None:
        return Cohort.open(wanted.path)
    cohort = write_phantom(wanted.phantom or PhantomConfig(), out / "cohort", lambda: None)
    return split_cohort(cohort, wanted.split)[0]


def trained(name: str, plan: Plan, cohort: Cohort, out: Path) -> Path:
    """Return the folder of a checkpoint, trained if need be."""
    wanted = plan.judge if name == "judge" else plan.generators[name]
    if wanted.checkpoint is not None:
        return wanted.checkpoint
    recipe, folder = load_recipe(wanted.preset, None, wanted.set), out / "trained" / name
    options = {"size_px": plan.size_px, "seed": wanted.seed}
    if name == "judge":
        return train_judge(cohort, recipe.judge, folder, **options)
    if wanted.kind == "spade":
        return train_spade(cohort, recipe.spade, folder, **options)
    if wanted.kind == "distilled":
        assert recipe.distillation is not None
        teacher = trained(wanted.teacher, plan, cohort, out)
        return train_distilled(cohort, recipe.distillation, folder, teacher=teacher, seed=wanted.seed)
    first = train_autoencoder(cohort, recipe.autoencoder, out / "trained" / f"{name}-autoencoder", **options)
    return train_diffusion(cohort, recipe.diffusion, folder, autoencoder=first, **options)


def generator_of(row: Row, plan: Plan, cohort: Cohort, out: Path) -> ImageGenerator:
    checkpoint = None if row.generator is None else trained(row.generator, plan, cohort, out)
    generator = load_generator(row.method, checkpoint, cohort)
    if isinstance(generator, DiffusionGenerator):
        sampler = build(SamplerConfig, generator.sampler.model_dump() | row.sampler, "sampler")
        inpainting = build(InpaintingConfig, generator.inpainting.model_dump() | row.inpainting, "inpainting")
        generator.draw_with(sampler, inpainting, generator.windows)
    return generator


def drawn(name: str, plan: Plan, cohort: Cohort, out: Path) -> PatchSet:
    generator = generator_of(plan.rows[name], plan, cohort, out)
    folder = out / "sets" / slug(name)
    config = plan.synthesis.model_copy(update={"style": plan.rows[name].style})
    found = synthesize(generator, cohort, folder, config, count=plan.count, size_px=plan.size_px, seed=0)
    assert found is not None
    return found


def seconds_per_image(plan: Plan, cohort: Cohort, out: Path) -> dict[str, float]:
    """Return the seconds that an image takes, with all rows drawing the same masks in turns."""
    layouts = Layouts.of(cohort, plan.synthesis, size_px=plan.size_px, seed=0)(0)
    requests = [DrawRequest.of(one.patch, i, one.redraw) for i, one in enumerate(layouts[: plan.timed])]
    generators = {name: generator_of(row, plan, cohort, out) for name, row in plan.rows.items()}
    taken: dict[str, list[float]] = {name: [] for name in generators}
    for _ in range(plan.rounds):
        for name, generator in generators.items():
            start = time.perf_counter()
            generator.draw(requests)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken[name].append((time.perf_counter() - start) / len(requests))
    return {name: statistics.median(values) for name, values in taken.items()}


def quality_table(findings: tuple[Findings, ...], seconds: dict[str, float]) -> str:
    head = "| images | FD | KD x 1000 | precision | recall | density | coverage | seam | near copies | s / image |"
    lines = [head, "|---|" + "---|" * 9]
    for f in findings:
        frechet = f"{f.frechet.value:.1f} ({f.frechet.low:.1f}-{f.frechet.high:.1f})"
        kernel = " to ".join(f"{1000 * v:.1f}" for v in (f.kernel.low, f.kernel.high))
        around = " | ".join(f"{v:.2f}" for v in (f.precision, f.recall, f.density, f.coverage))
        copies = "" if np.isnan(f.copies.share) else f"{f.copies.share:.1%}"
        cost = f"{seconds[f.name]:.3g}" if f.name in seconds else ""
        kernel = f"{1000 * f.kernel.value:.1f} ({kernel})"
        lines.append(f"| {f.name} | {frechet} | {kernel} | {around} | {f.seam:.1f} | {copies} | {cost} |")
    return "\n".join(lines)


def subtype_table(findings: tuple[Findings, ...], what: str) -> str:
    names = list(findings[0].confusion.index)
    lines = [f"| {what} | " + " | ".join([*names, "mean"]) + " |", "|---|" + "---|" * (len(names) + 1)]
    for f in findings:
        values: pd.Series = getattr(f, what)
        lines.append(f"| {f.name} | " + " | ".join(f"{v:.2f}" for v in [*values[names], values.mean()]) + " |")
    return "\n".join(lines)


def text_of(audit: Audit, seconds: dict[str, float], plan: Plan) -> str:
    patches = audit.findings[0].patches
    measured = f"{patches} patches of {plan.size_px} px of each kind, features: {plan.audit.features}"
    parts = [
        f"{measured}; 95 % intervals over patients; {plan.timed} images timed at once, median of {plan.rounds} rounds.",
        quality_table(audit.findings, seconds),
        subtype_table(audit.findings, "adherence"),
        subtype_table(audit.findings, "stain"),
    ]
    return "\n\n".join(parts) + "\n"


def write_picture(patch_set: PatchSet, path: Path) -> None:
    """Write masks in the taxonomy's colours, each with its image on its right."""
    colours = patch_set.header.taxonomy.palette
    patches = [patch_set[i] for i in range(min(COLUMNS // 2 * ROWS, len(patch_set)))]
    tiles = [tile for patch in patches for tile in (colours[patch.label_mask], patch.image)]
    size = patch_set.header.size_px + GAP_PX
    canvas = np.full((-(-len(tiles) // COLUMNS) * size - GAP_PX, COLUMNS * size - GAP_PX, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = i // COLUMNS * size, i % COLUMNS * size
        canvas[y : y + len(tile), x : x + len(tile)] = tile
    Image.fromarray(canvas).save(path)


def slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    plan, out = build(Plan, read_yaml(arguments.plan), arguments.plan), arguments.out
    cohort = open_cohort(plan.cohort, out)
    judge = trained("judge", plan, cohort, out)
    sets = {name: drawn(name, plan, cohort, out) for name in plan.rows}
    for name, patch_set in sets.items():
        write_picture(patch_set, out / f"{slug(name)}.png")
    audit = audit_sets(sets, cohort, judge, plan.audit)
    write_audit(audit, sets, plan.audit, out / "audit")
    text = text_of(audit, seconds_per_image(plan, cohort, out), plan)
    write_text(out / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
