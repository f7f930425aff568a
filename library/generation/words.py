"""Textual Inversion embeddings: words of prompts that have vectors of their own.

Those of extended Textual Inversion (XTI) have other ones for each place where the denoiser reads the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.checkpoints.embeddings import names_by_part, read_embedding
from library.errors import UserError
from library.methods.words import ExtendedEmbedding, pool_at_eos
from library.methods.xti import PlacedText, read_by_place
from library.runtime.logs import LOGGER
from library.text.added_word import AddedWordTokenizer, is_new

if TYPE_CHECKING:
    from torch import Tensor

    from library.families.base import Family
    from library.types import FamilyTraits, Models

_PLAIN, _BY_PLACE = "--textual_inversion_embeddings", "--XTI_embeddings"


@dataclass(frozen=True)
class Word:
    """An embedding as its file has it."""

    option: str  # that names the file, and says which kind of embedding it is
    path: Path
    vectors: Mapping[str, Tensor]  # by their names in the file, each (n, width)


def read_words(paths: Sequence[str], by_place: Sequence[str] = ()) -> dict[str, Word]:
    """By word, its embedding. The word is the file's name.

    Args: by_place: files of extended Textual Inversion.
    Raises: UserError: a file is missing or no embedding, or two of them have one name.
    """
    found: dict[str, Word] = {}
    for option, path in [*((_PLAIN, Path(path)) for path in paths), *((_BY_PLACE, Path(path)) for path in by_place)]:
        if path.stem in found:
            raise UserError(f"{option}: {path} and {found[path.stem].path} have one name, which is the word in prompts")
        try:
            found[path.stem] = Word(option, path, read_embedding(path))
        except UserError as error:
            raise UserError(*(f"{option}: {problem}" for problem in error.problems)) from None
    return found


def add_words(
    models: Models, traits: FamilyTraits, words: Mapping[str, Word], places: Sequence[str] = ()
) -> Callable[[int], None]:
    """Teaches the words to the text encoders, which are on their device by now, and to the tokenizers.

    Args: places: names of those for which words of extended Textual Inversion have vectors.
    Returns: what chooses the place for which texts are encoded from then on, by its number.
    Raises: UserError: vectors that do not fit, or a word that a text encoder has already.
    """
    keys = {part: key for part, key in traits.embedding_keys.items() if part in models.text_encoders}
    rows: dict[str, list[Tensor]] = {}
    first: dict[str, int] = {}
    for name, word in words.items():
        for part, own in _vectors_by_part(word, keys, places).items():
            _, count, width = own.shape
            expected = models.text_encoders[part].get_input_embeddings().weight.shape[1]
            if width != expected:
                raise UserError(
                    f"{word.option}: {word.path}: its vectors have the width {width}, and this model's {expected}; it "
                    "is of another kind of model"
                )
            if not is_new(models.tokenizers[part].get_vocab(), name):
                raise UserError(
                    f"{word.option}: {word.path}: {name!r} is a token of the text encoder already; rename the file to "
                    "a word that it does not know"
                )
            models.tokenizers[part] = tokenizer = AddedWordTokenizer(models.tokenizers[part], name, count)
            first.setdefault(part, tokenizer.first_id)
            rows.setdefault(part, []).append(own)
            LOGGER.info("%s: %d vectors for the word %r", word.path, count, name)
    chosen = [0]
    for part, found in rows.items():
        _extend(models, part, first[part], found, chosen)
    return lambda place: chosen.__setitem__(0, place)


def add_words_by_place(family: Family, models: Models, words: Mapping[str, Word]) -> dict[str, list[str]]:
    """`add_words`; where some are of extended Textual Inversion, texts get an axis for the places.

    Returns: the paths of the denoiser's layers by place, see `Family.text_places`; none without such words.
    Raises: UserError: as `add_words`, or there are no such embeddings for the family.
    """
    if all(word.option == _PLAIN for word in words.values()):
        add_words(models, family.traits, words)
        return {}
    if family.text_places is None:
        raise UserError(f"{_BY_PLACE}: there are no such embeddings for {family.traits.label}")
    places = family.text_places(models)
    family.text = PlacedText(family.text, len(places), add_words(models, family.traits, words, tuple(places)))
    read_by_place(models.denoiser, places)
    return places


def _vectors_by_part(word: Word, keys: Mapping[str, str], places: Sequence[str]) -> dict[str, Tensor]:
    """By text encoder, (places or 1, n, width). Raises: UserError: the file is none of this kind of model."""
    if word.option == _PLAIN:
        names = names_by_part(word.vectors, keys, word.path)
        return {part: word.vectors[name][None] for part, name in names.items()}
    if set(word.vectors) != set(places):
        held = ", ".join(sorted(word.vectors))
        raise UserError(f"{word.option}: {word.path}: holds {held}; an embedding for {', '.join(places)} is needed")
    (part,) = keys  # a family that has places has one text encoder
    return {part: torch.stack([word.vectors[place] for place in places])}


def _extend(models: Models, part: str, first_id: int, rows: Sequence[Tensor], chosen: Sequence[int]) -> None:
    """Gives a text encoder the rows of all words. Args: chosen: holds the number of the place."""
    encoder = models.text_encoders[part]
    places = max(map(len, rows))
    table = torch.cat([own.expand(places, -1, -1) for own in rows], dim=1).to(encoder.device)
    embedding = ExtendedEmbedding(
        encoder.get_input_embeddings(), first_id, table.shape[1], lambda: table[chosen[0] % places]
    )
    encoder.set_input_embeddings(embedding)
    pool_at_eos(encoder, models.tokenizers[part].eos_token_id)
