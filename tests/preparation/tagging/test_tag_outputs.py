"""Tags go beside the images or into one file, and what was there stays where it is to stay."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from library.errors import UserError
from library.options.base import Given, build_options
from library.options.tagging import TaggingOptions
from library.preparation.tagging.tag_outputs import tag_place
from library.runtime.logs import LOGGER
from library.types import Size

SIZE = Size(3, 2)


@pytest.fixture
def images(tmp_path) -> list[Path]:
    return [tmp_path / "a.png", tmp_path / "b.c.png"]


def place_of(images: list[Path], **values):
    given = {name: Given(value, "command line") for name, value in values.items()}
    return tag_place(build_options([TaggingOptions], given).tagging, images)


def said(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.rows("R75")
def test_files_beside_images(tmp_path, images):
    place = place_of(images)
    place.put(images[0], ["x", "é"], SIZE)
    place.put(images[1], [], SIZE)
    place.finish()
    assert (tmp_path / "a.txt").read_bytes() == "x, é\n".encode()
    assert (tmp_path / "b.c.txt").read_bytes() == b"\n"
    assert [place.has(image) for image in [*images, tmp_path / "c.png"]] == [True, True, False]


@pytest.mark.rows("R75")
def test_another_extension_and_separator(tmp_path, images):
    place_of(images, caption_extension=".tags", caption_separator=";").put(images[0], ["x", "y"], SIZE)
    assert (tmp_path / "a.tags").read_bytes() == b"x;y\n"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_tags_are_added_to_files_of_other_programs(tmp_path, images, encoding):
    (tmp_path / "a.txt").write_text("mine,x\r\n", encoding=encoding, newline="")
    place_of(images, append_tags=True).put(images[0], ["x", "y"], SIZE)
    assert (tmp_path / "a.txt").read_bytes() == b"mine,x, y\n"


def test_a_file_that_lacks_nothing_is_not_written(tmp_path, images):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfy , x")
    place_of(images, append_tags=True).put(images[0], ["x", "y"], SIZE)
    assert (tmp_path / "a.txt").read_bytes() == b"\xef\xbb\xbfy , x"


def test_a_file_of_unknown_encoding_stays(tmp_path, images):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="encoding"):
        place_of(images, append_tags=True).put(images[0], ["x"], SIZE)
    assert (tmp_path / "a.txt").read_bytes() == b"caf\xe9"


def test_images_that_share_a_tag_file_are_reported(tmp_path, caplog):
    LOGGER.propagate = True
    with caplog.at_level(logging.WARNING):
        place_of([tmp_path / "a.png", tmp_path / "a.jpg", tmp_path / "b.png"])
    assert caplog.messages == [f"images of the same name share a tag file: {tmp_path / 'a'}"]


@pytest.mark.parametrize(("name", "field"), [("tags.json", "tags"), ("tags.jsonl", "caption")])
def test_tags_are_added_to_one_file(tmp_path, images, name, field):
    target = tmp_path / name
    key = str(images[0])
    before = {field: "mine, x", "other": 1}
    if name.endswith("l"):
        target.write_text(json.dumps({"image_path": key, **before}) + "\n", encoding="utf-8")
    else:
        target.write_text(json.dumps({key: before}), encoding="utf-8")
    for _ in range(2):
        place = place_of(images, output_path=str(target), append_tags=True)
        place.put(images[1], ["z"], SIZE)
        place.put(images[0], ["x", "y"], SIZE)
        place.finish()
        first = {field: "mine, x, y", "other": 1, "image_size": [3, 2]}
        second = {field: "z", "image_size": [3, 2]}
        if name.endswith("l"):
            lines = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
            assert lines == [{"image_path": key, **first}, {"image_path": str(images[1]), **second}]
        else:
            assert list(said(target).items()) == [(key, first), (str(images[1]), second)]


def test_keys_are_full_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = place_of([Path("a.png")], output_path="deep/er/tags.json")
    place.put(Path("a.png"), ["x"], SIZE)
    place.finish()
    assert list(said(tmp_path / "deep" / "er" / "tags.json")) == [os.path.abspath("a.png")]


def test_an_interrupted_run_goes_on(tmp_path, images):
    target = tmp_path / "tags.json"
    place = place_of(images, output_path=str(target), skip_existing=True)
    place.put(images[0], ["x"], SIZE)
    place.interrupted()
    after = place_of(images, output_path=str(target), skip_existing=True)
    assert [after.has(image) for image in images] == [True, False]


def test_an_interrupted_run_leaves_an_earlier_file(tmp_path, images):
    target = tmp_path / "tags.json"
    target.write_text('{"a": {"tags": "x"}}')
    place = place_of(images, output_path=str(target))
    place.put(images[0], ["y"], SIZE)
    place.interrupted()
    assert target.read_text() == '{"a": {"tags": "x"}}'


def test_a_file_that_cannot_be_written_is_reported_before_the_work(tmp_path, images):
    (tmp_path / "folder").write_bytes(b"")
    with pytest.raises(UserError, match=r"--output_path: .* cannot be written"):
        place_of(images, output_path=str(tmp_path / "folder" / "tags.json"))


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_a_name_that_is_no_text(tmp_path):
    image = tmp_path / "\udcff.png"
    with pytest.raises(UserError, match="rename"):
        place_of([image], output_path=str(tmp_path / "tags.json")).put(image, ["x"], SIZE)
