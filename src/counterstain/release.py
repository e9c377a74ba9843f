"""A synthetic set as it may leave the hospital: images, masks, a card, and nothing that leads back to a patient.

RELEASE/ holds ``train/`` (images, masks and instances as PNG, and ``metadata.jsonl``: an image folder of Hugging Face),
``taxonomy.yaml``, ``trace.json`` (what ``counterstain trace`` found, without what leads back), the card ``README.md``
and ``SHA256SUMS``. The set itself, which stays, notes in ``releases.jsonl`` which image is which of its patches: images
of a patient who withdraws consent can then be found.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from counterstain.audit.trace_result import TRACE_FILE
from counterstain.data.patch_set import BY_HAND, PatchSet, PatchSetHeader
from counterstain.errors import ConfigError, InputError, MismatchError
from counterstain.generators.methods import METHODS
from counterstain.io.export_contents import Advance, Contents, contents_of
from counterstain.io.export_datasets import IMAGE_FOLDER, LOADING, dataset_card
from counterstain.journals import append, now
from counterstain.storage import committing, read_json, sha256_of, write_json, write_text

RECORD_FILE = "releases.jsonl"  # in the set
SUMS_FILE = "SHA256SUMS"
CARD_FILE = "README.md"  # in no sum: its licence is to be filled in
TRACE_FOLDER = "trace"  # in the set, where ``counterstain trace`` leaves it
FEWEST_DIGITS = 5  # of a name without letters that is searched for: shorter ones cannot be told from other numbers
OF_SET = ("method", "generator", "cohort", "seed")
OF_TRACE = ("method", "found", "verdict", "alarms", "tests", "figures")
TEXTS = {".jsonl", ".json", ".md", ".yaml"}
LETTER = r"[^\W\d_]"
HARMLESS = "membership"  # the alarm that is about the generator, which is not released


def release(
    patches: PatchSet,
    out: Path,
    *,
    trace_folder: Path | None = None,
    untraced: bool = False,
    with_real_tissue: bool = False,
    with_alarm: bool = False,
    advance: Advance = lambda _: None,
) -> int:
    """Write the bundle of a set into the new folder ``out`` and return the number of its images.

    Images are in a random order that no seed gives again, so that neighbours are of one patient no more often than any
    two. Raises ConfigError where the set is not traced, its trace raised an alarm about its images, or they are real
    tissue in part, unless the user says that this may leave; InputError where ``out`` exists, or the set was drawn for
    held-out patients; MismatchError where a patient, slide or region is named by what would be written.
    """
    header, source = patches.header, patches.folder
    if out.exists():
        raise InputError(f"{out}: exists already; give another output folder")
    if source.resolve() in out.resolve().parents:
        raise InputError(f"{out}: lies in the set, which stays; give an output folder elsewhere")
    if header.part != "train":
        raise InputError(
            f"{source}: drawn for {header.part} patients, for reading tests; release a set for training ones"
        )
    real = real_tissue(header)
    if real and not with_real_tissue:
        raise ConfigError(f"{source}: {real[0].lower()}{real[1:]}; give --with-real-tissue if that may leave")
    trace = _trace_of(patches, trace_folder, untraced=untraced, with_alarm=with_alarm)
    contents, order = _anonymous(contents_of(source), out, header)
    with committing(out) as folder:
        IMAGE_FOLDER.write_images(folder, contents, advance)
        IMAGE_FOLDER.write_tables(folder, contents)
        use = LOADING.format(how='"imagefolder", data_dir="FOLDER"')
        write_text(folder / CARD_FILE, dataset_card(contents, use=use) + _evidence(patches, real, trace))
        if trace is not None:
            write_json(folder / "trace.json", trace)
        _refuse_names(folder, out, patches)
        sums = "".join(f"{sha256_of(folder / name)}  {name}\n" for name in _files(folder) if name != CARD_FILE)
        write_text(folder / SUMS_FILE, sums)
        record = {"time": now(), "release": out.name, "sums": sha256_of(folder / SUMS_FILE), "patches": order}
        append(source / RECORD_FILE, record)
    return len(order)


def real_tissue(header: PatchSetHeader) -> str:
    """Say what in the images of a set is real tissue by design; empty where every pixel is drawn."""
    method = METHODS.get(header.method)
    if header.method == BY_HAND or (method is not None and method.inpaints):
        return "Around redrawn instances the images are real tissue"
    if method is None:
        return "How the images were drawn is not known here, so they may be real tissue in part"
    return "The nuclei in the images are those of real tissue" if header.settings.get("counterstain") else ""


def _trace_of(patches: PatchSet, folder: Path | None, *, untraced: bool, with_alarm: bool) -> dict[str, Any] | None:
    """Return what may leave of a set's trace; None where it has none and need not have any."""
    header, file = patches.header, (folder or patches.folder / TRACE_FOLDER) / TRACE_FILE
    if not file.exists():
        if untraced and folder is None:
            return None
        raise ConfigError(
            f"{patches.folder}: nobody has checked whether its images can be traced to patients ({file} is "
            f"missing); run 'counterstain trace {patches.folder} --cohort COHORT' first, or give --trace FOLDER if its "
            "trace lies elsewhere, or --untraced; the card will say so"
        )
    found = read_json(file)
    known = isinstance(found, dict) and {*OF_SET, *OF_TRACE} <= found.keys()
    if not known or any(found[key] != str(getattr(header, key)) for key in OF_SET):
        raise MismatchError(f"{file}: belongs to another set; trace this one again")
    if (alarms := [name for name in found["alarms"] if name != HARMLESS]) and not with_alarm:
        raise ConfigError(
            f"{file}: alarm ({', '.join(alarms)}); do not release it, or give --with-alarm if it may leave"
        )
    return {key: found[key] for key in OF_TRACE}


def _anonymous(contents: Contents, out: Path, header: PatchSetHeader) -> tuple[Contents, list[int]]:
    """Return what is written, in a random order and without sources, and the number in the set of each image."""
    table = contents.table.iloc[secrets.SystemRandom().sample(range(len(contents.table)), len(contents.table))]
    order, names = table["index"].tolist(), [f"{number:06d}" for number in range(len(table))]
    renamed = dict(zip(table["name"], names, strict=True))
    shown = pd.DataFrame({"name": names, "index": range(len(names)), "part": "train"})
    instances = contents.instances.assign(name=contents.instances["name"].map(renamed))
    method = METHODS.get(header.method)
    facts = method.data_sheet(header.settings, {}) if method is not None and method.data_sheet is not None else {}
    return replace(
        contents,
        source=out,
        table=shown.assign(height_px=header.size_px, width_px=header.size_px),
        instances=instances[["name", "instance", "subtype", "area_px"]],
        read=_renumbered(contents.read, order),
        patients_seen=("hidden",) * len(header.patients_seen),  # the card counts them
        facts={"Method": header.method, **facts, "Drawn by": f"counterstain {header.version}"},
        recipe="",
    ), order


def _renumbered(
    read: Callable[[int], tuple[np.ndarray, np.ndarray, dict[int, int]]], order: list[int]
) -> Callable[[int], tuple[np.ndarray, np.ndarray, dict[int, int]]]:
    """Return a reader by new numbers, which numbers the instances of each image from 1."""

    def image(number: int) -> tuple[np.ndarray, np.ndarray, dict[int, int]]:
        pixels, instances, subtypes = read(order[number])
        known = np.array([0, *sorted(subtypes)])
        ranks = np.searchsorted(known, instances).astype(np.int32)
        return pixels, ranks, {rank: subtypes[int(known[rank])] for rank in range(1, len(known))}

    return image


def _evidence(patches: PatchSet, real: str, trace: Mapping[str, Any] | None) -> str:
    """Say what of the release may lead back to a patient."""
    header = patches.header
    points = [
        f"The images derive from {len(header.patients_seen)} patients, their masks from {len(patches.patients)}.",
        "No file holds a name of a patient, slide or region, a place, a date or a seed; the order is random.",
        "Masks are outlines of real tissue, turned or mirrored at most; only their subtypes are new.",
        "Masks are not secret: whoever has the slides and their annotations can find the place of one.",
    ]
    if header.has_layouts:
        points.append("Into the masks, outlines of other slides were moved.")
    if header.settings.get("synthesis", {}).get("style", {}).get("source", "none") != "none":
        points.append("Images are in the style of real slides: their colours were taken from background tissue.")
    points.append(f"**Real tissue**: {real}. Treat them as patient data." if real else "Every pixel was drawn.")
    if trace is None:
        points.append("**Not traced**: nobody has checked whether the generator remembers its training tissue.")
    else:
        points += [f"Traced: {sentence}" for sentence in trace["found"]]
        if (compared := trace["figures"].get("images", len(patches))) < len(patches):
            points.append(f"Of the {len(patches)} images of the set, {compared} were compared.")
    if _names(patches)[1]:
        points.append(f"Not searched for: names of fewer than {FEWEST_DIGITS} digits, which look like other numbers.")
    points.append("These are findings, not a guarantee of anonymity in the sense of any law.")
    return "\n## What may lead back to patients\n" + "".join(f"* {point}\n" for point in points)


def _files(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def _refuse_names(folder: Path, out: Path, patches: PatchSet) -> None:
    """Raise MismatchError where texts or the release's own name hold one that tells its source."""
    for place, text in [("its name", out.name), *_texts(folder)]:
        for name in _names(patches)[0]:
            before = r"(?<![^\W_])" if re.search(LETTER, name) else r"(?<![^\W_])(?<!\d\.)"  # no decimals
            if re.search(rf"{before}{re.escape(name)}(?![^\W_])", text, re.IGNORECASE):
                raise MismatchError(f"{out}: {place} would name {name}; rename what is called so, and release it again")


def _names(patches: PatchSet) -> tuple[list[str], list[str]]:
    """Return the names that tell the source of a set: those that texts are searched for, and those too short for it."""
    tables = pd.concat([patches.patches, patches.moved])
    names = {*patches.header.patients_seen, *(name for kind in ("region", "slide", "patient") for name in tables[kind])}
    told = {name: bool(re.search(LETTER, name)) or len(re.findall(r"\d", name)) >= FEWEST_DIGITS for name in names}
    return [name for name in names if told[name]], [name for name in names if not told[name]]


def _texts(folder: Path) -> Iterable[tuple[str, str]]:
    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping | list):
            for part in [*value, *value.values()] if isinstance(value, Mapping) else value:
                yield from strings(part)

    for file in _files(folder):
        if (folder / file).suffix in TEXTS:
            text = (folder / file).read_text(encoding="utf-8")
            read = [json.loads(line) for line in text.splitlines()] if file.endswith(".jsonl") else [text]
            yield file, "\n".join(strings(read))
