"""Arrays in .npz files: written whole or not at all, and verified whenever they are read.

Knows nothing of what the arrays mean. The files are what `numpy.savez` writes, and any .npz file can be read.
"""

from __future__ import annotations

import errno
import io
import json
import lzma
import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import BadZipFile, ZipFile, ZipInfo, is_zipfile

import numpy as np

from library.runtime.documents import JsonError, load_json
from library.runtime.durable import replacing
from library.runtime.files import NotRegularError, open_regular, reason

if TYPE_CHECKING:
    from numpy.typing import NDArray

PROVENANCE = "provenance"  # what names of notes begin with; see pack_note

_EXTENSION = ".npy"
LARGEST_ARRAY = 1 << 28  # bytes of one array; latents of an image of 100 million pixels take a tenth of it
_LARGEST_FILE = 1 << 30  # bytes of all arrays of a file
_WIDEST = 8  # bytes of a number, at most
_LONGEST_HEADER = 1 << 12  # bytes before the numbers, at most
_FEW = 8  # `summary` gives arrays of at most so many elements in full
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # every member's time, so that equal arrays make equal files
_UNIX = 3  # the system that members are said to be from, on every system
_END = struct.Struct("<4s6xH10x")  # the record at the end of a zip file: its mark, and how many members there are
_MANY = 0xFFFF  # a count that does not fit into that record stands elsewhere


class CacheDamaged(Exception):
    """A file is not what was written. The message says what is wrong, without the path."""


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    length: int  # bytes


def read(
    path: Path, names: Iterable[str] | None = None, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, NDArray[Any]]:
    """The arrays called `names`, or all of them. The checksums of what is read are verified.

    Args:
        shapes: what arrays of these names are wanted with; what takes more room than that is not unpacked.

    Raises:
        CacheDamaged: the file is cut off, altered, no .npz file, too large for a cache, or lacks one of `names`.
        OSError: it is not there (FileNotFoundError), or the system does not let it be read.
    """
    with _opened(path) as archive:
        members = _members(archive)
        chosen = list(members) if names is None else list(names)
        for name in chosen:
            if name not in members:
                raise CacheDamaged(f"it has no array {name}")
            size, wanted = members[name].file_size, (shapes or {}).get(name)
            if wanted is not None and size > math.prod(wanted) * _WIDEST + _LONGEST_HEADER:
                raise CacheDamaged(f"{name} in it takes {size:,} bytes, too many for the shape {wanted}")
        return {name: _unpack(name, archive.read(members[name])) for name in chosen}


def names(path: Path) -> list[str]:
    """The names of the arrays, from the file's directory alone. Raises: as `read`."""
    with _opened(path) as archive:
        return list(_members(archive))


def shape(path: Path, name: str) -> tuple[int, ...]:
    """The shape of an array, from its header alone. Raises: as `read`."""
    with _opened(path) as archive:
        members = _members(archive)
        if name not in members:
            raise CacheDamaged(f"it has no array {name}")
        with archive.open(members[name]) as member:
            return _header_of(name, member.read(_LONGEST_HEADER))[0].shape


def write(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Writes an uncompressed .npz file beside `path` and renames it. Equal arrays make equal bytes.

    It does not wait for the disk: whoever writes many calls `flush_file_systems` once at the end. What a power cut
    before that leaves empty is found damaged when it is read, and made again.

    Raises: OSError: disk full, no permission; an existing file is as it was. ValueError: an array of Python objects.
    """
    content = io.BytesIO()
    with ZipFile(content, "w") as archive:
        for name in sorted(arrays):
            member = ZipInfo(name + _EXTENSION, _LONG_AGO)
            member.create_system = _UNIX
            member.external_attr = 0o644 << 16
            packed = io.BytesIO()
            np.lib.format.write_array(packed, np.asarray(arrays[name], order="C"), allow_pickle=False)
            archive.writestr(member, packed.getvalue())
    with replacing(path, flush=False) as temporary, open(temporary, "wb") as file:
        file.write(content.getbuffer())


def summary(path: Path) -> dict[str, Any]:
    """A summary of a file as JSON values, after reading and verifying all of it.

    Returns: {"damaged": reason}, or
        "arrays": {name: [shape, dtype]}, e.g. {"latents": [[4, 64, 64], "float32"]}
        "values": {name: list or number} of arrays of at most 8 numbers
        "not_finite": [name] of arrays with NaN or infinity
        "provenance": {what follows PROVENANCE in the name of a note: the note}
    """
    try:
        arrays = read(path)
        notes = {name: unpack_note(array) for name, array in arrays.items() if name.startswith(PROVENANCE)}
    except CacheDamaged as error:
        return {"damaged": str(error)}
    except OSError as error:
        return {"damaged": error.strerror or type(error).__name__}
    data = {name: array for name, array in arrays.items() if name not in notes}
    return {
        "arrays": {name: [list(array.shape), str(array.dtype)] for name, array in data.items()},
        "values": {name: a.tolist() for name, a in data.items() if a.size <= _FEW and a.dtype.kind in "biuf"},
        "not_finite": [name for name, a in data.items() if a.dtype.kind in "fc" and not np.isfinite(a).all()],
        "provenance": {name.removeprefix(PROVENANCE): note for name, note in notes.items()},
    }


def pack_note(note: Mapping[str, Any]) -> NDArray[np.uint8]:
    """JSON values as an array: their text in UTF-8, uint8 (bytes,)."""
    return np.frombuffer(json.dumps(note, sort_keys=True, ensure_ascii=False).encode(), np.uint8)


def unpack_note(array: NDArray[Any]) -> dict[str, Any]:
    """The reverse of `pack_note`. Raises: CacheDamaged: the array holds no note."""
    try:
        note = load_json(array.tobytes()) if array.dtype == np.uint8 else None
    except JsonError:
        note = None
    if not isinstance(note, dict):
        raise CacheDamaged("its note cannot be read")
    return note


@contextmanager
def _opened(path: Path) -> Iterator[ZipFile]:
    try:
        with open_regular(path) as file:
            try:
                with ZipFile(file) as archive:
                    # One wrong byte can make members vanish from the directory, and nothing else notices.
                    file.seek(-(_END.size + len(archive.comment)), io.SEEK_END)
                    mark, count = _END.unpack(file.read(_END.size))
                    if mark != b"PK\5\6" or (count != _MANY and count != len(archive.filelist)):
                        raise CacheDamaged("its directory is damaged")
                    if not archive.filelist:
                        raise CacheDamaged("there is nothing in it")
                    yield archive
            except (BadZipFile, EOFError, struct.error) as error:
                file.seek(0)
                start = file.read(4)
                why = "the file is cut off" if start == b"PK\3\4" else "it is no .npz file"
                if is_zipfile(file):
                    why = str(error) or "it ends too early"
                elif not start:
                    why = "the file is empty"
                raise CacheDamaged(why) from None
    except NotRegularError as error:
        raise CacheDamaged(reason(error)) from None
    except (zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError, OverflowError, ValueError) as error:
        raise CacheDamaged(str(error) or type(error).__name__) from None
    except OSError as error:
        # A broken offset leads to an invalid seek, and bzip2 has no exception of its own. All else is the system's.
        if error.errno not in (None, errno.EINVAL):
            raise
        raise CacheDamaged(error.strerror or str(error)) from None


def _members(archive: ZipFile) -> dict[str, ZipInfo]:
    for name in archive.NameToInfo:
        if not name.endswith(_EXTENSION):
            raise CacheDamaged(f"{name} in it is no array")
    # The directory says how large members are once unpacked. A few bytes can become gigabytes.
    sizes = [member.file_size for member in archive.NameToInfo.values()]
    if max(sizes) > LARGEST_ARRAY or sum(sizes) > _LARGEST_FILE:
        raise CacheDamaged(f"its arrays take {sum(sizes):,} bytes, more than any cache does")
    return {name.removesuffix(_EXTENSION): member for name, member in archive.NameToInfo.items()}


def _header_of(name: str, content: bytes) -> tuple[_Header, int]:
    """The header of an array, and how many bytes come before the numbers.

    These are a mark of 6, the version in 2, the header's length in 2 or 4, and the header.
    """
    width = 2 if content[6:7] == b"\1" else 4
    length = 8 + width + int.from_bytes(content[8 : 8 + width], "little")
    try:
        return _header(content[:length]), length
    except Exception:  # numpy evaluates headers as Python literals, which fails in many ways
        raise CacheDamaged(f"{name} in it does not begin like an array") from None


def _unpack(name: str, content: bytes) -> NDArray[Any]:
    header, length = _header_of(name, content)
    if header.dtype.hasobject:
        raise CacheDamaged(f"{name} in it holds Python objects, which are not loaded")
    if math.prod(header.shape) * header.dtype.itemsize != len(content) - length:
        raise CacheDamaged(f"{name} in it has not the size that its header says")
    order = "F" if header.fortran else "C"
    # Copied, because arrays over bytes are read-only.
    return np.ndarray(header.shape, header.dtype, content, length, order=order).copy()


@lru_cache(maxsize=256)  # files of one kind have few different headers, and numpy evaluates them as Python literals
def _header(content: bytes) -> _Header:
    """Raises: ValueError: no header of an array."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError("unknown version of the format")
    return _Header(*readers[version](stream), stream.tell())
