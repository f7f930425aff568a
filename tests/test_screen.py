"""What may appear on a screen."""

from __future__ import annotations

import pytest

from library.errors import UserError
from library.screen import HIDDEN, escaped, hide, shown

HF = "hf_" + "aB3" * 11 + "x"


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a\x1b[31mred", "a\\x1b[31mred"),
        ("two\nlines\r\n", "two\\nlines\\r\\n"),
        ("tab\tbell\x07del\x7f", "tab\\tbell\\x07del\\x7f"),
        ("c1\x9bm", "c1\\x9bm"),
        ("right\u202eto left\u2066", "right\\u202eto left\\u2066"),
        ("caf\udce9", "caf\\udce9"),
        ("ends\u2028here", "ends\\u2028here"),
    ],
)
def test_what_a_terminal_obeys_is_escaped(text, seen):
    assert escaped(text) == shown(text) == seen
    assert UserError(text).render() == f"error: {seen}"


@pytest.mark.parametrize("text", ["C:\\dir\\new", "猫 é 👩‍🔬", "no\u00a0break\u3000wide", "quote \" ' `"])
def test_what_is_only_unusual_stays(text):
    assert shown(text) == text


@pytest.mark.parametrize(
    "token",
    [HF, "wandb_v1_abcdefghijklmnop", "0123456789abcdef" * 2 + "01234567", "ghp_" + "a1" * 18, "sk-" + "a1" * 12],
)
def test_what_looks_like_a_token_is_hidden(token):
    error = UserError(f"unexpected value '{token}'", f"got ['{token}']")
    for text in (str(error), error.render(), shown(f"--x={token}"), *error.problems):
        assert token not in text
        assert HIDDEN in text


@pytest.mark.parametrize(
    "text",
    [
        "/cache/snapshots/0123456789abcdef0123456789abcdef01234567/model.safetensors",
        "hf_model_of_mine_number_2.safetensors",
        "a" * 64,
        "0123456789abcdef" * 4,
    ],
)
def test_paths_and_checksums_are_no_tokens(text):
    assert shown(text) == text


def test_a_known_secret_is_hidden_wherever_it_appears(monkeypatch):
    hide("my own secret")
    hide(["nested one", {"key of it": 123456789}])
    hide("short"), hide(None), hide(True)
    monkeypatch.setenv("HF_TOKEN", "from the environment")
    text = shown("a my own secret b nested one c key of it d 123456789 e from the environment f short None True")
    assert text == f"a {HIDDEN} b {HIDDEN} c {HIDDEN} d {HIDDEN} e {HIDDEN} f short None True"


def test_words_of_thousands_of_letters_are_cut():
    assert shown("x" * 500) == "x" * 500
    assert shown(f"got '{'x' * 3000}' here") == f"got '{'x' * 99}... (3,002 letters) here"
