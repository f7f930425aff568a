"""Training of an embedding (Textual Inversion), as a method: its spec, and what is checked before torch is imported."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.embeddings import names_by_part
from library.checkpoints.reading import read_names, require_weights
from library.entry_points import EntryPoint
from library.errors import UserError
from library.methods.spec import MethodSpec
from library.options.embedding import EMBEDDING_GROUPS, XTI_GROUPS
from library.text.added_word import is_new, token_is_known
from library.text.tokenizers import CLIP_VOCABULARY

if TYPE_CHECKING:
    from library.options.base import Options
    from library.types import FamilyTraits

T5_KEY = "t5xxl"  # in files; T5 has vectors of its own only on request


def trained_keys(opts: Options, traits: FamilyTraits) -> dict[str, str]:
    """The text encoders that get vectors, with the names that these have in files."""
    keys = traits.embedding_keys
    return {part: key for part, key in keys.items() if key != T5_KEY or opts.method.train_t5xxl}


def check_options(opts: Options, traits: FamilyTraits) -> list[str]:
    """One line for a word that is none of the user's own, and for a file of --weights that cannot be used."""
    return [*known_words(opts.method.caption_words), *_weights_problems(opts, trained_keys(opts, traits))]


def check_placed(opts: Options, traits: FamilyTraits) -> list[str]:
    """As `check_options`, for files whose names only the model knows."""
    return [*known_words(opts.method.caption_words), *_weights_problems(opts, None)]


def known_words(words: Iterable[str]) -> list[str]:
    """One line for each word that CLIP has a token for."""
    vocabulary = json.loads((CLIP_VOCABULARY / "vocab.json").read_text(encoding="utf-8")) if words else {}
    return [token_is_known(word) for word in words if not is_new(vocabulary, word)]


def _weights_problems(opts: Options, keys: Mapping[str, str] | None) -> list[str]:
    """One line for each file of --weights that cannot be used.

    Args: keys: see `names_by_part`; None: names are judged later.
    """
    problems = []
    for path in opts.method.weights or ():
        try:
            require_weights(path)
            names = read_names(path)
            if names and keys is not None:  # none: they lie deeper, or only loading shows them
                names_by_part(names, keys, path)
        except UserError as error:
            problems += error.problems
    return problems


def name_by_word(opts: Options) -> Options:
    """The options with --output_name, the first word if not given: by the file's name user interfaces know it."""
    words = opts.method.caption_words
    if opts.saving.output_name is not None or not words or not words[0].isprintable():
        return opts
    return opts.replaced(output_name=as_name(words[0]))


def file_names(path: Path, opts: Options) -> dict[str, Path]:
    """By word, its file where the first word has `path`.

    The others are named by their words, behind --output_name where that was given.
    """
    first, *others = opts.method.caption_words
    given, end = opts.saving.output_name or "", path.name
    rest = end.removeprefix(given)  # such as "-step00000100.pt"
    start = f"{given}_" if "output_name" in opts.explicit else ""
    return {first: path, **{word: path.with_name(f"{start}{as_name(word)}{rest}") for word in others}}


def as_name(word: str) -> str:
    """A word as a part of a file's name."""
    return re.sub(r"[/\\:]", "_", word)


EMBEDDING = MethodSpec(
    name="embedding",
    title="Trains the embedding of a new word (Textual Inversion) for {model}.",
    tracker="textual_inversion",
    usage="--textual_inversion_embeddings={file}",
    groups=EMBEDDING_GROUPS,
    method=EntryPoint("library.methods.embedding:EmbeddingMethod"),
    check=check_options,
    complete_options=name_by_word,
)

XTI = MethodSpec(
    name="xti",
    title="Trains embeddings of a new word, one for each cross-attention layer (XTI), for {model}.",
    tracker="textual_inversion",
    groups=XTI_GROUPS,
    method=EntryPoint("library.methods.xti:XtiMethod"),
    check=check_placed,
    complete_options=name_by_word,
)
