"""A first study of the cohort at hand: what is measured of it chooses the settings, and stands beside them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from counterstain.audit.findings import stain_table
from counterstain.config import build
from counterstain.data.cohort import PARTS, Cohort
from counterstain.data.sampling import NETWORK_PX, check_patch_size
from counterstain.data.stains import StainShares, stain_shares, stained_windows
from counterstain.errors import InputError
from counterstain.progress import counted
from counterstain.recipe import load_recipe
from counterstain.remote import RemoteFolder
from counterstain.study.config import StudyConfig
from counterstain.study.plan import plan_study
from counterstain.taxonomy import IGNORE

LARGEST_PX = {"demo": 64, "best": 256, "paper": 512}  # patches that the networks of each preset are made for
AROUND = 1.5  # edge of a patch in edges of a large instance
ENOUGH_TO_TEST = 8  # patients in the test part, as in the paper; with fewer all take turns
FOLDS = {15: 5, 8: 4}  # with so many patients at least, so many folds; with fewer each patient is one
TOLD_APART = 0.1  # by so much in optical density the stain of two subtypes differs visibly
LEAST_BACKGROUND = 0.05  # of all pixels, for a style that is read off the background
BALANCED = 1.5  # times as many instances of the commonest subtype as of the rarest


@dataclass(frozen=True, kw_only=True)
class _Findings:
    """What the choices follow from."""

    cohort: Cohort
    subtypes: pd.DataFrame  # a row per subtype: instances, those of the training part, patients
    patients: int
    testing: int | None  # patients of the test part, None without a split
    edges_px: tuple[float, float]  # longest edge of an instance: median, upper quartile
    smallest_px: int  # edge of the smallest region
    background: float  # share of all pixels
    shares: StainShares
    densities: Mapping[str, float]  # mean optical density of DAB by subtype

    @property
    def absent(self) -> list[str]:
        """Subtypes that cannot be learned."""
        return list(self.subtypes.index[self.subtypes["instances" if self.folds else "training"] == 0])

    @property
    def folds(self) -> int | str | None:
        if self.testing is not None and self.testing >= ENOUGH_TO_TEST:
            return None
        return next((folds for least, folds in FOLDS.items() if self.patients >= least), "leave_one_out")

    @property
    def stained_apart(self) -> bool:
        """Whether the subtypes differ in DAB."""
        if self.shares.stain != "dab" or len(self.densities) < 2:
            return False
        return max(self.densities.values()) - min(self.densities.values()) >= TOLD_APART


def first_study(cohort: Cohort, out: Path, *, preset: str | None, gpu: bool) -> str:
    """Return the text of a commented STUDY.yaml for a cohort, to be written to ``out``.

    ``preset`` None: best with a GPU, demo without. Raises InputError where no study is possible: fewer than three
    patients or two subtypes, regions smaller than any patch, and whatever the plan of a study refuses.
    """
    found = _look_at(cohort)
    chosen = preset or ("best" if gpu else "demo")
    lines = [*_heading(found, out), *_whose(found, out, chosen, asked=preset is not None, gpu=gpu)]
    lines += [*_arms(found, chosen), *_recipe(found, chosen)]
    text = "\n".join(lines) + "\n"
    content = yaml.safe_load(text)
    content["cohort"]["path"] = str(
        cohort.folder if isinstance(cohort.folder, RemoteFolder) else cohort.folder.resolve()
    )
    study = build(StudyConfig, content, out)
    plan_study(study, study.resolved_recipe(out))
    return text


def _look_at(cohort: Cohort) -> _Findings:
    regions = cohort.regions[["region", "patient"]].assign(training=cohort.regions["split"].eq("train"))
    table = cohort.instances[cohort.instances["subtype"] != IGNORE].merge(regions)
    how = {"instances": ("instance", "size"), "training": ("training", "sum"), "patients": ("patient", "nunique")}
    counts = table.groupby("subtype").agg(**how)
    counts = counts.reindex(range(1, cohort.taxonomy.num_labels), fill_value=0).set_axis(list(cohort.taxonomy.names))
    patients = int(cohort.regions["patient"].nunique())
    if patients < len(PARTS):
        raise InputError(
            f"{cohort.folder}: {counted(patients, 'patient')}; a study needs three at least, to train, choose and test"
        )
    present = list(counts.index[counts["instances"] > 0])
    if len(present) < 2:
        raise InputError(
            f"{cohort.folder}: all instances are {present[0] if present else 'to be ignored'}; a study compares "
            "subtypes, so it needs instances of two at least"
        )
    check_patch_size(cohort, cohort.regions, NETWORK_PX)
    windows = stained_windows(cohort)
    shares = stain_shares(patch.image for patch in windows)
    densities = stain_table(windows, "dab", 1).groupby("subtype")["density"].mean()
    corners = table[["y0", "x0", "y1", "x1"]].to_numpy()
    longest = (corners[:, 2:] - corners[:, :2]).max(axis=1)
    sizes = cohort.regions[["height_px", "width_px"]]
    in_parts = [cohort.regions["split"].eq(part).any() for part in PARTS]
    return _Findings(
        cohort=cohort,
        subtypes=counts,
        patients=patients,
        testing=len(cohort.patients("test")) if all(in_parts) else None,
        edges_px=(float(np.median(longest)), float(np.quantile(longest, 0.75))),
        smallest_px=int(sizes.to_numpy().min()),
        background=1 - float(cohort.instances["area_px"].sum() / (sizes["height_px"] * sizes["width_px"]).sum()),
        shares=shares,
        densities={cohort.taxonomy.name_of(int(str(i))): float(d) for i, d in densities.items()},
    )


def _heading(found: _Findings, out: Path) -> Iterator[str]:
    cohort, counts, file = found.cohort, found.subtypes, _line(out.name)
    folder = _line(shlex.quote(str(cohort.folder)))
    yield f"# A first study of {_line(cohort.folder.name)}, written by 'counterstain init' from what it measured there:"
    yield f"# {found.patients:,} patients, {counted(len(cohort), 'region')} at {cohort.mpp:g} um per pixel."
    yield "#"
    total = int(counts["instances"].sum())
    for name, instances, patients in counts[["instances", "patients"]].itertuples(name=None):
        share = f"{instances / total:.0%}"
        yield f"#   {_line(name):<24} {instances:>7,} instances {share:>4} of {counted(patients, 'patient')}"
    yield "#"
    present = counts["instances"][counts["instances"] > 0]
    if present.max() < BALANCED * present.min():
        yield "# The subtypes are nearly balanced already: expect little of balancing them."
    for name in counts.index[counts["patients"] == 1]:
        yield f"# One patient alone has {_line(name)}: nothing can be said of it on other patients."
    yield f"# Would more data help at all?     counterstain headroom {folder} --out headroom"
    yield f"# What will it take?              counterstain study plan {file}"
    yield f"# Run it:                         counterstain study run {file}"
    yield "# What does a setting do?         counterstain config explain diffusion.style (of the recipe), study.repeats"


def _whose(found: _Findings, out: Path, preset: str, *, asked: bool, gpu: bool) -> Iterator[str]:
    folder, name = found.cohort.folder, _line(found.cohort.folder.name or "cohort")
    yield f"name: {_value(name[:80])}"
    if asked:
        yield f"preset: {preset} # as asked for"
    elif gpu:
        yield "preset: best # for one GPU, as there is here; demo = small networks, minutes on a CPU"
    else:
        yield "# There is no GPU here: demo trains small networks on a CPU, to try it. For results: best, on a GPU."
        yield "preset: demo"
    yield "cohort:"
    yield f"  path: {_value(_path(folder, out))}"
    if found.folds is None:
        yield f"  # Its own split, with {found.testing} patients to test on. For cross-validation instead: folds: 5"
        return
    if found.testing is not None:
        yield f"  # Its split has {counted(found.testing, 'patient')} to test on, too few for intervals over patients."
    else:
        yield "  # It has no split."
    yield "  # So all are dealt into folds, and each patient is tested once, by networks trained on others."
    if found.testing is None and found.patients >= 5 * ENOUGH_TO_TEST:
        yield "  # One split is enough for so many, and takes a fifth of the time: counterstain split, then init again."
    yield f"  folds: {found.folds}"


def _arms(found: _Findings, preset: str) -> Iterator[str]:
    yield "# Without synthetic patches: sampled regardless of subtype, or balanced by subtype (the reference)."
    yield "baselines: [tumor, subtype]"
    yield "# Two ways to draw with one trained network: whole patches, or instances redrawn in real surroundings."
    yield "# spade has a training of its own, and did worse than both in our studies (docs/results.md)."
    if found.shares.stain == "eosin":
        yield "# On H&E biopsies no synthetic images helped in our study: look at the headroom first."
    yield "methods: [diffusion, inpainting]"
    amounts = "[1.0]" if preset == "demo" else "[0.5, 1.0, 2.0]"
    yield f"amounts: {amounts} # synthetic patches per real one: 1.0 is +100 %"
    yield "# Asked for by reviewers: rare pixels weighted, rare instances pasted, without any generator."
    yield "# extra_arms: [subtype+weighted, subtype+copypaste]"
    if preset == "demo":
        yield "repeats: 2 # trainings of each arm, with other seeds; 5 for results"
    elif found.folds is None:
        yield "repeats: 5 # trainings of each arm, with other seeds"
    else:
        yield "repeats: 2 # trainings of each arm and fold, with other seeds"


def _recipe(found: _Findings, preset: str) -> Iterator[str]:
    yield "recipe:"
    yield from _on_size(found, preset)
    yield "  diffusion:"
    yield from _on_stain(found)
    styled = found.background >= LEAST_BACKGROUND
    if styled:
        yield "    style: {} # what is relabelled stays in the colours of its slide, of which a mask says nothing"
    else:
        yield f"    # No style, which is read off the background: it is {found.background:.0%} of all pixels."
    yield "    context_share: 0.5 # also learns to redraw instances within given surroundings, for inpainting"
    if styled or found.absent:
        yield "  synthesis:"
    if styled:
        yield "    style: {source: own} # that of the mask's slide"
    if found.absent:
        yield "    # No instance to learn these from, so none is asked for:"
        yield f"    relabel: {{keep: {_value(found.absent)}}}"
    window = load_recipe(preset).segmenter.inference.window_px
    if window is not None and window > found.smallest_px:
        largest = found.smallest_px // NETWORK_PX * NETWORK_PX
        yield f"  segmenter: {{inference: {{window_px: {largest}}}}} # regions are {found.smallest_px} px"


def _on_size(found: _Findings, preset: str) -> Iterator[str]:
    mpp, (median, large), most = found.cohort.mpp, found.edges_px, found.smallest_px // NETWORK_PX * NETWORK_PX
    wanted = math.ceil(AROUND * large / NETWORK_PX) * NETWORK_PX
    size = min(wanted, LARGEST_PX[preset], most)
    yield f"  # Instances are {median * mpp:.0f} um across (median; a quarter of them {large * mpp:.0f} um or more)."
    if size == wanted:
        pass
    elif size == LARGEST_PX[preset]:
        yield f"  # {preset} is made for patches of {size} px at most."
    else:
        yield f"  # The smallest region is {found.smallest_px} px."
    if size < median:
        shrink = 2 ** math.ceil(math.log2(median / size))
        yield f"  # They show parts of instances only; imported at {mpp * shrink:g} um per pixel, they would show more."
    yield f"  size_px: {size} # {size * mpp:g} um"


def _on_stain(found: _Findings) -> Iterator[str]:
    shares = f"{found.shares.brown:.0%} of coloured pixels are brown, {found.shares.pink:.0%} pink"
    if found.shares.stain == "eosin":
        yield f"    # Haematoxylin and eosin ({shares}): subtypes differ in their"
        yield "    # nuclei and architecture, which are drawn anew. If they differ in eosin alone, add:"
        yield "    # counterstain: {other_stain: eosin}"
    elif found.stained_apart:
        means = ", ".join(f"{_line(name)} {density:.2f}" for name, density in found.densities.items())
        yield f"    # Haematoxylin and DAB ({shares}). Subtypes differ in DAB"
        yield f"    # (mean optical density: {means}),"
        yield "    # so what is relabelled keeps its nuclei, and only its stain is redrawn:"
        real = "" if found.cohort.source.get("kind") == "phantom" else ", hidden: filled"
        yield f"    counterstain: {{shows: contrast{real}}}"
    elif found.shares.stain == "dab":
        yield f"    # Haematoxylin and DAB ({shares}), but subtypes hardly differ in DAB,"
        yield "    # so nuclei are drawn anew. If DAB alone tells them apart, add: counterstain: {shows: contrast}"
    else:
        yield f"    # Colours do not tell the stain ({shares}). If a stain alone tells"
        yield "    # subtypes apart, what is relabelled can keep its nuclei: counterstain: {other_stain: dab}, or eosin"


def _path(folder: Path | RemoteFolder, out: Path) -> str:
    """Return where a cohort is, from the study's file if it is near."""
    if isinstance(folder, RemoteFolder):
        return str(folder)
    place, here = folder.resolve(), out.resolve().parent
    near = next((above for above in (here, here.parent) if place.is_relative_to(above)), None)
    if near is None:
        return str(place)
    return Path(*[".."] * (near != here), place.relative_to(near)).as_posix()


def _line(text: Any) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in str(text))


def _value(value: Any) -> str:
    """Write a value as YAML in one line."""
    written = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=math.inf)
    return written.strip().removeprefix("[").removesuffix("]")
