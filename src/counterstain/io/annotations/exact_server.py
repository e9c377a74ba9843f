"""Annotations from an EXACT server, through its official client EXACT-Sync.

The result has the form of the server's own answer in one page, so that it is saved with
:func:`~counterstain.storage.write_json` and read like any saved file. Credentials come from the environment only:
``EXACT_TOKEN``, or ``EXACT_USERNAME`` and ``EXACT_PASSWORD``.

A server is bounded in time (each request and all together), in pages and rows, and in bytes, unpacked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Annotated, Any, Self
from urllib.parse import urljoin, urlsplit

from pydantic import Field, model_validator

from counterstain.config import Config
from counterstain.errors import InputError
from counterstain.io.annotations.safe_parsing import MAX_BYTES, MAX_JSON_MEMORY, json_memory, shown

THIS_MACHINE = {"localhost", "127.0.0.1", "::1"}
WORTH_ANOTHER_TRY = {429, 502, 503, 504}
REDIRECTS = 3
PAGE_ROWS = 500  # asked for at a time
TIMEOUT_S = 60  # longest silence of the server before a request is given up
REQUEST_S = 600  # longest time of a request, however steadily the server sends
TOTAL_S = 4 * 3600  # longest time of all requests together
MAX_ROWS = 1_000_000
CHUNK = 2**16  # bytes
TRIES = 4  # per request, if the connection drops or the server is busy
FIRST_PAUSE_S = 1.0  # before the second try; it doubles with each
ROW = ("id", "unique_identifier", "annotation_type", "vector")
TYPE = ("id", "name", "vector_type", "product", "color_code")
IMAGE = ("id", "name", "width", "height", "mpp")
NOT_EXACT = "does not answer as an EXACT server does; check the address"

Json = Any
Call = Callable[..., Any]


class ExactServer(Config):
    """A server and the images whose annotations are wanted."""

    url: Annotated[str, Field(min_length=1)]
    """Address of the server, for example ``https://exact.example.org``; http only on this machine."""
    image_set: int | None = None
    """Number of an image set."""
    images: tuple[int, ...] = ()
    """Numbers of images, instead of an image set."""
    ca_file: Path | None = None
    """Certificates to trust (PEM), for a server with a certificate of your own institution."""

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        address = urlsplit(self.url)
        if address.scheme not in {"http", "https"} or not address.hostname:
            raise ValueError(f"url: expected https://…, found {self.url!r}")
        if address.username or address.password:
            raise ValueError("url: holds a password; give it in EXACT_TOKEN or EXACT_PASSWORD instead")
        if address.scheme == "http" and address.hostname not in THIS_MACHINE:
            raise ValueError(f"url: {self.url!r} would send the password unencrypted; give https://…")
        if (self.image_set is None) == (not self.images):
            raise ValueError("expected either image_set or images")
        return self


def fetch_exact(
    server: ExactServer,
    *,
    environment: Mapping[str, str] = os.environ,
    told: Callable[[int, int], None] | None = None,
) -> dict[str, Json]:
    """Fetch every annotation of an image set or of some images as one page of rows, with types and images expanded.

    ``environment`` holds the credentials; ``told`` is called with the number of images done and of all images.

    Raises InputError where EXACT-Sync is not installed, credentials are missing or refused, or the server cannot be
    reached, is not trusted or does not answer as EXACT does.
    """
    limits = _Limits(server.url)
    with _client(server, environment, limits) as client:
        from exact_sync.v1.api import AnnotationsApi, AnnotationTypesApi, ImagesApi

        list_types = AnnotationTypesApi(client, retry=False).list_annotation_types
        list_annotations = AnnotationsApi(client, retry=False).list_annotations
        images = list(_images(server, limits, ImagesApi(client, retry=False).list_images))
        types = {t.id: _fields(t, TYPE) for t in _all(limits, list_types, expand="product")}
        rows: list[dict[str, Json]] = []
        for number, image in enumerate(images, start=1):
            for annotation in _all(limits, list_annotations, image=image["id"]):
                row = _fields(annotation, ROW) | {"image": image, "deleted": bool(annotation.deleted)}
                if not isinstance(row["annotation_type"], dict):
                    row["annotation_type"] = types.get(row["annotation_type"], row["annotation_type"])
                rows.append(row)
            if told is not None:
                told(number, len(images))
    return {"count": len(rows), "next": None, "previous": None, "results": rows}


@dataclass
class _Limits:
    """What a server may still use."""

    url: str
    bytes_left: int = field(default_factory=lambda: MAX_BYTES)
    end: float = field(default_factory=lambda: time.monotonic() + TOTAL_S)

    def error(self, reason: str) -> InputError:
        return InputError(f"{self.url}: {reason}")

    def spend(self, size: int) -> None:
        """Count bytes that were sent, unpacked."""
        self.bytes_left -= size
        if self.bytes_left < 0:
            raise self.error(f"sends more than {MAX_BYTES // 2**20} MB; fetch fewer images at a time (--images 1,2,3)")

    def within(self, call: Call, **arguments: Any) -> Any:
        """Call in a thread, which is left alone when the time is over: no timeout of a socket bounds a slow trickle."""
        answer: list[Any] = []

        def run() -> None:
            try:
                answer.append(call(**arguments))
            except BaseException as error:  # noqa: BLE001, raised again below
                answer.append(error)

        seconds = max(0.0, min(REQUEST_S, self.end - time.monotonic()))
        thread = Thread(target=run, daemon=True)
        thread.start()
        thread.join(seconds)
        if not answer:
            raise self.error(f"no whole answer within {seconds:.0f} s; fetch fewer images at a time, or try later")
        if isinstance(answer[0], BaseException):
            raise answer[0]
        return answer[0]

    def bounded(self, request: Call) -> Call:
        """Return urllib3's ``request`` that reads a body piece by piece, and stays with the server that was given."""
        from urllib3 import HTTPResponse

        def ask(method: str, url: str, *, fields: Any = None, preload_content: bool, **more: Any) -> HTTPResponse:
            assert preload_content
            for _ in range(REDIRECTS + 1):
                response = request(method, url, fields=fields, preload_content=False, redirect=False, **more)
                body = self._body(response)
                if not (location := response.get_redirect_location()):
                    return HTTPResponse(body, headers=response.headers, status=response.status, reason=response.reason)
                here, url, fields = url, urljoin(url, location), None
                if urlsplit(url)[:2] != urlsplit(here)[:2]:
                    raise self.error(f"sends you on to {shown(url)}; if you trust that server, give its address")
            raise self.error(f"redirects more than {REDIRECTS} times; check the address")

        return ask

    def _body(self, response: Any) -> bytes:
        pieces: list[bytes] = []
        try:
            self.spend(response.length_remaining or 0)  # as announced
            self.bytes_left += response.length_remaining or 0
            for piece in response.stream(CHUNK, decode_content=True):
                self.spend(len(piece))
                pieces.append(piece)
        finally:
            if self.bytes_left < 0:
                response.close()
        body = b"".join(pieces)
        if json_memory(body) > MAX_JSON_MEMORY:
            raise self.error("a page of its answer would fill the memory; fetch fewer images at a time")
        return body


def _images(server: ExactServer, limits: _Limits, list_images: Call) -> Iterator[dict[str, Json]]:
    filters = [{"image_set": server.image_set}] if server.image_set is not None else [{"id": i} for i in server.images]
    for chosen in filters:
        found = _all(limits, list_images, **chosen)
        if not found:
            (key, value), *_ = chosen.items()
            raise InputError(f"{server.url}: no image with {key} {value}, or none that you may see")
        for image in found:
            yield _fields(image, IMAGE)


def _fields(answer: Any, names: Sequence[str]) -> dict[str, Json]:
    return {name: getattr(answer, name) for name in names}


def _all(limits: _Limits, call: Call, **filters: Any) -> list[Any]:
    """Return the rows of every page."""
    rows: dict[int, Any] = {}
    offset, more = 0, True
    while more:
        page = _page(limits, call, limit=PAGE_ROWS, offset=offset, **filters)
        if not isinstance(page.results, list) or not isinstance(page.count, int):
            raise limits.error(NOT_EXACT)
        rows.update({row.id: row for row in page.results})
        offset += len(page.results)
        more = page.next is not None and bool(page.results)
        if offset > MAX_ROWS or page.count > MAX_ROWS or (more and offset > page.count):
            raise limits.error(
                f"sends page after page, {offset:,} rows so far of {page.count:,}, and at most {MAX_ROWS:,} can be "
                "fetched; fetch fewer images at a time"
            )
    if len(rows) != page.count:
        raise limits.error(
            f"sent {len(rows):,} of {page.count:,} rows; somebody may be working on them; give the same command again"
        )
    return list(rows.values())


def _page(limits: _Limits, call: Call, **arguments: Any) -> Any:
    """Ask for one page, and again after a pause if the connection drops or the server is busy."""
    from exact_sync.v1.rest import ApiException
    from urllib3.exceptions import HTTPError, SSLError

    for attempt in range(TRIES):
        last = attempt == TRIES - 1
        try:
            return limits.within(call, _request_timeout=(TIMEOUT_S, TIMEOUT_S), **arguments)
        except InputError:
            raise
        except ApiException as error:
            if last or error.status not in WORTH_ANOTHER_TRY:
                raise limits.error(_refusal(error.status, arguments)) from error
        except HTTPError as error:
            if SSLError in {type(error), type(getattr(error, "reason", None))}:
                raise limits.error(_refusal(None, arguments)) from error
            if last:
                reason = " ".join(str(getattr(error, "reason", None) or error).split())
                raise limits.error(
                    f"the connection failed {TRIES} times ({reason}); check the address and the network, "
                    "then give the same command again"
                ) from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise limits.error(NOT_EXACT) from error
        time.sleep(FIRST_PAUSE_S * 2**attempt)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _refusal(status: int | None, arguments: Mapping[str, Any]) -> str:
    if status in {401, 403}:
        return (
            f"refuses these credentials (status {status}); set EXACT_TOKEN to your token, or EXACT_USERNAME and "
            "EXACT_PASSWORD"
        )
    if status == 404:
        return "has no EXACT interface (status 404); check the address"
    if status == 400:
        asked = [f"{key} {value}" for key, value in arguments.items() if key in {"image_set", "id", "image"}]
        return f"does not know {''.join(asked) or 'what was asked for'} (status 400); check the number"
    if not status:
        return "its certificate cannot be verified; check the address, or name your institution's ca_file"
    return f"answers with status {status}; try again later, or ask whoever runs it"


@contextmanager
def _client(server: ExactServer, environment: Mapping[str, str], limits: _Limits) -> Iterator[Any]:
    """Yield EXACT-Sync's client with verified TLS and within the limits, and close its connections."""
    try:
        from exact_sync.v1.api_client import ApiClient
        from exact_sync.v1.configuration import Configuration
    except ImportError as error:
        raise InputError(
            "reading from an EXACT server needs its client; install it with: pip install 'counterstain[exact]'"
        ) from error
    from urllib3 import Retry

    if server.ca_file is not None and not server.ca_file.is_file():
        raise InputError(f"{server.ca_file}: no such file; expected the certificates to trust, in PEM format")
    settings = Configuration()
    for logger in settings.logger.values():  # the client would copy every warning to the terminal
        logger.removeHandler(settings.logger_stream_handler)
    settings.host, settings.verify_ssl = server.url.rstrip("/"), True
    settings.ssl_ca_cert = str(server.ca_file) if server.ca_file else None
    token, user, password = (environment.get(f"EXACT_{key}", "") for key in ("TOKEN", "USERNAME", "PASSWORD"))
    if not token and not (user and password):
        raise InputError(
            "no credentials for EXACT; set the environment variable EXACT_TOKEN, or EXACT_USERNAME and EXACT_PASSWORD"
        )
    settings.token, settings.username, settings.password = token or None, user, password
    client = ApiClient(settings)
    pools = client.rest_client.pool_manager
    pools.connection_pool_kw["retries"] = Retry(0, redirect=False, raise_on_redirect=False)
    pools.request = limits.bounded(pools.request)
    try:
        yield client
    finally:
        pools.clear()
        client.pool.close()
