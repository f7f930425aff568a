"""Vectors of new words beside the tables of frozen text encoders, which captions reach through the tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from library.checkpoints.embeddings import names_by_part
from library.checkpoints.hashes import weights_fingerprint
from library.errors import UserError
from library.runtime.logs import LOGGER
from library.runtime.seeds import derive
from library.text.added_word import AddedWordTokenizer

if TYPE_CHECKING:
    from library.options.words import WordFields
    from library.types import Models

_OLD_EOS = 2  # in configs from before transformers 4.31, by which CLIP pools at the largest id instead


class TrainedWords:
    """Words with vectors of their own in each text encoder that has a key.

    Args:
        options: the words, how many vectors they have, and where these start.
        seed: of random vectors.
        files: by word, the file to start from and its vectors by their names there. They decide how many there are.

    Attributes:
        names: the words.
        keys: by text encoder, the name of its vectors in files.
        rows: the vectors by text encoder, those of all words one after the other, (n, width) float32.
    """

    def __init__(
        self, options: WordFields, seed: int | None, files: Mapping[str, tuple[str, Mapping[str, Tensor]]] | None = None
    ):
        self.names = options.caption_words
        self._first_words = dict(zip(self.names, options.first_words, strict=True))
        self._seed, self._files = seed or 0, files or {}
        self._counts = {
            word: len(next(iter(self._files[word][1].values())))
            if word in self._files
            else options.num_vectors_per_token
            for word in self.names
        }
        self.keys: dict[str, str] = {}
        self.rows = nn.ParameterDict()

    def attach(self, models: Models, keys: Mapping[str, str]) -> None:
        """Teaches the words to the text encoders and tokenizers of `models`.

        Raises: UserError: a text encoder is not there, or knows a word already, or a file does not fit.
        """
        self.keys = dict(keys)
        missing = [key for part, key in keys.items() if part not in models.text_encoders]
        if missing:
            raise UserError(
                f"--token_string: the text encoder {missing[0]} is not there to train the word for; give it"
            )
        for part in keys:
            encoder, plain = models.text_encoders[part], models.tokenizers[part]
            tokenizer, first_ids = plain, []
            for word, count in self._counts.items():
                tokenizer = AddedWordTokenizer(tokenizer, word, count)
                first_ids.append(tokenizer.first_id)
            table = encoder.get_input_embeddings()
            self.rows[part] = nn.Parameter(self._start(part, table.weight.detach(), plain).to(table.weight.device))
            rows = partial(self.current, part)
            encoder.set_input_embeddings(ExtendedEmbedding(table, first_ids[0], sum(self._counts.values()), rows))
            pool_at_eos(encoder, tokenizer.eos_token_id)
            models.tokenizers[part] = tokenizer
        for word, count in self._counts.items():
            shown = ", ".join(f"{key} {count}x{self.rows[part].shape[1]}" for part, key in self.keys.items())
            LOGGER.info("word %r: vectors: %s", word, shown)

    def current(self, part: str) -> Tensor:
        """The rows that captions reach now, (n, width)."""
        return self.rows[part]

    def vectors(self) -> dict[str, dict[str, Tensor]]:
        """By word, its vectors by the names they have in files, each (n, width)."""
        return {
            word: {key: self.rows[part][first : first + count] for part, key in self.keys.items()}
            for word, (first, count) in self._placed().items()
        }

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Optimizer groups, see `Method.parameter_groups`."""
        names = {part: f"embedding {key}" if len(self.keys) > 1 else "embedding" for part, key in self.keys.items()}
        return [{"params": [self.rows[part]], "lr": rate, "name": names[part]} for part in self.keys]

    def fingerprint(self) -> dict[str, str]:
        """See `Method.text_fingerprint`."""
        return dict.fromkeys(self.keys, f"{weights_fingerprint(self.rows)} for {' '.join(self.names)}")

    def _placed(self) -> dict[str, tuple[int, int]]:
        """By word, where its rows begin and how many there are."""
        places, first = {}, 0
        for word, count in self._counts.items():
            places[word] = (first, count)
            first += count
        return places

    def _start(self, part: str, table: Tensor, tokenizer: Any) -> Tensor:
        """Where training starts in a text encoder. Args: table: its own vectors, (vocabulary, width)."""
        return torch.cat([self._first_vectors(word, part, table, tokenizer) for word in self.names])

    def _first_vectors(self, word: str, part: str, table: Tensor, tokenizer: Any) -> Tensor:
        """Of one word, (n, width) float32. Raises: UserError: its file does not fit."""
        if word in self._files:
            path, vectors = self._files[word]
            names = names_by_part(vectors, self.keys, path)
            if part in names:
                found = vectors[names[part]]
                require_width(found, table, path)
                return found.clone()
            LOGGER.warning("%s: holds no %s, whose vectors start as new ones", path, self.keys[part])
        return self._new_vectors(word, part, table, tokenizer)

    def _new_vectors(self, word: str, part: str, table: Tensor, tokenizer: Any) -> Tensor:
        """Those of --init_word in turn, else random ones."""
        count, like = self._counts[word], self._first_words[word]
        if like is None:
            place = () if word == self.names[0] else (word,)  # the first is as it would be alone
            generator = torch.Generator().manual_seed(derive(self._seed, "embedding", part, *place))
            return random_vectors(table, count, generator)
        ids = tokenizer(like, add_special_tokens=False).input_ids
        if not ids:
            raise UserError(f"--init_word: {like!r} has no token; give a word that the text encoder knows")
        if len(ids) != count:
            what = "their vectors repeat" if len(ids) < count else "the first ones count"
            LOGGER.warning(
                "--init_word: %r has %d token%s for %s, and the word %d vectors; %s",
                *(like, len(ids), "" if len(ids) == 1 else "s", self.keys[part], count, what),
            )
        return table[[ids[number % len(ids)] for number in range(count)]].float()


def require_width(vectors: Tensor, table: Tensor, path: str) -> None:
    """Raises: UserError: vectors of the file `path` are not as wide as a text encoder's own."""
    if vectors.shape[1] != table.shape[1]:
        raise UserError(
            f"{path}: its vectors have the width {vectors.shape[1]}, and this model's {table.shape[1]}; "
            "it is of another kind of model"
        )


class ExtendedEmbedding(nn.Embedding):
    """A frozen embedding, with trained rows for ids from `first_id` on. Its own weights and their name stay.

    Args:
        base: what it takes the place of; the weight is shared, not copied.
        rows: gives the rows, (count, width). They are no part of this module, which is a part of the frozen model.
    """

    def __init__(self, base: nn.Embedding, first_id: int, count: int, rows: Callable[[], Tensor]):
        super().__init__(*base.weight.shape, padding_idx=base.padding_idx, _weight=base.weight.detach(), _freeze=True)
        self.num_embeddings = max(base.num_embeddings, first_id + count)  # all ids that it takes
        self.first_id, self.count, self.rows = first_id, count, rows

    def forward(self, ids: Tensor) -> Tensor:
        """Ids of any shape to vectors, (*shape, width), in the dtype of the frozen weights."""
        own = (ids >= self.first_id) & (ids < self.first_id + self.count)
        known = super().forward(ids.masked_fill(own, 0))
        added = functional.embedding((ids - self.first_id).masked_fill(~own, 0), self.rows().to(known.dtype))
        return torch.where(own[..., None], added, known)


def random_vectors(table: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Vectors that look like those of words, (count, width) float32: normal, with mean and deviation of each column.

    Args: table: (vocabulary, width).
    """
    deviation, mean = torch.std_mean(table.float(), dim=0)
    return (mean.cpu() + deviation.cpu() * torch.randn(count, table.shape[1], generator=rng)).to(table.device)


def pool_at_eos(text_encoder: nn.Module, eos_token_id: int) -> None:
    """Lets CLIP take the pooled text at EOS, where an old config has it look for the largest id: that is EOS no more.

    Without new tokens both are the same place.
    """
    for module in text_encoder.modules():
        if getattr(module, "eos_token_id", None) == _OLD_EOS:
            module.eos_token_id = eos_token_id
