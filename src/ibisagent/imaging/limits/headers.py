"""What the headers of an image file would make a decoder do, found without one: pages, directories, tiles, scans.

Decoders trust these numbers. A TIFF of 4 MB can hold 30,000 pages, name one stretch of bytes as the value of 60,000
tags, or cut its image into tiles of one pixel; a JPEG of 100 KB can go over its image a thousand times.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import struct
from collections.abc import Mapping
from typing import IO

from ibisagent.errors import DataError, TooLargeError
from ibisagent.imaging import limits

MAX_PAGES = 256
"""Directories of a TIFF: pages, thumbnails, levels of a pyramid. More than MAX_CHANNELS images are a stack anyway."""
MAX_TAGS = 4096
MAX_CHUNKS = 2**16
MAX_SCANS = 16
"""How often a progressive JPEG as large as the limit may go over its image; a smaller one may more often."""
_SMALLEST_TILE = 16 * 16  # TIFF 6.0, section 15
_SPARE_BYTES = 2**16

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_SCAN = 0xDA  # JPEG markers
_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_TYPE_BYTES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4), start=1)) | {16: 8, 17: 8, 18: 8}
_WHOLE = {3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_WIDTH, _HEIGHT, _STRIP_ROWS, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 278, 322, 323
_STRIPS, _TILES = 273, 324
_SUB_DIRECTORIES = (330, 34665, 34853, 40965)  # smaller images; EXIF, GPS and interoperability data


def check_image_file(file: IO[bytes], where: object) -> None:
    """TooLargeError where the headers of a TIFF, PNG or JPEG ask for more than an image needs.

    file: at its beginning; it is left anywhere. where: what it is called in errors. DataError where a TIFF is a stack,
    or its pages go round in a circle. Other damage is left for the decoder to tell.
    """
    magic = file.read(8)
    if magic[:4] in _TIFF:
        _check_tiff(file, where)
    elif magic == _PNG:
        _check_png(file, where)
    elif magic[:3] == _JPEG:
        _check_jpeg(magic + file.read(), where)


def _check_png(file: IO[bytes], where: object) -> None:
    for count in itertools.count(1):
        head = file.read(8)
        if len(head) < 8:
            return
        if count > MAX_CHUNKS:
            raise TooLargeError(f"{where}: has more than {MAX_CHUNKS} chunks; save it again")
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf":
            _check_exif(file.read(length), where)
            file.seek(4, os.SEEK_CUR)
        else:
            file.seek(length + 4, os.SEEK_CUR)


def _check_jpeg(content: bytes, where: object) -> None:
    height, width, exif = _jpeg_head(content, where)
    _check_exif(exif, where)
    limits.check_pixels(height, width, where)
    scans = content.count(b"\xff\xda")  # within a scan every 0xff is followed by zero
    if scans * height * width > MAX_SCANS * limits.current().pixels:
        raise TooLargeError(f"{where}: goes over its image {scans} times; save it as a baseline JPEG or PNG")


def check_codestream(content: bytes, pixels: int, samples: int, where: str) -> None:
    """TooLargeError where a JPEG, JPEG-LS or JPEG 2000 stream claims more pixels or samples, or goes over them often.

    Those of other kinds, and damaged ones, are left for the decoder.
    """
    if content[:3] == _JPEG:
        height, width, _ = _jpeg_head(content, where)
        claimed = height * width
        scans = content.count(b"\xff\xda")  # more than one at all are rare, and there are many frames
        if scans > MAX_SCANS and claimed <= pixels:
            raise TooLargeError(f"{where}: goes over its image {scans} times; export it again")
    else:
        at = content.find(b"\xff\x4f\xff\x51", 0, _SPARE_BYTES)
        if at < 0 or len(content) < at + 42:
            return
        right, bottom, left, top = struct.unpack_from(">4I", content, at + 8)
        claimed = max(right - left, 0) * max(bottom - top, 0)
        samples_claimed = struct.unpack_from(">H", content, at + 40)[0]
        if samples_claimed > max(samples, 4):
            raise TooLargeError(f"{where}: claims {samples_claimed} samples a pixel, not {samples}; export it again")
    if claimed > pixels:
        raise TooLargeError(f"{where}: claims {claimed} pixels, its header {pixels}; export it again")


def _jpeg_head(content: bytes, where: object) -> tuple[int, int, bytes]:
    """(height and width of the largest frame, EXIF data) that a JPEG or JPEG-LS stream has before its first scan."""
    exif, largest, at = b"", (0, 0), 2
    for count in itertools.count(1):
        at = content.find(b"\xff", at)
        marker = content[at + 1] if 0 <= at < len(content) - 3 else _SCAN
        if marker == _SCAN:
            break
        if count > MAX_TAGS:
            raise TooLargeError(f"{where}: has more than {MAX_TAGS} segments before its image; save it again")
        if marker in (0x00, 0x01, 0xFF, *range(0xD0, _SCAN)):  # no segment of its own
            at += 1 if marker == 0xFF else 2
            continue
        segment = content[at + 4 : at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")]
        if marker in _FRAMES and len(segment) >= 5:
            largest = max(largest, struct.unpack(">HH", segment[1:5]), key=math.prod)
        elif marker == 0xE1 and segment.startswith(b"Exif\0\0"):
            exif += segment[6:]
        at += 4 + len(segment)
    return *largest, exif


def _check_exif(exif: bytes, where: object) -> None:
    if exif[:4] in _TIFF:
        _check_tiff(io.BytesIO(exif), where)


def _check_tiff(file: IO[bytes], where: object) -> None:
    """Walk all directories once, count what their tags refer to, and look at the tiles or strips of each."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(16)
    order, big = "<" if head[:2] == b"II" else ">", b"+" in head[2:4]
    count_code, offset_code, entry_bytes = ("Q", "Q", 20) if big else ("H", "I", 12)
    inline = struct.calcsize(offset_code)
    if len(head) < 8 + (8 if big else 0):
        return
    waiting = [struct.unpack_from(order + offset_code, head, 8 if big else 4)[0]]
    seen: set[int] = set()
    named = 0
    while waiting:
        at = waiting.pop()
        if not 0 < at < size:
            continue
        if at in seen:
            raise DataError(f"{where}: its pages go round in a circle; save the image to read as a file of its own")
        seen.add(at)
        if len(seen) > MAX_PAGES:
            raise DataError(
                f"{where}: is a stack of more than {MAX_PAGES} pages; save the image to read as a file of its own"
            )
        file.seek(at)
        counted = file.read(struct.calcsize(count_code))
        if len(counted) < struct.calcsize(count_code):
            continue
        count = struct.unpack(order + count_code, counted)[0]
        if count > MAX_TAGS:
            raise TooLargeError(f"{where}: a page has {count} tags, at most {MAX_TAGS} are read; save it again")
        entries = file.read(count * entry_bytes + inline)
        first: dict[int, int] = {}
        held: dict[int, int] = {}
        for start in range(0, min(count * entry_bytes, len(entries) - entry_bytes + 1), entry_bytes):
            tag, kind, number = struct.unpack_from(f"{order}HH{offset_code}", entries, start)
            length, value = number * _TYPE_BYTES.get(kind, 1), start + entry_bytes - inline
            held[tag] = number
            if length > inline:
                named += length
                if tag in _SUB_DIRECTORIES and number <= MAX_PAGES:
                    file.seek(struct.unpack_from(order + offset_code, entries, value)[0])
                    waiting += _whole_numbers(file.read(length), kind, order)
            elif kind in _WHOLE and number:
                numbers = _whole_numbers(entries[value : value + length], kind, order)
                first[tag] = numbers[0]
                if tag in _SUB_DIRECTORIES:
                    waiting += numbers
        if named > 2 * size + _SPARE_BYTES:
            raise TooLargeError(f"{where}: its tags name more bytes than it has; save it again")
        _check_parts(first, held, where)
        if len(entries) == count * entry_bytes + inline:
            waiting.append(struct.unpack_from(order + offset_code, entries, count * entry_bytes)[0])


def _whole_numbers(content: bytes, kind: int, order: str) -> list[int]:
    code = _WHOLE.get(kind)
    if code is None:
        return []
    number = len(content) // struct.calcsize(code)
    return list(struct.unpack_from(f"{order}{number}{code}", content))


def _check_parts(first: Mapping[int, int], held: Mapping[int, int], where: object) -> None:
    """TooLargeError for tiles above the limit, and for more tiles or strips than a decoder can go through.

    first: the first value of each tag that holds whole numbers; held: how many values each tag has.
    """
    most = max(limits.current().pixels // _SMALLEST_TILE, 2**16)
    height, width = first.get(_HEIGHT, 0), first.get(_WIDTH, 0)
    if _TILES in held:
        tile = max(first.get(_TILE_HEIGHT, height), 1), max(first.get(_TILE_WIDTH, width), 1)
        limits.check_pixels(*tile, f"{where}, a tile")
    else:
        tile = max(first.get(_STRIP_ROWS, height), 1), max(width, 1)
    parts = max(held.get(_TILES, 0), held.get(_STRIPS, 0), -(-height // tile[0]) * -(-width // tile[1]))
    if parts > most:
        raise TooLargeError(f"{where}: is cut into {parts} tiles or strips, at most {most} are read; save it again")
