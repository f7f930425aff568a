"""Prompts with choices in braces: ``a {red|green} {2$$cat|dog|cow}``, and the prompts that they stand for.

``{a|b}`` is one of its parts, ``{2$$a|b|c}`` two of them, ``{1-3$$a|b|c}`` one to three, joined by ``, `` or by what
stands before a second ``$$``, as in ``{2$$ and $$a|b|c}``. ``{e$$a|b}`` stands for each of its parts in turn. Choices
nest. A backslash before a brace makes it an ordinary character, and so does being without its partner.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from random import Random
from typing import Union

Part = Union[str, "Choice"]
Parts = list[Part]

MOST = 10_000  # prompts that one line may stand for
_DEEPEST = 50  # choices inside choices
_SIGN = re.compile(r"\\(?P<escaped>[{}])|[{}]")
_HEAD = re.compile(r"(?P<every>[eE]\$\$)?(?:(?P<low>\d{1,4})(?:-(?P<high>\d{1,4}))?\$\$)?(?:(?P<joiner>[^|{}$]*)\$\$)?")


@dataclass(frozen=True)
class Choice:
    """A choice of some of its options."""

    options: tuple[Parts, ...]
    low: int
    high: int
    joiner: str
    every: bool  # stands for each possible choice in turn


def variants(text: str, count: int, rng: Random) -> list[str]:
    """The prompts that a text stands for: `count` of them, each drawn by itself, or that many of each enumerated one.

    Those that are enumerated come in order, and each `count` times one after the other. A text without choices is the
    same `count` times.

    Raises: ValueError: it stands for more than `MOST` prompts, or choices are too deep inside others.
    """
    partners: dict[int, int] = {}  # the place of the closing brace of each opening one that has one
    opened: list[int] = []
    for match in _SIGN.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            partners[opened.pop()] = match.start()
    parts = _parse(text, 0, len(text), partners)
    spaces = [_enumerated(part) if _enumerates(part) else [part] for part in parts]
    total = count
    for space in spaces:
        total *= len(space)
        if total > MOST:
            raise ValueError(f"stands for more than {MOST:,} prompts")
    return ["".join(_drawn(part, rng) for part in combined) for combined in product(*spaces) for _ in range(count)]


def _enumerates(part: Part) -> bool:
    return isinstance(part, Choice) and (part.every or any(map(_enumerates, (p for o in part.options for p in o))))


def _enumerated(part: Part) -> list[Part]:
    """What a part that enumerates stands for, without enumerations inside."""
    if not _enumerates(part):
        return [part]
    assert isinstance(part, Choice)
    inside = [[list(parts) for parts in product(*map(_enumerated, option))] for option in part.options]
    if not part.every:
        return [Choice(tuple(options), part.low, part.high, part.joiner, False) for options in product(*inside)]
    found: list[Part] = []
    for size in range(part.low, min(part.high, len(inside)) + 1):
        for chosen in combinations(inside, size):
            for options in product(*chosen):  # each of them alone, so that nothing is left to draw
                joined = [piece for option in options for piece in (part.joiner, *option)][1:]
                found.append(Choice((joined,), 1, 1, "", False))
                if len(found) > MOST:
                    return found
    return found


def _drawn(part: Part, rng: Random) -> str:
    if isinstance(part, str):
        return part
    size = min(rng.randint(part.low, part.high), len(part.options))
    chosen = rng.sample(part.options, size)
    return part.joiner.join("".join(_drawn(inner, rng) for inner in option) for option in chosen)


def _parse(text: str, start: int, end: int, partners: Mapping[int, int], depth: int = 0) -> Parts:
    """The parts of a stretch of the text."""
    if depth > _DEEPEST:
        raise ValueError(f"has choices inside choices, more than {_DEEPEST} deep")
    parts: Parts = []
    at = run = start
    plain: list[str] = []
    for match in _SIGN.finditer(text, start, end):
        if match.start() < at:
            continue
        plain.append(text[run : match.start()])
        if match["escaped"]:
            plain.append(match["escaped"])
            at = run = match.end()
        elif match.start() in partners:
            parts += ["".join(plain)] if any(plain) else []
            plain = []
            close = partners[match.start()]
            parts.append(_choice(text, match.end(), close, partners, depth))
            at = run = close + 1
        else:
            plain.append(match[0])
            at = run = match.end()
    plain.append(text[run:end])
    return [*parts, "".join(plain)] if any(plain) else parts


def _choice(text: str, start: int, end: int, partners: Mapping[int, int], depth: int) -> Choice:
    """What stands between two braces."""
    head = _HEAD.match(text, start, end)
    assert head is not None, "every part of it may be absent"
    bars, at = [], head.end()
    while at < end:  # the bars that are in no inner choice
        if text[at] == "|":
            bars.append(at)
        at = partners.get(at, at) + (2 if text[at] == "\\" else 1)
    edges = [head.end() - 1, *bars, end]
    options = (_parse(text, left + 1, right, partners, depth + 1) for left, right in pairwise(edges))
    low = int(head["low"] or 1)
    high = int(head["high"] or low)
    joiner = ", " if head["joiner"] is None else head["joiner"]
    return Choice(tuple(options), min(low, high), max(low, high), joiner, bool(head["every"]))
