"""T5's tokenizer, bundled and from files of both kinds, against the tokenizers library and transformers."""

from __future__ import annotations

import base64
import gzip
import json
import os
import shutil
import signal
import struct
from fnmatch import fnmatchcase
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers.convert_slow_tokenizer import T5Converter, import_protobuf

from library.errors import UserError
from library.text.t5_tokenizer import (
    T5_VOCABULARY,
    bundled_t5_tokenizer,
    read_t5_tokenizer,
    t5_tokenizer,
    tokenize_t5,
)
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
    assert bundled.model_max_length == 512


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, b"", "{folder}: no tokenizer.json or spiece.model in it"),
        ("tokenizer.json", b"{", "{file}: cannot be read as a T5 tokenizer (* EOF while parsing an object *)"),
        ("spiece.model", b"", "{file}: not the tokenizer of T5, as it has no <pad> and no </s> and no <unk>"),
        ("spiece.model", b"version https", "{file}: cannot be read as a T5 tokenizer (not a SentencePiece model)"),
    ],
)
def test_what_is_no_tokenizer_of_t5_is_said(tmp_path, name, content, message):
    file = tmp_path / (name or "other.txt")
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_t5_tokenizer(tmp_path)
    assert fnmatchcase(str(caught.value), message.format(folder=tmp_path, file=file))


def test_a_cache_folder_without_a_tokenizer_is_refused(tmp_path):
    cached = tmp_path / "google_t5-v1_1-xxl"
    cached.mkdir()
    with pytest.raises(UserError) as caught:
        t5_tokenizer(cache_dir=str(tmp_path))
    advice = "put tokenizer.json or spiece.model of google/t5-v1_1-xxl there, or remove it"
    assert str(caught.value) == f"{cached}: no T5 tokenizer in it; {advice}"


def test_a_huge_file_is_not_read(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.touch()
    os.truncate(file, 2**28 + 1)
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read \("):
        read_t5_tokenizer(tmp_path)


# --- SentencePiece models ---------------------------------------------------------------------------------------------

LONG = "\u2581" + "long" * 50  # its length takes two bytes
TINY = [("<pad>", None, 3), ("</s>", 0.0, 3), ("<s>", 0.0, 3), ("<unk>", 0.0, 2), ("\u2581", -2.0, None)]
TINY += [("\u2581red", -3.5, 1), ("house", -4.25, None), (LONG, -5.0, None), ("ho", -0.5, 1), ("<pad", -1.0, None)]


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + varint(value // 128)


def field(number: int, content: int | float | bytes) -> bytes:
    """A field in Protocol Buffers' wire format: an integer, a float32, or bytes with their length."""
    if isinstance(content, bytes):
        return varint(8 * number + 2) + varint(len(content)) + content
    if isinstance(content, float):
        return varint(8 * number + 5) + struct.pack("<f", content)
    return varint(8 * number) + varint(content)


def sentencepiece_fields(pieces, characters: bytes) -> list[bytes]:
    """The fields of a SentencePiece model. None leaves a part of a piece out; `characters`: which of them are equal."""
    made = []
    for name, score, kind in pieces:
        parts = ((1, name.encode()), (2, score), (3, kind))
        made.append(field(1, b"".join(field(number, value) for number, value in parts if value is not None)))
    unknown = [kind for _, _, kind in pieces].index(2)
    trainer = field(2, field(3, 1) + field(40, unknown))
    unused = varint(8 * 201 + 1) + bytes(8) + field(202, 1.5) + field(203, 256)  # a reader skips what it does not know
    normalizer = field(3, field(1, b"nmt_nfkc") + field(2, characters) + field(3, 1)) if characters else b""
    return [trainer, unused, *made, normalizer, field(5, field(2, b"not this table"))]


@pytest.fixture(scope="module")
def vocabulary():
    """The bundled pieces without sentinels, as (name, score, kind), and their table of equal characters."""
    stored = json.loads(gzip.decompress(T5_VOCABULARY.read_bytes()))
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    pieces = [(name, score, kinds.get(name, 1)) for name, score in stored["model"]["vocab"][:32000]]
    (table,) = (part for part in stored["normalizer"]["normalizers"] if part["type"] == "Precompiled")
    return pieces, base64.b64decode(table["precompiled_charsmap"])


def test_a_sentencepiece_model_gives_the_published_ids(tmp_path, bundled, vocabulary):
    (tmp_path / "spiece.model").write_bytes(b"".join(sentencepiece_fields(*vocabulary)))
    tokenizer = read_t5_tokenizer(tmp_path)
    captions = [caption for caption in CAPTIONS if "<" not in caption] + ["\uff21\ufb01"]
    for got, expected in zip(tokenize_t5(tokenizer, captions, 64), tokenize_t5(bundled, captions, 64), strict=True):
        assert got.tolist() == expected.tolist()
    assert tokenizer.decode(PUBLISHED, skip_special_tokens=True) == "a photo of a cat"


@pytest.mark.parametrize("normalized", [False, True])
def test_a_sentencepiece_model_is_read_as_transformers_does(tmp_path, vocabulary, normalized):
    file = tmp_path / "spiece.model"
    file.write_bytes(b"".join(sentencepiece_fields(TINY, vocabulary[1] if normalized else b"")))
    proto = import_protobuf().ModelProto.FromString(file.read_bytes())  # what is written here is what it means
    assert [piece.piece for piece in proto.pieces] == [name for name, _, _ in TINY]
    source = SimpleNamespace(vocab_file=str(file), _extra_ids=0, convert_tokens_to_ids=lambda name: 1)
    expected, got = T5Converter(source).converted(), read_t5_tokenizer(tmp_path).backend_tokenizer
    for text in (
        "red house",
        f"  red  house {LONG[1:]}house x",
        "\uff52ed house",
        "<pad>a</s><s>",
        "\uff1cpad\uff1e red",
    ):
        assert got.encode(text).ids == expected.encode(text.strip()).ids, text
    assert json.loads(got.to_str())["model"] == json.loads(expected.to_str())["model"]
    special = {place: AddedToken(TINY[place][0], normalized=False, special=True) for place in range(4)}
    assert got.get_added_tokens_decoder() == special
    assert got.decode([5, 6, 4, 6]) == "redhouse house"


def test_a_sentencepiece_model_that_is_cut_short_is_refused(tmp_path):
    """Wherever it is cut, except between two fields: nothing shows that more was there."""
    file, parts = tmp_path / "spiece.model", sentencepiece_fields(TINY[:5], b"")
    whole = b"".join(parts)
    last = len(whole) - len(parts[-1])
    for end in range(last + 1, len(whole)):
        file.write_bytes(whole[:end])
        with pytest.raises(UserError) as caught:
            read_t5_tokenizer(tmp_path)
        assert str(caught.value) == f"{file}: cannot be read as a T5 tokenizer (cut short)"
    file.write_bytes(whole[:last])
    assert len(read_t5_tokenizer(tmp_path)) == 5
