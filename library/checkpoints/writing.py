"""Writes weights beside their target and renames when complete, so that an earlier file survives a failure."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from library.checkpoints.reading import safetensors_dtypes

if TYPE_CHECKING:
    import torch
    from torch import Tensor


_SHOWN = 40  # signs of a file's name that its temporary name has


@dataclass(frozen=True)
class Deferred:
    """A tensor that is made only when its turn to be written comes, so that a whole converted copy is never held."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@contextmanager
def replacing(path: str | Path, *, flush: bool = True) -> Iterator[Path]:
    """Gives a temporary file name in the folder of `path`; on success the file is flushed to disk and renamed.

    If the block raises, the temporary file is removed and an earlier `path` stays as it was.

    Args:
        flush: False for what can be made again and is checked when it is read: waiting for the disk takes longer than
            many small files do, and only a power cut makes a difference.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=_beginning(path), suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if flush:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Gives an empty folder beside `path`; on success it takes the place of `path`, whatever was there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=_beginning(path), suffix=".tmp", dir=path.parent))
    fresh, old = work / "new", work / "old"
    fresh.mkdir()
    try:
        yield fresh
        if path.exists():
            os.replace(path, old)  # a folder cannot be renamed over a filled one
        try:
            os.replace(fresh, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Gives an empty folder beside `path`; on success it becomes `path`, unless another process was first.

    Whoever looks at `path` meanwhile finds no folder, or a whole one. Raises: OSError: `path` cannot be made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=_beginning(path), suffix=".tmp", dir=path.parent))
    fresh = work / "new"
    fresh.mkdir()
    try:
        yield fresh
        try:
            os.rename(fresh, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _beginning(path: Path) -> str:
    """Of a temporary name. Not all of a long one: file systems have 255 bytes for a name, of up to 4 for each sign."""
    return f".{path.name[:_SHOWN]}."


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor | Deferred], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one .safetensors file atomically, one tensor at a time.

    The bytes are those that the safetensors library writes: tensors by dtype width, widest first, then by name; the
    header padded with spaces to a multiple of 8.

    Raises: OSError: the disk is full or the folder cannot be written. TypeError: a metadata value is not a string.
    """
    order = sorted(tensors, key=lambda name: (_rank(tensors[name].dtype), name))
    header = _header(order, tensors, metadata)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name in order:
            _write_tensor(file, name, tensors[name])


def write_torch(path: str | Path, obj: Any) -> None:
    """`torch.save`, atomically. Raises: OSError."""
    import torch

    with replacing(path) as temporary:
        torch.save(obj, temporary)


def materialise(value: Tensor | Deferred) -> Tensor:
    """The tensor itself, on the CPU, contiguous."""
    tensor = value.make() if isinstance(value, Deferred) else value
    return tensor.detach().cpu().contiguous()


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _read_umask()  # once and here: it can only be read by changing it, which other threads would see


def _rank(dtype: torch.dtype) -> int:
    return list(reversed(safetensors_dtypes())).index(dtype)


def _header(order: list[str], tensors: Mapping[str, Tensor | Deferred], metadata: Mapping[str, str] | None) -> bytes:
    import torch

    header: dict[str, Any] = {}
    if metadata:
        for key, value in metadata.items():
            if not isinstance(value, str):
                raise TypeError(f"metadata {key} must be a string, got {value!r}")
        header["__metadata__"] = dict(metadata)
    start, names = 0, safetensors_dtypes()
    for name in order:
        value = tensors[name]
        size = torch.Size(value.shape).numel() * value.dtype.itemsize
        header[name] = {
            "dtype": names[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, start + size],
        }
        start += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def _write_tensor(file: IO[bytes], name: str, value: Tensor | Deferred) -> None:
    import torch

    tensor = materialise(value)
    if tensor.dtype != value.dtype or tuple(tensor.shape) != tuple(value.shape):
        raise RuntimeError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not what its header says")
    if tensor.numel():
        file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
