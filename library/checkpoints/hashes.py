"""The hashes that user interfaces know models by. Files are read in pieces, never whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.runtime.files import open_regular

if TYPE_CHECKING:
    from torch import Tensor, nn

_PIECE = 1 << 20  # bytes read at a time
_LEGACY_START, _LEGACY_SIZE = 0x100000, 0x10000  # 64 KiB at 1 MiB


def network_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash` of a network file.

    Args:
        tensors: as they will be saved, on the CPU, cast already.
        metadata: all of the file's; only what starts with "ss_" goes into the legacy hash, so that hashes and
            modelspec of an earlier save have no influence.
    """
    from safetensors.torch import save

    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    file = memoryview(save(dict(tensors), training))
    start = 8 + int.from_bytes(file[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(file[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(file[_LEGACY_START : _LEGACY_START + _LEGACY_SIZE]).hexdigest()[:8],
    }


def weights_fingerprint(module: nn.Module) -> str:
    """32 hex digits that change when any weight of a model does; equal for dtypes that hold the same values.

    Caches are marked with it, as it identifies the VAE or text encoder that they came from.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().float().cpu().contiguous().numpy()).cast("B"))
    return digest.hexdigest()[:32]


def file_hash(path: str | Path, progress: Callable[[int], object] | None = None) -> str:
    """sha256, 64 hex digits, of a whole file: `ss_new_*_hash`. "NOFILE" or "IsADirectory" where there is none.

    Args:
        progress: called with the number of bytes just read.
    """
    return _no_file(path) or _hash_from(path, 0, None, progress)


def legacy_file_hash(path: str | Path) -> str:
    """The old 8-digit hash, `ss_sd_model_hash`: of 64 KiB at 1 MiB, so `e3b0c442` for all smaller files."""
    return _no_file(path) or _hash_from(path, _LEGACY_START, _LEGACY_SIZE)[:8]


def _no_file(path: str | Path) -> str | None:
    path = Path(path)
    if path.is_dir():
        return "IsADirectory"
    return None if path.is_file() else "NOFILE"


def _hash_from(path: str | Path, start: int, size: int | None, progress: Callable[[int], object] | None = None) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        file.seek(start)
        left = size
        while piece := file.read(_PIECE if left is None else min(_PIECE, left)):
            digest.update(piece)
            if progress is not None:
                progress(len(piece))
            left = None if left is None else left - len(piece)
    return digest.hexdigest()
