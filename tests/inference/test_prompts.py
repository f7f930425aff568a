from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from library.errors import UserError
from library.inference.prompts import ControlImage, SamplePrompt, default_prompt, load_prompts, parse_prompt
from library.registry import FAMILIES
from library.runtime.logs import LOGGER

C94 = (
    "masterpiece, best quality, (1girl), in white shirts, upper body, looking at viewer, simple background "
    "--n low quality, worst quality, bad anatomy,bad composition, poor, low effort --w 768 --h 768 --d 1 --l 7.5 --s 28"
)
C95 = (
    "masterpiece, best quality, 1boy, in business suit, standing at street, looking back "
    "--n (low quality, worst quality), bad anatomy,bad composition, poor, low effort "
    "--w 576 --h 832 --d 2 --l 5.5 --s 40"
)
BOTH = [
    SamplePrompt(
        prompt="masterpiece, best quality, (1girl), in white shirts, upper body, looking at viewer, simple background",
        negative_prompt="low quality, worst quality, bad anatomy,bad composition, poor, low effort",
        width=768,
        height=768,
        seed=1,
        steps=28,
        scale=7.5,
        sampler="ddim",
    ),
    SamplePrompt(
        prompt="masterpiece, best quality, 1boy, in business suit, standing at street, looking back",
        negative_prompt="(low quality, worst quality), bad anatomy,bad composition, poor, low effort",
        width=576,
        height=832,
        seed=2,
        steps=40,
        scale=5.5,
        sampler="ddim",
    ),
]


@pytest.mark.rows("C94", "C95", "R277", "R278", "R279")
def test_the_seed_prompt_file(tmp_path, traits):
    file = tmp_path / "prompts.txt"
    file.write_text(f"# prompt 1\n{C94}\n\n# prompt 2\n{C95}\n", encoding="utf-8")
    assert load_prompts(file, traits, "ddim") == BOTH


def test_toml_shares_keys_and_subsets_override_them(tmp_path, traits):
    file = tmp_path / "prompts.toml"
    file.write_text(
        """
        [prompt]
        negative_prompt = "bad"
        width = 640
        scale = 5
        [[prompt.subset]]
        prompt = "a cat --w is text here"
        [[prompt.subset]]
        prompt = "ein Hündchen"
        negative_prompt = "worse"
        height = 320
        seed = 7
        sample_steps = 3
        sample_sampler = "euler_a"
        """,
        encoding="utf-8",
    )
    base = replace(default_prompt(traits, "pndm"), width=640, scale=5.0, negative_prompt="bad")
    assert load_prompts(file, traits, "pndm") == [
        replace(base, prompt="a cat --w is text here"),
        replace(base, prompt="ein Hündchen", negative_prompt="worse", height=320, seed=7, steps=3, sampler="euler_a"),
    ]


def test_toml_with_one_prompt_needs_no_subset(tmp_path, traits):
    file = tmp_path / "p.toml"
    file.write_text('[prompt]\nprompt = "a cat"\nheight = 64\n')
    assert load_prompts(file, traits, "ddim") == [replace(default_prompt(traits, "ddim"), prompt="a cat", height=64)]


def test_json_holds_lines_and_tables(tmp_path, traits):
    file = tmp_path / "prompts.JSON"
    file.write_text(json.dumps([C94, {"prompt": "a cat", "sample_steps": 5, "scale": 3}]), encoding="utf-8")
    assert load_prompts(file, traits, "ddim") == [
        BOTH[0],
        replace(default_prompt(traits, "ddim"), prompt="a cat", steps=5, scale=3.0),
    ]


def test_defaults_come_from_the_family_and_the_sampler_option(traits):
    assert parse_prompt("a cat", traits, "heun") == SamplePrompt("a cat", "", 512, 512, None, 30, 7.5, "heun")


def test_options_are_case_insensitive_and_may_stand_first(traits):
    prompt = parse_prompt("--N ugly --W 128 --SS Euler_a".replace("Euler_a", "euler_a"), traits, "ddim")
    assert (prompt.prompt, prompt.negative_prompt, prompt.width, prompt.sampler) == ("", "ugly", 128, "euler_a")


def test_a_control_image_is_a_path(traits, tmp_path, monkeypatch):
    assert parse_prompt("a cat --cn my edges/1.png --s 3", traits, "ddim").control == ControlImage(
        Path("my edges/1.png")
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([{"prompt": "a cat", "controlnet_image": "~/1.png"}, {"prompt": "a cat"}]))
    named, plain = load_prompts(file, traits, "ddim")
    assert named.control.path == tmp_path / "1.png"
    assert plain.control is None


def test_a_negative_prompt_may_be_empty(traits):
    assert parse_prompt("a cat --n --s 3", traits, "ddim").negative_prompt == ""


def test_dashes_inside_a_word_are_text(traits):
    assert parse_prompt("a well--known cat-like thing", traits, "ddim").prompt == "a well--known cat-like thing"


@pytest.mark.parametrize(
    ("line", "size"),
    [("x --w 517 --h 775", (512, 768)), ("x --w 63 --h 1", (64, 64)), ("x --w -5 --h 0", (64, 64))],
)
def test_sizes_are_floored(line, size, traits):
    prompt = parse_prompt(line, traits, "ddim")
    assert (prompt.width, prompt.height) == size


def test_sizes_are_floored_to_the_familys_multiple(traits):
    prompt = parse_prompt("x --w 520 --h 72", replace(traits, pixel_multiple=16), "ddim")
    assert (prompt.width, prompt.height) == (512, 64)


@pytest.mark.rows("R506")
@pytest.mark.parametrize(
    ("family", "line", "size"),
    [
        ("sd", "--w 575 --h 64", (512, 64)),
        ("sd", "--w 63 --h 1", (64, 64)),
        ("sdxl", "--w 1055 --h 100", (1024, 96)),
        ("sdxl", "--w 31 --h 33", (32, 32)),
        ("sd3", "--w 1000 --h 10", (992, 64)),
        ("flux", "--w 1000 --h 10", (992, 64)),
    ],
)
def test_sizes_of_sample_images_in_training_are_those_of_the_ancestor(family, line, size):
    prompt = parse_prompt(f"x {line}", FAMILIES[family].traits, "ddim")
    assert (prompt.width, prompt.height) == size


@pytest.mark.rows("R507")
def test_strengths_of_networks(traits, tmp_path):
    assert parse_prompt("x --am 0.5", traits, "ddim").multipliers == (0.5,)
    assert parse_prompt("x --am 0.8,-1.2 --s 3", traits, "ddim").multipliers == (0.8, -1.2)
    file = tmp_path / "p.json"
    file.write_text(json.dumps([{"prompt": "x", "additional_network_multiplier": [0.8, 1]}, {"prompt": "x"}]))
    assert [one.multipliers for one in load_prompts(file, traits, "ddim")] == [(0.8, 1.0), None]
    with pytest.raises(UserError, match=r"--am needs numbers with commas between them, got 'strong'"):
        parse_prompt("x --am strong", traits, "ddim")


@pytest.mark.parametrize(("given", "kept"), [("0", 1), ("-3", 1), ("1000", 1000), ("2000", 1000)])
def test_steps_are_clamped(given, kept, traits):
    assert parse_prompt(f"x --s {given}", traits, "ddim").steps == kept


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x --w wide", r"line 2: --w needs a whole number, got 'wide'"),
        ("x --l", r"line 2: --l needs a value"),
        ("x --l nan", r"line 2: the scale must be a finite number"),
        ("x --d -2", r"line 2: the seed must be from 0"),
        ("x --w 8193", r"line 2: the width must be at most 8192 pixels, got 8193"),
        ("x --h 1000000000", r"line 2: the height must be at most 8192 pixels"),
        ("x --ss plms", r"line 2: unknown sampler 'plms'"),
        ("x --cn", r"line 2: --cn needs a value"),
        ("x --rcfg 1", r"line 2: --rcfg \(renorm_cfg\) is not available yet"),
        ("x --g inf", r"line 2: the guidance must be a finite number"),
        ("x --fs 0", r"line 2: the flow shift must be a finite number above 0, got 0.0"),
        ("x --fs nan", r"line 2: the flow shift must be a finite number above 0"),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path, traits):
    file = tmp_path / "prompts.txt"
    file.write_text(f"fine\n{line}\n")
    with pytest.raises(UserError, match=message) as error:
        load_prompts(file, traits, "ddim")
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"x", "must be .txt, .toml or .json"),
        ("p.txt", b"# nothing\n\n", "holds no prompt"),
        ("p.txt", "é".encode("latin-1"), "not UTF-8 text"),
        ("p.toml", b"[prompt\n", "is not valid TOML: line 1, column 8: a closing"),
        ("p.toml", b"[other]\nx = 1\n", r"needs a \[prompt\] table"),
        ("p.toml", b'[prompt]\nsubset = "x"\n', "subset"),
        ("p.toml", b"[prompt]\nwidth = 64\n", "prompt 1: needs a `prompt` text"),
        ("p.json", b'["a",\n"b"', "is not valid JSON: line 2, column 4: a comma"),
        ("p.json", b'{"prompt": "a"}', "list"),
        ("p.json", b'["a", 3]', "prompt 2: must be a prompt line or a table"),
        ("p.json", b'[{"prompt": "a", "width": "64"}]', "prompt 1: width needs a whole number, got '64'"),
        ("p.json", b'[{"prompt": "a", "seed": true}]', "prompt 1: seed needs a whole number, got True"),
        ("p.json", b'[{"prompt": "a", "scale": 1' + b"0" * 400 + b"}]", "prompt 1: scale: the number is too large"),
        ("p.json", b"[" * 200_000, "nested too deeply"),
        ("p.json", b'[{"prompt": "a", "renorm_cfg": "3"}]', "not available yet"),
        ("p.json", b'[{"prompt": "a", "flow_shift": "3"}]', "flow_shift needs a number, got '3'"),
    ],
)
def test_a_bad_file_is_named(name, content, message, tmp_path, traits):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_prompts(file, traits, "ddim")
    assert str(file) in str(error.value)


def test_a_missing_file_is_named(tmp_path, traits):
    with pytest.raises(UserError, match=r"gone\.txt: there is no such file"):
        load_prompts(tmp_path / "gone.txt", traits, "ddim")


def test_a_byte_order_mark_is_no_part_of_the_prompt(tmp_path, traits):
    file = tmp_path / "p.txt"
    file.write_bytes(b"\xef\xbb\xbfa cat\r\na dog\r\n")
    assert [p.prompt for p in load_prompts(file, traits, "ddim")] == ["a cat", "a dog"]


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(LOGGER, "propagate", True)
    caplog.set_level(logging.WARNING, logger=LOGGER.name)
    return caplog


@pytest.mark.parametrize(
    ("letter", "field", "key"), [("g", "guidance", "guidance_scale"), ("fs", "flow_shift", "flow_shift")]
)
def test_what_only_flow_models_take_is_said_elsewhere(traits, said, letter, field, key):
    line = f"x --{letter} 3.5"
    assert getattr(parse_prompt(line, traits, "ddim"), field) == 3.5
    assert f"--{letter} ({key}) has no effect with the test family" in said.text
    said.clear()
    assert getattr(parse_prompt(line, replace(traits, objective="flow"), "ddim"), field) == 3.5
    assert said.text == ""


def test_flow_models_have_a_sampler_of_their_own(traits, said):
    flow = replace(traits, objective="flow")
    for line, default in (("x", "ddim"), ("x --ss euler", "ddim"), ("x --ss k_euler", "pndm")):
        assert parse_prompt(line, flow, default).sampler == "euler"
    assert said.text == ""
    assert parse_prompt("x --ss heun", flow, "ddim", "line 7").sampler == "euler"
    assert said.text.count("line 7: --ss (sample_sampler) has no effect") == 1


def test_nothing_heavy_is_imported():
    code = (
        "import sys, library.inference.prompts; print([m for m in ('torch', 'numpy', 'diffusers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("line", "prompt", "negative"),
    [
        ("a photo -- of a cat --w 64", "a photo -- of a cat", ""),
        ("a photo --  of a cat -- and a dog", "a photo -- of a cat -- and a dog", ""),
        ("a photo --n bad -- ugly --w 64", "a photo", "bad -- ugly"),
        ("a photo --w 64 -- of a cat", "a photo -- of a cat", ""),
        ("a photo --", "a photo --", ""),
    ],
)
def test_free_dashes_are_text(line, prompt, negative, traits):
    parsed = parse_prompt(line, traits, "ddim")
    assert (parsed.prompt, parsed.negative_prompt) == (prompt, negative)


@pytest.mark.parametrize(
    ("name", "content", "warning"),
    [
        ("p.txt", "a cat --ar 16:9 --w 64", "line 1: ignored: --ar is no option of a prompt"),
        ("p.json", '[{"prompt": "a cat", "width": 64, "steps": 3}]', "prompt 1: ignored: unknown key 'steps'"),
        ("p.txt", "a cat --w -64", "line 1: the width -64 is no size; 64 is used"),
    ],
)
def test_what_the_reader_does_not_know_is_left_out_with_a_warning(
    name, content, warning, tmp_path, traits, caplog, monkeypatch
):
    monkeypatch.setattr(LOGGER, "propagate", True)
    (tmp_path / name).write_text(content)
    with caplog.at_level(logging.WARNING):
        (prompt,) = load_prompts(tmp_path / name, traits, "ddim")
    assert (prompt.prompt, prompt.width, prompt.steps) == ("a cat", 64, 30)
    (line,) = caplog.messages
    assert warning in line


def test_a_seed_of_minus_one_is_chosen_again(traits):
    assert parse_prompt("a cat --d -1", traits, "ddim").seed is None
