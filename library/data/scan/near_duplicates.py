"""Finds the exact and near duplicates among the images of a data set, with the searches of `duplicates`."""

from __future__ import annotations

import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.data.sample import images
from library.data.scan import duplicates
from library.data.scan.index import FileIndex
from library.runtime.files import open_regular
from library.types import Size

_END = 1 << 12  # bytes
_SMALL = 1 << 16  # bytes; to read so much takes no longer than to read its end
MOST = 2000  # images that are decoded at start, to see which are damaged and which look alike


def copies(sizes: Mapping[Path, Size], index: FileIndex) -> dict[Path, Path]:
    """Files with the same bytes: each -> the first of them, in the order of `sizes`; files without a copy are left out.

    Only files of equal length and image size are read; of larger ones first the ends, as among a million images
    many happen to have the length of another.
    """
    suspects: dict[tuple[int, Size], list[Path]] = defaultdict(list)
    for path, size in sizes.items():
        stamp = index.stamp(path)
        if stamp is not None:
            suspects[stamp[0], size].append(path)
    read: list[Path] = []
    large: list[Path] = []
    for (length, _), group in suspects.items():
        if len(group) > 1:
            (large if length > _SMALL else read).extend(group)
    ends = index.learn("end", large, _end_checksum)
    counts = Counter(ends)
    read += [path for path, end in zip(large, ends, strict=True) if counts[end] > 1]
    groups = duplicates.exact(index.learn("digest", read, images.content_digest))
    return {read[member]: read[group[0]] for group in groups for member in group}


def _end_checksum(path: Path) -> int:
    """The checksum of the last bytes. Images of one program begin alike, and nearly always end in compressed pixels."""
    with open_regular(path) as file:
        file.seek(-_END, os.SEEK_END)
        return zlib.crc32(file.read())


@dataclass(frozen=True)
class DecodedImages:
    """The result of decoding every image."""

    damaged: dict[Path, str]  # with the reason; their headers are intact
    alike: list[list[Path]]  # groups of near duplicates: saved again, resized


def decode_all(paths: Sequence[Path], same: Mapping[Path, Path], index: FileIndex) -> DecodedImages | None:
    """Decodes every image that the index does not know. None: there are too many.

    Args:
        same: as `copies` gives them; of equal files only the first is decoded.
    """
    different = list(dict.fromkeys(same.get(path, path) for path in paths))
    if len(different) > MOST:
        return None
    seen = index.learn("look", different, _look_or_reason)
    faults = {path: reason for path, (*_, reason) in zip(different, seen, strict=True) if reason}
    damaged = {path: faults[same.get(path, path)] for path in paths if same.get(path, path) in faults}
    groups = duplicates.near_duplicates([duplicates.Look(*look) for *look, _ in seen])
    return DecodedImages(damaged, [[different[member] for member in group] for group in groups])


def _look_or_reason(path: Path) -> tuple[int | None, Sequence[int], str]:
    try:
        return *duplicates.look_at(path), ""
    except (OSError, ValueError) as error:
        return None, (), images.reason(error)
