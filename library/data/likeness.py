"""Which pictures of a data set are the same, or look the same. The searching itself is in `duplicates`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from library.data import duplicates, images
from library.data.index import FileIndex
from library.types import Size

MOST = 2000  # pictures that are decoded at start, only to see which look alike


def copies(sizes: Mapping[Path, Size], index: FileIndex) -> dict[Path, Path]:
    """Files with the same bytes: each -> the first of them, in the order of `sizes`; files without a copy are left out.

    Only files of equal length and picture size are read.
    """
    suspects: dict[tuple[int, Size], list[Path]] = defaultdict(list)
    for path, size in sizes.items():
        stamp = index.stamp(path)
        if stamp is not None:
            suspects[stamp[0], size].append(path)
    read = [path for group in suspects.values() if len(group) > 1 for path in group]
    groups = duplicates.exact(index.learn("digest", read, images.content_digest))
    return {read[member]: read[group[0]] for group in groups for member in group}


def alike(paths: Sequence[Path], same: Mapping[Path, Path], index: FileIndex) -> list[list[Path]] | None:
    """Groups of pictures that are not the same and look it: saved again, resized. None: too many to look at.

    Args:
        same: as `copies` gives them; of equal files only the first is compared.
    """
    different = list(dict.fromkeys(same.get(path, path) for path in paths))
    if len(different) > MOST:
        return None
    looks = index.learn("look", different, duplicates.look)
    return [[different[member] for member in group] for group in duplicates.near(looks)]
