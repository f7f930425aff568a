"""Where the tokenizers of a Stable Diffusion 3 model come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from library.families.sd3.variants import TOKENIZERS
from library.families.shared.clip_tokenizer import PAD_ZERO, find_clip_tokenizer
from library.text.t5_tokenizer import t5_tokenizer

if TYPE_CHECKING:
    pass

IDS = {"te1": "openai/clip-vit-large-patch14", "te2": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"}


def load_tokenizers(parts: Iterable[str], folder: str | None = None, cache_dir: str | None = None) -> dict[str, Any]:
    """The tokenizers of the text encoders `parts`, each from the first place that has it.

    They are looked for in `cache_dir/<id with / as _>`, in the model's own folder, and in this package.

    Args:
        folder: of a model that is no single file.
        cache_dir: --tokenizer_cache_dir; a folder in it that is missing is given what was found.
    Raises: UserError: one that exists but cannot be read.
    """
    found: dict[str, Any] = {}
    for part in parts:
        place = TOKENIZERS[part]
        if part == "te3":
            found[part] = t5_tokenizer(folder, place, cache_dir)
            continue
        found[part] = find_clip_tokenizer(IDS[part], model=folder, subfolder=place, cache_dir=cache_dir)
        if part == "te2":
            found[part].pad_token = PAD_ZERO  # the published one pads with EOS
    return found
