import csv
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from counterstain.errors import InputError, MismatchError, StorageError
from counterstain.storage import (
    claim,
    claimed,
    committing,
    file_identity,
    fingerprint,
    name_on_disk,
    read_csv,
    read_json,
    read_sealed,
    replacing,
    sha256_of,
    sweep,
    write_csv,
    write_json,
    write_parquet,
    write_sealed,
    write_text,
)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def fail_half_way(partial):
    partial.write_text("half")
    raise RuntimeError("killed")


@pytest.fixture
def full_disk(monkeypatch):
    """Let every fsync fail as on a full disk."""

    def fsync(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


def test_what_is_written_is_read_back(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"µm": [1, None]})
    assert read_json(tmp_path / "new" / "a.json") == {"µm": [1, None]}


def test_a_table_keeps_its_floats(tmp_path):
    table = pd.DataFrame({"a": [0.1 + 0.2, 1 / 3]})
    write_csv(tmp_path / "a.csv", table)
    write_parquet(tmp_path / "a.parquet", table)
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert [lines[0], *map(float, lines[1:])] == ["a", *table["a"]]
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "a.parquet"), table)


def test_a_failed_write_leaves_the_old_file_or_folder_and_nothing_else(tmp_path):
    write_text(tmp_path / "folder" / "a.txt", "old")
    with pytest.raises(RuntimeError, match="killed"), replacing(tmp_path / "folder" / "a.txt") as partial:
        fail_half_way(partial)
    with pytest.raises(RuntimeError, match="killed"), committing(tmp_path / "folder") as partial:
        fail_half_way(partial / "b.txt")
    assert names_in(tmp_path) == ["folder"]
    assert names_in(tmp_path / "folder") == ["a.txt"]
    assert (tmp_path / "folder" / "a.txt").read_text() == "old"


def test_a_finished_folder_takes_the_place_of_the_old_one(tmp_path):
    for content in ("old", "new"):
        with committing(tmp_path / "a") as partial:
            (partial / content).mkdir()
            (partial / content / "file").write_text(content)
    assert (tmp_path / "a" / "new" / "file").read_text() == "new"
    assert names_in(tmp_path / "a") == ["new"]


def test_a_full_disk_is_one_line_with_the_remedy(tmp_path, full_disk):
    with pytest.raises(StorageError, match=r"a\.txt: the disk is full; free some space and give the same command"):
        write_text(tmp_path / "a.txt", "text")
    with pytest.raises(StorageError, match="the disk is full"), committing(tmp_path / "folder") as partial:
        (partial / "file").touch()
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "cannot be written")]
)
@pytest.mark.parametrize("write", [replacing, committing])
def test_a_disk_that_takes_no_content_is_one_line(tmp_path, number, message, write):
    with pytest.raises(StorageError, match=message), write(tmp_path / "a"):
        raise OSError(number, "as the system says it")
    assert names_in(tmp_path) == []


KILLED = """
import sys, time
from pathlib import Path
from counterstain.storage import committing
with committing(Path(sys.argv[1]) / "folder") as partial:
    (partial / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_leaves_is_never_taken_for_finished(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "folder").exists()
    with committing(tmp_path / "folder") as partial:
        (partial / "whole").touch()
    assert names_in(tmp_path) == ["folder"]
    assert names_in(tmp_path / "folder") == ["whole"]


def test_a_missing_or_damaged_json_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"a\.json: no such file"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(StorageError, match=r"a\.json: damaged"):
        read_json(tmp_path / "a.json")


def test_hashes_are_those_of_the_content(tmp_path):
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) != fingerprint({"a": 2, "b": [2]})
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a").startswith("ba7816bf8f01cfea")


def test_a_folder_is_for_one_run_and_another_is_told_what_differs(tmp_path):
    settings = {"loss": {"dice": 0.9, "ce": 0.1}, "steps": 10}
    claim(tmp_path / "run", "train", settings)
    (tmp_path / "run" / "content").touch()
    claim(tmp_path / "run", "train", settings)
    with pytest.raises(MismatchError, match=r"another run \(train: loss\.ce was 0\.1, now 0\.5\)"):
        claim(tmp_path / "run", "train", {"loss": {"dice": 0.9, "ce": 0.5}, "steps": 20})
    with pytest.raises(MismatchError, match=r"another run \(train\); give another output folder"):
        claim(tmp_path / "run", "cohort", {})


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({"k": None}, {"k": 3}, "k was not given, now 3"),
        ({"by_hand": True}, {}, "by_hand was yes, now not given"),
        ({"cohort": "a" * 64}, {"cohort": "b" * 64}, "cohort is another"),
    ],
)
def test_what_changed_since_a_claim_is_said_in_words(tmp_path, before, now, told):
    claim(tmp_path / "run", "train", before)
    with pytest.raises(MismatchError, match=rf"\(train: {told}\)"):
        claim(tmp_path / "run", "train", now)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(MismatchError, match="is not empty and was not made by counterstain"):
        claim(tmp_path, "train", {})
    assert names_in(tmp_path) == ["thesis.tex"]


def test_a_place_where_nothing_can_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"file.* cannot be made \(.*\); give another output folder"):
        write_text(tmp_path / "file" / "x.txt", "text")


@pytest.mark.parametrize("written", [(), ("x.txt",)])
def test_a_claim_is_given_back_only_where_nothing_came_of_it(tmp_path, written):
    def write_and_fail():
        with claimed(tmp_path / "run", "train", {}):
            for name in written:
                write_text(tmp_path / "run" / name, "text")
            raise InputError("the weights do not fit")

    with pytest.raises(InputError, match="do not fit"):
        write_and_fail()
    assert (tmp_path / "run" / "run.json").exists() == bool(written)
    assert (tmp_path / "run").exists() == bool(written)


@pytest.mark.parametrize("size", [0, 1, 10_000, 9 * 2**20])
def test_a_file_is_known_again_by_its_size_its_time_and_its_content(tmp_path, size):
    path = tmp_path / "slide.tif"
    path.write_bytes(bytes(size))
    known = file_identity(path)
    assert file_identity(path) == known
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    for start, stop in ((0, min(size, 10)), (max(0, size - 10), size), (size // 3, 2 * size // 3)):
        changed = bytearray(size)
        changed[start:stop] = b"x" * (stop - start)
        path.write_bytes(changed)
        os.utime(path, ns=times)
        assert (file_identity(path) != known) == (stop > start)
    os.utime(path, ns=(0, 0))
    assert file_identity(path)["modified"] != known["modified"]


def test_a_mirax_slide_is_known_by_the_files_beside_it(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a.mrxs").write_bytes(b"a picture of its label")
    (tmp_path / "a" / "Data0000.dat").write_bytes(b"pixels")
    known = file_identity(tmp_path / "a.mrxs")
    (tmp_path / "a" / "Data0000.dat").write_bytes(b"others")
    assert file_identity(tmp_path / "a.mrxs")["sample"] != known["sample"]
    with pytest.raises(InputError, match=r"b\.svs: no such file"):
        file_identity(tmp_path / "b.svs")


def test_what_a_killed_writer_left_of_a_large_file_is_swept_away(tmp_path):
    for name in (".a[1].ckpt.partial-1", ".a[1].ckpt.partial-2", ".b.partial-1", "a[1].ckpt"):
        (tmp_path / name).write_text("")
    sweep(tmp_path / "a[1].ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {".b.partial-1", "a[1].ckpt"}


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from counterstain.storage import claim, replacing
claim(Path(sys.argv[1]), "train", {})
with replacing(Path(sys.argv[1]) / "folder" / "a.txt") as partial:
    partial.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_removed_by_the_next_run_but_not_what_is_being_written(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path / "run")], check=False)
    (left_over,) = (tmp_path / "run" / "folder").iterdir()
    with replacing(tmp_path / "run" / "b.txt") as partial:
        partial.write_text("whole")
        claim(tmp_path / "run", "train", {})
        assert not left_over.exists()
    assert names_in(tmp_path / "run") == ["b.txt", "folder", "run.json"]


def test_names_on_disk_are_short_and_tell_names_apart():
    names = ["a", "A", "a/b", "a_b", "../a", ".a", "", "ä", "x" * 300, "x" * 301, "a\0", "a~0123456789abcdef"]
    on_disk = [name_on_disk(name) for name in names]
    assert len({name.casefold() for name in on_disk}) == len(names)
    assert name_on_disk("a_b") == "a_b"
    assert all(len(name) < 130 and not set(name) & set("/\0") and name[0] != "." for name in on_disk)
    assert name_on_disk(name_on_disk("a/b")) not in on_disk


def test_a_file_with_a_long_name_is_written_and_with_one_too_long_refused(tmp_path, run):
    write_text(tmp_path / ("x" * 250), "text")
    assert names_in(tmp_path) == ["x" * 250]
    status, _, errors = run("phantom", tmp_path / ("y" * 300), "--slides", 1)
    assert (status, errors.count("\n"), "a name in its path is too long" in errors) == (2, 1, True)
    assert names_in(tmp_path) == ["x" * 250]


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "cannot be written")]
)
def test_a_disk_that_fails_under_a_library_is_one_line_of_the_command(tmp_path, run, monkeypatch, number, message):
    def failed(*_):
        raise OSError(number, "as the system says it", "somewhere/events.log")

    monkeypatch.setattr("counterstain.data.phantom.regions_of_slide", failed)
    status, _, errors = run("phantom", tmp_path / "out", "--slides", 1)
    assert status == 2
    assert f"error: somewhere/events.log: {message}" in errors
    assert "Traceback" not in errors


def test_a_sealed_file_is_not_read_where_anything_in_it_was_changed(tmp_path):
    file = tmp_path / "a.json"
    write_sealed(file, {"patients": ["p1"], "mpp": 0.5})
    assert read_sealed(file) == {"patients": ["p1"], "mpp": 0.5}
    whole = file.read_text()
    for old, new in (("p1", "p2"), ("0.5", "0.25"), ("mpp", "npp")):
        file.write_text(whole.replace(old, new))
        with pytest.raises(StorageError, match=r"a\.json: damaged \(its content is not what was written"):
            read_sealed(file)
    for content in ("[]", '{"checksum": {}}', '{"checksum": ["a"]}'):
        file.write_text(content)
        with pytest.raises(StorageError, match="damaged"):
            read_sealed(file)


def test_cells_that_a_spreadsheet_would_compute_get_an_apostrophe_that_is_taken_off_again(tmp_path):
    cells = ["=1+1", "+x", "@a", "-b", "'=1", "'quoted", "-", "-1.5", "3+", ""]
    write_csv(tmp_path / "a.csv", pd.DataFrame({"text": cells, "number": [-1.5] * len(cells)}))
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows][:6] == ["'=1+1", "'+x", "'@a", "'-b", "''=1", "'quoted"]
    assert read_csv(tmp_path / "a.csv", keep_default_na=False)["text"].tolist() == cells
    assert {row["number"] for row in rows} == {"-1.5"}


@pytest.mark.parametrize("place", ["/dev/null", "/dev/full"])
def test_a_device_is_not_replaced_by_a_file(place):
    with pytest.raises(StorageError, match="is not a file, so it is not replaced"):
        write_text(Path(place), "text")
    assert Path(place).is_char_device()


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    with pytest.raises(StorageError, match="is not a file"):
        write_text(tmp_path, "text")


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "file.txt").write_text("old")
    (tmp_path / "folder").mkdir()
    for name in ("file.txt", "folder"):
        (tmp_path / f"link to {name}").symlink_to(name)
    write_text(tmp_path / "link to file.txt", "new")
    with committing(tmp_path / "link to folder") as partial:
        (partial / "inside").write_text("new")
    assert (tmp_path / "link to file.txt").is_symlink()
    assert (tmp_path / "link to folder").is_symlink()
    assert (tmp_path / "file.txt").read_text() == (tmp_path / "folder" / "inside").read_text() == "new"
