"""From a tagger's probabilities to the text of a tag file. Pure functions, no files and no models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from library.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from library.options.tagging import TaggingOptions

CATEGORIES = ("general", "character", "copyright", "artist", "meta", "model", "rating", "quality")
BEST_OF = ("rating", "quality")  # of these the likeliest is the answer, however likely it is

# Faces, in which underscores are mouths and noses. Shorter ones need no list: up to three signs, nothing is changed.
FACES = frozenset(["(o)_(o)", "<o>_<o>", "<|>_<|>", "||_||"])

Place = Literal["first", "last"]


class Label(NamedTuple):
    """The tag and category of one output of a tagger."""

    name: str
    category: str  # one of `CATEGORIES`


@dataclass(frozen=True)
class TagRules:
    """The rules by which tags are chosen and written. Tags that the user names are compared as `key` makes them."""

    thresholds: Mapping[str, float] = field(default_factory=dict)  # least probability by category
    rating: Place | None = None  # where the rating is written
    quality: Place | None = None
    characters_first: bool = False
    always_first: tuple[str, ...] = ()
    undesired: frozenset[str] = frozenset()
    replacements: Mapping[str, str] = field(default_factory=dict)  # text by the key of what it takes the place of
    spaces: bool = False  # for underscores
    expand_characters: bool = False
    separator: str = ", "


@dataclass(frozen=True)
class Vocabulary:
    """A tagger's labels with what the rules make of each."""

    labels: tuple[Label, ...]
    written: tuple[tuple[str, ...], ...]  # by label: the tags to write; none where it is not wanted
    least: NDArray[np.float32]  # by label: the least probability; infinite in categories of `BEST_OF`
    best_of: Mapping[str, NDArray[np.intp]]  # by category of `BEST_OF`: its labels' numbers
    ranked: bool  # tags by falling probability, instead of in the order of the labels
    least_best: float  # least probability of the likeliest one in a category of `BEST_OF`


def rules_of(options: TaggingOptions) -> TagRules:
    """Raises: UserError: --tag_replacement cannot be understood."""
    sign = options.caption_separator
    return TagRules(
        thresholds={
            category: options.thresh if own is None else own
            for category in CATEGORIES
            if category not in BEST_OF
            for own in [getattr(options, f"{category}_threshold")]
        },
        rating=_place(options.use_rating_tags, options.use_rating_tags_as_last_tag),
        quality=_place(options.use_quality_tags, options.use_quality_tags_as_last_tag),
        characters_first=options.character_tags_first,
        always_first=tuple(map(key, parse_list(options.always_first_tags or "", sign))),
        undesired=frozenset(map(key, parse_list(options.undesired_tags, sign))),
        replacements=parse_replacements(options.tag_replacement or ""),
        spaces=options.remove_underscore,
        expand_characters=options.character_tag_expand,
        separator=sign,
    )


def _place(first: bool, last: bool) -> Place | None:
    return "first" if first else "last" if last else None


# ---- tags as users write them


def spaced(tag: str) -> str:
    """The tag with spaces for its underscores, unless it is a face such as ``^_^`` or ``||_||``."""
    return tag if len(tag) <= 3 or tag in FACES else tag.replace("_", " ")


def key(tag: str) -> str:
    """The normalised form of a tag, equal for spellings with underscores and with spaces."""
    return spaced(tag.strip())


def split_tags(text: str, separator: str) -> list[str]:
    """The tags of a text, without the space around them. Empty ones are left out."""
    sign = separator.strip() or separator
    return [tag for tag in map(str.strip, text.split(sign)) if tag]


def parse_list(text: str, separator: str) -> list[str]:
    """Tags that an option lists: between commas, and between `separator` where that is something else."""
    return [tag for piece in split_tags(text, ",") for tag in split_tags(piece, separator)]


def parse_replacements(text: str) -> dict[str, str]:
    """``old,new;old,new`` as {key of old: new}; ``\\,`` and ``\\;`` stand for the signs themselves.

    Raises: UserError: a pair is not two tags.
    """
    found = {}
    for pair in re.split(r"(?<!\\);", text):
        if not pair.strip():
            continue
        tags = [re.sub(r"\\([,;])", r"\1", tag).strip() for tag in re.split(r"(?<!\\),", pair)]
        if len(tags) != 2 or not tags[0]:
            raise UserError(
                f'--tag_replacement: "{pair.strip()}" is not of the form old,new; '
                "write \\, and \\; for a comma and a semicolon inside a tag"
            )
        found[key(tags[0])] = tags[1]
    return found


# ---- labels


def make_vocabulary(labels: Sequence[Label], rules: TagRules, *, ranked: bool) -> Vocabulary:
    """Works out once what is the same for every image.

    Args:
        labels: in the order of the model's outputs.
        ranked: tags come by falling probability, and a rating or quality needs the lowest of the thresholds.
    """
    numbers = {category: [n for n, label in enumerate(labels) if label.category == category] for category in BEST_OF}
    return Vocabulary(
        labels=tuple(labels),
        written=tuple(_written(label, rules) for label in labels),
        # Single precision, like the probabilities: 0.35 is to be at least 0.35.
        least=np.array([rules.thresholds.get(label.category, np.inf) for label in labels], dtype=np.float32),
        best_of={category: np.array(found, dtype=np.intp) for category, found in numbers.items()},
        ranked=ranked,
        least_best=min(rules.thresholds.values(), default=0.0) if ranked else 0.0,
    )


def _written(label: Label, rules: TagRules) -> tuple[str, ...]:
    """The tags for a label: expanded, with spaces, replaced, less what is undesired, in this order."""
    tags = [label.name]
    if rules.expand_characters and label.category == "character":
        tags = expanded(label.name)
    if rules.spaces:
        tags = [spaced(tag) for tag in tags]
    together = rules.replacements.get(key(rules.separator.join(tags)))
    texts = [rules.replacements.get(key(tag), tag) for tag in tags] if together is None else [together]
    final = [tag for text in texts for tag in split_tags(text, rules.separator)]
    if key(label.name) in rules.undesired:
        return ()
    return tuple(tag for tag in final if key(tag) not in rules.undesired)


def expanded(name: str) -> list[str]:
    """``name_(series)`` as [name, series], ``name_(costume)_(series)`` as [name_(costume), series].

    A series may hold parentheses itself: ``name_(series_(film))`` becomes [name, series_(film)].
    """
    found = re.fullmatch(r"(.+?)[_ ]?\(((?:[^()]|\([^()]*\))+)\)", name)
    return [found[1], found[2]] if found else [name]


# ---- images


def choose_tags(probabilities: NDArray[np.float32], words: Vocabulary, rules: TagRules) -> list[str]:
    """The tags of one image as they are written, none of them twice.

    Characters come last, wherever the labels have them. Where they go first they do so one by one, so that of several
    the last one leads, as tag files of the field have it. A ranked vocabulary keeps its order in both.

    Args:
        probabilities: (labels,), from 0 to 1.
    """
    found = np.flatnonzero(probabilities >= words.least)
    if words.ranked:
        found = found[np.argsort(-probabilities[found], kind="stable")]
    order = found.tolist()
    if rules.characters_first or not words.ranked:
        characters = [number for number in order if words.labels[number].category == "character"]
        others = [number for number in order if words.labels[number].category != "character"]
        first = characters if words.ranked else reversed(characters)
        order = [*first, *others] if rules.characters_first else [*others, *characters]
    tags = [tag for number in order for tag in words.written[number]]
    for category, place in (("rating", rules.rating), ("quality", rules.quality)):
        numbers, best = words.best_of[category], ()
        if place and len(numbers):
            likeliest = int(numbers[probabilities[numbers].argmax()])
            if probabilities[likeliest] >= np.float32(words.least_best):
                best = words.written[likeliest]
        tags = [*best, *tags] if place == "first" else [*tags, *best]
    tags = list(dict.fromkeys(tags))
    for wanted in rules.always_first:
        tags.sort(key=lambda tag: key(tag) != wanted)
    return tags


def probabilities_in_words(probabilities: NDArray[np.float32], words: Vocabulary) -> list[str]:
    """The tagger's probabilities as text: one line per category, e.g. "general: long_hair 0.93, smile 0.41"."""
    lines = []
    for category in CATEGORIES:
        numbers = [n for n, label in enumerate(words.labels) if label.category == category]
        if category not in BEST_OF:
            numbers = [n for n in numbers if probabilities[n] >= words.least[n]]
        numbers.sort(key=lambda n: -probabilities[n])
        if numbers:
            parts = (f"{words.labels[n].name} {probabilities[n]:.2f}" for n in numbers)
            lines.append(f"{category}: {', '.join(parts)}")
    return lines


def with_appended(text: str, tags: Iterable[str], separator: str) -> str:
    """A tag file's text with those tags added that it lacks, in either spelling; the text itself if it lacks none.

    Each line is a caption of its own, and gets the tags that it lacks.
    """
    tags = list(tags)
    lines = []
    for line in text.split("\n"):
        there = {key(tag) for tag in split_tags(line, separator)}
        missing = [tag for tag in tags if key(tag) not in there]
        lines.append(separator.join([line, *missing] if line else missing))
    return "\n".join(lines)
