"""Where an image's latents lie on disk, whether they can be used, and how they are written.

A file holds one or more entries. An entry is a set of arrays whose names end alike: in the size of the latents (height
x width, as in ``latents_64x48``), or in nothing, as trainers before the sizes wrote it; that one fits the bucket of its
shape only. Entries that we write carry a note of what they were made from; see `foreign` for the others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from library import version
from library.caching import foreign, store
from library.caching.entry import (
    ALPHA,
    FLIPPED,
    LATENTS,
    MASK,
    CacheRequest,
    Entry,
    Fingerprint,
    Shape,
    StoredArray,
    array_invalid_reason,
    has_shape,
    times,
)
from library.runtime.durable import alone_in, fitting
from library.types import CacheLayout

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NOTE = store.PROVENANCE
_OF_AN_ENTRY = re.compile(
    rf"({'|'.join([LATENTS, FLIPPED, ALPHA, MASK, foreign.SIZE, foreign.CROP, _NOTE])})((?:_\d+x\d+)?)"
)


def stamp_of(file: Path) -> tuple[int, int] | None:
    """(bytes, modification time in ns), None where there is no such file."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class LatentCache:
    """Finds, judges and writes the files of one layout."""

    layout: CacheLayout
    fingerprint: Callable[[CacheRequest], Fingerprint]  # asked only where an entry has a note
    summary: Callable[[Path], Mapping[str, Any]] = store.summary  # or what is remembered of it
    stamp: foreign.Stamp = stamp_of
    check: bool = True  # False: names of arrays are enough, with a shape where they have no size in them

    def file(self, request: CacheRequest) -> Path:
        """The file to which new latents are written."""
        return files_of(request, self.layout)[-1]

    def find(self, request: CacheRequest) -> Entry | str | None:
        """Looks for latents that can be used.

        What is there beyond what is needed does no harm: latents are the same with or without their mirror image and
        loss mask beside them. So datasets that need different ones of these can share an entry that has all.
        Unchecked, only directories of files are read (`Entry.read` refuses the shape of another bucket in any case),
        and the file where ours go is read first: it was made because there was nothing better.

        Returns: the entry; or one line that names a file and says why it cannot be used; or None: there is no file.
        """
        reason = None
        files = files_of(request, self.layout)
        for file in files if self.check else reversed(files):
            if self.stamp(file) is not None:
                found = self._examine(file, request)
                if isinstance(found, Entry):
                    return found
                reason = f"{file}: {found}"
        return reason

    def save(self, request: CacheRequest, arrays: Mapping[str, Any], fingerprint: Fingerprint) -> Entry:
        """Adds latents to the file of an image. Entries of other sizes stay if they can still be of use.

        Mirrored latents and masks that are there already and made from the same stay beside the new latents. With
        `as_prepared`, the first size in a file has none in its names, mirrored latents are in a file of their own too,
        and such a file of earlier latents goes.
        Runs that write to one file at the same time wait for each other, so that no entry is lost.

        Raises: OSError: disk full, no permission; an existing file is as it was. ValueError: not the shapes of
            `request`.
        """
        file, shapes = self.file(request), request.shapes(self.layout)
        given: dict[str, NDArray[Any]] = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
        for name, expected in shapes.items():
            if name not in given or given[name].shape != expected:
                raise ValueError(f"{request.image}: {name} must have the shape {expected}")
        with alone_in(file.parent):
            suffix = self._add(file, request, given, fingerprint)
        return Entry({name: StoredArray(file, name + suffix, shape) for name, shape in shapes.items()})

    def _add(self, file: Path, request: CacheRequest, given: dict[str, NDArray[Any]], fingerprint: Fingerprint) -> str:
        """Writes an entry beside those of a file that stay. Returns: how the names of its arrays end."""
        shape, note = request.shapes(self.layout)[LATENTS], _note(request, fingerprint)
        try:
            contents, old = store.summary(file), store.read(file)
        except (store.CacheDamaged, FileNotFoundError):
            contents, old = {"arrays": {}, "values": {}, "not_finite": [], "provenance": {}}, {}
        notes, sized = contents["provenance"], _size_suffix(shape)
        serves_another = self._serves_another_size(file, contents, request, fingerprint)
        suffix = "" if self.layout.as_prepared and not self.layout.keys_by_size and not serves_another else sized
        for earlier in ("", sized):
            before = notes.get(earlier)
            same = before and not _note_invalid_reason(before, replace(request, mask=None), fingerprint)
            if same and has_shape(contents, LATENTS + earlier, shape):
                given = {name: old[name + earlier] for name in (FLIPPED, ALPHA, MASK) if name + earlier in old} | given
                note["mask"] = before["mask"] if request.mask is None else note["mask"]
        origin = {foreign.SIZE: np.array(request.size, np.int64), foreign.CROP: np.array(request.crop_ltrb)}
        useless = {sized} | {other for other in notes if not _same_origin(notes[other], fingerprint)}
        if not self.layout.keys_by_size and not serves_another:
            useless.add("")
        ours = {name: _OF_AN_ENTRY.fullmatch(name) for name in old}
        kept = {name: old[name] for name, match in ours.items() if match is None or match[2] not in useless}
        new = given | origin | {_NOTE: store.pack_note(note)}
        store.write(file, kept | {name + suffix: array for name, array in new.items()})
        if self.layout.as_prepared and file == _oldest_file(request.image):
            flip_file = _flip_file(request.image)
            if request.flip:
                store.write(flip_file, {LATENTS: given[FLIPPED], **origin})
            elif os.path.lexists(flip_file):  # to ask so is no error where the name would be too long
                flip_file.unlink(missing_ok=True)  # another run on the same folder may have done it meanwhile
        return suffix

    def _examine(self, file: Path, request: CacheRequest) -> Entry | str:
        """The entry of a file that is there, or why it cannot be used."""
        contents = self._contents(file)
        if "damaged" in contents:
            return contents["damaged"]
        sized = _size_suffix(request.shapes(self.layout)[LATENTS])
        found = self._entry(file, contents, sized, request)
        if isinstance(found, Entry) or self.layout.keys_by_size:
            return found
        plain = self._entry(file, contents, "", request)
        is_there = LATENTS in contents["arrays"] or foreign.OLDEST in contents["arrays"]
        if isinstance(plain, Entry) or (is_there and LATENTS + sized not in contents["arrays"]):
            return plain
        return found

    def _entry(self, file: Path, contents: Mapping[str, Any], suffix: str, request: CacheRequest) -> Entry | str:
        """The arrays whose names end in `suffix`, or why they cannot be used."""
        names, arrays = contents["arrays"], {}
        for name, shape in request.shapes(self.layout).items():
            if name + suffix in names:
                arrays[name] = StoredArray(file, name + suffix, shape)
            elif name == LATENTS and not suffix and foreign.OLDEST in names:
                arrays[name] = StoredArray(file, foreign.OLDEST, shape)
            elif name == FLIPPED and file == _oldest_file(request.image) and self.stamp(_flip_file(request.image)):
                flipped = self._in_flip_file(_flip_file(request.image), request, shape)
                if isinstance(flipped, str):
                    return f"{flipped} ({_flip_file(request.image).name})"
                arrays[name] = flipped
            else:
                return f"it has no {name}{suffix}"
        if self.check:
            reason = self._invalid_reason(file, contents, suffix, arrays, request)
        else:  # a name without a size may be of any bucket
            reason = None if suffix else _shape_reason(arrays[LATENTS])
        return reason or Entry(arrays)

    def _in_flip_file(self, file: Path, request: CacheRequest, shape: Shape) -> StoredArray | str:
        contents = self._contents(file)
        if "damaged" in contents:
            return contents["damaged"]
        name = next((name for name in (LATENTS, foreign.OLDEST) if name in contents["arrays"]), None)
        if name is None:
            return f"it has no {LATENTS}"
        reason = None
        if self.check:
            reason = array_invalid_reason(contents, name, shape) or foreign.age_reason(file, request, self.stamp)
        return reason or StoredArray(file, name, shape)

    def _invalid_reason(
        self,
        file: Path,
        contents: Mapping[str, Any],
        suffix: str,
        arrays: Mapping[str, StoredArray],
        request: CacheRequest,
    ) -> str | None:
        """Why an entry that has all arrays cannot be used."""
        for one in arrays.values():
            if one.file == file and (reason := array_invalid_reason(contents, one.name, one.shape)):
                return reason
        note = contents["provenance"].get(suffix)
        if note is not None:
            return _note_invalid_reason(note, request, self.fingerprint(request))
        return foreign.latents_reason(file, contents, suffix, request, self.stamp)

    def _contents(self, file: Path) -> Mapping[str, Any]:
        """See `store.summary`; unchecked, names of arrays without shapes and dtypes."""
        if self.check:
            return self.summary(file)
        try:
            return {"arrays": dict.fromkeys(store.names(file))}
        except store.CacheDamaged as error:
            return {"damaged": str(error)}
        except OSError as error:
            return {"damaged": error.strerror or type(error).__name__}

    def _serves_another_size(
        self, file: Path, contents: Mapping[str, Any], request: CacheRequest, fingerprint: Fingerprint
    ) -> bool:
        """Whether the arrays without a size in their names are of use, for another bucket than the requested one."""
        shape = tuple(contents["arrays"].get(LATENTS, [()])[0])
        if len(shape) != 3 or shape[0] != self.layout.channels or shape == request.shapes(self.layout)[LATENTS]:
            return False
        if array_invalid_reason(contents, LATENTS, shape):
            return False
        note = contents["provenance"].get("")
        if note is not None:
            return _same_origin(note, fingerprint)
        return foreign.origin_reason(file, contents, "", request, stamp_of) is None


def files_of(request: CacheRequest, layout: CacheLayout) -> list[Path]:
    """The files that may hold latents, in the order of earlier trainers; with `as_prepared` in reverse order.

    The last one is where ours go. Where two images differ in the extension only, it stays in the name: earlier
    trainers mix such images up. A name that is too long is shortened.
    """
    folder = request.image.parent
    stem = (request.image.name if request.shared_stem else request.image.stem) + request.variant
    named = folder / fitting(stem, f"_{request.size.width:04d}x{request.size.height:04d}{layout.suffix}")
    if layout.keys_by_size or request.shared_stem or request.variant:
        return [named]
    oldest = _oldest_file(request.image)
    return [named, oldest] if layout.as_prepared else [oldest, named]


def _oldest_file(image: Path) -> Path:
    return image.with_name(fitting(image.stem, ".npz"))


def _flip_file(image: Path) -> Path:
    return image.with_name(fitting(image.stem, "_flip.npz"))


def _size_suffix(shape: Shape) -> str:
    return f"_{shape[1]}x{shape[2]}"


def _shape_reason(one: StoredArray) -> str | None:
    """Why an array is not of the shape that is wanted, from its header in the file alone."""
    try:
        shape = store.shape(one.file, one.name)
    except store.CacheDamaged as error:
        return str(error)
    except OSError as error:
        return error.strerror or type(error).__name__
    return None if shape == one.shape else f"{one.name} has the shape {times(shape)}, not {times(one.shape)}"


# ---- notes


def _note(request: CacheRequest, fingerprint: Fingerprint) -> dict[str, Any]:
    return {
        "picture": fingerprint.image,
        "vae": fingerprint.vae,
        "alpha": request.alpha,  # decides over the colours of what is transparent, and is part of the mask
        "mask": fingerprint.mask,
        "resized": None if request.resized is None else list(request.resized),
        "interpolation": request.interpolation,
        "made_by": f"{version.NAME} {version.VERSION}",
    }


def _note_invalid_reason(note: Mapping[str, Any], request: CacheRequest, fingerprint: Fingerprint) -> str | None:
    """Why an entry with this note was not made from what is there now."""
    now = _note(request, fingerprint)
    if not now.keys() <= note.keys():
        return "its note lacks something"
    if fingerprint.image is not None and note["picture"] != now["picture"]:
        return "the image has changed since"
    if fingerprint.vae is not None and note["vae"] != now["vae"]:
        return "made by another VAE"
    if request.present and note["resized"] != now["resized"]:  # without the image, only the note knows
        return f"the image was resized to {times(note['resized'])}, not to {times(now['resized'])}"
    if note["interpolation"] != now["interpolation"]:
        return f"resized with interpolation {note['interpolation']}, not {now['interpolation']}"
    if note["alpha"] != now["alpha"]:
        return f"made {'with' if note['alpha'] else 'without'} alpha_mask"
    if request.mask is not None and note["mask"] != now["mask"]:
        return "made with another mask"
    return None


def _same_origin(note: Mapping[str, Any], fingerprint: Fingerprint) -> bool:
    return fingerprint.vae in (None, note.get("vae")) and fingerprint.image in (None, note.get("picture"))
