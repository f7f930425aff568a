"""A PNG file without the texts in it, for images whose metadata passes the limits of the library that reads them.

Workflows of image generators are texts of a megabyte and more, and colour profiles can be as long. Pillow refuses the
whole file then, though its pixels are good.
"""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress
from io import BytesIO
from typing import BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
LARGEST_PROFILE = 16 << 20  # bytes of a colour profile once it is unpacked
_LARGEST_FILE = 1 << 30  # bytes that are copied
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_EXIF = b"Raw profile type exif\0"  # a text that may hold the orientation; it is short
_SHORT = 1 << 18


def without_texts(stream: BinaryIO, length: int) -> tuple[BytesIO, bytes | None] | None:
    """The file with its critical chunks and short facts, and its colour profile apart (None: none that can be read).

    Args:
        stream: the file; its position does not matter.
        length: of the file in bytes.
    Returns: None where there is nothing to leave out, or it is no PNG file.
    """
    stream.seek(0)
    if length > _LARGEST_FILE or stream.read(len(SIGNATURE)) != SIGNATURE:
        return None
    kept, profile, left_out = BytesIO(), None, False
    kept.write(SIGNATURE)
    while len(head := stream.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        body = stream.read(size + 4)  # with its checksum
        if kind == b"iCCP":
            profile, left_out = None, True
            # The profile's name, a zero, the kind of compression, which is 0, and the packed profile.
            _, zero, packed = body[:-4].partition(b"\0")
            unpacking = zlib.decompressobj()
            with suppress(zlib.error):
                unpacked = unpacking.decompress(packed[1:], LARGEST_PROFILE)
                if zero and packed[:1] == b"\0" and not unpacking.unconsumed_tail:
                    profile = unpacked
        elif kind in _TEXTS and not (size <= _SHORT and body.startswith(_EXIF)):
            left_out = True
        else:
            kept.write(head + body)
        if kind == b"IEND":
            break
    kept.seek(0)
    return (kept, profile) if left_out else None
