"""The report in a real browser: no errors, no requests, tables that sort, a gallery that filters."""

from __future__ import annotations

import shutil

import pytest
from drawn_results import draw_results
from playwright.sync_api import sync_playwright

from counterstain.report.page import render
from counterstain.report.results import read_results

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    run = draw_results(tmp_path_factory.mktemp("report") / "run")
    file = run / "report.html"
    file.write_text(render(read_results(run), draws=50), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def opened(report):
    """The page in a browser, and what it has done that it must not: requests, messages on the console, errors."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(10_000)
        wrong = []

        def only_the_file(route):
            if route.request.url == report.as_uri():
                return route.continue_()
            wrong.append(f"request: {route.request.url[:80]}")
            return route.abort()

        page.route("**/*", only_the_file)
        page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.goto(report.as_uri())
        yield page, wrong
        browser.close()


@pytest.fixture
def page(opened):
    page, wrong = opened
    page.set_viewport_size({"width": 1280, "height": 900})
    page.evaluate("form = document.querySelector('.filters'); form.reset(); form.dispatchEvent(new Event('change'))")
    yield page
    assert wrong == []


def numbers(page, number):
    """The values of a column of the results table, without what stands small under them."""
    cells = page.locator("#results table").first.locator(f"tbody tr > *:nth-child({number})")
    return [float(text.split()[0].replace("\N{MINUS SIGN}", "-")) for text in cells.all_inner_texts()]


def choice(page, name):
    return page.locator(f".filters select[name={name}]")


def shown(page):
    return page.locator("#gallery .patches > li:visible")


def test_a_heading_sorts_by_a_click_or_a_key_and_a_second_one_turns_round(page):
    heading = page.locator("#results table").first.locator("thead th").nth(1)
    heading.get_by_role("button").click()
    rising = numbers(page, 2)
    assert rising == sorted(rising)
    assert heading.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")
    assert numbers(page, 2) == rising[::-1]
    assert heading.get_attribute("aria-sort") == "descending"


def test_the_gallery_filters_by_method_and_subtype(page):
    everything = shown(page).count()
    choice(page, "method").select_option("diffusion")
    assert 0 < shown(page).count() < everything
    assert set(shown(page).evaluate_all("all => all.map(one => one.dataset.method)")) == {"diffusion"}
    choice(page, "subtype").select_option("HER2 1+")
    subtypes = shown(page).evaluate_all("all => all.map(one => one.dataset.subtype)")
    assert subtypes
    assert all("HER2 1+" in one.split("|") for one in subtypes)
    assert page.locator(".filters output").inner_text().split()[0] == str(len(subtypes))


@pytest.mark.parametrize("name", ["slide", "patient"])
def test_the_gallery_filters_by_where_a_patch_comes_from(page, name):
    chosen = choice(page, name).locator("option").nth(1).get_attribute("value")
    choice(page, name).select_option(chosen)
    values = shown(page).evaluate_all(f"all => all.map(one => one.dataset.{name})")
    assert set(values) == {chosen}


def test_a_patch_shows_its_labels_and_its_source(page):
    choice(page, "method").select_option("spade")
    shown(page).first.get_by_role("button").click()
    dialog = page.get_by_role("dialog")
    assert dialog.locator("figcaption").all_inner_texts() == ["spade", "its labels", "real", "real labels"]
    assert all(dialog.locator("img").evaluate_all("all => all.map(one => one.complete && one.naturalWidth > 0)"))
    assert dialog.locator("tbody tr").count() > 0
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


def test_a_table_is_copied(page):
    page.get_by_text("Copy as CSV or LaTeX").first.click()
    button = page.get_by_role("button", name="Copy LaTeX").first
    button.click()
    assert "\\toprule" in page.evaluate("getSelection().toString()")
    page.locator("button.copier", has_text="Copied").wait_for()


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_never_scrolls_sideways(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_it_prints(page):
    assert page.pdf()[:5] == b"%PDF-"
