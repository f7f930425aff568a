"""Textual Inversion embeddings: words of prompts that have vectors of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.checkpoints.embeddings import names_by_part, read_embedding
from library.errors import UserError
from library.methods.words import ExtendedEmbedding, pool_at_eos
from library.runtime.logs import LOGGER
from library.text.added_word import AddedWordTokenizer, is_new

if TYPE_CHECKING:
    from torch import Tensor

    from library.types import FamilyTraits, Models

_OPTION = "--textual_inversion_embeddings"


def read_words(paths: Sequence[str]) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """By word, the file and its vectors. The word is the file's name.

    Raises: UserError: a file is missing or no embedding, or two of them have one name.
    """
    found: dict[str, tuple[Path, dict[str, Tensor]]] = {}
    for path in map(Path, paths):
        if path.stem in found:
            raise UserError(f"{_OPTION}: {path} and {found[path.stem][0]} have one name, which is the word in prompts")
        try:
            found[path.stem] = path, read_embedding(path)
        except UserError as error:
            raise UserError(*(f"{_OPTION}: {problem}" for problem in error.problems)) from None
    return found


def add_words(models: Models, traits: FamilyTraits, words: Mapping[str, tuple[Path, dict[str, Tensor]]]) -> None:
    """Teaches the words to the text encoders, which are on their device by now, and to the tokenizers.

    Raises: UserError: vectors that do not fit, or a word that a text encoder has already.
    """
    keys = {part: key for part, key in traits.embedding_keys.items() if part in models.text_encoders}
    rows: dict[str, list[Tensor]] = {}
    first: dict[str, int] = {}
    for word, (path, vectors) in words.items():
        for part, name in names_by_part(vectors, keys, path).items():
            own, encoder = vectors[name], models.text_encoders[part]
            width = encoder.get_input_embeddings().weight.shape[1]
            if own.shape[1] != width:
                raise UserError(
                    f"{_OPTION}: {path}: its vectors have the width {own.shape[1]}, and this model's {width}; it is of "
                    "another kind of model"
                )
            if not is_new(models.tokenizers[part].get_vocab(), word):
                raise UserError(
                    f"{_OPTION}: {path}: {word!r} is a token of the text encoder already; rename the file to a word "
                    "that it does not know"
                )
            models.tokenizers[part] = tokenizer = AddedWordTokenizer(models.tokenizers[part], word, len(own))
            first.setdefault(part, tokenizer.first_id)
            rows.setdefault(part, []).append(own)
            LOGGER.info("%s: %d vectors for the word %r", path, len(own), word)
    for part, found in rows.items():
        encoder = models.text_encoders[part]
        table = torch.cat(found).to(encoder.device)
        embedding = ExtendedEmbedding(
            encoder.get_input_embeddings(), first[part], len(table), lambda table=table: table
        )
        encoder.set_input_embeddings(embedding)
        pool_at_eos(encoder, models.tokenizers[part].eos_token_id)
