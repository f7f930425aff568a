"""Writes weights. A file has its name when it is whole and on the disk; an earlier one survives a failure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.reading import safetensors_dtypes
from library.runtime.durable import replacing

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Deferred:
    """A tensor that is made only when its turn to be written comes, so that a whole converted copy is never held."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor | Deferred], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one .safetensors file atomically, one tensor at a time.

    The bytes are those that the safetensors library writes: tensors by dtype width, widest first, then by name; the
    header padded with spaces to a multiple of 8.

    Raises: OSError: the disk is full or the folder cannot be written. TypeError: a metadata value is not a string.
    """
    import torch

    widest_first = list(reversed(safetensors_dtypes()))
    order = sorted(tensors, key=lambda name: (widest_first.index(tensors[name].dtype), name))
    header = _header(order, tensors, metadata)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name in order:
            value = tensors[name]
            tensor = materialise(value)
            if tensor.dtype != value.dtype or tuple(tensor.shape) != tuple(value.shape):
                raise RuntimeError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not what its header says")
            if tensor.numel():
                file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
            del tensor  # before the next one is made


def write_torch(path: str | Path, obj: Any) -> None:
    """What `torch.save` writes, atomically. Raises: OSError: the disk is full or the folder cannot be written."""
    from library.checkpoints.torch_archive import write_archive

    with replacing(path) as temporary:
        write_archive(temporary, obj)


def materialise(value: Tensor | Deferred) -> Tensor:
    """The tensor itself, on the CPU, contiguous."""
    tensor = value.make() if isinstance(value, Deferred) else value
    return tensor.detach().cpu().contiguous()


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
