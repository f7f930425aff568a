"""Reads weights. Nothing here runs code that a file brings: pickles load with `weights_only`, or not at all."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.header import HeaderError, ParsedHeader, parse_header
from library.errors import UserError
from library.runtime.files import open_regular, path_problem, reason

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
LARGEST_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_TORCH_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # zip, or a pickle's protocol
_MOST_MAPPED = 1 << 26  # bytes of a file that stay mapped after they were copied

Header = dict[str, tuple[str, tuple[int, ...]]]


def read_header(path: str | Path) -> tuple[dict[str, str], Header]:
    """What a .safetensors file says about itself, without torch: (metadata, {key: (dtype, shape)}).

    Dtypes are the format's own words: "F16", "BF16", "F32", "I64", ...

    Raises: UserError: missing, truncated or not a safetensors file.
    """
    parsed, _ = read_layout(path)
    return parsed.metadata, {key: (tensor.dtype, tensor.shape) for key, tensor in parsed.tensors.items()}


def read_layout(path: str | Path) -> tuple[ParsedHeader, int]:
    """The whole header of a .safetensors file, and where its tensors begin, in bytes from the file's beginning.

    Raises: UserError: as `read_header`.
    """
    path = Path(path)
    require_file(path)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 10 or length > min(size - 8, LARGEST_HEADER):
                raise UserError(f"{path}: not a safetensors file, or cut short ({size:,} bytes); get the file again")
            parsed = parse_header(file.read(length))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None
    except HeaderError as error:
        raise UserError(f"{path}: its safetensors header cannot be read ({error}); get the file again") from None
    start = 8 + length
    if size < start + parsed.end:
        raise UserError(
            f"{path}: cut short, {size:,} bytes where its header promises {start + parsed.end:,}; get the file again"
        )
    return parsed, start


def safetensors_dtypes() -> dict[torch.dtype, str]:
    """Torch's dtypes and the format's words, in the order by which the safetensors library sorts: narrowest first."""
    import torch

    return {
        torch.bool: "BOOL",
        torch.uint8: "U8",
        torch.int8: "I8",
        torch.float8_e5m2: "F8_E5M2",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.int16: "I16",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int32: "I32",
        torch.float32: "F32",
        torch.float64: "F64",
        torch.int64: "I64",
    }


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a .safetensors file; empty for other files, which have none."""
    return read_header(path)[0] if Path(path).suffix == ".safetensors" else {}


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a weight file, as stored, on the CPU. A {"state_dict": ...} wrapper is taken off.

    Raises: UserError: missing or damaged file, or a pickle that holds more than tensors and plain values.
    """
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        return unwrap(read_torch(path), path)
    return dict(SafetensorsFile(path).items())


class SafetensorsFile(Mapping[str, "Tensor"]):
    """A .safetensors file as a mapping whose tensors are read one at a time, each into memory of its own."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metadata, header = read_header(path)
        self.shapes = {key: shape for key, (_, shape) in header.items()}
        self._words = {key: word for key, (word, _) in header.items()}
        self._open()

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.shapes:
            raise KeyError(key)
        if self._mapped > _MOST_MAPPED:
            self._open()
        # The library's tensor may be a view of the mapped file, which must stay free to be replaced.
        tensor = self._file.get_tensor(key).clone()
        self._mapped += tensor.nbytes
        return tensor

    def _open(self) -> None:
        """Maps the file anew, which lets go of what was read: beside the tensors it would be a second copy."""
        from safetensors import SafetensorError, safe_open

        self._mapped = 0  # bytes read since
        try:
            self._file = safe_open(str(self.path), framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path}: cannot be read as safetensors ({error})") from None

    def dtype(self, key: str) -> torch.dtype:
        word = self._words[key]
        for dtype, known in safetensors_dtypes().items():
            if known == word:
                return dtype
        raise UserError(f"{self.path}: the tensor {key!r} is of the type {word}, which cannot be used here")

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class TorchFile(Mapping[str, "Tensor"]):
    """The state dict of a .ckpt/.pt file as a mapping; `extra` has the numbers beside it (epoch, global_step)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        content = read_torch(path)
        self._tensors = unwrap(content, path)
        self.shapes = {key: tuple(tensor.shape) for key, tensor in self._tensors.items()}
        self.extra = {key: value for key, value in content.items() if isinstance(value, int)}

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key].clone()  # out of the mapped file

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def open_weights(path: str | Path) -> SafetensorsFile | TorchFile:
    """Like `read_state_dict`, but a tensor is read, into memory of its own, only when it is asked for."""
    return SafetensorsFile(path) if Path(path).suffix.lower() == ".safetensors" else TorchFile(path)


def read_torch(path: str | Path) -> Any:
    """What `torch.save` wrote into `path`, on the CPU.

    Raises: UserError: missing or damaged, or it would have to run code to load.
    """
    import pickle

    import torch

    path = Path(path)
    require_weights(path)
    try:
        # mmap leaves what is not used on the disk; only the zip form, written since torch 1.6, can do it.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: refused, because it holds more than tensors and loading it would run code from the file",
            hint="use the .safetensors version of this model, or convert it with a tool that you trust",
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read as a torch checkpoint ({first_line}); get the file again") from None


def unwrap(content: Any, path: str | Path) -> dict[str, Tensor]:
    """The state dict inside what a .ckpt holds. Raises: UserError: there is none."""
    import torch

    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise UserError(f"{path}: holds no weights")
    return tensors


def require_weights(path: str | Path) -> None:
    """Finds out, without torch, whether `path` can be a weight file at all.

    Raises: UserError: missing, cut short, or something else.
    """
    if Path(path).suffix.lower() == ".safetensors":
        read_header(path)
        return
    require_file(path)
    with open(path, "rb") as file:
        if file.read(2) not in _TORCH_STARTS:
            raise UserError(f"{path}: not a torch checkpoint; get the file again")


def require_file(path: str | Path) -> None:
    """Raises: UserError: `path` is not a regular file that may be read."""
    problem = path_problem(path, "file")
    if problem:
        raise UserError(f"{path}: {problem}")
