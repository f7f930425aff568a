"""Tiny ONNX taggers: the file format written by hand, as nothing that these tests need is installed for it.

The model is one linear layer over all pixels: ``flatten(pixels) @ weight + bias``, and a sigmoid where one is wanted.
So every pixel counts with its place and channel, and a few lines of numpy say what must come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_FLOAT = 1  # TensorProto.DataType
_INT = 2  # AttributeProto.AttributeType


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
    layer = ("layer", "probabilities") if sigmoid else ("probabilities", None)
    nodes = [
        _node("Flatten", ["pixels"], "flat", _attribute("axis", 1)),
        _node("Gemm", ["flat", "weight", "bias"], layer[0]),
    ]
    if sigmoid:
        nodes.append(_node("Sigmoid", ["layer"], "probabilities"))
    graph = (
        b"".join(_field(1, node) for node in nodes)
        + _field(2, b"tagger")
        + _field(5, _tensor("weight", weight))
        + _field(5, _tensor("bias", bias))
        + _field(11, _value("pixels", shape))
        + _field(12, _value("probabilities", [shape[0], weight.shape[1]]))
    )
    opset = _number(2, 13)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_number(1, 8) + _field(7, graph) + _field(8, opset))


def _node(kind: str, inputs: Sequence[str], output: str, attributes: bytes = b"") -> bytes:
    names = b"".join(_field(1, name.encode()) for name in inputs) + _field(2, output.encode())
    return names + _field(3, output.encode()) + _field(4, kind.encode()) + attributes


def _attribute(name: str, value: int) -> bytes:
    return _field(5, _field(1, name.encode()) + _number(3, value) + _number(20, _INT))


def _tensor(name: str, array: NDArray[np.float32]) -> bytes:
    dims = b"".join(_number(1, size) for size in array.shape)
    return dims + _number(2, _FLOAT) + _field(8, name.encode()) + _field(9, array.astype("<f4").tobytes())


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
