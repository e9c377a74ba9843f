"""The judge: a network that learns from real training patches which subtype each pixel shows.

It says what subtype a drawn instance looks like, as an audit or as a filter of drawn images asks. Its inner activations
are the features in which drawn and real images are compared; so nothing has to be downloaded, and the features know
the cohort's own stain.

Shapes: B = batch, n = images, H, W = rows and columns in pixels, L = labels (background and subtypes), d = number of
features.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from counterstain.audit import JudgeConfig, JudgeFilterConfig
from counterstain.checkpoints import CheckpointHeader, load_checkpoint, rebuilt, require_taxonomy
from counterstain.config import build_stored
from counterstain.data.cohort import Cohort
from counterstain.data.patches import Patch
from counterstain.data.relabel import redrawn_pixels
from counterstain.data.sampling import PatchBatches
from counterstain.data.split import check_no_leak
from counterstain.devices import choose_device, fused_optimizers, place
from counterstain.errors import MismatchError
from counterstain.generators.interface import fixed_batches, on_device
from counterstain.progress import bar
from counterstain.segmentation.model import build_network
from counterstain.synthesis.synthesize import Verdict
from counterstain.taxonomy import BACKGROUND, IGNORE
from counterstain.training import Trainable, cosine, fit
from counterstain.training_run import TrainingRun

Device = Literal["auto", "cpu", "cuda"]
GREY_MEAN, GREY_SD = 0.5, 0.25
BATCH = 32
LEAST_AREA_PX = 32  # of an instance that the judge learns from as a whole
WEIGHT_DECAY = 1e-2


class Judge(Trainable):
    """A U-Net with one output per label."""

    def __init__(self, config: JudgeConfig, num_labels: int) -> None:
        super().__init__()
        self.config, self.num_labels = config, num_labels
        channels = list(config.decoder_channels)
        self.network: Any = build_network("unet", config.encoder, classes=num_labels, decoder_channels=channels)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8 -> logits (B, L, H, W)."""
        return self.network(_normalised(images))  # type: ignore[no-any-return]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8 -> the mean activations of the encoder's two deepest scales, (B, d)."""
        scales: Sequence[Tensor] = self.network.encoder(_normalised(images))
        return torch.cat([scale.mean((2, 3)) for scale in scales[-2:]], dim=1)

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy over all pixels that are not to be ignored, and over instances.

        The judge is asked for an instance's subtype, and the pixels that tell it, such as a duct's rim, may be few.
        """
        logits, labels = self(batch["images"]).float(), batch["labels"].long()
        of_pixels = functional.cross_entropy(logits, labels, ignore_index=IGNORE)
        of_instances = instance_loss(logits, labels, batch["instances"])
        return {"loss_pixels": of_pixels, "loss_instances": of_instances, "loss": of_pixels + of_instances}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW."""
        fused = fused_optimizers(self.config.training)
        return [torch.optim.AdamW(self.parameters(), self.config.lr, weight_decay=WEIGHT_DECAY, fused=fused)]

    def learning_rate(self, step: int) -> float:
        """Rise along a line and fall along a cosine."""
        return cosine(step, self.config.training.steps) * min(1.0, (step + 1) / (self.config.warmup_steps + 1))


def _normalised(images: Tensor) -> Tensor:
    return ((images.float() / 255 - GREY_MEAN) / GREY_SD).permute(0, 3, 1, 2)


def instance_loss(logits: Tensor, labels: Tensor, instances: Tensor) -> Tensor:
    """Cross-entropy of the subtypes of instances; an instance's logits are the mean over its pixels.

    ``logits`` (B, L, H, W) float, ``labels`` (B, H, W) int64, ``instances`` (B, H, W) int32: those that show fewer than
    32 pixels or are to be ignored are left out.
    """
    patch = torch.arange(len(instances), device=instances.device)[:, None, None]
    counted = (instances != BACKGROUND) & (labels != IGNORE)
    places = torch.stack([patch.expand_as(instances)[counted], instances[counted].long()])
    _, number, areas = torch.unique(places, dim=1, return_inverse=True, return_counts=True)
    inside = logits.movedim(1, -1)[counted][:, 1:]
    means = inside.new_zeros(len(areas), inside.shape[1]).index_add(0, number, inside) / areas[:, None]
    subtypes = areas.new_zeros(len(areas)).index_put((number,), labels[counted] - 1)
    large = areas >= LEAST_AREA_PX
    if not large.any():
        return logits.sum() * 0
    return functional.cross_entropy(means[large], subtypes[large])


def train_judge(cohort: Cohort, config: JudgeConfig, out: Path, *, size_px: int, seed: int) -> Path:
    """Train a judge on the training part of a cohort, in the folder ``out``; a finished one is left as it is.

    Raises MismatchError where ``out`` belongs to another run.
    """
    run = TrainingRun(cohort=cohort, kind="judge", config=config, out=out, size_px=size_px, seed=seed)
    if run.finished():
        return out
    sampler = run.sampler(config.sampling)
    judge = run.initialised(lambda: Judge(config, cohort.taxonomy.num_labels))
    batches = PatchBatches(sampler, config.training.batch_size)
    fit(judge, batches, out, config.training, ema_decay=config.ema_decay, label="judge")
    return run.save(judge.state_dict(), {})


def load_judge(folder: Path, device: Device = "auto") -> tuple[Judge, CheckpointHeader]:
    """Load a judge made by :func:`train_judge`, for use on a device; ``auto`` is the GPU where there is one."""
    header, state = load_checkpoint(folder, "judge")
    config = build_stored(JudgeConfig, header.config, folder)
    judge = rebuilt(lambda: Judge(config, header.taxonomy.num_labels), state, folder)
    return place(judge.eval(), choose_device(device)), header


@torch.no_grad()
def describe(judge: Judge, patches: Sequence[Patch], batch_size: int = BATCH) -> np.ndarray:
    """Return the features of patches, (n, d) float64."""
    batches = image_batches(patches, batch_size, judge.device)
    return np.concatenate([judge.features(images).double().cpu().numpy() for images, _ in batches])


def image_batches(
    patches: Sequence[Patch], batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, list[Patch]]]:
    """Yield images (B, H, W, 3) uint8 on the device, with their patches."""
    for first in range(0, len(patches), batch_size):
        part = [patches[i] for i in range(first, min(first + batch_size, len(patches)))]
        yield on_device(np.stack([p.image for p in part]), device), part


@torch.no_grad()
def instance_probabilities(
    judge: Judge,
    patches: Sequence[Patch],
    *,
    kept: Collection[int] = (),
    min_area_px: int = 1,
    batch_size: int = BATCH,
) -> pd.DataFrame:
    """Say what the judge, in evaluation mode, takes every instance for, and with what probability.

    Instances of the subtypes ``kept`` (what relabelling kept was not redrawn), those to be ignored, and those that show
    fewer than ``min_area_px`` pixels are left out. Returns a row per instance: image (number of the patch), instance,
    asked (subtype), area_px, seen (the likeliest subtype), tissue (share of its pixels that look like any subtype
    rather than background), and ``probability_1`` … for every subtype; these sum to 1.
    """
    rows: list[tuple[Any, ...]] = []
    first = 0
    for images, part in image_batches(patches, batch_size, judge.device):
        for number, (patch, scores) in enumerate(zip(part, _log_probabilities(judge, images), strict=True), first):
            redrawn = redrawn_pixels(patch.instances, patch.subtypes, kept)
            for instance, inside in _instances(patch, redrawn, scores, min_area_px):
                means = _mean_scores(inside)
                shares = np.exp(means - means.max())
                tissue = float((inside.argmax(0) > 0).mean())
                asked, seen = patch.subtypes[instance], int(means.argmax()) + 1
                rows.append((number, instance, asked, inside.shape[1], seen, tissue, *(shares / shares.sum()).tolist()))
        first += len(part)
    probabilities = [f"probability_{subtype}" for subtype in range(1, judge.num_labels)]
    return pd.DataFrame(rows, columns=["image", "instance", "asked", "area_px", "seen", "tissue", *probabilities])


def agreement(judge: Judge, patches: Sequence[Patch]) -> pd.Series:
    """Return the share of the instances of each patch that look to a judge as asked, by number.

    Patches without an instance that is large enough to be judged are left out.
    """
    least, tables = JudgeFilterConfig().min_area_px, []
    with bar("judging patches", len(patches)) as advance:
        for first in range(0, len(patches), BATCH):
            part = [patches[i] for i in range(first, min(first + BATCH, len(patches)))]
            table = instance_probabilities(judge, part, min_area_px=least)
            tables.append(table.assign(image=table["image"] + first))
            advance(len(part))
    table = pd.concat(tables)
    return (table["seen"] == table["asked"]).groupby(table["image"]).mean()


def _log_probabilities(judge: Judge, images: Tensor) -> np.ndarray:
    return np.asarray(torch.log_softmax(judge(images).float(), dim=1).cpu().numpy())


def _instances(
    patch: Patch, redrawn: np.ndarray, scores: np.ndarray, min_area_px: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield every instance to be judged among the redrawn pixels, (H, W) bool, with its pixels' scores (L, pixels)."""
    drawn = np.where(redrawn, patch.instances, BACKGROUND)
    for instance, area in zip(*np.unique(drawn[drawn != BACKGROUND], return_counts=True), strict=True):
        if area >= min_area_px and patch.subtypes[int(instance)] != IGNORE:
            yield int(instance), scores[:, drawn == instance]


def _mean_scores(inside: np.ndarray) -> np.ndarray:
    """Return the mean log-probability of every subtype, (L - 1,), for the scores (L, pixels) of one instance.

    Its pixels see the same tissue, so the mean counts, as in training, not the sum as over independent witnesses.
    """
    return np.asarray(inside[1:].mean(1))


class JudgeFilter:
    """Keeps drawn images that a judge agrees with; an :class:`counterstain.synthesis.synthesize.ImageFilter`.

    An image's verdict does not depend on the others: images are judged in batches of one fixed size.
    """

    def __init__(self, judge: Judge, header: CheckpointHeader, config: JudgeFilterConfig) -> None:
        self._judge, self._config = place(judge.eval(), choose_device()), config
        self.masks = config.masks
        self.settings: Mapping[str, Any] = {"judge": header.sha256} | config.model_dump(mode="json")
        self.patients_seen: Sequence[str] = header.patients_seen

    @classmethod
    def load(cls, folder: Path, cohort: Cohort, config: JudgeFilterConfig, *, size_px: int) -> JudgeFilter:
        """Open a judge for the images of a cohort.

        Raises MismatchError where it is of another taxonomy, size or resolution, and LeakageError where it saw a
        validation or test patient of the cohort.
        """
        judge, header = load_judge(folder)
        require_taxonomy(folder, header, cohort.taxonomy)
        if header.size_px != size_px or not cohort.is_at(header.mpp):
            raise MismatchError(
                f"{folder}: the judge learnt from {header.size_px} px at {header.mpp:g} um/px, the images are of "
                f"{size_px} px at {cohort.mpp:g} um/px; train one that fits"
            )
        check_no_leak(header.patients_seen, cohort, f"the judge {folder}")
        return cls(judge, header, config)

    @torch.no_grad()
    def __call__(self, patches: Sequence[Patch], redraw: np.ndarray) -> list[Verdict]:
        """Judge images with their asked subtypes; ``redraw`` (n, H, W) bool says which pixels were drawn anew."""

        def scored(images: list[np.ndarray]) -> np.ndarray:
            return _log_probabilities(self._judge, on_device(np.stack(images), self._judge.device))

        scores = fixed_batches(scored, BATCH, [patch.image for patch in patches])
        return [self._verdict(*judged) for judged in zip(patches, redraw, scores, strict=True)]

    def _verdict(self, patch: Patch, redraw: np.ndarray, scores: np.ndarray) -> Verdict:
        seen = {
            instance: int(_mean_scores(inside).argmax()) + 1
            for instance, inside in _instances(patch, redraw, scores, self._config.min_area_px)
        }
        instances = tuple((patch.subtypes[i], patch.subtypes[i] == subtype) for i, subtype in seen.items())
        agreed = sum(looks_like_it for _, looks_like_it in instances)
        return Verdict(kept=agreed >= self._config.agreement * len(instances), instances=instances)
