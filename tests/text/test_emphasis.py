"""Weighted captions."""

from __future__ import annotations

import pytest
import torch

from library.families.sd.tokenizer import SD2_PAD
from library.text.chunking import tokenize
from library.text.emphasis import parse_emphasis, tokenize_weighted
from library.text.tokenizers import bundled_clip_tokenizer


@pytest.mark.parametrize(
    ("caption", "runs"),
    [
        ("plain, text", [("plain, text", 1)]),
        ("", []),
        ("a (b) c", [("a ", 1), ("b", 1.1), (" c", 1)]),
        ("a (b:1.3) c", [("a ", 1), ("b", 1.3), (" c", 1)]),
        ("a [b] c", [("a ", 1), ("b", 1 / 1.1), (" c", 1)]),
        ("((a) b)", [("a", 1.21), (" b", 1.1)]),
        ("(a (b:2):0.5)", [("a ", 0.5), ("b", 1)]),
        ("[[a]]", [("a", 1 / 1.21)]),
        (r"a \(b\) \[c\] \\", [("a (b) [c] \\", 1)]),
        (r"(a\):1.5)", [("a)", 1.5)]),
        (r"a\b", [(r"a\b", 1)]),
        ("(a", [("a", 1.1)]),
        ("a) b]", [("a) b]", 1)]),
        ("time: 12:30", [("time: 12:30", 1)]),
        ("(a: b)", [("a: b", 1.1)]),
        ("[a:1.5)", [("a:1.5)", 1 / 1.1)]),
        ("(a:-0.5)(b:.5)", [("a", -0.5), ("b", 0.5)]),
        ("(a:0)", [("a", 0)]),
        ("(two\nlines:2)", [("two\nlines", 2)]),
    ],
)
def test_parse(caption, runs):
    parsed = parse_emphasis(caption)
    assert [text for text, _ in parsed] == [text for text, _ in runs]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in runs])


@pytest.mark.parametrize("pad_token", [None, SD2_PAD])
@pytest.mark.parametrize("length", [None, 225])
def test_without_brackets_ids_are_the_plain_ones(pad_token, length):
    tokenizer = bundled_clip_tokenizer(pad_token)
    captions = ["a red house, 3 trees: blue", "word " * 90]
    ids, weights = tokenize_weighted(tokenizer, captions, length)
    assert torch.equal(ids, tokenize(tokenizer, captions, length))
    assert torch.equal(weights, torch.ones(2, (length or 75) + 2))


def test_weights_stand_at_their_tokens_across_chunks():
    tokenizer = bundled_clip_tokenizer()
    ids, weights = tokenize_weighted(tokenizer, ["tree " * 74 + "(red house:1.5)"], 150)
    assert ids.shape == (1, 2, 77)
    assert weights.shape == (1, 152)
    assert weights[0].nonzero().numel() == 152
    assert (weights[0] != 1).nonzero().flatten().tolist() == [75, 76]  # the 75th and 76th content tokens
    assert ids[0, 1, 1] == tokenizer("house", add_special_tokens=False).input_ids[0]
    _, cut = tokenize_weighted(tokenizer, ["tree " * 74 + "(red house:1.5)"])
    assert (cut[0] != 1).nonzero().flatten().tolist() == [75]
