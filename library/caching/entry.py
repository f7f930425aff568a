"""What caches know an image by, and where its arrays lie. Arrays go by name, in memory as in files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from library.caching import store
from library.errors import UserError
from library.types import CacheLayout, Size

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from library.data.types import Record

# Latents (C, h, w), those of the mirrored image (C, h, w), opacity (H, W) and weights of the loss (h, w), both in
# [0, 1] and not mirrored; h, w are the sides of the bucket divided by the layout's stride.
LATENTS, FLIPPED, ALPHA, MASK = "latents", "latents_flipped", "alpha_mask", "loss_mask"

_FLOATS = ("float16", "float32", "float64")

Shape = tuple[int, ...]
Arrays = dict[str, "NDArray[Any]"]


@dataclass(frozen=True)
class CacheRequest:
    """The cache entry that a record needs. Records that need the same entry have equal requests."""

    image: Path  # its path, with an extension even where only latents are left of it
    present: bool  # whether the image is there
    shared_stem: bool  # another image of the run differs in nothing but the extension
    size: Size  # of the image, upright
    bucket: Size  # pixels
    resized: Size | None  # covers the bucket; None: cut out as it is
    crop_ltrb: tuple[float, float, float, float]  # see buckets.crop_ltrb
    interpolation: str | None  # None: by default
    flip: bool  # latents of the mirrored image are needed
    alpha: bool  # the image's transparency is needed
    mask: Path | None  # an image that weighs the loss; needed with the transparency in it, if that is needed too
    variant: str = ""  # part of the file name where one run needs an image in several views of one size

    def shapes(self, layout: CacheLayout, *, in_memory: bool = False) -> dict[str, Shape]:
        """The shapes of the arrays that are needed, by name.

        In memory one mask has the transparency in it. In files transparency has its own array, as it is for other
        trainers.
        """
        sides = self.bucket.height // layout.stride, self.bucket.width // layout.stride
        shapes: dict[str, Shape] = {LATENTS: (layout.channels, *sides)}
        if self.flip:
            shapes[FLIPPED] = shapes[LATENTS]
        if self.alpha and not in_memory:
            shapes[ALPHA] = (self.bucket.height, self.bucket.width)
        if self.mask is not None or (self.alpha and in_memory):
            shapes[MASK] = sides
        return shapes


@dataclass(frozen=True)
class Fingerprint:
    """Digests of the contents that latents are made from."""

    image: str | None  # None: the image is not there
    vae: str | None  # of the weights; None: any will do
    mask: str | None


class StoredArray(NamedTuple):
    """The location of one array: file, name and shape."""

    file: Path
    name: str  # in the file
    shape: Shape


@dataclass(frozen=True)
class Entry:
    """The latents of one image on disk, read whenever they are needed. Small and picklable."""

    arrays: Mapping[str, StoredArray]  # by our names

    def load(self, flip: bool) -> tuple[Tensor, Tensor | None]:
        """See `LatentEntry`."""
        return _side({name: torch.from_numpy(one) for name, one in self.read(*_side_names(self.arrays, flip)).items()})

    def read(self, *names: str) -> dict[str, NDArray[np.float32]]:
        """The arrays of these names, and no more. Numbers of other widths become float32.

        Raises: UserError: a file is gone, damaged, or not what it was when it was found; the message names it.
        """
        wanted = [self.arrays[name] for name in names]
        read: dict[StoredArray, NDArray[Any]] = {}
        for file in dict.fromkeys(one.file for one in wanted):
            here = [one for one in wanted if one.file == file]
            arrays = read_arrays(file, [one.name for one in here], "latents", {one.name: one.shape for one in here})
            read |= {one: arrays[one.name] for one in here}
        for one in wanted:
            array = read[one]
            if array.shape != one.shape:
                problem = f"{one.name} has the shape {times(array.shape)}, not {times(one.shape)}"
                raise unusable(one.file, "latents", problem)
            if str(array.dtype) not in _FLOATS:
                raise unusable(one.file, "latents", f"{one.name} is of type {array.dtype}")
        return {name: read[one].astype(np.float32, copy=False) for name, one in zip(names, wanted, strict=True)}


class CachedLatents(NamedTuple):
    """The latents of one image in memory, float32 on the CPU."""

    arrays: Mapping[str, Tensor]

    def load(self, flip: bool) -> tuple[Tensor, Tensor | None]:
        """See `LatentEntry`."""
        return _side({name: self.arrays[name] for name in _side_names(self.arrays, flip)})


def _side_names(names: Collection[str], flip: bool) -> list[str]:
    """The arrays that make an item: latents of one side, and what weighs the loss (the mask has the opacity in it)."""
    weights = next((name for name in (MASK, ALPHA) if name in names), None)
    return [FLIPPED if flip else LATENTS, *([weights] if weights else ())]


def _side(arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    latents, *masks = arrays.values()
    mask = masks[0][None] if masks else None
    return latents, mask.flip(-1) if FLIPPED in arrays and mask is not None else mask


def array_invalid_reason(contents: Mapping[str, Any], name: str, shape: Shape) -> str | None:
    """Why an array that is in a file cannot be used. `contents`: see `store.summary`."""
    if not has_shape(contents, name, shape):
        return f"{name} has the shape {times(contents['arrays'][name][0])}, not {times(shape)}"
    dtype = contents["arrays"][name][1]
    if dtype not in _FLOATS:
        return f"{name} is of type {dtype}"
    return f"{name} holds NaN or infinite numbers" if name in contents["not_finite"] else None


def has_shape(contents: Mapping[str, Any], name: str, shape: Shape) -> bool:
    found = contents["arrays"].get(name)
    return found is not None and tuple(found[0]) == shape


def times(sides: Sequence[float] | None) -> str:
    return "x".join(map(str, sides)) if sides else "nothing"


def shared_stems(records: Iterable[Record]) -> frozenset[Path]:
    """The images that differ from another one in nothing but the extension, such as a.png and a.jpg."""
    by_stem: dict[Path, set[Path]] = {}
    for record in records:
        by_stem.setdefault(record.path.with_suffix("") if record.present else record.path, set()).add(record.path)
    return frozenset(path for paths in by_stem.values() if len(paths) > 1 for path in paths)


def image_of(record: Record) -> Path:
    """The record's path, with an extension even where only latents are left of the image."""
    return record.path if record.present else record.path.with_name(f"{record.path.name}.png")


def read_arrays(file: Path, names: Sequence[str], what: str, shapes: Mapping[str, Shape] | None = None) -> Arrays:
    """See `store.read`. Raises: UserError: the file is gone or damaged; `what` is in it, e.g. "latents"."""
    try:
        return store.read(file, names, shapes)
    except store.CacheDamaged as error:
        raise unusable(file, what, str(error)) from None
    except OSError as error:
        raise unusable(file, what, error.strerror or type(error).__name__) from None


def unusable(file: Path, what: str, reason: str) -> UserError:
    why = f"the cached {what} cannot be used ({reason})"
    return UserError(f"{file}: {why}; delete the file, or leave out --skip_cache_check, to encode again")
