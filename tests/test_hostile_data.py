"""Cohorts and sets from a stranger or a failing disk: used as they were written, or refused in one line."""

import json
import shutil
import tracemalloc
from pathlib import Path

import google_crc32c
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from drawn_cohort import HER2, boxes, draw_cohort, draw_set, store
from numcodecs.zstd import compress

from counterstain.data.cohort import Cohort, CohortWriter
from counterstain.data.patch_set import PatchSet, PatchSetWriter
from counterstain.errors import CounterstainError, InputError, StorageError
from counterstain.storage import read_sealed, write_sealed

PACK = Path("packs/all.ome.zarr")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    draw_set(folder / "set", draw_cohort(folder / "cohort", regions=1), count=1)
    return folder


def patches_of(folder: Path) -> list[bytes]:
    return [patch.image.tobytes() + patch.label_mask.tobytes() for patch in PatchSet.open(folder)]


@pytest.fixture
def cohort(tmp_path) -> Cohort:
    regions = (boxes(name, (1, 2, 3, 20, 30), (4, 30, 30, 40, 50), slide=f"s-{name}") for name in "ab")
    return store(tmp_path / "cohort", *regions)


def test_a_slide_named_like_a_part_of_another_keeps_its_regions(tmp_path):
    out = CohortWriter(tmp_path / "cohort", HER2, 0.5, {})
    units = [("A", 0), ("A", 1), ("A/1", 0), ("a", 0), ("A@1", 0)]
    for slide, part in units:
        assert not out.has(slide, part)
        out.add(slide, [boxes(f"{slide}-{part}", slide=slide)], part)
    assert len(out.finish(len(units))) == len(units)
    with pytest.raises(StorageError, match="holds 5 regions of 6; delete the folder and give the same command again"):
        out.finish(6)


def test_regions_of_one_name_are_refused(tmp_path):
    out = CohortWriter(tmp_path / "cohort", HER2, 0.5, {})
    for slide in ("s1", "s2"):
        out.add(slide, [boxes("r", slide=slide)])
    with pytest.raises(InputError, match="two regions are called 'r'; rename one and import again"):
        out.finish()


@pytest.mark.parametrize("name", ["", "a\0b", "\x1b[31mred", "line\nbreak", "\udcff", "\u202egnp"])
def test_names_that_no_terminal_or_file_should_get_are_refused(name):
    with pytest.raises(InputError, match=r"patient .*: a name is text without control characters; rename it"):
        boxes("r", patient=name)


def change(file: Path, **changes) -> None:
    described = json.loads(file.read_text())
    file.write_text(json.dumps(described | changes))


def test_a_pack_of_another_format_or_codec_is_not_decoded(cohort):
    image = cohort.folder / PACK / "0"
    whole = (image / "zarr.json").read_text()
    for codec in ("gzip", "numcodecs.pickle", "transpose"):
        (image / "zarr.json").write_text(whole.replace('"zstd"', f'"{codec}"'))
        with pytest.raises(StorageError, match=f"codec '{codec}', expected bytes, crc32c, sharding_indexed, zstd"):
            cohort.read(0)
    (image / "zarr.json").unlink()
    zarray = {"zarr_format": 2, "shape": [3, 2, 64, 64], "chunks": [3, 2, 64, 64], "dtype": "|u1", "fill_value": 0}
    (image / ".zarray").write_text(json.dumps(zarray | {"order": "C", "filters": None, "compressor": {"id": "pickle"}}))
    (image / "0.0.0.0").write_bytes(b"cos\nsystem\n(S'touch stolen'\ntR.")
    with pytest.raises(StorageError, match=r"zarr\.json: no such file"):
        cohort.read(0)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [3, 2, 10**6, 10**6]},
        {"shape": 7},
        {"data_type": "int8"},
        {"codecs": [{"name": "bytes"}] * 3},
        {"codecs": 5},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [3, 2, 10**6, 10**6]}}},
        {"chunk_key_encoding": {"name": "v2"}},
        {"node_type": "group"},
    ],
)
def test_a_pack_that_is_described_otherwise_is_refused(cohort, changes):
    change(cohort.folder / PACK / "0" / "zarr.json", **changes)
    with pytest.raises(StorageError, match=r"is missing or damaged \(.*\); import the cohort again"):
        cohort.read(0)


def test_the_pixels_of_another_pack_are_not_taken_for_these(tmp_path):
    out = CohortWriter(tmp_path / "cohort", HER2, 0.5, {})
    for name in "ab":
        out.add(name, [boxes(name, (1, 2, 3, 20, 30), slide=name)])
    cohort = out.finish()
    packs = cohort.folder / "packs"
    for old, new in (("a", "c"), ("b", "a"), ("c", "b")):
        (packs / f"{old}.ome.zarr").rename(packs / f"{new}.ome.zarr")
    with pytest.raises(StorageError, match="region 0 of 1 is not 'a'"):
        cohort.read(0)


def write_shard(file: Path, *chunks: bytes, shift: int = 0) -> None:
    ends = np.cumsum([len(chunk) for chunk in chunks])
    index = np.array([(end - len(chunk) + shift, len(chunk)) for end, chunk in zip(ends, chunks, strict=True)], "<u8")
    check = google_crc32c.value(index.tobytes()).to_bytes(4, "little")
    file.write_bytes(b"".join(chunks) + index.tobytes() + check)


def streamed(content: bytes) -> bytes:
    """A frame that does not say how much it holds."""
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(content)
    return out.getvalue().to_pybytes()


def unchecked(folder: Path) -> None:
    """Leave out what a pack says of its chunks."""
    described = json.loads((folder / PACK / "zarr.json").read_text())
    described["attributes"]["counterstain"].pop("checks")
    (folder / PACK / "zarr.json").write_text(json.dumps(described))


SOUND = compress(bytes(3 * 64 * 64), 1, True)


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (compress(bytes(10**8)), r"chunk \(0, 0, 0, 0\) has 100,000,000 bytes, expected 12,288"),
        (streamed(bytes(10**8)), r"chunk \(0, 0, 0, 0\) has 0 bytes, expected 12,288"),
        (SOUND + compress(bytes(10**8)), "is missing or damaged"),
        (SOUND + bytes(10**5), r"chunk \(0, 0, 0, 0\) takes 100,"),
        (compress(bytes(100)), r"chunk \(0, 0, 0, 0\) has 100 bytes"),
        (b"PK" * 50, "a chunk is no Zstandard frame"),
        (b"", "a chunk|missing"),
    ],
)
def test_a_chunk_that_claims_to_hold_more_or_less_is_not_decoded(cohort, chunk, message):
    unchecked(cohort.folder)
    write_shard(cohort.folder / PACK / "0/c/0/0/0/0", chunk, SOUND)
    tracemalloc.start()
    with pytest.raises(StorageError, match=message):
        cohort.patch(0, 8, 8, 32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


def test_an_index_that_leads_out_of_its_file_or_was_changed_is_refused(cohort):
    shard = cohort.folder / PACK / "0/c/0/0/0/0"
    write_shard(shard, SOUND, SOUND, shift=10**6)
    with pytest.raises(StorageError, match="the index of a shard leads beyond its end"):
        cohort.read(0)
    content = bytearray(shard.read_bytes())
    content[-20] ^= 1
    shard.write_bytes(content)
    with pytest.raises(StorageError, match="the index of a shard is not what was written"):
        cohort.read(0)


@pytest.mark.parametrize(
    "changes",
    [
        {"instance": [3, 2, 1, 2]},  # the window shows 1, the table has no such instance
        {"x0": [10, 30, 3, 30], "x1": [37, 50, 30, 50]},  # some of 1 is outside its box
        {"area_px": [458, 200, 459, 200]},  # more of 1 is shown
    ],
)
def test_a_window_that_shows_what_its_table_does_not_is_an_error(cohort, changes):
    unsealed(cohort.folder)
    file = cohort.folder / "instances.parquet"
    pd.read_parquet(file).assign(**changes).to_parquet(file)
    with pytest.raises(StorageError, match="a does not show the instances of its table; import the cohort again"):
        Cohort.open(cohort.folder).patch(0, 0, 0, 32)


@pytest.mark.parametrize("shard", ["0/c/0/0/0/0", "labels/instances/0/c/0/0/0"])
def test_chunks_of_another_pack_are_not_taken_for_these(tmp_path, shard):
    out = CohortWriter(tmp_path / "cohort", HER2, 0.5, {})
    for name, right in (("a", 30), ("b", 31)):
        out.add(name, [boxes(name, (1, 2, 3, 20, right), slide=name)])
    cohort = out.finish()
    one, other = (cohort.folder / f"packs/{name}.ome.zarr/{shard}" for name in "ab")
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    for position in (0, 1):
        with pytest.raises(StorageError, match="is of another pack or was replaced"):
            cohort.patch(position, 40, 40, 16)


def unsealed(folder: Path) -> None:
    """Make a cohort as earlier versions wrote them."""
    header = read_sealed(folder / "cohort.json")
    header.pop("tables")
    (folder / "cohort.json").write_text(json.dumps(header))


def test_a_cohort_without_checksums_opens_as_before(cohort):
    fingerprint = cohort.fingerprint
    unsealed(cohort.folder)
    assert Cohort.open(cohort.folder).fingerprint == fingerprint
    assert Cohort.open(cohort.folder).write_split({"s-a": "train", "s-b": "test"}).patients("test") == ["s-b"]


def test_a_split_that_is_interrupted_leaves_a_cohort_that_opens(cohort, monkeypatch):
    monkeypatch.setattr("counterstain.storage.Path.replace", interrupt_at("regions.parquet", Path.replace))
    with pytest.raises(KeyboardInterrupt):
        cohort.write_split({"s-a": "val", "s-b": "test"})
    assert Cohort.open(cohort.folder).patients("train") == ["s-a", "s-b"]


def interrupt_at(name, replace):
    def replaced(partial, path):
        if path.name == name:
            raise KeyboardInterrupt
        return replace(partial, path)

    return replaced


@pytest.mark.parametrize(
    ("table", "column", "values", "message"),
    [
        ("regions", "height_px", [64, -1], r"regions\.parquet row 2: height_px is '-1', expected pixels"),
        ("regions", "width_px", [2**62, 64], "row 1: width_px"),
        ("regions", "x_level0_px", [0, 2**60], "row 2: x_level0_px"),
        ("regions", "x_level0_px", [0.5, float("nan")], "column 'x_level0_px' is of double, expected integer|empty"),
        ("regions", "mpp_level0", [0.0, 1.0], "row 1: mpp_level0"),
        ("regions", "region", ["a", "a"], "row 2: region is 'a', expected a name of its own"),
        ("regions", "region", ["a", None], "column 'region' has empty cells"),
        ("regions", "patient", [["a"], ["b"]], "column 'patient' is of list"),
        ("regions", "patient", ["a", "\x1b[2J"], "row 2: patient"),
        ("regions", "patient", ["a", "x" * 20_000], "column 'patient' has a text of 20,000 characters"),
        ("regions", "pack", ["all", "../../all"], "row 2: pack"),
        ("regions", "index", [0, 0], "row 2: index"),
        ("regions", "split", ["train", "tests"], "row 2: split is 'tests'"),
        ("regions", "score", [1, 2], "column 'score' is of int64, expected text"),
        ("instances", "region", ["a", "a", "b", "c"], "row 4: region is 'c', expected a region of regions"),
        ("instances", "instance", [1, 1, 1, 2], "row 2: instance"),
        ("instances", "instance", [1, 2, 1, 2**40], "row 4: instance"),
        ("instances", "subtype", [1, 4, 1, 77], "row 4: subtype is '77', expected the id of a subtype"),
        ("instances", "y1", [20, 40, 20, 2**40], "row 4: y1"),
        ("instances", "x0", [3, 30, 3, -5], "row 4: x1"),
        ("instances", "area_px", [459, 200, 459, 10**9], "row 4: area_px"),
        ("instances", "area_px", [459, 200, 459, 100], "b does not show the instances of its table"),
        ("instances", "area_px", None, "column 'area_px' is missing"),
    ],
)
def test_a_table_that_holds_what_cannot_be_is_refused_with_its_place(cohort, table, column, values, message):
    unsealed(cohort.folder)
    file = cohort.folder / f"{table}.parquet"
    found = pd.read_parquet(file).drop(columns=column)
    (found if values is None else found.assign(**{column: values})).to_parquet(file)
    with pytest.raises(StorageError, match=message):
        Cohort.open(cohort.folder).read(1)


def test_more_rows_than_a_file_can_hold_and_columns_of_one_name_are_refused(cohort):
    unsealed(cohort.folder)
    file = cohort.folder / "instances.parquet"
    found = pd.read_parquet(file)
    pd.concat([found.iloc[:1]] * 10**6).to_parquet(file, compression="zstd")
    with pytest.raises(StorageError, match="1,000,000 rows in"):
        Cohort.open(cohort.folder)
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [*found.columns, "subtype"]
    pq.write_table(pa.table([found[name].to_list() for name in columns], names=columns), file)
    with pytest.raises(StorageError, match="column 'subtype' is there twice"):
        Cohort.open(cohort.folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mpp": -1}, "mpp: Input should be greater than 0"),
        ({"mpp": [1]}, "mpp: "),
        ({"taxonomy": 5}, "taxonomy: "),
        ({"source": {"patients_seen": "p1"}}, "patients_seen: expected a list of names"),
        ({"format": "x" * 999}, "cohort format x{80}, this version reads 1"),
        ({"more": 1}, "more: unknown key"),
    ],
)
def test_a_hostile_header_is_one_line(cohort, changes, message):
    file = cohort.folder / "cohort.json"
    write_sealed(file, read_sealed(file) | changes)
    with pytest.raises(CounterstainError, match=message) as error:
        Cohort.open(cohort.folder)
    assert len(str(error.value)) < 500
    file.unlink()
    file.mkdir()
    with pytest.raises(StorageError, match=r"cohort\.json: cannot be read"):
        Cohort.open(cohort.folder)


@pytest.mark.parametrize("name", ["set.json", "shards/00000/hashes.json", "shards/00000/patches.parquet"])
def test_a_damaged_set_is_mended_when_it_is_made_again(drawn, tmp_path, name):
    folder = tmp_path / "set"
    shutil.copytree(drawn / "set", folder)
    whole, header = patches_of(folder), PatchSet.open(folder).header
    (folder / name).write_bytes((folder / name).read_bytes()[:-9])
    with pytest.raises(StorageError, match="damaged"):
        patches_of(folder)
    writer = PatchSetWriter(folder, header)
    assert writer.missing_shards() == ([] if name == "set.json" else [0])
    for shard in writer.missing_shards():
        shutil.copytree(
            drawn / "set" / "shards" / f"{shard:05d}", folder / "shards" / f"{shard:05d}", dirs_exist_ok=True
        )
    writer.finish()
    assert patches_of(folder) == whole


@pytest.mark.parametrize(
    ("changes", "message"), [({"size_px": 10**6}, "size_px"), ({"count": 10**12}, "missing or damaged")]
)
def test_a_set_of_absurd_size_is_refused(drawn, tmp_path, changes, message):
    folder = tmp_path / "set"
    shutil.copytree(drawn / "set", folder)
    write_sealed(folder / "set.json", read_sealed(folder / "set.json") | changes)
    with pytest.raises(CounterstainError, match=message):
        PatchSet.open(folder).patches  # noqa: B018


@pytest.mark.parametrize("cut", ["gone", "empty"])
def test_a_chunk_that_is_lost_is_not_read_as_black(cohort, cut):
    chunk = cohort.folder / PACK / "0/c/0/0/0/0"
    if cut == "gone":
        chunk.unlink()
    else:
        chunk.write_bytes(b"")
    with pytest.raises(StorageError, match="is missing or damaged"):
        Cohort.open(cohort.folder).read(0)
