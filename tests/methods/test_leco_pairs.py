"""The prompt file of concept editing: both forms, their defaults, and what is wrong with them."""

from __future__ import annotations

import logging

import pytest

from library.errors import UserError
from library.methods.leco_pairs import PromptPair, read_pairs
from library.registry import FAMILIES
from library.types import Size

TRAITS = FAMILIES["sd"].traits


@pytest.fixture
def pairs(tmp_path):
    def read(text, traits=TRAITS):
        file = tmp_path / "prompts.toml"
        file.write_text(text, encoding="utf-8")
        return read_pairs(file, traits)

    return read


def ways(found):
    return [(pair.positive, pair.unconditional, pair.action, pair.multiplier) for pair in found]


def test_a_pair_needs_its_target_alone(pairs):
    assert pairs("[[prompts]]\ntarget = 'van gogh'") == [PromptPair("van gogh", "van gogh", "", "")]


@pytest.mark.rows("R510")
def test_what_a_pair_may_say(pairs):
    (pair,) = pairs(
        "[[prompts]]\ntarget = 'a'\npositive = 'b'\nunconditional = 'c'\naction = 'enhance'\nguidance_scale = 2\n"
        "resolution = [64, 128]\nbatch_size = 3\nmultiplier = -0.5\nweight = 0.25\ndynamic_crops = true\n"
    )
    assert (pair.neutral, pair.size) == ("c", Size(width=128, height=64))
    assert (pair.positive, pair.action, pair.guidance_scale, pair.batch_size) == ("b", "enhance", 2, 3)
    assert (pair.multiplier, pair.weight, pair.dynamic_crops, pair.dynamic_resolution) == (-0.5, 0.25, True, False)


def test_the_top_of_the_file_holds_defaults(pairs):
    first, second = pairs(
        "resolution = 64\nneutral = 'n'\naction = 'enhance'\n[[prompts]]\ntarget = 'a'\n"
        "[[prompts]]\ntarget = 'b'\nneutral = ''\nresolution = 128\naction = 'erase'"
    )
    assert (first.neutral, first.size, first.action) == ("n", Size(64, 64), "enhance")
    assert (second.neutral, second.size, second.action) == ("", Size(128, 128), "erase")


BOTH = [("-", "+", "erase", 2), ("+", "-", "enhance", 2), ("+", "-", "erase", -2), ("-", "+", "enhance", -2)]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ("positive = '+'\nnegative = '-'", BOTH),
        ("positive = '+'", [("+", "", "enhance", 2), ("+", "", "erase", -2)]),
        ("negative = '-'\npositive = ' '", [("-", "", "erase", 2), ("-", "", "enhance", -2)]),
    ],
)
@pytest.mark.parametrize("table", ["[[targets]]", "[[slider.targets]]", "", "[slider]", "[[prompts]]"])
def test_a_slider_is_pairs_for_both_directions(pairs, table, ends, expected):
    found = pairs(f"{table}\ntarget_class = 'person'\nmultiplier = 2\n{ends}")
    assert ways(found) == expected
    assert {(pair.target, pair.neutral) for pair in found} == {("person", "")}


def test_targets_that_have_a_target_are_pairs(pairs):
    assert pairs("[[targets]]\ntarget = 'a'\npositive = 'b'") == [PromptPair("a", "b", "", "")]


@pytest.mark.rows("R510")
def test_every_neutral_text_at_every_size(pairs, tmp_path):
    (tmp_path / "neutrals.txt").write_text("from a file\n\n  and another \n", encoding="utf-8")
    found = pairs(
        "neutrals = ['', 'x']\nneutral_prompt_file = 'neutrals.txt'\nresolutions = [[64, 128], [64, 64]]\n"
        "[[targets]]\npositive = '+'\n[[targets]]\npositive = '+'\nneutral = 'own'\nresolutions = [128, 64]"
    )
    first = [(pair.neutral, pair.size) for pair in found[:-2:2]]
    texts, sizes = ("", "x", "from a file", "and another"), (Size(128, 64), Size(64, 64))
    assert first == [(text, size) for text in texts for size in sizes]
    assert [(pair.neutral, pair.size) for pair in found[-2:]] == [("own", Size(64, 128))] * 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds neither [[prompts]] nor [[targets]]"),
        ("prompts = 3", "[[prompts]]: must be tables, one for each entry, and at least one"),
        ("[[prompts]]\npositive = 'a'", "[[prompts]] 1: has no target, the prompt that is to change"),
        ("[[prompts]]\ntarget = 3", "[[prompts]] 1: target must be a text, got 3"),
        ("[[prompts]]\ntarget = 'a'\naktion = 'erase'", "[[prompts]] 1: unknown key 'aktion'; did you mean 'action'?"),
        ("[[prompts]]\ntarget = 'a'\naction = 'remove'", "action must be erase or enhance, got 'remove'"),
        ("[[prompts]]\ntarget = 'a'\nresolution = 60", "sides must be multiples of 8 for Stable Diffusion 1.x/2.x"),
        ("[[prompts]]\ntarget = 'a'\nresolution = [64]", "must be a number of pixels or [height, width], got [64]"),
        ("[[prompts]]\ntarget = 'a'\nbatch_size = 0", "batch_size must be a whole number from 1 to 1024, got 0"),
        ("[[prompts]]\ntarget = 'a'\nweight = nan", "weight must be a number, got nan"),
        ("[[prompts]]\ntarget = 'a'\ndynamic_crops = 1", "dynamic_crops must be true or false, got 1"),
        ("[[targets]]\ntarget_class = 'a'", "[[targets]] 1: needs positive or negative"),
        ("[[targets]]\npositive = 'a'\nneutrals = 'b'", "neutrals must be a list of texts, got 'b'"),
        ("[[targets]]\npositive = 'a'\nprompt_file = 'none.txt'", "prompt_file: "),
        ("slider = 1", "[slider]: must be a table"),
        ("prompts: [a]", "prompts.toml"),
    ],
)
def test_mistakes_name_their_place(pairs, text, problem):
    with pytest.raises(UserError) as caught:
        pairs(text)
    assert any(problem in line and "prompts.toml" in line for line in caught.value.problems), caught.value.problems


def test_flow_models_need_other_multiples(pairs):
    with pytest.raises(UserError, match=r"sides must be multiples of 16 for FLUX\.1"):
        pairs("[[prompts]]\ntarget = 'a'\nresolution = 72", FAMILIES["flux"].traits)


def test_what_has_no_effect_is_said(pairs, caplog):
    with caplog.at_level(logging.WARNING):
        pairs(
            "colour = 1\n[[targets]]\npositive = 'a'\npositiv = 'b'\nresolution = [64, 128]\ndynamic_resolution = true"
        )
    said = caplog.text
    assert "the top of the file: 'colour' has no effect" in said
    assert "[[targets]] 1: 'positiv' has no effect; did you mean 'positive'?" in said
    assert "dynamic_resolution has no effect at 128x64, as only squares vary" in said
