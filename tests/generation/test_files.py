from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from library.errors import UserError
from library.generation.files import Names, name_problem, require_folder, write
from library.generation.parameters import Made, parameters_of, said_in, texts_of
from library.inference.prompts import SamplePrompt, SizeConditions, SourceImage

PROMPT = SamplePrompt("a cat", "ugly, bad", 64, 96, 7, 20, 7.0, "euler_a")
MADE = Made("raw {a|b}", "tiny-sd", [("style", 0.8)], clip_skip=2)


def test_names_are_the_known_ones(tmp_path):
    names = Names(tmp_path, ".png", "20260101120000")
    assert names.timed(3, 99).name == "im_20260101120000_003_99.png"
    assert names.timed(4, 99, "1").name == "im_20260101120000_1004_99.png"
    assert names.sequential(0).name == "im_000001.png"
    assert names.sequential(1, "1").name == "im_1000002.png"


@pytest.mark.rows("R469")
def test_a_name_of_a_prompt_names_the_file(tmp_path):
    names = Names(tmp_path, ".webp", "now")
    assert [names.called(name).name for name in ("cat", "cat.png", "a cat.JPG", "v1.5")] == [
        "cat.webp",
        "cat.png",
        "a cat.jpg",
        "v1.5.webp",
    ]


def test_no_file_is_replaced(tmp_path):
    names = Names(tmp_path, ".png", "now")
    (tmp_path / "cat.png").write_bytes(b"mine")
    (tmp_path / "im_0000041.png").write_bytes(b"mine")
    assert [names.called("cat").name for _ in range(3)] == ["cat_2.png", "cat_3.png", "cat_4.png"]
    assert names.sequential(0).name == "im_000042.png"
    assert (tmp_path / "cat.png").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["", "a/b", "..\\a", "..", "a\0b", "x" * 300])
def test_names_that_are_none(name):
    assert name_problem(name)


def test_the_texts_of_a_file():
    prompt = replace(
        PROMPT,
        negative_scale=2.0,
        sizes=SizeConditions(100, 200, crop_left=3),
        source=SourceImage(Path("a.png")),
        strength=0.5,
    )
    texts = texts_of(prompt, replace(MADE, clip_prompt="c"))
    assert texts.pop("parameters").startswith("a cat <lora:style:0.8>\nNegative prompt: ugly, bad\nSteps: 20, ")
    assert texts == {
        "prompt": "a cat",
        "negative-prompt": "ugly, bad",
        "seed": "7",
        "sampler": "euler_a",
        "steps": "20",
        "scale": "7.0",
        "negative-scale": "2.0",
        "clip-prompt": "c",
        "source-image": "a.png",
        "strength": "0.5",
        "original-width": "100",
        "original-height": "200",
        "crop-left": "3",
        "raw-prompt": "raw {a|b}",
    }


def test_the_line_that_web_interfaces_read():
    expected = (
        "a cat <lora:style:0.8>\nNegative prompt: ugly, bad\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 7, Size: 64x96, Model: tiny-sd, Clip skip: 2"
    )
    assert parameters_of(PROMPT, MADE) == expected
    assert 'Model: "a, b: c"' in parameters_of(PROMPT, Made("", "a, b: c"))
    assert "Negative" not in parameters_of(replace(PROMPT, negative_prompt=""), MADE)


def test_the_line_is_read_back(caplog):
    """As web interfaces write it, too: with settings that are not known here, and samplers by other names."""
    found = said_in(parameters_of(PROMPT, MADE), "a.png")
    assert found == {
        "prompt": "a cat",
        "negative_prompt": "ugly, bad",
        "steps": 20,
        "sampler": "euler_a",
        "scale": 7.0,
        "seed": 7,
    }
    assert "a.png: its networks are not used: lora:style:0.8; give them with --network_weights" in caplog.text
    theirs = (
        "two\nlines <lyco:a:1>\nSteps: 30, Sampler: DPM++ 3M SDE, CFG scale: 5.5, Seed: 12, Size: 8x8, "
        'Lora hashes: "a: 1, Steps: 99", Version: v1.10.1'
    )
    expected = {"prompt": "two\nlines", "negative_prompt": "", "steps": 30, "scale": 5.5, "seed": 12}
    assert said_in(theirs, "a.png") == expected
    assert said_in("Negative prompt: x\nSteps: 3", "") == {"prompt": "", "negative_prompt": "x", "steps": 3}
    assert said_in("a cat", "") == {"prompt": "a cat", "negative_prompt": ""}


def test_png_holds_the_texts(tmp_path):
    write(Image.new("RGB", (8, 8), "red"), tmp_path / "a.png", texts_of(replace(PROMPT, prompt="кот 猫"), MADE))
    with Image.open(tmp_path / "a.png") as read:
        assert read.text["prompt"] == "кот 猫"
        assert read.text["parameters"] == parameters_of(replace(PROMPT, prompt="кот 猫"), MADE)


@pytest.mark.parametrize(("ending", "kind"), [("jpg", "JPEG"), ("webp", "WEBP")])
def test_other_formats_hold_the_line_as_a_comment(tmp_path, ending, kind):
    write(Image.new("RGB", (8, 8), "red"), tmp_path / f"a.{ending}", texts_of(replace(PROMPT, prompt="кот 猫"), MADE))
    with Image.open(tmp_path / f"a.{ending}") as read:
        assert read.format == kind
        comment = read.getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0")
    assert comment[8:].decode("utf-16-be") == parameters_of(replace(PROMPT, prompt="кот 猫"), MADE)


def test_a_folder_that_cannot_be_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--outdir: .*file is no folder"):
        require_folder(tmp_path / "file" / "below", "--outdir")
    require_folder(tmp_path / "new" / "folder", "--outdir")
    assert Names(tmp_path / "new", ".png", "now").sequential(0).name == "im_000001.png"
    assert not (tmp_path / "new").exists()
