"""Picture files to RGB arrays, and what is done to them: resize, crop, flip, colours. Arrays are uint8 (H, W, 3)."""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from random import Random
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from library.types import Size

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_ORIENTATION = 0x0112  # EXIF tag
_SIDEWAYS = (5, 6, 7, 8)  # its values that exchange width and height
_PILLOW = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
_TAIL = 1024  # bytes at a file's end that are searched for its end mark


class Probe(NamedTuple):
    """What the header of a picture file tells."""

    size: Size  # upright, as training sees it
    turned: bool  # EXIF says that the stored pixels are to be turned or mirrored


class FaceBox(NamedTuple):
    """Centre and size of a face, in pixels of the picture on disk."""

    x: int
    y: int
    width: int
    height: int


def probe(path: Path) -> Probe:
    """Size and orientation from the header; pixels are decoded only where the file's end looks cut off.

    Raises: OSError or ValueError: no picture, an unknown format, or a truncated file.
    """
    with _opened(path) as image:
        orientation = _orientation(image)
        if min(image.size) < 1:
            raise ValueError("it has no pixels")
        if not _ends_well(path, image.format):
            image.load()
        width, height = image.size
    size = Size(height, width) if orientation in _SIDEWAYS else Size(width, height)
    return Probe(size, orientation != 1)


def image_size(path: Path) -> Size:
    """Upright size in pixels, from the header. Raises: OSError or ValueError as `probe`."""
    return probe(path).size


def read_image(path: Path) -> NDArray[np.uint8]:
    """The picture upright, RGB, uint8 (H, W, 3). Transparent parts become white.

    White is what taggers and viewers show behind a drawing; the colours stored under full transparency are left-overs
    that nobody has seen.

    Raises: OSError or ValueError: no picture, an unknown format, or damaged.
    """
    with _opened(path) as image:
        orientation = _orientation(image)
        image.load()
        upright = _turn(image, orientation)
    return np.asarray(_to_rgb(upright))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (Image.DecompressionBombError, SyntaxError, EOFError, struct.error, zlib.error) as error:
        raise ValueError(str(error)) from None  # all of these are Pillow's ways to say that a file is broken


def _orientation(image: Image.Image) -> int:
    # Asking a PNG for EXIF that its header lacks would decode all of it, in search of a chunk behind the pixels.
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1
    value = image.getexif().get(_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    return ImageOps.exif_transpose(image) if orientation != 1 else image


def _ends_well(path: Path, format: str | None) -> bool:
    """Whether the file ends like a whole one. False is only a suspicion: some programs append their own data."""
    length = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(8)
        file.seek(max(0, length - _TAIL))
        tail = file.read()
    if format in ("JPEG", "MPO"):
        return b"\xff\xd9" in tail  # the end mark; cannot occur inside compressed data
    if format == "PNG":
        return b"IEND" in tail
    if format == "WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= length
    return format != "BMP" or int.from_bytes(head[2:6], "little") <= length


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _from_16_bit(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits; Pillow's own conversion clips, which turns nearly everything white."""
    grey = np.asarray(image).astype(np.uint32)
    scaled = Image.fromarray(((np.minimum(grey, 65535) + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return scaled
    alpha = Image.fromarray(np.where(grey == transparent, 0, 255).astype(np.uint8))
    return Image.merge("LA", (scaled, alpha))


@cache
def _opencv() -> ModuleType:
    import cv2

    # Its thread pool does not survive a fork, and in many data workers at once it only fights over the cores.
    cv2.setNumThreads(0)
    return cv2


def resize(image: NDArray[np.uint8], to: Size, interpolation: str | None = None) -> NDArray[np.uint8]:
    """(H, W, 3) to (to.height, to.width, 3).

    Args:
        interpolation: a name of `config_schema.INTERPOLATIONS`; None: area if no side grows, else lanczos.
    """
    height, width = image.shape[:2]
    if (width, height) == to:
        return image
    if interpolation is None:
        interpolation = "area" if to.width <= width and to.height <= height else "lanczos"
    if interpolation in _PILLOW:
        return np.asarray(Image.fromarray(image).resize(to, _PILLOW[interpolation]))
    cv2 = _opencv()
    flags = {
        "nearest": cv2.INTER_NEAREST,
        "bilinear": cv2.INTER_LINEAR,
        "linear": cv2.INTER_LINEAR,
        "bicubic": cv2.INTER_CUBIC,
        "cubic": cv2.INTER_CUBIC,
        "area": cv2.INTER_AREA,
    }
    return cv2.resize(image, to, interpolation=flags[interpolation])


def crop(image: NDArray[np.uint8], to: Size, rng: Random | None = None) -> NDArray[np.uint8]:
    """Cuts `to` out of the middle, or with `rng` out of any place, all equally likely. The picture covers `to`."""
    height, width = image.shape[:2]
    left, top = (_offset(over, rng) for over in (width - to.width, height - to.height))
    return image[top : top + to.height, left : left + to.width]


def _offset(overhang: int, rng: Random | None) -> int:
    return overhang // 2 if rng is None else rng.randint(0, overhang)


def face_box(path: Path) -> FaceBox | None:
    """The face that a file name ``<name>_<cx>_<cy>_<w>_<h>`` tells of."""
    fields = path.stem.split("_")
    if len(fields) < 5 or not all(field.isdecimal() for field in fields[-4:]):
        return None
    return FaceBox(*map(int, fields[-4:]))


def crop_face(
    image: NDArray[np.uint8],
    face: FaceBox,
    to: Size,
    span: tuple[float, float],
    rng: Random,
    *,
    anywhere: bool = False,
    interpolation: str | None = None,
) -> NDArray[np.uint8]:
    """Shrinks the picture by chance and cuts `to` out around the face. The picture covers `to`.

    Args:
        span: (low, high); the frame's shorter side is between `low` and `high` times the face's longer side.
        anywhere: the face may lie anywhere in the frame, most often near the middle (--random_crop).
    """
    height, width = image.shape[:2]
    if (width, height) == to:
        return image
    low, high = span
    side, face_side = min(to), max(face.width, face.height, 1)
    covers = max(to.width / width, to.height / height)
    smallest = min(1.0, max(covers, side / (face_side * high)))
    largest = min(1.0, max(smallest, side / (face_side * low)))
    scale = rng.uniform(smallest, largest)
    resized = Size(math.floor(width * scale + 0.5), math.floor(height * scale + 0.5))
    image = resize(image, resized, interpolation)
    jitter = face_side // 20 if low != high and face_side > side // 10 and face_side >= 40 else 0
    starts = []
    for centre, length, wanted in zip((face.x, face.y), resized, to, strict=True):
        centre = math.floor(centre * scale + 0.5)
        start = centre - wanted // 2
        if anywhere:
            reach = max(length - centre, centre)
            start += rng.randint(0, reach) + rng.randint(0, reach) - reach
        else:
            start += rng.randint(-jitter, jitter)
        starts.append(max(0, min(start, length - wanted)))
    left, top = starts
    return image[top : top + to.height, left : left + to.width]


def vary_colours(image: NDArray[np.uint8], rng: Random) -> NDArray[np.uint8]:
    """One time in three, slightly: the hue by up to 16 degrees, or a gamma of 0.95 to 1.05."""
    if rng.random() >= 1 / 3:
        return image
    if rng.random() < 0.5:
        cv2 = _opencv()
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)  # 8-bit hue counts 0..179, two degrees each
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + rng.randint(-8, 8)) % 180
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    levels = np.arange(256) / 255
    table = np.round(255 * levels ** rng.uniform(0.95, 1.05)).astype(np.uint8)
    return table[image]


def to_pixels(image: NDArray[np.uint8]) -> Tensor:
    """uint8 (H, W, 3) to float32 (3, H, W) in [-1, 1]."""
    import torch

    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    return torch.from_numpy(planes).float().div_(127.5).sub_(1.0)
