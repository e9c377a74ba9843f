"""The studio in a real browser: what people do there works, and nothing leaves this machine."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from drawn_cohort import HER2, SPLIT, draw_region, draw_set
from drawn_requests import ONE, denoiser_config, first_stage_config
from drawn_study import ARMS, draw_study
from PIL import Image
from playwright.sync_api import expect, sync_playwright

import counterstain as cs
from counterstain.data.cohort import CohortWriter
from counterstain.data.patch_set import PatchSet
from counterstain.generators.diffusion_config import SamplerConfig
from counterstain.generators.spade_config import SpadeConfig
from counterstain.generators.train import train_autoencoder, train_diffusion, train_spade

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt install chromium)"),
    pytest.mark.skipif(find_spec("gradio") is None, reason="Gradio is not installed (extra app)"),
]
SIZE = 32
expect.set_options(timeout=30_000)
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def tissue(tmp_path_factory):
    """A cohort whose names are HTML, and a diffusion network that hardly learnt anything."""
    folder = tmp_path_factory.mktemp("studio")
    rng, writer = np.random.default_rng(0), CohortWriter(folder / "cohort", HER2, 0.5, {"kind": "drawn"})
    patients = [f"p{i}" for i in range(len(SPLIT))]
    for patient in patients:
        writer.add(patient, [draw_region(rng, f"{HOSTILE}{patient}{i}", patient) for i in "abc"])
    cohort = writer.finish().write_split(dict(zip(patients, SPLIT, strict=True)))
    train_autoencoder(cohort, first_stage_config(factor=2), folder / "ae", size_px=SIZE, seed=0)
    config = denoiser_config(sampler=SamplerConfig(steps=4))
    train_diffusion(cohort, config, folder / "diffusion", autoencoder=folder / "ae", size_px=SIZE, seed=0)
    tiny = {"generator_width": 4, "discriminator_width": 4, "hidden": 4, "latent": 4, "vgg_weight": 0}
    train_spade(cohort, SpadeConfig(training=ONE, **tiny), folder / "spade", size_px=2 * SIZE, seed=0)
    patches = draw_set(folder / "set", cohort, size_px=SIZE)
    cs.make_reading_test(cohort, synthetic=patches, out=folder / "reading", count=10)
    draw_study(folder / "run", cohort)
    return folder


@pytest.fixture(scope="module")
def address(tissue):
    """The studio, started as people start it."""
    command = [sys.executable, "-m", "counterstain", "studio", tissue / "cohort", "--generator", tissue / "diffusion"]
    command += [
        "--generator",
        tissue / "spade",
        "--keep-in",
        tissue / "kept",
        "--set-dir",
        tissue / "set",
        "--reading-test",
        tissue / "reading",
    ]
    command += ["--study", tissue / "run", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as run:
        for line in run.stderr:
            if "open at" in line:
                yield line.split()[-1]
                break
        else:
            pytest.fail("the studio did not start")
        run.terminate()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """A page that must ask for nothing but the studio and must not complain."""
    page, wrong = browser.new_page(viewport={"width": 1280, "height": 900}), []
    page.set_default_timeout(20_000)
    page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
    page.on("request", lambda asked: asked.url.startswith((address, "data:", "blob:")) or wrong.append(asked.url))
    page.goto(address)
    yield page
    page.close()
    assert wrong == []


def shown(page, name):
    """The picture of a name, (H, W, 3)."""
    src = page.locator(f"#{name} img").get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(src).body())).convert("RGB"))


def draw(page, number=1):
    page.click("#draw")
    expect(page.locator("#said li")).to_have_count(number)


def test_an_instance_is_clicked_and_redrawn_and_its_background_stays(page, tissue):
    expect(page.locator("#instances label")).not_to_have_count(0)
    original, before = shown(page, "original"), shown(page, "mask")
    page.click("#draw")
    expect(page.get_by_text("choose an instance first: click it in the patch")).to_be_visible()
    page.locator("#patch img").click()  # in the middle, where the first instance is
    expect(page.locator("#instances input:checked")).to_have_count(1)
    page.get_by_role("radio", name="HER2 0").check()
    seed = page.get_by_label("Seed")
    for typed, message in (("1.7", "seed 1.7: expected a whole number"), ("1e30", "seed: expected a number of 0 to")):
        seed.fill(typed)
        page.click("#draw")
        expect(page.get_by_text(message)).to_be_visible()
    seed.fill("0")
    draw(page)
    result, mask = shown(page, "result"), shown(page, "mask")
    inside = (mask == HER2.palette[1]).all(axis=-1)
    assert mask[SIZE // 2, SIZE // 2].tolist() == HER2.palette[1].tolist()
    changed = (result != original).any(axis=-1)
    assert changed.any()
    assert not (changed & (before == 255).all(axis=-1)).any()
    assert not (changed & ~inside).any()

    page.get_by_label("Seed").fill("5")
    page.get_by_role("radio", name="HER2 3+").check()
    draw(page, 2)
    assert (shown(page, "result") != result).any()
    page.get_by_role("button", name="Add to the set").click()
    expect(page.get_by_text("the set has 1 patch now")).to_be_visible()
    assert PatchSet.open(tissue / "kept").patches["seed"].tolist() == [5]

    page.click("#undo")
    expect(page.locator("#said li")).to_have_count(1)
    assert np.array_equal(shown(page, "result"), result)
    page.get_by_role("button", name="Start over").click()
    expect(page.locator("#said li")).to_have_count(0)
    assert np.array_equal(shown(page, "result"), original)


def named(page, tab, name):
    """Open a tab under a name."""
    expect(page.locator("#instances label")).not_to_have_count(0)
    page.get_by_role("tab", name=tab).click()
    page.get_by_label("Your name or number").fill(name)
    page.get_by_label("Your name or number").press("Enter")  # keys that are typed into the name are letters


def test_patches_are_reviewed_by_keys_and_found_after_a_reload(page, tissue):
    named(page, "Review", "ada")
    expect(page.locator("#about-patch")).to_contain_text("Patch 0")
    for number, key in enumerate(("a", "r", "u", "r", "a"), start=1):
        page.keyboard.press(key)
        expect(page.locator("#review-progress")).to_contain_text(f"{number} of 64 patches reviewed")
    found = cs.Review(tissue / "set").decisions()
    assert found["decision"].tolist() == ["accept", "reject", "unsure", "reject", "accept"]
    assert set(found["reviewer"]) == {"ada"}
    page.keyboard.press("z")
    expect(page.locator("#review-progress")).to_contain_text("4 of 64 patches reviewed")
    page.reload()
    expect(page.get_by_label("Your name or number")).to_have_value("ada")
    page.get_by_role("tab", name="Review").click()
    expect(page.locator("#review-progress")).to_contain_text("1 accepted, 2 rejected, 1 unsure; 60 fit the filters")
    expect(page.locator("#about-patch")).to_contain_text("Patch 4 (1 of 60): undecided")
    before = len(cs.Review(tissue / "set").history())
    page.evaluate("for (const key of ['r', 'a']) document.getElementById(`key-${key}`).click()")
    expect(page.locator("#review-progress")).to_contain_text("5 of 64 patches reviewed")
    page.keyboard.press("z")
    expect(page.locator("#review-progress")).to_contain_text("4 of 64 patches reviewed")
    kept = [record["decision"] for record in cs.Review(tissue / "set").history()[before:]]
    assert kept == ["reject", "undo"]  # the second key came before the next patch was shown
    page.get_by_label("Decision", exact=True).click()
    page.get_by_role("option", name="reject").click()
    expect(page.locator("#about-patch")).to_contain_text("Patch 1 (1 of 2): reject by ada")


def test_a_decision_needs_a_name(page, tissue):
    named(page, "Review", "")
    before = len(cs.Review(tissue / "set").history())
    page.click("#key-a")
    expect(page.get_by_text("give your name or number first")).to_be_visible()
    assert len(cs.Review(tissue / "set").history()) == before


def test_a_blind_test_is_taken_to_its_result(page, tissue):
    test = cs.ReadingTest.open(tissue / "reading")
    key = [question.drawn for question in test.key()]
    named(page, "Blind test", "bob")
    page.click("#begin")
    for number, drawn in enumerate(key):
        expect(page.locator("#reading-progress")).to_contain_text(f"{number} of 10 answered by bob")
        assert page.locator("#reading-result").inner_text().strip() == ""
        page.locator("#kind").get_by_label("drawn" if drawn else "real", exact=True).check()
        page.locator("#seen").get_by_label("HER2 0", exact=True).check()
        page.click("#answer")
    expect(page.locator("#reading-progress")).to_contain_text("10 of 10 answered by bob")
    assert test.answers("bob")["drawn"].tolist() == key
    expect(page.locator("#reading-result")).to_contain_text("Real or drawn, right100 % (69 to 100 %)")


def test_two_arms_are_compared_region_by_region(page):
    expect(page.locator("#instances label")).not_to_have_count(0)
    page.get_by_role("tab", name="Compare").click()
    page.click("#compare-arms")  # of a study that is not finished, whose arm is not chosen yet
    expect(page.locator("#difference")).to_contain_text(f"arm alone is right: {ARMS[1]}")
    assert page.locator("#difference img").count() == 0  # names are text
    expect(page.locator(".equal:not(.wide) img")).to_have_count(5)


def test_two_pages_do_not_mix(page, browser, address):
    expect(page.locator("#instances label")).not_to_have_count(0)
    page.get_by_role("button", name="Choose all instances").click()
    expect(page.locator("#instances input:checked")).not_to_have_count(0)
    draw(page)
    other = browser.new_page()
    other.goto(address)
    expect(other.locator("#instances label")).not_to_have_count(0)
    assert other.locator("#said li").count() == 0
    assert np.array_equal(shown(other, "result"), shown(other, "original"))
    other.close()


def test_what_draws_patches_of_another_size_alone_is_not_offered(page, run, tissue):
    expect(page.get_by_text("Not offered at 32 px: SPADE draws patches of 64 px alone")).to_be_visible()
    page.get_by_label("Draw with").click()
    assert "SPADE" not in page.get_by_role("listbox").inner_text()
    status, _, errors = run("studio", tissue / "cohort", "--generator", tissue / "spade", "--size-px", "32")
    assert (status, "--size-px 32: SPADE draws patches of 64 px alone" in errors) == (2, True)


def test_a_list_that_is_left_without_a_choice_changes_nothing(page):
    expect(page.locator("#instances label")).not_to_have_count(0)
    before = shown(page, "original")
    page.get_by_label("Instance to go to").focus()
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Choose all instances").click()
    expect(page.locator("#instances input:checked")).not_to_have_count(0)
    assert np.array_equal(shown(page, "original"), before)
    assert page.locator(".toast-body").count() == 0


def test_names_are_shown_as_text(page):
    expect(page.get_by_label("Region", exact=True)).to_have_value(f"{HOSTILE}p0a (train)")
    assert page.locator("img[src=x]").count() == 0


@pytest.mark.parametrize("width", [1280, 800])
def test_nothing_is_wider_than_the_window_and_all_has_a_name(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    expect(page.locator("#instances label")).not_to_have_count(0)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    nameless = page.evaluate("""[...document.querySelectorAll('button, input, select, textarea, img')].filter(e =>
        e.checkVisibility() && !e.ariaLabel && !e.hasAttribute('alt') && !e.labels?.length && !e.innerText?.trim()
        && !e.title && !e.querySelector('img[alt]')).map(e => e.outerHTML.slice(0, 200))""")
    assert nameless == []


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/gradio_api/file=/etc/passwd", {}),
        ("/gradio_api/file=/tmp/../etc/passwd", {}),
        ("/gradio_api/file=http://example.com/", {}),
        ("/gradio_api/openapi.json", {}),
        ("/monitoring", {}),
        ("/", {"Host": "elsewhere.example"}),
        ("/", {"Origin": "http://elsewhere.example"}),
    ],
)
def test_what_the_page_does_not_need_is_not_answered(address, path, headers):
    with pytest.raises(HTTPError, match="404"):
        urlopen(Request(address + path, headers=headers))


def test_what_no_page_sends_is_refused(address):
    body = b'{"data": [], "fn_index": 999, "session_hash": "abc"}'
    with pytest.raises(HTTPError, match="500"):
        urlopen(Request(f"{address}/gradio_api/queue/join", data=body, headers={"content-type": "application/json"}))


def test_nothing_can_be_uploaded_and_nothing_called_by_name(address):
    with pytest.raises(HTTPError, match="404"):
        urlopen(Request(f"{address}/gradio_api/upload", data=b"x", method="POST"))
    with urlopen(f"{address}/gradio_api/info") as answer:
        assert answer.read() == b'{"named_endpoints":{},"unnamed_endpoints":{}}'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host", "0.0.0.0"), "give --auth USER"),
        (("--host", "203.0.113.1"), "give --auth USER"),
        (("--host", "no such host"), "give --auth USER"),
        (("--auth", "me"), "no password; set COUNTERSTAIN_STUDIO_PASSWORD"),
        (("--size-px", "500"), "no region holds a patch of 500 px"),
        (("--port", "70000"), "expected 0 to 65535"),
    ],
)
def test_what_cannot_be_opened_is_said_in_one_line(run, tissue, options, message):
    status, _, errors = run("studio", tissue / "cohort", "--generator", tissue / "diffusion", "--port", "0", *options)
    assert (status, message in errors, errors.strip().count("\n")) == (2, True, 0)


def test_a_set_to_keep_patches_in_needs_something_to_draw_with(run, tissue):
    status, _, errors = run("studio", tissue / "cohort", "--set-dir", tissue / "set", "--keep-in", tissue / "kept")
    assert (status, "give --generator DIR" in errors) == (2, True)
