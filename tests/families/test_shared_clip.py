"""CLIP states against transformers' CLIPTextModel used directly."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from library.errors import UserError
from library.families.shared.clip import encode_clip
from library.text.chunking import tokenize
from tests.builders import tiny_sd


@pytest.mark.rows("R19", "R20", "R24", "R509")
@pytest.mark.parametrize("clip_skip", [None, 1, 2, 3])
def test_states_equal_transformers(clip_skip):
    """The reference runs a model with the skipped layers cut off, which knows nothing of hidden_states."""
    models = tiny_sd()
    text_encoder, tokenizer = models.text_encoders["te"], models.tokenizers["te"]
    ids = tokenizer(["a red house", ""], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        actual = encode_clip(text_encoder, tokenize(tokenizer, ["a red house", ""]), clip_skip)
        if clip_skip not in (None, 1):
            encoder = getattr(text_encoder, "text_model", text_encoder).encoder  # a level that newer versions dropped
            encoder.layers = encoder.layers[: 1 - clip_skip]
        assert_close(actual, text_encoder(ids).last_hidden_state, atol=1e-6, rtol=0)


@pytest.mark.rows("R25", "R28")
def test_long_captions_are_encoded_in_three_parts_and_joined():
    models = tiny_sd()
    text_encoder, tokenizer = models.text_encoders["te"], models.tokenizers["te"]
    caption = " ".join(["red", "house", "tree"] * 60)
    content = tokenizer(caption, add_special_tokens=False).input_ids
    assert len(content) == 180
    padded = content + [49407] * 45
    with torch.no_grad():
        parts = [
            text_encoder(torch.tensor([[49406, *padded[k : k + 75], 49407]])).last_hidden_state for k in (0, 75, 150)
        ]
        expected = torch.cat([parts[0][:, :1], *(part[:, 1:-1] for part in parts), parts[2][:, -1:]], dim=1)
        actual = encode_clip(text_encoder, tokenize(tokenizer, [caption], 225))
    assert actual.shape == (1, 227, 64)
    assert_close(actual, expected, atol=1e-6, rtol=0)


def test_clip_skip_beyond_the_layers():
    models = tiny_sd()
    ids = tokenize(models.tokenizers["te"], ["a"])
    with pytest.raises(UserError, match="--clip_skip 4: the text encoder has 3 layers"):
        encode_clip(models.text_encoders["te"], ids, 4)


def test_a_tokenizer_of_more_tokens_than_the_encoder_has():
    encoder = tiny_sd().text_encoders["te"]
    rows = encoder.config.vocab_size
    with pytest.raises(UserError, match=f"the token embedding has {rows} rows and the tokenizer gives id {rows}; use"):
        encode_clip(encoder, torch.full((1, 1, 77), rows))
