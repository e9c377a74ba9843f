"""Write an export image by image; interrupted, the same command goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from counterstain.config import Config
from counterstain.data.export.contents import Contents, Row, choose_parts, open_contents
from counterstain.data.export.huggingface import HUGGING_FACE
from counterstain.data.export.instance_numbers import stored_instances
from counterstain.data.export.labels import LabelMode, exported_labels
from counterstain.data.export.layout import IMAGE, INSTANCES, LABELS, Layout
from counterstain.data.export.nnunet import NNUNET
from counterstain.data.export.png import PNG
from counterstain.data.leakage import PATIENTS_SEEN_FILE
from counterstain.data.patches import label_mask
from counterstain.storage import claim, replacing, write_json, write_text

REPORT_FILE = "export.json"
LAYOUTS: dict[str, Layout] = {"png": PNG, "nnunet": NNUNET, "hf": HUGGING_FACE}

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


class ExportConfig(Config):
    """What an export holds."""

    file_format: Literal["png", "nnunet", "hf"]
    """Ordinary images, a raw dataset of nnU-Net v2, or an image folder of Hugging Face's ``datasets``."""
    labels: LabelMode = "subtypes"
    """A label for every subtype, or one for all of them."""
    parts: tuple[Literal["train", "val", "test"], ...] = ()
    """Parts of the split; without any, everything."""


def export(source: Path, out: Path, config: ExportConfig, *, progress: Progress | None = None) -> int:
    """Export a cohort or a synthetic set.

    Region by region, so that memory does not grow with their number. ``export.json`` is written last: an export with
    it is whole, and is left as it is.

    Parameters
    ----------
    source : Path
        Folder of a cohort or of a synthetic set. A set's patches belong to the training part, where their masks come
        from.
    out : Path
        Folder of the export.
    config : ExportConfig
    progress : callable, optional
        As :func:`counterstain.progress.bar`.

    Returns
    -------
    int
        Number of images.

    Raises
    ------
    InputError
        There is no such source or part, or it cannot be laid out so.
    MismatchError
        ``out`` holds something else.
    """
    contents = choose_parts(open_contents(source), config.parts)
    labels = exported_labels(contents.taxonomy, config.labels)
    layout = LAYOUTS[config.file_format]
    layout.check(out, contents, labels)
    claim(out, "export", {"source": contents.fingerprint, **config.model_dump(mode="json")})
    if not (out / REPORT_FILE).exists():
        _sweep(out)
        with (progress or _silent)("images", len(contents.table)) as advance:
            for row in contents.rows:
                _write(out, row, contents, layout, layout.lookup(labels))
                advance(1)
        if contents.patients_seen:  # before any table that could be imported without it
            write_text(out / PATIENTS_SEEN_FILE, "\n".join(contents.patients_seen) + "\n")
        layout.finish(out, contents, labels)
        write_json(out / REPORT_FILE, _report(contents, config))
    return len(contents.table)


def _write(out: Path, row: Row, contents: Contents, layout: Layout, lookup: np.ndarray) -> None:
    """Write the files of one image that are not there yet."""
    missing = {kind: out / place for kind, place in layout.places(row).items() if not (out / place).exists()}
    if not missing:
        return
    image, instances, subtypes = contents.read(row["index"])
    pixels: dict[str, Callable[[], np.ndarray]] = {
        IMAGE: lambda: image,
        LABELS: lambda: lookup[label_mask(instances, subtypes)],
        INSTANCES: lambda: stored_instances(instances, subtypes, f"{contents.source} region {row['region']}"),
    }
    for kind, path in missing.items():
        with replacing(path) as partial:
            Image.fromarray(pixels[kind]()).save(partial, format="PNG")


def _report(contents: Contents, config: ExportConfig) -> dict[str, object]:
    return {
        **config.model_dump(mode="json"),
        "source": contents.source.resolve().name,
        "fingerprint": contents.fingerprint,
        "mpp": contents.mpp,
        "images": len(contents.table),
        "patients": int(contents.table["patient"].nunique()),
        "instances": len(contents.instances),
    }


def _sweep(out: Path) -> None:
    """Remove what a killed export left half-written."""
    for left_over in out.rglob(".*.partial-*"):
        left_over.unlink(missing_ok=True)


@contextmanager
def _silent(_label: str, _total: int) -> Iterator[Callable[[int], None]]:
    yield lambda _images: None
