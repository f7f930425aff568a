"""Faces found by real ONNX models, of every kind that is read; OpenCV's own reader of YuNet is the witness."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from library.errors import UserError
from library.preparation.images.face_models import Face, FaceModel, Layout, decode_yolo, surest
from library.types import Size
from tests.builders import face_models as build
from tests.builders.onnx_file import write_tagger


def drawing(size: Size, *faces, colour=build.FACE):
    """White, with a filled square (left, top, side) for each face."""
    pixels = np.full((size.height, size.width, 3), 255, np.uint8)
    for left, top, side in faces:
        pixels[top : top + side, left : left + side] = colour
    return pixels


def boxes(faces: list[Face]) -> list[tuple[float, ...]]:
    return [tuple(round(value, 3) for value in face[:4]) for face in faces]


KINDS = {
    "v8": lambda path: build.write_yolo8(path),
    "v8 of any size": lambda path: build.write_yolo8(path, size="any"),
    "v8 with eyes": lambda path: build.write_yolo8(path, eyes=(-0.2, 0, 0.2, 0)),
    "v8 of faces and hands": lambda path: build.write_yolo8(path, names="{0: 'Face'}"),
    "v5": lambda path: build.write_yolo5(path, cell=16),
    "v5 with names": lambda path: build.write_yolo5(path, cell=16, names="['anime_face']"),
    "v10": lambda path: build.write_yolo10(path),
    "v10 that says so": lambda path: build.write_yolo10(path, end2end="True", names='{"0": "face"}'),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_yolo(tmp_path, kind):
    path = tmp_path / "model.onnx"
    KINDS[kind](path)
    side = 16 if kind.startswith("v5") else 64
    image = drawing(Size(640, 448), (4 * side, side, side), (0, 0, side))
    faces = FaceModel(path).find(image, 0.9)
    assert sorted(boxes(faces)) == [(0, 0, side, side), (4 * side, side, 5 * side, 2 * side)]
    assert all(abs(face.score - 1) < 1e-3 for face in faces)


@pytest.mark.parametrize("scale", [0.5, 2, 5])
@pytest.mark.parametrize("size", [640, "any"])
def test_boxes_are_in_pixels_of_the_image(tmp_path, size, scale):
    build.write_yolo8(tmp_path / "model.onnx", size=size, eyes=(-0.25, -0.125, 0.25, 0.125))
    side = int(64 * scale)
    image = drawing(Size(10 * side, 6 * side), (3 * side, 2 * side, side))
    (face,) = FaceModel(tmp_path / "model.onnx").find(image, 0.9)
    assert np.allclose(face[:4], np.array([3, 2, 4, 3]) * side)
    assert face.eyes is not None
    assert np.allclose(face.eyes, np.array([[3.25, 2.375], [3.75, 2.625]]) * side)


def test_how_sure_and_how_large(tmp_path):
    build.write_yolo8(tmp_path / "model.onnx")
    model = FaceModel(tmp_path / "model.onnx")
    image = drawing(Size(640, 640), (0, 0, 64))
    image[128:192, 128:192] = (255, 128, 51)  # 0.8 of orange
    assert [round(face.score, 2) for face in model.find(image, 0.75)] == [1, 0.8]
    assert len(model.find(image, 0.85)) == 1
    assert model.find(drawing(Size(640, 640)), 0.05) == []


def test_eyes_come_from_the_left_to_the_right(tmp_path):
    build.write_yolo8(tmp_path / "model.onnx", eyes=(0.25, 0, -0.25, 0.25))
    (face,) = FaceModel(tmp_path / "model.onnx").find(drawing(Size(640, 640), (64, 64, 64)), 0.5)
    assert np.allclose(face.eyes, [(80, 112), (112, 96)])


@pytest.mark.parametrize("shift", [0, 8, 20])
def test_yunet_as_opencv_reads_it(tmp_path, shift):
    build.write_yunet(tmp_path / "model.onnx", 320)
    pixels = drawing(Size(320, 320), (96 + shift, 160, 32), (32, 32, 30))
    opencv = cv2.FaceDetectorYN.create(str(tmp_path / "model.onnx"), "", (320, 320), 0.3, 0.45)
    _, wanted = opencv.detect(np.ascontiguousarray(pixels[..., ::-1]))
    found = FaceModel(tmp_path / "model.onnx").find(pixels, 0.3)
    assert len(found) == len(wanted) >= 2
    for face, row in zip(sorted(found), sorted(wanted.tolist()), strict=True):
        left, top, width, height, *points, score = row
        assert np.allclose(face[:4], (left, top, left + width, top + height), atol=1e-2)
        assert np.allclose(face.eyes, np.reshape(points[:4], (2, 2)), atol=1e-2)
        assert face.score == pytest.approx(score, abs=1e-4)


def test_overlapping_boxes_are_one_face():
    rows = [[50, 50, 40, 40, 0.8], [52, 50, 40, 40, 0.9], [90, 50, 40, 40, 0.7]]
    table = np.array([*rows, *[[0, 0, 1, 1, 0]] * 20], np.float32).T[None]
    found = decode_yolo(table, Layout())
    assert surest(found, 0.5) == [1, 2]


def test_only_classes_that_are_faces_count():
    scores = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
    grid = np.zeros((20, 6), np.float32)
    grid[:2, 4:] = scores
    layout = Layout(classes=2, faces=(1,))
    assert decode_yolo(grid.T[None], layout).scores[:2].tolist() == pytest.approx([0.1, 0.8])
    listed = np.zeros((20, 6), np.float32)
    listed[:2, 4:] = [[0.9, 0], [0.8, 1]]
    assert decode_yolo(listed[None], layout).scores[:2].tolist() == pytest.approx([0, 0.8])
    older = np.zeros((2000, 7), np.float32)
    older[0, 4:] = [0.5, 1, 0.4]
    assert decode_yolo(older[None], layout).scores[0] == pytest.approx(0.2)


def test_whether_a_model_finds_eyes(tmp_path):
    build.write_yunet(tmp_path / "yunet.onnx", 320)
    build.write_yunet(tmp_path / "boxes.onnx", 320, with_points=False)
    build.write_yolo8(tmp_path / "yolo.onnx")
    build.write_yolo8(tmp_path / "points.onnx", eyes=(-0.2, 0, 0.2, 0))
    finds = {path.stem: FaceModel(path).finds_eyes for path in tmp_path.iterdir()}
    assert finds == {"yunet": True, "boxes": False, "yolo": False, "points": True}


def test_models_that_find_something_else(tmp_path):
    path = tmp_path / "model.onnx"
    build.write_yolo8(path, names="{0: 'person', 1: 'bicycle', 2: 'car'}")
    with pytest.raises(UserError, match=r"model\.onnx: does not find faces, but person, bicycle, car$"):
        FaceModel(path)
    write_tagger(path, np.zeros((12, 3), np.float32), np.zeros(3, np.float32), ("n", 12))
    with pytest.raises(UserError, match="neither YuNet nor a YOLO"):
        FaceModel(path)
    write_tagger(path, np.zeros((3 * 8 * 8, 7), np.float32), np.zeros(7, np.float32), ("n", 3, 8, 8))
    with pytest.raises(UserError, match=r"its outputs are not those of YuNet or YOLO \(shapes \[1, 7\]\)"):
        FaceModel(path).find(drawing(Size(64, 64)), 0.5)
    write_tagger(path, np.zeros((8 * 8 * 3, 7), np.float32), np.zeros(7, np.float32), ("n", 8, 8, 3))
    with pytest.raises(UserError, match="the model does not run"):
        FaceModel(path).find(drawing(Size(64, 64)), 0.5)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x08" * 100])
def test_files_that_are_no_models(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as an ONNX model"):
        FaceModel(tmp_path / "model.onnx")
    with pytest.raises(UserError, match="no such file"):
        FaceModel(tmp_path / "missing.onnx")
