"""Image files of every kind that folders of users hold: unusual ones that can be used, and ones that cannot."""

from __future__ import annotations

import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.builders.face_models import FACE

LONG = "長" * 80  # 240 bytes: with an ending there is room for, but not for much more
NOT_UNICODE = os.fsdecode(b"caf\xe9") if sys.platform == "linux" else "café"  # other systems have no such names

USED = {
    "plain": ".png",
    "lossy": ".jpg",
    "moving": ".png",
    "turning": ".webp",  # animated, too
    "ink": ".jpg",  # CMYK
    "grey16": ".png",
    "deep": ".png",  # 16 bits for each colour
    "really_jpeg": ".png",
    "really_gif": ".png",
    "täg 絵 😀": ".PNG",
    LONG: ".png",
    NOT_UNICODE: ".png",
    "dot": ".png",  # one pixel
    "strip": ".png",  # 60000 x 1
}
REFUSED = {
    "zero.png": "the file is empty",
    "cut_off.jpg": "the file is truncated",
    "cut_short.png": "the file is truncated",
    "words.webp": "no image that can be read",
    "huge.png": "it has more than 178 million pixels, too many to read",
    "other.jxl.png": "no image that can be read",
}
FACELESS = ("grey16", "dot", "strip")


def write_odd_images(folder: Path) -> Path:
    """One file of each kind, of 160x80 pixels if nothing else is said, with an orange square that is a face."""
    folder.mkdir(parents=True)

    def save(stem: str, pixels: NDArray[np.uint8] | Image.Image, **how: object) -> None:
        image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        image.save(folder / f"{stem}{USED[stem]}", **how)

    first = drawing()
    frames = [Image.fromarray(drawing(shade)) for shade in (90, 40)]
    save("plain", first)
    save("lossy", first, quality=95)
    save("moving", first, save_all=True, append_images=frames)
    save("turning", first, save_all=True, append_images=frames, lossless=True)
    save("ink", Image.fromarray(first).convert("CMYK"), quality=95)
    save("grey16", Image.fromarray(first[..., 0].astype(np.uint16) * 257))
    (folder / "deep.png").write_bytes(png(first.astype(">u2") * 257))
    save("really_jpeg", first, format="JPEG", quality=95)
    save("really_gif", first, format="GIF", save_all=True, append_images=frames)
    for stem in ("täg 絵 😀", LONG, NOT_UNICODE):
        save(stem, first)
    save("dot", first[:1, :1])
    (folder / "strip.png").write_bytes(flat_png(60000, 1))
    (folder / "zero.png").write_bytes(b"")
    whole = (folder / "lossy.jpg").read_bytes()
    (folder / "cut_off.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "cut_short.png").write_bytes(png(first)[:150])
    (folder / "words.webp").write_text("no image")
    (folder / "huge.png").write_bytes(flat_png(20000, 20000))
    (folder / "other.jxl.png").write_bytes(b"\xff\x0a\xfa\x1f")
    return folder


def drawing(shade: int = 200) -> NDArray[np.uint8]:
    """(80, 160, 3): grey, with a face of 16 pixels around (56, 40)."""
    pixels = np.full((80, 160, 3), shade, np.uint8)
    pixels[32:48, 48:64] = FACE
    return pixels


def png(pixels: NDArray[np.unsignedinteger]) -> bytes:
    """RGB (H, W, 3) of 8 or, as big-endian numbers, of 16 bits, which Pillow reads and does not write."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return _png(width, height, 8 * pixels.dtype.itemsize, 2, zlib.compress(rows))


def flat_png(width: int, height: int) -> bytes:
    """Black, at a bit per pixel, so that even a huge one is quickly made and small on disk."""
    row, compress = bytes(1 + -(-width // 8)), zlib.compressobj(1)
    return _png(width, height, 1, 0, b"".join(compress.compress(row) for _ in range(height)) + compress.flush())


def _png(width: int, height: int, bits: int, colours: int, content: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")
