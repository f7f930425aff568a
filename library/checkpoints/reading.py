"""Reads weights. Nothing here runs code that a file brings: what a pickle holds beside tensors becomes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.formats import LARGEST_HEADER, Format, weight_format
from library.checkpoints.header import HeaderError, ParsedHeader, parse_header
from library.errors import UserError
from library.runtime.files import open_regular, path_problem, reason
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SHOWN = 4  # classes that a message names
_MOST_MAPPED = 1 << 26  # bytes of a file that stay mapped after they were copied

_SHAPES_ONLY: ContextVar[bool] = ContextVar("shapes_only", default=False)

Header = dict[str, tuple[str, tuple[int, ...]]]
# Torch's storage classes, by which torch files name a dtype, and the words of safetensors headers.
_STORAGES = {
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "IntStorage": "I32",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
}


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within the block, files give tensors of their dtypes and shapes without values: the data is not read."""
    token = _SHAPES_ONLY.set(True)
    try:
        yield
    finally:
        _SHAPES_ONLY.reset(token)


def reads_shapes_only() -> bool:
    """Whether this is inside of `shapes_only`."""
    return _SHAPES_ONLY.get()


def read_header(path: str | Path) -> tuple[dict[str, str], Header]:
    """The header of a .safetensors file, read without torch: (metadata, {key: (dtype, shape)}).

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


def file_format(path: str | Path) -> Format:
    """Whether a file is a safetensors file or torch's, by its content, whatever its name says.

    Raises: UserError: missing, or neither of them; the message says what it is.
    """
    require_file(path)
    return weight_format(path)


def read_names(path: str | Path) -> Header | None:
    """Names, dtypes and shapes of the tensors of any weight file, without torch; dtypes as in `read_header`.

    None where only loading shows them: a damaged or unusual torch file.

    Raises: UserError: missing, no weight file, or a broken safetensors file.
    """
    if file_format(path) == "safetensors":
        return read_header(path)[1]
    from library.checkpoints.unpickling import TensorSpec, read_specs

    try:
        content = read_specs(Path(path))
        inner = content.get("state_dict")
        state = inner if isinstance(inner, dict) else content
        return {
            key: (_STORAGES.get(value.dtype, value.dtype), value.shape)
            for key, value in state.items()
            if isinstance(key, str) and isinstance(value, TensorSpec)
        }
    except Exception:  # whatever a damaged pickle leads to; loading says what is wrong
        return None


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
    """The metadata of a safetensors file; empty for a torch file, which has none. Raises: UserError: neither."""
    return read_header(path)[0] if file_format(path) == "safetensors" else {}


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a weight file, as stored, on the CPU. A {"state_dict": ...} wrapper is taken off.

    Raises: UserError: missing or damaged, no weight file, or a hostile one.
    """
    path = Path(path)
    if file_format(path) == "torch":
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
        import torch

        if key not in self.shapes:
            raise KeyError(key)
        if reads_shapes_only():
            return torch.empty(self.shapes[key], dtype=self.dtype(key), device="cpu")
        return self._read(key)

    def _read(self, key: str) -> Tensor:
        if self._mapped > _MOST_MAPPED:
            self._open()
        # The library's tensor may be a view of the mapped file, which must stay free to be replaced.
        tensor = self._file.get_tensor(key).clone()
        self._mapped += tensor.nbytes
        return tensor

    def _open(self) -> None:
        """Maps the file again, which frees what was read: beside the tensors it would be a second copy."""
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

    def __contains__(self, key: object) -> bool:  # Mapping's own would read the tensor
        return key in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class TorchFile(Mapping[str, "Tensor"]):
    """The state dict of a .ckpt/.pt file as a mapping; `extra` has the values beside it (epoch, global_step)."""

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

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def open_weights(path: str | Path) -> SafetensorsFile | TorchFile:
    """Like `read_state_dict`, but a tensor is read, into memory of its own, only when it is asked for."""
    return SafetensorsFile(path) if file_format(path) == "safetensors" else TorchFile(path)


def read_torch(path: str | Path) -> Any:
    """The content of a file of `torch.save`, on the CPU. Nothing that the file names is imported or run.

    Where it holds objects of other classes, empty stand-ins are in their places, and a line in the log names them.

    Raises: UserError: missing, damaged or hostile.
    """
    import pickle

    from library.checkpoints.unpickling import HostilePickle, load_tolerant, load_torch

    path = Path(path)
    require_file(path)
    try:
        try:
            return load_torch(path, weights_only=True)
        except pickle.UnpicklingError:  # it holds more than tensors and plain values
            content, unknown = load_tolerant(path)
    except UserError:
        raise
    except HostilePickle as error:
        raise UserError(
            f"{path}: refused, because loading it in the usual way would run code from the file ({error})",
            hint="do not use files from where it came from",
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None
    except Exception as error:  # a damaged pickle may lead to anything
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read as a torch checkpoint ({first_line}); get the file again") from None
    if unknown:
        names = ", ".join(unknown[:_SHOWN]) + (f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else "")
        LOGGER.info("%s: read without its objects of %s; none of their code was run", path, names)
    return content


def unwrap(content: Any, path: str | Path) -> dict[str, Tensor]:
    """The state dict inside what a .ckpt holds. Raises: UserError: there is none."""
    import torch

    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    found = content.items() if isinstance(content, dict) else ()
    tensors = {k: v for k, v in found if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no weights")
    return tensors


def require_weights(path: str | Path) -> None:
    """Finds out, without torch, whether `path` can be a weight file at all.

    Raises: UserError: missing, cut short, or something else.
    """
    if file_format(path) == "safetensors":
        read_header(path)


def require_file(path: str | Path) -> None:
    """Raises: UserError: `path` is not a regular file that may be read."""
    problem = path_problem(path, "file")
    if problem:
        raise UserError(f"{path}: {problem}")
