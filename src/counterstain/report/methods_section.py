"""A methods section to copy: a paragraph per part, and a table of all settings, from the resolved configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from counterstain.config import build, build_stored
from counterstain.data.sampling import CopyPasteConfig, SamplingConfig
from counterstain.data.stains import Stains
from counterstain.errors import ConfigError
from counterstain.generators.methods import METHODS
from counterstain.progress import PERCENT, TIMES, counted
from counterstain.recipe import Recipe, recipe_class
from counterstain.report.results import StudyRecord
from counterstain.report.tables import Table, plain_table, rate
from counterstain.segmentation.segmenter_config import ADAM_BETAS
from counterstain.study.arms import Arm, Variant
from counterstain.study.config import VariantsConfig
from counterstain.study.records import departures, paired_by

STAINS: dict[Stains, str] = {
    "channels": "each colour channel",
    "dab": "haematoxylin and DAB",
    "eosin": "haematoxylin and eosin",
    "macenko": "each of a patch's two stains (Macenko et al. 2009)",
}
ARCHITECTURES = {
    "unet": "U-Net (Ronneberger et al. 2015)",
    "unetplusplus": "U-Net++ (Zhou et al. 2018)",
    "manet": "MA-Net (Fan et al. 2020)",
    "fpn": "feature pyramid network (Lin et al. 2017)",
    "linknet": "LinkNet (Chaurasia & Culurciello 2017)",
    "deeplabv3plus": "DeepLabV3+ (Chen et al. 2018)",
    "dpt": "DPT (Ranftl et al. 2021)",
}
STYLES = {
    "none": "",
    "own": ", each in the style of its own slide",
    "other": ", each in the style of another training slide",
    "mixture": ", each in a style between those of two training slides",
    "beyond": ", each in a style beyond those of two training slides",
}


def methods_paragraphs(study: StudyRecord, starts: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the methods of a study, without its statistics, a paragraph each.

    What is missing in ``study.config`` is left out. ``starts`` are the initial weights of the encoder that trainings
    recorded; without any, those of the recipe are told.
    """
    recipe = _recipe(study)
    if recipe is None:
        return (_data(study), _software(study))
    parts = [_data(study), _patches(study, recipe)]
    if study.methods:
        parts += [_relabelling(study, recipe), *_generators(study, recipe), _mixing(study, recipe)]
    parts += [_segmenter(study, recipe, starts), _variants(study), _software(study)]
    return tuple(part for part in parts if part)


def settings_table(study: StudyRecord) -> Table | None:
    """Return the settings of everything that the study trained and drew; None if this version cannot read them."""
    recipe = _recipe(study)
    if recipe is None:
        return None
    stages = dict.fromkeys(training.stage for name in study.methods for training in METHODS[name].trainings)
    groups = [*stages, *(["synthesis"] if study.methods else []), "segmenter"]
    plain = recipe.model_dump(mode="json")
    rows = [row for group in groups for row in _flat(group, plain.get(group) or {})]
    return plain_table("Settings; off = not used", ("Setting", "Value"), [("size_px", recipe.size_px), *rows])


def _flat(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(f"{key}.{name}", inner)
    elif isinstance(value, bool):
        yield key, "yes" if value else "no"
    elif isinstance(value, list):
        yield key, ", ".join(map(str, value)) or "none"
    else:
        yield key, "off" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _recipe(study: StudyRecord) -> Recipe | None:
    try:
        return build_stored(recipe_class(), study.config.get("recipe", {}))
    except ConfigError:  # of another version: its names would be misread
        return None


def _data(study: StudyRecord) -> str:
    cohort = study.cohort
    names = {"train": "training", "val": "validation", "test": "test"}
    split = ", ".join(f"{count} for {names.get(part, part)}" for part, count in cohort.patients.items())
    regions = f" with {counted(cohort.regions, 'annotated region')}" if cohort.regions else ""
    mpp = f" at {cohort.mpp:g} µm per pixel" if cohort.mpp else ""
    source = f" (source: {cohort.source})" if cohort.source else ""
    parts = f"They were split by patient ({split}); no patient is in more than one split."
    return (
        f"Data: {counted(sum(cohort.patients.values()), 'patient')}{regions}{mpp}{source}. "
        f"{_folds(study) if study.folds else parts} Instances of {study.taxonomy.tissue_class} were annotated with the "
        f"subtypes {', '.join(study.taxonomy.names)}."
    )


def _folds(study: StudyRecord) -> str:
    """Say how the patients of a cross-validation were dealt out."""
    ranges = {}
    for part in study.cohort.patients:
        sizes = [len(fold[part]) for fold in study.folds]
        ranges[part] = " to ".join(dict.fromkeys((str(min(sizes)), str(max(sizes)))))
    folds = f"the patients were dealt into {counted(len(study.folds), 'fold')}, stratified by score"
    return (
        f"Cross-validation: {'each patient was a fold' if ranges['test'] == '1' else folds}, so that each was tested "
        f"exactly once, by networks trained without that patient. In each fold, all networks were trained on "
        f"{ranges['train']} of the other patients and {ranges['val']} validated; folds shared no network. Counts of "
        f"all folds were pooled: the test set is all {counted(study.cohort.patients['test'], 'patient')}."
    )


def _patches(study: StudyRecord, recipe: Recipe) -> str:
    size = f" ({recipe.size_px * study.cohort.mpp:g} µm)" if study.cohort.mpp else ""
    sampling = recipe.segmenter.sampling
    return (
        f"Patches: all networks were trained on patches of {recipe.size_px} {TIMES} {recipe.size_px} pixels{size}; "
        f"for segmenters, new ones were cut at every step. {_share(sampling.background_share)} of them were centred on "
        f"a pixel of background, the others on {study.taxonomy.tissue_class}: in the arm tumor on any instance, after "
        "drawing a slide at random; in all other arms on a pixel of a subtype drawn uniformly, after drawing a slide "
        f"that contains it. {_augmentation(sampling)}"
    )


def _augmentation(sampling: SamplingConfig) -> str:
    ways = {"mirrored": sampling.flip, "turned by 0, 90, 180 or 270 degrees": sampling.quarter_turns}
    turned = [way for way, on in ways.items() if on]
    jitter = " Colours were not changed."
    if sampling.stain_jitter:
        jitter = (
            f" The optical density of {STAINS[sampling.stains]} was scaled and shifted at random (standard deviation "
            f"{sampling.stain_jitter:g})."
        )
    return (f"Patches were {' and '.join(turned)} at random." if turned else "Patches were not turned.") + jitter


def _share(share: float) -> str:
    return f"{100 * share:g}{PERCENT}"


def _proportions(target: Mapping[str, float]) -> str:
    return f"in the proportions {', '.join(f'{name} {share:g}' for name, share in target.items())}"


def _relabelling(study: StudyRecord, recipe: Recipe) -> str:
    synthesis, relabel = recipe.synthesis, recipe.synthesis.relabel
    target = "all subtypes being equally likely" if relabel.target == "uniform" else _proportions(relabel.target)
    kept = f" Instances of {', '.join(relabel.keep)} kept their label." if relabel.keep else ""
    basis = "number of instances" if relabel.balance == "count" else "area"
    centred = {"tumor": "any instance", "subtype": "each subtype equally often"}[synthesis.sampling.mode]
    return (
        f"Relabelling: masks of training patches were taken ({_share(synthesis.sampling.background_share)} centred on "
        f"background, the others on {centred}), and every instance of {study.taxonomy.tissue_class} was given a new "
        f"subtype, {target}; proportions refer to the {basis} and hold within every block of 64 patches.{kept} "
        f"All methods drew the same masks{STYLES[synthesis.style.source]}. {_filter(study, recipe)}"
    )


def _filter(study: StudyRecord, recipe: Recipe) -> str:
    synthesis = recipe.synthesis
    if synthesis.reject == "none":
        return "No image was rejected for its brightness."
    rates = ", ".join(
        f"{name} {rate(count.rejected, count.drawn)}"
        for name, count in study.filter.items()
        if count.drawn and name in METHODS  # in filtered sets a judge rejects images as well
    )
    return (
        f"For every method, images whose instances had a mean grey level above {synthesis.white_level:g} of 255 "
        f"(nearly white) were rejected and redrawn, at most {counted(synthesis.attempts - 1, 'time')}; rejected: "
        f"{rates or 'none were drawn'}."
    )


def _generators(study: StudyRecord, recipe: Recipe) -> list[str]:
    told: dict[str, str] = {}
    for method in (METHODS[name] for name in study.methods):
        for training in method.trainings:
            if training.describe is not None:
                told[training.stage] = training.describe(recipe)
        if method.describe is not None:
            told[f"drawing {method.name}"] = method.describe(recipe)
    return list(told.values())


def _mixing(study: StudyRecord, recipe: Recipe) -> str:
    mixing = recipe.segmenter.mixing
    only = [arm.label for arm in study.arms if arm.only]
    steps = (
        "All arms were trained for the same number of optimiser steps."
        if mixing.steps == "equal"
        else "An arm was trained for 1 + a times as many optimiser steps as its baseline."
    )
    return (
        f"Mixing: an amount of +100{PERCENT} is {mixing.epoch_patches:,} synthetic patches. In an arm of amount a "
        f"(1 = +100{PERCENT}) each training patch was synthetic with probability a / (1 + a), drawn uniformly "
        f"from the set, and augmented like a real one. {steps}"
        + (f" {' and '.join(only)} were trained on synthetic patches only." if only else "")
    )


def _segmenter(study: StudyRecord, recipe: Recipe, starts: Sequence[str]) -> str:
    config = recipe.segmenter
    requested = "random" if config.encoder_weights is None else config.encoder_weights
    weights = " or ".join(_start(start) for start in dict.fromkeys(starts or [requested]))
    windows = config.inference.windows(recipe.size_px)
    average = "An exponential average of the weights was" if config.ema_decay else "The last weights were"
    times = {1: "once", 2: "twice"}.get(study.repeats, f"{study.repeats} times, with different seeds")
    return (
        f"Segmentation: a {ARCHITECTURES[config.architecture]} with the encoder {config.encoder} ({weights}) and two "
        f"outputs, background and {study.taxonomy.tissue_class}, was trained for {config.training.steps:,} steps of "
        f"{config.training.batch_size} patches with {config.optimizer.replace('adam', 'Adam').replace('mw', 'mW')} "
        f"(betas {ADAM_BETAS[0]:g} and {ADAM_BETAS[1]:g}, learning rate {config.lr:g}), minimising "
        f"{config.dice_weight:g} {TIMES} Dice loss + {config.cross_entropy_weight:g} {TIMES} cross-entropy. {average} "
        f"evaluated. Hyper-parameters were the same in all arms. Each arm was trained {times}; repeat r has the same "
        f"initial weights and the same order of data in all arms. Regions were segmented in windows of "
        f"{windows.size_px} pixels that overlap by at least {windows.overlap_px} pixels, blended."
    )


def _start(start: str) -> str:
    kind, _, remark = start.partition(" (")
    words = "initialised at random" if kind == "random" else f"from {kind} weights"
    return f"{words}; {remark.rstrip(')')}" if remark else words


def _variants(study: StudyRecord) -> str:
    try:
        config = build(VariantsConfig, study.config.get("study", {}).get("variants", {}))
    except ConfigError:  # of another version
        return ""
    used = {variant for arm in study.arms for variant in arm.variants}
    sentences = [sentence(config) for variant, sentence in VARIANT_SENTENCES.items() if variant in used]
    if any(arm.auto for arm in study.arms):
        sentences.append(_auto(config, study))
    return " ".join(sentences)


def _auto(variants: VariantsConfig, study: StudyRecord) -> str:
    def said(arm: Arm) -> str:
        found, kind = study.amounts[arm.name], (arm.set_name, arm.variants)
        fixed = (other for other in study.arms if (other.set_name, other.variants) == kind and not other.only)
        same = [f" (one arm with {other.label} in corrections)" for other in fixed if {other.amount} == {*found}]
        return f"{arm.label}: {', '.join(f'{100 * amount:g}{PERCENT}' for amount in found)}{''.join(same[:1])}"

    chosen = "; ".join(said(arm) for arm in study.arms if arm.name in study.amounts)
    return (
        f"The amount of arms +auto was chosen by cross-fitting: {variants.cross_fit} times, generators and segmenters "
        "were trained without a part of the training patients and tested on it and on the validation patients. The "
        "smallest amount was taken whose mean Dice over patients was at most one standard error of the difference "
        "below the best (one-standard-error rule, Breiman et al. 1984); test patients took no part."
        + (f" Chosen: {chosen}." if chosen else "")
    )


def _often(config: CopyPasteConfig) -> str:
    often = {"inverse": "in inverse proportion to its instances in training", "uniform": "equally often"}
    return often[config.target] if isinstance(config.target, str) else _proportions(config.target)


def _layouts(variants: VariantsConfig) -> str:
    config = variants.layouts
    return (
        "Arms with new layouts: all masks were centred on background, and up to "
        f"{counted(config.instances, 'instance')} of other training slides, each subtype "
        f"{_often(config)}, were moved onto the background of {_share(config.share)} of them and drawn there in "
        "the style of the mask's own slide (after copy-paste, Ghiasi et al. 2021)."
    )


def _copypaste(variants: VariantsConfig) -> str:
    config = variants.copypaste
    return (
        f"Arms with copy-paste (Ghiasi et al. 2021): up to {counted(config.instances, 'instance')} of other training "
        f"regions were pasted onto the background of {_share(config.share)} of the real patches, each subtype "
        f"{_often(config)}."
    )


def _filtered(variants: VariantsConfig) -> str:
    config = variants.filtered
    return (
        "Filtered arms: a generated image was kept if a classifier trained on real patches agreed with the requested "
        f"subtype in {_share(config.agreement)} of its instances of at least {config.min_area_px:,} pixels; otherwise "
        f"it was redrawn, for up to {counted(config.masks, 'mask')}."
    )


VARIANT_SENTENCES: dict[Variant, Callable[[VariantsConfig], str]] = {
    "weighted": lambda v: (
        "Arms with a weighted loss: pixels were weighted by the inverse frequency of their subtype in training to the "
        f"power of {v.weighted:g}, with the mean weight of the tissue class equal to that of background."
    ),
    "stain": lambda v: (
        f"Arms with stain jitter: the optical density of {STAINS[v.stains]} was scaled and shifted at random (standard "
        f"deviation {v.stain:g})."
    ),
    "mixup": lambda v: (
        "Arms with mixup (Zhang et al. 2018): the patches of a batch were blended in pairs, with proportions from "
        f"Beta({v.mixup:g}, {v.mixup:g})."
    ),
    "copypaste": _copypaste,
    "layouts": _layouts,
    "kept": lambda _: (
        "Where own instances were kept, a patch's other instances kept their subtypes and, with inpainting, their "
        "pixels."
    ),
    "hard": lambda v: (
        f"Arms with hard masks first: segmenters of the arm subtype were trained {v.cross_fit} times without a part of "
        "the training patients and tested on it. Instances were given subtypes in proportion to the share of each "
        "subtype's pixels that was missed, and masks were cut out of training slides in proportion to their rank by "
        "the share of wrong pixels (Yang et al. 2023; feedback of a classifier: Hemmat et al. 2024)."
    ),
    "filtered": _filtered,
    "novel": lambda v: (
        "Novel arms: a generated image was redrawn if, in its texture, it stood out by its similarity to one training "
        f"patient more than {_share(1 - v.novel)} of real patches do by another patient."
    ),
    "reviewed": lambda _: (
        "Reviewed arms: synthetic patches that a person had rejected were left out; the others, also those without a "
        "decision, made up the same share of the training."
    ),
    "pretrain": lambda v: (
        f"Arms with pre-training: the first {_share(v.pretrain)} of the steps used only synthetic patches, the rest "
        "only real ones."
    ),
    "anneal": lambda _: (
        "Annealed arms: the share of synthetic patches fell to 0 during training, with the same total number of "
        "synthetic patches."
    ),
    "masked": lambda v: (
        "Masked arms (Yang et al. 2023): synthetic pixels were ignored on which the segmenter of the arm subtype of "
        f"the same repeat had a loss above {v.masked:g} times its mean on real training pixels of the same label."
    ),
    "relabelled": lambda v: (
        f"Arms with relabelled borders: in the second half of the training, labels up to {v.relabelled:g} µm from the "
        "border of a synthetic instance followed a moving average of the segmenter's own weights (Tarvainen & Valpola "
        "2017) where its probability of either class was at least 0.9."
    ),
}


def _software(study: StudyRecord) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in study.versions.items()) or "counterstain"
    return f"Software: {versions}{f' on {study.device}' if study.device else ''}."


def fairness_sentences(table: pd.DataFrame, study: StudyRecord) -> tuple[str, ...]:
    """Say what arms had in common, then in what they differ; empty if the study recorded nothing."""
    return (*_in_common(table, study), *(f"Differs: {line}." for line in departures(table))) if len(table) else ()


def _in_common(table: pd.DataFrame, study: StudyRecord) -> Iterator[str]:
    values = {column: list(dict.fromkeys(table[column].tolist())) for column in table.columns}
    equal = {column: found[0] for column, found in values.items() if len(found) == 1}
    if {"steps", "batch_size"} <= equal.keys():
        yield (
            f"Equal optimiser steps: every segmenter ({len(table)}) was trained for {equal['steps']:,} steps of "
            f"{equal['batch_size']} patches, so no arm benefits from more updates."
        )
    if "augmentation" in equal:
        yield f"Equal augmentation of real and synthetic patches in all arms: {equal['augmentation']}."
    if "settings" in equal:
        yield "Equal settings of network, losses and optimiser in all arms."
    if all(len(set(rows["seed"].tolist())) == 1 for _, rows in table.groupby(paired_by(table))):
        repeats = counted(len(values["repeat"]), "repeat")
        repeats += f" and {counted(len(values['fold']), 'fold')}" if "fold" in values else ""
        yield f"Equal seeds: within each of {repeats} all arms have the same initial weights and order of real patches."
    yield from _filters_of_sets(table[table["synthetic_patches"] > 0], study)


def _filters_of_sets(table: pd.DataFrame, study: StudyRecord) -> Iterator[str]:
    """Say how many images were rejected, for the largest amount of each set that an arm uses."""
    names = {arm.name: arm.set_name or arm.name for arm in study.arms}
    table = table.assign(set=[names.get(arm, drawn) for arm, drawn in table[["arm", "synthetic_set"]].to_numpy()])
    largest = table.sort_values("synthetic_patches").drop_duplicates(
        ["filter", "set", *paired_by(table)[1:]], keep="last"
    )
    largest = largest.groupby(["filter", "set"], sort=False, as_index=False)[["drawn", "rejected"]].sum()
    rates: dict[str, list[str]] = {}
    for row in largest.to_dict("records"):
        name, drawn, rejected = row["set"], row["drawn"], row["rejected"]
        told = f"{name} {rejected:,} of {drawn:,} images ({rate(rejected, drawn)})"
        rates.setdefault(row["filter"], []).append(told)
    which = "all synthetic sets" if len(rates) == 1 else "these sets"
    for name, of_sets in rates.items():
        yield f"The same filter for {which} ({name}); rejected: {', '.join(of_sets)}."
