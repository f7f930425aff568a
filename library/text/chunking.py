"""Captions to chunks of 77 token ids, so that a CLIP text encoder can read up to 225 tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPTokenizer

CHUNK = 75  # content tokens of a chunk; BOS and EOS make it 77, CLIP's own length


def tokenize(
    tokenizer: CLIPTokenizer, captions: Sequence[str], max_token_length: int | None = None, *, pad: bool = True
) -> Tensor:
    """Token ids of captions, cut into chunks without regard to words or commas.

    Args:
        tokenizer: a CLIPTokenizer; its pad token fills what a caption does not use.
        captions: B texts; what is beyond the length is dropped.
        max_token_length: content tokens, 75 (the same as None), 150 or 225.
        pad: False fills only up to the batch's longest caption, at most 75 tokens whatever `max_token_length` says.
    Returns: (B, n, 77) int64, n = max_token_length / 75; without padding (B, 1, longest + 2).
    """
    import torch

    length = (max_token_length or CHUNK) if pad else CHUNK
    contents = [content_ids(tokenizer, caption, length) for caption in captions]
    bos, eos, filler = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    if not pad:
        longest = max(len(ids) for ids in contents)
        rows = [[[bos, *ids, eos] + [filler] * (longest - len(ids))] for ids in contents]
        return torch.tensor(rows)
    return torch.tensor([chunk_ids(ids, length, bos=bos, eos=eos, pad=filler) for ids in contents])


def content_ids(tokenizer: CLIPTokenizer, text: str, length: int) -> list[int]:
    """The ids of a text without BOS and EOS, at most `length`."""
    return tokenizer(text, add_special_tokens=False, truncation=True, max_length=length).input_ids


def chunk_ids(content: Sequence[int], length: int, *, bos: int, eos: int, pad: int) -> list[list[int]]:
    """Content ids as `length / 75` chunks of 77.

    The chunks are cut from one long sequence BOS, content, EOS, padding. Each is given a BOS, and the long sequence's
    last token at its end. Where padding is not EOS (SD 2.x), a chunk that is full ends with EOS, and one that is
    empty begins with it.

    Args:
        content: at most `length` ids.
        length: 75, 150 or 225.
    """
    whole = [bos, *content, eos] + [pad] * (length - len(content))
    if length == CHUNK:
        return [whole]
    chunks = []
    for start in range(1, length + 1, CHUNK):
        chunk = [bos, *whole[start : start + CHUNK], whole[-1]]
        if pad != eos:
            if chunk[-2] not in (eos, pad):
                chunk[-1] = eos
            if chunk[1] == pad:
                chunk[1] = eos
        chunks.append(chunk)
    return chunks
