"""What of a text may appear on a screen or in a log: no control characters, no secrets, no endless words.

Names of files, captions and values of options come from anywhere. A terminal obeys what control characters in them say,
and a message with a newline in it looks like two.
"""

from __future__ import annotations

import os
import re
from typing import Any

LONGEST_WORD = 500  # letters without a blank that are shown whole; paths are shorter
_BEGINNING = 100  # of a longer one, what is shown
HIDDEN = "(hidden)"

# C0 and C1 controls, what ends lines, what turns the direction of writing, and halves of characters.
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_ENDLESS = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")
# What access tokens of Hugging Face, Weights & Biases, OpenAI and GitHub look like; a part of a path is none.
_TOKENS = re.compile(
    r"(?<![\w./\\-])(?:hf_[A-Za-z0-9]{16,}|wandb_v1_\w{16,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|[0-9a-f]{40})(?![\w./\\-])"
)
_IN_ENVIRONMENT = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
_SHORTEST = 6  # letters of a secret; a shorter one would hide parts of words
_secrets: set[str] = set()


def counted(count: int, noun: str = "image", several: str | None = None) -> str:
    """``1 image``, ``2 images``; `several` where a plural is not the noun with an s."""
    return f"{count} {noun if count == 1 else several or noun + 's'}"


def hide(value: Any) -> None:
    """Hides in all further messages this value of a secret option, or any text inside a value of the wrong type."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for one in value:
            hide(one)
    elif value is not None and len(str(value)) >= _SHORTEST:
        _secrets.add(str(value))


def without_secrets(text: str) -> str:
    """The text with `HIDDEN` in place of secrets that are known, and of what looks like an access token."""
    known = {*_secrets, *(value for name in _IN_ENVIRONMENT if len(value := os.environ.get(name, "")) >= _SHORTEST)}
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _TOKENS.sub(HIDDEN, text)


def escaped(text: str) -> str:
    """The text with every character that a terminal obeys as an escape: ``\\x1b``, ``\\n``, ``\\u202e``."""
    return UNSEEN.sub(lambda one: one[0].encode("unicode_escape").decode("ascii"), text)


def shown(text: str) -> str:
    """One line for the screen: secrets hidden, characters escaped, and words of thousands of letters cut."""
    text = escaped(without_secrets(text))
    return _ENDLESS.sub(lambda word: f"{word[0][:_BEGINNING]}... ({len(word[0]):,} letters)", text)
