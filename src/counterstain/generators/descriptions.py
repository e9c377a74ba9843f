"""How each generator is described in a methods section and in the data sheets of its sets.

Paragraphs say what was done; a table of the report lists every setting with its value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from counterstain.generators import diffusion_config, spade_config
from counterstain.generators.diffusion_config import NUCLEUS_UM, CounterstainConfig
from counterstain.progress import PERCENT, TIMES

SAMPLERS = {
    "ddim": "DDIM (Song et al. 2021)",
    "dpmsolver++": "DPM-Solver++ (Lu et al. 2022)",
    "unipc": "UniPC (Zhao et al. 2023)",
    "few_step": "a distilled network (Salimans & Ho 2022)",
}
PREDICTIONS = {"epsilon": "noise", "v_prediction": "velocity", "sample": "clean latents"}
LOSSES = {"l1": "L1 distance", "l2": "squared distance", "min-snr": "squared distance weighted by min(SNR, 5)"}
STYLES = {
    "own": "the style of its own slide",
    "other": "the style of another training slide",
    "mixture": "a style between those of two training slides",
    "beyond": "a style beyond those of two training slides",
}


def spade(recipe: Any) -> str:
    """Describe SPADE and its training."""
    config, style = recipe.spade, recipe.synthesis.style
    terms = {
        "feature matching": spade_config.FEATURE_WEIGHT,
        "VGG19 features": config.vgg_weight,
        "L1": config.l1_weight,
        "Kullback-Leibler": spade_config.KL_WEIGHT if config.use_vae else 0.0,
    }
    latent = "random latent codes" if style.source == "none" else "the latent code of a patch with the requested style"
    borders = "instance borders" if config.edge_channel else ""
    given = _listed("one-hot masks", borders, "pixel noise" if config.noise_channels else "")
    return (
        f"SPADE (Park et al. 2019) {'with' if config.use_vae else 'without'} its variational encoder received "
        f"{given}.{_counterstain(config.counterstain)} Generator and discriminator were trained with Adam "
        f"(betas {_pair(spade_config.ADAM_BETAS)}), minimising the hinge loss{_weighted(terms)}.{_average(config)} "
        f"Images were drawn with {latent if config.use_vae else 'no latent code'}."
    )


def autoencoder(recipe: Any) -> str:
    """Describe the first stage of latent diffusion."""
    config = recipe.autoencoder
    start = (
        f"First stage of latent diffusion (Rombach et al. 2022): images were downsampled {config.factor} times to "
        f"{config.latent_channels} latent channels"
    )
    if config.kind == "linear":
        return f"{start}, the principal components of blocks of {config.factor} {TIMES} {config.factor} pixels."
    if config.pretrained is not None:
        return f"{start} by a published autoencoder ({config.pretrained}), which was not trained further."
    kind = {"vq": "a vector-quantised autoencoder", "kl": "a variational autoencoder"}[config.kind]
    losses = _weighted({"LPIPS": config.lpips_weight, "adaptive patch GAN": config.adversarial_weight})
    return f"{start} by {kind}, trained with Adam (betas {_pair(diffusion_config.ADAM_BETAS)}), minimising L1{losses}."


def diffusion(recipe: Any) -> str:
    """Describe the denoiser, its training and its sampler."""
    config, sampler = recipe.diffusion, recipe.diffusion.sampler
    guided = f"classifier-free guidance of {sampler.guidance:g} (Ho & Salimans 2022)"
    style = (
        " It was also given the style of the patch's slide: statistics of the background's optical density and a "
        "learned code, averaged over other patches of the slide."
    )
    context = (
        f" In {100 * config.context_share:g}{PERCENT} of the samples it received the latents around some instances "
        "as extra channels, as in inpainting."
    )
    return (
        "Denoiser: a U-Net received the one-hot mask, resized to the latents, as extra channels."
        f"{_counterstain(config.counterstain)}{'' if config.style is None else style} It was trained with AdamW to "
        f"predict the {PREDICTIONS[config.noise.prediction]}, minimising the {LOSSES[config.loss]}.{_average(config)}"
        f"{context if config.context_share else ''} Images were drawn by {SAMPLERS[sampler.name]} in "
        f"{sampler.steps} steps, {guided if sampler.guidance != 1 else 'without guidance'}."
    )


def inpainting(recipe: Any) -> str:
    """Describe how instances are redrawn."""
    config = recipe.diffusion.inpainting
    wide = f", widened by {config.dilation_px} pixels" if config.dilation_px else ""
    kept = (
        "outside the instances the original pixels were restored"
        if config.composite
        else "the whole image was decoded by the first stage"
    )
    again = (
        f" Each run of {config.jump_length} steps was repeated {config.resamples} times (RePaint, Lugmayr et al. 2022)."
    )
    start = f" Drawing started from the original, noised to {config.strength:g} of the schedule."
    return (
        f"Inpainting: the same denoiser redrew the relabelled instances{wide}; the other latents were those of the "
        f"original, noised to the same level at each step, and {kept}."
        f"{again if config.resamples > 1 else ''}{start if config.start == 'original' else ''}"
    )


def oracle(_: Any) -> str:
    """Describe the phantom's renderer."""
    return "Oracle: images were drawn by the phantom's own renderer, a ceiling that no real cohort has."


def _counterstain(shown: CounterstainConfig | None) -> str:
    if shown is None:
        return ""
    other = {"dab": "DAB", "eosin": "eosin"}[shown.other_stain]
    width = f"{NUCLEUS_UM:g} µm" if shown.local_px is None else f"{shown.local_px:g} pixels"
    unit = {"structure": "units of the local standard deviation", "contrast": "optical density"}[shown.shows]
    filled = f", filled in from around where {other} hides it" if shown.hidden == "filled" else ""
    return (
        f" It also received the haematoxylin of the real patch, unmixed from {other} with the colours of Ruifrok & "
        f"Johnston (2001){filled}, as the difference from its surroundings (Gaussian of {width}) in {unit}, so that "
        "relabelled instances keep their nuclei."
    )


def _pair(values: tuple[float, float]) -> str:
    return f"{values[0]:g} and {values[1]:g}"


def _weighted(terms: Mapping[str, float]) -> str:
    return "".join(f" + {weight:g} {TIMES} {name}" for name, weight in terms.items() if weight)


def _average(config: Any) -> str:
    return f" The weights were averaged exponentially (decay {config.ema_decay:g})." if config.ema_decay else ""


def _listed(*words: str) -> str:
    said = [word for word in words if word]
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"


# What a data sheet says of a set: what its images are drawn from, and how. What of the real patch goes into an image
# matters to the patients whose tissue it is.


def spade_sheet(settings: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, str]:
    """Describe a set that SPADE drew."""
    encodes = recipe.get("spade", {}).get("use_vae") is not False
    nuclei, style = _shown(settings)
    sources = _listed("the mask", nuclei, style, "random latent values" if encodes and not style else "")
    return {"Method": f"SPADE: the whole image is drawn from {sources}", "Drawn with": "one pass of the generator"}


def diffusion_sheet(settings: Mapping[str, Any], _: Mapping[str, Any]) -> dict[str, str]:
    """Describe a set of whole images that diffusion drew."""
    sources = _listed("the mask", *_shown(settings), "noise")
    made = f"Latent diffusion: the whole image is drawn from {sources}"
    return {"Method": made, "Drawn with": _drawn_with(settings)}


def inpainting_sheet(settings: Mapping[str, Any], _: Mapping[str, Any]) -> dict[str, str]:
    """Describe a set whose instances diffusion redrew."""
    sources = _listed("the mask", "the patch around them", *_shown(settings), "noise")
    composite = settings.get("inpainting", {}).get("composite")
    kept = "kept byte for byte" if composite else "passed through the first stage"
    return {
        "Method": f"Latent diffusion inpainting: relabelled instances are redrawn from {sources}; the rest is the "
        "real patch",
        "Drawn with": f"{_drawn_with(settings)}; the background is {kept}",
    }


def oracle_sheet(*_: Mapping[str, Any]) -> dict[str, str]:
    """Describe a set that the phantom's renderer drew."""
    return {"Method": "The phantom's own renderer", "Drawn with": "the renderer"}


def _shown(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Say which nuclei and which style an image is drawn from, each empty where there is none."""
    nuclei = "the nuclei of the real patch (its haematoxylin)" if settings.get("counterstain") else ""
    return nuclei, STYLES.get(settings.get("synthesis", {}).get("style", {}).get("source", ""), "")


def _drawn_with(settings: Mapping[str, Any]) -> str:
    sampler = settings.get("sampler", {})
    return f"{sampler.get('name')}, {sampler.get('steps')} steps, guidance {sampler.get('guidance')}"
