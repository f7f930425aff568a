"""Exact duplicates by digests, near duplicates (saved again, resized) by difference hashes and colours, as groups."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from library.data.sample.images import read_image, use_image

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Of 64 bits. Copies saved at JPEG quality 70 or at half the size differ by 4 at most, different photos by 10 and more.
DISTANCE = 4
LARGEST_DISTANCE = 16

# Levels of 255, in any of 3x3 fields. Such copies of photos differ by 1, those of drawings with hard edges by a few.
COLOR_DISTANCE = 12

_COLUMNS, _ROWS = 9, 8
_COLOR_FIELDS = (3, 3)
_STEP = 1.0  # grey levels of 255; what differs by less is flat, or noise of a JPEG
_FEWEST_STEPS = 16  # of the 64 neighbours
_FEWEST_OF_A_KIND = 8  # bits that are set, and bits that are not
_DRAFT = (8 * _COLUMNS, 8 * _ROWS)  # pixels; a JPEG is decoded at the smallest scale that is not below
_SHARED_BANDS = 3
_BITS_SET = np.array([value.bit_count() for value in range(1 << 16)], np.uint8)


def exact(digests: Sequence[str]) -> list[list[int]]:
    """The indices of equal digests; groups of two and more, by their first index."""
    groups: dict[str, list[int]] = {}
    for index, digest in enumerate(digests):
        groups.setdefault(digest, []).append(index)
    return [group for group in groups.values() if len(group) > 1]


class Look(NamedTuple):
    """What of an image its copies share."""

    hash: int | None  # 64 bits: which of 9x8 grey fields are brighter than their left neighbour; None: too little in it
    colors: Sequence[int]  # 27 levels, 0 to 255: the mean red, green and blue of 3x3 fields


def look_at(path: Path) -> Look:
    """The look of an upright image.

    Its hash is None for images with so little in them (flat, a gradient, a dot on a plain ground) that different ones
    would have the same one.

    Raises: OSError or ValueError: the file is no whole image.
    """

    def small(image: Image.Image, *_: Any) -> Image.Image | None:
        if image.format not in ("JPEG", "MPO"):
            return None
        image.draft("RGB", _DRAFT)
        return ImageOps.exif_transpose(image).convert("RGB")

    try:
        image = use_image(path, small) or Image.fromarray(read_image(path))
        colors = np.asarray(image.convert("RGB").resize(_COLOR_FIELDS, Image.Resampling.BOX))
        # As floats: means rounded to whole levels would make steps where there are none.
        fields = np.asarray(image.convert("L").convert("F").resize((_COLUMNS, _ROWS), Image.Resampling.BOX))
    except (SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from None  # what Pillow raises for a broken file
    return Look(_difference_hash(fields), colors.ravel().tolist())


def _difference_hash(fields: NDArray[np.float32]) -> int | None:
    steps = np.diff(fields, axis=1).ravel()
    bits = steps > _STEP
    few = np.count_nonzero(np.abs(steps) > _STEP) < _FEWEST_STEPS
    if few or not _FEWEST_OF_A_KIND <= np.count_nonzero(bits) <= bits.size - _FEWEST_OF_A_KIND:
        return None
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_duplicates(looks: Sequence[Look]) -> list[list[int]]:
    """Groups of images that have similar hashes and similar colours; see `similar`.

    A white and a beige house drawn by one hand have the same hash, and are different images.
    """
    return sorted(
        [group[member] for member in members]
        for group in similar([look.hash for look in looks])
        for members in _of_similar_colors(np.array([looks[index].colors for index in group], np.int16))
    )


def _of_similar_colors(colors: NDArray[np.int16]) -> list[list[int]]:
    """Groups of rows that differ by at most `COLOR_DISTANCE` in each number, directly or by way of others."""
    left, groups = set(range(len(colors))), []
    while left:
        group, todo = [], [min(left)]
        left.discard(todo[0])
        while todo:
            one = todo.pop()
            group.append(one)
            near = np.abs(colors - colors[one]).max(axis=1) <= COLOR_DISTANCE
            todo += (found := left.intersection(np.flatnonzero(near).tolist()))
            left -= found
        groups.append(sorted(group))
    return [group for group in groups if len(group) > 1]


def similar(hashes: Sequence[int | None], distance: int = DISTANCE) -> list[list[int]]:
    """Groups of images whose hashes differ by at most `distance` bits, directly or by way of others in the group.

    Not all pairs are compared: where 64 bits are cut into `distance` + 3 bands, two hashes that near have three bands
    in common, so only hashes with three equal bands meet.

    Args:
        hashes: those of `look_at`; images with None are in no group.
        distance: bits, 0 to 16; time grows with its third power.

    Returns: sorted indices, two and more; groups by their first index.
    """
    if not 0 <= distance <= LARGEST_DISTANCE:
        raise ValueError(f"distance must be 0 to {LARGEST_DISTANCE} bits, got {distance}")
    indices = np.array([index for index, value in enumerate(hashes) if value is not None], np.int64)
    distinct, group_of = np.unique(
        np.array([value for value in hashes if value is not None], np.uint64), return_inverse=True
    )
    labels = np.arange(len(distinct))
    if distance > 0 and len(distinct) > 1:
        # Bits that distinguish images are distributed evenly. Neighbouring bits would make poor bands: the upper rows
        # of many images are a plain background.
        ones = np.array([np.count_nonzero(distinct >> np.uint64(bit) & np.uint64(1)) for bit in range(64)])
        order = np.argsort(np.abs(ones - len(distinct) / 2), kind="stable").tolist()
        bands = [
            sum(1 << bit for bit in order[at :: distance + _SHARED_BANDS]) for at in range(distance + _SHARED_BANDS)
        ]
        for chosen in combinations(bands, _SHARED_BANDS):
            labels = _join_equal_under(np.uint64(sum(chosen)), distinct, labels, distance)
    labels = labels[group_of.reshape(-1)]
    by_label = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[by_label])) + 1
    return sorted(group.tolist() for group in np.split(indices[by_label], starts) if len(group) > 1)


def _join_equal_under(
    mask: np.uint64, hashes: NDArray[np.uint64], labels: NDArray[np.int64], distance: int
) -> NDArray[np.int64]:
    """Joins the groups of hashes that agree in all bits of the mask and differ by at most `distance`.

    Args:
        labels: the group of each hash, numbered from 0.
    """
    order = np.argsort(hashes & mask)
    keys, sorted_hashes = (hashes & mask)[order], hashes[order]
    # Each hash with its next neighbour of the same key, then with its second next one, and so on.
    first, offset = np.arange(len(keys) - 1), 1
    while first.size:
        first = first[first + offset < len(keys)]
        first = first[keys[first] == keys[first + offset]]
        differing = sorted_hashes[first] ^ sorted_hashes[first + offset]
        bits = _BITS_SET[differing.view(np.uint16).reshape(-1, 4)].sum(axis=1, dtype=np.int64)
        close = first[bits <= distance]
        one, other = labels[order[close]], labels[order[close + offset]]
        apart = one != other
        if apart.any():  # the groups of the two become one
            from scipy.sparse import coo_array  # slow to import, and seldom needed
            from scipy.sparse.csgraph import connected_components

            size = int(labels.max()) + 1
            graph = coo_array((np.ones(np.count_nonzero(apart)), (one[apart], other[apart])), shape=(size, size))
            labels = connected_components(graph, directed=False)[1].astype(np.int64)[labels]
        offset += 1
    return labels
