"""Caption files, and what a caption becomes for one training step. Pure functions; randomness comes from the caller."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from library.runtime.documents import read_text

DEFAULT_EXTENSION = ".caption"
LARGEST_CAPTION = 1 << 20  # bytes; a text encoder reads a few hundred words

_PLAIN_BRACES = {"{{": "{", "}}": "}"}


@dataclass(frozen=True)
class CaptionOptions:
    """The caption options of one subset; the names are those of the dataset config and of the flags."""

    shuffle_caption: bool = False
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0  # probability in [0, 1] of an empty caption
    caption_dropout_every_n_epochs: int = 0  # 0: never
    caption_tag_dropout_rate: float = 0.0  # probability in [0, 1], for each token that is not kept
    token_warmup_min: int = 1
    token_warmup_step: float = 0  # optimizer steps; below 1, a fraction of the whole run
    templates: tuple[str, ...] = ()  # one of them, drawn each time, replaces the caption

    @property
    def splits(self) -> bool:
        """Whether captions are taken apart into tokens."""
        return self.shuffle_caption or self.token_warmup_step > 0 or self.caption_tag_dropout_rate > 0

    def with_run_length(self, total_steps: int) -> CaptionOptions:
        """The same options with a fractional token warm-up turned into optimizer steps (rounded down)."""
        if not 0 < self.token_warmup_step < 1:
            return self
        return replace(self, token_warmup_step=math.floor(self.token_warmup_step * total_steps))


def changing(captions: CaptionOptions, place: str) -> Iterable[str]:
    """Why the captions of one subset change during training, so that their outputs cannot be cached; one line each.

    Args:
        place: names the subset, e.g. "data.toml, [[datasets]] 1".
    """
    changing = {
        "shuffle_caption": captions.shuffle_caption,
        "caption_tag_dropout_rate": captions.caption_tag_dropout_rate > 0,
        "token_warmup_step": captions.token_warmup_step > 0,
        "enable_wildcard": captions.enable_wildcard,
        "caption_dropout_rate": captions.caption_dropout_rate > 0,
        "caption_dropout_every_n_epochs": captions.caption_dropout_every_n_epochs > 0,
        "a template (--use_object_template, --use_style_template)": bool(captions.templates),
    }
    for name, in_use in changing.items():
        if in_use:
            yield (
                f"{place}: {name} changes the caption during training, so text encoder outputs cannot be cached; "
                f"remove {name}, or train without cached text encoder outputs"
            )


def make_caption(raw: str, options: CaptionOptions, rng: Random, epoch: int, step: int) -> str:
    """The caption of one item at one moment of the run.

    Args:
        raw: what the caption file says (see `read_caption`), or the class tokens.
        epoch: counted from 1.
        step: optimizer steps finished so far; only token warm-up asks.
    """
    if options.templates:
        return rng.choice(options.templates)
    caption = " ".join(part for part in (options.caption_prefix, raw, options.caption_suffix) if part)
    # The draw comes first, so that whether this is a "drop" epoch does not shift the item's later draws.
    at_random = options.caption_dropout_rate > 0 and rng.random() < options.caption_dropout_rate
    every, mark = options.caption_dropout_every_n_epochs, options.keep_tokens_separator
    if at_random or (every > 0 and epoch % every == 0):
        return ""
    caption = _choose_wildcards(caption, rng) if options.enable_wildcard else caption.split("\n", 1)[0]
    if options.splits:
        caption = _rearrange(caption, options, rng, step)
    elif mark and mark in caption:
        # An instruction to us; earlier trainers let it through to the tokenizer when nothing was shuffled.
        pieces = (piece.strip(options.caption_separator + " ") for piece in caption.split(mark))
        caption = ", ".join(piece for piece in pieces if piece)
    if options.secondary_separator:
        caption = caption.replace(options.secondary_separator, options.caption_separator)
    return caption


def _choose_wildcards(caption: str, rng: Random) -> str:
    """One line of several, then one alternative of every ``{a|b}``.

    Alternatives may be empty, may be repeated to make them likelier, and may hold groups, which are chosen innermost
    first. A brace without a partner stays as it is.
    """
    open_groups = [[""]]  # the alternatives so far, outermost group first; the first entry is the line itself
    for token in _brace_tokens(rng.choice(caption.split("\n"))):
        inside = len(open_groups) > 1
        if token == "{":
            open_groups.append([""])
        elif token == "}" and inside:
            chosen = rng.choice(open_groups.pop())
            open_groups[-1][-1] += chosen
        elif token == "|" and inside:
            open_groups[-1].append("")
        else:
            open_groups[-1][-1] += _PLAIN_BRACES.get(token, token)
    while len(open_groups) > 1:
        unclosed = "{" + "|".join(open_groups.pop())
        open_groups[-1][-1] += unclosed
    return open_groups[0][0]


def _brace_tokens(line: str) -> list[str]:
    """The line as ``{``, ``|``, ``}``, plain braces ``{{`` and ``}}``, and the text between them.

    ``{{`` and ``}}`` are also what nested groups begin and end with. Where all braces of the line pair up one by one,
    two neighbours are plain if their partners are neighbours too: ``{{a}}`` is the text {a}, while ``{{a|b}|c}`` and
    ``{a|{b|c}}`` are groups within groups. Where they do not pair up, every ``{{`` and ``}}`` is plain: ``{:{{|:)}``.
    """
    tokens = re.findall(r"[{}|]|[^{}|]+", line)
    opened: list[int] = []
    partners: dict[int, int] = {}  # the index of the closing brace for each opening one
    for at, token in enumerate(tokens):
        if token == "{":
            opened.append(at)
        elif token == "}" and opened:
            partners[opened.pop()] = at
    if opened or len(partners) < tokens.count("}"):  # some brace has no partner
        return re.findall(r"\{\{|\}\}|[{}|]|[^{}|]+", line)
    for opening, closing in sorted(partners.items()):
        if tokens[opening] == "{" and partners.get(opening + 1) == closing - 1:
            tokens[opening : opening + 2] = "{{", ""
            tokens[closing - 1 : closing + 1] = "", "}}"
    return tokens


def _rearrange(caption: str, options: CaptionOptions, rng: Random, step: int) -> str:
    mark, separator = options.keep_tokens_separator, options.caption_separator
    if mark and mark in caption:
        head, middle, *rest = caption.split(mark)
        parts = (head, middle, separator.join(rest))
        fixed, flexible, tail = ([t for t in map(str.strip, part.split(separator)) if t] for part in parts)
    else:
        tokens = [token.strip() for token in caption.split(separator)]  # with empty ones, as earlier trainers had it
        fixed, flexible, tail = tokens[: options.keep_tokens], tokens[options.keep_tokens :], []
    if step < options.token_warmup_step:
        grown = step * (len(flexible) - options.token_warmup_min) / options.token_warmup_step
        flexible = flexible[: math.floor(grown) + options.token_warmup_min]
    if options.shuffle_caption:
        rng.shuffle(flexible)
    if options.caption_tag_dropout_rate > 0:
        flexible = [token for token in flexible if rng.random() >= options.caption_tag_dropout_rate]
    return ", ".join(fixed + flexible + tail)


def caption_name(image: str, extension: str, names: Collection[str]) -> str | None:
    """The file name of an image's caption, from that of the image. `names` are the folder's file names.

    Images cut out around a face are called ``<name>_<cx>_<cy>_<w>_<h>`` and may share the caption of ``<name>``.
    """
    stem = image.rpartition(".")[0] or image
    if stem + extension in names:
        return stem + extension
    fields = stem.rsplit("_", 4)
    shared = fields[0] + extension
    return shared if len(fields) == 5 and shared in names else None


def read_caption(path: Path, *, multiline: bool) -> str:
    """The text of a caption file: its first line, or with `multiline` every line that is not blank.

    Lines end as text files end them, in any system. Signs that a word processor or a web page leaves inside a line,
    such as U+2028 or a form feed, do not end it.

    Raises: UserError: the file cannot be read, has more than `LARGEST_CAPTION` bytes, or is not UTF-8.
    """
    text = read_text(path, "the caption file", limit=LARGEST_CAPTION)
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    if multiline:
        return "\n".join(line for line in lines if line)
    return lines[0]


def extension_in_use(extension: str, images: Sequence[str], names: Collection[str]) -> str:
    """The extension of a folder's captions: `.txt` where the default finds nothing and there are `.txt` files.

    Nearly every caption in the field is a `.txt` file; training on folder names beside them is never what was meant.
    """
    if extension != DEFAULT_EXTENSION or _any_caption(images, extension, names):
        return extension
    return ".txt" if _any_caption(images, ".txt", names) else extension


def _any_caption(images: Iterable[str], extension: str, names: Collection[str]) -> bool:
    return any(caption_name(image, extension, names) for image in images)
