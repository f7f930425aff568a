"""Images in folders, and the DreamBooth naming of sub-folders."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from library.runtime.logs import LOGGER

_OTHER_KINDS = frozenset([".avif", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".psd", ".tga", ".tif", ".tiff"])


class RepeatFolder(NamedTuple):
    """A sub-folder called ``<repeats>_<class tokens>``."""

    path: Path
    repeats: int
    class_tokens: str


@cache
def image_extensions() -> frozenset[str]:
    """File extensions read as images, in lower case; AVIF and JPEG XL where Pillow can read them here."""
    from PIL import Image

    register_jpeg_xl()
    available = Image.registered_extensions()
    optional = (extension for extension in (".avif", ".jxl") if extension in available)
    return frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", *optional])


@cache
def _endings() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The extensions of images that are read, and of those that are not."""
    return tuple(image_extensions()), tuple(_OTHER_KINDS - image_extensions())


@cache
def register_jpeg_xl() -> bool:
    """Makes Pillow read JPEG XL, and says whether it does: where the package pillow-jxl-plugin is installed."""
    try:
        import_module("pillow_jxl")  # registers itself
    except Exception as error:  # not installed, or not for this version of Pillow
        LOGGER.debug("no JPEG XL: %s", error)
        return False
    return True


def is_other_image(name: str) -> bool:
    """Whether a file name has the extension of an image of a kind that is not read here."""
    return name.lower().endswith(_endings()[1]) and not name.startswith("._")


def is_image(name: str) -> bool:
    """Whether a file name has an image's extension, in any case (`.Png` too)."""
    if not name.lower().endswith(_endings()[0]):
        return False
    return not name.startswith(".") or (os.path.splitext(name)[1] != "" and not name.startswith("._"))


def has_images(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(is_image(entry.name) for entry in entries)


def repeat_folders(parent: Path) -> tuple[list[RepeatFolder], list[Path]]:
    """Sub-folders that say how often they repeat, sorted by name; and what lies beside them and is not used."""
    found, ignored = [], []
    for path in sorted(parent.iterdir()):
        if path.name.startswith("."):
            continue
        number, _, class_tokens = path.name.partition("_")
        if path.is_dir() and number.strip().isdecimal() and int(number) > 0:
            found.append(RepeatFolder(path, int(number), class_tokens.strip()))
        elif path.is_dir() or is_image(path.name):
            ignored.append(path)
    return found, ignored
