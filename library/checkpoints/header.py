"""The header of a .safetensors file, from bytes to checked records: what is allowed is listed, not what may fail."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from library.runtime.documents import JsonError, load_json

# Bytes of one number. A word that is not here is a format of tomorrow: its sizes are taken as they are.
WIDTHS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


class HeaderError(ValueError):
    """The header is not as the format wants it; the message says where, without the path."""


@dataclass(frozen=True)
class TensorEntry:
    """The entry of one tensor in the header."""

    dtype: str  # the format's own word: "F16", "BF16", "F32", "I64", ...
    shape: tuple[int, ...]
    start: int  # of its elements, in bytes behind the header
    end: int


@dataclass(frozen=True)
class ParsedHeader:
    metadata: dict[str, str]
    tensors: dict[str, TensorEntry]  # in the file's order of keys

    @property
    def end(self) -> int:
        """Bytes that the tensors take behind the header."""
        return max((tensor.end for tensor in self.tensors.values()), default=0)


def parse_header(content: bytes) -> ParsedHeader:
    """Checks the shape of everything in the header, and that the tensors lie behind each other without gap or overlap.

    Raises: HeaderError: whatever is not so.
    """
    try:
        header = load_json(content)
    except JsonError as error:
        raise HeaderError(f"it is no JSON: {error.problem}") from None
    if not isinstance(header, dict):
        raise HeaderError("it is not one object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("its __metadata__ is not texts by name")
    tensors: dict[str, TensorEntry] = {}
    for name, entry in header.items():
        if not isinstance(entry, dict):
            raise HeaderError(f"the entry of {name!r} is not an object")
        dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or not _are_counts(shape):
            raise HeaderError(f"the entry of {name!r} has no dtype and shape")
        if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise HeaderError(f"the data_offsets of {name!r} are not a start and an end")
        size = offsets[1] - offsets[0]
        if dtype in WIDTHS and math.prod(shape) * WIDTHS[dtype] != size:
            raise HeaderError(f"the tensor {name!r} has {size:,} bytes, which is not its shape {shape} in {dtype}")
        tensors[name] = TensorEntry(dtype, tuple(shape), *offsets)
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != position:
            what = "overlaps the one before it" if tensor.start < position else "leaves a gap before it"
            raise HeaderError(f"the tensor {name!r} {what}")
        position = tensor.end
    return ParsedHeader(metadata, tensors)


def _are_counts(value: Any) -> bool:
    """Whether it is a list of whole numbers from 0 up, none of which is true or false."""
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
