"""Annotation files as JSON or XML, read and checked so that no file can stall the machine or fill its memory."""

from __future__ import annotations

import gzip
import json
import re
import reprlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeAlias
from xml.sax import SAXException
from xml.sax.handler import ContentHandler
from xml.sax.xmlreader import AttributesImpl

from defusedxml import DefusedXmlException
from defusedxml.sax import make_parser

from counterstain.errors import InputError

MAX_COORDINATE_PX = 10_000_000  # the largest slides have about 500,000 pixels a side
COORDINATE = f"a coordinate in level-0 pixels, at most {MAX_COORDINATE_PX:,} either way"
MAX_NAME_LENGTH = 200
MAX_BYTES = 256 * 2**20  # of a file, unpacked
MAX_JSON_MEMORY = 800 * 2**20
MAX_DEPTH = 50
MAX_ELEMENTS = 8_000_000  # of XML: as many points as a file may have, and what stands around them
GZIP_MAGIC = b"\x1f\x8b"

Attributes: TypeAlias = "AttributesImpl[str]"


def shown(value: Any) -> str:
    """Return a value for an error message: one short line."""
    return reprlib.repr(value)


def expect_list(value: Any, where: str, what: str = "a list") -> list[Any]:
    """Return a list out of JSON; anything else is an InputError that names its place."""
    if not isinstance(value, list):
        raise InputError(f"{where}: expected {what}, found {shown(value)}; export it again")
    return value


def expect_object(value: Any, where: str, what: str = "an object") -> dict[str, Any]:
    """Return an object out of JSON; anything else is an InputError that names its place."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected {what}, found {shown(value)}; export it again")
    return value


def identifier(value: Any, where: str) -> str:
    """Return an id out of JSON, which may be a number; anything else is an InputError that names its place."""
    if not isinstance(value, str | int):
        raise InputError(f"{where} id: expected text or a number, found {shown(value)}; export it again")
    return name(str(value), f"{where} id")


def usable(value: Any) -> bool:
    """Whether a value is a number in the range of coordinates, which NaN and infinities are not."""
    return type(value) in {int, float} and -MAX_COORDINATE_PX <= value <= MAX_COORDINATE_PX


def number(text: str | None, place: Callable[[], str], what: str) -> float:
    """Read a coordinate that is written as text; ``place`` is called for messages only.

    Raises
    ------
    InputError
        Missing, not a number, or beyond any slide.
    """
    if text is None:
        raise InputError(f"{place()} {what}: the coordinate is missing; export it again")
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not -MAX_COORDINATE_PX <= value <= MAX_COORDINATE_PX:  # nor is NaN
        raise InputError(f"{place()} {what}: expected {COORDINATE}, found {shown(text)}; correct it or export it again")
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
    """Return the last part of a path, which leads to no other folder, or None where it names no file."""
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


def read_bytes(path: Path) -> bytes:
    """Read a file, decompressed if it is gzip.

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
        raise InputError(f"{path}: nested too deep for annotations; export it again") from error
    except ValueError as error:  # NaN, or an integer of thousands of digits
        raise InputError(f"{path}: not usable JSON ({error}); correct it or export it again") from error


class XmlVisitor(ContentHandler):
    """Base of readers of XML: told of the elements named in ``tags`` as they start and end."""

    tags: frozenset[str]

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.parser = make_parser()
        self._depth = self._elements = 0

    def start(self, tag: str, attributes: Attributes) -> None:
        """Take the start of an element."""
        raise NotImplementedError

    def end(self, tag: str) -> None:
        """Take the end of an element."""
        raise NotImplementedError

    def where(self) -> str:
        """Return the file and the line that is being read."""
        return f"{self.path} line {self.parser.getLineNumber() or 1}"

    def startElement(self, name: str, attrs: Attributes) -> None:  # noqa: D102, N802
        self._depth += 1
        self._elements += 1
        if self._depth > MAX_DEPTH:
            raise InputError(f"{self.where()}: nested too deep for annotations; export it again")
        if self._elements > MAX_ELEMENTS:
            raise InputError(f"{self.where()}: more than {MAX_ELEMENTS:,} elements; export one file a slide")
        if name in self.tags:
            self.start(name, attrs)

    def endElement(self, name: str) -> None:  # noqa: D102, N802
        self._depth -= 1
        if name in self.tags:
            self.end(name)


def parse_xml(data: bytes, visitor: XmlVisitor) -> None:
    """Parse XML without keeping it; entities and DTDs are refused.

    Raises
    ------
    InputError
        With the line, where the parser knows it.
    """
    visitor.parser.forbid_dtd = True
    visitor.parser.setContentHandler(visitor)
    try:
        visitor.parser.feed(data)  # in one piece: expat before 2.6 takes quadratic time for long tokens in small ones
        visitor.parser.close()
    except DefusedXmlException as error:
        raise InputError(
            f"{visitor.path}: has a document type or entities of its own, which can do harm and which no annotation "
            "tool writes; export it again"
        ) from error
    except (SAXException, UnicodeError, LookupError) as error:
        message = getattr(error, "getMessage", error.__str__)()
        raise InputError(f"{visitor.where()}: not XML or cut short ({message}); export it again") from error


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


def _json_memory(data: bytes) -> int:
    """Estimate from above, in bytes, what text and objects take while JSON is parsed."""
    wide = any(bytes([lead]) in data for lead in range(0xF0, 0xF5))
    width = 1 if data.isascii() else 4 if wide else 2  # Python keeps a text at the width of its widest character
    objects = 88 * data.count(b"[") + 240 * data.count(b"{") + 40 * data.count(b",") + 40 * data.count(b'"')
    return width * len(data) + objects
