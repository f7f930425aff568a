"""Trains the vectors of a new word beside the frozen model (Textual Inversion, Gal et al. 2022, arXiv:2208.01618)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from library.checkpoints.embeddings import names_by_part, read_embedding, write_embedding
from library.checkpoints.hashes import weights_fingerprint
from library.errors import UserError
from library.methods.base import Method
from library.methods.embedding_spec import trained_keys
from library.runtime.logs import LOGGER
from library.runtime.seeds import derive
from library.text.added_word import AddedWordTokenizer

if TYPE_CHECKING:
    from library.families.base import Family
    from library.options.base import Options
    from library.types import Models

_OLD_EOS = 2  # in configs from before transformers 4.31, by which CLIP pools at the largest id instead


class EmbeddingMethod(Method):
    """Vectors of `--token_string` for each text encoder that has them; nothing else of the model changes."""

    def __init__(self, opts: Options):
        """Raises: UserError: --weights is no embedding, or has another number of vectors than is asked for."""
        super().__init__(opts)
        options = opts.method
        self._file = read_embedding(options.weights) if options.weights else None
        self._count = options.num_vectors_per_token
        if self._file is not None:
            count = len(next(iter(self._file.values())))
            if "num_vectors_per_token" in opts.explicit and count != self._count:
                raise UserError(
                    f"--num_vectors_per_token: {options.weights} has {count} vectors, not {self._count}; "
                    "leave the option out to take the file's number"
                )
            self._count = count
        self._keys: dict[str, str] = {}
        self._rows: nn.ParameterDict | None = None

    # ---- what is trained

    def attach(self, family: Family, models: Models) -> None:
        models.freeze()
        if not self.opts.optimizer.learning_rate:
            raise UserError("nothing would be trained with a learning rate of 0; set --learning_rate above 0")
        self._keys = trained_keys(self.opts, family.traits)
        missing = [key for part, key in self._keys.items() if part not in models.text_encoders]
        if missing:
            raise UserError(
                f"--token_string: the text encoder {missing[0]} is not there to train the word for; give it"
            )
        tokenizers = {
            part: AddedWordTokenizer(models.tokenizers[part], self.opts.method.caption_word, self._count)
            for part in self._keys
        }
        vectors = self._first_vectors(models)
        self._rows = nn.ParameterDict({part: nn.Parameter(value) for part, value in vectors.items()})
        for part, tokenizer in tokenizers.items():
            encoder = models.text_encoders[part]
            rows = partial(self._rows.__getitem__, part)
            encoder.set_input_embeddings(
                ExtendedEmbedding(encoder.get_input_embeddings(), tokenizer.first_id, self._count, rows)
            )
            pool_at_eos(encoder, tokenizer.eos_token_id)
            models.tokenizers[part] = tokenizer
        shown = ", ".join(f"{key} {self._count}x{vectors[part].shape[1]}" for part, key in self._keys.items())
        LOGGER.info("word %r: vectors: %s", self.opts.method.caption_word, shown)

    def _first_vectors(self, models: Models) -> dict[str, Tensor]:
        """Where training starts, by text encoder, each (n, width) float32. Raises: UserError: --weights do not fit."""
        tables = {part: models.text_encoders[part].get_input_embeddings().weight for part in self._keys}
        vectors = {}
        if self._file is not None:
            path = self.opts.method.weights
            names = names_by_part(self._file, self._keys, path)
            for part in names.keys() ^ self._keys.keys():
                LOGGER.warning("%s: holds no %s, whose vectors start as new ones", path, self._keys[part])
            for part, name in names.items():
                width = tables[part].shape[1]
                if self._file[name].shape[1] != width:
                    raise UserError(
                        f"{path}: its vectors have the width {self._file[name].shape[1]}, and this model's {width}; "
                        "it is of another kind of model"
                    )
                vectors[part] = self._file[name].clone()
        for part, table in tables.items():
            if part not in vectors:
                vectors[part] = self._new_vectors(part, table.detach(), models.tokenizers[part])
        return {part: vectors[part].to(tables[part].device) for part in self._keys}

    def _new_vectors(self, part: str, table: Tensor, tokenizer: Any) -> Tensor:
        """Those of --init_word in turn, else random ones; `table` is the text encoder's, (vocabulary, width)."""
        word = self.opts.method.init_word
        if word is None:
            seed = derive(self.opts.training.seed or 0, "embedding", part)
            return random_vectors(table, self._count, torch.Generator().manual_seed(seed))
        ids = tokenizer(word, add_special_tokens=False).input_ids
        if not ids:
            raise UserError(f"--init_word: {word!r} has no token; give a word that the text encoder knows")
        if len(ids) != self._count:
            what = "their vectors repeat" if len(ids) < self._count else "the first ones count"
            LOGGER.warning(
                "--init_word: %r has %d token%s for %s, and the word %d vectors; %s",
                *(word, len(ids), "" if len(ids) == 1 else "s", self._keys[part], self._count, what),
            )
        return table[[ids[number % len(ids)] for number in range(self._count)]].float()

    def trainable(self) -> nn.Module:
        return self._attached()

    def added(self) -> nn.Module:
        return self._attached()

    def parameter_groups(self) -> list[dict[str, Any]]:
        rows, rate = self._attached(), self.opts.optimizer.learning_rate
        names = {part: f"embedding {self._keys[part]}" if len(rows) > 1 else "embedding" for part in rows}
        return [{"params": [rows[part]], "lr": rate, "name": names[part]} for part in self._keys]

    def trained_text_encoders(self) -> list[str]:
        return list(self._keys)

    def text_fingerprint(self) -> dict[str, str]:
        rows = weights_fingerprint(self._attached())
        return dict.fromkeys(self._keys, f"{rows} for {self.opts.method.caption_word}")

    def _attached(self) -> nn.ParameterDict:
        if self._rows is None:
            raise RuntimeError("attach() comes first")
        return self._rows

    # ---- what is saved

    def file_suffix(self) -> str:
        return "." + (self.opts.saving.save_model_as or "pt")

    def metadata(self) -> dict[str, Any]:
        return {"modelspec.suffix": "/textual-inversion"}

    def save(self, path: Path, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        """The vectors by the family's keys. Of the metadata, what the file is, and not how it was trained."""
        about = {name: value for name, value in (metadata or {}).items() if not name.startswith("ss_")}
        vectors: Mapping[str, Tensor] = {key: self._attached()[part] for part, key in self._keys.items()}
        write_embedding(path, vectors, dtype, about)


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
