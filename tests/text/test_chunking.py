"""Chunks of 75 tokens: the worked examples of the formats sheet, and the tokenizer's own padding."""

from __future__ import annotations

import pytest
import torch

from library.families.sd.tokenizer import SD2_PAD
from library.text.chunking import chunk_ids, tokenize
from library.text.tokenizers import bundled_clip_tokenizer

B, E = 49406, 49407
V1 = {"bos": B, "eos": E, "pad": E}
V2 = {"bos": B, "eos": E, "pad": 0}


@pytest.mark.rows("R26", "R27", "R28", "R29")
def test_three_tokens_padded_with_eos():
    empty = [B] + [E] * 76
    assert chunk_ids([5, 6, 7], 225, **V1) == [[B, 5, 6, 7] + [E] * 73, empty, empty]


@pytest.mark.rows("R30")
def test_three_tokens_padded_with_zero():
    empty = [B, E] + [0] * 75
    assert chunk_ids([5, 6, 7], 225, **V2) == [[B, 5, 6, 7, E] + [0] * 72, empty, empty]


@pytest.mark.rows("R30")
def test_hundred_tokens_padded_with_zero():
    ids = list(range(1, 101))
    assert chunk_ids(ids, 225, **V2) == [
        [B, *ids[:75], E],
        [B, *ids[75:], E] + [0] * 50,
        [B, E] + [0] * 75,
    ]


@pytest.mark.parametrize("special", [V1, V2], ids=["v1", "v2"])
def test_a_full_caption_ends_every_chunk_with_eos(special):
    ids = list(range(1, 151))
    assert chunk_ids(ids, 150, **special) == [[B, *ids[:75], E], [B, *ids[75:], E]]


@pytest.mark.parametrize("special", [V1, V2], ids=["v1", "v2"])
def test_exactly_one_chunk_of_two(special):
    """The long sequence's EOS then starts the second chunk."""
    ids = list(range(1, 76))
    first, second = chunk_ids(ids, 150, **special)
    assert first == [B, *ids, E]
    assert second == [B, E] + [special["pad"]] * 75


def test_a_chunk_that_its_own_eos_fills_is_not_given_another():
    ids = list(range(1, 75))
    first, second = chunk_ids(ids, 150, **V2)
    assert first == [B, *ids, E, 0]
    assert second == [B, E] + [0] * 75


@pytest.mark.parametrize("pad_token", [None, SD2_PAD], ids=["v1", "v2"])
@pytest.mark.parametrize("caption", ["", "a red house", "word " * 100])
def test_75_tokens_are_what_the_tokenizer_makes(pad_token, caption):
    tokenizer = bundled_clip_tokenizer(pad_token)
    expected = tokenizer(caption, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    for length in (None, 75):
        assert torch.equal(tokenize(tokenizer, [caption], length)[:, 0], expected)


def test_without_padding_the_longest_caption_decides():
    tokenizer = bundled_clip_tokenizer()
    captions = ["a red house", "tree"]
    expected = tokenizer(captions, padding=True, truncation=True, max_length=77, return_tensors="pt").input_ids
    assert torch.equal(tokenize(tokenizer, captions, 225, pad=False)[:, 0], expected)
    assert tokenize(tokenizer, ["word " * 300], 225, pad=False).shape == (1, 1, 77)
