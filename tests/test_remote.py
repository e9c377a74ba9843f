"""Cohorts at a URL: read over HTTP as over a disk, a request for each chunk under a patch, and never written."""

import pickle
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
from drawn_cohort import boxes, draw_cohort, store

from counterstain import remote
from counterstain.data.cohort import Cohort, CohortWriter
from counterstain.data.split import keep_training_patients, link_cohort
from counterstain.errors import FetchError, InputError, StorageError
from counterstain.remote import RemoteFolder, place_of
from counterstain.study.config import load_study

pytest.importorskip("aiohttp")


class Server(ThreadingHTTPServer):
    """Sends files and parts of them, and notes what was asked for."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.asked, self.refused, self.failing, self.sends_parts = [], set(), 0, True
        self.url = f"http://127.0.0.1:{self.server_port}"

    def chunks_asked(self):
        """Parts of files since the last call, in bytes."""
        asked, self.asked = [part for _, part in self.asked if part], []
        return asked


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.send_file(with_content=False)

    def do_GET(self):
        self.send_file(with_content=True)

    def send_file(self, *, with_content):
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.server.sends_parts else None
        bounds = (int(part[1]), int(part[2]) + 1) if part else None
        self.server.asked.append((self.path, bounds))
        path = self.translate_path(self.path)
        if self.server.failing > 0:
            self.server.failing -= 1
            return self.send_error(503)
        if self.path.rsplit("/", 1)[-1] in self.server.refused:
            return self.send_error(403)
        try:
            content = Path(path).read_bytes()
        except OSError:
            return self.send_error(404)
        sent = content[slice(*bounds)] if bounds else content
        self.send_response(206 if bounds else 200)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        if with_content:
            self.wfile.write(sent)
        return None


@pytest.fixture
def server(tmp_path):
    with Server(tmp_path) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES_S", (0.0, 0.0))


def test_a_cohort_at_a_url_equals_the_one_on_disk(server, tmp_path):
    here = draw_cohort(tmp_path / "cohort")
    there = Cohort.open(f"{server.url}/cohort")
    assert there.fingerprint == here.fingerprint
    assert repr(there).partition("\n")[2] == repr(here).partition("\n")[2]
    for position in range(len(here)):
        for read, kept in zip(there.read(position), here.read(position), strict=True):
            np.testing.assert_array_equal(read, kept)


def test_a_patch_asks_for_the_chunks_under_it_and_no_other(server, tmp_path):
    store(tmp_path / "cohort", boxes("r1", (1, 10, 10, 700, 700), shape=(1024, 1024)))
    cohort = Cohort.open(f"{server.url}/cohort")
    cohort.patch(0, 0, 0, 64)
    server.chunks_asked()  # the indices of the shards, too
    cohort.patch(0, 300, 300, 400)  # 2 x 2 chunks of 256 px of the image, as many of its instances
    asked = server.chunks_asked()
    assert len(asked) == 8
    cohort.patch(0, 310, 310, 300)
    assert server.chunks_asked() == []
    assert Cohort.open(tmp_path / "cohort").patch(0, 300, 300, 400).image.tobytes() == (
        cohort.patch(0, 300, 300, 400).image.tobytes()
    )


def test_chunks_that_are_not_kept_are_read_again(server, tmp_path):
    here = store(tmp_path / "cohort", boxes("r1", (1, 10, 10, 700, 700), shape=(600, 900)))
    there = Cohort.open(f"{server.url}/cohort", cache_bytes=1)
    np.testing.assert_array_equal(there.read(0)[0], here.read(0)[0])
    np.testing.assert_array_equal(there.instance_map(0, 5, 7, 500, 600), here.instance_map(0, 5, 7, 500, 600))


def test_opening_reads_the_tables_alone(server, tmp_path):
    draw_cohort(tmp_path / "cohort")
    Cohort.open(f"{server.url}/cohort")
    assert {path.rsplit("/", 1)[-1] for path, _ in server.asked} == {
        "cohort.json", "regions.parquet", "instances.parquet",
    }  # fmt: skip


def test_any_file_system_of_fsspec_will_do(tmp_path):
    here = draw_cohort(tmp_path / "cohort")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "cohort"), "/bucket/cohort", recursive=True)
    there = pickle.loads(pickle.dumps(Cohort.open("memory://bucket/cohort")))  # as for another process
    np.testing.assert_array_equal(there.read(1)[0], here.read(1)[0])


def test_a_failed_request_is_sent_again(server, tmp_path):
    draw_cohort(tmp_path / "cohort")
    server.failing = 2
    assert len(Cohort.open(f"{server.url}/cohort")) == 10


def test_no_connection_is_one_line_and_no_damage(server, tmp_path):
    draw_cohort(tmp_path / "cohort")
    cohort = Cohort.open(f"{server.url}/cohort")
    server.failing = 10**6
    with pytest.raises(FetchError, match=r"cannot be read \(503") as error:
        cohort.read(0)
    assert "damaged" not in str(error.value)
    server.failing = 0
    cohort.read(0)


def test_no_connection_is_no_missing_chunk(server, tmp_path):
    draw_cohort(tmp_path / "cohort")
    cohort = Cohort.open(f"{server.url}/cohort")
    server.refused = {"0"}
    with pytest.raises(FetchError, match="403"):
        cohort.read(0)


def test_a_server_that_sends_whole_files_is_named(server, tmp_path):
    draw_cohort(tmp_path / "cohort")
    server.sends_parts = False
    with pytest.raises(FetchError, match="does not send parts of files"):
        Cohort.open(f"{server.url}/cohort").read(0)


def test_a_url_without_a_cohort_is_one_line(server, tmp_path):
    with pytest.raises(InputError, match=r"http://127.*/nothing: no cohort at this URL"):
        Cohort.open(f"{server.url}/nothing")


def test_damage_at_a_url_is_noticed_as_on_a_disk(server, tmp_path):
    draw_cohort(tmp_path / "cohort")
    for file in (tmp_path / "cohort" / "packs").rglob("c/**/0"):
        if file.is_file():
            file.write_bytes(bytes(100) + file.read_bytes()[100:])
    with pytest.raises(StorageError, match="damaged"):
        Cohort.open(f"{server.url}/cohort").read(0)
    table = tmp_path / "cohort" / "instances.parquet"
    table.write_bytes(table.read_bytes() + b" ")
    with pytest.raises(StorageError, match="not what was written"):
        Cohort.open(f"{server.url}/cohort")


def test_a_file_system_that_is_not_installed_is_named_with_the_command(monkeypatch):
    fsspec.register_implementation("buckets", "no_such_package.Files", errtxt="Install no_such_package", clobber=True)
    with pytest.raises(
        FetchError, match=r"^buckets://x/y/cohort.json: Install no_such_package; run: pip install 'counterstain\[re"
    ):
        Cohort.open("buckets://x/y")
    with pytest.raises(FetchError, match=r"unheard://x/cohort\.json: cannot be opened .*unheard"):
        Cohort.open("unheard://x")


def test_nothing_is_written_to_a_url(server, tmp_path):
    cohort = draw_cohort(tmp_path / "cohort")
    url = f"{server.url}/cohort"
    with pytest.raises(InputError, match="can only be read"):
        Cohort.open(url).write_split({})
    with pytest.raises(InputError, match="can only be read"):
        CohortWriter(f"{server.url}/new", cohort.taxonomy, cohort.mpp, {})


@pytest.mark.parametrize(
    "words",
    [
        ("phantom", "s3://bucket/x"),
        ("split", "URL", "--force"),
        ("export", "COHORT", "--format", "png", "--out", "s3://b/x"),
    ],
)
def test_commands_that_would_write_to_a_url_refuse_in_one_line(run, server, tmp_path, words):
    draw_cohort(tmp_path / "cohort")
    places = {"URL": f"{server.url}/cohort", "COHORT": tmp_path / "cohort"}
    status, _, errors = run(*(places.get(word, word) for word in words))
    assert status == 2
    assert re.search(r"(s3|http)://\S+: is a URL, which can only be read", errors.replace("\n", " "))
    assert not list(tmp_path.glob("s3*"))


def test_a_cohort_at_a_url_is_inspected(run, server, tmp_path, monkeypatch):
    draw_cohort(tmp_path / "cohort")
    monkeypatch.chdir(tmp_path)
    status, printed, _ = run("inspect", f"{server.url}/cohort")
    assert status == 0
    assert "cohort-composition.svg" in printed
    assert (tmp_path / "cohort-composition.svg").exists()


def test_training_patients_are_taken_out_of_a_cohort_at_a_url(server, tmp_path):
    whole = draw_cohort(tmp_path / "cohort")
    linked = link_cohort(Cohort.open(f"{server.url}/cohort"), tmp_path / "fewer")
    fewer = keep_training_patients(linked, 2, seed=0)
    assert len(fewer.patients("train")) == 2
    np.testing.assert_array_equal(Cohort.open(tmp_path / "fewer").read(3)[0], whole.read(3)[0])


def test_a_study_names_its_cohort_by_a_url(tmp_path):
    (tmp_path / "study.yaml").write_text("name: s\ncohort: {path: 'https://host/a/cohort'}\n")
    assert load_study(tmp_path / "study.yaml").cohort.path == "https://host/a/cohort"
    (tmp_path / "study.yaml").write_text("name: s\ncohort: {path: cohort}\n")
    assert load_study(tmp_path / "study.yaml").cohort.path == str(tmp_path / "cohort")


def test_urls_survive_pathlib(tmp_path):
    assert place_of(Path("https://host/a")) == RemoteFolder("https://host/a")
    assert place_of("s3://bucket/a/") == RemoteFolder("s3://bucket/a")
    assert place_of("simplecache::s3://bucket/a") == RemoteFolder("simplecache::s3://bucket/a")
    assert place_of("file:///data/a") == RemoteFolder("file:///data/a")
    for unfit in ("https://host/a?sig=1", "zip://c::s3://bucket/a.zip"):
        with pytest.raises(InputError, match="give the URL of a folder, without a query"):
            place_of(unfit)
    assert place_of("C:/Users/cohort") == Path("C:/Users/cohort")
    assert place_of("cohorts/http:") == Path("cohorts/http:")
