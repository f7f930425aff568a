"""Takes out of captions what a model believes to be written in an image; it is mostly wrong about that."""

from __future__ import annotations

import re

# Tokenizers that put spaces around quotation marks lose them again in part, so that a mark may stick to either side:
# "that says'happy day'on it". A quotation that is never closed extends to the end.
_SHORT = r"'(?=(?:s|t|m|d|re|ve|ll)\b)"  # the apostrophe of "it's" does not close a quotation
_QUOTED = rf"""(?: \s* "[^"]*" | \s* '(?: [^'] | {_SHORT} )*' | \s* ["'].*$ )"""
_WORD = r"(?: \s+ (?! (?:on|in|with|and) \b ) \w [\w.'-]* )"
_WHOSE = r"(?: (?: the|a|an|his|her|its|their ) \s+ )?"
_THING = rf"\s+ {_WHOSE} \w+"
_PLACE = rf"(?: \s* \b (?: (?: is|are|written|printed ) \s+ )* (?: on|in ) {_THING} (?: \s+ of {_THING} )? )"
# Without quotation marks only one word is sure to belong to it, unless "on it" marks where it ends.
_WRITTEN = rf"(?: {_QUOTED} {_PLACE}? | {_WORD}{{1,6}}? \s+ (?: on|in ) \s+ it \b | {_WORD} {_PLACE}? | {_PLACE} )"

_PHRASES = tuple(
    re.compile(phrase, re.VERBOSE | re.IGNORECASE)
    for phrase in (
        rf"\b (?: (?: with|holding ) \s+ an? \s+ sign \s+ )? (?: that|which ) \s+ (?: says?|reads? ) \b"
        rf" (?: \s* the \s+ words? \b )? {_WRITTEN}?",
        rf"\b (?: has|have|having|wearing|with|and ) \s+ the \s+ (?: words?|letters?|names?|numbers? ) \b {_WRITTEN}",
        rf"\b (?: the \s+ word \s+ \w+ {_PLACE} | word \s+ \w+ \s+ on \s+ it \b )",
        rf"\b the \s+ number \s+ \d+ {_PLACE}",
    )
)


def without_text_mentions(caption: str) -> str:
    """A caption without phrases like ``with the words "..." on it``, ``that says ...`` or ``the number 5 on ...``.

    One that is nothing else stays as it is.
    """
    rest = caption
    for phrase in _PHRASES:
        rest = phrase.sub(" ", rest)
    rest = re.sub(r"\s+([,.])", r"\1", " ".join(rest.split()))
    return re.sub(r"(?:\s+(?:and|with)|,)+$", "", rest) or caption
