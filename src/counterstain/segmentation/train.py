"""Train a segmenter on real and synthetic patches, and save it with every patient it saw.

Shapes: B = batch, H, W = rows and columns in pixels, K = number of subtypes; tables of labels have an entry for each
label 0 … K, 0 = background.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterstain.checkpoints import read_header
from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import PatchSet
from counterstain.data.sampling import PastedPatches, PatchBatches, PatchSampler, PatchSource
from counterstain.data.split import check_no_leak
from counterstain.devices import Batch
from counterstain.errors import InputError, LeakageError, MismatchError
from counterstain.seeding import derive, numpy_generator
from counterstain.segmentation.corrections import Corrections, MarkedBatches
from counterstain.segmentation.mixing import (
    MixedPatches,
    ShareSchedule,
    synthetic_count,
    synthetic_share,
    training_steps,
)
from counterstain.segmentation.model import (
    Segmenter,
    encoder_patients,
    load_encoder_weights,
)
from counterstain.segmentation.segmenter_config import SegmenterConfig
from counterstain.storage import fingerprint
from counterstain.taxonomy import BACKGROUND
from counterstain.training import Batches, fit
from counterstain.training_run import TrainingRun

COUNTED_PATCHES = 512  # from which the frequencies of subtypes are estimated


def train_segmenter(
    cohort: Cohort,
    config: SegmenterConfig,
    out: str | Path,
    *,
    size_px: int,
    seed: int,
    synthetic: PatchSet | None = None,
    amount: float = 0.0,
    share: float | None = None,
    critic: Path | None = None,
    ignore_above: float = 0.0,
    border_um: float = 0.0,
    left_out: Collection[int] = (),
    review: Mapping[str, Any] | None = None,
    label: str = "segmenter",
) -> Path:
    """Train a segmenter on a cohort's training part, or on a mixture with synthetic patches, and return its folder.

    The same call continues an interrupted training and keeps a finished one. Arms with equal ``seed`` share the initial
    weights and the order of the data. The first ``amount`` x ``config.mixing.epoch_patches`` patches of ``synthetic``
    are mixed in (1.0 is +100 %); ``share`` of the patches in training are synthetic, amount / (1 + amount) by default;
    1.0 trains on them alone.

    Pixels of synthetic patches are ignored on which the loss of ``critic``, a segmenter of real patches, is more than
    ``ignore_above`` times its mean loss on real pixels of the same label (Yang et al., FreeMask, NeurIPS 2023). In the
    second half of the training, labels of synthetic patches up to ``border_um`` from the border of an instance follow a
    moving average of the segmenter where it is sure (Tarvainen & Valpola, mean teacher, NeurIPS 2017); 0 is off.

    Those of them that are ``left_out``, because a review rejected them, are not trained on; the others are drawn more
    often, as the share of synthetic patches stays. ``review`` is put on record with them.

    Raises LeakageError where the synthetic set comes from, or its generator or the critic saw, a validation or test
    patient of this cohort; MismatchError where the synthetic set is of another taxonomy, size or mpp, or ``out``
    belongs to another run; InputError where ``size_px`` is not a multiple of 32, windows overlap completely, a set has
    fewer patches than the amount asks for, or only one of amount and set is given.
    """
    config.check_size(size_px)
    count, share = synthetic_count(amount, config.mixing), synthetic_share(amount, share)
    numbers = _numbers(count, left_out)
    corrections = Corrections(critic=critic, ignore_above=ignore_above, border_um=border_um)
    given = corrections.record()
    given |= {"left_out": sorted({*range(count)}.difference(numbers))} if len(numbers) < count else {}
    run = TrainingRun(
        cohort=cohort,
        kind="segmenter",
        config=config,
        out=Path(out),
        size_px=size_px,
        seed=seed,
        names={"synthetic": _identity(synthetic), "amount": amount, "share": share} | given,
        seen=_patients_behind(synthetic, count, share, cohort, size_px)
        | _patients_behind_encoder(config, cohort)
        | _patients_behind_critic(critic, cohort),
    )
    options: dict[str, Any] = {
        "synthetic": synthetic, "amount": amount, "share": share, "critic": critic, "ignore_above": ignore_above,
        "border_um": border_um, "left_out": left_out, "review": review, "label": label,
    }  # fmt: skip
    if run.finished() or run.spread(train_segmenter, config.training, **options):
        return run.out

    steps = training_steps(config.training.steps, amount, config.mixing)
    training, sampler = config.training.model_copy(update={"steps": steps}), run.sampler(config.sampling)
    schedule = ShareSchedule(share=share, steps=steps, batch_size=training.batch_size, config=config.mixing)
    mixing: dict[str, Any] = {"numbers": numbers, "share": schedule, "seed": derive(seed, "mixing")}
    patches = MixedPatches(_real(run, sampler, config), synthetic or (), config.sampling, **mixing)
    weights = _label_weights(patches, cohort, config, steps * training.batch_size)
    segmenter, start = _network(run, config, steps, weights)
    segmenter.correction = corrections.of(segmenter, sampler, config, steps=steps, mpp=cohort.mpp)
    batches = _batches(patches, config, seed, marked=segmenter.correction is not None)
    fit(segmenter, batches, run.out, training, ema_decay=config.ema_decay, label=label)
    segmenter.correction = None
    notes = {
        "encoder_starts_from": start,
        "steps": steps,
        "synthetic": None if synthetic is None else synthetic.header.model_dump(mode="json"),
        "synthetic_patches": len(numbers),
        "review": review,
        "synthetic_share": schedule.mean(),
        "label_weights": None if weights is None else {s.name: float(weights[s.id]) for s in cohort.taxonomy.subtypes},
        **given,
    }
    return run.save(segmenter.state_dict(), notes)


def _numbers(count: int, left_out: Collection[int]) -> list[int]:
    """Return which of the first ``count`` patches of a set are used."""
    numbers = sorted({*range(count)}.difference(left_out))
    if count and not numbers:
        raise InputError(
            f"all {count} patches of the synthetic set are rejected; review them again, or draw another set"
        )
    return numbers


def _batches(patches: MixedPatches, config: SegmenterConfig, seed: int, *, marked: bool) -> Batches:
    """Return the batches of a stream, blended if so configured, ``marked`` where they have to say what is synthetic."""
    size = config.training.batch_size
    batches: Batches = PatchBatches(patches, size, ("images", "labels"))
    if config.mixup_alpha is not None:
        batches = MixupBatches(batches, config.mixup_alpha, derive(seed, "mixup"))
    return MarkedBatches(batches, patches, size) if marked else batches


def _real(run: TrainingRun, sampler: PatchSampler, config: SegmenterConfig) -> PatchSource:
    """Return the stream of real patches, with instances pasted in if so configured."""
    if config.copy_paste is None:
        return sampler
    pasting: dict[str, Any] = {"config": config.copy_paste, "sampling": config.sampling}
    return PastedPatches(sampler, run.cohort, size_px=run.size_px, seed=derive(run.seed, "copy-paste"), **pasting)


def _identity(synthetic: PatchSet | None) -> str | None:
    """Return what identifies a set's patches; a set that was made longer still begins with the same ones."""
    return None if synthetic is None else fingerprint(synthetic.header.model_dump(mode="json", exclude={"count"}))


def _network(run: TrainingRun, config: SegmenterConfig, steps: int, weights: Tensor | None) -> tuple[Segmenter, Any]:
    """Make the network and load its encoder's weights; return it and what the encoder starts from."""
    seed = derive(run.seed, "training")
    options: dict[str, Any] = {"num_labels": run.cohort.taxonomy.num_labels, "steps": steps, "seed": seed}
    segmenter = run.initialised(lambda: Segmenter(config, **options, label_weights=weights))
    encoder: Any = segmenter.network.encoder
    with run.released_on_error():
        return segmenter, load_encoder_weights(encoder, config)


def _label_weights(patches: PatchSource, cohort: Cohort, config: SegmenterConfig, total: int) -> Tensor | None:
    if not config.subtype_weighting:
        return None
    weights = torch.ones(256)
    pixels = count_labels(patches, total, cohort.taxonomy.num_labels)
    weights[: len(pixels)] = torch.from_numpy(label_weights(pixels, config.subtype_weighting)).float()
    return weights


def _patients_behind_encoder(config: SegmenterConfig, cohort: Cohort) -> set[str]:
    seen = encoder_patients(config)
    remedy = "start from weights that saw none of the patients held out, or from null"
    check_no_leak(seen, cohort, f"encoder_weights {config.encoder_weights}", remedy=remedy)
    return seen


def _patients_behind_critic(critic: Path | None, cohort: Cohort) -> set[str]:
    if critic is None:
        return set()
    seen = set(read_header(critic).patients_seen)
    check_no_leak(seen, cohort, f"the segmenter {critic}", remedy="train it on this cohort's training part only")
    return seen


def _patients_behind(synthetic: PatchSet | None, count: int, share: float, cohort: Cohort, size_px: int) -> set[str]:
    """Return the patients behind a set, after checking that the set may and can be used."""
    if synthetic is None:
        if count or share:
            raise InputError(
                f"{count} synthetic patches at a share of {share:g} are requested without a synthetic set; "
                "give one, or amount 0"
            )
        return set()
    folder, header = synthetic.folder, synthetic.header
    if not count:
        raise InputError(
            f"{folder}: a synthetic set is given with amount 0; give an amount, for example 1.0 for +100 %"
        )
    if header.part != "train":
        raise LeakageError(
            f"{folder}: was drawn for masks of the {header.part} part, for a reading test, and is never trained on; "
            "draw a set for the training part"
        )
    if header.taxonomy.names != cohort.taxonomy.names:
        raise MismatchError(
            f"{folder}: has the subtypes {', '.join(header.taxonomy.names)}; this cohort has "
            f"{', '.join(cohort.taxonomy.names)}; make the set anew for this taxonomy"
        )
    if header.size_px != size_px:
        raise MismatchError(
            f"{folder}: has patches of {header.size_px} px, the segmenter trains on {size_px} px; "
            "generate the set at that size"
        )
    if not cohort.is_at(header.mpp):
        raise MismatchError(
            f"{folder}: is at {header.mpp} um/px, this cohort at {cohort.mpp}; generate the set from it"
        )
    if len(synthetic) < count:
        raise InputError(
            f"{folder}: has {len(synthetic)} patches, {count} are needed; synthesize more, or lower the amount "
            "or segmenter.mixing.epoch_patches"
        )
    seen = {*header.patients_seen, *synthetic.patients}
    check_no_leak(seen, cohort, f"synthetic set {folder}")
    return seen


def label_weights(pixels: np.ndarray, strength: float) -> np.ndarray:
    """Return the weight in the losses of a pixel of every label, (K + 1,) float, higher for rare subtypes.

    ``pixels`` (K + 1,) are those of each label in training, ``strength`` is the exponent of the inverse frequency: at 1
    all subtypes have the same total weight, at 0 nothing changes. Background and subtypes that do not occur weigh 1;
    the mean over all pixels of subtypes is 1, so that the balance of tissue class and background does not change.
    """
    weights = np.ones(len(pixels))
    present = np.flatnonzero(pixels[1:]) + 1
    if len(present):
        frequency = pixels[present] / pixels[present].sum()
        inverse = frequency**-strength
        weights[present] = inverse / (frequency * inverse).sum()
    return weights


def count_labels(source: PatchSource, total: int, num_labels: int) -> np.ndarray:
    """Count every label's pixels, (K + 1,) int64, in patches spread evenly over the first ``total`` of a stream."""
    pixels = np.zeros(256, np.int64)
    for index in np.unique(np.linspace(0, total - 1, min(total, COUNTED_PATCHES)).astype(np.int64)).tolist():
        pixels += np.bincount(source[index].label_mask.ravel(), minlength=256)
    return pixels[BACKGROUND:num_labels]


@dataclass(frozen=True, slots=True)
class MixupBatches:
    """Batches in which each patch is blended with another (mixup, Zhang et al., ICLR 2018)."""

    batches: Batches
    alpha: float  # the share of the first patch is drawn from Beta(alpha, alpha), once per batch
    seed: int

    def __call__(self, step: int) -> Batch:
        """Return a step's batch.

        It also has ``mixed_labels`` (B, H, W) uint8, the labels of the other patches, and ``kept_share`` (B,) float,
        the share of an image that is its own.
        """
        batch = self.batches(step)
        rng = numpy_generator(self.seed, "mixup", step)
        share = float(rng.beta(self.alpha, self.alpha))
        order = torch.from_numpy(rng.permutation(len(batch["images"])))
        images = batch["images"].float()
        blended = (share * images + (1 - share) * images[order]).round().to(torch.uint8)
        mixed = {"images": blended, "mixed_labels": batch["labels"][order]}
        return batch | mixed | {"kept_share": torch.full((len(images),), share)}
