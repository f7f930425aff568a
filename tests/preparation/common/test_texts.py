from __future__ import annotations

import os

import pytest

from library.errors import UserError
from library.preparation.common.texts import read_lines, read_text, write_text
from library.runtime.durable import replacing

JAPANESE = "青い髪の女の子、ポニーテール"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", ""),
        (b"1girl, solo", "1girl, solo"),
        (JAPANESE.encode("utf-8"), JAPANESE),
        (b"\xef\xbb\xbf1girl", "1girl"),
        ("café".encode(), "café"),
        (b"\xff\xfe" + JAPANESE.encode("utf-16-le"), JAPANESE),
        (b"\xfe\xff" + JAPANESE.encode("utf-16-be"), JAPANESE),
        ("1girl, 青".encode("utf-16-le"), "1girl, 青"),
        ("1girl, 青".encode("utf-16-be"), "1girl, 青"),
        (JAPANESE.encode("cp932"), JAPANESE),
        ("1girl, ポニーテール\r\n".encode("cp932"), "1girl, ポニーテール\r\n"),
    ],
)
def test_the_encoding_is_seen(tmp_path, content, text):
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    assert read_text(file) == text


@pytest.mark.parametrize(
    "content",
    [
        "un café à la crème".encode("cp1252"),  # all Latin letters with accents are something in Shift-JIS, too
        "蓝头发的女孩".encode("gbk"),
        "ポニーテール".encode("euc-jp"),
        "青髪".encode("cp932"),  # without kana nothing tells it from other encodings
        "파란 머리".encode("cp949"),
        b"a\0b\0\0c",
        b"\xff\xfe\x00\xd8",  # half of a character
        b"\xef\xbb\xbf\xff",
        bytes(range(256)),
    ],
)
def test_a_guess_is_refused(tmp_path, content):
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_text(file)
    (line,) = error.value.problems
    assert line.startswith(f"{file}: ")
    assert "save the file as UTF-8" in line


def test_lines(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf\r\n  first line \r\n\r\nsecond\rthird\n \n")
    assert read_lines(file) == "first line\nsecond\nthird"


def test_what_cannot_be_read_or_written_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_text(tmp_path / "none.txt")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(UserError) as error:
        write_text(folder, "x")
    assert str(error.value).startswith(f"{folder}: cannot be written (")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_file_in_the_place_of_a_folder_is_left_alone(tmp_path):
    file = tmp_path / "a.json"
    write_text(file, "before")
    with pytest.raises(UserError, match="cannot be written"):
        write_text(file / "b.json", "x")
    assert file.read_bytes() == b"before"


def test_what_a_killed_run_has_left_is_removed_once_and_what_is_alive_or_foreign_stays(tmp_path):
    for name in (".a.txt.abcd1234.tmp", ".a.png.abcd1234.tmp", ".notes.txt.tmp"):
        (tmp_path / name).write_text("half")
    with replacing(tmp_path / "b.txt") as alive:
        write_text(tmp_path / "a.txt", "a cat\n")
        assert alive.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".a.png.abcd1234.tmp",
        ".notes.txt.tmp",
        "a.txt",
        "b.txt",
    ]
