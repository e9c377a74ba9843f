"""An image folder of Hugging Face's ``datasets``: ``load_dataset("imagefolder", data_dir=DIR)``.

    DIR/
      train/, validation/, test/   data/ where there is no split
        images/NAME.png  masks/NAME.png  instances/NAME.png
        metadata.jsonl             a line per image: file_name, mask_file_name, instances_file_name, region, slide,
                                   patient, score, mpp, instances and area in pixels of every subtype, …
      taxonomy.yaml                what the ids in the masks mean
      patients_seen.txt            of generated images: a line per patient behind them
      README.md

``datasets`` gives ``image``, ``mask`` and ``instances`` as images and the rest as columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from counterstain.config import to_yaml
from counterstain.data.export.contents import Contents, Row
from counterstain.data.export.labels import ExportedLabels
from counterstain.data.export.layout import IMAGE, INSTANCES, LABELS, Layout
from counterstain.storage import write_text

_FOLDERS = {"train": "train", "val": "validation", "test": "test", None: "data"}
_NOT_WRITTEN = {"name", "index", "part"}

_CARD = """\
# {source}

{count} images at {mpp:g} micrometres per pixel, exported by counterstain.

```python
from datasets import load_dataset

dataset = load_dataset("imagefolder", data_dir=".")
```

`mask` holds 0 = background, {labels}, 255 = ignore; `instances` a number per instance.
Patients never lie in two splits.
"""


def _places(row: Row) -> Mapping[str, str]:
    folder, file = _FOLDERS[row["part"]], f"{row['name']}.png"
    return {IMAGE: f"{folder}/images/{file}", LABELS: f"{folder}/masks/{file}", INSTANCES: f"{folder}/instances/{file}"}


def _finish(out: Path, contents: Contents, labels: ExportedLabels) -> None:
    write_text(out / "taxonomy.yaml", to_yaml(labels.taxonomy))
    meanings = ", ".join(f"{s.id} = {s.name}" for s in labels.taxonomy.subtypes)
    name = contents.source.resolve().name
    write_text(
        out / "README.md", _CARD.format(source=name, count=len(contents.table), mpp=contents.mpp, labels=meanings)
    )
    totals = _totals(contents, labels)
    lines: dict[str, list[str]] = {}
    for row in contents.rows:
        lines.setdefault(_FOLDERS[row["part"]], []).append(json.dumps(_record(row, contents, totals[row["name"]])))
    for folder, of_part in lines.items():
        write_text(out / folder / "metadata.jsonl", "\n".join(of_part) + "\n")


def _record(row: Row, contents: Contents, totals: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Return a line of the metadata; paths count from its folder."""
    files = {kind: place.partition("/")[2] for kind, place in _places(row).items()}
    named = {
        "file_name": files[IMAGE],
        "mask_file_name": files[LABELS],
        "instances_file_name": files[INSTANCES],
    }
    known = {key: value for key, value in row.items() if key not in _NOT_WRITTEN}
    return named | known | {"mpp": contents.mpp} | totals


def _totals(contents: Contents, labels: ExportedLabels) -> dict[str, dict[str, dict[str, int]]]:
    """Return instances and area of every subtype for every name."""
    found = contents.instances.assign(label=labels.lookup[contents.instances["subtype"].to_numpy()])
    groups = found.groupby(["name", "label"])["area_px"].agg(["size", "sum"])
    counts = {(str(key[0]), int(key[1])): (int(n), int(area)) for key, n, area in groups.itertuples()}
    subtypes = labels.taxonomy.subtypes
    return {
        name: {
            "subtype_instances": {s.name: counts.get((name, s.id), (0, 0))[0] for s in subtypes},
            "subtype_area_px": {s.name: counts.get((name, s.id), (0, 0))[1] for s in subtypes},
        }
        for name in pd.unique(contents.table["name"])
    }


HUGGING_FACE = Layout(
    places=_places,
    lookup=lambda labels: labels.lookup,
    check=lambda _out, _contents, _labels: None,
    finish=_finish,
)
