"""Writes images, each whole or not at all."""

from __future__ import annotations

import errno
import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from library.errors import UserError
from library.runtime.durable import discard_once, replacing

if TYPE_CHECKING:
    from numpy.typing import NDArray

# As little loss as each kind allows: what is written here will be shrunk, cut and encoded again.
_JPEG = {"format": "JPEG", "quality": 100, "subsampling": 0}
_KINDS: dict[str, dict[str, Any]] = {
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".png": {"format": "PNG"},
    ".webp": {"format": "WEBP", "lossless": True},
    ".bmp": {"format": "BMP"},
}


class WriteError(Exception):
    """A file cannot be written. This is about the disk and not about one image, so the run ends."""


def writable_suffix(suffix: str) -> str:
    """The ending of an image's results: its own, or ".png" where files of its kind are only read."""
    return suffix if suffix.lower() in _KINDS else ".png"


def encoded(pixels: NDArray[np.uint8], suffix: str) -> bytes:
    """The bytes of an image file.

    Args:
        pixels: (H, W) grey, (H, W, 3) RGB or, not for JPEG, (H, W, 4) RGB and opacity.
        suffix: one that `writable_suffix` gives.
    Raises: ValueError: a side is too long for files of this kind.
    """
    stream = BytesIO()
    try:
        Image.fromarray(pixels).save(stream, **_KINDS[suffix.lower()])
    except (OSError, ValueError) as error:
        height, width = pixels.shape[:2]
        raise ValueError(f"{width}x{height} pixels cannot be written as {suffix} ({error})") from None
    return stream.getvalue()


def write_file(path: Path, content: bytes) -> None:
    """Raises: WriteError. ValueError: the name is too long, which is about this image."""
    discard_once(path.parent, path.suffix)
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"the result's name is too long: {path.name}; shorten the image's") from None
        raise WriteError(f"{path}: cannot be written ({error.strerror or error})") from None


def make_folder(path: Path) -> None:
    """Makes a folder for results. Raises: UserError: it cannot be made, or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: the folder cannot be made ({error.strerror})") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"{path}: the folder cannot be written to")


def is_written(path: Path) -> bool:
    """Whether a result is there and not empty, as a power cut may leave those of other programs."""
    try:
        return path.stat().st_size > 0
    except OSError:
        return False
