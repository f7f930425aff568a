"""Edges of images, the metadata of files, and how results are written."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from library.errors import UserError
from library.options import validation
from library.options.parsing import parse_options
from library.preparation.images import edges, image_files, resizing
from library.preparation.metadata import safetensors_metadata as shown_metadata


def draw_edges(source, target, *arguments):
    return edges.draw_edges(parse_options(edges.GROUPS, [f"--input={source}", f"--output={target}", *arguments]))


def steps():
    """A faint edge at column 20, a strong one at column 40, and a grey ramp."""
    grey = np.full((64, 64), 100, np.uint8)
    grey[:, 20:] += 20
    grey[:, 40:] += 100
    return np.repeat(grey[..., None], 3, axis=2)


def test_edges_are_white_on_black_where_they_are_strong(tmp_path):
    Image.fromarray(steps()).save(tmp_path / "a.png")
    columns = {}
    for low, high in ((32, 224), (10, 50), (300, 900)):
        draw_edges(tmp_path / "a.png", tmp_path / "out.png", f"--thres1={low}", f"--thres2={high}")
        result = np.asarray(Image.open(tmp_path / "out.png"))
        assert set(np.unique(result)) <= {0, 255}
        assert result.shape == (64, 64)
        columns[low] = sorted({int(x) for x in np.argwhere(result == 255)[:, 1]})
    # Sobel's gradient of a step is four times its height: 80 and 400
    assert [len(columns[low]) for low in (32, 10, 300)] == [1, 2, 0]
    assert columns[32][0] in (39, 40)
    assert columns[10][0] in (19, 20)


def test_edges_of_a_folder(tmp_path):
    source, target = tmp_path / "in", tmp_path / "deep" / "out"
    source.mkdir()
    for name in ("a.png", "b.jpg", "b.webp"):
        Image.fromarray(steps()).save(source / name)
    (source / "c.png").write_bytes(b"")
    outcome = draw_edges(source, target)
    assert outcome.done == 2
    assert {path.name for path in outcome.failed} == {"b.webp", "c.png"}
    assert sorted(path.name for path in target.iterdir()) == ["a.png", "b.png"]
    with pytest.raises(UserError, match="would replace the images"):
        draw_edges(source, source)


@pytest.mark.parametrize(
    ("source", "target", "problem"),
    [
        ("missing.png", "out.png", "no such file or folder"),
        ("a.png", "out.txt", "must end in"),
        ("a.png", "out", "must end in"),
        ("a.png", "a.png", "the edges would replace the image"),
        ("a.png", ".", "the edges would replace the image"),
    ],
)
def test_mistakes_with_files(tmp_path, source, target, problem):
    Image.fromarray(steps()).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=problem):
        draw_edges(tmp_path / source, tmp_path / target)


def test_an_image_into_a_folder(tmp_path):
    Image.fromarray(steps()).save(tmp_path / "a.jpg", quality=100)
    (tmp_path / "out").mkdir()
    draw_edges(tmp_path / "a.jpg", tmp_path / "out")
    assert Image.open(tmp_path / "out" / "a.png").size == (64, 64)


@pytest.mark.parametrize(
    ("groups", "arguments", "problems"),
    [
        (edges.GROUPS, [], ["--input is required", "--output is required"]),
        (edges.GROUPS, ["--input=a", "--output=b", "--thres1=-1"], ["--thres1: must be at least 0"]),
        (resizing.GROUPS, ["in", "out", "--max_resolution=512"], ["--max_resolution: must be sizes such as"]),
        (resizing.GROUPS, ["in", "out", "--max_resolution=64x48", "--divisible_by=64"], ["64x48 is smaller than"]),
        (resizing.GROUPS, ["in", "out", "--divisible_by=0"], ["--divisible_by: must be at least 1"]),
    ],
)
def test_mistakes_with_options(groups, arguments, problems):
    told = validation.problems(parse_options(groups, arguments), None)
    assert len(told) == len(problems)
    for line, problem in zip(told, problems, strict=True):
        assert problem in line


def write_header(path, metadata):
    header = json.dumps({} if metadata is None else {"__metadata__": metadata}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def show(path):
    shown_metadata.show_metadata(parse_options(shown_metadata.GROUPS, [f"--model={path}"]))


def test_metadata_is_sorted_and_readable(tmp_path, capsys):
    metadata = {"ss_tag_frequency": '{"猫": 3}', "modelspec.title": "Ünï 😀", "a": "line\nbreak"}
    write_header(tmp_path / "lora.safetensors", metadata)
    show(tmp_path / "lora.safetensors")
    shown = capsys.readouterr().out
    assert json.loads(shown) == metadata
    assert shown.splitlines()[1:4] == [
        r'    "a": "line\nbreak",',
        '    "modelspec.title": "Ünï 😀",',
        r'    "ss_tag_frequency": "{\"猫\": 3}"',
    ]


def test_metadata_of_a_file_of_any_name_and_of_none(tmp_path, capsys):
    write_header(tmp_path / "0a1b2c", {"a": "b"})
    show(tmp_path / "0a1b2c")
    assert json.loads(capsys.readouterr().out) == {"a": "b"}
    torch.save({"a": torch.ones(1)}, tmp_path / "lora.pt")
    with pytest.raises(UserError, match=r"lora\.pt: this is a torch file; only safetensors files have metadata"):
        show(tmp_path / "lora.pt")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_metadata_on_any_console(encoding):
    metadata = {"title": "é猫", "broken": "\ud800"}
    text = shown_metadata.as_json(metadata, encoding)
    assert json.loads(text.encode(encoding).decode(encoding)) == metadata
    assert ("é" in shown_metadata.as_json({"title": "é"}, encoding)) == (encoding != "ascii")


def test_a_file_without_metadata(tmp_path, capsys, caplog, console):
    write_header(tmp_path / "model.safetensors", None)
    with caplog.at_level("WARNING"):
        show(tmp_path / "model.safetensors")
    assert capsys.readouterr().out == "{}\n"
    assert "has no metadata" in caplog.text


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".webp", ".bmp", ".jpg", ".JPEG"])
def test_what_is_written_is_close_to_what_was_drawn(tmp_path, suffix):
    y, x = np.mgrid[0:48, 0:64]
    pixels = np.stack([x * 4, y * 5, (x + y) * 2], axis=-1).astype(np.uint8)
    path = tmp_path / f"a{suffix}"
    image_files.write_file(path, image_files.encoded(pixels, suffix))
    difference = np.abs(np.asarray(Image.open(path).convert("RGB")).astype(int) - pixels)
    assert difference.max() <= (3 if suffix.lower() in (".jpg", ".jpeg") else 0)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_kinds_that_are_only_read_become_png():
    assert [image_files.writable_suffix(suffix) for suffix in (".avif", ".jxl", ".JPG", ".webp")] == [
        *(".png", ".png", ".JPG", ".webp")
    ]


def test_sides_that_a_kind_of_file_cannot_have():
    with pytest.raises(ValueError, match=r"70000x1 pixels cannot be written as \.jpg"):
        image_files.encoded(np.zeros((1, 70000, 3), np.uint8), ".jpg")


@pytest.mark.skipif(sys.platform == "win32", reason="folders there cannot be made read-only this way")
def test_a_place_where_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="the folder cannot be made"):
        image_files.make_folder(tmp_path / "file" / "out")
