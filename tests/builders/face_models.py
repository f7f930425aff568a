"""ONNX face detectors that really look at images, small enough to write by hand.

They find orange: each cell of a grid is a face, as sure as it has more red than blue. White, grey and black are none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.builders.onnx_file import node, whole, wholes, write_model

FACE = (255, 128, 0)
YUNET_STRIDES = (8, 16, 32)

# How often each of (column, row, 1, score) counts in an output; columns and rows from 1 on, in cells.
CENTRE_X, CENTRE_Y, SIDE = (1, 0, -0.5, 0), (0, 1, -0.5, 0), (0, 0, 1, 0)
LEFT, TOP, RIGHT, BOTTOM = (1, 0, -1, 0), (0, 1, -1, 0), (1, 0, 0, 0), (0, 1, 0, 0)


def write_yolo8(path: Path, *, cell: int = 64, size: int | str = 640, eyes: Sequence[float] = (), **metadata: str):
    """Output (1, 5 + ..., N). `eyes`: (x, y, x, y) from the middle of a face, in cells; five points are given then."""
    rows = [_pixels(row, cell) for row in (CENTRE_X, CENTRE_Y, SIDE, SIDE)] + [(0, 0, 0, 1)]
    if eyes:
        points = [*eyes, 0, 0, 0, 0.3, 0, 0.3]
        for x, y in zip(points[::2], points[1::2], strict=True):
            rows += [_pixels((1, 0, x - 0.5, 0), cell), _pixels((0, 1, y - 0.5, 0), cell), SIDE]
        metadata |= {"kpt_shape": "[5, 3]", "names": "{0: 'face'}"}
    _write_yolo(path, rows, cell, size, False, metadata)


def write_yolo5(path: Path, *, cell: int = 16, **metadata: str):
    """Output (1, N, 6): a box, whether there is anything, and one class."""
    rows = [_pixels(row, cell) for row in (CENTRE_X, CENTRE_Y, SIDE, SIDE)] + [SIDE, (0, 0, 0, 1)]
    _write_yolo(path, rows, cell, 640, True, metadata)


def write_yolo10(path: Path, *, cell: int = 64, **metadata: str):
    """Output (1, N, 6): corners, score, class; the kind that sorts out its boxes."""
    rows = [_pixels(row, cell) for row in (LEFT, TOP, RIGHT, BOTTOM)] + [(0, 0, 0, 1), (0, 0, 0, 0)]
    _write_yolo(path, rows, cell, 640, True, metadata)


def write_yunet(path: Path, size: int | str, *, with_points: bool = True):
    """Finds orange in cells of 32 pixels. BGR, 0 to 255. The eyes are at a quarter and three quarters of the width."""
    nodes, outputs, tensors = [], [], {"picks": _kernel([(-1 / 255, 0, 1 / 255)]), "zero": _floats([0])}
    nothing = _kernel([(0, 0, 0)])
    values = {"cls": None, "obj": [1], "bbox": [0.5, 0.5, 0, 0]}
    if with_points:
        values["kps"] = [0.25, 0.4, 0.75, 0.4, 0.5, 0.6, 0.3, 0.8, 0.7, 0.8]
    tensors["flat"] = np.array([0, 0, -1], np.int64)
    for stride in YUNET_STRIDES:
        nodes.append(_pool("input", f"cells{stride}", stride))
        for name, constants in values.items():
            place = f"{name}_{stride}"
            if constants is None and stride == 32:
                weight, bias = "picks", "zero"
            else:
                constants = constants or [0]
                weight, bias = f"w_{place}", f"b_{place}"
                tensors |= {weight: np.repeat(nothing, len(constants), axis=0), bias: _floats(constants)}
            shape = f"shape_{place}"
            tensors[shape] = np.array([0, len(constants or [0]), -1], np.int64)
            nodes += [
                node("Conv", [f"cells{stride}", weight, bias], f"raw_{place}"),
                node("Relu", [f"raw_{place}"], f"sure_{place}"),
                node("Reshape", [f"sure_{place}", shape], f"row_{place}"),
                node("Transpose", [f"row_{place}"], place, wholes("perm", [0, 2, 1])),
            ]
            outputs.append((place, [1, f"n{stride}", len(constants or [0])]))
    write_model(path, nodes, tensors, ("input", [1, 3, size, size]), outputs, {})


def _write_yolo(
    path: Path,
    rows: Sequence[Sequence[float]],
    cell: int,
    size: int | str,
    by_face: bool,
    metadata: Mapping[str, str],
) -> None:
    nodes = [
        _pool("images", "cells", cell),
        node("Conv", ["cells", "picks", "zero"], "raw"),
        node("Relu", ["raw"], "score"),
        node("Conv", ["cells", "nothing", "one"], "ones"),
        node("CumSum", ["ones", "axis_x"], "x"),
        node("CumSum", ["ones", "axis_y"], "y"),
        node("Concat", ["x", "y", "ones", "score"], "known", whole("axis", 1)),
        node("Conv", ["known", "mix"], "grid"),
        node("Reshape", ["grid", "flat"], "list" if by_face else "output0"),
    ]
    shape: list[int | str] = [1, len(rows), "n"]
    if by_face:
        nodes.append(node("Transpose", ["list"], "output0", wholes("perm", [0, 2, 1])))
        shape = [1, "n", len(rows)]
    tensors = {
        "picks": _kernel([(1, 0, -1)]),
        "zero": _floats([0]),
        "nothing": _kernel([(0, 0, 0)]),
        "one": _floats([1]),
        "axis_x": np.array(3, np.int64),
        "axis_y": np.array(2, np.int64),
        "mix": _kernel(rows),
        "flat": np.array([0, len(rows), -1], np.int64),
    }
    sides = [size, size] if isinstance(size, int) else ["height", "width"]
    write_model(path, nodes, tensors, ("images", [1, 3, *sides]), [("output0", shape)], metadata)


def _pixels(row: Sequence[float], cell: int) -> tuple[float, ...]:
    return tuple(value * cell for value in row)


def _kernel(rows: Sequence[Sequence[float]]) -> NDArray[np.float32]:
    return np.array(rows, np.float32)[..., None, None]


def _floats(values: Sequence[float]) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def _pool(taken: str, given: str, side: int) -> bytes:
    return node("AveragePool", [taken], given, wholes("kernel_shape", [side, side]) + wholes("strides", [side, side]))
