"""Tokenizers: the bundled CLIP vocabulary, and how others are found. The network is never needed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.runtime.durable import new_folder
from library.runtime.files import path_problem
from library.runtime.logs import LOGGER

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import CLIPTokenizer

CLIP_VOCABULARY = Path(__file__).parent / "clip_vocabulary"
_CLIP_FILES = (
    *("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
CLIP_LENGTH = 77  # positions, with BOS and EOS


def bundled_clip_tokenizer(pad_token: str | None = None) -> CLIPTokenizer:
    """CLIP's tokenizer from this package; it pads with EOS unless another token is named."""
    from transformers import CLIPTokenizer

    options = {"pad_token": pad_token} if pad_token else {}
    return CLIPTokenizer.from_pretrained(CLIP_VOCABULARY, model_max_length=CLIP_LENGTH, **options)


def keep_tokenizer(folder: Path, save: Callable[[Path], None]) -> None:
    """Gives --tokenizer_cache_dir a tokenizer that it lacks. Where that cannot be, the run continues without."""
    try:
        with new_folder(folder) as fresh:
            save(fresh)
    except OSError as error:
        LOGGER.warning("--tokenizer_cache_dir: %s cannot be written (%s)", folder, error.strerror or error)


def check_token_ids(input_ids: Tensor, text_encoder: nn.Module) -> None:
    """Raises: UserError: token ids (any shape, on the CPU) for which the encoder's embedding has no row."""
    rows = text_encoder.get_input_embeddings().num_embeddings
    largest = int(input_ids.numpy().max())  # on the CPU, so that nothing is read back from a device
    if largest >= rows:
        raise UserError(
            f"{type(text_encoder).__name__}: the token embedding has {rows} rows and the tokenizer gives id {largest}; "
            "use the tokenizer that belongs to this text encoder (--tokenizer_cache_dir), or a complete file"
        )


def save_clip_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes a tokenizer for every reader: transformers 5 leaves out the two files that older ones ask for."""
    tokenizer.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).exists():
            shutil.copyfile(CLIP_VOCABULARY / name, folder / name)


def read_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer in `folder`. Raises: UserError: it cannot be read."""
    for name in _CLIP_FILES:
        problem = path_problem(folder / name, "file") if os.path.lexists(folder / name) else None
        if problem:  # transformers would wait for a pipe without end
            raise UserError(f"{folder / name}: {problem}")
    try:
        return local_clip_tokenizer(folder)
    except Exception as error:  # the tokenizers library raises bare Exception for files that it cannot parse
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: cannot be read as a CLIP tokenizer ({why})") from None


def local_clip_tokenizer(name: str | Path, **options: Any) -> CLIPTokenizer:
    """A tokenizer from a folder or the hub's cache. Raises: OSError, ValueError: there is none."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(name, local_files_only=True, **options)
    # Where there are no files at all, transformers 5 makes a tokenizer that knows no words and says nothing.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise OSError("no vocabulary found")
    tokenizer.model_max_length = min(tokenizer.model_max_length, CLIP_LENGTH)
    return tokenizer
