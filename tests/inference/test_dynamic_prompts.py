from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from library.inference.dynamic_prompts import variants


def drawn(text: str, count: int = 2000) -> Counter[str]:
    return Counter(variants(text, count, Random(0)))


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        ("plain", {"plain"}),
        ("{a|b} cat", {"a cat", "b cat"}),
        ("{2$$a|b|c}", {"a, b", "b, a", "a, c", "c, a", "b, c", "c, b"}),
        ("{1-2$$a|b}", {"a", "b", "a, b", "b, a"}),
        ("{2$$ and $$a|b}", {"a and b", "b and a"}),
        ("{x{1|2}|y}", {"x1", "x2", "y"}),
        ("{5$$a|b}", {"a, b", "b, a"}),
        ("{|very} old", {" old", "very old"}),
        (r"\{a|b\} {c|d}", {"{a|b} c", "{a|b} d"}),
        ("open {a|b", {"open {a|b"}),
        ("closed a}", {"closed a}"}),
        ("{only}", {"only"}),
    ],
)
def test_what_a_text_stands_for(text, possible):
    found = drawn(text)
    assert set(found) == possible
    top = "{" in text and text.startswith("{x")  # the inner choice halves the share of its option
    if not top and len(possible) > 1 and not text.startswith("{1-2"):
        # 5 standard deviations of a share are below 0.056
        assert all(abs(count / 2000 - 1 / len(possible)) < 0.056 for count in found.values())


@pytest.mark.parametrize(
    ("text", "all_of_them"),
    [
        ("{e$$a|b} {e$$1|2}", ["a 1", "a 2", "b 1", "b 2"]),
        ("{e$$a{1|1}|b}", ["a1", "b"]),
        ("{e$${e$$x|y}|z}", ["x", "y", "z"]),
        ("{e$$2$$+$$a|b|c}", ["a+b", "a+c", "b+c"]),
        ("{q{e$$1|2}|q{e$$1|1}}", None),
    ],
)
def test_enumeration_gives_each_in_order(text, all_of_them):
    found = variants(text, 1, Random(1))
    if all_of_them is None:
        assert len(found) == 4
        assert set(found) <= {"q1", "q2"}
    else:
        assert found == all_of_them
        assert variants(text, 2, Random(1)) == [one for one in all_of_them for _ in range(2)]


def test_the_rest_of_an_enumerated_text_is_drawn():
    assert drawn("{e$$a|b}{1|2}", 500).keys() == {"a1", "a2", "b1", "b2"}


def test_the_same_random_numbers_draw_the_same():
    assert variants("{a|b|c|d}", 20, Random(5)) == variants("{a|b|c|d}", 20, Random(5))


def test_what_never_ends_is_refused():
    with pytest.raises(ValueError, match="more than 10,000"):
        variants("{e$$0|1|2|3|4|5|6|7|8|9}" * 5, 1, Random(0))


def test_braces_without_end_are_text_and_no_burden():
    assert variants("{" * 5000 + "a|b", 1, Random(0)) == ["{" * 5000 + "a|b"]
    with pytest.raises(ValueError, match="deep"):
        variants("{" * 100 + "a" + "}" * 100, 1, Random(0))
