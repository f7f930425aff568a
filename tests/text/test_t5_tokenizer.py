"""T5's bundled tokenizer, against the tokenizers library reading the same file, and its place among the sources."""

from __future__ import annotations

import gzip
import os
import shutil
import signal

import pytest
from tokenizers import Tokenizer

from library.errors import UserError
from library.text.t5_tokenizer import T5_VOCABULARY, bundled_t5_tokenizer, t5_tokenizer, tokenize_t5
from tests.builders.rights import without_rights
from tests.builders.t5 import write_t5_tokenizer

PUBLISHED = [3, 9, 1202, 13, 3, 9, 1712, 1]  # "a photo of a cat"
CAPTIONS = [
    "a photo of a cat",
    "masterpiece, best quality , 1girl; (word:1.2)",
    "Ünïcode — “quotes” 猫 😀 \u00bd \u2160",
    "  two  blanks\tand\na line",
    "an <extra_id_0> and a </s> inside",
    "",
]


@pytest.fixture(scope="module")
def bundled():
    return bundled_t5_tokenizer()


def test_published_ids(bundled):
    ids, mask = tokenize_t5(bundled, ["a photo of a cat"], 12)
    assert ids.tolist() == [PUBLISHED + [0] * 4]
    assert mask.tolist() == [[1] * 8 + [0] * 4]
    assert len(bundled) == 32100
    assert (bundled.pad_token_id, bundled.eos_token_id, bundled.unk_token_id) == (0, 1, 2)


def test_ids_equal_the_tokenizers_library(bundled):
    reference = Tokenizer.from_str(gzip.decompress(T5_VOCABULARY.read_bytes()).decode())
    ids, mask = tokenize_t5(bundled, CAPTIONS, 64)
    for row, visible, caption in zip(ids.tolist(), mask.tolist(), CAPTIONS, strict=True):
        assert row[: sum(visible)] == reference.encode(caption).ids


def test_blanks_around_a_caption_are_no_tokens(bundled):
    """T5's SentencePiece model removes them."""
    ids, _ = tokenize_t5(bundled, ["a photo of a cat", " a photo of a cat \n", "a  photo of\na cat"], 10)
    assert ids[1].equal(ids[0])
    assert ids[2].equal(ids[0])


@pytest.mark.parametrize("text", ["a photo of a cat", "masterpiece, best quality", "A house; red (very), 1.5 m!"])
def test_round_trip(bundled, text):
    ids, _ = tokenize_t5(bundled, [text], 64)
    assert bundled.decode(ids[0], skip_special_tokens=True) == text


@pytest.mark.parametrize("length", [8, 77, 256, 512])
def test_long_captions_fill_the_length_and_end(bundled, length):
    ids, mask = tokenize_t5(bundled, ["a photo of a cat, " * 200], length)
    assert ids.shape == (1, length)
    assert ids[0, -1] == 1
    assert mask.sum() == length


def test_order_of_sources(tmp_path, monkeypatch):
    """The cache folder, the model's own, the bundle; never the hub, not even for what is missing."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def ids(*where: str | None) -> list[int]:
        return tokenize_t5(t5_tokenizer(where[0], "tokenizer_2", where[1]), ["a cat"], 4)[0][0].tolist()

    tiny, full = [4, 10, 1, 0], [3, 9, 1712, 1]
    model, cache = tmp_path / "model", tmp_path / "cache"
    model.mkdir()
    assert ids(None, None) == ids(str(model), None) == full
    write_t5_tokenizer(model / "tokenizer_2")
    assert ids(str(model), None) == tiny
    assert ids(None, str(cache)) == full  # and it is kept
    assert (cache / "google_t5-v1_1-xxl" / "tokenizer.json").is_file()
    assert ids(str(model), str(cache)) == full
    shutil.rmtree(cache)
    assert ids(str(model), str(cache)) == tiny
    assert ids(None, str(cache)) == tiny


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
@pytest.mark.parametrize("place", ["cache", "model"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, place):
    """In the cache folder and in the model's own, where another source would be silently taken otherwise."""
    cached = tmp_path / "google_t5-v1_1-xxl"
    where = (None, "tokenizer_2", str(tmp_path)) if place == "cache" else (str(tmp_path), cached.name, None)
    cached.mkdir()
    file = cached / name
    signal.alarm(20)
    try:
        os.mkfifo(file)
        with pytest.raises(UserError) as caught:
            t5_tokenizer(*where)
        assert str(caught.value) == f"{file}: cannot be read (a named pipe, not a regular file)"
        file.unlink()
        file.symlink_to("/dev/zero")
        with pytest.raises(UserError, match=r"cannot be read \(a device, not a regular file\)"):
            t5_tokenizer(*where)
    finally:
        signal.alarm(0)
    file.unlink()
    file.write_bytes(b"{}")
    file.chmod(0)
    with pytest.raises(UserError) as caught:
        without_rights(lambda: t5_tokenizer(*where))
    assert str(caught.value) == f"{file}: cannot be read (Permission denied)"
    cached.chmod(0)
    with pytest.raises(UserError) as caught:
        without_rights(lambda: t5_tokenizer(*where))
    assert str(caught.value) == f"{cached}: no permission to look for a T5 tokenizer in it"
