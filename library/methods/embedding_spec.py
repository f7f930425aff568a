"""Training of an embedding (Textual Inversion), as a method: its spec, and what is checked before torch is imported."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from library.checkpoints.embeddings import names_by_part
from library.checkpoints.reading import read_names, require_weights
from library.entry_points import EntryPoint
from library.errors import UserError
from library.methods.spec import MethodSpec
from library.options.embedding import EMBEDDING_GROUPS
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
    options, problems = opts.method, []
    vocabulary = json.loads((CLIP_VOCABULARY / "vocab.json").read_text(encoding="utf-8"))
    if not is_new(vocabulary, options.caption_word):
        problems.append(token_is_known(options.caption_word))
    if options.weights:
        try:
            require_weights(options.weights)
            names = read_names(options.weights)
            if names:  # none: they lie deeper, or only loading shows them
                names_by_part(names, trained_keys(opts, traits), options.weights)
        except UserError as error:
            problems += error.problems
    return problems


def name_by_word(opts: Options) -> Options:
    """The options with --output_name, which is the word if not given: by the file's name user interfaces know it."""
    word = opts.method.caption_word
    if opts.saving.output_name is not None or word is None or not word.isprintable():
        return opts
    return opts.replaced(output_name=re.sub(r"[/\\:]", "_", word))


EMBEDDING = MethodSpec(
    name="embedding",
    title="Trains the embedding of a new word (Textual Inversion) for {model}.",
    tracker="textual_inversion",
    groups=EMBEDDING_GROUPS,
    method=EntryPoint("library.methods.embedding:EmbeddingMethod"),
    check=check_options,
    complete_options=name_by_word,
)
