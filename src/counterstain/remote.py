"""Folders at a URL, such as s3://bucket/cohort: read through fsspec, whole files or pieces of them, never written."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import SEEK_END
from pathlib import Path
from typing import Any

from counterstain.errors import FetchError, InputError

URL = re.compile(r"([a-z][a-z0-9+.:-]+):(/+)(?=[^/])", re.IGNORECASE)
PAUSES_S = (0.5, 2.0)  # before a request that failed is sent again
NO_USE = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)  # of sending it again
REMEDY = "give simplecache:: and the URL of the cohort, and whole files are fetched"
ONLY_READ = "is a URL, which can only be read, as a cohort; give a folder of this machine"


@dataclass(frozen=True, repr=False)
class RemoteFolder:
    """A folder, or a file, at a URL: as much of a :class:`pathlib.Path` as reading a cohort takes.

    Any URL of a folder that fsspec opens will do, also with ``simplecache::`` before it. Credentials and addresses of
    servers come from where fsspec and its file systems look for them (environment, ``~/.aws``, ``~/.config/fsspec``).
    Methods raise FileNotFoundError where there is no such file, and FetchError where it cannot be read.

    Examples
    --------
    >>> RemoteFolder("memory://bucket/cohort") / "packs"
    memory://bucket/cohort/packs
    """

    url: str

    def __truediv__(self, name: str) -> RemoteFolder:
        return RemoteFolder(f"{self.url.rstrip('/')}/{name}")

    def __repr__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rstrip("/").rpartition("/")[2]

    def joinpath(self, *names: str) -> RemoteFolder:
        """Return the place of these names in this folder."""
        return self / "/".join(names)

    def resolve(self) -> RemoteFolder:
        """Return this place: a URL is absolute."""
        return self

    def exists(self) -> bool:
        """Whether a file lies here; its first byte says more than ``fs.exists``, for which no connection is no file."""
        try:
            self._asked(lambda fs, path: fs.cat_file(path, 0, 1))
        except FileNotFoundError:
            return False
        return True

    def read_bytes(self) -> bytes:
        """Return the content of a file."""
        content: bytes = self._asked(lambda fs, path: fs.cat_file(path))
        return content

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the content of a file as text."""
        return self.read_bytes().decode(encoding)

    def open(self, *_: Any, **__: Any) -> RemoteFile:
        """Return what reads pieces of a file; nothing is fetched yet."""
        return RemoteFile(self)

    def size(self) -> int:
        """Return the bytes of a file."""
        try:
            found = self._asked(lambda fs, path: fs.size(path))
        except FileNotFoundError:
            if not self.exists():
                raise
            found = None
        if found is None:
            raise FetchError(f"{self.url}: its server does not say how long the file is")
        return int(found)

    def pieces(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return pieces of a file, (start, length) in bytes each; their requests are under way at the same time."""
        starts, ends = [start for start, _ in ranges], [start + length for start, length in ranges]
        found = self._asked(lambda fs, path: fs.cat_ranges([path] * len(ranges), starts, ends, on_error="raise"))
        if any(len(piece) != length for piece, (_, length) in zip(found, ranges, strict=True)):
            raise FetchError(f"{self.url}: its server does not send parts of files (Range requests); {REMEDY}")
        return [bytes(piece) for piece in found]

    def _asked(self, request: Callable[[Any, str], Any]) -> Any:
        """Send a request, again where that may help."""
        fs, path = _file_system(self.url)
        for pause_s in (*PAUSES_S, None):
            try:
                return request(fs, path)
            except FileNotFoundError:
                raise
            except Exception as error:  # each file system has its own
                if pause_s is None or isinstance(error, NO_USE):
                    reason = _reason(error) or type(error).__name__
                    raise FetchError(f"{self.url}: cannot be read ({reason})") from error
                time.sleep(pause_s)
        raise AssertionError


class RemoteFile:
    """A file at a URL, read piece by piece as one of the disk; what was fetched ahead is read from memory."""

    def __init__(self, place: RemoteFolder) -> None:
        self._place, self._at, self._ahead = place, 0, dict[tuple[int, int], bytes]()

    def fetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch pieces that will be read, (start, length) in bytes each, at the same time."""
        self._ahead |= dict(zip(ranges, self._place.pieces(ranges), strict=True))

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a byte of the file."""
        self._at = offset + (self._place.size() if whence == SEEK_END else 0)
        return self._at

    def read(self, length: int) -> bytes:
        """Return the next bytes."""
        piece = self._at, length
        self._at += length
        return self._ahead.pop(piece) if piece in self._ahead else self._place.pieces([piece])[0]

    def close(self) -> None:
        """Forget what was not read."""
        self._ahead.clear()


Place = Path | RemoteFolder


def place_of(path: str | os.PathLike[str] | RemoteFolder) -> Place:
    """Return a path of this machine, or the folder at a URL, which pathlib may have spoilt."""
    if isinstance(path, RemoteFolder):
        return path
    found = URL.match(text := os.fspath(path))
    if found is None:
        return Path(text)
    slashes = found[2] if len(found[2]) > 1 else "//"  # pathlib makes one slash of two
    url = f"{found[1]}:{slashes}{text[found.end() :]}".rstrip("/")
    chain = [part for part in url.split("::")[:-1] if not part.endswith("cache")]
    if chain or "?" in url:
        raise InputError(f"{url}: give the URL of a folder, without a query; only …cache:: may stand before it")
    return RemoteFolder(url)


def on_disk(place: str | os.PathLike[str] | RemoteFolder) -> Path:
    """Return a path of this machine that may be written to; raises InputError where it is a URL."""
    if isinstance(found := place_of(place), RemoteFolder):
        raise InputError(f"{found}: {ONLY_READ}")
    return found


def _file_system(url: str) -> tuple[Any, str]:
    """Return what reads a URL, of this process, and the path in it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise _lacking(url, error) from error
    try:
        fs, path = url_to_fs(url)
    except ImportError as error:
        raise _lacking(url, error) from error
    except Exception as error:
        raise FetchError(f"{url}: cannot be opened ({_reason(error)})") from error
    return fs, path


def _reason(error: Exception) -> str:
    return " ".join(str(error).replace(" ssl:default", "").split())[:200]


def _lacking(url: str, error: ImportError) -> FetchError:
    return FetchError(f"{url}: {str(error).rstrip('.')}; run: pip install 'counterstain[remote]'")
