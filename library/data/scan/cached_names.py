"""What the names of latent files say where a metadata file's images were prepared and may be gone."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from library.runtime.files import open_regular
from library.types import Size

_LONGEST = 1 << 12  # bytes of an array of two numbers, with its header
_SIZE = re.compile(r"original_size(?:_\d+x\d+)?\.npy")
_NAME = re.compile(r"(.+)_(\d+)x(\d+)_[^_]+\.npz", re.DOTALL)  # <stem>_<width>x<height>_<family>.npz


class Prepared:
    """The latent files of the folders that are asked about; each folder is listed once."""

    def __init__(self, listing: Callable[[Path], Mapping[str, Any]]):
        self._listing = cache(listing)
        self._sizes = cache(self._sizes_of)

    def has_flip_file(self, base: Path) -> bool:
        """Whether a file of mirrored latents lies beside ``base`` (folder / stem): early trainers wrote one."""
        return f"{base.name}_flip.npz" in self._listing(base.parent)

    def size(self, base: Path) -> Size | None:
        """Width and height of an image that is gone, from the name of its latents or from what is in them."""
        named = self._sizes(base.parent).get(base.name)
        if named is not None:
            return named
        try:
            with open_regular(base.with_name(f"{base.name}.npz")) as opened, zipfile.ZipFile(opened) as archive:
                name = next(filter(_SIZE.fullmatch, archive.namelist()))  # all sizes of latents say the same
                if archive.getinfo(name).file_size > _LONGEST:
                    return None
                with archive.open(name) as member:
                    width, height = (int(side) for side in np.lib.format.read_array(member, allow_pickle=False))
        except (OSError, ValueError, StopIteration, TypeError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile):
            return None  # whether the file can be used is found out where it is
        return Size(width, height) if width > 0 and height > 0 else None

    def _sizes_of(self, folder: Path) -> dict[str, Size]:
        matches = (_NAME.fullmatch(name) for name in self._listing(folder))
        return {match[1]: Size(int(match[2]), int(match[3])) for match in matches if match}
