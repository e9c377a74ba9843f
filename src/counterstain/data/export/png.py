"""Ordinary images: ``images/``, ``labels/``, ``instances/`` and a table that ``counterstain import table`` reads.

    DIR/
      images/NAME.png     RGB
      labels/NAME.png     8 bits grey: 0 = background, the id of the subtype, 255 = ignore
      instances/NAME.png  16 bits grey: 0 = background, the instance
      table.csv           a row per image: image, label, instances, region, slide, patient, part, score, mpp, …
      instances.csv       a row per instance: image, instance, subtype_id, subtype, area_px
      taxonomy.yaml       what the ids mean
      patients_seen.txt   of generated images: a line per patient behind them; the import keeps them out of evaluation

``counterstain import table DIR/table.csv --labels ids --taxonomy DIR/taxonomy.yaml --mpp …`` gives the same label
masks back. It takes connected components for instances: neighbours of one subtype that touch become one there, while
``instances/`` keeps them apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from counterstain.config import to_yaml
from counterstain.data.export.contents import Contents, Row
from counterstain.data.export.instance_numbers import stored_numbers
from counterstain.data.export.labels import ExportedLabels
from counterstain.data.export.layout import IMAGE, INSTANCES, LABELS, Layout
from counterstain.storage import write_csv, write_text
from counterstain.taxonomy import IGNORE

_FIRST = ["image", "label", "instances", "region", "slide", "patient", "part", "score", "mpp"]


def _places(row: Row) -> Mapping[str, str]:
    file = f"{row['name']}.png"
    return {IMAGE: f"images/{file}", LABELS: f"labels/{file}", INSTANCES: f"instances/{file}"}


def _finish(out: Path, contents: Contents, labels: ExportedLabels) -> None:
    write_text(out / "taxonomy.yaml", to_yaml(labels.taxonomy))
    write_csv(out / "instances.csv", _instance_table(contents, labels))
    rows = []
    for row in contents.rows:
        places = _places(row)
        files = {"image": places[IMAGE], "label": places[LABELS], "instances": places[INSTANCES]}
        plain = {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
        rows.append(plain | files | {"mpp": contents.mpp})
    table = pd.DataFrame(rows).drop(columns=["name", "index"])
    write_csv(out / "table.csv", table[[*_FIRST, *table.columns.drop(_FIRST)]])


def _instance_table(contents: Contents, labels: ExportedLabels) -> pd.DataFrame:
    """Return a row per instance under the number that it has in its image."""
    found = contents.instances
    subtype = pd.Series(labels.lookup[found["subtype"].to_numpy()], index=found.index)
    named = {s.id: s.name for s in labels.taxonomy.subtypes} | {IGNORE: "ignore"}
    return pd.DataFrame(
        {
            "image": "images/" + found["name"] + ".png",
            "instance": found.groupby("name")["instance"].transform(stored_numbers),
            "subtype_id": subtype,
            "subtype": subtype.map(named),
            "area_px": found["area_px"],
        }
    )


PNG = Layout(
    places=_places,
    lookup=lambda labels: labels.lookup,
    check=lambda _out, _contents, _labels: None,
    finish=_finish,
)
