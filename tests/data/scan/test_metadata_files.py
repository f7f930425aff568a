"""Metadata files as taggers, merge scripts and people write them, and the images that their keys mean."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from library.data.scan.metadata_files import Entry, as_size, join_caption, read_metadata, resolve
from library.errors import UserError
from library.types import Size

FILE = Path("meta.json")


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def file_names(folder: Path) -> dict[str, None]:
    with os.scandir(folder) as entries:
        return {entry.name: None for entry in entries if entry.is_file()}


def found(entries, image_dir, listing=file_names, *, separator=",", wildcard=False) -> tuple[list[Entry], list[str]]:
    if not isinstance(entries, dict):
        entries = {key: {} for key in entries}
    return resolve(entries, image_dir, listing, file=FILE, separator=separator, wildcard=wildcard)


def problems_of(path: Path) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        read_metadata(path)
    assert all("\n" not in line for line in caught.value.problems)
    return caught.value.problems


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes, name: str = "meta.json") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# ---- reading


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_json_file(write, mark):
    entries = {
        "a": {"caption": "a cat 猫", "tags": "cat", "train_resolution": [512, 448], "image_size": [1000, 900]},
        "/img/b.png": {"tags": None, "caption": "", "rating": 0.5},
        "c": {},
    }
    assert read_metadata(write(mark + json.dumps(entries, ensure_ascii=False).encode())) == entries


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["meta.jsonl", "META.JSONL"])
def test_a_file_of_json_lines(write, mark, name):
    lines = [
        '{"image_path": "a.png", "caption": "one\\ntwo", "image_size": [3, 4]}',
        "",
        '{"file_name": "b.png", "caption": "with \u2028 inside", "tags": "x"}\r',
        '{"image_path": "c.png"}',
    ]
    assert read_metadata(write(mark + "\n".join(lines).encode(), name)) == {
        "a.png": {"caption": "one\ntwo", "image_size": [3, 4]},
        "b.png": {"caption": "with \u2028 inside", "tags": "x"},
        "c.png": {},
    }


@pytest.mark.rows("R513")
def test_width_and_height_of_a_line_count_more_than_its_image_size(write):
    """As the ancestor's text on these files has it."""
    line = '{"image_path": "a.png", "image_size": [3, 4], "width": %s, "height": 6}'
    assert read_metadata(write((line % 5).encode(), "meta.jsonl"))["a.png"]["image_size"] == [5, 6]
    assert read_metadata(write((line % "null").encode(), "meta.jsonl"))["a.png"]["image_size"] == [3, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no images in it; add captions with merge_captions_to_metadata.py"),
        (b" \n", "no images in it"),
        (b"{}", "no images in it"),
        ('{"a": {"caption": "猫"}}'.encode("shift_jis"), "not UTF-8 text (byte 19)"),
        (b"\xef\xbb\xbf\xff", "not UTF-8 text (byte 3)"),
        (b'{\n  "a": {"caption" 1}\n}', "line 2, column 19: the colon after a key is missing"),
        (b"[" * 100_000, "nested too deeply"),
        (b'["a"]', "must hold one object"),
        (b'{"a": "a cat"}', "'a': must be an object such as {\"caption\": "),
        (b'{"a": {"caption": 5}}', "'a': caption must be text, got 5"),
        (b'{"a": {"tags": ["x", "y"]}}', "'a': tags must be text, got ['x', 'y']"),
        (rb'{"a": {"caption": "cut \ud83d"}}', "'a': caption holds an incomplete character"),
        (
            b'{"a": {"image_size": [512]}}',
            "'a': image_size must be [width, height], whole numbers from 1 up, got [512]",
        ),
        (b'{"a": {"image_size": [512, 0]}}', "image_size must be [width, height]"),
        (b'{"a": {"image_size": [512.5, 512]}}', "image_size must be [width, height]"),
        (b'{"a": {"image_size": [true, 512]}}', "image_size must be [width, height]"),
        (b'{"a": {"train_resolution": "512,512"}}', "train_resolution must be [width, height]"),
        (b'{"a": {"caption": "x"}, "b": {}, "a": {"caption": "y"}}', "'a' stands there twice"),
        (b'{"a": {"caption": "x", "caption": "y"}}', "'caption' stands there twice"),
    ],
)
def test_what_is_wrong_with_a_json_file(write, content, message):
    path = write(content)
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}: ")
    assert message in problem


def test_a_key_that_stands_there_twice_and_says_the_same_is_no_problem(write):
    assert read_metadata(write('{"a": {"caption": "x"}, "a": {"caption": "x"}}')) == {"a": {"caption": "x"}}
    lines = '{"image_path": "a", "caption": "x"}\n{"caption": "x", "image_path": "a"}'
    assert read_metadata(write(lines, "meta.jsonl")) == {"a": {"caption": "x"}}


def test_every_wrong_line_is_reported(write):
    path = write(
        '{"image_path": "a", "caption": "x"}\n'
        '{"x": 1, "x": 2}, {"image_path": "b", caption}\n'
        '{"caption": "x"}\n'
        '{"image_path": 7}\n'
        '["c"]\n'
        "\n"
        '{"image_path": "d", "tags": 1, "image_size": [1]}\n'
        '{"image_path": "a", "caption": "y"}\n'
        '{"image_path": "e", "tags": "x", "tags": "y"}\n',
        "meta.jsonl",
    )
    problems = problems_of(path)
    starts = [
        "line 2, column 17: there is more after the end of the value",
        "line 3: no image is named",
        "line 4: no image is named",
        "line 5: must be an object",
        "line 7: tags must be text, got 1",
        "line 7: image_size must be",
        "line 8: 'a' stands there twice",
        "line 9: 'tags' stands there twice",
    ]
    assert len(problems) == len(starts)
    for problem, start in zip(problems, starts, strict=True):
        assert problem.startswith(f"{path}: {start}")


def test_an_empty_file_of_json_lines(write):
    assert "no images in it" in problems_of(write("\n\n", "meta.jsonl"))[0]


def test_json_lines_in_a_json_file_get_a_hint(write):
    with pytest.raises(UserError) as caught:
        read_metadata(write('{"image_path": "a"}\n{"image_path": "b"}'))
    assert caught.value.hint == "one object per line is read from files called .jsonl"


@pytest.mark.parametrize(("count", "last"), [(10, "'9': tags"), (11, "and 1 more"), (500, "and 490 more problems")])
def test_only_the_first_problems_are_shown(write, count, last):
    problems = problems_of(write(json.dumps({str(number): {"tags": 1} for number in range(count)})))
    assert len(problems) == min(count, 11)
    assert "'0': tags" in problems[0]
    assert last in problems[-1]


def test_a_file_that_cannot_be_read(tmp_path):
    (problem,) = problems_of(tmp_path / "none.json")
    assert problem.startswith(f"there is no metadata file {tmp_path / 'none.json'}")
    (tmp_path / "folder.json").mkdir()
    (problem,) = problems_of(tmp_path / "folder.json")
    assert problem.startswith(f"{tmp_path / 'folder.json'}: the metadata file cannot be read (")


@pytest.mark.parametrize(
    ("value", "size"),
    [([3, 4], Size(3, 4)), ((3, 4), None), ([3, 4, 5], None), ([3, -4], None), (None, None), (["3", "4"], None)],
)
def test_as_size(value, size):
    assert as_size(value) == size


# ---- captions


@pytest.mark.rows("R197")
@pytest.mark.parametrize(
    ("caption", "tags", "plain", "wildcard"),
    [
        ("a cat", "cat, sitting", "a cat,cat, sitting", "a cat,cat, sitting"),
        ("a cat", None, "a cat", "a cat"),
        ("a cat", "", "a cat", "a cat"),
        (None, "cat, sitting", "cat, sitting", "cat, sitting"),
        ("", "cat", "cat", "cat"),
        ("  \n", "cat", "cat", "cat"),
        (None, None, "", ""),
        ("", "", "", ""),
        (" a cat \n", "cat\n", "a cat,cat", "a cat,cat"),
        ("one\n\n two\r\nthree", "x, y", "one,x, y", "one,x, y\ntwo,x, y\nthree,x, y"),
        ("\none\ntwo", None, "one", "one\ntwo"),
        ("one\ntwo", "x\ny", "one,x,y", "one,x,y\ntwo,x,y"),
        ("", "x\n\ny", "x,y", "x,y"),
    ],
)
def test_caption_and_tags_become_one(caption, tags, plain, wildcard):
    assert join_caption(caption, tags, ",", wildcard=False) == plain
    assert join_caption(caption, tags, ",", wildcard=True) == wildcard


def test_the_separator_is_used_as_it_is():
    assert join_caption("a cat", "x\ny", "; ", wildcard=True) == "a cat; x; y"


# ---- finding images


@pytest.mark.rows("R197")
def test_what_an_entry_holds(tmp_path):
    folder = touch(tmp_path, "b.png", "a.webp", "c.jpg", "d.jpg")
    entries = {
        "b": {"caption": "one\ntwo", "tags": "x", "image_size": [30, 40], "train_resolution": [64, 128]},
        "a": {"tags": "only tags"},
        "c": {"caption": ""},
        "d": {},
    }
    found_entries, problems = found(entries, folder, separator=" | ", wildcard=True)
    assert problems == []
    assert found_entries == [
        Entry("a", folder / "a.webp", folder / "a", "only tags", True, "only tags", None, None),
        Entry("b", folder / "b.png", folder / "b", "one | x\ntwo | x", True, "x", Size(30, 40), Size(64, 128)),
        Entry("c", folder / "c.jpg", folder / "c", "", True, None, None, None),
        Entry("d", folder / "d.jpg", folder / "d", "", False, None, None, None),
    ]
    assert isinstance(found_entries[1].image_size, Size)


@pytest.mark.parametrize(
    ("key", "file", "stem"),
    [
        ("cat", "cat.png", "cat"),
        ("cat.png", "cat.png", "cat"),
        ("./cat.png", "cat.png", "cat"),
        ("LOUD", "LOUD.PnG", "LOUD"),
        ("LOUD.png", "LOUD.PnG", "LOUD"),
        ("v1.5 image", "v1.5 image.jpg", "v1.5 image"),
        ("v1.5 image.jpg", "v1.5 image.jpg", "v1.5 image"),
        ("frame.png", "frame.png.jpg", "frame.png"),
        ("both.png", "both.png", "both"),
        ("both.jpg", "both.jpg", "both"),
        ("猫 [1]*", "猫 [1]*.webp" if os.name != "nt" else None, "猫 [1]*"),
        ("sub/cat", "sub/cat.webp", "sub/cat"),
        ("sub/cat.webp", "sub/cat.webp", "sub/cat"),
        ("sub\\cat.webp", "sub/cat.webp", "sub/cat"),
        ("C:\\old\\img\\cat.png", "cat.png", "cat"),
        ("D:\\old\\img\\sub\\cat.webp", "sub/cat.webp", "sub/cat"),
        ("D:/old/img/sub\\cat.webp", "sub/cat.webp", "sub/cat"),
        ("\\\\server\\share\\cat.png", "cat.png", "cat"),
        ("/nowhere/img/sub/cat.webp", "sub/cat.webp", "sub/cat"),
        ("/nowhere/img/v1.5 image.jpg", "v1.5 image.jpg", "v1.5 image"),
        ("/nowhere/img/cat", "cat.png", "cat"),
        ("old\\img\\cat", "cat.png", "cat"),
    ],
)
def test_a_key_in_the_folder(tmp_path, key, file, stem):
    if file is None:
        pytest.skip("no such file name here")
    names = ["cat.png", "cat.txt", "LOUD.PnG", "v1.5 image.jpg", "both.png", "both.jpg", "frame.png.jpg"]
    folder = touch(tmp_path / "data", *names, "sub/cat.webp", file)
    entries, problems = found([key], folder)
    assert problems == []
    assert [(entry.key, entry.image, entry.base) for entry in entries] == [(key, folder / file, folder / stem)]


@pytest.mark.skipif(os.name == "nt", reason="a backslash separates here")
def test_a_backslash_may_be_part_of_a_name(tmp_path):
    folder = touch(tmp_path, "we\\ird.png", "ird.png")
    assert [entry.image for entry in found(["we\\ird.png"], folder)[0]] == [folder / "we\\ird.png"]


@pytest.mark.parametrize("image_dir", [None, "other"])
@pytest.mark.parametrize("suffix", ["", ".png"])
def test_a_path_is_used_as_it_stands(tmp_path, monkeypatch, image_dir, suffix):
    """Absolute, and relative to the working directory; even where the folder has a file of the same name."""
    touch(tmp_path, "img/a.png", "other/a.png")
    monkeypatch.chdir(tmp_path)
    folder = image_dir and Path(image_dir)
    assert [entry.image for entry in found([f"img/a{suffix}"], folder)[0]] == [Path("img/a.png")]
    whole = str(tmp_path / "img" / "a")
    assert [entry.image for entry in found([whole + suffix], folder)[0]] == [tmp_path / "img" / "a.png"]


def test_names_are_no_paths_where_there_is_a_folder(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "img/a.png")
    monkeypatch.chdir(tmp_path)
    assert [entry.image for entry in found(["a.png"], Path("img"))[0]] == [Path("img/a.png")]
    assert [entry.image for entry in found(["a.png"], None)[0]] == [Path("a.png")]


@pytest.mark.parametrize(
    ("key", "where"),
    [
        ("dog", "."),
        ("cat.jpg", "."),
        ("cat.txt", "."),
        ("ca", "."),
        ("", "."),
        ("cat.png/", "."),
        ("nul\0/cat.jpg", "."),
        ("sub/only_above.png", "sub"),
        ("C:\\img\\sub\\only_above.png", "sub"),
        ("._cat.png", "."),
    ],
)
def test_a_key_without_an_image(tmp_path, key, where):
    """Not even an image of the same name further up is taken: it would train with another one's caption."""
    folder = touch(tmp_path, "cat.png", "cat.txt", "._cat.png", "only_above.png", "sub/other.png")
    assert found([key], folder) == ([], [f"meta.json: no image for '{key}' in {folder / where}"])


def test_without_a_folder_the_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert found(["a"], None)[1] == [
        "meta.json: no image for 'a' in .; say where the images are with --train_data_dir, or image_dir"
    ]


def test_a_stem_with_several_images_is_not_guessed(tmp_path):
    folder = touch(tmp_path, "a.png", "a.jpg")
    assert found(["a"], folder) == (
        [],
        [f"meta.json: 'a' may be a.jpg or a.png in {folder}; write it with its extension"],
    )


@pytest.mark.parametrize("key", ["v1.5 a", "v1.5 a.png", "/nowhere/v1.5 a.png", "C:\\x\\v1.5 a.png"])
@pytest.mark.parametrize("cache", ["v1.5 a.npz", "v1.5 a_0512x0768_sdxl.npz", "v1.5 a_12000x0768_new_kind.npz"])
def test_latents_alone_are_enough(tmp_path, key, cache):
    folder = touch(tmp_path, cache)
    entries, problems = found({key: {"caption": "x"}}, folder)
    assert problems == []
    assert entries == [Entry(key, None, folder / "v1.5 a", "x", True, None, None, None)]


@pytest.mark.parametrize("other", ["a_te_outputs.npz", "ab.npz", "a_b_0512x0768_x.npz", "a_0512x0768_x.txt", "a.NPY"])
def test_other_files_are_no_latents(tmp_path, other):
    entries, problems = found(["a"], touch(tmp_path, other))
    assert (entries, len(problems)) == ([], 1)


def test_latents_of_a_stem_that_itself_ends_in_a_size(tmp_path):
    folder = touch(tmp_path, "a_512x512_0512x0768_x.npz")
    assert [entry.base for entry in found(["a_512x512"], folder)[0]] == [folder / "a_512x512"]


def test_latents_of_another_image_are_not_taken(tmp_path):
    folder = touch(tmp_path, "a.jpg", "a.npz")
    assert found(["a.png"], folder) == ([], [f"meta.json: no image for 'a.png' in {folder}"])
    assert [entry.image for entry in found(["a"], folder)[0]] == [folder / "a.jpg"]


def test_an_image_here_goes_before_latents_elsewhere(tmp_path):
    folder = touch(tmp_path / "new", "a.png")
    old = touch(tmp_path / "old", "a.npz")
    assert [entry.image for entry in found([str(old / "a.png")], folder)[0]] == [folder / "a.png"]


def test_the_first_of_several_keys_for_one_image_counts(tmp_path):
    folder = touch(tmp_path / "img", "a.png", "b.npz")
    entries = {
        "a.png": {"caption": "first"},
        str(folder / "a.png"): {"caption": "second"},
        "C:\\a": {"caption": "third"},
        str(tmp_path / "img" / ".." / "img" / "a.png"): {"caption": "fourth"},
        "b": {"caption": "latents"},
        "b.png": {"caption": "the same latents"},
    }
    kept, problems = found(entries, folder)
    assert [(entry.key, entry.caption) for entry in kept] == [("a.png", "first"), ("b", "latents")]
    assert problems[0] == (
        f"meta.json: 'a.png' and '{folder / 'a.png'}' are both {folder / 'a.png'}; remove one of them"
    )
    assert [problem.startswith("meta.json: 'a.png' and ") for problem in problems] == [True, True, True, False]
    assert problems[3] == f"meta.json: 'b' and 'b.png' are both {folder / 'b'}; remove one of them"


def test_the_order_does_not_depend_on_the_file(tmp_path):
    names = ["b.png", "a.png", "C.png", "sub/a.png", "sub b/a.png", "a10.png", "a9.png"]
    folder = touch(tmp_path, *names, "only.npz")
    keys = [*names, "only"]
    forward, backward = found(keys, folder)[0], found(reversed(keys), folder)[0]
    assert forward == backward
    assert [entry.image and entry.image.relative_to(folder).as_posix() for entry in forward] == (
        ["C.png", "a.png", "a10.png", "a9.png", "b.png", None, "sub/a.png", "sub b/a.png"]
    )


@pytest.mark.parametrize("key", ["a", "{folder}/a.png"])
def test_a_folder_that_is_not_there(tmp_path, key):
    folder = tmp_path / "none"
    with pytest.raises(UserError, match=r"none: the folder of the images cannot be read \("):
        found([key.format(folder=folder)], folder)


def test_a_folder_that_is_not_needed_need_not_be_there(tmp_path):
    touch(tmp_path, "a.png")
    assert len(found([str(tmp_path / "a.png")], tmp_path / "none")[0]) == 1


@pytest.mark.parametrize("pattern", ["{:06d}", "{:06d}.png", "/nowhere/{:06d}.png", "C:\\elsewhere\\{:06d}.png"])
def test_many_keys_ask_for_one_listing(pattern):
    """The folder does not exist, so that whatever asked the disk for a file would find none."""
    count, listed = 50_000, []
    names = {f"{number:06d}.png": None for number in range(count)}

    def listing(folder: Path) -> dict[str, None]:
        if folder != Path("/nowhere"):
            raise FileNotFoundError(folder)
        listed.append(folder)
        return names

    entries, problems = found([pattern.format(number) for number in range(count)], Path("/nowhere"), listing)
    assert len(entries) == count
    assert problems == []
    assert listed == [Path("/nowhere")]
