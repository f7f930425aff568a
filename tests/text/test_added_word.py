"""A word of new tokens in captions, against the tokenizers of transformers with tokens added in the usual way."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
from tokenizers import AddedToken

from library.errors import UserError
from library.text.added_word import AddedWordTokenizer, word_pattern
from library.text.chunking import tokenize
from library.text.emphasis import tokenize_weighted
from library.text.t5_tokenizer import bundled_t5_tokenizer, tokenize_t5
from library.text.tokenizers import bundled_clip_tokenizer

MAKERS = {"clip": cache(bundled_clip_tokenizer), "t5": cache(bundled_t5_tokenizer)}
CAPTIONS = (
    "a photo of zwx",
    "zwx",
    "a zwx, on a table",
    "zwx and (another) zwx in the style of zwx.",
    "no such word: zwxab, azwx, zwx_2, szwxk",
    "",
)


@cache
def with_tokens(kind, count):
    """As usual for CLIP; T5 makes tokens of the blanks around added ones unless they are taken away."""
    words = ["zwx", *(f"zwx{number}" for number in range(1, count))]
    tokenizer = deepcopy(MAKERS[kind]())
    stripped = [AddedToken(word, normalized=False, lstrip=True, rstrip=True) for word in words]
    assert tokenizer.add_tokens(words if kind == "clip" else stripped) == count
    return tokenizer, " ".join(words)


@cache
def ours_for(kind, count):
    return AddedWordTokenizer(MAKERS[kind](), "zwx", count)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("caption", CAPTIONS)
@pytest.mark.parametrize("count", [1, 3])
def test_ids_are_those_of_tokens_added_one_by_one(kind, caption, count):
    ours = ours_for(kind, count)
    theirs, words = with_tokens(kind, count)
    if "zwxab" in caption:  # transformers finds added tokens inside words too
        theirs = MAKERS[kind]()
    assert ours(caption).input_ids == theirs(word_pattern("zwx").sub(words, caption)).input_ids
    assert len(ours) == ours.first_id + count == len(MAKERS[kind]()) + count


@pytest.mark.parametrize(
    ("word", "caption", "times"),
    [
        ("zwx", "ZWX, Zwx (zwx:1.2) zwx.", 4),
        ("zwx", "zwxens szwx to k zwx1", 0),
        ("zwx", "zwxの写真", 1),
        ("<zwx>", "a<zwx>b <ZWX>", 2),
        ("my zwx", "this is my zwx", 1),
        ("a.b", "a.b axb", 1),
    ],
)
def test_where_the_word_stands(word, caption, times):
    assert len(word_pattern(word).findall(caption)) == times


def test_what_wraps_the_tokenizer_leaves_it_alone_and_has_its_attributes():
    tokenizer = bundled_clip_tokenizer()
    before = len(tokenizer)
    ours = AddedWordTokenizer(tokenizer, "zwx", 2)
    assert len(tokenizer) == before
    assert (ours.bos_token_id, ours.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    with pytest.raises(AttributeError):
        ours.no_such_thing  # noqa: B018


def test_captions_are_cut_and_weighed_as_others():
    ours = AddedWordTokenizer(bundled_clip_tokenizer(), "zwx", 3)
    first = ours.first_id
    ids = tokenize(ours, ["zwx " * 30, "a zwx"])[:, 0]
    assert ids.shape == (2, 77)
    assert ids[0, 1:76].tolist() == [first, first + 1, first + 2] * 25
    assert ids[0, 76] == ours.eos_token_id
    ids, weights = tokenize_weighted(ours, ["(zwx:1.5) a"])
    assert ids[0, 0, 1:5].tolist() == [first, first + 1, first + 2, 320]
    assert weights[0, :6].tolist() == [1.0, 1.5, 1.5, 1.5, 1.0, 1.0]
    t5 = AddedWordTokenizer(bundled_t5_tokenizer(), "zwx", 2)
    ids, mask = tokenize_t5(t5, ["zwx", "zwx zwx zwx"], 4)
    assert ids.tolist() == [[t5.first_id, t5.first_id + 1, 1, 0], [t5.first_id, t5.first_id + 1, t5.first_id, 1]]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("word", ["cat", "Cat", "tok", "!"])
def test_a_word_that_is_a_token_is_refused(word):
    with pytest.raises(UserError, match=f"--token_string: '{word}' is a token of the text encoder already"):
        AddedWordTokenizer(bundled_clip_tokenizer(), word, 1)
