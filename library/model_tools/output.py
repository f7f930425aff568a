"""Where results go: what can be wrong with a name before the work, and writing with a bar."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.writing import Deferred, materialise, write_safetensors
from library.errors import UserError
from library.runtime.files import reason
from library.runtime.logs import LOGGER, progress

if TYPE_CHECKING:
    from torch import Tensor

    FileTensors = Mapping[str, Tensor | Deferred]


_MASKS = "attn_mask"  # of OpenCLIP, with minus infinity for tokens to come


def require_output(flag: str, path: str | Path, inputs: Iterable[str | Path], endings: Iterable[str]) -> Path:
    """Checks the name of a result, before anything is read.

    Args:
        flag: the option that gives it.
        inputs: the files that it must not replace.
        endings: those of which the name must have one, such as ".safetensors".
    Raises: UserError: another ending, one of the inputs, a folder, or nothing can be written there.
    """
    path, endings = Path(path), tuple(endings)
    if path.suffix.lower() not in endings:
        raise UserError(f"{flag}: {path} must end in {' or '.join(endings)}")
    if path.is_dir():
        raise UserError(f"{flag}: {path} is a folder; name a file")
    for other in inputs:
        if path.exists() and os.path.exists(other) and path.samefile(other):
            raise UserError(f"{flag}: {path} would replace what is read; give another name")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{flag}: {path}: nothing can be written to {parent}")
    return path


def write_tensors(path: Path, tensors: FileTensors, metadata: Mapping[str, str], *, desc: str) -> None:
    """Writes a .safetensors file one tensor at a time, with a bar of bytes.

    Raises: UserError: there is no room for it, the disk refuses it, or a tensor holds NaN or infinite values.
    """
    sizes = {name: tensor.dtype.itemsize * prod(tensor.shape) for name, tensor in tensors.items()}
    total = sum(sizes.values())
    require_room(path, total)
    with progress(total, desc, unit="B", unit_scale=True) as bar:

        def made(name: str) -> Tensor:
            tensor = materialise(tensors[name])
            if not name.endswith(_MASKS):
                require_finite(name, tensor)
            bar.update(sizes[name])
            return tensor

        deferred = {name: Deferred(t.dtype, tuple(t.shape), partial(made, name)) for name, t in tensors.items()}
        try:
            write_safetensors(path, deferred, metadata)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({reason(error)}); an earlier file is as it was") from None
    LOGGER.info("wrote %s: %d tensors, %.2f GB", path, len(tensors), total / 1e9)


def require_room(path: Path, size: int) -> None:
    """Raises: UserError: the file system of `path` has less than `size` bytes free."""
    folder = next(folder for folder in path.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{path}: {size / 1e9:.2f} GB are to be written, and {folder} has {free / 1e9:.2f} GB free; make room, "
            "or write to another disk"
        )


def require_finite(name: str, tensor: Tensor) -> None:
    """Raises: UserError: a tensor that is to be written holds NaN or infinite values."""
    if not tensor.is_floating_point():
        return
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # 8 bit floats have no arithmetic
    if not wide.isfinite().all():
        count, kind = int((~wide.isfinite()).sum()), str(tensor.dtype).removeprefix("torch.")
        raise UserError(
            f"{name}: {count:,} of {tensor.numel():,} values are NaN or infinite in {kind}; the file that it comes "
            "from is broken, or its values are too large for this precision"
        )
