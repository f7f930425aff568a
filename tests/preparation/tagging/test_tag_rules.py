"""What becomes of probabilities: a few labels with given numbers, and the text that must come out."""

from __future__ import annotations

import numpy as np
import pytest

from library.errors import UserError
from library.options.base import Given, Options, build_options
from library.options.tagging import TaggingOptions
from library.preparation.tagging.tag_rules import (
    Label,
    choose_tags,
    expanded,
    make_vocabulary,
    parse_list,
    parse_replacements,
    probabilities_in_words,
    rules_of,
    spaced,
    split_tags,
    with_appended,
)

# As in a selected_tags.csv: ratings, general tags, characters.
TABLE = {
    "safe": ("rating", 0.2),
    "sensitive": ("rating", 0.3),
    "explicit": ("rating", 0.1),
    "1girl": ("general", 0.9),
    "long_hair": ("general", 0.35),
    "smile": ("general", 0.34),
    "^_^": ("general", 0.5),
    "||_||": ("general", 0.4),
    "hat": ("general", 0.8),
    "saber_(fate)": ("character", 0.7),
    "rin_(winter)_(fate)": ("character", 0.6),
    "miku": ("character", 0.1),
}
# As in a tag_mapping.json.
MAPPING = {
    "general": ("rating", 0.3),
    "sensitive": ("rating", 0.4),
    "best_quality": ("quality", 0.5),
    "bad_quality": ("quality", 0.2),
    "1girl": ("general", 0.6),
    "hat": ("general", 0.9),
    "saber": ("character", 0.8),
    "rin": ("character", 0.85),
    "fate": ("copyright", 0.45),
    "somebody": ("artist", 0.5),
    "commentary": ("meta", 0.5),
    "painter_v2": ("model", 0.5),
}


def options(**values) -> Options:
    given = {name: Given(value, "command line") for name, value in values.items()}
    return build_options([TaggingOptions], given)


def chosen(known=TABLE, ranked=False, **values) -> list[str]:
    rules = rules_of(options(**values).tagging)
    words = make_vocabulary([Label(name, category) for name, (category, _) in known.items()], rules, ranked=ranked)
    return choose_tags(np.array([p for _, p in known.values()], dtype=np.float32), words, rules)


def test_characters_come_last_wherever_the_labels_have_them():
    mixed = {
        "miku": ("character", 0.9),
        "1girl": ("general", 0.8),
        "rin": ("character", 0.7),
        "fate": ("copyright", 0.6),
    }
    assert chosen(mixed) == ["1girl", "fate", "miku", "rin"]
    assert chosen(mixed, character_tags_first=True) == ["rin", "miku", "1girl", "fate"]
    assert chosen(mixed, ranked=True) == ["miku", "1girl", "rin", "fate"]


GENERAL = ["1girl", "long_hair", "^_^", "||_||", "hat"]
CHARACTERS = ["saber_(fate)", "rin_(winter)_(fate)"]
USUAL = [*GENERAL, *CHARACTERS]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param({}, USUAL, marks=pytest.mark.rows("R74")),  # 0.35 is at least 0.35
        pytest.param({"thresh": 0.34}, [*USUAL[:2], "smile", *USUAL[2:]], marks=pytest.mark.rows("R74")),
        ({"thresh": 0.75}, ["1girl", "hat"]),
        ({"general_threshold": 0.75}, ["1girl", "hat", *CHARACTERS]),
        ({"character_threshold": 0.65}, [*GENERAL, "saber_(fate)"]),
        ({"thresh": 0.95, "character_threshold": 0.05}, [*CHARACTERS, "miku"]),
        ({"character_threshold": 0.0, "general_threshold": 2.0}, [*CHARACTERS, "miku"]),
        pytest.param(
            {"use_rating_tags": True}, ["sensitive", *USUAL], marks=pytest.mark.rows("R80")
        ),  # the likeliest, below the threshold as it is
        pytest.param({"use_rating_tags_as_last_tag": True}, [*USUAL, "sensitive"], marks=pytest.mark.rows("R81")),
        ({"use_rating_tags": True, "use_rating_tags_as_last_tag": True}, ["sensitive", *USUAL]),
        ({"use_quality_tags": True}, USUAL),  # this tagger knows none
        pytest.param(
            {"character_tags_first": True},
            ["rin_(winter)_(fate)", "saber_(fate)", *GENERAL],
            marks=pytest.mark.rows("R82"),
        ),
        (
            {"character_tags_first": True, "use_rating_tags": True},
            ["sensitive", "rin_(winter)_(fate)", "saber_(fate)", *GENERAL],
        ),
        pytest.param(
            {"character_tag_expand": True},
            [*GENERAL, "saber", "fate", "rin_(winter)"],  # the series once
            marks=pytest.mark.rows("R83"),
        ),
        (
            {"character_tag_expand": True, "remove_underscore": True, "general_threshold": 0.85},
            ["1girl", "saber", "fate", "rin (winter)"],
        ),
        pytest.param(
            {"always_first_tags": "1girl,hat"},
            ["hat", "1girl", "long_hair", "^_^", "||_||", *CHARACTERS],  # one after the other to the front
            marks=pytest.mark.rows("R84"),
        ),
        (
            {"always_first_tags": "long hair, nowhere", "use_rating_tags": True},
            ["long_hair", "sensitive", "1girl", "^_^", "||_||", "hat", *CHARACTERS],
        ),
        pytest.param(
            {"undesired_tags": "hat,1girl, nowhere"},
            ["long_hair", "^_^", "||_||", *CHARACTERS],
            marks=pytest.mark.rows("R86"),
        ),
        pytest.param(
            {"undesired_tags": "long hair,^_^", "remove_underscore": True},
            ["1girl", "||_||", "hat", "saber (fate)", "rin (winter) (fate)"],
            marks=pytest.mark.rows("R86"),
        ),
        ({"undesired_tags": "long_hair,sensitive", "use_rating_tags": True}, [t for t in USUAL if t != "long_hair"]),
        ({"undesired_tags": "long_hair", "remove_underscore": True, "thresh": 0.85, "general_threshold": 0.35},
         ["1girl", "^_^", "||_||", "hat"]),
        ({"undesired_tags": "saber (fate)", "character_tag_expand": True}, [*GENERAL, "rin_(winter)", "fate"]),
        ({"undesired_tags": "fate", "character_tag_expand": True}, [*GENERAL, "saber", "rin_(winter)"]),
        pytest.param(
            {"tag_replacement": "hat,cap;1girl,one girl"},
            ["one girl", "long_hair", "^_^", "||_||", "cap", *CHARACTERS],
            marks=pytest.mark.rows("R85"),
        ),
        ({"tag_replacement": "hat,1girl;1girl,hat"}, ["hat", "long_hair", "^_^", "||_||", "1girl", *CHARACTERS]),
        ({"tag_replacement": "hat,1girl"}, ["1girl", "long_hair", "^_^", "||_||", *CHARACTERS]),
        ({"tag_replacement": "hat,cap;long_hair,"}, ["1girl", "^_^", "||_||", "cap", *CHARACTERS]),
        pytest.param(
            {"tag_replacement": r"hat,cap\, red\; old", "general_threshold": 0.75},
            ["1girl", "cap", "red; old", *CHARACTERS],  # two tags, as the file's readers see them
            marks=pytest.mark.rows("R85"),
        ),
        (
            {"tag_replacement": r"saber\, fate,artoria", "character_tag_expand": True, "general_threshold": 0.85},
            ["1girl", "artoria", "rin_(winter)", "fate"],
        ),
        (
            {"tag_replacement": "long hair,hair", "remove_underscore": True, "thresh": 0.95, "general_threshold": 0.35},
            ["1girl", "hair", "^_^", "||_||", "hat"],
        ),
        ({"tag_replacement": "hat,cap", "undesired_tags": "cap", "thresh": 0.75}, ["1girl"]),
    ],
)  # fmt: skip
def test_tags_of_a_table(values, expected):
    assert chosen(**values) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # by falling probability, equal ones in the order of the labels
        ({}, ["hat", "rin", "saber", "1girl", "somebody", "commentary", "painter_v2", "fate"]),
        (
            {"copyright_threshold": 0.46, "artist_threshold": 0.51, "meta_threshold": 0.51, "model_threshold": 0.51},
            ["hat", "rin", "saber", "1girl"],
        ),
        ({"thresh": 0.7, "meta_threshold": 0.5}, ["hat", "rin", "saber", "commentary"]),
        ({"thresh": 0.7, "character_tags_first": True}, ["rin", "saber", "hat"]),
        ({"thresh": 0.7, "model_threshold": 0.45, "use_rating_tags": True}, ["hat", "rin", "saber", "painter_v2"]),
        (
            {"thresh": 0.7, "model_threshold": 0.4, "use_rating_tags": True},  # the lowest threshold counts
            ["sensitive", "hat", "rin", "saber", "painter_v2"],
        ),
        ({"thresh": 0.4, "general_threshold": 0.95, "character_threshold": 0.95, "copyright_threshold": 0.95,
          "artist_threshold": 0.95, "meta_threshold": 0.95, "use_quality_tags": True, "use_rating_tags": True},
         ["best_quality", "sensitive", "painter_v2"]),
        ({"thresh": 0.85, "use_quality_tags_as_last_tag": True, "meta_threshold": 0.5},
         ["hat", "rin", "commentary", "best_quality"]),
    ],
)  # fmt: skip
def test_tags_of_a_mapping(values, expected):
    assert chosen(MAPPING, ranked=True, **values) == expected


@pytest.mark.parametrize(
    "face",
    "0_0 (o)_(o) +_+ +_- ._. <o>_<o> <|>_<|> =_= >_< 3_3 6_9 >_o @_@ ^_^ o_o u_u x_x |_| ||_||".split(),  # noqa: SIM905
)
def test_faces_keep_their_underscores(face):
    assert spaced(face) == face


def test_other_tags_get_spaces():
    assert spaced("very_long_hair") == "very long hair"
    assert spaced("smile_^_^") == "smile ^ ^"


@pytest.mark.rows("R83")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("name_(series)", ["name", "series"]),
        ("name_(costume)_(series)", ["name_(costume)", "series"]),
        ("name (series)", ["name", "series"]),
        ("name_(series_(film))", ["name", "series_(film)"]),
        ("name_(costume)_(series_(film))", ["name_(costume)", "series_(film)"]),
        ("name_(series", ["name_(series"]),
        ("name_(series))", ["name_(series))"]),
        ("name", ["name"]),
        ("(series)", ["(series)"]),
        ("name_(series)_x", ["name_(series)_x"]),
        ("name_()", ["name_()"]),
    ],
)
def test_characters_with_a_series(name, expected):
    assert expanded(name) == expected


@pytest.mark.parametrize("text", ["a", "a,b,c", "a,b;c", ",b"])
def test_replacements_that_are_no_pairs(text):
    with pytest.raises(UserError, match="old,new") as refused:
        parse_replacements(text)
    assert len(refused.value.problems) == 1


def test_replacements_keep_other_backslashes():
    assert parse_replacements(r"\m/,horns; a ,b;") == {r"\m/": "horns", "a": "b"}


@pytest.mark.parametrize(
    ("separator", "text", "expected"),
    [
        (", ", "a, b,c,,", ["a", "b", "c"]),
        ("; ", "a;b, c", ["a", "b", "c"]),
        (" ", "a b", ["a", "b"]),
    ],
)
def test_lists_of_tags(separator, text, expected):
    assert parse_list(text, separator) == expected


def test_tags_between_separators():
    assert split_tags("a, b ,c,", ", ") == ["a", "b", "c"]
    assert split_tags("a b  c", " ") == ["a", "b", "c"]
    assert split_tags("a, b\tc", "\t") == ["a, b", "c"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "long hair, c"),
        ("x", "x, long hair, c"),
        ("x, c", "x, c, long hair"),
        ("c,long_hair", "c,long_hair"),  # in the other spelling
        ("x\nc", "x, long hair, c\nc, long hair"),  # each line is a caption of its own
    ],
)
def test_appending_twice_changes_nothing_more(before, after):
    assert with_appended(before, ["long hair", "c"], ", ") == after
    assert with_appended(after, ["long hair", "c"], ", ") == after


def test_replacements_with_separators_are_appended_once_too():
    tags = chosen(tag_replacement=r"hat,cap\, red")
    once = with_appended("x", tags, ", ")
    assert once.endswith("cap, red, saber_(fate), rin_(winter)_(fate)")
    assert with_appended(once, tags, ", ") == once


def test_probabilities_in_words():
    rules = rules_of(options().tagging)
    words = make_vocabulary([Label("a_b", "general"), Label("c", "general"), Label("d", "general"),
                             Label("safe", "rating")], rules, ranked=False)  # fmt: skip
    told = probabilities_in_words(np.array([0.5, 0.1, 0.875, 0.01], dtype=np.float32), words)
    assert told == ["general: d 0.88, a_b 0.50", "rating: safe 0.01"]


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"caption_separator": ""}, "--caption_separator"),
        ({"output_path": "tags.txt"}, "--output_path"),
        ({"caption_extension": "a/b"}, "--caption_extension"),
        ({"skip_existing": True, "append_tags": True}, "--skip_existing"),
        ({"thresh": 35.0}, "--thresh"),
        ({"thresh": 1.5, "character_threshold": 1.1}, "--thresh"),
    ],
)
def test_options_that_cannot_be(values, flag):
    given = options(**values)
    (problem,) = given.tagging.check(given, None)
    assert problem.startswith(flag)


@pytest.mark.parametrize("more", [{"character_threshold": 0.5}, {"use_rating_tags": True}, {"thresh": 1.0}])
def test_a_threshold_out_of_reach_leaves_out_a_category(more):
    given = options(**{"thresh": 2.0, **more})
    assert not list(given.tagging.check(given, None))


def test_options_without_effect_are_reported():
    given = options(
        use_rating_tags=True, use_rating_tags_as_last_tag=True, output_path="a.json", caption_extension=".t"
    )
    warned = list(given.tagging.warnings(given, None))
    assert [line.split()[0] for line in warned] == ["--use_rating_tags_as_last_tag", "--caption_extension"]


def test_the_older_spelling_of_the_extension():
    assert options(caption_extention=".tags").tagging.caption_extension == ".tags"
