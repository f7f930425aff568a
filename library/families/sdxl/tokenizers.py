"""Where the two tokenizers of an SDXL model come from. They differ in the token that fills up short captions."""

from __future__ import annotations

from typing import Any

from library.families.shared.clip_tokenizer import PAD_ZERO, find_clip_tokenizer

TOKENIZER1 = "openai/clip-vit-large-patch14"
TOKENIZER2 = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"


def sdxl_tokenizers(model: str | None = None, cache_dir: str | None = None) -> dict[str, Any]:
    """The tokenizers by their text encoders' names, see `find_clip_tokenizer`.

    Raises: UserError: a tokenizer that exists but cannot be read.
    """
    first = find_clip_tokenizer(TOKENIZER1, model=model, cache_dir=cache_dir)
    second = find_clip_tokenizer(
        TOKENIZER2, pad_token=PAD_ZERO, model=model, subfolder="tokenizer_2", cache_dir=cache_dir
    )
    second.pad_token = second.convert_ids_to_tokens(0)  # whatever is published with the tokenizer alone
    return {"te1": first, "te2": second}
