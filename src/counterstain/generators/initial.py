"""Trained weights that a new training starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from counterstain.checkpoints import CheckpointHeader, Kind, load_checkpoint, require_taxonomy
from counterstain.data.cohort import Cohort
from counterstain.data.leakage import check_no_leak
from counterstain.errors import MismatchError

MAY_DIFFER = ("encoder.", "discriminator.", "codebook.")  # parts that one training has and another has not


@dataclass(frozen=True)
class InitialWeights:
    """The weights of a checkpoint that fits a cohort."""

    folder: Path
    header: CheckpointHeader
    state: dict[str, Tensor]

    @classmethod
    def open(cls, folder: Path, kind: Kind, cohort: Cohort) -> Self:
        """Open a checkpoint to start from.

        Raises
        ------
        LeakageError
            It saw a validation or test patient of the cohort.
        MismatchError
            It is of another kind, taxonomy or mpp.
        """
        header, state = load_checkpoint(folder, kind)
        require_fit(folder, header, cohort)
        return cls(folder, header, state)

    def load_into(self, model: nn.Module) -> None:
        """Set the weights of a new model; parts that the checkpoint lacks stay as they are.

        Raises
        ------
        MismatchError
            The model has other parts, or parts of other sizes.
        """
        given = {name: value for name, value in self.state.items() if not name.startswith("first_stage.")}
        own = model.state_dict()
        differing = [name for name in {*own, *given} if (name in own) != (name in given)]
        unexpected = [name for name in differing if not name.startswith(MAY_DIFFER)]
        resized = [name for name in own if name in given and own[name].shape != given[name].shape]
        if unexpected or resized:
            name = min(unexpected + resized)
            sizes = [tuple(part[name].shape) if name in part else "none" for part in (given, own)]
            raise MismatchError(
                f"{self.folder}: {name} is {sizes[0]}, the recipe asks for {sizes[1]}; give the settings that it was "
                f"trained with (in its model.json) by --config or --set"
            )
        model.load_state_dict({name: value for name, value in given.items() if name in own}, strict=False)

    def require_first_stage(self, first_stage: nn.Module, folder: Path) -> None:
        """Raise MismatchError unless the latents are those that these weights were trained on."""
        for name, value in first_stage.state_dict().items():
            mine = self.state.get(f"first_stage.{name}")
            if mine is None or mine.shape != value.shape or not torch.equal(mine, value.cpu()):
                raise MismatchError(
                    f"{self.folder}: was trained on the latents of another first stage than {folder}; give that one "
                    "as the autoencoder"
                )


def require_fit(folder: Path, header: CheckpointHeader, cohort: Cohort) -> None:
    """Raise an error unless a trained network may be used to train on a cohort."""
    require_taxonomy(folder, header, cohort.taxonomy)
    if not cohort.is_at(header.mpp):
        raise MismatchError(
            f"{folder}: was trained at {header.mpp} um/px, this cohort is at {cohort.mpp}; train it anew"
        )
    held_out = {part: cohort.patients(part) for part in ("val", "test")}
    check_no_leak(header.patients_seen, held_out, f"{header.kind} {folder}")
