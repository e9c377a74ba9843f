"""The command that hands cohorts, synthetic sets and trained weights on: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add ``counterstain export``."""
    app.command("export")(export)


def export(
    source: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A cohort, a synthetic set or the checkpoint of a generator.")
    ],
    *,
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="png: images, label images and a table; nnunet: a raw dataset of nnU-Net v2; "
            "hf: an image folder of Hugging Face's datasets; weights: a generator's checkpoint as NVlabs/SPADE or "
            "CompVis/latent-diffusion publish theirs.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder of the export; for nnunet …/Dataset001_NAME.")
    ],
    labels: Annotated[str, typer.Option(help="subtypes: a label for each; tumour: one label for all.")] = "subtypes",
    split: Annotated[
        list[str] | None, typer.Option(help="train, val or test; may be given twice.", show_default="everything")
    ] = None,
) -> None:
    """Export a cohort, a synthetic set or weights for other tools; the same command goes on if interrupted."""
    if file_format == "weights":
        _export_weights(source, out, labels, split)
        return
    from counterstain.config import build
    from counterstain.data.export import ExportConfig
    from counterstain.data.export import export as write
    from counterstain.errors import ConfigError
    from counterstain.progress import bar

    if file_format not in _NEXT:
        raise ConfigError(f"--format {file_format}: expected {', '.join(_NEXT)} or weights")
    settings = {"file_format": file_format, "labels": labels, "parts": tuple(dict.fromkeys(split or ()))}
    count = write(source, out, build(ExportConfig, settings, f"export of {source}"), progress=bar)
    typer.echo(f"{out}: {count:,} images")
    typer.echo(_NEXT[file_format].format(out=out))


def _export_weights(source: Path, out: Path, labels: str, split: list[str] | None) -> None:
    from counterstain.errors import ConfigError
    from counterstain.generators.published.exports import export_weights

    if labels != "subtypes" or split:
        raise ConfigError("--format weights: --labels and --split are for images")
    for file in export_weights(source, out):
        typer.echo(f"{file}")


_NEXT = {
    "png": "read back: counterstain import table {out}/table.csv --labels ids --taxonomy {out}/taxonomy.yaml --mpp …",
    "nnunet": "next: nnUNetv2_plan_and_preprocess -d NUMBER --verify_dataset_integrity, then copy "
    "{out}/splits_final.json beside the preprocessed data, so that training and validation are split by patient",
    "hf": 'read with: load_dataset("imagefolder", data_dir="{out}")',
}
