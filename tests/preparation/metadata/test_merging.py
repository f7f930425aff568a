from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path

import pytest

from library.data.scan.metadata_files import read_metadata, resolve
from library.errors import UserError
from library.options.parsing import parse_options
from library.preparation.common import texts
from library.preparation.metadata.merging import CAPTION_GROUPS, TAG_GROUPS, keys_of, merge_captions, merge_tags
from library.runtime.logs import LOGGER


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def load(path: Path) -> dict[str, dict]:
    return json.loads(path.read_bytes().decode("utf-8"))


def captions(*line: object):
    return merge_captions(parse_options(CAPTION_GROUPS, [str(part) for part in line]))


def tags(*line: object):
    return merge_tags(parse_options(TAG_GROUPS, [str(part) for part in line]))


@pytest.fixture
def folder(tmp_path) -> Path:
    write(
        tmp_path / "images",
        {
            "b.png": "",
            "b.caption": "a dog\n",
            "b.txt": "dog, outdoors\n",
            "a.v2.JPG": "",
            "a.v2.caption": "\ufeff  ein Mädchen, 女の子 \r\n\r\n a second line\r\n",
            "c.webp": "",
            "c.txt": "1girl",
            "d.txt": "of no image",
        },
    )
    return tmp_path / "images"


@pytest.mark.rows("R92", "R93", "R94", "R95")
def test_captions_and_tags_come_together(folder, tmp_path):
    one, two = tmp_path / "any name.json", tmp_path / "deep" / "other.json"
    outcome = captions(folder, one)
    assert (outcome.done, outcome.skipped, outcome.failed) == (2, 1, {})
    assert load(one) == {"a.v2": {"caption": "ein Mädchen, 女の子\na second line"}, "b": {"caption": "a dog"}}
    outcome = tags(folder, two, "--in_json", one)
    assert (outcome.done, outcome.skipped) == (2, 1)
    assert load(two) == {
        "a.v2": {"caption": "ein Mädchen, 女の子\na second line"},
        "b": {"caption": "a dog", "tags": "dog, outdoors"},
        "c": {"tags": "1girl"},
    }
    assert list(load(two)) == ["a.v2", "b", "c"]
    assert "女の子" in two.read_text(encoding="utf-8")


@pytest.mark.rows("R97")
def test_without_in_json_the_file_that_is_there_is_read(folder, tmp_path):
    file = tmp_path / "meta.json"
    file.write_text('{"z": {"tags": "kept"}, "b": {"image_size": [3, 4], "caption": "old"}}', encoding="utf-8")
    captions(folder, file)
    assert list(load(file)) == ["z", "b", "a.v2"]
    assert load(file)["z"] == {"tags": "kept"}
    assert load(file)["b"] == {"image_size": [3, 4], "caption": "a dog"}


def test_in_json_counts_more_than_the_file_that_is_there(folder, tmp_path):
    file, other = tmp_path / "meta.json", tmp_path / "other.json"
    file.write_text('{"z": {"tags": "kept"}}', encoding="utf-8")
    other.write_text("{}", encoding="utf-8")
    captions(folder, file, "--in_json", other)
    assert list(load(file)) == ["a.v2", "b"]


def test_doing_it_again_changes_no_byte(folder, tmp_path):
    file = tmp_path / "meta.json"
    captions(folder, file)
    tags(folder, file)
    before = file.read_bytes()
    captions(folder, file)
    tags(folder, file)
    assert file.read_bytes() == before
    assert before.endswith(b"}\n")


@pytest.mark.rows("R96")
def test_full_paths_serve_several_folders(folder, tmp_path):
    write(tmp_path / "more", {"b.png": "", "b.caption": "another dog", "sub/b.png": "", "sub/b.caption": "a third"})
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    captions("--full_path", folder, first)
    captions("--full_path", "--recursive", "--in_json", first, tmp_path / "more", second)
    assert load(second) == {
        str(folder / "a.v2.JPG"): {"caption": "ein Mädchen, 女の子\na second line"},
        str(folder / "b.png"): {"caption": "a dog"},
        str(tmp_path / "more" / "b.png"): {"caption": "another dog"},
        str(tmp_path / "more" / "sub" / "b.png"): {"caption": "a third"},
    }


@pytest.mark.parametrize("flags", [["--full_path"], []])
def test_a_path_in_the_metadata_stays_as_it_is_spelt(folder, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    key = os.path.join("images", "..", "images", "b.png")
    file = tmp_path / "meta.json"
    file.write_text(json.dumps({key: {"tags": "x"}}), encoding="utf-8")
    captions(folder, file, *flags)
    assert load(file)[key] == {"tags": "x", "caption": "a dog"}
    assert len(load(file)) == 2


@pytest.mark.parametrize("full_path", [False, True])
def test_training_finds_every_image_by_its_key(tmp_path, full_path):
    names = ["a.png", "a.jpg", "b.c.webp", "d.png"]
    write(tmp_path / "p", {**dict.fromkeys(names, ""), "a.caption": "x", "b.c.caption": "y", "d.caption": "z"})
    file = tmp_path / "meta.json"
    captions(tmp_path / "p", file, *["--full_path"] * full_path)
    entries, problems = resolve(
        read_metadata(file),
        tmp_path / "p",
        lambda folder: dict.fromkeys(os.listdir(folder)),
        file=file,
        separator=",",
        wildcard=False,
    )
    assert problems == []
    assert {entry.image.name: entry.caption for entry in entries} == {
        "a.jpg": "x",
        "a.png": "x",
        "b.c.webp": "y",
        "d.png": "z",
    }


def test_names(tmp_path):
    images = [tmp_path / name for name in ("a.png", "a.jpg", "b.png", "c.png")]
    named = keys_of(images, {"c.png": {}, "b": {}}, full_path=False)
    assert list(named.values()) == ["a.png", "a.jpg", "b", "c.png"]


def test_images_of_faces_share_a_caption(tmp_path):
    write(tmp_path / "p", {"a_10_20_30_40.png": "", "a.caption": "shared"})
    captions(tmp_path / "p", tmp_path / "meta.json")
    assert load(tmp_path / "meta.json") == {"a_10_20_30_40": {"caption": "shared"}}


def test_names_without_a_folder_beside_paths_are_reported(folder, tmp_path, caplog):
    LOGGER.propagate = True
    file = tmp_path / "meta.json"
    file.write_text('{"b": {"tags": "x"}, "elsewhere": {"tags": "y"}}', encoding="utf-8")
    with caplog.at_level(logging.WARNING, LOGGER.name):
        captions(folder, file, "--full_path")
    assert sum("1 name without a folder" in message and "'b'" in message for message in caplog.messages) == 1


def test_missing_and_empty_files_are_counted(folder, tmp_path, caplog):
    LOGGER.propagate = True
    write(folder, {f"{n}.png": "" for n in range(4)} | {"0.caption": " \n"})
    with caplog.at_level(logging.WARNING, LOGGER.name):
        outcome = captions(folder, tmp_path / "meta.json")
    assert (outcome.done, outcome.skipped) == (3, 4)
    assert load(tmp_path / "meta.json")["0"] == {"caption": ""}
    assert "4 of 7 images without a .caption file, left out: 1.png, 2.png, 3.png and 1 more" in caplog.messages
    assert "empty: 1 .caption file" in caplog.messages


def test_a_broken_file_is_named_and_the_rest_is_written(folder, tmp_path):
    (folder / "b.caption").write_bytes("café".encode("cp1252"))
    outcome = captions(folder, tmp_path / "meta.json")
    assert list(outcome.failed) == [folder / "b.png"]
    assert str(folder / "b.caption") in outcome.failed[folder / "b.png"]
    assert list(load(tmp_path / "meta.json")) == ["a.v2"]


def test_where_all_are_broken_nothing_is_written(tmp_path):
    write(tmp_path / "p", {"a.png": ""})
    (tmp_path / "p" / "a.caption").write_bytes(b"\xff")
    outcome = captions(tmp_path / "p", tmp_path / "meta.json")
    assert outcome.status(strict=False) == 1
    assert not (tmp_path / "meta.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_a_name_that_is_no_text_is_refused(tmp_path):
    folder = tmp_path / "p"
    write(folder, {"ok.png": "", "ok.caption": "x"})
    try:
        (folder / "bad\udcff.png").touch()
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    (folder / "bad\udcff.caption").write_text("y", encoding="utf-8")
    outcome = captions(folder, tmp_path / "meta.json")
    assert len(outcome.failed) == 1
    assert load(tmp_path / "meta.json") == {"ok": {"caption": "x"}}


def test_no_text_file_at_all_names_the_ending_that_is_there(folder, tmp_path):
    with pytest.raises(UserError, match=r"none of 3 images .* has a \.cap file .*--caption_extension=\.caption,"):
        captions(folder, tmp_path / "meta.json", "--caption_extension=.cap")
    write(tmp_path / "bare", {"a.png": ""})
    with pytest.raises(UserError) as error:
        tags(tmp_path / "bare", tmp_path / "meta.json")
    assert str(error.value).endswith("with --caption_extension")


def test_json_lines_in_and_out(folder, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"image_path": str(folder / "b.png"), "tags": "t"}) + "\n", encoding="utf-8")
    captions(folder, target, "--in_json", source)
    first, second = target.read_text(encoding="utf-8").splitlines()
    assert json.loads(first) == {"image_path": str(folder / "b.png"), "tags": "t", "caption": "a dog"}
    assert json.loads(second)["image_path"] == "a.v2"
    assert list(read_metadata(target)) == [str(folder / "b.png"), "a.v2"]


def test_a_broken_metadata_file_is_left_as_it_is(folder, tmp_path):
    file = tmp_path / "meta.json"
    file.write_text('{"b": ', encoding="utf-8")
    with pytest.raises(UserError, match="line 1"):
        captions(folder, file)
    assert file.read_text(encoding="utf-8") == '{"b": '


def test_a_full_disk_is_one_line_and_the_earlier_file_is_whole(folder, tmp_path, monkeypatch):
    file = tmp_path / "meta.json"
    captions(folder, file)
    before = file.read_bytes()

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(texts.Path, "write_bytes", full)
    with pytest.raises(UserError) as error:
        tags(folder, file)
    assert error.value.problems == (f"{file}: cannot be written ({os.strerror(errno.ENOSPC)})",)
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "meta.json"]
