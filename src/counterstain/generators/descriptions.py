"""How each generator is described in a methods section and in the data sheets of its sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from counterstain.generators import autoencoder_config, spade_config
from counterstain.generators.autoencoder_config import AutoencoderConfig
from counterstain.generators.diffusion_config import (
    NUCLEUS_UM,
    CounterstainConfig,
    DiffusionConfig,
    InpaintingConfig,
    SamplerConfig,
)
from counterstain.progress import PERCENT, TIMES, counted
from counterstain.training_config import TrainingConfig

SAMPLERS = {
    "ddim": "DDIM (Song et al. 2021)",
    "dpmsolver++": "DPM-Solver++ (Lu et al. 2022)",
    "unipc": "UniPC (Zhao et al. 2023)",
    "few_step": "a distilled network (Salimans & Ho 2022)",
}
PREDICTIONS = {"epsilon": "the noise", "v_prediction": "the velocity", "sample": "the clean latents"}
SCHEDULES = {
    "scaled_linear": "linear in their square roots",
    "linear": "linear",
    "squaredcos_cap_v2": "along a squared cosine",
}
LOSSES = {"l1": "L1 distance", "l2": "squared distance", "min-snr": "squared distance weighted by min(SNR, 5)"}


def training_of(training: TrainingConfig) -> str:
    """Say how long and in what batches a network was trained (``trained for 80 steps in batches of 16 …``)."""
    precision = {"auto": "", "32": " in 32-bit", "bf16": " in bfloat16", "16": " in 16-bit"}[training.precision]
    clip = f", gradients clipped to norm {training.gradient_clip:g}" if training.gradient_clip else ""
    return f"trained for {training.steps:,} steps in batches of {training.batch_size}{precision}{clip}"


def spade(recipe: Any) -> str:
    """Describe SPADE's training."""
    config, style = recipe.spade, recipe.synthesis.style
    terms = {
        "feature matching": spade_config.FEATURE_WEIGHT,
        "VGG19 features": config.vgg_weight,
        "L1": config.l1_weight,
        "Kullback-Leibler": spade_config.KL_WEIGHT if config.use_vae else 0.0,
    }
    weights = ", ".join(f"{weight:g} {TIMES} {name}" for name, weight in terms.items() if weight)
    edge = " and the borders between instances" if config.edge_channel else ""
    noise = f" and {counted(config.noise_channels, 'channel')} of pixel noise" if config.noise_channels else ""
    nuclei = _counterstain(config.counterstain)
    values = "random latent values" if style.source == "none" else "the latent values of a patch in the style asked for"
    vae = f"with its variational encoder ({config.latent} latent values)" if config.use_vae else "without an encoder"
    return (
        f"SPADE (Park et al. 2019) {vae}, {config.generator_width} features in the generator's last block, "
        f"{config.discriminator_width} in the discriminator's first layer and {config.hidden} in the modulating "
        f"layers, saw one-hot masks{edge}{noise}.{nuclei} It was {training_of(config.training)} with Adam "
        f"(betas {_pair(spade_config.ADAM_BETAS)}; learning rates {config.lr_generator:g} for the generator "
        f"and {config.lr_discriminator:g} for the discriminator), minimising the hinge loss + "
        f"{weights}.{_average(config.ema_decay)} Images were drawn with {values}."
    )


def autoencoder(recipe: Any) -> str:
    """Describe the first stage of latent diffusion."""
    config: AutoencoderConfig = recipe.autoencoder
    start = (
        f"First stage of latent diffusion (Rombach et al. 2022): images were shrunk {config.factor} times along each "
        f"edge to {config.latent_channels} channels"
    )
    if config.kind == "linear":
        return f"{start}, the principal components of blocks of {config.factor} {TIMES} {config.factor} pixels."
    kind = {
        "vq": f"a vector-quantised autoencoder with {config.codebook_size:,} codes",
        "kl": f"a variational autoencoder (Kullback-Leibler weight {config.kl_weight:g})",
    }[config.kind]
    terms = [f"{config.lpips_weight:g} {TIMES} LPIPS"] if config.lpips_weight else []
    if config.adversarial_weight:
        since = f" from step {config.adversarial_start:,}" if config.adversarial_start else ""
        terms.append(f"{config.adversarial_weight:g} {TIMES} adaptive patch GAN{since}")
    losses = " + ".join(["L1", *terms])
    return (
        f"{start} by {kind} with {config.channels} features at full size, {training_of(config.training)} with Adam "
        f"(betas {_pair(autoencoder_config.ADAM_BETAS)}, learning rate {config.scaled_lr:g}), minimising {losses}."
    )


def diffusion(recipe: Any) -> str:
    """Describe the denoiser and its training."""
    config: DiffusionConfig = recipe.diffusion
    widths = ", ".join(str(config.channels * m) for m in config.multipliers)
    noise = config.noise
    dropout = (
        f"; {100 * config.condition_dropout:g}{PERCENT} of the samples had no mask" if config.condition_dropout else ""
    )
    falls = ", falling to 0 along a cosine" if config.lr_schedule == "cosine" else ""
    warm = f" after {config.warmup_steps:,} steps of warm-up" if config.warmup_steps else ""
    return (
        f"Denoiser: a U-Net with {widths} features and {counted(config.blocks, 'residual block')} a scale, "
        f"{_attention(config)} ({config.heads} heads), saw the "
        f"one-hot mask, brought to the latents' size, in extra channels{dropout}."
        f"{_counterstain(config.counterstain)}{_style(config)} It predicted {PREDICTIONS[noise.prediction]} "
        f"({noise.timesteps:,} timesteps, variances {noise.beta_start:g} to "
        f"{noise.beta_end:g}, {SCHEDULES[noise.schedule]}) and was {training_of(config.training)} with AdamW "
        f"(learning rate {config.scaled_lr:g}{warm}{falls}, no weight decay), minimising the "
        f"{LOSSES[config.loss]}.{_average(config.ema_decay)}{_pool(config)}{_context(config)} "
        f"{_sampler(config.sampler)}"
    )


def _counterstain(shown: CounterstainConfig | None) -> str:
    if shown is None:
        return ""
    dropout = f"; {100 * shown.dropout:g}{PERCENT} of the samples had none" if shown.dropout else ""
    other = {"dab": "DAB", "eosin": "eosin"}[shown.other_stain]
    width = f"{NUCLEUS_UM:g} um" if shown.local_px is None else f"{shown.local_px:g} pixels"
    unit = {"structure": "units of their spread", "contrast": "optical density"}[shown.shows]
    return (
        f" It was also shown the haematoxylin of the real patch, unmixed from {other} with the colours of Ruifrok & "
        f"Johnston (2001), as difference to the surroundings (a Gaussian of {width}) in {unit}, so that relabelled "
        f"instances keep their nuclei{dropout}."
    )


def _style(config: DiffusionConfig) -> str:
    style = config.style
    if style is None:
        return ""
    dropout = f"; {100 * style.dropout:g}{PERCENT} of the samples had none" if style.dropout else ""
    return (
        f" It was also given the style of the patch's slide: statistics of the background's optical density and a "
        f"learned code of {style.code} numbers, averaged over "
        f"{counted(style.references, 'other patch', 'other patches')} of the slide{dropout}."
    )


def _pool(config: DiffusionConfig) -> str:
    if not config.latent_pool:
        return ""
    return f" Its patches were cut and encoded once, {config.latent_pool:,} of them, from which each batch was drawn."


def _context(config: DiffusionConfig) -> str:
    if not config.context_share:
        return ""
    return (
        f" In {100 * config.context_share:g}{PERCENT} of the samples it saw the latents around some instances in extra "
        "channels, as when inpainting."
    )


def _attention(config: DiffusionConfig) -> str:
    lowest = {0: "", 1: "the lowest scale and "}
    scales = lowest.get(config.attention_scales, f"the {config.attention_scales} lowest scales and ")
    return f"attention at {scales}the middle"


def _sampler(config: SamplerConfig) -> str:
    guidance = (
        f"classifier-free guidance of {config.guidance:g} (Ho & Salimans 2022)"
        if config.guidance != 1
        else "without guidance"
    )
    eta = f", eta {config.eta:g}" if config.name == "ddim" else ""
    return f"Images were drawn by {SAMPLERS[config.name]} in {config.steps} steps{eta}, {guidance}."


def inpainting(recipe: Any) -> str:
    """Describe how instances are redrawn."""
    config: InpaintingConfig = recipe.diffusion.inpainting
    wide = f", widened by {config.dilation_px} pixels" if config.dilation_px else ""
    kept = (
        "the original pixels were put back outside of the instances"
        if config.composite
        else "the whole image is what the first stage decoded"
    )
    stretch = counted(config.jump_length, "step")
    again = f" Stretches of {stretch} were walked {config.resamples} times (RePaint, Lugmayr et al. 2022)."
    start = f" Drawing began from the noised original, at {config.strength:g} of the noise."
    ways = (again if config.resamples > 1 else "") + (start if config.start == "original" else "")
    return (
        f"Inpainting: the same denoiser redrew the relabelled instances{wide}; the other latents were those of the "
        f"original, noised to the same level at each step, and {kept}.{ways}"
    )


def _pair(values: tuple[float, float]) -> str:
    return " and ".join(f"{value:g}" for value in values)


def _average(decay: float | None) -> str:
    return f" An exponential average of the weights was kept (decay {decay:g})." if decay else ""


def oracle(_: Any) -> str:
    """Describe the phantom's renderer."""
    return "Oracle: images were drawn by the phantom's own renderer, a ceiling that no real cohort has."


# What a data sheet says of a set: what its images are drawn from, and how. What of the real patch goes into an image
# matters to the patients whose tissue it is.

STYLES = {
    "own": "the style of its own slide",
    "other": "the style of another training slide",
    "mixture": "a style between those of two training slides",
    "beyond": "a style beyond those of two training slides",
}


def spade_sheet(settings: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, str]:
    """Describe a set that SPADE drew."""
    encodes = recipe.get("spade", {}).get("use_vae") is not False
    random = "random latent values" if encodes and not _style_of(settings) else ""
    sources = _listed(["the mask", *_shown(settings), random])
    return {"Method": f"SPADE: the whole image is drawn from {sources}", "Drawn with": "one pass of the generator"}


def diffusion_sheet(settings: Mapping[str, Any], _: Mapping[str, Any]) -> dict[str, str]:
    """Describe a set of whole images that diffusion drew."""
    sources = _listed(["the mask", *_shown(settings), "noise"])
    made = f"Latent diffusion: the whole image is drawn from {sources}"
    return {"Method": made, "Drawn with": _drawn_with(settings)}


def inpainting_sheet(settings: Mapping[str, Any], _: Mapping[str, Any]) -> dict[str, str]:
    """Describe a set whose instances diffusion redrew."""
    sources = _listed(["the mask", "the patch around them", *_shown(settings), "noise"])
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


def _style_of(settings: Mapping[str, Any]) -> str:
    return STYLES.get(settings.get("synthesis", {}).get("style", {}).get("source", ""), "")


def _shown(settings: Mapping[str, Any]) -> list[str]:
    nuclei = "the nuclei of the real patch (its haematoxylin)" if settings.get("counterstain") else ""
    return [nuclei, _style_of(settings)]


def _listed(words: Sequence[str]) -> str:
    said = [word for word in words if word]
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"


def _drawn_with(settings: Mapping[str, Any]) -> str:
    sampler = settings.get("sampler", {})
    return f"{sampler.get('name')}, {sampler.get('steps')} steps, guidance {sampler.get('guidance')}"
