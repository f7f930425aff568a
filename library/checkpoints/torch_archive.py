"""Files of `torch.save`, written with the three kinds of entries that every reader knows and no other.

A file is a zip archive: `data.pkl`, in which each storage is only named, `data/<number>` with the bytes of each, and
`version`. Newer torch adds entries of its own, for which AUTOMATIC1111's web UI refuses a whole file as harmful.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

_ROOT = "archive"
_VERSION = b"3\n"  # of the format
_PROTOCOL = 2  # of the pickle, as torch has it
_ALIGNMENT = 64  # of the bytes of storages in the file, so that they can be mapped into memory
_HEADER, _EXTRA, _ZIP64 = 30, 4, 20  # bytes of a zip entry: its fixed part, what begins a field of padding, large sizes


class _Pickler(pickle.Pickler):
    """Collects storages and names them by number; those on other devices come to the CPU."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=_PROTOCOL)
        self.storages: list[torch.UntypedStorage] = []
        self._numbers: dict[int, str] = {}  # by the address of torch's object, which `storages` keeps alive

    def persistent_id(self, obj: Any) -> tuple[str, type, str, str, int] | None:
        if isinstance(obj, torch.storage.TypedStorage):
            storage, kind, length = obj._untyped_storage, getattr(torch, obj._pickle_storage_type()), obj._size()
        elif isinstance(obj, torch.UntypedStorage):
            storage, kind, length = obj, torch.UntypedStorage, obj.nbytes()
        else:
            return None
        if storage._cdata not in self._numbers:
            self._numbers[storage._cdata] = str(len(self.storages))
            self.storages.append(storage)
        return "storage", kind, self._numbers[storage._cdata], "cpu", length


def write_archive(path: Path, obj: Any) -> None:
    """Writes what `torch.load` reads. The same content gives the same bytes.

    Raises: OSError: the disk is full. Whatever pickle raises: a part cannot be pickled.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(obj)
    with zipfile.ZipFile(path, "w") as archive:
        _add(archive, "data.pkl", buffer.getbuffer())
        for number, storage in enumerate(pickler.storages):
            flat = torch.empty(0, dtype=torch.uint8).set_(storage.cpu())
            _add(archive, f"data/{number}", memoryview(flat.numpy()))
        _add(archive, "version", memoryview(_VERSION))


def _add(archive: zipfile.ZipFile, name: str, content: memoryview) -> None:
    entry = zipfile.ZipInfo(f"{_ROOT}/{name}")
    entry.create_system = 0  # or the bytes would differ between systems
    large = content.nbytes * 1.05 > zipfile.ZIP64_LIMIT
    begin = archive.fp.tell() + _HEADER + len(entry.filename) + _EXTRA + large * _ZIP64
    padding = -begin % _ALIGNMENT
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(entry, "w", force_zip64=large) as file:
        file.write(content)
