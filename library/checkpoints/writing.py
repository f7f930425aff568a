"""Writes weights. A file has its name when it is whole and on the disk; an earlier one survives a failure."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.reading import safetensors_dtypes
from library.runtime.durable import replacing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SIZES: ContextVar[dict[Path, int] | None] = ContextVar("sizes", default=None)
_HOLES: ContextVar[bool] = ContextVar("holes", default=False)

DATA_HASH = "0" * 64  # where metadata holds it, a file has the sha256 of its tensors' bytes, in hex digits


@dataclass(frozen=True)
class Deferred:
    """A tensor that is made only when its turn to be written comes, so that a whole converted copy is never held."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@contextmanager
def sizes_only() -> Iterator[dict[Path, int]]:
    """Within the block nothing is written; the mapping gets the bytes of every file that would have been."""
    sizes: dict[Path, int] = {}
    token = _SIZES.set(sizes)
    try:
        yield sizes
    finally:
        _SIZES.reset(token)


@contextmanager
def without_data() -> Iterator[None]:
    """Within the block .safetensors files get a hole in place of their data, which takes no room on most disks.

    Tensors need no values: they may be on the meta device. Read back, all numbers are 0.
    """
    token = _HOLES.set(True)
    try:
        yield
    finally:
        _HOLES.reset(token)


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor | Deferred], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one .safetensors file atomically, one tensor at a time.

    The bytes are those that the safetensors library writes: tensors by dtype width, widest first, then by name; the
    header padded with spaces to a multiple of 8. `DATA_HASH` in a value of the metadata is replaced once all tensors
    are written.

    Raises: OSError: the disk is full or the folder cannot be written. TypeError: a metadata value is not a string.
    """
    import torch

    widest_first = list(reversed(safetensors_dtypes()))
    order = sorted(tensors, key=lambda name: (widest_first.index(tensors[name].dtype), name))
    metadata = dict(metadata or {})
    hashed = any(DATA_HASH in str(value) for value in metadata.values())
    digest = hashlib.sha256()
    sizes = _SIZES.get()
    if sizes is not None:
        data = sum(materialise(tensors[name]).nbytes for name in order)
        sizes[Path(path)] = 8 + len(_header(order, tensors, metadata)) + data
        return
    with replacing(path) as temporary, open(temporary, "wb") as file:
        header = _header(order, tensors, metadata)
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        if _HOLES.get():
            file.truncate(file.tell() + sum(_nbytes(tensors[name]) for name in order))
            return
        for name in order:
            value = tensors[name]
            tensor = materialise(value)
            if tensor.dtype != value.dtype or tuple(tensor.shape) != tuple(value.shape):
                raise RuntimeError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not what its header says")
            if tensor.numel():
                data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
                file.write(data)
                if hashed:
                    digest.update(data)
                del data
            del tensor  # before the next one is made
        if hashed:
            known = {key: value.replace(DATA_HASH, digest.hexdigest()) for key, value in metadata.items()}
            file.seek(8)
            file.write(_header(order, tensors, known))


def write_torch(path: str | Path, obj: Any) -> None:
    """What `torch.save` writes, atomically. Raises: OSError: the disk is full or the folder cannot be written."""
    from library.checkpoints.torch_archive import write_archive

    sizes = _SIZES.get()
    if sizes is not None:
        sizes[Path(path)] = bytes_of(obj)
        return
    with replacing(path) as temporary:
        write_archive(temporary, obj)


def bytes_of(value: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if hasattr(value, "nbytes"):
        return int(value.nbytes)
    if isinstance(value, Mapping):
        return sum(map(bytes_of, value.values()))
    return sum(map(bytes_of, value)) if isinstance(value, list | tuple) else 0


def materialise(value: Tensor | Deferred) -> Tensor:
    """The tensor itself, on the CPU, contiguous."""
    tensor = value.make() if isinstance(value, Deferred) else value
    return tensor.detach().cpu().contiguous()


def _nbytes(value: Tensor | Deferred) -> int:
    return math.prod(value.shape) * value.dtype.itemsize


def _header(order: list[str], tensors: Mapping[str, Tensor | Deferred], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, Any] = {}
    if metadata:
        for key, value in metadata.items():
            if not isinstance(value, str):
                raise TypeError(f"metadata {key} must be a string, got {value!r}")
        header["__metadata__"] = dict(metadata)
    start, names = 0, safetensors_dtypes()
    for name in order:
        value = tensors[name]
        size = _nbytes(value)
        header[name] = {
            "dtype": names[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, start + size],
        }
        start += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)
