import errno
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr
from drawn_cohort import HER2, boxes, store
from zarr.codecs import ZstdCodec

from counterstain.data import chunked_array, region_store
from counterstain.data.cohort import Cohort, CohortWriter
from counterstain.errors import InputError, MismatchError, StorageError


def region(name, *, height=20, slide="s1", split="train", empty=False):
    drawn = () if empty else ((1, 2, 3, 6, 9), (4, 10, 20, 15, 25))
    known = {"slide": slide, "patient": f"p-{slide}", "split": split, "score": "3+"}
    place = {"mpp_level0": 0.25, "origin_xy_level0_px": (100, 200)}
    return boxes(name, *drawn, shape=(height, 30), **known, **place)


def writer(folder, **change):
    return CohortWriter(folder, **({"taxonomy": HER2, "mpp": 0.5, "source": {"kind": "drawn"}} | change))


def test_regions_come_back_as_they_were_store(tmp_path):
    regions = [region("a"), region("b"), region("c", height=25)]
    cohort = store(tmp_path / "cohort", *regions)
    assert len(cohort) == 3
    for position, original in enumerate(regions):
        image, instances = cohort.read(position)
        np.testing.assert_array_equal(image, original.image)
        np.testing.assert_array_equal(instances, original.instances)
        assert cohort.subtypes(position) == original.subtypes
    row = cohort.regions.iloc[2]
    assert (row["height_px"], row["width_px"], row["x_level0_px"], row["y_level0_px"]) == (25, 30, 100, 200)
    assert cohort.instances["area_px"].tolist() == [24, 25] * 3
    assert cohort.instances[["y0", "x0", "y1", "x1"]].iloc[1].tolist() == [10, 20, 15, 25]


def test_a_patch_shows_a_window_and_its_instances(tmp_path):
    cohort = store(tmp_path / "cohort", region("a"))
    patch = cohort.patch(0, 8, 12, 10)
    np.testing.assert_array_equal(patch.image, cohort.read(0)[0][8:18, 12:22])
    assert patch.subtypes == {2: 4}
    assert patch.label_mask[3, 9] == 4
    assert patch.source == type(patch.source)(region="a", slide="s1", patient="p-s1", y_px=8, x_px=12)


def test_a_region_larger_than_a_chunk_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(region_store, "CHUNK_PX", 16)
    monkeypatch.setattr(region_store, "READ_PX", 7)
    for shard_bytes in (2**20, 0):
        monkeypatch.setattr(region_store, "SHARD_BYTES", shard_bytes)
        cohort = store(tmp_path / f"cohort-{shard_bytes}", region("a"), region("b"))
        np.testing.assert_array_equal(cohort.read(0)[0], region("a").image)


class Drawn:
    """An image, or a map of one instance, that is drawn as it is read."""

    def __init__(self, *shape):
        self.shape = shape

    def read(self, y_px, x_px, height_px, width_px):
        is_map = len(self.shape) == 2
        piece = np.full((height_px, width_px, *self.shape[2:]), 200, np.int32 if is_map else np.uint8)
        if is_map:
            piece[:] = y_px + np.arange(height_px)[:, None] >= 1000
        return piece


def test_a_large_region_is_written_band_by_band(tmp_path, monkeypatch):
    monkeypatch.setattr(region_store, "SHARD_BYTES", 2**20)
    out, (height, width) = writer(tmp_path / "cohort"), (4000, 2500)
    large = replace(region("a"), image=Drawn(height, width, 3), instances=Drawn(height, width), subtypes={1: 1})
    tracemalloc.start()
    out.add("a", [large])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25e6  # its image takes 30 MB, its map 40 MB
    cohort = out.finish(1)
    assert cohort.instances.drop(columns="region").to_numpy().tolist() == [
        [1, 1, 3000 * width, 1000, 0, height, width],
    ]
    assert cohort.read(0)[1][998:1002, 7].tolist() == [0, 0, 1, 1]


def test_regions_without_instances_are_kept(tmp_path):
    cohort = store(tmp_path / "cohort", region("a", empty=True))
    assert cohort.patch(0, 0, 0, 8).subtypes == {}
    assert cohort.composition().empty


def test_many_small_regions_are_few_files_and_memory_holds_no_more_of_them_than_it_may(tmp_path, decoded):
    folder = store(tmp_path / "cohort", *(region(f"r{i:02d}") for i in range(50))).folder
    assert sum(path.is_file() for path in folder.rglob("*")) < 15
    others = 50 * (200 + 2 * 16 + 2 * 4) + 5000  # what is known of the pack
    cohort = Cohort.open(str(folder), cache_bytes=others + 2 * 20 * 30 * 7)
    counts = []
    for position in (0, 1, 0, 2, 0, 1, 0):
        cohort.read(position)
        counts.append(len(decoded))
    assert counts == [2, 4, 4, 6, 6, 8, 8]  # an image and a map each


@pytest.fixture
def decoded(monkeypatch):
    """One entry for each chunk that is decoded."""
    chunks, decompress = [], chunked_array.decompress
    monkeypatch.setattr(chunked_array, "decompress", lambda *known: chunks.append(known) or decompress(*known))
    return chunks


def test_a_patch_decodes_the_chunks_under_it_once(tmp_path, monkeypatch, decoded):
    monkeypatch.setattr(region_store, "CHUNK_PX", 8)
    cohort = store(tmp_path / "cohort", region("a"), region("b"))
    image, instances = region("b").image, region("b").instances
    for y, x, chunks in ((0, 0, 2), (0, 1, 4), (7, 7, 8), (7, 7, 8), (12, 20, 16)):
        patch = cohort.patch(1, y, x, 8)
        np.testing.assert_array_equal(patch.image, image[y : y + 8, x : x + 8])
        np.testing.assert_array_equal(patch.instances, instances[y : y + 8, x : x + 8])
        assert len(decoded) == chunks


@pytest.fixture
def few_files():
    """Let this process open 40 files more than it has."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(file.name) for file in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 40, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("size", [16, 1])
def test_a_cohort_of_an_earlier_version_with_a_file_for_each_chunk_is_read(tmp_path, size, few_files):
    cohort = store(tmp_path / "cohort", region("a"), region("b"))
    for name, chunk in (("0", (3, 1, size, size)), ("labels/instances/0", (1, size, size))):
        folder = cohort.folder / "packs/all.ome.zarr" / name
        pixels = zarr.open_array(folder, mode="r")[...]
        shutil.rmtree(folder)
        layout = {"chunks": chunk, "compressors": ZstdCodec(checksum=True), "config": {"write_empty_chunks": True}}
        zarr.create_array(folder, data=pixels, **layout)
    zarr.open_group(cohort.folder / "packs/all.ome.zarr").attrs["counterstain"] = {"regions": ["a", "b"]}
    np.testing.assert_array_equal(cohort.read(1)[0], region("b").image)
    np.testing.assert_array_equal(cohort.patch(1, 9, 14, 11).instances, region("b").instances[9:20, 14:25])


def test_threads_and_copies_for_other_processes_read_the_same(tmp_path):
    cohort = store(tmp_path / "cohort", *(region(f"r{i}") for i in range(9)))
    whole = [cohort.patch(i, 3, 4, 10).image.tobytes() for i in range(9)]
    copy = pickle.loads(pickle.dumps(Cohort.open(cohort.folder, cache_bytes=3000)))
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda i: copy.patch(i % 9, 3, 4, 10).image.tobytes(), range(180)))
    assert found == whole * 20


def test_a_cohort_shows_its_composition(tmp_path):
    cohort = store(tmp_path / "cohort", region("a"), region("b", slide="s2", split="val"), region("c", split=None))
    first, header, *rows = repr(cohort).splitlines()
    assert first == f"Cohort({tmp_path / 'cohort'}: her2, 0.5 um/px)"
    assert header.split()[:6] == ["split", "patients", "slides", "regions", "HER2", "0"]
    assert [row.split() for row in rows[:2]] == [[part, *"11110010"] for part in ("train", "val")]
    assert rows[2].split() == ["no", "split", *"11110010"]


def test_parts_are_looked_up_by_name_and_counted_by_slide(tmp_path):
    cohort = store(tmp_path / "cohort", region("a"), region("b"), region("c", slide="s2", split="val"))
    assert cohort.positions("val").tolist() == [2]
    assert cohort.patients("val") == ["p-s2"]
    with pytest.raises(InputError, match=r"no region in split 'test'; run 'counterstain split"):
        cohort.positions("test")
    table = cohort.composition().set_index(["slide", "subtype"])
    assert table.loc[("s1", "HER2 0"), ["instances", "area_px"]].tolist() == [2, 48]
    assert table.loc[("s2", "HER2 3+"), ["instances", "area_px"]].tolist() == [1, 25]


def test_names_that_no_file_may_have_are_stored(tmp_path):
    out = writer(tmp_path / "cohort")
    for name in ("../a/b", "..", "Größe 1", "Größe_1"):
        out.add(name, [region(name, slide=name)])
    assert sorted(out.finish().regions["slide"]) == sorted(["../a/b", "..", "Größe 1", "Größe_1"])
    assert [path.name for path in tmp_path.iterdir()] == ["cohort"]


def test_a_slide_named_like_a_pack_of_another_keeps_its_pixels(tmp_path):
    out = writer(tmp_path / "cohort")
    mine = {"a": [region("a1"), region("a2", height=25)], "a-20x30": [region("b1")], "a-25x30": [region("b2")]}
    for name, regions in mine.items():
        out.add(name, regions)
    cohort = out.finish()
    drawn = {r.region: r.image for regions in mine.values() for r in regions}
    assert cohort.regions["pack"].nunique() == 4
    for position, name in enumerate(cohort.regions["region"]):
        np.testing.assert_array_equal(cohort.read(position)[0], drawn[name])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ome_zarr|zarr|dask")
def test_the_reader_of_ome_zarr_opens_a_pack_and_its_labels(tmp_path):
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    regions = [region("a"), region("b")]
    cohort = store(tmp_path / "cohort", *regions)
    nodes = list(Reader(parse_url(cohort.folder / "packs" / "all.ome.zarr"))())
    image, labels = nodes[0], nodes[-1]
    np.testing.assert_array_equal(np.asarray(image.data[0])[:, 1], np.moveaxis(regions[1].image, -1, 0))
    np.testing.assert_array_equal(np.asarray(labels.data[0])[0], regions[0].instances)
    assert [axis["name"] for axis in image.metadata["axes"]] == ["c", "z", "y", "x"]
    assert image.metadata["coordinateTransformations"][0][0]["scale"] == [1, 1, 0.5, 0.5]


def test_a_folder_without_a_cohort_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no such cohort; make one with 'counterstain import'"):
        Cohort.open(tmp_path / "none")
    with pytest.raises(InputError, match=r"not a cohort \(cohort.json is missing\)"):
        Cohort.open(tmp_path)


def test_an_interrupted_import_says_so_and_goes_on(tmp_path):
    out = writer(tmp_path / "cohort")
    out.add("s1", [region("a")])
    with pytest.raises(InputError, match="its import was interrupted; give the same import command again"):
        Cohort.open(tmp_path / "cohort")
    again = writer(tmp_path / "cohort")
    assert again.has("s1")
    assert not again.has("s2")
    again.add("s2", [region("b", slide="s2")])
    assert len(again.finish()) == 2


def test_a_folder_holds_one_cohort_with_a_region_at_least(tmp_path):
    with pytest.raises(InputError, match="the cohort is empty"):
        writer(tmp_path / "cohort").finish()
    with pytest.raises(MismatchError, match=r"another run \(cohort: mpp was 0\.5, now 0\.25\)"):
        writer(tmp_path / "cohort", mpp=0.25)


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("cohort.json", b'{"format": 99}', InputError, "cohort format 99, this version reads 1; import it again"),
        (
            "instances.parquet",
            b"PAR1",
            StorageError,
            r"instances.parquet is missing or damaged \(.*import the cohort again",
        ),
    ],
)
def test_a_cohort_of_another_format_or_with_a_damaged_table_is_an_error(tmp_path, file, content, error, message):
    cohort = store(tmp_path / "cohort", region("a"))
    (cohort.folder / file).write_bytes(content)
    with pytest.raises(error, match=message):
        Cohort.open(cohort.folder)


@pytest.mark.parametrize("missing", ["", "zarr.json", "0/zarr.json", "0/c", "labels/instances/0/c", "the ends"])
def test_a_damaged_pack_is_an_error(tmp_path, missing):
    cohort = store(tmp_path / "cohort", region("a"))
    path = cohort.folder / "packs" / "all.ome.zarr" / missing
    if missing == "the ends":
        for chunk in (path for path in path.parent.rglob("c/**/*") if path.is_file()):
            chunk.write_bytes(chunk.read_bytes()[:-20])
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(StorageError, match=r"all\.ome\.zarr.* is missing or damaged \(.*; import the cohort again"):
        cohort.read(0)


def test_a_torn_description_of_a_pack_has_one_remedy(tmp_path):
    cohort = store(tmp_path / "cohort", region("a"))
    (cohort.folder / "packs" / "all.ome.zarr" / "0" / "zarr.json").write_text('{"zarr_fo')
    with pytest.raises(StorageError, match="import the cohort again") as error:
        cohort.read(0)
    assert "make it again" not in str(error.value)


@pytest.mark.parametrize("array", ["0", "labels/instances/0"])
def test_a_region_that_lacks_one_of_its_chunks_is_an_error(tmp_path, monkeypatch, array):
    monkeypatch.setattr(region_store, "CHUNK_PX", 16)
    monkeypatch.setattr(region_store, "SHARD_BYTES", 0)
    cohort = store(tmp_path / "cohort", region("a"))
    chunks = sorted(path for path in (cohort.folder / "packs/all.ome.zarr" / array / "c").rglob("*") if path.is_file())
    chunks[0].unlink()
    with pytest.raises(StorageError, match=r"all\.ome\.zarr.* is missing or damaged \(chunk"):
        cohort.read(0)


def test_a_full_disk_leaves_no_half_pack(tmp_path, monkeypatch):
    out = writer(tmp_path / "cohort")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        out.add("s1", [region("a")])
    assert not any((tmp_path / "cohort" / "packs").iterdir())
    assert not out.has("s1")


def test_a_stored_split_is_read_back(tmp_path):
    unsplit = store(tmp_path / "cohort", region("a", split=None), region("b", slide="s2", split=None))
    before = unsplit.fingerprint
    split = unsplit.write_split({"p-s1": "train", "p-s2": "test"})
    assert split.regions["split"].tolist() == ["train", "test"]
    again = Cohort.open(split.folder)
    assert again.fingerprint == split.fingerprint != before
    pd.testing.assert_frame_equal(again.regions, split.regions)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from counterstain.data import cohort as module
from test_cohort import region, writer
out = writer(Path(sys.argv[1]))
out.add("s1", [region("a")])
module.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # the pack is there, its tables are not
out.add("s2", [region("b", slide="s2")])
"""


def test_a_killed_import_ends_as_if_it_had_not_been_killed(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(Path(__file__).parent)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    for folder in ("killed", "whole"):
        out = writer(tmp_path / folder)
        for name, slide in (("a", "s1"), ("b", "s2")):
            if not out.has(slide):
                out.add(slide, [region(name, slide=slide)])
        out.finish()
    killed, whole = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "killed", tmp_path / "whole")
    )
    assert killed == whole
