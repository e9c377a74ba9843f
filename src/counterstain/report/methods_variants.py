"""What a methods section says of arms that differ by more than their synthetic patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from counterstain.data.stains import Stains
from counterstain.errors import ConfigError
from counterstain.report.numbers import PERCENT, counted
from counterstain.study.arms import VARIANTS, Variant, parse_arm
from counterstain.study.variants import VariantsConfig

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
