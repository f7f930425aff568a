"""Image files to RGB arrays, and what is done to them: resize, crop, colours. Arrays are uint8 (H, W, 3) or (H, W).

Files are only ever read.
"""

from __future__ import annotations

import math
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from library.data.sample.opencv import opencv
from library.data.sample.plain_headers import HEAD, plain_size
from library.data.sample.png_metadata import without_texts
from library.data.scan.folders import register_jpeg_xl
from library.runtime.files import open_regular
from library.runtime.logs import LOGGER
from library.types import Size

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.ImageCms import ImageCmsTransform
    from torch import Tensor

T = TypeVar("T")

_ORIENTATION = 0x0112  # EXIF tag; its values, and what brings the stored pixels upright:
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # these exchange width and height
_ANIMATED = ("WEBP", "PNG", "AVIF", "GIF", "JXL")  # MPO and TIFF have several images too, but no frames
_DRAWINGS = ("EPS", "WMF", "EMF")  # Pillow would start another program to draw these
_GREY = ("1", "L", "LA", "La")
_PILLOW = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
_SMALL = 1 << 18  # bytes; files up to this are read in one go
_TAIL = 1024  # bytes at a file's end that are searched for its end mark
_STRIP = 1 << 17  # pixels that are copied at a time; as many as fit into a processor's cache

# What Pillow raises, beside OSError and ValueError, over the bytes of a broken file.
_BROKEN = (SyntaxError, EOFError, RuntimeError, TypeError, LookupError, OverflowError, struct.error, zlib.error)

# About single files, and nothing that a user could act on; broken ones are reported by us. A filter for good, as
# `warnings.catch_warnings` may not be used where several threads read.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Probe(NamedTuple):
    """The size, orientation and frames in the header of an image file."""

    size: Size  # upright, as training sees it
    turned: bool  # EXIF says that the stored pixels are to be turned or mirrored
    frames: int = 1  # more than one: animated, and only the first is used


class FaceBox(NamedTuple):
    """Centre and size of a face, in pixels of the image on disk."""

    x: int
    y: int
    width: int
    height: int


class Crop(NamedTuple):
    """A resize and crop: the image is resized to `resized`, and a part of size `to` is taken at (left, top)."""

    resized: Size
    left: int
    top: int
    to: Size


# ---- files


def probe(path: Path) -> Probe:
    """Size, orientation and frames from the header; pixels are decoded only where the file's end looks cut off.

    Raises: OSError or ValueError: no image, an unknown format, too large, or a truncated file. See `reason`.
    """

    def look(image: Image.Image, stream: BinaryIO, length: int) -> Probe:
        orientation = _orientation(image)
        frames = image.n_frames if image.format in _ANIMATED else 1
        if not _ends_well(stream, length):
            image.load()
        width, height = image.size
        size = Size(height, width) if orientation in _SIDEWAYS else Size(width, height)
        return Probe(size, orientation != 1, frames)

    with _open(path) as (stream, length):
        plain = plain_size(stream.read(HEAD), length)
        if plain is not None and _ends_well(stream, length):
            return Probe(plain, turned=False)
        return _use(path, stream, length, look)


def describe(path: Path) -> list[Any] | str:
    """`probe` for the file index: [width, height, turned, frames], or in plain words why the file cannot be used."""
    try:
        found = probe(path)
    except (OSError, ValueError) as error:
        return reason(error)
    return [*found.size, found.turned, found.frames]


def reason(error: OSError | ValueError) -> str:
    """The reason why `probe` or a `read_...` function refused a file, in a few plain words without its path."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def image_size(path: Path) -> Size:
    """Upright size in pixels, from the header. Raises: OSError or ValueError as `probe`."""
    return probe(path).size


def content_digest(path: Path) -> str:
    """The first 32 hex digits of the SHA-256 of a file's bytes. Raises: OSError."""
    digest = sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:32]


def read_image(path: Path) -> NDArray[np.uint8]:
    """The image upright, sRGB, uint8 (H, W, 3); of an animated one the first frame. Transparent parts become white.

    White is what taggers and viewers show behind a drawing; the colours stored under full transparency are left-overs
    that has not been seen.

    Raises: OSError or ValueError: no image, an unknown format, too large, or damaged. See `reason`.
    """
    return _rgb_on_white(_upright(path)[0], path)


def read_reduced(path: Path, enough: Callable[[Size], Size]) -> tuple[NDArray[np.uint8], Size]:
    """`read_image` for callers that shrink the image anyway: a possibly reduced image, and its original size.

    A JPEG file is decoded at a half, a quarter or an eighth of its size, the smallest that is enough. That takes half
    the time or less. Where `enough` is four times what the image is shrunk to, that is the same image to within
    one level of 255 on average; twice leaves a little more. Other files come whole.

    Args:
        enough: from the image's upright size to the smallest one that will do.
    Raises: OSError or ValueError as `read_image`.
    """
    image, size = _upright(path, enough)
    return _rgb_on_white(image, path), size


def _rgb_on_white(image: Image.Image, path: Path) -> NDArray[np.uint8]:
    colours, alpha = _split(image)
    rgb = _to_srgb(colours, image.info.get("icc_profile"), path)
    if alpha is not None:
        rgb.putalpha(alpha)
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    return _to_array(rgb)


def read_image_and_alpha(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The colours (H, W, 3) as stored, whatever their transparency, and the opacity (H, W); see `read_image`.

    The opacity is 255 where nothing shines through; everywhere, if the image has no transparency.

    Raises: OSError or ValueError as `read_image`.
    """
    image, _ = _upright(path)
    colours, alpha = _split(image)
    rgb = _to_array(_to_srgb(colours, image.info.get("icc_profile"), path))
    return rgb, np.full(rgb.shape[:2], 255, np.uint8) if alpha is None else np.asarray(alpha)


def read_values(path: Path) -> NDArray[np.uint8]:
    """The numbers of a mask or control image, upright, uint8 (H, W, 3): no transparency, no colour profile.

    A grey of 128 means one half there, whatever a profile says about how bright it looks.

    Raises: OSError or ValueError as `read_image`.
    """
    colours, _ = _split(_upright(path)[0])
    return _to_array(_as_rgb(colours))


def use_image(path: Path, use: Callable[[Image.Image, BinaryIO, int], T]) -> T:
    """The result of `use` for an image whose header has been read, its file, and the file's length in bytes.

    Where the texts in a PNG file are too long for Pillow, `use` is called a second time, without them.

    Raises: OSError or ValueError: no image, an unknown format, too large, or damaged, whether that comes out here or
        in `use`. See `reason`.
    """
    with _open(path) as (stream, length):
        return _use(path, stream, length, use)


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A file and its length in bytes; a small one is read in one go."""
    with open_regular(path) as file:
        length = os.fstat(file.fileno()).st_size
        yield BytesIO(file.read()) if length <= _SMALL else file, length


def _use(path: Path, stream: BinaryIO, length: int, use: Callable[[Image.Image, BinaryIO, int], T]) -> T:
    if path.suffix.lower() == ".jxl":
        register_jpeg_xl()
    source, profile = stream, None
    while True:
        source.seek(0)
        try:
            with Image.open(source) as image:
                if image.format in _DRAWINGS:
                    raise UnidentifiedImageError
                if profile is not None:
                    image.info["icc_profile"] = profile
                return use(image, stream, length)
        except (OSError, ValueError, Image.DecompressionBombError, *_BROKEN) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # not about the bytes: no such file, no permission
            bare = without_texts(stream, length) if source is stream else None
            if bare is None:
                raise ValueError(_what_is_wrong(stream, length, error)) from None
            source, profile = bare


def _what_is_wrong(stream: BinaryIO, length: int, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} million pixels, too many to read"
    if length == 0:
        return "the file is empty"
    if not _ends_well(stream, length):
        return "the file is truncated"
    if isinstance(error, UnidentifiedImageError):
        return "no image that can be read"
    return f"the file is damaged: {' '.join(str(error).split())[:80]}"


def _ends_well(stream: BinaryIO, length: int) -> bool:
    """Whether a file ends like a whole one. False is only a suspicion: some programs append their own data.

    Args:
        length: of the file, in bytes. Its position stays where it is, as Pillow reads on from there.
    """
    position = stream.tell()
    try:
        stream.seek(0)
        head = stream.read(8)
        if head[4:] in (b"ftyp", b"JXL "):
            end = 0  # of the outermost boxes so far; of an AVIF or JPEG XL file the last one ends where the file does
            while end < length:
                stream.seek(end)
                header = stream.read(16)
                size = int.from_bytes(header[:4], "big")
                if size == 0:  # this one reaches to the end, wherever that is
                    return True
                if size == 1:
                    size = int.from_bytes(header[8:16], "big")
                end += max(size, 8)
            return end == length
        if head[:4] == b"RIFF":
            return int.from_bytes(head[4:], "little") + 8 <= length
        if head[:2] == b"BM":
            return int.from_bytes(head[2:6], "little") <= length
        stream.seek(max(0, length - _TAIL))
        tail = stream.read()
        if head[:2] == b"\xff\xd8":
            return b"\xff\xd9" in tail  # JPEG's end mark; cannot occur inside compressed data
        return b"IEND" in tail if head[:4] == b"\x89PNG" else True
    finally:
        stream.seek(position)


def _orientation(image: Image.Image) -> int:
    # Asking a PNG for EXIF that its header lacks would decode all of it, in search of a chunk behind the pixels.
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1
    # JPEG XL is turned by its decoder, unless it only repacks a JPEG file, which comes back as it was.
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (OSError, ValueError, *_BROKEN):
        return 1  # broken EXIF says nothing; the pixels may be whole
    return value if value in _TURNS else 1


def _upright(path: Path, enough: Callable[[Size], Size] | None = None) -> tuple[Image.Image, Size]:
    """The decoded image in the mode of its file, upright, and the size of the whole image.

    Args:
        enough: as in `read_reduced`; None decodes all of it.
    """

    def decode(image: Image.Image, *_: Any) -> tuple[Image.Image, Size]:
        orientation = _orientation(image)  # before the pixels, so that it is what `probe` says
        sideways = orientation in _SIDEWAYS
        size = Size(*(image.size[::-1] if sideways else image.size))
        if enough is not None:
            least = enough(size)
            image.draft(None, least[::-1] if sideways else least)  # does nothing to files other than JPEG
        image.load()
        return (image.transpose(_TURNS[orientation]) if orientation != 1 else image), size

    return use_image(path, decode)


# ---- modes and colours


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """(colours in mode L, RGB or CMYK as stored, opacity in mode L or None)."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips, which turns nearly everything white
        grey, transparent = np.asarray(image).astype(np.uint32), image.info.get("transparency")
        image = Image.fromarray(((np.minimum(grey, 65535) + 128) // 257).astype(np.uint8))
        if isinstance(transparent, int):
            alpha = Image.fromarray(np.where(grey == transparent, 0, 255).astype(np.uint8))
            image = Image.merge("LA", (image, alpha))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        colours = rgba.getchannel("R") if image.mode in _GREY else rgba.convert("RGB")
        return colours, rgba.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK"):
        return image, None
    return image.convert("L" if image.mode in _GREY else "RGB"), None


def _to_array(rgb: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 3). In strips, as Pillow makes two copies on the way; large ones take longer than decoding does."""
    width, height = rgb.size
    rows = max(1, _STRIP // width)
    if rows >= height:
        return np.asarray(rgb)
    array = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        array[top:bottom] = np.asarray(rgb.crop((0, top, width, bottom)))
    return array


def _as_rgb(colours: Image.Image) -> Image.Image:
    return colours if colours.mode == "RGB" else colours.convert("RGB")


def _to_srgb(colours: Image.Image, profile: bytes | None, path: Path) -> Image.Image:
    """RGB in the colours that a viewer shows. A profile that is broken, or made for other channels, does not count."""
    if not profile:
        return _as_rgb(colours)
    try:
        transform = _transform(profile)
    except Exception as error:  # whatever is wrong with a profile, or with the colour library of this Pillow
        LOGGER.debug("%s: its colour profile is left out (%s)", path, error)
        return _as_rgb(colours)
    if transform is None:
        return _as_rgb(colours)
    if transform.input_mode == "RGB" and colours.mode == "L":
        colours = colours.convert("RGB")  # grey means equal parts of the profile's red, green and blue
    if transform.input_mode != colours.mode:
        LOGGER.debug("%s: its colour profile is for %s, not for %s", path, transform.input_mode, colours.mode)
        return _as_rgb(colours)
    return transform.apply(colours)


@lru_cache(maxsize=8)
def _transform(profile: bytes) -> ImageCmsTransform | None:
    """The transform from an ICC profile's colours to sRGB; None: they are the same, to within two of 255.

    The intent is perceptual: what browsers use, and the one that printers' profiles are made with most care for.
    """
    from PIL import ImageCms

    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    modes = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
    mode = modes[source.profile.xcolor_space.strip()]
    target = ImageCms.createProfile("sRGB")
    transform = ImageCms.ImageCmsTransform(
        source, ImageCms.ImageCmsProfile(target), mode, "RGB", ImageCms.Intent.PERCEPTUAL
    )
    if mode == "CMYK":
        return transform
    if mode == "L":
        levels = np.arange(256, dtype=np.uint8)[None]
    else:
        steps = np.linspace(0, 255, 9).round().astype(np.uint8)
        levels = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    before = Image.fromarray(levels)
    change = np.asarray(transform.apply(before)).astype(int) - np.asarray(before.convert("RGB"))
    return transform if np.abs(change).max() > 2 else None


# ---- geometry


def resize(image: NDArray[np.uint8], to: Size, interpolation: str | None = None) -> NDArray[np.uint8]:
    """(H, W, 3) or (H, W) to (to.height, to.width, ...).

    Args:
        interpolation: a name of `config_schema.INTERPOLATIONS`; None: area if no side grows, else lanczos.
    """
    height, width = image.shape[:2]
    if (width, height) == to:
        return image
    if interpolation is None:
        interpolation = "area" if _fits_into(to, image) else "lanczos"
    if interpolation in _PILLOW:
        return np.asarray(Image.fromarray(image).resize(to, _PILLOW[interpolation]))
    cv2 = opencv()
    flags = {
        "nearest": cv2.INTER_NEAREST,
        "bilinear": cv2.INTER_LINEAR,
        "linear": cv2.INTER_LINEAR,
        "bicubic": cv2.INTER_CUBIC,
        "cubic": cv2.INTER_CUBIC,
        "area": cv2.INTER_AREA,
    }
    return cv2.resize(image, to, interpolation=flags[interpolation])


def resize_values(values: NDArray[np.uint8], to: Size) -> NDArray[np.uint8]:
    """As `resize`, for masks and control images, where a number means what it says.

    No value is brighter or darker than those around it were: area, or linear to enlarge.
    """
    return resize(values, to, "area" if _fits_into(to, values) else "linear")


def _fits_into(to: Size, image: NDArray[np.uint8]) -> bool:
    return to.width <= image.shape[1] and to.height <= image.shape[0]


def apply_crop(image: NDArray[np.uint8], crop: Crop, interpolation: str | None = None) -> NDArray[np.uint8]:
    """(H, W, 3) or (H, W) to (crop.to.height, crop.to.width, ...); `interpolation` as in `resize`.

    An image of another size than the one that the crop was computed for is taken as a resized copy of that one.
    """
    return _inside(resize(image, crop.resized, interpolation), crop)


def _inside(image: NDArray[np.uint8], crop: Crop) -> NDArray[np.uint8]:
    return image[crop.top : crop.top + crop.to.height, crop.left : crop.left + crop.to.width]


def apply_crop_to_values(values: NDArray[np.uint8], crop: Crop) -> NDArray[np.uint8]:
    """As `apply_crop`, for masks and control images; see `resize_values`."""
    return _inside(resize_values(values, crop.resized), crop)


def centre_crop(resized: Size, to: Size) -> Crop:
    """The middle. `resized` covers `to`."""
    return Crop(resized, (resized.width - to.width) // 2, (resized.height - to.height) // 2, to)


def random_crop(resized: Size, to: Size, rng: Random) -> Crop:
    """Any place, all equally likely. `resized` covers `to`."""
    left = rng.randint(0, resized.width - to.width)
    top = rng.randint(0, resized.height - to.height)
    return Crop(resized, left, top, to)


def face_box(path: Path) -> FaceBox | None:
    """The face in a file name ``<name>_<cx>_<cy>_<w>_<h>``."""
    fields = path.stem.split("_")
    if len(fields) < 5 or not all(field.isdecimal() for field in fields[-4:]):
        return None
    return FaceBox(*map(int, fields[-4:]))


def face_crop(
    size: Size, face: FaceBox, to: Size, span: tuple[float, float], rng: Random, anywhere: bool = False
) -> Crop:
    """Shrinks the image by a random factor and crops around the face.

    Args:
        size: of the image; covers `to`.
        span: (low, high); the frame's shorter side is between `low` and `high` times the face's longer side.
        anywhere: the face may lie anywhere in the frame, most often near the middle (--random_crop).
    """
    if size == to:
        return Crop(size, 0, 0, to)
    low, high = span
    side, face_side = min(to), max(face.width, face.height, 1)
    covers = max(to.width / size.width, to.height / size.height)
    smallest = min(1.0, max(covers, side / (face_side * high)))
    largest = min(1.0, max(smallest, side / (face_side * low)))
    scale = rng.uniform(smallest, largest)
    resized = Size(math.floor(size.width * scale + 0.5), math.floor(size.height * scale + 0.5))
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
    return Crop(resized, *starts, to)


# ---- values


def vary_colours(image: NDArray[np.uint8], rng: Random) -> NDArray[np.uint8]:
    """One time in three, slightly: the hue by up to 16 degrees, or a gamma of 0.95 to 1.05."""
    if rng.random() >= 1 / 3:
        return image
    if rng.random() < 0.5:
        cv2 = opencv()
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)  # 8-bit hue counts 0..179, two degrees each
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + rng.randint(-8, 8)) % 180
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    levels = np.arange(256) / 255
    table = np.round(255 * levels ** rng.uniform(0.95, 1.05)).astype(np.uint8)
    return table[image]


def to_unit(image: NDArray[np.uint8]) -> Tensor:
    """uint8 (H, W, 3) to float32 (3, H, W) in [0, 1]."""
    import torch

    return torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32, order="C")).div_(255)


def to_pixels(image: NDArray[np.uint8]) -> Tensor:
    """uint8 (H, W, 3) to float32 (3, H, W) in [-1, 1]."""
    import torch

    # In numpy, because it runs in the threads that decode: torch's own threads would fight those of the VAE.
    planes = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)
    planes /= np.float32(127.5)
    planes -= np.float32(1)
    return torch.from_numpy(planes)
