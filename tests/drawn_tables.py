"""Tables, label images, LABELS.yaml and taxonomies as strangers save them, sound, strange and damaged.

:func:`try_input` draws one input of a kind and imports it: what it means is known here, so that an import that succeeds
must give just that, and anything else must be one line.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
import yaml
from PIL import Image

from counterstain.data.cohort import Cohort
from counterstain.errors import CounterstainError
from counterstain.io.import_images import import_table
from counterstain.io.labels import LabelMap
from counterstain.taxonomy import Taxonomy

SHAPE = (40, 48)
HER2 = Taxonomy.named("her2")
Save = Callable[[Path, np.ndarray], None]  # a path without suffix; (H, W) bool, tissue


def draw_tissue(rng: random.Random) -> np.ndarray:
    """A few boxes, none of them touching, of at least 6 x 6 pixels."""
    tissue = np.zeros(SHAPE, bool)
    for y, x in rng.sample([(2, 2), (2, 18), (2, 34), (22, 2), (22, 18), (22, 34)], rng.randrange(1, 5)):
        tissue[y : y + rng.randrange(6, 14), x : x + rng.randrange(6, 12)] = True
    return tissue


def _saved(content: np.ndarray, path: Path, suffix: str, **options) -> None:
    Image.fromarray(content).save(path.with_suffix(suffix), **options)


def _grey(low: int, high: int, suffix: str = ".png", kind: type = np.uint8, **options) -> Save:
    return lambda path, tissue: _saved(np.where(tissue, high, low).astype(kind), path, suffix, **options)


def _palette(*colours: tuple[int, int, int]) -> Save:
    def save(path: Path, tissue: np.ndarray) -> None:
        image = Image.new("P", tissue.shape[::-1])
        image.putdata(tissue.astype(int).ravel().tolist())
        image.putpalette([channel for colour in colours for channel in colour])
        image.save(path.with_suffix(".png"))

    return save


def _tiff(dtype: type, high: int, photometric: str) -> Save:
    return lambda path, tissue: tifffile.imwrite(
        path.with_suffix(".tif"), (tissue * high).astype(dtype), photometric=photometric
    )


def _channels(*high: int) -> Save:
    return lambda path, tissue: _saved(tissue[..., None] * np.array(high, np.uint8), path, ".png")


CERTAIN: dict[str, Save] = {  # ways of saving a mask that mean one thing
    "0 and 1": _grey(0, 1),
    "0 and 255": _grey(0, 255),
    "0 and 65535": _grey(0, 65_535, kind=np.uint16),
    "one bit": lambda path, tissue: _saved(tissue, path, ".png"),
    "JPEG": _grey(0, 255, ".jpg", quality=95, subsampling=0),
    "BMP": _grey(0, 255, ".bmp"),
    "grey RGB": _channels(255, 255, 255),
    "grey palette": _palette((0, 0, 0), (255, 255, 255)),
    "minisblack": _tiff(np.uint8, 255, "minisblack"),
    "bool of minisblack": _tiff(bool, 1, "minisblack"),
    "nearly black and white": _grey(3, 252, ".jpg", quality=90),
}
OPEN: dict[str, Save] = {  # ways that could mean two things: refused
    "miniswhite": _tiff(bool, 1, "miniswhite"),
    "grey miniswhite": _tiff(np.uint8, 255, "miniswhite"),
    "0 and 2": _grey(0, 2),
    "0 and 128": _grey(0, 128),
    "1 and 2": _grey(1, 2),
    "50 and 200": _grey(50, 200),
    "instances": _grey(0, 300, kind=np.uint16),
    "0 and 1 in JPEG": _grey(0, 1, ".jpg"),
    "inverted palette": _palette((255, 255, 255), (0, 0, 0)),
    "coloured palette": _palette((0, 0, 0), (0, 200, 0)),
    "colours": _channels(0, 255, 0),
    "floats": _grey(0, 1, ".tif", np.float32),
    "CMYK": lambda path, tissue: Image.fromarray(np.stack([tissue * np.uint8(255)] * 4, -1), "CMYK").save(
        path.with_suffix(".tif")
    ),
    "transparent": lambda path, tissue: _saved(np.stack([tissue * np.uint8(255)] * 4, -1), path, ".png"),
    "turned": lambda path, tissue: _saved(tissue * np.uint8(255), path, ".tif", tiffinfo={274: 3}),
}
STRANGE_NAMES = ["a", "Bläschen", "with space", "x.y", "=1+1", "'quoted", "[b]bold", "$x$", "日本", "a" * 90]
PATIENTS = ["p1", "p2", "P 3", "0007", "Mü", "x-1"]
SPELLINGS: list[Callable[[str], str]] = [
    str.swapcase,
    lambda name: name.replace("1", "01").replace("7", "07"),
    lambda name: f"\u200b{name}",
    lambda name: f"{name[0]}\u00a0{name[1:]}",
    lambda name: unicodedata.normalize("NFD", name),
    lambda name: "".join(chr(ord(sign) + 0xFEE0) if "!" <= sign <= "~" else sign for sign in name),
]
INSERTS = [
    b"", b"\0", b"\xff", b"\x1b[2J", b'"', b",", b"\n", b"\r\n", b"\n\n", b";", b"\t", b"\xef\xbb\xbf", b"=cmd", b"\\",
    b"../../", b"/dev/zero", b"9" * 400, b"\xf0\x9f\x92\xa9", b"nan", b"[" * 2000, b"!!python/object:os.system x",
    b"&a ", b"*a", b"{", b": ", b"1e999", b"\xc2\x85",
]  # fmt: skip


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut bytes out and put others in, once to three times."""
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(content) + 1)
        content = content[:at] + rng.choice(INSERTS) + content[at + rng.choice((0, 0, 1, 3, 20)) :]
    return content


class DrawnTable:
    """Images with masks and their table: what is right is known."""

    def __init__(self, folder: Path, rng: random.Random, ways: dict[str, Save]) -> None:
        self.folder, self.rng = folder, rng
        self.way = rng.choice(sorted(ways))
        self.rows: list[list[str]] = []
        self.areas: dict[str, int] = {}  # region -> tissue in pixels
        names = rng.sample(STRANGE_NAMES, rng.randrange(2, 5))
        for number, name in enumerate(names):
            tissue = draw_tissue(rng)
            noise = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{name}.png")
            mask = folder / f"mask{number}"
            ways[self.way if number == 0 else rng.choice(sorted(CERTAIN))](mask, tissue)
            saved = next(folder.glob(f"mask{number}.*"))
            self.rows.append([f"{name}.png", saved.name, rng.choice(["polyp", "adenoma"]), PATIENTS[number]])
            self.areas[name] = int(tissue.sum())

    def save(self, change: Callable[[bytes], bytes] = lambda text: text) -> Path:
        """Write the table; cells are quoted where CSV needs it."""
        path = self.folder / "table.csv"
        cells = [["image", "label", "subtype", "patient"], *self.rows]
        text = "\n".join(",".join(f'"{c}"' if set(c) & set(',"\n') else c for c in row) for row in cells) + "\n"
        path.write_bytes(change(text.encode()))
        return path

    def check(self, cohort: Cohort, slack: int) -> None:
        """Compare what was imported with what was drawn."""
        found = cohort.instances.groupby("region")["area_px"].sum().to_dict()
        assert found.keys() == self.areas.keys()
        for region, area in self.areas.items():
            assert abs(found[region] - area) <= slack, (self.way, region, found[region], area)
        patients = dict(zip(cohort.regions["region"], cohort.regions["patient"], strict=True))
        assert patients == {Path(row[0]).stem: row[3] for row in self.rows}


def _mask(folder: Path, rng: random.Random) -> None:
    drawn = DrawnTable(folder, rng, CERTAIN | OPEN)
    drawn.check(import_table(drawn.save(), mpp=1, out=folder / "out"), slack=60)
    assert drawn.way in CERTAIN, f"{drawn.way} was read, though it could mean two things"


def _spelling(folder: Path, rng: random.Random) -> None:
    drawn = DrawnTable(folder, rng, CERTAIN)
    name = drawn.rows[0][3]
    drawn.rows[1][3] = rng.choice(SPELLINGS)(name)
    same = drawn.rows[1][3] == name
    import_table(drawn.save(), mpp=1, out=folder / "out")
    assert same, f"{name!r} and {drawn.rows[1][3]!r} became two patients"


def _table(folder: Path, rng: random.Random) -> None:
    drawn = DrawnTable(folder, rng, CERTAIN)
    changes: list[Callable[[bytes], bytes]] = [
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: text.replace(b"\n", b"\n\n"),
        lambda text: text.replace(b",", b" , "),
        lambda text: text.replace(b"\n", b",\n", 1).replace(b"\n", b",x\n"),
    ]
    sound = rng.random() < 0.3
    path = drawn.save(rng.choice(changes) if sound else lambda text: damaged(text, rng))
    cohort = import_table(path, mpp=rng.choice((0.25, 1, 1)), out=folder / "out")
    if sound:
        drawn.check(cohort, slack=60)


def _ids(folder: Path, rng: random.Random) -> None:
    drawn = DrawnTable(folder, rng, CERTAIN | OPEN)
    cohort = import_table(drawn.save(), mpp=1, out=folder / "out", labels="ids", taxonomy=HER2)
    assert cohort.instances["subtype"].between(1, 255).all()


def _image(folder: Path, rng: random.Random) -> None:
    drawn = DrawnTable(folder, rng, CERTAIN)
    file = folder / rng.choice([row[rng.randrange(2)] for row in drawn.rows])
    file.write_bytes(damaged(file.read_bytes(), rng))
    import_table(drawn.save(), mpp=1, out=folder / "out")


def _options(folder: Path, rng: random.Random) -> None:
    strange = {
        "mpp": [1e-9, 1e9, float("nan"), -1, "x", 0.5],
        "shrink": [0, 41, 10**30, 2],
        "threshold": [-1, 255, 1e300, 100],
        "min_area_px": [10**30, -1, 4],
        "mask_values": ["0", "=", "0=tissue=1", "0-255=tissue", "9" * 500 + "=tissue", "#fff=tissue", "0=\x1b", ",,,"],
        "labels": ["ids", "colours", ""],
        "tissue_class": ["", "x" * 200, "\x1b[2J", "[b]"],
        "merge": ["stained", "", "\0"],
        "columns": [{"image": ""}, {"image": "label"}, {"slide": "patient"}, {"x": "y"}],
    }
    chosen = {name: rng.choice(strange[name]) for name in rng.sample(sorted(strange), rng.randrange(1, 4))}
    drawn = DrawnTable(folder, rng, CERTAIN)
    import_table(drawn.save(), out=folder / "out", **({"mpp": 1} | chosen))


def _yaml(model: Callable[[Path], object], content: object) -> Callable[[Path, random.Random], None]:
    def read(folder: Path, rng: random.Random) -> None:
        path = folder / "content.yaml"
        path.write_bytes(damaged(yaml.safe_dump(content, allow_unicode=True).encode(), rng))
        model(path)

    return read


SUBTYPES = [{"id": i, "name": name, "colour": "#112233"} for i, name in enumerate(("polyp", "adenoma"), start=1)]
MERGES = {"all": {"lesion": ["polyp", "adenoma"]}}
KINDS: dict[str, Callable[[Path, random.Random], None]] = {
    "mask": _mask,
    "spelling": _spelling,
    "table": _table,
    "ids": _ids,
    "image": _image,
    "options": _options,
    "labels": _yaml(
        lambda path: LabelMap.load(path).resolve({"a": 1, "b": 2}, HER2, path),
        {"labels": {"a": "HER2 0", "b": "background"}, "regions": ["ROI"]},
    ),
    "taxonomy": _yaml(Taxonomy.load, {"name": "t", "tissue_class": "lesion", "subtypes": SUBTYPES, "merges": MERGES}),
}


def try_input(kind: str, seed: int, folder: Path) -> str | None:
    """Import one drawn input of a kind; return None where that is right, otherwise the line that refuses it."""
    folder.mkdir(parents=True)
    try:
        KINDS[kind](folder, random.Random(f"{kind} {seed}"))
    except CounterstainError as error:
        message = str(error)
        assert message.strip(), "an empty message"
        assert "\n" not in message, f"several lines: {message}"
        assert len(message) < 1500, f"{len(message)} characters: {message[:300]}"
        assert not (folder / "out").exists(), f"something is left behind after: {message}"
        return message
    return None
