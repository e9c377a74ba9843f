"""Open a trained generator by the method it is asked to draw with."""

from __future__ import annotations

from pathlib import Path

from counterstain.checkpoints import CheckpointHeader, read_header
from counterstain.data.cohort import Cohort
from counterstain.errors import InputError, MismatchError
from counterstain.generators.interface import ImageGenerator
from counterstain.generators.methods import Method

KIND_OF_METHOD = {"spade": "spade", "diffusion": "diffusion", "inpainting": "diffusion"}


def load_generator(
    method: Method, checkpoint: Path | None, cohort: Cohort
) -> tuple[ImageGenerator, CheckpointHeader | None]:
    """Open the generator of a method.

    Parameters
    ----------
    method : str
        ``spade``, ``diffusion``, ``inpainting`` (needs a diffusion checkpoint) or ``oracle`` (needs none).
    checkpoint : Path or None
    cohort : Cohort
        The phantom cohort, for the oracle.

    Raises
    ------
    InputError
        A checkpoint is needed and was not given.
    MismatchError
        The checkpoint is of a kind that does not draw with this method.
    """
    if method == "oracle":
        from counterstain.generators.oracle import OracleGenerator

        return OracleGenerator(cohort), None
    if checkpoint is None:
        raise InputError(f"method {method}: give the folder of a {KIND_OF_METHOD[method]} checkpoint")
    kind = read_header(checkpoint).kind
    if kind != KIND_OF_METHOD[method]:
        raise MismatchError(f"{checkpoint}: is a {kind} checkpoint; {method} needs a {KIND_OF_METHOD[method]} one")
    if method == "spade":
        from counterstain.generators.spade import SpadeGenerator

        return SpadeGenerator.load(checkpoint)
    from counterstain.generators.diffusion_generator import DiffusionGenerator

    return DiffusionGenerator.load(checkpoint, method)
