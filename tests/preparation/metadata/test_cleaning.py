from __future__ import annotations

import json
import re
import string
from random import Random

import pytest

from library.errors import UserError
from library.options.parsing import parse_options
from library.preparation.metadata import cleaning_rules
from library.preparation.metadata.cleaning import GROUPS, clean, clean_caption, clean_entry, clean_tags


@pytest.mark.parametrize(
    ("tags", "cleaned"),
    [
        ("", ""),
        ("1girl,  white_hair ,solo", "1girl, white hair, solo"),
        (", 1girl,, solo,", "1girl, solo"),
        ("1girl\nsolo", "1girl, solo"),
        # faces keep their underscores
        ("^_^, open_mouth", "^_^, open mouth"),
        ("||_||, o_o, (o)_(o), blue_sky", "||_||, o_o, (o)_(o), blue sky"),
        # the rating and what follows
        ("1girl, solo, rating:safe", "1girl, solo"),
        ("1girl, rating:safe, score_9, rating:x", "1girl"),
        ("rating:safe, 1girl", "rating:safe, 1girl"),
        # one person: nothing is unclear
        ("1girl, long hair, short hair, blue eyes, red eyes", "1girl, long hair, short hair, blue eyes, red eyes"),
        # several persons: what occurs once is of one kind, what occurs twice is unclear
        ("2girls, long hair, blue eyes, smile", "2girls, long hair, blue eyes, smile"),
        ("2girls, long hair, short hair, smile", "2girls, smile"),
        ("multiple_boys, blue eyes, red eyes, smile", "multiple boys, smile"),
        ("6+girls, bob cut, hime cut", "6+girls"),
        ("2boys, long sleeves, sleeveless", "2boys"),
        ("2girls, wide sleeves, short sleeves", "2girls"),
        ("2girls, ponytail, braid, ahoge", "2girls"),
        ("2girls, side braid, hair bun, two side up", "2girls"),
        ("1boy, 2girls, blonde hair, black hair, hat", "1boy, 2girls, hat"),
        ("2girls, long hair, blonde hair, black hair", "2girls, long hair"),  # the only length stays
        ("2girls, long hair, blonde hair", "2girls, long hair, blonde hair"),
        ("girls' frontline, long hair, short hair", "girls' frontline, long hair, short hair"),
        # a tag that another one says more exactly
        ("shirt, white shirt", "white shirt"),
        ("white_shirt, shirt", "white shirt"),
        ("hair ornament, x hair ornament, ornament", "x hair ornament"),
        ("shirt, t-shirt, sweatshirt", "shirt, t-shirt, sweatshirt"),
        ("shirt lift, shirt", "shirt lift, shirt"),
    ],
)
def test_tags(tags, cleaned):
    assert clean_tags(tags) == cleaned


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("", ""),
        ("a dog in the snow", "a dog in the snow"),
        ("anime anime anime art", "anime art"),
        ("a young man", "a man"),
        ("a young elf and an young cat", "an elf and a cat"),
        ("she is young", "she is young"),
        ("an anime woman with a cat", "a girl with a cat"),
        ("a cartoon character with a sword", "a girl with a sword"),
        ("anime women and cartoon characters", "girls and girls"),
        ("a lady, a woman, a person and a female", "a girl, a girl, a girl and a girl"),
        ("women and people", "girls and girls"),
        ("a cartoon figure on a cartoon image", "a figure on an image"),
        ("a cartoon picture of a cartoon drawing", "a picture of a drawing"),
        ("an anime cartoon image", "an anime cartoon image"),
        ("a girl girl girl girl girl", "a girl"),
        ("a young cartoon anime lady woman", "a girl"),
        ("A Young Woman. Woman!", "A girl. Girl!"),
        ("a ladybug, a superwoman, a salesperson, a personal computer", None),
        ("a young lady\nan old woman", "a girl\nan old girl"),
    ],
)
def test_captions(caption, cleaned):
    assert clean_caption(caption) == (caption if cleaned is None else cleaned)


WORDS = [
    *{word for words, _ in cleaning_rules.CAPTION_RULES for word in words.split()},
    *("long hair", "short_hair", "hair", "hime cut", "bob cut", "2girls", "blue eyes", "eyes", "red_eyes", "^_^"),
    *("rating:safe", "rating", "blonde hair", "medium hair", "braid", "side braid", "sleeveless", "dog", "An", "a"),
]


@pytest.mark.parametrize("seed", range(5))
def test_cleaning_twice_changes_nothing_more(seed):
    rng = Random(seed)
    for _ in range(300):
        words = rng.choices(WORDS, k=rng.randint(0, 12))
        words += rng.choices(string.punctuation, k=rng.randint(0, 2))
        rng.shuffle(words)
        once = clean_entry({"caption": " ".join(words), "tags": ",".join(words)})
        assert clean_entry(once) == once


@pytest.mark.rows("R100")
def test_the_rules_can_be_changed(monkeypatch):
    assert clean_caption("a kitty on a mat", [("kitty", "animal")]) == "an animal on a mat"
    monkeypatch.setattr(cleaning_rules, "CAPTION_RULES", (*cleaning_rules.CAPTION_RULES, ("kitty", "cat")))
    monkeypatch.setattr(cleaning_rules, "ONE_PERSONS_TAGS", (r".+ hat",))
    assert clean_caption("a young kitty") == "a cat"
    assert clean_tags("2girls, red hat, blue hat, long hair, short hair") == "2girls, long hair, short hair"


def test_rules_that_never_come_to_an_end_do():
    assert set(clean_caption("b", [("b", "b b")]).split()) == {"b"}


def test_the_patterns_of_tags_are_sound():
    for pattern in (*cleaning_rules.ONE_PERSONS_TAGS, cleaning_rules.SEVERAL_PERSONS, cleaning_rules.CUT_FROM):
        assert not re.fullmatch(pattern, "")


def test_an_entry_keeps_what_is_not_cleaned():
    entry = {"image_size": [3, 4], "caption": None, "tags": "a_long_tag", "x": "a_b_c_d"}
    assert clean_entry(entry) == {"image_size": [3, 4], "caption": None, "tags": "a long tag", "x": "a_b_c_d"}


@pytest.mark.rows("R99")
def test_every_entry_is_cleaned_in_its_order(tmp_path):
    source, target = tmp_path / "in.json", tmp_path / "out.json"
    entries = {f"/none/{n}.png": {"tags": f"tag_{n}", "train_resolution": [64, 64]} for n in (3, 1, 2)} | {"z": {}}
    source.write_text(json.dumps(entries), encoding="utf-8")
    outcome = clean(parse_options(GROUPS, [str(source), str(target)]))
    assert (outcome.done, outcome.skipped) == (3, 1)
    found = json.loads(target.read_text(encoding="utf-8"))
    assert list(found) == list(entries)
    assert found["/none/3.png"] == {"tags": "tag 3", "train_resolution": [64, 64]}
    again = clean(parse_options(GROUPS, [str(target), str(target)]))
    assert (again.done, again.skipped) == (0, 4)
    assert json.loads(source.read_text(encoding="utf-8")) == entries


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "in.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="there are no images in it"):
        clean(parse_options(GROUPS, [str(tmp_path / "in.json"), str(tmp_path / "out.json")]))
