"""What --remove_words takes out of captions."""

from __future__ import annotations

import pytest

from library.preparation.captioning.text_mentions import without_text_mentions


@pytest.mark.parametrize(
    ("caption", "left"),
    [
        ('a girl with the words "hello there" on her shirt', "a girl"),
        ("a girl with the word love on it", "a girl"),
        ("a girl with the words happy new year on it and a hat", "a girl and a hat"),
        ("a girl with blue hair has the name on it", "a girl with blue hair"),
        ("a poster with the name john on it", "a poster"),
        ("a dog and the letters abc in the corner, with a ball", "a dog, with a ball"),
        ("a man with the letter a on his hat and a dog", "a man and a dog"),
        ('a poster with the words "never closed and so on', "a poster"),
        ("a bus with the word taxi on the side of it in the rain", "a bus in the rain"),
        ('a book cover that says "the cat"', "a book cover"),
        ("a woman with a sign that says i love you on it", "a woman"),
        ("a shirt that says 'i'm cool' and a hat", "a shirt and a hat"),
        ("a bag that says'happy day'on it and a cup", "a bag and a cup"),
        ('a sign that says the word "stop" on a street', "a sign"),
        ("a sign that says", "a sign"),
        ("a boy with the number 5 on his shirt", "a boy"),
        ("a player wearing the number 23 on a field", "a player"),
        ("a man, the number 7 on the back", "a man"),
        ("a cat, the word meow on its bowl", "a cat"),
    ],
)
def test_phrases_about_writing_go(caption, left):
    assert without_text_mentions(caption) == left


@pytest.mark.parametrize(
    "caption",
    [
        "a cat sitting on a table",
        "a word game on a table",
        "a man and the woman in the garden",
        "a woman says hello",
        "two girls with the same hat on the beach",
        "the number 7 on the back of a player",  # there is nothing else to tell
        "",
    ],
)
def test_other_captions_stay(caption):
    assert without_text_mentions(caption) == caption
