"""Values in --network_args, read one by one: what they mean, and what is refused."""

from __future__ import annotations

import pytest

from networks.arguments import LARGEST_RANK, Reader, from_file_warnings, ignored


def read(kind, text, *rest):
    """The value that `Reader` gives for an argument, and the problems it has found."""
    reader = Reader({} if text is None else {"it": text}, ["it"], module="networks.x")
    return getattr(reader, kind)("it", *rest), [problem.partition(": ")[2] for problem in reader.problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [(None, False), ("", False), ("0", False), ("False", False), (" true ", True), ("True", True), ("1", True)],
)
def test_flags(text, value):
    assert read("flag", text) == (value, [])


@pytest.mark.parametrize("text", ["yes", "2", "truee"])
def test_a_flag_is_true_or_false(text):
    assert read("flag", text) == (False, [f"it={text}: is neither True nor False"])


@pytest.mark.parametrize(
    ("text", "value"), [(None, ()), ("  ", ()), ("4,0,2", (4, 0, 2)), (" [4, 0, 2] ", (4, 0, 2)), ("1,1,1", (1, 1, 1))]
)
def test_whole_numbers(text, value):
    assert read("whole_numbers", text, 3) == (value, [])


@pytest.mark.parametrize("text", ["1,2", "1,2,3,4", "1,2,-1", "1,2,x", "1.5,2,3", "123"])
def test_whole_numbers_that_are_refused(text):
    problem = f"it={text}: is not 3 whole numbers from 0 up, separated by commas"
    assert read("whole_numbers", text, 3) == ((), [problem])


def test_ranks_have_a_limit():
    assert read("whole_numbers", f"{LARGEST_RANK},1", 2) == ((LARGEST_RANK, 1), [])
    text = f"{LARGEST_RANK + 1},1"
    assert read("whole_numbers", text, 2)[1] == [f"it={text}: has an entry above {LARGEST_RANK}"]


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        (None, None),
        (" all ", None),
        ("none", ()),
        ("", ()),
        ("3", (range(3, 4),)),
        ("0,1,4-7", (range(1), range(1, 2), range(4, 8))),
        (" 2 - 3 , 5-5", (range(2, 4), range(5, 6))),
    ],
)
def test_numbers_of_blocks(text, blocks):
    assert read("block_numbers", text) == (blocks, [])


@pytest.mark.parametrize(("text", "entry"), [("7-4", "7-4"), ("1, x ,2", "x"), ("-1", "-1"), ("1-2-3", "1-2-3")])
def test_what_is_no_block(text, entry):
    shown = "give all, none, or numbers and ranges such as 0,1,4-7"
    assert read("block_numbers", text) == ((), [f"it={text}: {entry!r} is no block; {shown}"])


def test_limits_are_named():
    reader = Reader({"it": "1"}, ["it"], module="networks.x")
    assert reader.number("it", float, least=1, below=2) == 1
    assert reader.number("it", float, above=1) is None
    assert reader.number("it", float, below=1) is None
    assert reader.problems == [f"--network_args: it=1: must be {words}" for words in ("above 1", "below 1")]


def test_blanks_are_no_number():
    assert read("number", "  ", int) == (None, [])


@pytest.mark.parametrize("text", ["=4", "4", "attn"])
def test_a_pattern_needs_both_sides(text):
    pairs, problems = read("by_pattern", text, int)
    assert pairs == ()
    assert len(problems) == 1
    assert text in problems[0]


def test_only_the_nearest_name_is_proposed():
    (line,) = ignored({"conv_dimm": "4"}, ["conv_alpha", "conv_dim"], "networks.x")
    assert line.endswith("did you mean 'conv_dim'?")
    (line,) = ignored({"zzz": "4"}, ["conv_dim"], "networks.x")
    assert line.endswith("knows no such argument")


def test_a_file_decides_ranks_and_alphas_only():
    given = {"conv_dim": "4", "block_alphas": "1", "dropout": "0.1"}
    names = [line.split()[1] for line in from_file_warnings(given)]
    assert names == ["conv_dim", "block_alphas"]


def test_another_kind_of_network_is_refused_and_the_own_kind_is_not():
    for value, count in (("locon", 0), (" LoRA ", 0), ("loha", 1)):
        assert len(Reader({"algo": value}, [], module="networks.lora").problems) == count, value
