"""Single values out of annotation files, checked."""

from __future__ import annotations

import gzip
import json
import re
import reprlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeAlias
from xml.sax import SAXException
from xml.sax.handler import ContentHandler
from xml.sax.xmlreader import AttributesImpl

from defusedxml import DefusedXmlException
from defusedxml.sax import make_parser

from counterstain.errors import InputError

MAX_COORDINATE_PX = 10_000_000  # the largest slides have about 500,000 pixels a side
MAX_NAME_LENGTH = 200


def shown(value: Any) -> str:
    """Return a value as it stands in an error message: one line, short."""
    return reprlib.repr(value)


def usable(value: Any) -> bool:
    """Whether a value is a number that a coordinate can be; NaN and infinities are not."""
    return type(value) in {int, float} and -MAX_COORDINATE_PX <= value <= MAX_COORDINATE_PX


def number(text: str | None, place: Callable[[], str], what: str) -> float:
    """Read a coordinate that is written as text; the place is asked for where it is needed.

    Raises
    ------
    InputError
        Missing, not a number, or beyond any slide.
    """
    if text is None:
        raise InputError(f"{place()} {what}: the coordinate is missing; export the annotations again")
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not -MAX_COORDINATE_PX <= value <= MAX_COORDINATE_PX:  # NaN is not either
        raise InputError(
            f"{place()} {what}: expected a coordinate in level-0 pixels, at most {MAX_COORDINATE_PX:,} either way, "
            f"found {shown(text)}; correct it or export the annotations again"
        )
    return value


def name(value: Any, where: str) -> str:
    """Return a name on one line, white space and unprintable characters made single spaces.

    Raises
    ------
    InputError
        Not text, or too long to be a name.
    """
    if not isinstance(value, str) or len(value) > MAX_NAME_LENGTH:
        raise InputError(f"{where}: expected a name of at most {MAX_NAME_LENGTH} characters, found {shown(value)}")
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())


def file_name(value: Any, where: str) -> str | None:
    """Return the last part of a path, or None where it names no file; nothing in it can lead to another folder."""
    last = re.split(r"[/\\]", name(value, where))[-1].strip()
    return None if last in {"", ".", ".."} else last


def colour_of_rgb(red: Any, green: Any, blue: Any) -> str | None:
    """Return ``#rrggbb``, or None where the channels are not 0..255."""
    channels = (red, green, blue)
    if all(type(c) is int and 0 <= c <= 255 for c in channels):
        return "#" + "".join(f"{c:02x}" for c in channels)
    return None


def colour_of_text(text: Any) -> str | None:
    """Return ``#rrggbb`` of such a text, otherwise None: a colour is no reason to refuse a file."""
    return text.lower() if isinstance(text, str) and re.fullmatch(r"#[0-9A-Fa-f]{6}", text) else None


# Annotation files as JSON or XML, read so that no file can stall the machine or fill its memory.

MAX_BYTES = 256 * 2**20  # of a file, unpacked
MAX_JSON_MEMORY = 800 * 2**20
MAX_DEPTH = 50
MAX_ELEMENTS = 8_000_000  # of XML: as many points as a file may have, and what stands around them
GZIP_MAGIC = b"\x1f\x8b"


def read_bytes(path: Path) -> bytes:
    """Read a file, unpacked where it is gzip.

    Raises
    ------
    InputError
        No such file, too large, or damaged gzip.
    """
    try:
        with path.open("rb") as file:
            packed = file.peek(2).startswith(GZIP_MAGIC)
            data = gzip.GzipFile(fileobj=file).read(MAX_BYTES + 1) if packed else file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder; expected an annotation file") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: damaged gzip ({error}); export it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(data) > MAX_BYTES:
        raise InputError(
            f"{path}: larger than {MAX_BYTES // 2**20} MB; export the annotations alone (without detections and "
            "measurements), or one file a slide"
        )
    if not data.strip():
        raise InputError(f"{path}: the file is empty; export it again")
    return data


def parse_json(path: Path, data: bytes) -> Any:
    """Parse JSON strictly: UTF-8, no NaN, no infinity.

    Raises
    ------
    InputError
        With line and column, where the parser knows them.
    """
    if _json_memory(data) > MAX_JSON_MEMORY:
        raise InputError(
            f"{path}: would take more than {MAX_JSON_MEMORY // 2**20} MB of memory; export the annotations alone "
            "(without detections and measurements), or one file a slide"
        )
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} byte {error.start:,}: not UTF-8; save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} line {error.lineno}: not JSON or cut short ({error.msg} at column {error.colno}); export it again"
        ) from error
    except RecursionError as error:
        raise InputError(f"{path}: nested too deep to be annotations; export it again") from error
    except ValueError as error:  # NaN, or an integer of thousands of digits
        raise InputError(f"{path}: not usable JSON ({error}); correct it or export it again") from error


Place = Callable[[], str]
Attributes: TypeAlias = "AttributesImpl[str]"


class Visitor(Protocol):
    """Told of XML elements as they start and end."""

    tags: frozenset[str]
    """Which elements it is told of."""

    def start(self, tag: str, attributes: Attributes, where: Place) -> None:
        """Take an element's start; ``where()`` gives the file and the line."""

    def end(self, tag: str) -> None:
        """Take an element's end."""


def parse_xml(path: Path, data: bytes, visitor: Visitor) -> None:
    """Parse XML without keeping it; entities and DTDs are refused.

    Raises
    ------
    InputError
        With the line, where the parser knows it.
    """
    parser = make_parser()
    handler = _Handler(path, visitor, parser)
    parser.forbid_dtd = True
    parser.setContentHandler(handler)
    try:
        parser.feed(data)  # in one piece: expat before 2.6 takes quadratic time for long tokens in small ones
        parser.close()
    except DefusedXmlException as error:
        raise InputError(
            f"{path}: has a document type or entities of its own, which no annotation tool writes and which can do "
            "harm; export it again"
        ) from error
    except (SAXException, UnicodeError, LookupError) as error:
        message = getattr(error, "getMessage", error.__str__)()
        raise InputError(f"{handler.where()}: not XML or cut short ({message}); export it again") from error


class _Handler(ContentHandler):
    """From SAX to a visitor."""

    def __init__(self, path: Path, visitor: Visitor, locator: Any) -> None:
        super().__init__()
        self.path = path
        self.visitor = visitor
        self.depth = self.elements = 0
        self.locator = locator  # the parser, which feeding in one piece never hands over by itself

    def where(self) -> str:
        return f"{self.path} line {self.locator.getLineNumber() or 1}"

    def startElement(self, name: str, attrs: Any) -> None:  # noqa: N802
        self.depth += 1
        self.elements += 1
        if self.depth > MAX_DEPTH:
            raise InputError(f"{self.where()}: nested too deep to be annotations; export it again")
        if self.elements > MAX_ELEMENTS:
            raise InputError(f"{self.where()}: more than {MAX_ELEMENTS:,} elements; export one file a slide")
        if name in self.visitor.tags:
            self.visitor.start(name, attrs, self.where)

    def endElement(self, name: str) -> None:  # noqa: N802
        self.depth -= 1
        if name in self.visitor.tags:
            self.visitor.end(name)


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


def _json_memory(data: bytes) -> int:
    """Estimate from above, in bytes, what text and objects take while JSON is parsed."""
    wide = any(bytes([lead]) in data for lead in range(0xF0, 0xF5))
    width = 1 if data.isascii() else 4 if wide else 2  # Python keeps a text at the width of its widest character
    objects = 88 * data.count(b"[") + 240 * data.count(b"{") + 40 * data.count(b",") + 40 * data.count(b'"')
    return width * len(data) + objects
