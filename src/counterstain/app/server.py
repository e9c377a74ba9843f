"""The studio's page and its server: the tabs, and what of Gradio a browser may reach.

Gradio has many routes: uploads, a proxy, a client for others. Here only those are answered that the page itself needs.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from counterstain.api import PathLike, Settings
from counterstain.api.drawing import Generator, open_judge, ways_to_draw
from counterstain.audit.reading_test import ReadingTest
from counterstain.data.cohort import Cohort
from counterstain.data.patch_set import PatchSet
from counterstain.errors import CounterstainError, InputError
from counterstain.taxonomy import Taxonomy

if TYPE_CHECKING:
    from counterstain.audit.judge import Judge

for _variable, _value in {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}.items():
    os.environ[_variable] = _value  # read when Gradio is imported
os.environ["GRADIO_TEMP_DIR"] = CACHE = tempfile.mkdtemp(prefix="counterstain-studio-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

import gradio as gr  # noqa: E402

GET = re.compile(
    r"/(|assets/.*|static/.*|svelte/.*|theme\.css|config/?|favicon\.ico|manifest\.json|login_check/?|logout/?"
    r"|gradio_api/(info/?|app_id/?|user/?|login_check/?|theme\.css|startup-events|queue/data|heartbeat/\w+))"
)
POST = re.compile(r"/(login/?|gradio_api/(queue/join|cancel|reset)/?)")
FILE = "/gradio_api/file="
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; frame-ancestors 'none'; "
    "base-uri 'self'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
DEFAULT_SIZE_PX = 256
KEYS = """
document.addEventListener("keydown", event => {
  if (event.key === "Enter" && event.target.closest("#person")) event.target.blur();  // the next key decides
  const typing = event.target.closest("input:not([type=radio]):not([type=checkbox]), textarea, select");
  if (typing || event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  const button = document.getElementById("key-" + event.key.toLowerCase());
  if (button && button.checkVisibility() && !button.disabled) button.click();
});
"""  # Gradio has no keys for buttons

Handler = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Studio:
    """All that was opened for the page; what a browser asks for is looked up here, never on the disk."""

    cohort: Cohort
    ways: Mapping[str, Generator]
    size_px: int
    judge: Judge | None = None
    keep_in: Path | None = None
    patches: PatchSet | None = None
    audit: Path | None = None
    reading: ReadingTest | None = None
    study: Path | None = None
    unfit: str | None = None
    """What was opened and cannot draw patches of this size."""

    @classmethod
    def open(
        cls,
        cohort: Cohort,
        *,
        generators: Sequence[PathLike],
        size_px: int | None = None,
        settings: Settings | None = None,
        judge: PathLike | None = None,
        **places: Path | None,
    ) -> Studio:
        """Open what the tabs need; InputError where there is nothing to open, or no region is as large as a patch."""
        alone = (
            any(places[name] for name in ("set_dir", "reading_test", "study"))
            and not generators
            and places["keep_in"] is None
        )
        ways = {} if alone else ways_to_draw(cohort, generators, settings=settings)
        headers = [way.drawer.header for way in ways.values() if way.drawer.header is not None]
        smallest = int(cohort.regions[["height_px", "width_px"]].min(axis=1).max())
        own = headers[0].size_px if headers else min(DEFAULT_SIZE_PX, smallest)
        size = own if size_px is None else size_px
        if ways and not 1 <= size <= smallest:
            raise InputError(
                f"{cohort.folder}: no region holds a patch of {size} px; give --size-px {smallest} or less"
            )
        others = {name: way.size_px for name, way in ways.items() if way.size_px not in {None, size}}
        unfit = "; ".join(f"{name} draws patches of {px} px alone" for name, px in others.items())
        if ways and len(others) == len(ways):
            raise InputError(f"--size-px {size}: {unfit}; leave it out, or give another --generator")
        patches, reading = places["set_dir"], places["reading_test"]
        return cls(
            cohort=cohort,
            ways={name: way for name, way in ways.items() if name not in others},
            size_px=size,
            unfit=f"Not offered at {size} px: {unfit} (start with --size-px)" if unfit else None,
            judge=None if judge is None else open_judge(judge, cohort.taxonomy, cohort.mpp),
            keep_in=places["keep_in"],
            patches=None if patches is None else PatchSet.open(patches),
            audit=places["audit"],
            reading=None if reading is None else ReadingTest.open(reading),
            study=places["study"],
        )


class Page(gr.Blocks):  # type: ignore[misc]
    """A page; what it never sends is refused without a traceback in the log."""

    async def preprocess_data(self, *given: Any, **named: Any) -> Any:
        """Return the values that a handler is called with."""
        try:
            return await super().preprocess_data(*given, **named)
        except Exception as error:
            raise gr.Error("not what the page sends; load it again", print_exception=False) from error


def page(studio: Studio) -> gr.Blocks:
    """Build the page: the tabs for which something was opened."""
    from counterstain.app import compare_tab, reading_tab, redraw_tab, review_tab

    with Page(title="counterstain studio", analytics_enabled=False, fill_width=True) as blocks:
        reads = studio.patches is not None or studio.reading is not None
        with gr.Row():
            gr.HTML(f"<h1>counterstain studio</h1><p>{escape(_about(studio.cohort))}</p>", elem_id="about")
            person = gr.Textbox(label="Your name or number, kept with what you decide", visible=reads, elem_id="person")
        if reads:
            _remember(blocks, person)
        if studio.ways:
            with gr.Tab("Redraw", id="redraw"):
                redraw_tab.Tab(studio).connect(blocks)
        if studio.patches is not None:
            with gr.Tab("Review", id="review"):
                review_tab.Tab(studio, blocks, person)
        if studio.reading is not None:
            with gr.Tab("Blind test", id="reading"):
                reading_tab.Tab(studio, person)
        if studio.study is not None:
            with gr.Tab("Compare", id="compare"):
                compare_tab.Tab(studio)
    return blocks


def _remember(blocks: gr.Blocks, person: gr.Textbox) -> None:
    """Remember the name of a person in the browser; who logged in has that name."""
    kept = gr.BrowserState("", storage_key="counterstain-person")

    def named(name: str, request: gr.Request) -> Any:
        known = request.username or name
        return gr.Textbox(value=known, interactive=not request.username) if known else gr.skip()

    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    blocks.load(named, kept, person, **private)
    person.change(lambda name: name, person, kept, **private)


def person_of(name: str, request: gr.Request) -> str:
    """Return who decides: who logged in, or who gave a name or number; InputError where nobody did."""
    found = str(request.username or name or "").strip()
    if not found:
        raise InputError("give your name or number first, at the top of the page")
    return found


def _about(cohort: Cohort) -> str:
    slides = cohort.regions["slide"].nunique()
    return f"{Path(str(cohort.folder)).name}: {slides} slides, {len(cohort)} regions, {cohort.mpp:g} µm per pixel"


def legend(taxonomy: Taxonomy) -> str:
    """Return the subtypes with their colours as HTML."""
    items = (
        f'<li><span style="background:{subtype.colour}"></span>{escape(subtype.name)}</li>'
        for subtype in taxonomy.subtypes
    )
    return f'<ul class="legend" aria-label="Colours of the subtypes">{"".join(items)}</ul>'


def caption(text: str) -> None:
    """Write what the next picture shows above it: inside, it would cover tissue."""
    gr.HTML(f"<p>{escape(text)}</p>", elem_classes="caption")


def table_of(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table as HTML; the first column names the rows."""
    first = "".join(f"<th scope=col>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr><th scope=row>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in rows
    )
    return f"<table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table>"


def picture(text: str, *, pickable: bool = False, elem_id: str | None = None) -> Any:
    """Add a picture with its caption; ``pickable`` ones answer clicks."""
    caption(text)
    classes = ["tissue", "pickable"] if pickable else ["tissue"]
    return gr.Image(
        show_label=False, format="png", interactive=False, buttons=["fullscreen"], alt_text=text, elem_id=elem_id,
        elem_classes=classes,
    )  # fmt: skip


def handled(function: Handler) -> Handler:
    """Say what a user did wrong on the page, as text."""

    @wraps(function)
    def told(*given: Any, **named: Any) -> Any:
        try:
            return function(*given, **named)
        except CounterstainError as error:
            raise gr.Error(escape(str(error)), print_exception=False) from error

    return told


def clicked(event: gr.SelectData, image: np.ndarray) -> tuple[int, int]:
    """Return the row and column of an image, (H, W, 3), where it was clicked."""
    x, y = (int(value) for value in event.index)
    return min(max(y, 0), image.shape[0] - 1), min(max(x, 0), image.shape[1] - 1)


def serve(blocks: gr.Blocks, listener: socket.socket, *, host: str, users: Mapping[str, str]) -> None:
    """Answer until Ctrl-C."""
    server_of(blocks, host=host, users=users).run(sockets=[listener])


def server_of(blocks: gr.Blocks, *, host: str, users: Mapping[str, str]) -> Any:
    """Return the server of a page, which runs on a socket that is open."""
    import uvicorn
    from fastapi import FastAPI

    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        blocks.queue(api_open=False, max_size=64),
        path="/",
        auth=list(users.items()) or None,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        head=f"<script>{KEYS}</script>",
        css=(resources.files("counterstain") / "app" / "studio.css").read_text(encoding="utf-8"),
    )
    names = {"127.0.0.1", "localhost", "[::1]"} | ({host} if host not in {"0.0.0.0", "::"} else {"*"})  # noqa: S104
    return uvicorn.Server(
        uvicorn.Config(guarded(app, names), log_level="critical", lifespan="on", timeout_graceful_shutdown=1)
    )


def guarded(app: Any, hosts: set[str]) -> Callable[..., Awaitable[None]]:
    """Answer only what the page needs, only to browsers that asked for one of these hosts, from its own pages."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope.get("headers", ())}
        if scope["type"] != "http" or not _is_allowed(scope["method"], scope["path"], headers, hosts):
            await _refuse(scope, send)
            return

        begun = False

        async def with_headers(message: Any) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = message | {"headers": [*message.get("headers", ()), *more]}
            await send(message)

        try:
            await app(scope, receive, with_headers)
        except asyncio.CancelledError:
            return  # Ctrl-C while a page is open
        except Exception as error:  # noqa: BLE001 - Gradio raises whatever it meets in a request that no page sends
            sys.stderr.write(f"{scope['path']!r} cannot be answered ({type(error).__name__})\n")
            if not begun:  # otherwise that was said already
                await _refuse(scope, send, status=500)

    return answer


def _is_allowed(method: str, path: str, headers: Mapping[str, str], hosts: set[str]) -> bool:
    host, origin = headers.get("host", ""), headers.get("origin")
    if "*" not in hosts and re.sub(r":\d+$", "", host) not in hosts:
        return False  # a page of another name that leads here
    if origin is not None and origin.partition("://")[2] != host:
        return False
    if method in {"GET", "HEAD"}:
        return bool(GET.fullmatch(path)) or _is_shown(path)
    return method == "POST" and bool(POST.fullmatch(path))


def _is_shown(path: str) -> bool:
    """Whether a path is of a file that was made to be shown."""
    if not path.startswith(FILE):
        return False
    file = Path(path.removeprefix(FILE))
    return file.is_absolute() and ".." not in file.parts and file.is_relative_to(CACHE)


async def _refuse(scope: Any, send: Any, status: int = 404) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"not here\n"})
    else:
        await send({"type": "websocket.close", "code": 1008})
