"""Extended Textual Inversion: a word has vectors of its own for each place where the denoiser reads the text.

Voynov et al. 2023, arXiv:2303.09522.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.checkpoints.embeddings import write_embedding
from library.errors import UserError
from library.families.base import TextEncoding
from library.methods.embedding import EmbeddingMethod
from library.methods.embedding_spec import file_names
from library.methods.words import TrainedWords, require_width
from library.types import TextCond

if TYPE_CHECKING:
    from library.families.base import Family
    from library.types import Models, TextLayout


class XtiMethod(EmbeddingMethod):
    """Vectors of `--token_string` for each cross-attention layer of the denoiser."""

    _words: PlacedWords

    def _make_words(self, files: Mapping[str, tuple[str, Mapping[str, Tensor]]]) -> TrainedWords:
        return PlacedWords(self.opts.method, self.opts.training.seed, files)

    def attach(self, family: Family, models: Models) -> None:
        assert family.text_places is not None, "a family that offers this method says where it reads texts"
        places = family.text_places(models)
        self._words.places = tuple(places)
        super().attach(family, models)
        family.text = PlacedText(family.text, len(places), self._words.turn_to)
        read_by_place(models.denoiser, places)

    # ---- what is saved

    def file_suffix(self) -> str:
        return ".safetensors"

    def save(self, path: Path, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        """A file for each word, with the vectors by place and without metadata."""
        vectors = self._words.vectors()
        for word, file in file_names(path, self.opts).items():
            write_embedding(file, vectors[word], dtype, None)


class PlacedWords(TrainedWords):
    """Words with other vectors at each place. The rows of a text encoder are those of the first place, the second ...

    Attributes: places: their names in files, to be set before `attach`.
    """

    places: tuple[str, ...] = ()
    _place: int = 0

    def turn_to(self, place: int) -> None:
        """Captions that are encoded from now on are those for this place."""
        self._place = place

    def current(self, part: str) -> Tensor:
        return self.rows[part].unflatten(0, (len(self.places), -1))[self._place]

    def vectors(self) -> dict[str, dict[str, Tensor]]:
        (part,) = self.keys
        by_place = dict(zip(self.places, self.rows[part].unflatten(0, (len(self.places), -1)), strict=True))
        return {
            word: {place: rows[first : first + count] for place, rows in by_place.items()}
            for word, (first, count) in self._placed().items()
        }

    def _start(self, part: str, table: Tensor, tokenizer: Any) -> Tensor:
        words = [self._first_by_place(word, part, table, tokenizer) for word in self.names]
        return torch.cat(words, dim=1).flatten(0, 1)

    def _first_by_place(self, word: str, part: str, table: Tensor, tokenizer: Any) -> Tensor:
        """Of one word, (places, n, width): those of its file, or at each place what a plain embedding starts from."""
        path, vectors = self._files.get(word, ("", {}))
        if not vectors or self.keys[part] in vectors:
            return self._first_vectors(word, part, table, tokenizer).repeat(len(self.places), 1, 1)
        lacking = [place for place in self.places if place not in vectors]
        if lacking or len(vectors) != len(self.places):
            held = ", ".join(sorted(vectors))
            raise UserError(f"{path}: holds {held}; an embedding for {', '.join(self.places)} is needed")
        found = torch.stack([vectors[place] for place in self.places])
        require_width(found[0], table, path)
        return found


class PlacedText(TextEncoding):
    """A family's reading of captions, once for each place: every tensor has the places as its second axis.

    Args: inner: reads them for the place that was chosen last. choose: chooses a place.
    """

    def __init__(self, inner: TextEncoding, places: int, choose: Callable[[int], None]):
        super().__init__(inner.opts)
        self._inner, self._places, self._choose = inner, places, choose

    def encode(
        self, models: Models, captions: list[str], *, emphasis: bool | None = None, cached: TextCond | None = None
    ) -> TextCond:
        """(B, places, ...) of each of the family's tensors."""
        found = []
        for place in range(self._places):
            self._choose(place)
            found.append(self._inner.encode(models, captions, emphasis=emphasis, cached=cached).tensors)
        return TextCond({name: torch.stack([tensors[name] for tensors in found], dim=1) for name in found[0]})

    def layout(self, models: Models | None = None) -> TextLayout | None:
        return self._inner.layout(models)


def read_by_place(model: nn.Module, places: Mapping[str, Sequence[str]]) -> None:
    """Lets each cross-attention layer of a model read a `PlacedText` for its place.

    Args: places: paths of layers in the order of the text's second axis; those that the model lacks are left out.
    """
    layers = dict(model.named_modules())
    for number, paths in enumerate(places.values()):
        for path in paths:
            if path in layers:
                layers[path].register_forward_pre_hook(partial(_read_at, number), with_kwargs=True)


def _read_at(place: int, _layer: nn.Module, args: Sequence[Any], words: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Chooses the text for a place: of (..., places, tokens, width)."""
    return args, {**words, "encoder_hidden_states": words["encoder_hidden_states"][..., place, :, :]}
