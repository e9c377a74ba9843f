"""LABELS.yaml: the meaning of the labels of annotations.

labels:
  Invasive 3+: HER2 3+        # a subtype of the taxonomy
  Necrosis: background        # tissue of no subtype, even inside an instance
  Artefact: ignore            # left out of sampling and of counts
regions: [ROI]                # rectangles of regions, not instances
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, field_validator, model_validator

from counterstain.config import Config, build, read_yaml
from counterstain.errors import InputError
from counterstain.io.annotations.outlines import AnnotationFile
from counterstain.io.annotations.safe_parsing import one_line
from counterstain.taxonomy import MEANINGS, Taxonomy, alike, check_names, colours, name_key

LISTED = 40


class LabelMap(Config):
    """Labels of the source and what they become."""

    labels: dict[str, str] = Field(default_factory=dict)
    """Label -> subtype, ``background`` or ``ignore``."""
    regions: tuple[str, ...] = ()
    """Labels whose rectangles are regions of the slide, not instances."""
    colours: dict[str, Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")]] = Field(default_factory=dict)
    """Label -> colour as ``#rrggbb``, that of its subtype; as QuPath draws the class, in a draft."""

    @model_validator(mode="before")
    @classmethod
    def _text(cls, content: Any) -> Any:
        """Name what YAML does not read as text, or what was left open."""
        labels = content.get("labels") if isinstance(content, Mapping) else None
        for label, meaning in labels.items() if isinstance(labels, Mapping) else ():
            read = None if isinstance(label, str) else f"the label {label!r}"
            if read is None and meaning is None:
                raise ValueError(f"label {label!r} has no meaning yet; write a subtype, background or ignore")
            if read is None and not isinstance(meaning, str):
                read = f"{meaning!r}, the meaning of {label!r},"
            if read is not None:
                raise ValueError(f"YAML reads {read} as something other than text; put it in quotes")
        if isinstance(labels, Mapping):  # as annotations are read
            content = {**content, "labels": {one_line(label): meaning for label, meaning in labels.items()}}
        return content

    @field_validator("regions")
    @classmethod
    def _as_annotations_are_read(cls, regions: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(one_line, regions))

    @field_validator("colours")
    @classmethod
    def _of_labels(cls, colours: dict[str, str]) -> dict[str, str]:
        return {one_line(label): colour for label, colour in colours.items()}

    @model_validator(mode="after")
    def _one_meaning(self) -> Self:
        twice = sorted(set(self.labels) & set(self.regions))
        if twice:
            raise ValueError(f"{twice[0]!r} is in labels and in regions; keep one of the two")
        return self

    @classmethod
    def load(cls, path: Path) -> LabelMap:
        """Read LABELS.yaml; a ConfigError names the key and what was expected."""
        return build(cls, read_yaml(path), path)

    @classmethod
    def legend(cls, path: Path) -> LabelMap:
        """Read a legend: the same file for label images, whose labels are colours, numbers or classes."""
        content = read_yaml(path)
        labels = content.get("labels")
        if not isinstance(labels, Mapping) or not labels:
            raise InputError(f'{path}: expected labels: and under it a line for each, such as "#ff0000": positive')
        numbers = {str(key) if type(key) is int else key: meaning for key, meaning in labels.items()}
        return build(cls, {**content, "labels": numbers}, path)

    def check(self, taxonomy: Taxonomy, source: str | Path) -> None:
        """Raise InputError where a label has a meaning that the taxonomy does not have."""
        for label, meaning in self.labels.items():
            known = [*MEANINGS, *taxonomy.names]
            if meaning not in known:
                near = [f"; did you mean {name!r}?" for name in known if alike([name, meaning])]
                raise InputError(
                    f"{source}: label {label!r} becomes {meaning!r}, which is none of the subtypes of {taxonomy.name} "
                    f"({', '.join(taxonomy.names)}), background or ignore{''.join(near[:1])}"
                )

    def resolve(self, found: Mapping[str, int], taxonomy: Taxonomy, source: str | Path) -> dict[str, int]:
        """Return the subtype of every label that was found, 0 = background and 255 = ignore, without regions' labels.

        ``found`` is what :func:`count_labels` returns, ``source`` is where the map was read, for messages. Raises
        InputError where a label has no meaning, or one that the taxonomy does not have; all labels found are listed.
        """
        self.check(taxonomy, source)
        missing = [label for label in found if label not in self.labels and label not in self.regions]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(
                f"{source}: no meaning for label {missing[0]!r}{more}; found in the annotations: {_listed(found)}; "
                "add a line for each, 'counterstain import labels' writes a draft"
            )
        ids = MEANINGS | {name: taxonomy.id_of(name) for name in taxonomy.names}
        return {label: ids[self.labels[label]] for label in found if label in self.labels}


def taxonomy_of(names: Sequence[str], name: str, source: str | Path, tissue_class: str = "tumour") -> Taxonomy:
    """Return a taxonomy of these subtypes in their order, with ids from 1 on and distinct colours.

    Raises ConfigError, beginning with ``source``, where the names cannot be subtypes or two are probably one name.
    """
    check_names(names, source, near=True)
    subtypes = [
        {"id": i, "name": subtype, "colour": colour}
        for i, (subtype, colour) in enumerate(zip(names, colours(len(names)), strict=True), start=1)
    ]
    return build(Taxonomy, {"name": name[:80], "tissue_class": tissue_class, "subtypes": subtypes}, source)


def taxonomy_of_labels(label_map: LabelMap, source: Path, tissue_class: str = "tumour") -> Taxonomy:
    """Return HER2's taxonomy where it has all subtypes that the map names, otherwise one of them in their order."""
    names = list(dict.fromkeys(meaning for meaning in label_map.labels.values() if meaning not in MEANINGS))
    her2 = Taxonomy.named("her2")
    if set(names) <= set(her2.names):
        return _in_colours(her2, label_map)
    known = {name.casefold(): name for name in her2.names}
    for name in names:
        near = difflib.get_close_matches(name.casefold(), known, n=1, cutoff=0.8)
        if near and name not in her2.names:
            raise InputError(
                f"{source}: {name!r} is none of HER2's subtypes; did you mean {known[near[0]]!r}? "
                "If it is a subtype of your own, list all subtypes in a file and give --taxonomy FILE"
            )
    return _in_colours(taxonomy_of(names, source.stem, source, tissue_class), label_map)


def _in_colours(taxonomy: Taxonomy, label_map: LabelMap) -> Taxonomy:
    """Return a taxonomy with the colours that the map gives, each subtype's that of its first label."""
    given = {label_map.labels.get(label): colour for label, colour in reversed(label_map.colours.items())}
    subtypes = [s.model_copy(update={"colour": given.get(s.name, s.colour)}) for s in taxonomy.subtypes]
    return Taxonomy(**{**taxonomy.model_dump(), "subtypes": subtypes})


def count_labels(files: Iterable[AnnotationFile]) -> Counter[str]:
    """Return label -> annotations that carry it, over all files."""
    return sum((file.labels for file in files), Counter())


def count_skipped(files: Iterable[AnnotationFile]) -> Counter[str]:
    """Return reason -> objects that were left out, over all files."""
    return sum((file.skipped for file in files), Counter())


def draft_labels(files: Iterable[AnnotationFile], taxonomy: Taxonomy | None = None) -> str:
    """Return a LABELS.yaml to edit: every label found, how often and in how many files.

    Labels with the name of a subtype are filled in (of HER2 where no taxonomy is given and some have such names), ROI
    becomes a region, and all others are left open, which is an error until they are filled in.
    """
    files = list(files)
    annotations = count_labels(files)
    in_files = Counter(label for file in files for label in file.labels)
    her2 = Taxonomy.named("her2")
    if taxonomy is None and {name_key(name) for name in her2.names} & {name_key(label) for label in annotations}:
        taxonomy = her2
    subtypes = {name_key(name): name for name in taxonomy.names} if taxonomy else {}
    regions = sorted(label for label in annotations if name_key(label) == "roi")
    known = f" of {', '.join(taxonomy.names)}" if taxonomy else ""
    lines = [f"# Give each label a meaning: a subtype{known}; background; or ignore.", "labels:"]
    for label, count in sorted(annotations.items(), key=lambda item: (-item[1], item[0])):
        if label not in regions:
            subtype = subtypes.get(name_key(label))
            meaning = f" {_yaml(subtype)}" if subtype else ""
            place = f"{count:,} annotation{'s' * (count > 1)} in {in_files[label]:,} file{'s' * (in_files[label] > 1)}"
            candidates = annotations if len(annotations) <= LISTED else ()
            others = [f", like {other!r}" for other in candidates if alike({label, other})]
            lines.append(f"  {_yaml(label)}:{meaning}  # {place}{''.join(others[:1])}")
    if lines[-1] == "labels:":
        lines[-1] = "labels: {}"
    lines += [f"# Left out: {count:,} x {reason}" for reason, count in sorted(count_skipped(files).items())]
    lines += ["# Labels whose rectangles are regions of the slide, not instances.", f"regions: {_yaml(regions)}"]
    drawn = {
        label: colour for file in reversed(files) for label, colour in file.colours.items() if label in annotations
    }
    if drawn:
        lines += ["# As the classes are drawn: every subtype takes the colour of its first label here.", "colours:"]
        lines += [f"  {_yaml(label)}: {_yaml(colour)}" for label, colour in sorted(drawn.items())]
    return "\n".join(lines) + "\n"


def _listed(found: Mapping[str, int]) -> str:
    ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(ranked) - LISTED} more labels" if len(ranked) > LISTED else ""
    return ", ".join(f"{label!r} ({count:,})" for label, count in ranked[:LISTED]) + more


def _yaml(value: str | list[str]) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.strip().removesuffix("\n...")
