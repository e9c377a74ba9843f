"""Annotations from an EXACT server, through its official client EXACT-Sync.

The result has the form of the server's own answer in one page, so that it is saved with
:func:`~counterstain.storage.write_json` and read like any saved file. Credentials come from the environment only:
``EXACT_TOKEN``, or ``EXACT_USERNAME`` and ``EXACT_PASSWORD``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from counterstain.config import Config
from counterstain.errors import InputError

THIS_MACHINE = {"localhost", "127.0.0.1", "::1"}
WORTH_ANOTHER_TRY = {429, 502, 503, 504}
REDIRECTS = 3
PAGE_ROWS = 500  # asked for at a time
TIMEOUT_S = 60  # longest silence of the server before a request is given up
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

    Raises
    ------
    InputError
        EXACT-Sync is not installed, credentials are missing or refused, or the server cannot be reached, is not
        trusted or does not answer as EXACT does.
    """
    with _client(server, environment) as client:
        from exact_sync.v1.api import AnnotationsApi, AnnotationTypesApi, ImagesApi

        list_types = AnnotationTypesApi(client, retry=False).list_annotation_types
        list_annotations = AnnotationsApi(client, retry=False).list_annotations
        images = list(_images(server, ImagesApi(client, retry=False).list_images))
        types = {t.id: _fields(t, TYPE) for t in _all(server, list_types, expand="product")}
        rows: list[dict[str, Json]] = []
        for number, image in enumerate(images, start=1):
            for annotation in _all(server, list_annotations, image=image["id"]):
                row = _fields(annotation, ROW) | {"image": image, "deleted": bool(annotation.deleted)}
                if not isinstance(row["annotation_type"], dict):
                    row["annotation_type"] = types.get(row["annotation_type"], row["annotation_type"])
                rows.append(row)
            if told is not None:
                told(number, len(images))
    return {"count": len(rows), "next": None, "previous": None, "results": rows}


def _images(server: ExactServer, list_images: Call) -> Iterator[dict[str, Json]]:
    filters = [{"image_set": server.image_set}] if server.image_set is not None else [{"id": i} for i in server.images]
    for chosen in filters:
        found = _all(server, list_images, **chosen)
        if not found:
            (key, value), *_ = chosen.items()
            raise InputError(f"{server.url}: no image with {key} {value}, or none that you may see")
        for image in found:
            yield _fields(image, IMAGE)


def _fields(answer: Any, names: Sequence[str]) -> dict[str, Json]:
    return {name: getattr(answer, name) for name in names}


def _all(server: ExactServer, call: Call, **filters: Any) -> list[Any]:
    """Return the rows of every page."""
    rows: dict[int, Any] = {}
    offset, more = 0, True
    while more:
        page = _page(server, call, limit=PAGE_ROWS, offset=offset, **filters)
        if not isinstance(page.results, list) or not isinstance(page.count, int):
            raise InputError(f"{server.url}: {NOT_EXACT}")
        rows.update({row.id: row for row in page.results})
        offset += len(page.results)
        more = page.next is not None and bool(page.results)
    if len(rows) != page.count:
        raise InputError(
            f"{server.url}: sent {len(rows):,} of {page.count:,} rows; somebody may be working on them; "
            "give the same command again"
        )
    return list(rows.values())


def _page(server: ExactServer, call: Call, **arguments: Any) -> Any:
    """Ask for one page, and again after a pause if the connection drops or the server is busy."""
    from exact_sync.v1.rest import ApiException
    from urllib3.exceptions import HTTPError, SSLError

    for attempt in range(TRIES):
        last = attempt == TRIES - 1
        try:
            return call(_request_timeout=(TIMEOUT_S, TIMEOUT_S), **arguments)
        except ApiException as error:
            if last or error.status not in WORTH_ANOTHER_TRY:
                raise InputError(f"{server.url}: {_refusal(error.status)}") from error
        except HTTPError as error:
            if SSLError in {type(error), type(getattr(error, "reason", None))}:
                raise InputError(f"{server.url}: {_refusal(None)}") from error
            if last:
                reason = " ".join(str(getattr(error, "reason", None) or error).split())
                raise InputError(
                    f"{server.url}: the connection failed {TRIES} times ({reason}); check the address and the network, "
                    "then give the same command again"
                ) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{server.url}: {NOT_EXACT}") from error
        time.sleep(FIRST_PAUSE_S * 2**attempt)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _refusal(status: int | None) -> str:
    if status in {401, 403}:
        return (
            f"refuses these credentials (status {status}); set EXACT_TOKEN to your token, or EXACT_USERNAME and "
            "EXACT_PASSWORD"
        )
    if status == 404:
        return "has no EXACT interface (status 404); check the address"
    if not status:
        return "its certificate cannot be verified; check the address, or name your institution's ca_file"
    return f"answers with status {status}; try again later, or ask whoever runs it"


@contextmanager
def _client(server: ExactServer, environment: Mapping[str, str]) -> Iterator[Any]:
    """Yield EXACT-Sync's client with verified TLS, and close its connections."""
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
    pools.connection_pool_kw["retries"] = Retry(REDIRECTS, connect=0, read=0, status=0, other=0, redirect=REDIRECTS)
    try:
        yield client
    finally:
        pools.clear()
        client.pool.close()
