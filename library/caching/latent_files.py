"""Where an image's latents lie on disk, whether they can be used, and how they are read and written.

A file holds one or more entries. An entry is a set of arrays whose names end alike: in nothing, or in the size of the
latents (height x width, as in ``latents_64x48``). Files of earlier trainers are read, and ours are for them to read.
Entries that we write carry a note of what they were made from. Entries without one are judged by what they tell.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from library import version
from library.caching import store
from library.errors import UserError
from library.runtime.durable import fitting
from library.types import CacheLayout, Size

if TYPE_CHECKING:
    from numpy.typing import NDArray

LATENT_SCALE = 8  # pixels per position of the latents, the same for every family's VAE

_LATENTS, _FLIPPED, _ALPHA, _MASK = "latents", "latents_flipped", "alpha_mask", "loss_mask"
_SIZE, _CROP, _NOTE = "original_size", "crop_ltrb", store.PROVENANCE
_OLDEST = "arr_0"  # what the first trainers called the latents; mirrored ones had a file of their own
_FLOATS = ("float16", "float32", "float64")
_CROP_TOLERANCE = 1.0  # pixels; trainers have rounded differently
_OF_AN_ENTRY = re.compile(rf"({_LATENTS}|{_FLIPPED}|{_ALPHA}|{_MASK}|{_SIZE}|{_CROP}|{_NOTE})((?:_\d+x\d+)?)")


@dataclass(frozen=True)
class Wanted:
    """What one record needs. Records that need the same are equal."""

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
    variant: str = ""  # part of the file name where one run needs an image in several looks of one size


@dataclass(frozen=True)
class Identity:
    """What latents are made from. Digests are of contents."""

    image: str | None  # None: the image is not there
    vae: str | None  # fingerprint of the weights; None: any will do
    mask: str | None


@dataclass(frozen=True)
class Entry:
    """Where latents lie. Small and picklable."""

    file: Path
    suffix: str  # array names end in it
    shape: tuple[int, int, int]  # (C, h, w) of the latents
    oldest: bool = False  # named as the first trainers did
    flip_file: Path | None = None  # where the mirrored latents lie, if not in `file`


@dataclass(frozen=True)
class Latents:
    """Latents of one image as caches hold them; all float32. None: not there, or not asked for."""

    plain: NDArray[np.float32] | None  # (C, h, w)
    flipped: NDArray[np.float32] | None = None  # (C, h, w), of the mirrored image
    alpha: NDArray[np.float32] | None = None  # (bucket height, bucket width), 0 to 1, not mirrored
    mask: NDArray[np.float32] | None = None  # (h, w), 0 to 1, not mirrored


def files_of(wanted: Wanted, layout: CacheLayout) -> list[Path]:
    """Where latents may lie, in the order in which earlier trainers look, or with `as_prepared` in the reverse order.

    The last one is where ours go. Where two images differ in the extension only, it stays in the name: earlier
    trainers mix such images up. A name that is too long is shortened.
    """
    folder = wanted.image.parent
    stem = (wanted.image.name if wanted.shared_stem else wanted.image.stem) + wanted.variant
    named = folder / fitting(stem, f"_{wanted.size.width:04d}x{wanted.size.height:04d}{layout.suffix}")
    if layout.keys_by_size or wanted.shared_stem or wanted.variant:
        return [named]
    oldest = _oldest_file(wanted.image)
    return [named, oldest] if layout.as_prepared else [oldest, named]


def find(
    wanted: Wanted,
    layout: CacheLayout,
    identity: Callable[[], Identity],
    summaries: Callable[[Path], Mapping[str, Any]],
    stamps: Callable[[Path], tuple[int, int] | None],
    *,
    check: bool = True,
) -> Entry | str | None:
    """Looks for latents that can be used.

    What is there beyond what is needed does no harm: latents are the same with or without their mirror image and loss
    mask beside them. So datasets that need different ones of these can share an entry that has all.

    Args:
        identity: asked only where an entry has a note.
        summaries: `store.summary`, or what is remembered of it.
        stamps: (bytes, modification time in ns) of a file, None where there is none.
        check: False: arrays of the right names are enough. Only directories of files are read; numbers, notes, shapes
            and ages are not looked at. (`load` refuses the shape of another bucket in any case.) The file where ours go
            is then looked at first: it was made because there was nothing better.

    Returns: the entry; or one line that names a file and says why it cannot be used; or None: there is no file.
    """
    reason = None
    files = files_of(wanted, layout)
    for file in files if check else reversed(files):
        if stamps(file) is None:
            continue
        contents = summaries(file) if check else _names_only(file)
        if "damaged" in contents:
            reason = f"{file}: {contents['damaged']}"
            continue
        found = _locate(file, contents, wanted, layout, stamps)
        problem = found if isinstance(found, str) else None
        if check and isinstance(found, Entry):
            problem = _problem(found, contents, wanted, layout, identity, summaries, stamps)
        if problem is None:
            return found
        reason = f"{file}: {problem}"
    return reason


def load(entry: Entry, *, plain: bool = True, flip: bool = False, alpha: bool = False, mask: bool = False) -> Latents:
    """Reads what is asked for, and no more. Numbers of other widths become float32.

    Raises: UserError: a file is gone, damaged, or not what `find` saw; the message names it.
    """
    _, height, width = entry.shape
    apart = entry.flip_file if flip else None
    shapes: dict[str, tuple[int, ...]] = {}
    if plain:
        shapes[_LATENTS] = entry.shape
    if flip and apart is None:
        shapes[_FLIPPED] = entry.shape
    if alpha:
        shapes[_ALPHA] = (height * LATENT_SCALE, width * LATENT_SCALE)
    if mask:
        shapes[_MASK] = (height, width)
    arrays = _read(entry.file, {name: _array_name(entry, name) for name in shapes}, shapes) if shapes else {}
    if apart is not None:
        arrays[_FLIPPED] = _read_flip_file(apart, entry.shape)
    return Latents(*(arrays.get(name) for name in (_LATENTS, _FLIPPED, _ALPHA, _MASK)))


def save(wanted: Wanted, layout: CacheLayout, latents: Latents, identity: Identity) -> Entry:
    """Adds latents to the file of an image. Entries of other sizes stay if they can still be of use.

    Where array names need no size, the first size in a file has none, as that is what earlier trainers read. Mirrored
    latents and masks that are there already and made from the same stay beside the new latents. With `as_prepared`,
    mirrored latents are in a file of their own too, and such a file of earlier latents goes.
    Only one process at a time may write the latents of an image.

    Raises: OSError: disk full, no permission; an existing file is as it was. ValueError: not what `wanted` says.
    """
    file, shape = files_of(wanted, layout)[-1], _shape(wanted, layout)
    given = {_LATENTS: latents.plain, _FLIPPED: latents.flipped, _ALPHA: latents.alpha, _MASK: latents.mask}
    arrays: dict[str, NDArray[Any]] = {n: np.asarray(a, np.float32) for n, a in given.items() if a is not None}
    for name, expected in _shapes(wanted, layout).items():
        if name not in arrays or arrays[name].shape != expected:
            raise ValueError(f"{wanted.image}: {name} must have the shape {expected}")
    note = _note(wanted, identity)
    contents, old = _existing(file)
    notes = contents["provenance"]
    by_size = layout.keys_by_size or _serves_another_size(file, contents, wanted, layout, identity)
    suffix = _by_size(shape) if by_size else ""
    before = notes.get(suffix)
    same = before and not _note_problem(before, replace(wanted, mask=None), identity)
    if same and _has_shape(contents, _LATENTS + suffix, shape):
        arrays = {name: old[name + suffix] for name in (_FLIPPED, _ALPHA, _MASK) if name + suffix in old} | arrays
        note["mask"] = before["mask"] if wanted.mask is None else note["mask"]
    arrays |= {_SIZE: np.array(wanted.size, np.int64), _CROP: np.array(wanted.crop_ltrb), _NOTE: store.pack_note(note)}
    useless = {suffix, _by_size(shape)} | {other for other in notes if not _same_origin(notes[other], identity)}
    kept = {name: array for name, array in old.items() if _suffix_of(name) not in useless}
    store.write(file, kept | {name + suffix: array for name, array in arrays.items()})
    if layout.as_prepared and file == _oldest_file(wanted.image):
        _save_flip_file(wanted, arrays)
    return Entry(file, suffix, shape)


def _save_flip_file(wanted: Wanted, arrays: Mapping[str, NDArray[Any]]) -> None:
    file = _flip_file(wanted.image)
    if wanted.flip:
        store.write(file, {_LATENTS: arrays[_FLIPPED], _SIZE: arrays[_SIZE], _CROP: arrays[_CROP]})
    elif os.path.lexists(file):  # there is none where its name would be too long, and to ask so is no error
        file.unlink(missing_ok=True)  # another run on the same folder may have done it meanwhile


def _oldest_file(image: Path) -> Path:
    return image.with_name(fitting(image.stem, ".npz"))


def _flip_file(image: Path) -> Path:
    return image.with_name(fitting(image.stem, "_flip.npz"))


def _shape(wanted: Wanted, layout: CacheLayout) -> tuple[int, int, int]:
    return layout.channels, wanted.bucket.height // LATENT_SCALE, wanted.bucket.width // LATENT_SCALE


def _shapes(wanted: Wanted, layout: CacheLayout) -> dict[str, tuple[int, ...]]:
    """Of every array that is needed, by its name without suffix."""
    shape = _shape(wanted, layout)
    needed: dict[str, tuple[int, ...]] = {_LATENTS: shape}
    if wanted.flip:
        needed[_FLIPPED] = shape
    if wanted.alpha:
        needed[_ALPHA] = (wanted.bucket.height, wanted.bucket.width)
    if wanted.mask is not None:
        needed[_MASK] = shape[1:]
    return needed


def _by_size(shape: tuple[int, int, int]) -> str:
    return f"_{shape[1]}x{shape[2]}"


def _suffix_of(name: str) -> str | None:
    """The suffix of the entry that an array belongs to; None: it belongs to none."""
    match = _OF_AN_ENTRY.fullmatch(name)
    return match[2] if match else None


def _array_name(entry: Entry, name: str) -> str:
    return _OLDEST if entry.oldest and name == _LATENTS else name + entry.suffix


def _names_only(file: Path) -> dict[str, Any]:
    """Like `store.summary`, but for shapes and types."""
    try:
        return {"arrays": dict.fromkeys(store.names(file))}
    except store.CacheDamaged as error:
        return {"damaged": str(error)}
    except OSError as error:
        return {"damaged": error.strerror or type(error).__name__}


def _locate(
    file: Path,
    contents: Mapping[str, Any],
    wanted: Wanted,
    layout: CacheLayout,
    stamps: Callable[[Path], tuple[int, int] | None],
) -> Entry | str:
    """Where in `file` the latents must be, by names; or what is missing."""
    shape = _shape(wanted, layout)
    by_size = _by_size(shape)
    arrays = contents["arrays"]
    only_by_size = _LATENTS + by_size in arrays and not _has_shape(contents, _LATENTS, shape)
    suffix = by_size if layout.keys_by_size or only_by_size else ""
    oldest = not suffix and _LATENTS not in arrays and _OLDEST in arrays
    flip_file = None
    for name in _shapes(wanted, layout):
        if name + suffix in arrays or (name == _LATENTS and oldest):
            continue
        beside = _flip_file(wanted.image)
        if name != _FLIPPED or file != _oldest_file(wanted.image) or stamps(beside) is None:
            return f"it has no {name}{suffix}"
        flip_file = beside
    return Entry(file, suffix, shape, oldest, flip_file)


def _problem(
    entry: Entry,
    contents: Mapping[str, Any],
    wanted: Wanted,
    layout: CacheLayout,
    identity: Callable[[], Identity],
    summaries: Callable[[Path], Mapping[str, Any]],
    stamps: Callable[[Path], tuple[int, int] | None],
) -> str | None:
    """Why an entry that has all arrays cannot be used."""
    shapes = _shapes(wanted, layout)
    if entry.flip_file is not None:
        problem = _flip_file_problem(summaries(entry.flip_file), shapes.pop(_FLIPPED))
        if problem or (problem := _age_problem(entry.flip_file, wanted, stamps)):
            return f"{problem} ({entry.flip_file.name})"
    for name, shape in shapes.items():
        if problem := _array_problem(contents, _array_name(entry, name), shape):
            return problem
    note = contents["provenance"].get(entry.suffix)
    if note is not None:
        return _note_problem(note, wanted, identity())
    return _origin_problem(entry.file, contents, entry.suffix, wanted, stamps) or _crop_problem(contents, entry, wanted)


def _has_shape(contents: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> bool:
    found = contents["arrays"].get(name)
    return found is not None and tuple(found[0]) == shape


def _array_problem(contents: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> str | None:
    if not _has_shape(contents, name, shape):
        return f"{name} has the shape {_times(contents['arrays'][name][0])}, not {_times(shape)}"
    dtype = contents["arrays"][name][1]
    if dtype not in _FLOATS:
        return f"{name} is of type {dtype}"
    return f"{name} holds NaN or infinite numbers" if name in contents["not_finite"] else None


def _flip_file_problem(contents: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    if "damaged" in contents:
        return contents["damaged"]
    name = _LATENTS if _LATENTS in contents["arrays"] else _OLDEST
    return _array_problem(contents, name, shape) if name in contents["arrays"] else f"it has no {_LATENTS}"


def _note(wanted: Wanted, identity: Identity) -> dict[str, Any]:
    return {
        "picture": identity.image,
        "vae": identity.vae,
        "alpha": wanted.alpha,  # decides over the colours of what is transparent, and is part of the mask
        "mask": identity.mask,
        "resized": None if wanted.resized is None else list(wanted.resized),
        "interpolation": wanted.interpolation,
        "made_by": f"{version.NAME} {version.VERSION}",
    }


def _note_problem(note: Mapping[str, Any], wanted: Wanted, identity: Identity) -> str | None:
    now = _note(wanted, identity)
    if not now.keys() <= note.keys():
        return "its note lacks something"
    if identity.image is not None and note["picture"] != now["picture"]:
        return "the image has changed since"
    if identity.vae is not None and note["vae"] != now["vae"]:
        return "made by another VAE"
    if wanted.present and note["resized"] != now["resized"]:  # without the image, only the note knows
        return f"the image was resized to {_times(note['resized'])}, not to {_times(now['resized'])}"
    if note["interpolation"] != now["interpolation"]:
        return f"resized with interpolation {note['interpolation']}, not {now['interpolation']}"
    if note["alpha"] != now["alpha"]:
        return f"made {'with' if note['alpha'] else 'without'} alpha_mask"
    if wanted.mask is not None and note["mask"] != now["mask"]:
        return "made with another mask"
    return None


def _same_origin(note: Mapping[str, Any], identity: Identity) -> bool:
    return identity.vae in (None, note.get("vae")) and identity.image in (None, note.get("picture"))


def _origin_problem(
    file: Path,
    contents: Mapping[str, Any],
    suffix: str,
    wanted: Wanted,
    stamps: Callable[[Path], tuple[int, int] | None],
) -> str | None:
    """Why an entry without a note may not be this image's."""
    if wanted.shared_stem:
        return "it does not say which of the images of this name it was made from"
    size = _values(contents, _SIZE + suffix, wanted.size)
    if size != list(wanted.size):
        turned = size == list(wanted.size[::-1])
        return "made from the image before it was turned" if turned else f"made from an image of {_times(size)}"
    return _age_problem(file, wanted, stamps)


def _age_problem(file: Path, wanted: Wanted, stamps: Callable[[Path], tuple[int, int] | None]) -> str | None:
    made, taken = stamps(file), stamps(wanted.image) if wanted.present else None
    return "older than the image" if made and taken and made[1] < taken[1] else None


def _crop_problem(contents: Mapping[str, Any], entry: Entry, wanted: Wanted) -> str | None:
    crop = _values(contents, _CROP + entry.suffix, wanted.crop_ltrb)
    near = [abs(a - b) <= _CROP_TOLERANCE for a, b in zip(crop, wanted.crop_ltrb, strict=False)]
    return None if len(near) == 4 and all(near) else "made with another crop"


def _values(contents: Mapping[str, Any], name: str, default: Sequence[float]) -> list[float]:
    """The numbers of a small array, `default` where there is none; empty where it is not of the length of `default`."""
    shape = contents["arrays"].get(name, [[len(default)]])[0]
    return contents["values"].get(name, list(default)) if shape == [len(default)] else []


def _times(sides: Sequence[float] | None) -> str:
    return "x".join(map(str, sides)) if sides else "nothing"


def _existing(file: Path) -> tuple[Mapping[str, Any], dict[str, NDArray[Any]]]:
    """The summary and the arrays of a file; none where it is missing or damaged."""
    try:
        return store.summary(file), store.read(file)
    except (store.CacheDamaged, FileNotFoundError):
        return {"arrays": {}, "values": {}, "not_finite": [], "provenance": {}}, {}


def _serves_another_size(
    file: Path, contents: Mapping[str, Any], wanted: Wanted, layout: CacheLayout, identity: Identity
) -> bool:
    """Whether the arrays without a size in their names are of use, for another bucket than the wanted one."""
    shape = tuple(contents["arrays"].get(_LATENTS, [()])[0])
    if len(shape) != 3 or shape[0] != layout.channels or shape == _shape(wanted, layout):
        return False
    if _array_problem(contents, _LATENTS, shape):
        return False
    note = contents["provenance"].get("")
    if note is not None:
        return _same_origin(note, identity)
    return _origin_problem(file, contents, "", wanted, _stamp) is None


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def _read(
    file: Path, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, NDArray[np.float32]]:
    """Arrays under our names. `names`: what the file calls them. Raises: UserError."""
    arrays = _read_or_name_it(file, names.values(), {theirs: shapes[name] for name, theirs in names.items()})
    return {name: _float32(file, theirs, arrays[theirs], shapes[name]) for name, theirs in names.items()}


def _read_flip_file(file: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    arrays = _read_or_name_it(file, None, {_LATENTS: shape, _OLDEST: shape})
    name = _LATENTS if _LATENTS in arrays else _OLDEST
    if name not in arrays:
        raise _unusable(file, f"it has no {_LATENTS}")
    return _float32(file, name, arrays[name], shape)


def _read_or_name_it(
    file: Path, names: Iterable[str] | None, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, NDArray[Any]]:
    try:
        return store.read(file, names, shapes)
    except store.CacheDamaged as error:
        raise _unusable(file, str(error)) from None
    except OSError as error:
        raise _unusable(file, error.strerror or type(error).__name__) from None


def _float32(file: Path, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float32]:
    if array.shape != shape:
        raise _unusable(file, f"{name} has the shape {_times(array.shape)}, not {_times(shape)}")
    if str(array.dtype) not in _FLOATS:
        raise _unusable(file, f"{name} is of type {array.dtype}")
    return array.astype(np.float32, copy=False)


def _unusable(file: Path, reason: str) -> UserError:
    why = f"the cached latents cannot be used ({reason})"
    return UserError(f"{file}: {why}; delete the file, or leave out --skip_cache_check, to have them made again")
