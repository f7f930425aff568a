"""T5's tokenizer: where it comes from, and captions to token ids. The network is never needed."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.runtime.files import read_bytes, reason
from library.text.tokenizers import keep_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

T5_TOKENIZER = "google/t5-v1_1-xxl"
T5_VOCABULARY = Path(__file__).parent / "t5_vocabulary" / "tokenizer.json.gz"
VOCABULARIES = ("tokenizer.json", "spiece.model")  # one of them is a whole tokenizer
PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
LENGTH = 512  # tokens; T5's own length
_LARGEST = 256 << 20  # bytes; T5's own takes 2.4 million


def t5_tokenizer(
    model: str | None = None, subfolder: str = "tokenizer_2", cache_dir: str | None = None
) -> PreTrainedTokenizerBase:
    """T5's tokenizer, from the first place that has it.

    Those are: `cache_dir/google_t5-v1_1-xxl`, the model's own folder, and this package. A cache folder that has none is
    given what was found.

    Args:
        model: Diffusers folder; None for a single file, which has no tokenizer.
        subfolder: where Diffusers models of this kind keep it.
        cache_dir: --tokenizer_cache_dir.
    Raises: UserError: a tokenizer that exists but cannot be read.
    """
    cached = Path(cache_dir) / T5_TOKENIZER.replace("/", "_") if cache_dir else None
    if cached is not None and os.path.isdir(cached):
        if not _vocabulary(cached):
            names = " or ".join(VOCABULARIES)
            raise UserError(f"{cached}: no T5 tokenizer in it; put {names} of {T5_TOKENIZER} there, or remove it")
        return read_t5_tokenizer(cached)
    own = Path(model) / subfolder if model else None
    tokenizer = read_t5_tokenizer(own) if own is not None and _vocabulary(own) else bundled_t5_tokenizer()
    if cached is not None:
        keep_tokenizer(cached, tokenizer.save_pretrained)
    return tokenizer


def bundled_t5_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of google/t5-v1_1-xxl from this package: 32,100 pieces, the last hundred of them sentinels."""
    from tokenizers import Tokenizer

    return _finished(Tokenizer.from_str(gzip.decompress(T5_VOCABULARY.read_bytes()).decode()))


def read_t5_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, from its tokenizer.json or its spiece.model.

    Raises: UserError: neither is there, or it cannot be read, or it is not T5's.
    """
    from tokenizers import Tokenizer

    path = _vocabulary(folder)
    if path is None:
        raise UserError(f"{folder}: no {' or '.join(VOCABULARIES)} in it")
    try:
        content = read_bytes(path, _LARGEST)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None
    try:
        backend = Tokenizer.from_buffer(content) if path.suffix == ".json" else _from_sentencepiece(content)
    except Exception as error:  # the tokenizers library raises bare Exception for files that it cannot parse
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read as a T5 tokenizer ({why})") from None
    missing = [token for token in (PAD, EOS, UNKNOWN) if backend.token_to_id(token) is None]
    if missing:
        raise UserError(f"{path}: not the tokenizer of T5, as it has no {' and no '.join(missing)}")
    return _finished(backend)


def tokenize_t5(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Captions to ids and attention mask, each (B, length) int64: the caption's tokens, EOS, padding.

    What is beyond `length` is dropped. The mask is 1 for tokens and 0 for padding.
    """
    # T5's SentencePiece model drops blanks at the end; tokenizer.json files differ in that.
    texts = [caption.rstrip() for caption in captions]
    rows = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return rows.input_ids, rows.attention_mask


def _vocabulary(folder: Path) -> Path | None:
    """The path with the name of a vocabulary, whether or not it is a readable file.

    Raises: UserError: no permission to look into the folder.
    """
    if os.path.isdir(folder) and not os.access(folder, os.X_OK):
        raise UserError(f"{folder}: no permission to look for a T5 tokenizer in it")
    return next((folder / name for name in VOCABULARIES if os.path.exists(folder / name)), None)


def _finished(backend: Tokenizer) -> PreTrainedTokenizerBase:
    """A tokenizer of the tokenizers library as transformers' class, which ends every text with EOS."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, backend.token_to_id(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, model_max_length=LENGTH
    )


def _from_sentencepiece(content: bytes) -> Any:
    """A tokenizer from the bytes of a SentencePiece model: pieces with scores, and a table of equal characters.

    transformers would need two further packages to read the same.
    """
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import Unigram

    pieces: list[tuple[str, float]] = []
    special: list[str] = []
    unknown, normalizer = None, b""
    for number, value in _fields(content):
        if number == 1:
            piece = dict(_fields(value))
            name, score = piece[1].decode(), piece.get(2, bytes(4))
            kind = piece.get(3, 1)  # 1 ordinary, 2 unknown, 3 control, 4 user's own
            if kind == 2:
                unknown = len(pieces)
            if kind != 1:
                special.append(name)
            pieces.append((name, *struct.unpack("<f", score)))
        elif number == 3:
            normalizer = dict(_fields(value)).get(2, b"")
    tokenizer = Tokenizer(Unigram(pieces, unk_id=unknown))
    if normalizer:
        tokenizer.normalizer = normalizers.Precompiled(normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    return tokenizer


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """The numbered fields of a message in Protocol Buffers' wire format: integers, or bytes for everything else.

    Raises: ValueError: the message ends inside a field, or has a field of a kind that SentencePiece does not use.
    """
    place = 0

    def taken(size: int) -> bytes:
        nonlocal place
        place += size
        if place > len(content):
            raise ValueError("cut short")
        return content[place - size : place]

    def varint() -> int:
        value = shift = 0
        while True:
            (byte,) = taken(1)
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(content):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
        elif wire == 1:
            yield number, taken(8)
        elif wire == 2:
            yield number, taken(varint())
        elif wire == 5:
            yield number, taken(4)
        else:
            raise ValueError("not a SentencePiece model")
