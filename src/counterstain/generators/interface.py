"""What every generator does: draw images for label masks. The oracle, the phantom's own renderer, is the shortest.

Shapes: n = images, H, W = rows and columns in pixels, S = length of a style vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from counterstain.checkpoints import CheckpointHeader, read_header
from counterstain.config import build_stored
from counterstain.data.cohort import Cohort
from counterstain.data.patches import Patch
from counterstain.data.phantom import render
from counterstain.data.phantom.styles import PhantomConfig, index_of, slide_style, style_from_vector, style_vector
from counterstain.errors import InputError, MismatchError
from counterstain.generators.methods import METHODS

ItemT = TypeVar("ItemT")


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawRequest:
    """One image to draw; each method uses the fields that it needs.

    Attributes
    ----------
    mask
        (H, W) uint8: labels.
    seed
        All random numbers of the image derive from it.
    instances
        (H, W) int32: ids of instances, 0 = background.
    image
        (H, W, 3) uint8: the real image, which inpainting keeps outside ``redraw``.
    redraw
        (H, W) bool: pixels that inpainting draws anew.
    slide
        Slide that the mask comes from.
    style
        (S,) float: one of the generator's own ``style_codes``; None = it chooses.

    Examples
    --------
    >>> DrawRequest(mask=np.zeros((64, 64), np.uint8), seed=0).slide
    ''
    """

    mask: np.ndarray
    seed: int
    instances: np.ndarray | None = None
    image: np.ndarray | None = None
    redraw: np.ndarray | None = None
    slide: str = ""
    style: np.ndarray | None = None

    @classmethod
    def of(cls, patch: Patch, seed: int, redraw: np.ndarray, style: np.ndarray | None = None) -> DrawRequest:
        """Ask for a new image of a relabelled patch."""
        real = {"mask": patch.label_mask, "instances": patch.instances, "image": patch.image}
        return cls(**real, seed=seed, redraw=redraw, slide=patch.source.slide, style=style)


class ImageGenerator(Protocol):
    """What draws the images of a method. Each image depends on its own request alone, never on others in a batch.

    Examples
    --------
    >>> class Grey:
    ...     method, header, settings = "grey", None, {}
    ...
    ...     def draw(self, requests):
    ...         return [np.full((*request.mask.shape, 3), 128, np.uint8) for request in requests]
    >>> generator: ImageGenerator = Grey()
    >>> generator.draw([DrawRequest(mask=np.zeros((64, 64), np.uint8), seed=0)])[0].shape
    (64, 64, 3)
    """

    @property
    def method(self) -> str:
        """Name of its method."""

    @property
    def header(self) -> CheckpointHeader | None:
        """What is known of its checkpoint; None where it needs none."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """How it draws, as plain values: all that its weights do not say."""

    def draw(self, requests: Sequence[DrawRequest]) -> list[np.ndarray]:
        """Draw images, (H, W, 3) uint8 each; all masks have the same size.

        Raises InputError where a request lacks what the method needs, MismatchError for a size that it cannot draw.
        """


@runtime_checkable
class StyledGenerator(Protocol):
    """A generator that can be given styles."""

    @property
    def references_per_style(self) -> int:
        """Of how many references of a slide the styles are to be averaged."""

    def style_codes(self, references: Sequence[Patch]) -> np.ndarray:
        """Return the styles of reference patches, (n, S) float."""


@runtime_checkable
class GuidedGenerator(Protocol):
    """A generator with classifier-free guidance."""

    @property
    def guidance(self) -> float | None:
        """How strongly it is guided, 1 = not; None where its network can draw in one way alone."""

    def guided(self, guidance: float) -> ImageGenerator:
        """Return the same generator with another guidance; ConfigError where its network cannot."""


@runtime_checkable
class DenoisingGenerator(Protocol):
    """A generator with a denoiser, whose loss on real tissue may tell whose tissue it was trained on."""

    def patch_losses(self, patches: Sequence[Patch], seed: int) -> np.ndarray:
        """Return its loss on real patches, (n, timesteps) float, with the same noise for each."""


class OracleGenerator:
    """Render masks as the phantom renders its slides, each in the style of its slide unless it is given another.

    A perfect generator, which exists on the phantom only (InputError of other cohorts): the ceiling of what relabelling
    can give. Whatever is drawn with it is labelled ``oracle`` everywhere.
    """

    method = "oracle"
    header = None
    references_per_style = 1

    def __init__(self, cohort: Cohort) -> None:
        if cohort.source.get("kind") != "phantom":
            raise InputError(
                f"{cohort.folder}: the oracle renders phantoms only; use spade, diffusion or inpainting on real tissue"
            )
        self._config = build_stored(PhantomConfig, cohort.source["config"], str(cohort.folder))
        self._mpp = cohort.mpp
        self.settings: Mapping[str, Any] = {}

    def draw(self, requests: Sequence[DrawRequest]) -> list[np.ndarray]:
        """Render masks; each needs its instances and its slide."""
        images = []
        for one in requests:
            if one.instances is None or not one.slide:
                raise InputError("the oracle needs the instance maps and the slides of the masks")
            own = slide_style(self._config, index_of(one.slide))
            style = own if one.style is None else style_from_vector(one.style)
            images.append(render(one.mask, one.instances, style, one.seed, mpp=self._mpp))
        return images

    def style_codes(self, references: Sequence[Patch]) -> np.ndarray:
        """Return the true styles of the slides of reference patches, (n, S) float32."""
        known = [slide_style(self._config, index_of(patch.source.slide)) for patch in references]
        return np.stack([style_vector(style) for style in known]).astype(np.float32)


def fixed_batches(run: Callable[[list[ItemT]], np.ndarray], size: int, items: Sequence[ItemT]) -> list[np.ndarray]:
    """Call ``run`` on batches of always the same size, the last one filled up by repetition.

    Kernels are chosen by the shape of a batch, and round differently; with one shape an image is the same byte for
    byte whether it is drawn alone or among others.
    """
    results: list[np.ndarray] = []
    for first in range(0, len(items), size):
        members = [items[min(i, len(items) - 1)] for i in range(first, first + size)]
        results.extend(run(members)[: len(items) - first])
    return results


def stacked(requests: Sequence[DrawRequest], field: str) -> np.ndarray | None:
    """Return a field of all requests as one array, (n, ...), or None where no request has it.

    Raises :class:`InputError` where some have it and some have not.
    """
    found = [value for request in requests if (value := getattr(request, field)) is not None]
    if found and len(found) < len(requests):
        raise InputError(
            f"{len(requests) - len(found)} of {len(requests)} requests have no {field}; give all one or none"
        )
    return np.stack(found) if found else None


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy a numpy array to a device."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def load_generator(
    method: str, checkpoint: Path | None, cohort: Cohort, settings: Mapping[str, Any] | None = None
) -> ImageGenerator:
    """Open the generator of a method, with a checkpoint where it needs one, to draw masks of a cohort.

    ``settings`` are fields of the method's ``drawing``, as plain values; the checkpoint's own where not given.

    Raises InputError where a checkpoint is needed and was not given; ConfigError where there is no such method, or the
    network cannot draw with these settings; MismatchError where the checkpoint does not draw with this method.
    """
    entry = METHODS.named(method, "method")
    if entry.kind is not None:
        if checkpoint is None:
            raise InputError(f"method {method}: give --generator DIR, made by 'counterstain train {entry.kind}'")
        kind = read_header(checkpoint).kind
        if kind != entry.kind:
            raise MismatchError(f"{checkpoint}: is a {kind} checkpoint; {method} needs a {entry.kind} one")
    return entry.load(checkpoint, cohort, settings or {})
