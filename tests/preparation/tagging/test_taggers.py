"""Finding a tagger's files, and running real (tiny) ONNX models on pixels that numpy prepares again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from library.data.sample.images import read_image
from library.errors import UserError
from library.preparation.tagging.tag_rules import Label
from library.preparation.tagging.tagger_files import TaggerFiles, find_tagger, recognise
from library.preparation.tagging.taggers import open_tagger, probabilities, read_labels, read_pixels, to_input
from tests.builders.onnx_file import write_tagger

pytest.importorskip("onnxruntime")

SIDE = 8
LABELS = 6
TABLE = 'tag_id,name,category,count\n9999999,safe,9,1\n1,explicit,9,1\n2,"a,b",0,9\n3,c,1,9\n4,d,5,9\n5,é,4,9\n'


def weights(seed: int = 0, labels: int = LABELS) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(SIDE * SIDE * 3, labels)).astype(np.float32), rng.normal(size=labels).astype(np.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def write_files(folder: Path, kind: str, shape=("N", SIDE, SIDE, 3), scale: float = 1.0) -> TaggerFiles:
    weight, bias = weights()
    model = {"table": "model.onnx", "mapping": "model_optimized.onnx", "list": "deep.onnx"}[kind]
    write_tagger(folder / model, weight * np.float32(scale), bias, shape, sigmoid=kind != "mapping")
    if kind == "table":
        (folder / "selected_tags.csv").write_text(TABLE, encoding="utf-8")
    elif kind == "mapping":
        names = ["Rating", "General", "Character", "Model", "Artist", "Quality"]
        rows = {str(n): {"tag": f"tag{n}", "category": names[n]} for n in reversed(range(LABELS))}
        (folder / "tag_mapping.json").write_text(json.dumps(rows), encoding="utf-8")
    else:
        (folder / "tags.txt").write_text("a\nb\nc\nmiku\nd\nrating:safe\n", encoding="utf-8")
        (folder / "tags-general.txt").write_text("a\nb\nc\nd\n", encoding="utf-8")
        (folder / "tags-character.txt").write_text("miku\n", encoding="utf-8")
    return find_tagger(str(folder), folder)


def blocks(height: int, width: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A small image, and the same twice as large: shrinking that one by area gives the small one exactly."""
    small = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3)).astype(np.uint8)
    return small, small.repeat(2, axis=0).repeat(2, axis=1)


# ---- files


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.onnx", "selected_tags.csv", "model.safetensors"], ("table", "model.onnx", "selected_tags.csv")),
        (["a.onnx", "model.onnx", "selected_tags.csv"], ("table", "model.onnx", "selected_tags.csv")),
        (
            ["model.onnx", "model_optimized.onnx", "tag_mapping.json"],
            ("mapping", "model_optimized.onnx", "tag_mapping.json"),
        ),
        (["model-resnet_custom_v3.onnx", "tags.txt"], ("list", "model-resnet_custom_v3.onnx", "tags.txt")),
        (["model.onnx"], None),
        (["selected_tags.csv", "saved_model.pb"], None),
    ],
)
def test_the_files_of_a_folder_name_the_kind(names, expected):
    assert recognise(names, "here") == expected


def test_several_models_are_not_guessed_about():
    with pytest.raises(UserError, match=r"a\.onnx, b\.onnx"):
        recognise(["a.onnx", "b.onnx", "tags.txt"], "here")


@pytest.mark.rows("R72", "R79")
def test_each_tagger_has_a_folder_of_its_own(tmp_path):
    for name in ("one", "two"):
        write_files(tmp_path / f"me_{name}", "table")
    assert find_tagger("me/one", tmp_path).folder == tmp_path / "me_one"
    assert find_tagger("me/two", tmp_path).folder == tmp_path / "me_two"


@pytest.mark.parametrize("place", ["me_taggers_v1", "me_taggers_v1/v1"])
def test_a_tagger_in_a_folder_of_a_repository(tmp_path, place):
    write_files(tmp_path / place, "mapping")
    found = find_tagger("me/taggers/v1", tmp_path)
    assert (found.folder, found.kind, found.path.name) == (tmp_path / place, "mapping", "model_optimized.onnx")


@pytest.mark.parametrize("name", ["nowhere", "", "a//b", "../b", "a/.."])
def test_a_name_that_can_be_no_tagger(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name in ("", "a/.."):  # an empty path is the working folder
        with pytest.raises(UserError):
            find_tagger(name, tmp_path)
    else:
        with pytest.raises(UserError, match="neither a local folder nor a name"):
            find_tagger(name, tmp_path)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["saved_model.pb", "selected_tags.csv"], "only a Keras model"),
        (["model.h5", "tags.txt"], "only a Keras model"),
        (["selected_tags.csv"], "no ONNX model"),
        (["model.onnx"], "no selected_tags.csv, tag_mapping.json or tags.txt"),
    ],
)
def test_what_a_folder_lacks_is_reported(tmp_path, names, reason):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=reason) as refused:
        find_tagger(str(tmp_path), tmp_path)
    assert len(refused.value.problems) == 1


def test_a_folder_is_not_fetched_again(tmp_path):
    write_files(tmp_path, "table")
    with pytest.raises(UserError, match=r"--force_download: nothing is downloaded for --repo_id"):
        find_tagger(str(tmp_path), tmp_path, force=True)


def test_without_the_network_the_reason_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"me/absent is not in .* and cannot be downloaded: .*offline") as refused:
        find_tagger("me/absent", tmp_path)
    assert len(refused.value.problems) == 1


def test_a_tagger_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    place, commit = tmp_path / "models--me--cached", "1" * 40
    write_files(place / "snapshots" / commit / "v1", "mapping")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    assert find_tagger("me/cached/v1", tmp_path / "models").folder == place / "snapshots" / commit / "v1"
    with pytest.raises(UserError, match="me/cached cannot be downloaded"):
        find_tagger("me/cached/v1", tmp_path / "models", force=True)
    with pytest.raises(UserError, match="me/cached is not in"):
        find_tagger("me/cached/v2", tmp_path / "models")


# ---- labels


def test_labels_of_a_table(tmp_path):
    (tmp_path / "selected_tags.csv").write_text("\ufeff" + TABLE, encoding="utf-8", newline="\r\n")
    assert read_labels(TaggerFiles("table", tmp_path, "m", "selected_tags.csv")) == (
        Label("safe", "rating"),
        Label("explicit", "rating"),
        Label("a,b", "general"),
        Label("c", "artist"),
        Label("d", "meta"),
        Label("é", "character"),
    )


def test_categories_that_are_not_known_count_as_general_and_are_reported(tmp_path, caplog):
    (tmp_path / "t.csv").write_text("tag_id,name,category,count\n1,a,General,1\n2,b,character,1\n3,c,lore,1\n4,d,7,1\n")
    found = read_labels(TaggerFiles("table", tmp_path, "m", "t.csv"))
    assert found == (Label("a", "general"), Label("b", "character"), Label("c", "general"), Label("d", "general"))
    (message,) = caplog.messages
    assert message.endswith("t.csv: tags of unknown categories are treated as general: lore, 7")


def test_labels_of_a_mapping_are_in_the_order_of_their_numbers(tmp_path):
    files = write_files(tmp_path, "mapping")
    categories = ("rating", "general", "character", "model", "artist", "quality")
    assert read_labels(files) == tuple(Label(f"tag{n}", category) for n, category in enumerate(categories))


def test_labels_of_a_list(tmp_path):
    files = write_files(tmp_path, "list")
    assert [label.category for label in read_labels(files)] == [*["general"] * 3, "character", "general", "rating"]
    (tmp_path / "tags-character.txt").unlink()
    assert [label.category for label in read_labels(files)] == [*["general"] * 5, "rating"]


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        ("table", "selected_tags.csv", b"tag_id,name\n1,a\n"),
        ("table", "selected_tags.csv", b"tag_id,name,category,count\n1\n"),
        ("table", "selected_tags.csv", b"\xff\xfe\x00"),
        ("mapping", "tag_mapping.json", b"[1]"),
        ("mapping", "tag_mapping.json", b"{"),
        ("mapping", "tag_mapping.json", b'{"a": {"tag": "x", "category": "General"}}'),
        ("mapping", "tag_mapping.json", b'{"1": {"tag": "x", "category": "General"}}'),
        ("mapping", "tag_mapping.json", b'{"0": {"tag": "x"}}'),
    ],
)
def test_damaged_labels(tmp_path, kind, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*download the tagger again"):
        read_labels(TaggerFiles(kind, tmp_path, "m", name))


# ---- models


def test_a_damaged_model(tmp_path):
    files = write_files(tmp_path, "table")
    files.path.write_bytes(files.path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read as an ONNX model") as refused:
        open_tagger(files)
    assert len(refused.value.problems) == 1


def test_without_onnx_runtime_one_line_says_so(tmp_path, monkeypatch):
    files = write_files(tmp_path, "table")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install -r requirements/tagging.txt"):
        open_tagger(files)


def test_a_model_of_other_labels(tmp_path):
    files = write_files(tmp_path, "table")
    (tmp_path / "selected_tags.csv").write_text("tag_id,name,category,count\n1,a,0,1\n")
    with pytest.raises(UserError, match=r"6 outputs .* 1 label;"):
        open_tagger(files)


def test_a_model_of_something_else(tmp_path):
    weight, bias = weights()
    files = write_files(tmp_path, "table")
    write_tagger(files.path, weight, bias, ("N", SIDE * SIDE * 3))
    with pytest.raises(UserError, match="no tagger"):
        open_tagger(files)


def test_nothing_is_printed_about_a_gpu_that_is_not_there(tmp_path, capfd):
    open_tagger(write_files(tmp_path, "table"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["table", "mapping"])
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize(("height", "width"), [(SIDE, SIDE), (SIDE // 2, SIDE), (SIDE, SIDE - 3)])
def test_pixels_of_a_square(tmp_path, kind, planes, height, width):
    """Blue first, in the middle of a white square, halved exactly; as bytes, or from -1 to 1."""
    files = write_files(tmp_path, kind, ("N", 3, SIDE, SIDE) if planes else ("N", SIDE, SIDE, 3))
    _, large = blocks(height, width)
    square = np.full((2 * SIDE, 2 * SIDE, 3), 255.0)
    top, left = (2 * SIDE - 2 * height) // 2, (2 * SIDE - 2 * width) // 2
    square[top : top + 2 * height, left : left + 2 * width] = large
    expected = square.reshape(SIDE, 2, SIDE, 2, 3).mean(axis=(1, 3))[..., [2, 1, 0]]
    if kind == "mapping":
        expected = expected / 127.5 - 1
    if planes:
        expected = np.moveaxis(expected, -1, 0)
    given = to_input(large, open_tagger(files))
    assert given.dtype == np.float32
    assert given.flags.c_contiguous
    assert given.shape == expected.shape
    # Half a level is lost where areas are rounded to bytes.
    assert np.abs(given - expected).max() <= 0.5 / (127.5 if kind == "mapping" else 1) + 1e-6


def test_enlarging_is_lanczos(tmp_path):
    small, _ = blocks(SIDE // 2, SIDE // 2)
    expected = np.asarray(Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.LANCZOS))[..., ::-1]
    given = to_input(small, open_tagger(write_files(tmp_path, "table")))
    assert np.array_equal(given, expected.astype(np.float32))


@pytest.mark.parametrize(("height", "width"), [(SIDE, SIDE), (SIDE // 2, SIDE), (SIDE, SIDE // 4)])
def test_pixels_of_a_list(tmp_path, height, width):
    """Red first, from 0 to 1, all of the image in the frame, its edges drawn out."""
    small, large = blocks(height, width)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    rows = np.clip(np.arange(SIDE) - top, 0, height - 1)
    columns = np.clip(np.arange(SIDE) - left, 0, width - 1)
    expected = small[rows][:, columns] / 255
    given = to_input(large, open_tagger(write_files(tmp_path, "list")))
    assert np.abs(given - expected).max() < 1e-6


def test_transparent_parts_are_white(tmp_path):
    small, _ = blocks(SIDE, SIDE)
    alpha = np.zeros((SIDE, SIDE), np.uint8)
    alpha[: SIDE // 2] = 255
    Image.fromarray(np.dstack([small, alpha])).save(tmp_path / "a.png")
    pixels, size = read_pixels(tmp_path / "a.png", open_tagger(write_files(tmp_path / "tagger", "table")))
    assert size == (SIDE, SIDE)
    assert np.array_equal(pixels[: SIDE // 2], small[: SIDE // 2, :, ::-1])
    assert (pixels[SIDE // 2 :] == 255).all()


@pytest.mark.parametrize("shape", [("N", None, None, 3), ("N", 3, None, None)])
@pytest.mark.parametrize(("kind", "side"), [("table", 448), ("list", 512)])
def test_a_model_of_any_size(tmp_path, kind, side, shape):
    files = write_files(tmp_path, kind)
    weight, bias = weights()
    write_tagger(files.path, weight, bias, [part or "free" for part in shape])
    tagger = open_tagger(files)
    assert tagger.size == (side, side)
    assert tagger.planes is (shape[1] == 3)


@pytest.mark.rows("R76")
@pytest.mark.parametrize("kind", ["table", "mapping", "list"])
@pytest.mark.parametrize("batch", ["N", 1, 2, 4])
def test_probabilities(tmp_path, kind, batch):
    """Of three images: at once, one by one, and in batches that have to be filled up."""
    scale = 0.002 if kind == "table" else 0.1
    tagger = open_tagger(write_files(tmp_path, kind, (batch, SIDE, SIDE, 3), scale))
    assert tagger.batch == (None if batch == "N" else batch)
    weight, bias = weights()
    pixels = [to_input(blocks(SIDE, SIDE, seed)[0], tagger) for seed in range(3)]
    expected = sigmoid(np.stack(pixels).reshape(3, -1) @ (weight * np.float32(scale)) + bias)
    given = probabilities(pixels, tagger)
    assert given.dtype == np.float32
    assert np.abs(given - expected).max() < 1e-5
    assert expected.std() > 0.1


def test_opencv_and_we_mean_the_same_by_area(tmp_path):
    """Sizes that do not divide: padded, then shrunk by area."""
    image = np.random.default_rng(3).integers(0, 256, size=(29, 21, 3)).astype(np.uint8)
    square = cv2.copyMakeBorder(image, 0, 0, 4, 4, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    expected = cv2.resize(square, (SIDE, SIDE), interpolation=cv2.INTER_AREA)[..., ::-1]
    given = to_input(image, open_tagger(write_files(tmp_path, "table")))
    assert np.array_equal(given, expected.astype(np.float32))


# ---- large photos


def write_photo(path: Path, width: int, height: int, **how: object) -> None:
    """Shapes of all sizes and grain, as a camera has them; quality 90."""
    rng = np.random.default_rng(7)
    image = rng.normal(127, 3, size=(height, width, 3)).astype(np.float32)
    for columns, strength in ((6, 50), (24, 25), (96, 12)):
        grid = rng.normal(size=(max(2, columns * height // width), columns, 3)) * strength
        image += cv2.resize(grid.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, quality=90, **how)


@pytest.mark.parametrize("kind", ["table", "mapping", "list"])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(2000, 1500), (1401, 1869)])
def test_a_photo_that_is_decoded_small_has_the_same_tags(tmp_path, kind, orientation, size):
    """At half of its size: pixels within 1 of 255 on average, probabilities within 0.01."""
    side = 224
    files = write_files(tmp_path, kind)
    weight = np.random.default_rng(5).normal(size=(side * side * 3, LABELS)).astype(np.float32)
    levels = {"table": 1, "mapping": 127.5, "list": 255}[kind]
    weight *= np.float32(levels * 2e-5)
    write_tagger(files.path, weight, np.zeros(LABELS, np.float32), ("N", side, side, 3), sigmoid=kind != "mapping")
    tagger = open_tagger(files)
    path = tmp_path / "photo.jpg"
    write_photo(path, *size, exif=orientation_exif(orientation))
    whole, reduced = to_input(read_image(path), tagger), read_pixels(path, tagger)
    assert reduced[1] == (size if orientation == 1 else size[::-1])
    difference = np.abs(whole - reduced[0]) * (255 / {"table": 255, "mapping": 2, "list": 1}[kind])
    assert 0 < difference.mean() < 1
    given, expected = (probabilities([pixels], tagger) for pixels in (reduced[0], whole))
    assert np.abs(given - expected).max() < 0.01
    assert expected.std() > 0.02


def orientation_exif(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif
