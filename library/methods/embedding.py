"""Trains the vectors of new words beside the frozen model (Textual Inversion, Gal et al. 2022, arXiv:2208.01618)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.embeddings import read_embedding, write_embedding
from library.errors import UserError
from library.methods.base import Method
from library.methods.embedding_spec import file_names, trained_keys
from library.methods.words import TrainedWords

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor, nn

    from library.families.base import Family
    from library.options.base import Options
    from library.types import Models


class EmbeddingMethod(Method):
    """Vectors of `--token_string` for each text encoder that has them; nothing else of the model changes."""

    def __init__(self, opts: Options):
        """Raises: UserError: --weights is no embedding, or has another number of vectors than is asked for."""
        super().__init__(opts)
        self._words = self._make_words(self._read_files())

    def _make_words(self, files: Mapping[str, tuple[str, Mapping[str, Tensor]]]) -> TrainedWords:
        return TrainedWords(self.opts.method, self.opts.training.seed, files)

    def _read_files(self) -> dict[str, tuple[str, Mapping[str, Tensor]]]:
        """By word, its file of --weights with the vectors there."""
        options, files = self.opts.method, {}
        for word, path in zip(options.caption_words, options.weights or (), strict=False):
            vectors = read_embedding(path)
            count = len(next(iter(vectors.values())))
            if "num_vectors_per_token" in self.opts.explicit and count != options.num_vectors_per_token:
                raise UserError(
                    f"--num_vectors_per_token: {path} has {count} vectors, not {options.num_vectors_per_token}; "
                    "leave the option out to take the file's number"
                )
            files[word] = (path, vectors)
        return files

    # ---- what is trained

    def attach(self, family: Family, models: Models) -> None:
        models.freeze()
        if not self.opts.optimizer.learning_rate:
            raise UserError("nothing would be trained with a learning rate of 0; set --learning_rate above 0")
        self._words.attach(models, trained_keys(self.opts, family.traits))

    def trainable(self) -> nn.Module:
        return self._words.rows

    def added(self) -> nn.Module:
        return self._words.rows

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self._words.groups(self.opts.optimizer.learning_rate)

    def trained_text_encoders(self) -> list[str]:
        return list(self._words.keys)

    def text_fingerprint(self) -> dict[str, str]:
        return self._words.fingerprint()

    # ---- what is saved

    def file_suffix(self) -> str:
        return "." + (self.opts.saving.save_model_as or "pt")

    def metadata(self) -> dict[str, Any]:
        return {"modelspec.suffix": "/textual-inversion"}

    def save(self, path: Path, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        """A file for each word, with the vectors by the family's keys.

        Of the metadata, what the file is, and not how it was trained.
        """
        about = {name: value for name, value in (metadata or {}).items() if not name.startswith("ss_")}
        vectors = self._words.vectors()
        for word, file in file_names(path, self.opts).items():
            write_embedding(file, vectors[word], dtype, about)

    def companions(self, path: Path) -> list[Path]:
        return [file for file in file_names(path, self.opts).values() if file != path]
