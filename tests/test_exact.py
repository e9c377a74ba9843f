import json
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, urlsplit

import hostile_answers
import pytest

from counterstain.config import build
from counterstain.errors import ConfigError, InputError
from counterstain.io.annotations import exact_server, read_annotations
from counterstain.io.annotations.exact_server import ExactServer, fetch_exact
from counterstain.storage import write_json

BOX, POINT, POLYGON = 1, 2, 5
SQUARE = {"x1": 10, "y1": 10, "x2": 30, "y2": 10, "x3": 30, "y3": 30, "x4": 10, "y4": 30}
TUMOUR = {"id": 7, "name": "Tumour", "vector_type": POLYGON, "product": 1, "color_code": "#FF0000"}
IMAGE = {"id": 12, "name": "A1.mrxs", "filename": "A1.mrxs", "width": 9, "height": 8, "mpp": 0.25, "image_set": 12}


def row(number=1, vector=SQUARE, exact_type=TUMOUR, **more):
    return {"id": number, "annotation_type": exact_type, "image": IMAGE, "vector": vector, "deleted": False, **more}


def page(rows, count=None, following=None):
    return {"count": len(rows) if count is None else count, "next": following, "previous": None, "results": rows}


def read(tmp_path, content, types=None):
    path, types_path = tmp_path / "a.json", tmp_path / "types.json"
    path.write_text(json.dumps(content))
    types_path.write_text(json.dumps(types))
    return read_annotations(path, "exact", types=types_path if types else None)


@pytest.mark.parametrize("content", [[row()], page([row()]), [page([row()], 1)]])
def test_rows_are_read_from_every_layout(tmp_path, content):
    (annotation,) = read(tmp_path, content).annotations
    assert (annotation.id, annotation.label, annotation.slide) == ("1", "Tumour", "A1.mrxs")
    assert annotation.polygon.bounds == (10, 10, 30, 30)


def test_pages_of_several_images_are_joined(tmp_path):
    file = read(tmp_path, [page([row()], 2), page([row(2, image={"id": 13, "name": "/data/B2.mrxs"})], 2)])
    assert file.slides == ("A1.mrxs", "B2.mrxs")
    assert [a.id for a in file.of_slide("B2.mrxs")] == ["2"]


def test_two_images_of_one_name_are_not_mixed(tmp_path):
    with pytest.raises(
        InputError, match=r"two slides are called 'A1\.mrxs' \(numbers 12 and 40\); save the annotations"
    ):
        read(tmp_path, [row(), row(2, image={**IMAGE, "id": 40})])


@pytest.mark.parametrize("content", [page([row()], 3), [page([row()], 3), page([row(2)], 3)]])
def test_missing_pages_are_noticed(tmp_path, content):
    with pytest.raises(InputError, match=r"holds \d of 3 rows, pages are missing"):
        read(tmp_path, content)


def test_what_is_no_outline_is_counted(tmp_path):
    kinds = [{**TUMOUR, "id": 100 + kind, "name": f"k{kind}", "vector_type": kind} for kind in (2, 3, 4, 7, 8)]
    rows = [row(i, exact_type=kind) for i, kind in enumerate(kinds)]
    file = read(tmp_path, [*rows, row(8, None), row(9, deleted=True), row(10, {})])
    assert not file.annotations
    assert sum(file.skipped.values()) == 8
    assert file.skipped["deleted row"] == 1
    assert file.skipped["row without outline (vector is null)"] == 2


def test_boxes_become_rectangles_and_points_follow_their_numbers_not_their_places(tmp_path):
    box = {"x1": 30, "y1": 5, "x2": 10, "y2": 9}
    shuffled = dict(sorted(SQUARE.items(), key=lambda item: item[0][0]))
    file = read(tmp_path, [row(1, box, {**TUMOUR, "id": 8, "vector_type": BOX}), row(2, shuffled)])
    assert [(a.polygon.bounds, a.polygon.area) for a in file.annotations] == [
        ((10, 5, 30, 9), 80),
        ((10, 10, 30, 30), 400),
    ]


def test_types_and_images_that_are_numbers_stay_recognisable(tmp_path):
    two_points = {"x1": 1, "y1": 1, "x2": 5, "y2": 5}
    file = read(tmp_path, [row(exact_type=7, image=12), row(vector=two_points, exact_type=7)])
    assert (file.annotations[0].label, file.annotations[0].slide) == ("type 7", "image 12")
    assert file.skipped == {"two points of a type that is only a number (a box or a line?)": 1}


@pytest.mark.parametrize("exact_type", [None, ""])
def test_a_row_without_a_type_is_unclassified(tmp_path, exact_type):
    (annotation,) = read(tmp_path, [row(exact_type=exact_type)]).annotations
    assert annotation.label == "Unclassified"


@pytest.mark.parametrize("types", [{"7": "Tumour"}, page([TUMOUR]), [TUMOUR]])
def test_a_file_of_types_names_them(tmp_path, types):
    assert read(tmp_path, [row(exact_type=7)], types).labels == {"Tumour": 1}


def test_a_name_that_two_products_share_carries_the_product(tmp_path):
    types = [{**TUMOUR, "id": i, "product": {"id": i, "name": f"study {i}"}} for i in (1, 2)]
    file = read(tmp_path, [row(1, exact_type=types[0]), row(2, exact_type=types[1])])
    assert file.labels == {"study 1/Tumour": 1, "study 2/Tumour": 1}


def test_the_name_of_an_image_leads_to_no_other_folder(tmp_path):
    rows = [row(image={"id": 1, "name": name}) for name in ("../../etc/passwd", "..", "C:\\a\\b.svs")]
    rows += [row(image="../../etc/passwd"), row(image={"id": "../x"})]
    assert [a.slide for a in read(tmp_path, rows).annotations] == ["passwd", None, "b.svs", "image passwd", "image x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"id": 1}], "row 1: expected a row of EXACT's API"),
        ([5, row(), 5], "row 1: expected a row of EXACT's API"),
        ({"results": 5}, "page 1 results: expected a list, found 5"),
        ([row(vector=[1])], "row 1 vector: expected an object"),
        ([row(deleted="true")], "row 1 deleted: expected true or false, found 'true'"),
        ([row(vector={"x1": 1, "y1": 1, "x3": 1, "y3": 1})], "row 1 vector: expected x1, y1, .* found 'x3'"),
        ([row(vector={"x1": 1, "y1": 1, "x2": 1, "y1 ": 1})], "vector: expected x1, y1, .* found 'y1 '"),
        ([row(vector={"x1": 1, "x2": 1, "y1": 2})], "vector: expected x1, y1, .* found 'x2'"),
        ([row(vector={"x1": 1, "x2": 1})], "vector: expected x1"),
        ([row(vector={**SQUARE, "x3": "30"})], "vector x3: expected a coordinate .* found '30'"),
        ([row(vector={**SQUARE, "x3": 1e12})], "vector x3: expected a coordinate"),
        ([row(exact_type={"name": "a"})], "row 1 annotation_type: expected a number or an object with an id"),
        ([row(exact_type={"id": 1, "name": 5})], "row 1 annotation_type name: expected a name"),
    ],
)
def test_faults_are_named_with_their_row(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, content)


# A server that is played back


class Playback(BaseHTTPRequestHandler):
    """Answers as EXACT does, page by page; its class attributes are the script."""

    rows: list
    expanded = False
    mishaps: Counter
    page_limit = 2
    attack = None
    root = "/api/v1/"

    def do_GET(self):
        address = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        if self.attack is not None:
            type(self).attack(self)
        elif not address.path.startswith(self.root):
            self.reply(404, {})
        elif self.headers["Authorization"] != "Bearer right":
            self.reply(401, {"detail": "Invalid token."})
        elif "404" in query.get("image_set", ""):
            self.reply(400, {"image_set": ["Select a valid choice."]})
        elif address.path.endswith("/images/images/"):
            self.page([IMAGE] if "12" in {query.get("image_set"), query.get("id")} else [], query)
        elif address.path.endswith("/annotation_types/"):
            self.page([TUMOUR], query)
        else:
            self.annotations(query)

    def annotations(self, query):
        if self.mishaps["busy"] > 0:
            self.mishaps["busy"] -= 1
            self.reply(503, {})
        elif query["offset"] == "2" and self.mishaps["drop"] > 0:
            self.mishaps["drop"] -= 1
            self.reply(200, page(self.rows), cut=40)
        else:
            plain = {"annotation_type": 7, "image": 12}
            self.page([r if self.expanded else {**r, **plain} for r in self.rows], query)

    def page(self, rows, query):
        offset, limit = int(query["offset"]), min(int(query["limit"]), self.page_limit)
        end = offset + limit
        following = f"http://x/?limit={limit}&offset={end}" if end < len(rows) else None
        self.reply(200, page(rows[offset:end], len(rows), following))

    def reply(self, status, content, cut=0):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) - cut])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def playback(monkeypatch):
    pytest.importorskip("exact_sync", reason="EXACT-Sync is not installed (extra [exact])")
    script = type("Script", (Playback,), {"rows": [row(i) for i in range(1, 6)], "mishaps": Counter()})
    monkeypatch.setattr(exact_server, "FIRST_PAUSE_S", 0.01)
    with ThreadingHTTPServer(("127.0.0.1", 0), script) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield script, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def fetch(url, token="right", **more):
    return fetch_exact(ExactServer(url=url, **{"image_set": 12, **more}), environment={"EXACT_TOKEN": token})


@pytest.mark.parametrize("expanded", [False, True])
def test_every_page_is_fetched_and_reads_like_a_saved_file(playback, tmp_path, expanded):
    script, url = playback
    script.expanded = expanded
    script.rows += [row(6, None), row(7, deleted=True)]
    write_json(tmp_path / "a.json", fetch(url))
    file = read_annotations(tmp_path / "a.json", "exact")
    assert [a.id for a in file.annotations] == ["1", "2", "3", "4", "5"]
    assert (file.labels, file.slides) == ({"Tumour": 5}, ("A1.mrxs",))
    assert sum(file.skipped.values()) == 2


def test_images_can_be_chosen_by_number(playback):
    _, url = playback
    assert fetch(url, image_set=None, images=(12,))["count"] == 5
    with pytest.raises(InputError, match="no image with id 99, or none that you may see"):
        fetch(url, image_set=None, images=(99,))


def test_an_unknown_image_set_is_said(playback):
    with pytest.raises(InputError, match=r"does not know image_set 404 \(status 400\); check the number"):
        fetch(playback[1], image_set=404)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (hostile_answers.endless_pages, r"sends page after page, 4 rows so far of 3"),
        (hostile_answers.trickle, "no whole answer within 1 s; fetch fewer images"),
        (hostile_answers.trickling_headers, "no whole answer within 1 s; fetch fewer images"),
        (hostile_answers.gzip_bomb, "sends more than 4 MB; fetch fewer images at a time"),
        (hostile_answers.brackets, "a page of its answer would fill the memory"),
        (hostile_answers.huge, "sends more than 4 MB"),
        (hostile_answers.endless_body, "sends more than 4 MB"),
        (hostile_answers.redirect_with_a_large_body, "sends more than 4 MB"),
        (hostile_answers.circle, "redirects more than 3 times"),
        (hostile_answers.elsewhere, "sends you on to 'https://evil.example/api'; if you trust that server"),
    ],
)
def test_a_hostile_server_is_bounded_in_time_pages_and_bytes(playback, monkeypatch, attack, message):
    script, url = playback
    script.attack = staticmethod(attack)
    monkeypatch.setattr(exact_server, "REQUEST_S", 1)
    monkeypatch.setattr(exact_server, "MAX_JSON_MEMORY", 2**24)
    monkeypatch.setattr(exact_server, "MAX_BYTES", 2**22)
    started = time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        fetch(url)
    assert str(caught.value).startswith(url)
    assert time.monotonic() - started < 5


def test_all_requests_together_are_bounded_in_time(playback, monkeypatch):
    monkeypatch.setattr(exact_server, "TOTAL_S", 0)
    with pytest.raises(InputError, match="no whole answer within 0 s"):
        fetch(playback[1])


def test_a_wrong_token_is_said_without_the_token(playback):
    with pytest.raises(InputError, match=r"refuses these credentials \(status 401\); set EXACT_TOKEN") as caught:
        fetch(playback[1], token="secret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("mishap", "message"),
    [("drop", r"the connection failed 4 times \(.*\); check"), ("busy", "answers with status 503")],
)
def test_a_dropped_connection_or_busy_server_is_tried_again_until_it_ends_in_one_line(playback, capfd, mishap, message):
    script, url = playback
    script.mishaps[mishap] = 2
    assert fetch(url)["count"] == 5
    script.mishaps[mishap] = 99
    with pytest.raises(InputError, match=message) as caught:
        fetch(url)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_server_that_is_not_there_or_not_exact_or_has_no_certificate_is_named(playback):
    script, url = playback
    script.root = "/elsewhere/"
    with pytest.raises(InputError, match=r"status 404\); check the address"):
        fetch(url)
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:9: the connection failed 4 times"):
        fetch("http://127.0.0.1:9")
    with pytest.raises(InputError, match="its certificate cannot be verified"):
        fetch(url.replace("http:", "https:"))


def test_rows_that_vanish_while_they_are_read_are_noticed(playback):
    script, url = playback
    script.rows[3] = script.rows[2]
    with pytest.raises(InputError, match="sent 4 of 5 rows; somebody may be working on them"):
        fetch(url)


def test_credentials_come_from_the_environment_alone(playback):
    server = ExactServer(url=playback[1], image_set=12)
    with pytest.raises(InputError, match="no credentials for EXACT; set the environment variable EXACT_TOKEN"):
        fetch_exact(server, environment={})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "exact.example", "images": (1,)}, "expected https://"),
        ({"url": "http://exact.example", "images": (1,)}, "would send the password unencrypted"),
        ({"url": "https://me:pw@exact.example", "images": (1,)}, "holds a password"),
        ({"url": "https://exact.example"}, "expected either image_set or images"),
    ],
)
def test_unsafe_or_unclear_servers_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(ExactServer, settings)


def test_what_is_fetched_is_saved_for_the_import_of_slides(run, playback, tmp_path, monkeypatch):
    _, url = playback
    monkeypatch.setenv("EXACT_TOKEN", "right")
    out = tmp_path / "a.json"
    status, printed, told = run("import", "exact", "--server", url, "--images", "12", "--out", out)
    assert (status, told) == (0, "\rimages: 1 of 1\n")
    assert printed.startswith(f"{out}: 5 annotations\nnext: counterstain import labels {out} --format exact")
    assert read_annotations(out, "exact").labels == {"Tumour": 5}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--images", "1;2"), "--images 1;2: expected numbers with commas between them, such as 1,2,3"),
        ((), "import exact: expected either image_set or images"),
        (("--images", "1", "--image-set", "2"), "import exact: expected either image_set or images"),
        (("--images", "1", "--out", "."), "--out .: expected the name of a file that ends in .json"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_asked(run, tmp_path, words, message):
    server = ("import", "exact", "--server", "https://exact.example")
    status, _, error = run(*server, "--out", tmp_path / "a.json", *words)
    assert (status, error) == (2, f"error: {message}\n")
