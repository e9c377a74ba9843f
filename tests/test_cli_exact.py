import pytest

from counterstain.io.annotations import read_annotations

SQUARE = {"x1": 10, "y1": 10, "x2": 30, "y2": 10, "x3": 30, "y3": 30}
TUMOUR = {"id": 7, "name": "Tumour", "vector_type": 5, "product": 1, "color_code": "#FF0000"}
ROW = {"id": 1, "annotation_type": TUMOUR, "image": {"id": 12, "name": "A.mrxs"}, "vector": SQUARE, "deleted": False}
COMMAND = ("import", "exact", "--server", "https://exact.example")


@pytest.fixture
def asked(monkeypatch):
    """A server that answers with one row, and what it was asked for."""
    servers = []

    def fetch(server, *, told):
        servers.append(server)
        told(1, 2)
        told(2, 2)
        return {"count": 1, "next": None, "previous": None, "results": [ROW]}

    monkeypatch.setattr("counterstain.io.annotations.exact_server.fetch_exact", fetch)
    return servers


def test_what_is_fetched_is_saved_for_the_import_of_slides(run, asked, tmp_path):
    out = tmp_path / "a.json"
    status, printed, told = run(
        "import", "exact", "--server", "https://exact.example", "--images", "1, 2", "--out", out
    )
    assert status == 0
    assert printed.startswith(f"{out}: 1 annotations\nnext: counterstain import labels {out} --format exact")
    assert told == "\rimages: 2 of 2\n"
    assert (asked[0].images, asked[0].image_set) == ((1, 2), None)
    assert read_annotations(out, "exact").labels == {"Tumour": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--images", "1;2"), "--images 1;2: expected numbers with commas between them, such as 1,2,3"),
        ((), "import exact: expected either image_set or images"),
        (("--images", "1", "--image-set", "2"), "import exact: expected either image_set or images"),
        (("--images", "1", "--out", "."), "--out .: expected the name of a file that ends in .json"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_asked(run, asked, tmp_path, words, message):
    status, _, error = run(*COMMAND, "--out", tmp_path / "a.json", *words)
    assert (status, error, asked) == (2, f"error: {message}\n", [])


def test_credentials_are_asked_for(run, monkeypatch, tmp_path):
    pytest.importorskip("exact_sync", reason="EXACT-Sync is not installed (extra [exact])")
    for name in ("TOKEN", "USERNAME", "PASSWORD"):
        monkeypatch.delenv(f"EXACT_{name}", raising=False)
    status, _, error = run(
        "import", "exact", "--server", "https://exact.example", "--images", 1, "--out", tmp_path / "a.json"
    )
    assert status == 2
    assert error.startswith("error: no credentials for EXACT; set the environment variable EXACT_TOKEN")
