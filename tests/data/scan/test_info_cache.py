"""`metadata_cache.json` as earlier trainers left it in image folders, and as we write it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from library.data.scan.info_cache import FILE_NAME, Info, read, write
from library.errors import UserError
from library.runtime.logs import LOGGER
from library.types import Size


@pytest.fixture
def put(tmp_path):
    def put(content: bytes | dict) -> Path:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (tmp_path / FILE_NAME).write_bytes(data)
        return tmp_path

    return put


def test_there_is_none(tmp_path):
    assert read(tmp_path) is None
    assert read(tmp_path / "none") is None


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    "key",
    [
        "{folder}/v1.5 猫.png",
        "v1.5 猫.png",
        "train/10_cat/v1.5 猫.png",
        "/elsewhere/v1.5 猫.png",
        "C:\\train\\10_cat\\v1.5 猫.png",
        "D:/train/10_cat\\v1.5 猫.png",
        "10_cat\\v1.5 猫.png",
        "\\\\server\\share\\v1.5 猫.png",
    ],
)
def test_an_image_is_known_by_its_file_name(put, tmp_path, key, mark):
    content = {key.format(folder=tmp_path): {"caption": "one\ntwo", "resolution": [640, 480]}}
    folder = put(mark + json.dumps(content, ensure_ascii=False).encode())
    assert read(folder) == {folder / "v1.5 猫.png": Info("one\ntwo", Size(640, 480))}


def test_sizes_are_sizes(put):
    (info,) = read(put({"a.png": {"caption": "", "resolution": [640, 480]}})).values()
    assert (info.caption, info.size.width, info.size.height) == ("", 640, 480)


def test_an_empty_one_is_not_a_missing_one(put):
    assert read(put({})) == {}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no JSON text in UTF-8"),
        (b'{"a.png": {"caption": "x", "resol', "no JSON text in UTF-8"),
        ('{"猫.png": {}}'.encode("shift_jis"), "no JSON text in UTF-8"),
        (b"[" * 100_000, "no JSON text in UTF-8"),
        (b"[]", "not one object"),
        ({"a.png": "x"}, "'a.png' has no caption and resolution"),
        ({"a.png": {"caption": "x"}}, "'a.png' has no caption and resolution"),
        ({"a.png": {"resolution": [1, 2]}}, "'a.png' has no caption and resolution"),
        ({"a.png": {"caption": None, "resolution": [1, 2]}}, "'a.png' has no caption and resolution"),
        ({"a.png": {"caption": "x", "resolution": [0, 2]}}, "'a.png' has no caption and resolution"),
        ({"a.png": {"caption": "x", "resolution": "1x2"}}, "'a.png' has no caption and resolution"),
    ],
)
def test_a_damaged_one_is_named(put, content, reason):
    folder = put(content)
    with pytest.raises(UserError) as caught:
        read(folder)
    assert caught.value.problems == (f"{folder / FILE_NAME}: damaged ({reason}); delete it, and it is made again",)


def test_one_that_cannot_be_read(tmp_path):
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(UserError, match=rf"{FILE_NAME}: cannot be read \(.+\); delete it"):
        read(tmp_path)


@pytest.mark.rows("R254")
def test_what_is_written_is_read(tmp_path):
    infos = {
        tmp_path / "v1.5 猫.png": Info('a "cat"\n猫, \\', Size(640, 480)),
        tmp_path / "a.JPG": Info("", Size(1, 2)),
    }
    assert write(tmp_path, infos) is True
    assert read(tmp_path) == infos
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.rows("R254")
def test_the_form_of_the_file(tmp_path):
    """Expected: the format sheet; an earlier trainer takes these keys for paths that it can open."""
    write(tmp_path, {tmp_path / "猫.png": Info("a 猫", Size(640, 480))})
    key = json.dumps(str(tmp_path / "猫.png"), ensure_ascii=False)
    assert (tmp_path / FILE_NAME).read_bytes().decode() == (
        f'{{\n  {key}: {{\n    "caption": "a 猫",\n    "resolution": [\n      640,\n      480\n    ]\n  }}\n}}'
    )


@pytest.mark.skipif(os.name == "nt", reason="no such file names here")
@pytest.mark.parametrize("name", ["we\\ird.png", os.fsdecode(b"caf\xe9.png"), "new\nline.png"])
def test_odd_file_names(tmp_path, name):
    infos = {tmp_path / name: Info("x", Size(3, 4))}
    assert write(tmp_path, infos)
    (tmp_path / FILE_NAME).read_bytes().decode("utf-8")
    assert read(tmp_path) == infos


def test_a_folder_that_cannot_be_written(tmp_path, caplog):
    """A folder in the place of the file: permissions would not stop a test that runs as root."""
    (tmp_path / FILE_NAME).mkdir()
    LOGGER.propagate = True
    with caplog.at_level(logging.WARNING, logger=LOGGER.name):
        assert write(tmp_path, {tmp_path / "a.png": Info("x", Size(3, 4))}) is False
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{tmp_path / FILE_NAME}: cannot be written (")
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_an_earlier_file_is_replaced(put, tmp_path):
    put({"old.png": {"caption": "x", "resolution": [1, 2]}})
    assert write(tmp_path, {tmp_path / "new.png": Info("y", Size(3, 4))})
    assert read(tmp_path) == {tmp_path / "new.png": Info("y", Size(3, 4))}
