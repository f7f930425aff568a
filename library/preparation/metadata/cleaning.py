"""Cleans the captions and tags of a metadata file: clean_captions_and_tags.py. Cleaning twice changes nothing more."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

from library.data.scan.metadata_files import read_metadata
from library.options.base import Options
from library.options.metadata import CleanOptions
from library.options.preparation import WorkOptions
from library.preparation.common.summary import Outcome
from library.preparation.metadata import cleaning_rules as rules
from library.preparation.metadata.metadata_writer import require_writable, write_metadata
from library.preparation.tagging.tag_rules import spaced
from library.runtime.logs import LOGGER
from library.screen import counted

GROUPS = (CleanOptions, WorkOptions)

_ROUNDS = 10  # of the caption rules; only rules that lengthen what they find could go on for ever


def clean(opts: Options) -> Outcome:
    """The work of clean_captions_and_tags.py. Raises: UserError: the metadata cannot be read or written."""
    options: CleanOptions = opts.clean
    target = Path(options.out_json)
    require_writable(target, "out_json")
    entries = read_metadata(Path(options.in_json))
    outcome = Outcome()
    cleaned: dict[str, dict[str, Any]] = {}
    without = {"caption": 0, "tags": 0}
    for key, entry in entries.items():
        cleaned[key] = clean_entry(entry)
        for field in without:
            without[field] += entry.get(field) is None
            if options.debug and entry.get(field) != cleaned[key].get(field):
                LOGGER.info("%s: %s: %r -> %r", key, field, entry[field], cleaned[key][field])
        changed = cleaned[key] != entry
        outcome.done += changed
        outcome.skipped += not changed
    for field, count in without.items():
        if count:
            LOGGER.info("without %s: %d of %s", field, count, counted(len(entries)))
    write_metadata(target, cleaned)
    LOGGER.info("%s: %d of %s changed", target, outcome.done, counted(len(entries)))
    return outcome


def clean_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """An image's entry with its caption and tags cleaned, as far as it has them."""
    found = {"caption": (entry.get("caption"), clean_caption), "tags": (entry.get("tags"), clean_tags)}
    return {**entry, **{field: make(text) for field, (text, make) in found.items() if text is not None}}


# ---- tags


def clean_tags(text: str) -> str:
    """Tags between commas: with spaces for underscores, without what is behind a rating, and less of the same.

    Where several persons are in the image, what would be said of each of them is removed. Of two tags of which one
    ends like the other (``white shirt``, ``shirt``) only the longer stays.
    """
    tags = [tag for tag in (spaced(piece.strip()).strip() for piece in re.split(r"[,\n]", text)) if tag]
    cut = next((place for place, tag in enumerate(tags) if place and _is(rules.CUT_FROM, tag)), len(tags))
    tags = tags[:cut]
    if any(_is(rules.SEVERAL_PERSONS, tag) for tag in tags):
        for pattern in rules.ONE_PERSONS_TAGS:
            rest = [tag for tag in tags if not _is(pattern, tag)]
            tags = rest if len(tags) - len(rest) > 1 else tags
    endings = {tag[place + 1 :] for tag in tags for place, sign in enumerate(tag) if sign == " "}
    return ", ".join(tag for tag in tags if tag not in endings)


def _is(pattern: str, tag: str) -> bool:
    return re.fullmatch(pattern, tag) is not None


# ---- captions


def clean_caption(text: str, replacements: Sequence[tuple[str, str]] | None = None) -> str:
    """A caption after `replacements`, by default those of `cleaning_rules`, until none of them finds anything.

    Every line of a caption of several lines by itself.
    """
    steps = list(starmap(_step, rules.CAPTION_RULES if replacements is None else replacements))
    lines = []
    for line in text.split("\n"):
        for _ in range(_ROUNDS):
            before, small = line, line.lower()
            for step in steps:
                if step.word in small:
                    line = step.pattern.sub(step.write, line)
                    small = line.lower()
            if line == before:
                break
        lines.append(line.strip())
    return "\n".join(lines)


class _Step(NamedTuple):
    """One replacement, made ready."""

    word: str  # where it is not in the line, in small letters, there is nothing to find; looking for it is fast
    pattern: re.Pattern[str]
    write: Callable[[re.Match[str]], str]


@cache
def _step(words: str, other: str) -> _Step:
    """A replacement of words, with an article before them, by others.

    Words that nothing is written for are only found in front of another word, and their space goes with them.
    """
    article = "()" if re.match(r"an?\b", words) else r"(?:(an?)\s+)?"
    found = r"\s+".join(map(re.escape, words.split()))
    behind = r"(?![\w-])()" if other else r"\s+(?=(\w))"
    pattern = re.compile(rf"(?<![\w-]){article}{found}{behind}", re.IGNORECASE)

    def write(match: re.Match[str]) -> str:
        had_article, following = match.groups()
        text = other
        if had_article:
            text = f"{'an' if (other or following)[:1].lower() in 'aeiou' else 'a'} {other}"
        return text[:1].upper() + text[1:] if match[0][0].isupper() else text

    return _Step(max(words.lower().split(), key=len), pattern, write)
