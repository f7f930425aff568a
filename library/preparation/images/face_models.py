"""Finds faces with ONNX models that users bring: YuNet, and the kinds of YOLO."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from library.data.sample import images
from library.errors import UserError
from library.preparation.common.onnx_sessions import first_line, open_session
from library.runtime.documents import load_json
from library.types import Size

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LONGER_SIDE = 640  # what an image is resized to for a model that takes any size; the models are trained with it
_MULTIPLE = 32  # of both sides, for the coarsest grid of the models
_PADDING = 114  # the grey that YOLO models see beside images in training
_MOST_OVERLAP = 0.45  # intersection over union from which two boxes are of one face
_MOST_FINISHED = 1000  # boxes of a model that sorts out its own; grids have more cells
_YUNET_STRIDES = (8, 16, 32)
_EYES = {5: (0, 1), 17: (1, 2)}  # by the number of points: of faces, and of whole bodies, where the nose comes first


class Face(NamedTuple):
    """A face in an image, in its pixels; the box may reach over the image's edge."""

    left: float
    top: float
    right: float
    bottom: float
    score: float  # 0..1
    eyes: tuple[tuple[float, float], tuple[float, float]] | None = None  # (x, y) of each, the one further left first


class _Found(NamedTuple):
    """Detected faces, in pixels of the model's input: boxes (N, 4) as left, top, right, bottom; scores (N,)."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    eyes: NDArray[np.float32] | None  # (N, 2, 2): which eye, (x, y)


class FaceModel:
    """An ONNX face detector.

    Raises: UserError: no ONNX model, or one that does not find faces.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._session = open_session(self.path)
        self._input = self._session.get_inputs()[0]
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._is_yunet = all(f"{part}_{s}" in self._outputs for part in ("cls", "obj", "bbox") for s in _YUNET_STRIDES)
        layout = Layout.read(self._session.get_modelmeta().custom_metadata_map, self.path)
        self._layout = layout
        self.finds_eyes = f"kps_{_YUNET_STRIDES[0]}" in self._outputs if self._is_yunet else layout.points in _EYES
        if len(self._input.shape) != 4 or not (self._is_yunet or len(self._outputs) == 1):
            raise UserError(
                f"{self.path}: neither YuNet nor a YOLO model (inputs {self._input.name} {self._input.shape}, "
                f"outputs {', '.join(self._outputs)})"
            )

    def find(self, pixels: NDArray[np.uint8], threshold: float) -> list[Face]:
        """The faces in an RGB image (H, W, 3) that the model is at least so sure of, largest first.

        Raises: UserError: the model does not run, or gives something else than boxes.
        """
        fed, scale = self._prepared(pixels)
        try:
            values = self._session.run(self._outputs, {self._input.name: fed})
        except Exception as error:  # onnxruntime has an error class for every status, without a common one
            raise UserError(f"{self.path}: the model does not run ({first_line(error)})") from None
        arrays = [np.asarray(value, dtype=np.float32) for value in values]
        try:
            if self._is_yunet:
                found = decode_yunet(dict(zip(self._outputs, arrays, strict=True)), Size(fed.shape[3], fed.shape[2]))
            else:
                found = decode_yolo(arrays[0], self._layout)
        except (ValueError, IndexError):
            shapes = ", ".join(str(list(array.shape)) for array in arrays)
            raise UserError(f"{self.path}: its outputs are not those of YuNet or YOLO (shapes {shapes})") from None
        faces = []
        for index in surest(found, threshold):
            left, top, right, bottom = (float(value) / scale for value in found.boxes[index])
            eyes = None
            if found.eyes is not None:
                first, second = sorted((float(x) / scale, float(y) / scale) for x, y in found.eyes[index])
                eyes = (first, second)
            faces.append(Face(left, top, right, bottom, float(found.scores[index]), eyes))
        return sorted(faces, key=lambda face: max(face.right - face.left, face.bottom - face.top), reverse=True)

    def _prepared(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[Any], float]:
        """(what the model is fed, factor from the image's pixels to the model's)."""
        height, width = pixels.shape[:2]
        fixed = [side if isinstance(side, int) and side > 0 else None for side in self._input.shape[2:]]
        limits = [side or _LONGER_SIDE for side in fixed]
        scale = min(limits[0] / height, limits[1] / width)
        resized = Size(max(1, round(width * scale)), max(1, round(height * scale)))
        grid_height, grid_width = (
            side or math.ceil(length / _MULTIPLE) * _MULTIPLE
            for side, length in zip(fixed, (resized.height, resized.width), strict=True)
        )
        canvas = np.full((grid_height, grid_width, 3), 0 if self._is_yunet else _PADDING, np.uint8)
        canvas[: resized.height, : resized.width] = images.resize(pixels, resized)
        planes = canvas[..., ::-1] if self._is_yunet else canvas / np.float32(255)  # YuNet takes blue first, 0 to 255
        kind = np.float16 if self._input.type == "tensor(float16)" else np.float32
        return np.ascontiguousarray(planes.transpose(2, 0, 1)[None], dtype=kind), scale


class Layout(NamedTuple):
    """The output layout of a YOLO model by its metadata, which may be missing."""

    classes: int | None = None
    faces: tuple[int, ...] | None = None  # the classes that are faces; None: all
    points: int = 0  # points per face, such as eyes and the corners of the mouth
    finished: bool = False  # the output is a list of faces, not a grid

    @classmethod
    def read(cls, metadata: Mapping[str, str], path: Path) -> Layout:
        names = _value(metadata, "names", {})
        if isinstance(names, Sequence) and not isinstance(names, str):
            names = dict(enumerate(names))
        if not isinstance(names, Mapping):
            names = {}
        faces = tuple(int(index) for index, name in names.items() if "face" in str(name).lower())
        if names and not faces and (len(names) > 1 or "person" in map(str, names.values())):
            some = ", ".join(map(str, list(names.values())[:5]))
            raise UserError(f"{path}: does not find faces, but {some}{', ...' if len(names) > 5 else ''}")
        shape = _value(metadata, "kpt_shape", [0])
        finished = metadata.get("end2end", "").lower() == "true"
        return cls(len(names) or None, faces or None, int(shape[0]), finished)


def decode_yolo(output: NDArray[np.float32], layout: Layout) -> _Found:
    """The output of any YOLO: (1, N, 4 or 6 + ...) or (1, 4 + ..., N).

    Raises: ValueError: of another shape.
    """
    if output.ndim != 3:
        raise ValueError(output.shape)
    table = output[0]
    rows, columns = table.shape
    if layout.finished or (columns >= 6 and columns <= rows <= _MOST_FINISHED):
        # Models that sort out their boxes: corners, score, class, then the points.
        boxes, scores, classes = table[:, :4], table[:, 4], table[:, 5]
        if layout.faces is not None:
            scores = np.where(np.isin(classes, layout.faces), scores, 0)
        return _Found(boxes, scores, _eyes(table, layout))
    if rows < columns:  # YOLO v8 and later: centre and size, a score for every class, then the points
        table = table.T
        width = rows - 4 - 3 * layout.points
        if width < 1:
            raise ValueError(table.shape)
        scores = table[:, 4 : 4 + (layout.classes or width)]
        return _Found(_corners(table[:, :4]), _chosen(scores, layout), _eyes(table, layout))
    scores = table[:, 5:] * table[:, 4:5]  # YOLO v5: whether there is anything, times what it is
    return _Found(_corners(table[:, :4]), _chosen(scores, layout), None)


def decode_yunet(outputs: Mapping[str, NDArray[np.float32]], size: Size) -> _Found:
    """YuNet's outputs: for each stride of the grid cls, obj (1, N, 1), bbox (1, N, 4), kps (1, N, 10)."""
    boxes, scores, eyes = [], [], []
    for stride in _YUNET_STRIDES:
        rows, columns = np.divmod(np.arange((size.height // stride) * (size.width // stride)), size.width // stride)
        corner = np.stack([columns, rows], axis=-1).astype(np.float32)
        part = {name: outputs[f"{name}_{stride}"].reshape(len(corner), -1) for name in ("cls", "obj", "bbox")}
        scores.append(np.sqrt(part["cls"].clip(0, 1) * part["obj"].clip(0, 1))[:, 0])
        centres = (corner + part["bbox"][:, :2]) * stride
        boxes.append(_corners(np.concatenate([centres, np.exp(part["bbox"][:, 2:4]) * stride], axis=1)))
        if f"kps_{stride}" in outputs:
            points = outputs[f"kps_{stride}"].reshape(len(corner), -1, 2)
            eyes.append((points[:, :2] + corner[:, None]) * stride)
    return _Found(np.concatenate(boxes), np.concatenate(scores), np.concatenate(eyes) if eyes else None)


def _chosen(scores: NDArray[np.float32], layout: Layout) -> NDArray[np.float32]:
    return (scores if layout.faces is None else scores[:, list(layout.faces)]).max(axis=1)


def _eyes(table: NDArray[np.float32], layout: Layout) -> NDArray[np.float32] | None:
    which = _EYES.get(layout.points)
    if which is None:
        return None
    points = table[:, -3 * layout.points :].reshape(len(table), layout.points, 3)  # x, y, how visible
    return points[:, which, :2]


def _corners(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    centres, halves = boxes[:, :2], boxes[:, 2:4] / 2
    return np.concatenate([centres - halves, centres + halves], axis=1)


def surest(found: _Found, threshold: float) -> list[int]:
    """The boxes whose scores reach the threshold, by their numbers; of boxes that overlap much only the surest."""
    order = [int(index) for index in np.argsort(-found.scores, kind="stable") if found.scores[index] >= threshold]
    kept: list[int] = []
    for index in order:
        box, others = found.boxes[index], found.boxes[kept]
        sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
        common = np.maximum(0, sides).prod(axis=1)
        union = np.prod(box[2:] - box[:2]) + (others[:, 2:] - others[:, :2]).prod(axis=1) - common
        if all(overlap < _MOST_OVERLAP for overlap in (common / np.maximum(union, 1e-9)).tolist()):
            kept.append(index)
    return kept


def _value(metadata: Mapping[str, str], key: str, default: Any) -> Any:
    """A value that is written as JSON or as Python writes it."""
    read: tuple[Callable[[str], Any], ...] = (load_json, ast.literal_eval)
    for reader in read:
        try:
            return reader(metadata[key])
        except (KeyError, ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return default
