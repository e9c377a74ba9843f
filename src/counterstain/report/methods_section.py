"""What a methods section says of arms that differ by more than their synthetic patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from counterstain.config import build, build_stored
from counterstain.data.sampling import SamplingConfig
from counterstain.data.stains import Stains
from counterstain.errors import ConfigError
from counterstain.generators.descriptions import training_of
from counterstain.generators.methods import METHODS, Method
from counterstain.progress import PERCENT, TIMES, counted
from counterstain.recipe import Recipe, recipe_class
from counterstain.report.formatting import label_of
from counterstain.report.results import StudyRecord
from counterstain.segmentation.segmenter_config import ADAM_BETAS, SegmenterConfig
from counterstain.study.arms import VARIANTS, Variant, parse_arm
from counterstain.study.config import VariantsConfig

STAINS: dict[Stains, str] = {
    "channels": "each colour channel",
    "dab": "haematoxylin and of DAB",
    "eosin": "haematoxylin and of eosin",
    "macenko": "each of a patch's two stains (Macenko et al. 2009)",
}


def variants_paragraph(arms: Sequence[str], variants: VariantsConfig) -> str:
    """Say what the variants of a study's arms are (``+stain``, ``+mixup``, ...); empty where no arm has any."""
    used = _used(arms)
    return " ".join(_SENTENCES[name](variants) for name in VARIANTS.values() if name in used)


def shares_of(target: Mapping[str, float]) -> str:
    """Say how often each subtype is chosen."""
    return f"in the proportions {', '.join(f'{name} {share:g}' for name, share in target.items())}"


def _used(arms: Sequence[str]) -> set[Variant]:
    used: set[Variant] = set()
    for arm in arms:
        try:
            used.update(parse_arm(arm).variants)
        except ConfigError:  # of results that another version wrote
            continue
    return used


def _weighted(variants: VariantsConfig) -> str:
    return (
        "In arms with a weighted loss, pixels of a subtype weighed by its inverse frequency in training to the power "
        f"of {variants.weighted:g}, the mean weight of the tissue class staying that of background."
    )


def _stain(variants: VariantsConfig) -> str:
    return (
        f"In arms with stain jitter, the optical density of {STAINS[variants.stains]} was scaled and shifted at random "
        f"(standard deviation {variants.stain:g})."
    )


def _mixup(variants: VariantsConfig) -> str:
    return (
        "In arms with mixup (Zhang et al. 2018), the patches of a batch were blended in pairs, with shares from "
        f"Beta({variants.mixup:g}, {variants.mixup:g})."
    )


def _copypaste(variants: VariantsConfig) -> str:
    config = variants.copypaste
    often = {"inverse": "in inverse proportion to its instances in training", "uniform": "equally often"}
    target = often[config.target] if isinstance(config.target, str) else shares_of(config.target)
    return (
        f"In arms with copy-paste (Ghiasi et al. 2021), {100 * config.share:g}{PERCENT} of the real patches got up to "
        f"{counted(config.instances, 'instance')} of other training regions on their background, each subtype {target}."
    )


def _filtered(variants: VariantsConfig) -> str:
    config = variants.filtered
    return (
        "In filtered arms, a generated image was kept if a classifier of the real training patches agreed with the "
        f"asked subtype in {100 * config.agreement:g}{PERCENT} of its instances of {config.min_area_px:,} pixels or "
        f"more; else it was drawn again, for up to {counted(config.masks, 'mask')}."
    )


def _pretrain(variants: VariantsConfig) -> str:
    return (
        f"In arms with pre-training, the first {100 * variants.pretrain:g}{PERCENT} of the steps saw synthetic patches "
        "alone, the others real ones alone."
    )


def _anneal(_: VariantsConfig) -> str:
    return "In annealed arms, the share of synthetic patches fell to 0 in training, as many being seen as without it."


_SENTENCES: dict[Variant, Callable[[VariantsConfig], str]] = {
    "weighted": _weighted,
    "stain": _stain,
    "mixup": _mixup,
    "copypaste": _copypaste,
    "filtered": _filtered,
    "pretrain": _pretrain,
    "anneal": _anneal,
}


# A methods section to copy: every setting that a journal asks for, in sentences, from the resolved configuration.

ARCHITECTURES = {
    "unet": "U-Net (Ronneberger et al. 2015)",
    "unetplusplus": "U-Net++ (Zhou et al. 2018)",
    "manet": "MA-Net (Fan et al. 2020)",
    "fpn": "feature pyramid network (Lin et al. 2017)",
    "linknet": "LinkNet (Chaurasia & Culurciello 2017)",
    "deeplabv3plus": "DeepLabV3+ (Chen et al. 2018)",
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

    Parameters
    ----------
    study : StudyRecord
        Its ``config`` has ``recipe`` and ``study``; what is lacking there is left out.
    starts : sequence of str
        What the trainings recorded that their encoders started from; without any, the recipe is believed.
    """
    recipe = _recipe(study)
    if recipe is None:
        return (_data(study), _software(study))
    methods = [METHODS[name] for name in METHODS if _uses(study, name)]
    parts = [_data(study), _patches(study, recipe)]
    if methods:
        parts += [_relabelling(study, recipe), *generator_paragraphs(recipe, methods), _mixing(study, recipe)]
    parts.append(_segmenter(study, recipe, starts))
    if variants := _variants(study):
        parts.append(variants)
    return (*parts, _software(study))


def generator_paragraphs(recipe: Recipe, methods: Sequence[Method]) -> list[str]:
    """Return a paragraph for each training and method that a study uses."""
    told: dict[str, str] = {}
    for method in methods:
        for training in method.trainings:
            if training.describe is not None:
                told[training.stage] = training.describe(recipe)
        if method.describe is not None:
            told[f"drawing {method.name}"] = method.describe(recipe)
    return list(told.values())


def _recipe(study: StudyRecord) -> Recipe | None:
    try:
        return build_stored(recipe_class(), study.config.get("recipe", {}))
    except ConfigError:  # of another version: its names would be read wrongly
        return None


def _variants(study: StudyRecord) -> str:
    try:
        return variants_paragraph(study.arms, build(VariantsConfig, study.config.get("study", {}).get("variants", {})))
    except ConfigError:
        return ""


def _uses(study: StudyRecord, method: str) -> bool:
    return any(arm.split("+")[0] == method for arm in study.arms)


def _data(study: StudyRecord) -> str:
    cohort = study.cohort
    total = sum(cohort.patients.values())
    parts = {"train": "training", "val": "validation", "test": "test"}
    dealt = ", ".join(f"{count} for {parts.get(part, part)}" for part, count in cohort.patients.items())
    regions = f" with {counted(cohort.regions, 'annotated region')}" if cohort.regions else ""
    mpp = f" at {cohort.mpp:g} µm per pixel" if cohort.mpp else ""
    source = f" (source: {cohort.source})" if cohort.source else ""
    tissue = study.taxonomy.tissue_class
    return (
        f"Data: {counted(total, 'patient')}{regions}{mpp}{source}. They were split by patient ({dealt}); no patient is "
        f"in two parts. Instances of {tissue} were annotated with the subtypes {', '.join(study.taxonomy.names)}."
    )


def _patches(study: StudyRecord, recipe: Recipe) -> str:
    mpp = study.cohort.mpp
    size = f" ({recipe.size_px * mpp:g} µm)" if mpp else ""
    sampling = recipe.segmenter.sampling
    return (
        f"Patches: all networks were trained on patches of {recipe.size_px} {TIMES} {recipe.size_px} pixels{size}; "
        f"segmenters on patches cut anew for every step. {_share(sampling.background_share)} of these were centred on "
        f"a pixel of background, the others on {study.taxonomy.tissue_class}: in the arm tumor from any instance, a "
        "slide being drawn first; in all other arms a subtype was drawn uniformly, then a slide that has it, then one "
        "of its pixels there. "
        f"{augmentation_sentence(sampling)}"
    )


def augmentation_sentence(sampling: SamplingConfig) -> str:
    """Say how patches are varied."""
    ways = {"mirrored": sampling.flip, "turned by 0, 90, 180 or 270 degrees": sampling.quarter_turns}
    turned = [way for way, on in ways.items() if on]
    jitter = (
        f" The optical density of {STAINS[sampling.stains]} was scaled and shifted at random (standard deviation "
        f"{sampling.stain_jitter:g})."
        if sampling.stain_jitter
        else " Colours were not changed."
    )
    return (f"Patches were {' and '.join(turned)} at random." if turned else "Patches were not turned.") + jitter


def _centred(sampling: SamplingConfig) -> str:
    way = {"tumor": "any instance", "subtype": "each subtype equally often"}[sampling.mode]
    return f"{_share(sampling.background_share)} centred on background, the others on {way}"


def _share(share: float) -> str:
    return f"{100 * share:g}{PERCENT}"


def _relabelling(study: StudyRecord, recipe: Recipe) -> str:
    synthesis = recipe.synthesis
    relabel = synthesis.relabel
    target = "all subtypes being equally likely" if relabel.target == "uniform" else shares_of(relabel.target)
    kept = f" Instances of {', '.join(relabel.keep)} kept their label." if relabel.keep else ""
    basis = "number of instances" if relabel.balance == "count" else "area"
    return (
        f"Relabelling: masks of training patches were taken ({_centred(synthesis.sampling)}), and every instance of "
        f"{study.taxonomy.tissue_class} got a new subtype, {target}; shares are of the {basis}, kept in every block of "
        f"64 patches.{kept} All methods drew the same masks{STYLES[synthesis.style.source]}. {_filter(study, recipe)}"
    )


def _filter(study: StudyRecord, recipe: Recipe) -> str:
    synthesis = recipe.synthesis
    if synthesis.reject == "none":
        return "No image was refused for its brightness."
    rates = ", ".join(
        f"{method} {100 * count.rejected / count.drawn:.1f}{PERCENT}"
        for method, count in study.filter.items()
        if count.drawn and method in METHODS  # of filtered sets a judge has its say as well
    )
    return (
        f"For every method an image was refused and drawn again, at most {synthesis.attempts - 1} times, where its "
        f"instances had a mean grey level above {synthesis.white_level:g} of 255 (nearly white); refused: "
        f"{rates or 'none were drawn'}."
    )


def _mixing(study: StudyRecord, recipe: Recipe) -> str:
    mixing = recipe.segmenter.mixing
    steps = (
        "All arms took the same number of optimiser steps."
        if mixing.steps == "equal"
        else "An arm took 1 + a times as many optimiser steps as its baseline."
    )
    return (
        f"Mixing: an amount of +100{PERCENT} is {mixing.epoch_patches:,} synthetic patches. In an arm of amount a "
        "(1 = +100\N{NO-BREAK SPACE}%) each training patch was synthetic with probability a / (1 + a), drawn uniformly "
        f"from the set, and varied like a real one.{_only(study)} {steps}"
    )


def _only(study: StudyRecord) -> str:
    found = [label_of(arm) for arm in study.arms if "+only" in arm]
    return f" {' and '.join(found)} trained on synthetic patches alone." if found else ""


def _segmenter(study: StudyRecord, recipe: Recipe, starts: Sequence[str]) -> str:
    config = recipe.segmenter
    asked = "random" if config.encoder_weights is None else config.encoder_weights
    weights = " or ".join(_start(start) for start in dict.fromkeys(starts or [asked]))
    window, overlap = config.inference.window_px, config.inference.overlap_px
    windows = (
        f"windows of {window or recipe.size_px} pixels that overlap by "
        f"{f'{overlap} pixels' if overlap is not None else 'a quarter'} at least"
    )
    return (
        f"Segmentation: a {ARCHITECTURES[config.architecture]} with the encoder {config.encoder} ({weights}) and two "
        f"outputs, background and {study.taxonomy.tissue_class}, {training_of(config.training)}, minimising "
        f"{config.dice_weight:g} {TIMES} Dice loss + {config.cross_entropy_weight:g} {TIMES} cross-entropy. "
        f"{_optimiser(config)} Hyper-parameters were the same in all arms. Each arm was trained "
        f"{_times(study.repeats)}; repeat r has the same initial weights and the same order of data in all arms. "
        f"Regions were segmented in {windows}, blended."
    )


def _start(start: str) -> str:
    """Say what the encoder started from, as trainings record it."""
    kind, _, remark = start.partition(" (")
    words = "initialised at random" if kind == "random" else f"from {kind} weights"
    return f"{words}, as {remark.rstrip(')')}" if remark else words


def _times(repeats: int) -> str:
    return {1: "once", 2: "twice"}.get(repeats, f"{repeats} times, with other seeds")


def _optimiser(config: SegmenterConfig) -> str:
    name = {"adam": "Adam", "adamw": "AdamW"}[config.optimizer]
    decay = f", weight decay {config.weight_decay:g}" if config.weight_decay else ""
    falls = ", falling to 0 along a cosine" if config.lr_schedule == "cosine" else ""
    kept = (
        f"An exponential average of the weights (decay {config.ema_decay:g}) was"
        if config.ema_decay
        else "The last weights were"
    )
    average = f" {kept} evaluated."
    return f"{name} (betas {_pair(ADAM_BETAS)}{decay}), learning rate {config.lr:g}{falls}.{average}"


def _pair(values: Sequence[Any]) -> str:
    return " and ".join(f"{value:g}" for value in values)


def _software(study: StudyRecord) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in study.versions.items())
    device = f" on {study.device}" if study.device else ""
    return f"Software: {versions}{device}." if versions else f"Software: counterstain{device}."
