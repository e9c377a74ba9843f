"""Writes a minimal MIRAX slide, enough of the format for OpenSlide to read it.

A scanner's camera takes one photo per cell of a grid and notes where in level-0 pixels it was taken. ``Slidedat.ini``
describes grid, zoom levels and files; ``Data0000.dat`` holds the images one after the other and the photos' places;
``Index.dat`` holds pages of (image number, offset, length, file), reached through two tables of pointers. An image of
zoom level n shows 2^n x 2^n cells, shrunk; cells without a photo are left out and are transparent.
"""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

SLIDE_ID = "0123456789ABCDEF0123456789ABCDEF"
CELL_PX = 64


def write_mirax(
    path: Path, image: np.ndarray, *, offset_xy: tuple[int, int], mpp: float = 0.25, levels: int = 3, kind: str = "PNG"
) -> Path:
    """Write an (H, W, 3) uint8 image, sides multiples of 64, as PATH and its folder.

    The scanned area begins at ``offset_xy`` of the canvas; ``kind`` is PNG (exact) or JPEG (as scanners do).
    """
    folder = path.with_suffix("")
    folder.mkdir(parents=True)
    path.write_bytes(b"")
    first = (offset_xy[0] // CELL_PX, offset_xy[1] // CELL_PX)
    cells = (image.shape[1] // CELL_PX, image.shape[0] // CELL_PX)
    grid = (first[0] + cells[0] + 2, first[1] + cells[1] + 2)
    photos = {
        (first[0] + x, first[1] + y): image[y * CELL_PX : (y + 1) * CELL_PX, x * CELL_PX : (x + 1) * CELL_PX]
        for y in range(cells[1])
        for x in range(cells[0])
    }
    data = bytearray(b"counterstain test")
    pages = [_zoom_level(data, photos, grid, level, kind) for level in range(levels)]
    places = _append(data, _places(photos, grid, first, offset_xy))
    (folder / "Data0000.dat").write_bytes(data)
    (folder / "Index.dat").write_bytes(_index(pages, places))
    (folder / "Slidedat.ini").write_text(_slidedat(grid, mpp, levels, kind), encoding="utf-8")
    return path


def _zoom_level(data: bytearray, photos: dict, grid: tuple[int, int], level: int, kind: str) -> list[tuple]:
    """Append the images of a zoom level; returns their entries in the index."""
    concat = 2**level
    edge = CELL_PX // concat
    pictures: dict = {}
    for (x, y), photo in photos.items():
        picture = pictures.setdefault((y - y % concat, x - x % concat), np.full((CELL_PX, CELL_PX, 3), 255, np.uint8))
        top, left = y % concat * edge, x % concat * edge
        shrunk = photo.reshape(edge, concat, edge, concat, 3).mean((1, 3)).round()
        picture[top : top + edge, left : left + edge] = shrunk
    return [
        (y * grid[0] + x, *_append(data, _encoded(p, kind)), 0)
        for (y, x), p in sorted(pictures.items(), key=lambda item: item[0])
    ]


def _encoded(picture: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    Image.fromarray(picture).save(buffer, kind, **options)
    return buffer.getvalue()


def _append(data: bytearray, content: bytes) -> tuple[int, int]:
    data += content
    return len(data) - len(content), len(content)


def _places(photos: dict, grid: tuple[int, int], first: tuple[int, int], offset_xy: tuple[int, int]) -> bytes:
    """Where each photo of the grid was taken: a flag and two int32, 9 bytes each."""
    records = b""
    for y in range(grid[1]):
        for x in range(grid[0]):
            place = [offset_xy[i] + ((x, y)[i] - first[i]) * CELL_PX for i in (0, 1)] if (x, y) in photos else [0, 0]
            records += struct.pack("<Bii", (x, y) in photos, *place)
    return records


def _index(pages: list[list[tuple]], places: tuple[int, int]) -> bytes:
    head = b"01.02" + SLIDE_ID.encode()
    body = bytearray()
    start = len(head) + 8

    def put(*numbers: int) -> int:
        nonlocal body
        body += struct.pack(f"<{len(numbers)}i", *numbers)
        return start + len(body) - 4 * len(numbers)

    level_heads = []
    for entries in pages:
        page = put(len(entries), 0, *(number for entry in entries for number in entry))
        level_heads.append(put(0, page))
    level_table = put(*level_heads)
    place_page = put(1, 0, 0, 0, *places, 0)
    record_table = put(put(0, place_page))
    return head + struct.pack("<ii", level_table, record_table) + bytes(body)


def _slidedat(grid: tuple[int, int], mpp: float, levels: int, kind: str) -> str:
    general = f"""
[GENERAL]
SLIDE_ID = {SLIDE_ID}
IMAGENUMBER_X = {grid[0]}
IMAGENUMBER_Y = {grid[1]}
OBJECTIVE_MAGNIFICATION = 20
CameraImageDivisionsPerSide = 1
[DATAFILE]
FILE_COUNT = 1
FILE_0 = Data0000.dat
[HIERARCHICAL]
HIER_COUNT = 1
NONHIER_COUNT = 1
INDEXFILE = Index.dat
HIER_0_NAME = Slide zoom level
HIER_0_COUNT = {levels}
NONHIER_0_NAME = VIMSLIDE_POSITION_BUFFER
NONHIER_0_COUNT = 1
"""
    sections = [f"HIER_0_VAL_{level}_SECTION = LAYER_0_LEVEL_{level}_SECTION\n" for level in range(levels)]
    for level in range(levels):
        sections.append(f"""
[LAYER_0_LEVEL_{level}_SECTION]
OVERLAP_X = 0
OVERLAP_Y = 0
MICROMETER_PER_PIXEL_X = {mpp * 2**level}
MICROMETER_PER_PIXEL_Y = {mpp * 2**level}
IMAGE_FORMAT = {kind}
IMAGE_FILL_COLOR_BGR = 16777215
DIGITIZER_WIDTH = {CELL_PX}
DIGITIZER_HEIGHT = {CELL_PX}
IMAGE_CONCAT_FACTOR = {min(level, 1)}
""")
    return general + "".join(sections)
