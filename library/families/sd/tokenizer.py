"""Where the tokenizer of a Stable Diffusion 1.x/2.x model comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.families.shared.clip_tokenizer import PAD_ZERO, find_clip_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

SD1_TOKENIZER = "openai/clip-vit-large-patch14"
SD2_TOKENIZER = "stabilityai/stable-diffusion-2"
SD2_PAD = PAD_ZERO


def sd_tokenizer(v2: bool, model: str | None = None, cache_dir: str | None = None) -> CLIPTokenizer:
    """The tokenizer of a Stable Diffusion 1.x or 2.x model, see `find_clip_tokenizer`.

    Raises: UserError: a tokenizer that exists but cannot be read.
    """
    published, pad_token = (SD2_TOKENIZER, SD2_PAD) if v2 else (SD1_TOKENIZER, None)
    return find_clip_tokenizer(published, pad_token=pad_token, model=model, cache_dir=cache_dir)
