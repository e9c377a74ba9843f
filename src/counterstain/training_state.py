"""The state of a training on disk, from which it is resumed."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from counterstain.storage import replacing, sweep

PROGRESS_FILE = "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, whole or absent, and read without running code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint in one step."""
        del storage_options
        buffer = io.BytesIO()  # torch's own writer hides that a disk is full
        torch.save(checkpoint, buffer)
        sweep(Path(path))  # each as large as the whole
        with replacing(Path(path)) as partial:
            partial.write_bytes(buffer.getbuffer())


def steps_done(progress_file: Path) -> int:
    """Return the steps that an interrupted training had done; 0 where there is none, or where its state is damaged."""
    if not progress_file.exists():
        return 0
    try:
        state = torch.load(progress_file, weights_only=True, map_location="cpu")
        return int(state["callbacks"]["_History"]["step"])
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the remedy is the same
        reason = str(error).partition(".")[0]
        warnings.warn(f"{progress_file}: damaged ({reason}); training starts anew", stacklevel=2)
        progress_file.unlink(missing_ok=True)
        return 0


def forget_progress(folder: Path) -> None:
    """Delete the state of a training whose result is saved."""
    sweep(folder / PROGRESS_FILE)
    (folder / PROGRESS_FILE).unlink(missing_ok=True)
