"""Tiny ONNX taggers: the file format written by hand, as nothing that these tests need is installed for it.

The model is one linear layer over all pixels: ``flatten(pixels) @ weight + bias``, and a sigmoid where one is wanted.
So every pixel counts with its place and channel, and a few lines of numpy say what must come out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_FLOAT = 1  # TensorProto.DataType


def write_tagger(
    path: Path,
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    shape: Sequence[int | str],
    *,
    sigmoid: bool = True,
) -> None:
    """Writes the model.

    Args:
        weight: (inputs, labels), inputs in the order in which `shape` flattens; `bias`: (labels,).
        shape: of the input, the batch first; a name is a size that is free, e.g. ("N", 8, 8, 3).
    """
    layer = ("layer", "probabilities") if sigmoid else ("probabilities", "")
    nodes = [
        node("Flatten", ["pixels"], "flat", whole("axis", 1)),
        node("Gemm", ["flat", "weight", "bias"], layer[0]),
    ]
    if sigmoid:
        nodes.append(node("Sigmoid", ["layer"], "probabilities"))
    path.parent.mkdir(parents=True, exist_ok=True)
    outputs = [("probabilities", [shape[0], weight.shape[1]])]
    write_model(path, nodes, {"weight": weight, "bias": bias}, ("pixels", shape), outputs)


# ---- the file format: protobuf messages of onnx.proto, by field numbers


def write_model(
    path: Path,
    nodes: Sequence[bytes],
    tensors: Mapping[str, NDArray],
    taken: tuple[str, Sequence[int | str]],
    given: Sequence[tuple[str, Sequence[int | str]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a model of opset 13 from its nodes, stored tensors, and the names and shapes of its input and outputs."""
    graph = (
        b"".join(_field(1, node) for node in nodes)
        + _field(2, b"graph")
        + b"".join(_field(5, _tensor(name, array)) for name, array in tensors.items())
        + _field(11, _value(*taken))
        + b"".join(_field(12, _value(*one)) for one in given)
    )
    properties = (_field(1, key.encode()) + _field(2, value.encode()) for key, value in (metadata or {}).items())
    path.write_bytes(
        _number(1, 8) + _field(7, graph) + _field(8, _number(2, 13)) + b"".join(_field(14, one) for one in properties)
    )


def node(kind: str, inputs: Sequence[str], output: str, attributes: bytes = b"") -> bytes:
    names = b"".join(_field(1, name.encode()) for name in inputs) + _field(2, output.encode())
    return names + _field(3, output.encode()) + _field(4, kind.encode()) + attributes


def whole(name: str, value: int) -> bytes:
    """An attribute that is a whole number."""
    return _field(5, _field(1, name.encode()) + _number(3, value) + _number(20, 2))


def wholes(name: str, values: Sequence[int]) -> bytes:
    """An attribute that is a list of whole numbers."""
    return _field(5, _field(1, name.encode()) + b"".join(_number(8, value) for value in values) + _number(20, 7))


def _tensor(name: str, array: NDArray) -> bytes:
    kind, stored = (7, "<i8") if array.dtype == np.int64 else (_FLOAT, "<f4")
    dims = b"".join(_number(1, size) for size in array.shape)
    return dims + _number(2, kind) + _field(8, name.encode()) + _field(9, array.astype(stored).tobytes())


def _value(name: str, shape: Sequence[int | str]) -> bytes:
    dims = (_number(1, size) if isinstance(size, int) else _field(2, size.encode()) for size in shape)
    whole = b"".join(_field(1, dim) for dim in dims)
    return _field(1, name.encode()) + _field(2, _field(1, _number(1, _FLOAT) + _field(2, whole)))


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    groups = []
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])
