"""The size of a plain JPEG, PNG or WebP file from its first bytes, for scans of many: half of the time with Pillow.

Plain is what holds nothing that could change how the image is seen, and nothing that Pillow might refuse: no EXIF, no
XMP, one frame, 8 bits in JPEG. All else is left to Pillow, which then gives the same size or says what is wrong.
"""

from __future__ import annotations

import zlib

from library.types import Size

HEAD = 1 << 16  # bytes at the beginning of a file that are looked at
_LARGEST = 1 << 26  # pixels; Pillow refuses files that claim too many

_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive JPEG
_PNG = b"\x89PNG\r\n\x1a\n"
_PALETTE = 3
_PNG_KINDS = (*((bits, kind) for bits in (1, 2, 4, 8) for kind in (0, _PALETTE)), (16, 0), (8, 2), (8, 4), (8, 6))
_PNG_LENGTHS = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"tIME": 7}
_LONGEST_TEXT = 1 << 14


def plain_size(head: bytes, length: int) -> Size | None:
    """The size of the image; None: the file is not plain, and Pillow must look at it.

    Args:
        head: the first `HEAD` bytes of a file, or all of a shorter one.
        length: of the file in bytes.
    """
    try:
        if head[:3] == b"\xff\xd8\xff":
            size = _jpeg(head)
        elif head[:8] == _PNG:
            size = _png(head)
        elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            size = _webp(head, length)
        else:
            return None
    except IndexError:  # the head ends in the middle of what must be known
        return None
    return size if size is not None and 0 < size.width * size.height <= _LARGEST else None


def _number(data: bytes, start: int, count: int = 2) -> int:
    """`count` bytes, the highest first. Raises: IndexError: they are not all there."""
    if start + count > len(data):
        raise IndexError
    return int.from_bytes(data[start : start + count], "big")


def _jpeg(head: bytes) -> Size | None:
    """Walks over the segments up to the pixels, since those with EXIF may stand anywhere before."""
    position, size = 2, None
    while head[position] == 0xFF:
        marker, length = head[position + 1], _number(head, position + 2)
        body = head[position + 4 : position + 2 + length]
        if length < 2 or len(body) != length - 2:
            return None
        if marker == 0xDA:  # the pixels follow
            return size
        if marker in _FRAMES:
            if size is not None or body[0] != 8 or body[5] not in (1, 3, 4) or len(body) != 6 + 3 * body[5]:
                return None
            size = Size(_number(body, 3), _number(body, 1))
        elif not _is_harmless(marker, body):
            return None
        position += 2 + length
    return None


def _is_harmless(marker: int, body: bytes) -> bool:
    """Whether a segment of a JPEG file says nothing of the image's size, orientation or number."""
    if marker == 0xDB:  # quantization tables of 64 values, in one or two bytes
        start = 0
        while start < len(body):
            start += 129 if body[start] >> 4 else 65
        return start == len(body)
    if marker in (0xC4, 0xDD, 0xFE):  # Huffman tables, restart interval, comment
        return True
    if marker == 0xE0:
        return body[:5] == b"JFIF\0" and len(body) >= 14
    if marker == 0xE2:
        return body[:12] == b"ICC_PROFILE\0" and len(body) >= 14
    return marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12


def _png(head: bytes) -> Size | None:
    """Walks over the chunks up to the pixels. What may stand behind them, Pillow does not look at either."""
    position, size, has_palette = len(_PNG), None, False
    while True:
        length, kind = _number(head, position, 4), head[position + 4 : position + 8]
        if kind == b"IDAT":
            return size
        if length > _LONGEST_TEXT:
            return None
        body, checksum = head[position + 8 : position + 8 + length], _number(head, position + 8 + length, 4)
        if zlib.crc32(body, zlib.crc32(kind)) != checksum:
            return None
        if kind == b"IHDR":
            if size is not None or length != 13 or (body[8], body[9]) not in _PNG_KINDS or any(body[10:]):
                return None
            size, has_palette = Size(_number(body, 0, 4), _number(body, 4, 4)), body[9] == _PALETTE
        elif kind == b"PLTE" or (kind == b"tRNS" and has_palette):
            pass  # colours
        elif kind == b"tEXt":
            if b"exif" in body[:32].lower() or body.startswith(b"XML:"):
                return None
        elif _PNG_LENGTHS.get(kind) != length:
            return None
        position += 12 + length


def _webp(head: bytes, length: int) -> Size | None:
    """Files of one chunk; those with transparency, profiles or EXIF have several."""
    kind, size = head[12:16], int.from_bytes(head[16:20], "little")
    whole = int.from_bytes(head[4:8], "little") + 8
    if whole > length or 20 + size + size % 2 != whole or len(head) < 30:
        return None
    data = head[20:30]
    if kind == b"VP8 ":
        tag = int.from_bytes(data[:3], "little")
        is_key_frame, profile, is_shown, first_part = not tag & 1, tag >> 1 & 7, tag >> 4 & 1, tag >> 5
        if not (is_key_frame and profile <= 3 and is_shown and first_part < size and data[3:6] == b"\x9d\x01\x2a"):
            return None
        return Size(int.from_bytes(data[6:8], "little") & 0x3FFF, int.from_bytes(data[8:10], "little") & 0x3FFF)
    if kind == b"VP8L" and data[0] == 0x2F:
        bits = int.from_bytes(data[1:5], "little")
        return Size((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1) if bits >> 29 == 0 else None
    return None
