"""Where the tokenizer of a Stable Diffusion 1.x/2.x model comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library.text.tokenizers import (
    bundled_clip_tokenizer,
    local_clip_tokenizer,
    read_clip_tokenizer,
    save_clip_tokenizer,
)

SD1_TOKENIZER = "openai/clip-vit-large-patch14"
SD2_TOKENIZER = "stabilityai/stable-diffusion-2"
SD2_PAD = "!"  # id 0


def sd_tokenizer(v2: bool, model: str | None = None, cache_dir: str | None = None) -> Any:
    """The tokenizer of a Stable Diffusion 1.x or 2.x model.

    The first that exists: `cache_dir/<id with / as _>`, the tokenizer of the model's own folder (or of its copy in
    the hub's cache), the bundled vocabulary. A cache folder that has none is given what was found.

    Args:
        model: Diffusers folder or hub id; None for a single file, which has no tokenizer.
        cache_dir: --tokenizer_cache_dir.
    Raises: UserError: a tokenizer that exists but cannot be read.
    """
    cached = Path(cache_dir) / (SD2_TOKENIZER if v2 else SD1_TOKENIZER).replace("/", "_") if cache_dir else None
    if cached is not None and cached.is_dir():
        return read_clip_tokenizer(cached)
    tokenizer = _own_tokenizer(model) if model else None
    if tokenizer is None:
        tokenizer = bundled_clip_tokenizer(SD2_PAD if v2 else None)
    if cached is not None:
        save_clip_tokenizer(tokenizer, cached)
    return tokenizer


def _own_tokenizer(model: str) -> Any | None:
    if Path(model).is_dir():
        folder = Path(model) / "tokenizer"
        return read_clip_tokenizer(folder) if folder.is_dir() else None
    try:
        return local_clip_tokenizer(model, subfolder="tokenizer")
    except (OSError, ValueError):
        return None  # not in the hub's cache; the bundled vocabulary is the same
