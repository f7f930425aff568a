"""Where the tokenizer of a CLIP text encoder comes from."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from library.text.tokenizers import (
    bundled_clip_tokenizer,
    keep_tokenizer,
    local_clip_tokenizer,
    read_clip_tokenizer,
    save_clip_tokenizer,
)

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

PAD_ZERO = "!"  # the token with id 0, with which encoders in OpenCLIP's layout are padded


def find_clip_tokenizer(
    published: str,
    *,
    pad_token: str | None = None,
    model: str | None = None,
    subfolder: str = "tokenizer",
    cache_dir: str | None = None,
) -> CLIPTokenizer:
    """The first tokenizer that exists.

    They are looked for in `cache_dir/<published with / as _>`, in the model's own folder (or its copy in the hub's
    cache), and in the bundled vocabulary. A cache folder that has none is given what was found.

    Args:
        published: hub id under which the tokenizer is known.
        pad_token: of the bundled one; EOS if not given.
        model: Diffusers folder or hub id; None for a single file, which has no tokenizer.
        subfolder: of the model.
        cache_dir: --tokenizer_cache_dir.
    Raises: UserError: a tokenizer that exists but cannot be read.
    """
    cached = Path(cache_dir) / published.replace("/", "_") if cache_dir else None
    if cached is not None and os.path.isdir(cached):
        return read_clip_tokenizer(cached)
    tokenizer = None
    if model and os.path.isdir(model):
        if os.path.isdir(Path(model) / subfolder):
            tokenizer = read_clip_tokenizer(Path(model) / subfolder)
    elif model:
        with suppress(OSError, ValueError):  # not in the hub's cache; the bundled vocabulary is the same
            tokenizer = local_clip_tokenizer(model, subfolder=subfolder)
    if tokenizer is None:
        tokenizer = bundled_clip_tokenizer(pad_token)
    if cached is not None:
        keep_tokenizer(cached, lambda folder: save_clip_tokenizer(tokenizer, folder))
    return tokenizer
