"""A tiny T5 encoder and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import T5Config, T5EncoderModel

WORDS = ("a", "red", "blue", "house", "tree", "of", "cat")
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
PIECES += [("\u2581" + word, -3.0) for word in WORDS] + [(letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz"]


def tiny_t5(width: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32, vocabulary: int = 64) -> T5EncoderModel:
    """Two layers of four heads. Weights are larger than T5's own, so that positions and masks show.

    `vocabulary`: 64 suffice for `write_t5_tokenizer`; T5's own has 32128.
    """
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = T5EncoderModel(config)
        for name, parameter in model.named_parameters():
            centre = 1.0 if "layer_norm" in name else 0.0
            parameter.data = (centre + 0.3 * torch.randn_like(parameter)).to(dtype)
    return model.requires_grad_(False).eval()


def t5_weights(model: T5EncoderModel) -> dict[str, torch.Tensor]:
    """The weights as published files have them, with the embedding once."""
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state.pop("encoder.embed_tokens.weight")
    return state


def write_t5_tokenizer(folder: Path) -> Path:
    """Writes a tokenizer.json of T5's kind with a few words."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_t5_backend().save(str(folder / "tokenizer.json"))
    return folder


def tiny_t5_backend() -> Any:
    """A tokenizer of T5's kind with a few words, as the tokenizers library makes it."""
    tokenizer = Tokenizer(Unigram(PIECES, unk_id=2, byte_fallback=False))
    spaces = {"replacement": "\u2581", "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**spaces)]
    )
    tokenizer.decoder = decoders.Metaspace(**spaces)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name, _ in PIECES[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer
