"""From a face's box to a result: where the cut lies, how large it is, how it is turned, and what it is called."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from library.data.sample.images import FaceBox, face_box
from library.errors import UserError
from library.options import validation
from library.options.parsing import parse_options
from library.preparation.images import image_files
from library.preparation.images.face_models import Face
from library.preparation.images.faces import GROUPS, Framing, box_of, cut_faces, frame, result_name, tilt, turning
from library.types import Size
from tests.builders import face_models as build

WHOLE = Framing()


@pytest.mark.parametrize(
    ("face", "box"),
    [
        ((10, 20, 30, 60), (20, 40, 20, 40)),
        ((10.4, 20.4, 30.9, 61.0), (21, 41, 21, 41)),
        ((-10, -20, 30, 60), (15, 30, 30, 60)),  # reaches over the left and upper edge
        ((90, 150, 120, 260), (95, 175, 10, 50)),
    ],
)
def test_box_inside_the_image(face, box):
    assert box_of(Face(*face, score=1), Size(100, 200)) == box


# size, face (cx, cy, w, h), framing -> resized, left, top, size of the result, face in the result
@pytest.mark.parametrize(
    ("size", "face", "framing", "resized", "corner", "to", "placed"),
    [
        ((800, 600), (200, 300, 80, 100), WHOLE, (800, 600), (0, 0), (800, 600), (200, 300, 80, 100)),
        # cut from the image as it is, the face in the middle, or near it at an edge
        (
            *((800, 600), (400, 300, 80, 100), Framing(pixels=Size(256, 128))),
            *((800, 600), (272, 236), (256, 128), (128, 64, 80, 100)),
        ),
        (
            *((800, 600), (50, 590, 80, 100), Framing(pixels=Size(256, 128))),
            *((800, 600), (0, 472), (256, 128), (50, 118, 80, 100)),
        ),
        (
            *((800, 600), (799, 5, 80, 100), Framing(pixels=Size(256, 128))),
            *((800, 600), (544, 0), (256, 128), (255, 5, 80, 100)),
        ),
        # an image smaller than the cut is enlarged
        (
            *((400, 300), (200, 150, 80, 100), Framing(pixels=Size(600, 600))),
            *((800, 600), (100, 0), (600, 600), (300, 300, 160, 200)),
        ),
        # --resize_fit: all of the shorter side
        (
            *((800, 600), (400, 300, 80, 100), Framing(pixels=Size(300, 300), fit=True)),
            *((400, 300), (50, 0), (300, 300), (150, 150, 40, 50)),
        ),
        (
            *((600, 800), (100, 400, 80, 100), Framing(pixels=Size(300, 300), fit=True)),
            *((300, 400), (0, 50), (300, 300), (50, 150, 40, 50)),
        ),
        # rounding must not make the image smaller than the cut: 333 * 512 / 999 = 170.67, 999 -> 512
        (
            *((333, 999), (100, 500, 80, 100), Framing(pixels=Size(171, 512), fit=True)),
            *((171, 513), (0, 1), (171, 512), (51, 256, 41, 51)),
        ),
        # --resize_face_size, by the longer side of the face
        (
            *((800, 600), (400, 300, 80, 100), Framing(face_side=50)),
            *((400, 300), (0, 0), (400, 300), (200, 150, 40, 50)),
        ),
        (
            *((800, 600), (400, 300, 80, 100), Framing(face_side=200, pixels=Size(512, 512))),
            *((1600, 1200), (544, 344), (512, 512), (256, 256, 160, 200)),
        ),
        # unless the image would then be smaller than the cut
        (
            *((800, 600), (400, 300, 80, 100), Framing(face_side=10, pixels=Size(300, 300))),
            *((400, 300), (50, 0), (300, 300), (150, 150, 40, 50)),
        ),
        # --crop_ratio: never resized, and no larger than the image
        (
            *((800, 600), (400, 300, 80, 100), Framing(times=(3, 4.5))),
            *((800, 600), (250, 75), (300, 450), (150, 225, 80, 100)),
        ),
        (
            *((800, 600), (400, 200, 80, 100), Framing(times=(3, 9))),
            *((800, 600), (250, 0), (300, 600), (150, 200, 80, 100)),
        ),
        ((800, 600), (5, 5, 0, 0), Framing(times=(0.1, 0.1)), (800, 600), (5, 5), (1, 1), (0, 0, 0, 0)),
    ],
)
def test_framing(size, face, framing, resized, corner, to, placed):
    cut, found = frame(Size(*size), FaceBox(*face), framing)
    assert (cut.resized, (cut.left, cut.top), cut.to) == (resized, corner, to)
    assert found == placed
    assert cut.left + cut.to.width <= cut.resized.width
    assert cut.top + cut.to.height <= cut.resized.height


@pytest.mark.parametrize(
    ("eyes", "degrees"),
    [
        (((0, 0), (10, 0)), 0),
        (((0, 0), (10, 10)), 45),
        (((0, 10), (10, 0)), -45),
        (((5, 0), (5, 10)), 90),
        (((100, 50), (110, 50 + 10 / math.sqrt(3))), 30),
    ],
)
def test_turning_makes_the_eyes_level(eyes, degrees):
    assert tilt(eyes) == pytest.approx(degrees)
    centre = (30.0, 40.0)
    matrix = turning(centre, tilt(eyes))
    assert np.allclose(matrix @ (*centre, 1), centre)
    (left, top), (right, bottom) = (matrix @ (*eye, 1) for eye in eyes)
    assert top == pytest.approx(bottom)
    assert right - left == pytest.approx(math.dist(*eyes))  # the left eye stays at the left


@pytest.mark.parametrize("stem", ["a", "a_b", "猫 1", "a_1_2_3_4", "a.b"])
def test_names_are_read_by_training(tmp_path, stem):
    box = FaceBox(256, 7, 80, 12345)
    name = result_name(stem, box, ".png")
    assert name == f"{stem}_0256_0007_0080_12345.png"
    assert face_box(tmp_path / name) == box


# ---- whole images, with a model that finds orange squares of 64 pixels


@pytest.fixture
def work(tmp_path):
    (tmp_path / "in").mkdir()
    build.write_yolo8(tmp_path / "model.onnx")

    def run(*arguments, model="model.onnx"):
        places = [f"--src_dir={tmp_path / 'in'}", f"--dst_dir={tmp_path / 'out'}", f"--model={tmp_path / model}"]
        opts = parse_options(GROUPS, [*places, *arguments])
        assert validation.problems(opts, None) == []
        return cut_faces(opts)

    run.source, run.target = tmp_path / "in", tmp_path / "out"
    return run


def draw(path, *faces, size=(640, 640)):
    pixels = np.full((size[1], size[0], 3), 200, np.uint8)
    for left, top, width, height in faces:
        pixels[top : top + height, left : left + width] = build.FACE
    Image.fromarray(pixels).save(path)


def results(work):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(work.target.iterdir())}


def test_the_largest_face_or_all_of_them(work, tmp_path):
    draw(work.source / "one.png", (192, 128, 64, 64))
    draw(work.source / "two.png", (0, 0, 64, 64), (320, 320, 64, 64))
    draw(work.source / "none.png")
    outcome = work("--crop_size=128,128")
    assert (outcome.done, outcome.skipped) == (2, 1)
    found = results(work)
    assert sorted(found) == ["one_0064_0064_0064_0064.png", "two_0032_0032_0064_0064.png"]
    assert (found["one_0064_0064_0064_0064.png"][32:96, 32:96] == build.FACE).all()
    assert (found["one_0064_0064_0064_0064.png"][:32] == 200).all()
    assert (found["two_0032_0032_0064_0064.png"][:64, :64] == build.FACE).all()

    work("--crop_size=128,128", "--multiple_faces")
    assert sorted(results(work)) == [*sorted(found), "two_0064_0064_0064_0064.png"]


def test_faces_at_one_place_of_their_cuts_have_names_of_their_own(work):
    draw(work.source / "two.png", (128, 128, 64, 64), (320, 320, 64, 64))
    work("--crop_size=128,128", "--multiple_faces")
    assert sorted(results(work)) == ["two_0064_0064_0064_0064.png", "two_2_0064_0064_0064_0064.png"]


@pytest.mark.parametrize(
    ("arguments", "finds"),
    [(["--min_size=64"], 1), (["--min_size=65"], 0), (["--max_size=64"], 0), (["--max_size=65"], 1)],
)
def test_smallest_and_largest_faces(work, arguments, finds):
    draw(work.source / "a.png", (192, 128, 64, 64))
    assert work(*arguments).done == finds
    assert len(results(work)) == finds


def test_how_sure_the_model_must_be(work, caplog, console):
    draw(work.source / "a.png", (192, 128, 64, 48))  # three quarters of the cell
    with caplog.at_level("INFO"):
        assert work().done == 0
    assert "no face (the model's surest guess has 0." in caplog.text
    assert work("--score_threshold=0.65").done == 1


def test_rotation(work, tmp_path):
    build.write_yolo8(tmp_path / "eyes.onnx", eyes=(-0.25, -0.125, 0.25, 0.125))
    pixels = np.full((640, 640, 3), 255, np.uint8)
    pixels[256:320, 256:320] = build.FACE
    for x, y in ((272, 280), (304, 296)):  # where the model sees the eyes: a quarter of a cell from the middle
        pixels[y - 2 : y + 3, x - 2 : x + 3] = (255, 128, 15)
    pixels[280:297, 100:200] = 0  # a bar beside the face
    Image.fromarray(pixels).save(work.source / "a.png")
    work("--rotate", "--crop_size=64,64", "--score_threshold=0.8", model="eyes.onnx")
    (result,) = results(work).values()
    eyes = np.argwhere(np.abs(result.astype(int) - (255, 128, 15)).max(axis=-1) < 4)
    (top, left), (bottom, right) = eyes.min(axis=0), eyes.max(axis=0)
    assert abs((top + bottom) / 2 - 32) <= 1
    assert abs((left + right) / 2 - 32) <= 1
    assert bottom - top < 8  # untilted they would be 21 rows from first to last
    assert right - left > 32

    draw(work.source / "a.png", (192, 128, 64, 64))
    with pytest.raises(UserError, match=r"--rotate needs a model that finds eyes, as YuNet does; .*finds boxes only"):
        work("--rotate")


def test_debug_draws_the_box_and_the_eyes(work, tmp_path):
    build.write_yolo8(tmp_path / "eyes.onnx", eyes=(-0.25, 0, 0.25, 0))
    draw(work.source / "a.png", (192, 128, 64, 64))
    work("--debug", model="eyes.onnx")
    (result,) = results(work).values()
    red = np.argwhere((result == (255, 0, 0)).all(axis=-1))
    assert red.min(axis=0).tolist() == pytest.approx([128, 192], abs=2)
    assert red.max(axis=0).tolist() == pytest.approx([192, 256], abs=2)
    assert result[160, 208].tolist() == result[160, 240].tolist() == [0, 0, 255]
    assert result[160, 224].tolist() == list(build.FACE)


def test_kinds_of_files(work):
    for name in ("a.png", "b.JPG", "c.webp", "d.bmp"):
        draw(work.source / name, (192, 128, 64, 64))
    (work.source / "e.jpg").write_bytes(b"")
    outcome = work("--crop_ratio=2,2")
    assert outcome.done == 4
    assert [(path.name, reason) for path, reason in outcome.failed.items()] == [("e.jpg", "the file is empty")]
    place = "0064_0064_0064_0064"
    assert sorted(results(work)) == [f"a_{place}.png", f"b_{place}.JPG", f"c_{place}.webp", f"d_{place}.bmp"]
    for result in results(work).values():
        assert result.shape == (128, 128, 3)
        assert np.abs(result[40:88, 40:88].astype(int) - build.FACE).max() <= 4


def test_images_that_would_become_too_large(work, tmp_path):
    """They are named before anything is enlarged; so are those that OpenCV cannot turn."""
    build.write_yolo8(tmp_path / "eyes.onnx", eyes=(-0.25, 0, 0.25, 0.1))
    draw(work.source / "a.png", (192, 128, 64, 64))
    outcome = work("--resize_face_size=5000")
    assert list(outcome.failed.values()) == [
        "for its face of 64 pixels it would become 50000x50000; leave out such faces with --min_size"
    ]
    (work.source / "a.png").unlink()
    draw(work.source / "long.png", (0, 0, 33000, 4), size=(33000, 4))
    outcome = work("--rotate", "--score_threshold=0.01", model="eyes.onnx")
    assert list(outcome.failed.values()) == ["33000x4 is too long for --rotate, which takes 32766 pixels at most"]
    assert work("--score_threshold=0.01", model="eyes.onnx").done == 1


def test_a_second_run_goes_on_where_the_first_one_ended(work):
    for name in ("a.png", "b.png", "a_2.png"):
        draw(work.source / name, (192, 128, 64, 64))
    work()
    (work.target / "a_0224_0160_0064_0064.png").write_bytes(b"mine")
    (work.target / "b_0224_0160_0064_0064.png").unlink()
    outcome = work("--skip_existing")
    assert (outcome.done, outcome.skipped) == (1, 2)
    assert (work.target / "a_0224_0160_0064_0064.png").read_bytes() == b"mine"
    assert (work.target / "b_0224_0160_0064_0064.png").exists()


def test_a_full_disk_ends_the_run(work, monkeypatch):
    draw(work.source / "a.png", (192, 128, 64, 64))

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_files, "replacing", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        work()


def test_results_need_a_folder_of_their_own(work):
    draw(work.source / "a.png")
    with pytest.raises(UserError, match="another folder for the results"):
        work(f"--dst_dir={work.source}")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "--model is required"),
        (["--crop_size=512"], "--crop_size: must be width,height in pixels, got '512'"),
        (["--crop_size=512,0"], "--crop_size: must be above 0"),
        (["--crop_ratio=3"], "--crop_ratio: must be two numbers such as 3,4, got '3'"),
        (["--crop_ratio=3,nan"], "--crop_ratio: must be above 0"),
        (["--crop_ratio=3,4", "--crop_size=512,512"], "--crop_size and --crop_ratio exclude each other"),
        (["--crop_ratio=3,4", "--resize_face_size=64"], "--crop_ratio keeps the size of images"),
        (["--resize_fit"], "--resize_fit needs --crop_size"),
        (["--resize_fit", "--crop_size=64,64", "--resize_face_size=64"], "exclude each other"),
        (["--min_size=64", "--max_size=64"], "--min_size must be smaller than --max_size"),
        (["--score_threshold=0"], "--score_threshold: must be above 0"),
    ],
)
def test_mistakes(arguments, problem):
    opts = parse_options(GROUPS, ["--src_dir=in", "--dst_dir=out", *arguments])
    assert [line for line in validation.problems(opts, None) if problem in line]


def test_what_is_missing():
    told = validation.problems(parse_options(GROUPS, []), None)
    assert [line.split()[0] for line in told] == ["--src_dir", "--dst_dir", "--model"]
