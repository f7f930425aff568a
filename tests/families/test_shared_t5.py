"""T5: construction and states against transformers, and where its tokenizer comes from."""

from __future__ import annotations

import os

import pytest
import torch
from torch.testing import assert_close
from transformers import T5EncoderModel, T5TokenizerFast

from library.errors import UserError
from library.families.shared.t5 import build_t5, encode_t5, t5_config, t5_keys, t5_linears, t5_state
from library.text.t5_tokenizer import read_t5_tokenizer, t5_tokenizer, tokenize_t5
from library.text.tokenizers import bundled_clip_tokenizer
from tests.builders.t5 import PIECES, t5_weights, tiny_t5, write_t5_tokenizer

CAPTIONS = ["a red house", "", "a blue tree of a cat zzz !"]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


# --- the encoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_states_equal_transformers(masked):
    model = tiny_t5()
    built = build_t5(t5_weights(model))
    ids = torch.tensor([[4, 5, 6, 1, 0, 0], [4, 9, 8, 7, 5, 1]])
    mask = (ids != 0).long() if masked else None
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        assert_close(encode_t5(built, ids, mask), expected, atol=1e-6, rtol=0)


def test_the_mask_hides_padding():
    built = build_t5(t5_weights(tiny_t5()))
    ids = torch.tensor([[4, 5, 1, 0, 0, 0]])
    other = ids.clone()
    other[:, 3:] = 9
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        assert_close(encode_t5(built, ids, mask)[:, :3], encode_t5(built, other, mask)[:, :3], atol=1e-6, rtol=0)
        assert (encode_t5(built, ids)[:, :3] - encode_t5(built, other)[:, :3]).abs().max() > 1e-2


def test_shape_is_read_from_the_weights():
    config = t5_config({key: tuple(tensor.shape) for key, tensor in t5_weights(tiny_t5()).items()})
    wanted = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    assert {name: config[name] for name in wanted} == wanted


def test_either_name_of_the_embedding_will_do_and_it_stays_one_parameter():
    weights = t5_weights(tiny_t5())
    one = build_t5(weights)
    other = build_t5({("encoder.embed_tokens.weight" if k == "shared.weight" else k): v for k, v in weights.items()})
    ids = torch.tensor([[4, 5, 1]])
    assert_close(encode_t5(one, ids), encode_t5(other, ids), atol=0, rtol=0)
    assert one.encoder.embed_tokens is one.shared
    assert sum(parameter.numel() for parameter in one.parameters()) == sum(t.numel() for t in weights.values())
    assert t5_state(one).keys() == weights.keys()


def test_a_saved_folder_is_read_by_transformers(tmp_path):
    model = tiny_t5()
    build_t5(t5_weights(model)).save_pretrained(tmp_path)
    again = T5EncoderModel.from_pretrained(tmp_path)
    ids = torch.tensor([[4, 5, 6, 1]])
    with torch.no_grad():
        assert_close(again(ids).last_hidden_state, model(ids).last_hidden_state, atol=1e-6, rtol=0)


def test_training_mode_draws_nothing():
    built = build_t5(t5_weights(tiny_t5())).train()
    ids = torch.tensor([[4, 5, 6, 1]])
    assert_close(encode_t5(built, ids), encode_t5(built, ids), atol=0, rtol=0)


def test_layers_that_networks_adapt():
    names = t5_linears(tiny_t5())
    assert names[:7] == [
        *(f"encoder.block.0.layer.0.SelfAttention.{part}" for part in "qkvo"),
        *(f"encoder.block.0.layer.1.DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")),
    ]
    assert len(names) == 14


def test_a_decoder_is_left_out():
    keys = ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight", "decoder.block.0.x", "lm_head.weight"]
    assert t5_keys(keys) == keys[:2]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"encoder.block.0.layer.1.DenseReluDense.wi.weight": torch.zeros(2, 2)}, "older T5 without gated layers"),
        ({"shared.weight": None}, "lacks the tensor encoder.embed_tokens.weight"),
        ({"encoder.final_layer_norm.weight": None}, "final_layer_norm"),
    ],
)
def test_weights_of_another_kind_are_named(extra, message):
    weights = {key: value for key, value in {**t5_weights(tiny_t5()), **extra}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        build_t5(weights)


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_ids_equal_transformers(tmp_path):
    tokenizer = read_t5_tokenizer(write_t5_tokenizer(tmp_path))
    ids, mask = tokenize_t5(tokenizer, CAPTIONS, 12)
    reference = T5TokenizerFast.from_pretrained(tmp_path, extra_ids=0)(
        CAPTIONS, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    assert ids.equal(reference.input_ids)
    assert mask.equal(reference.attention_mask)
    assert ids[0].tolist() == [4, 5, 7, 1] + [0] * 8
    assert ids[1].tolist() == [1] + [0] * 11


def test_long_captions_are_cut_and_still_end(tmp_path):
    tokenizer = read_t5_tokenizer(write_t5_tokenizer(tmp_path))
    ids, mask = tokenize_t5(tokenizer, ["red house " * 50], 8)
    assert ids.shape == (1, 8)
    assert ids[0, -1] == 1
    assert mask.sum() == 8


def write_sentencepiece(path) -> None:
    """A SentencePiece model with the pieces of the tiny tokenizer, written with the library's own message classes."""
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    for name, score in PIECES:
        model.pieces.add(piece=name, score=score, type=kinds.get(name, 1))
    model.trainer_spec.unk_id = 2
    model.trainer_spec.model_type = 1
    path.write_bytes(model.SerializeToString())


def test_spiece_model_needs_no_further_package(tmp_path):
    from_json = read_t5_tokenizer(write_t5_tokenizer(tmp_path / "json"))
    os.makedirs(tmp_path / "spm")
    write_sentencepiece(tmp_path / "spm" / "spiece.model")
    from_model = read_t5_tokenizer(tmp_path / "spm")
    assert tokenize_t5(from_model, CAPTIONS, 16)[0].equal(tokenize_t5(from_json, CAPTIONS, 16)[0])
    assert (from_model.pad_token_id, from_model.eos_token_id, from_model.unk_token_id) == (0, 1, 2)


def test_the_cache_folder_comes_first_then_the_models_own(tmp_path):
    model = tmp_path / "model"
    write_t5_tokenizer(model / "tokenizer_2")
    first = t5_tokenizer(str(model), cache_dir=str(tmp_path / "cache"))
    assert (tmp_path / "cache" / "google_t5-v1_1-xxl" / "tokenizer.json").is_file()
    again = t5_tokenizer(None, cache_dir=str(tmp_path / "cache"))
    assert tokenize_t5(again, CAPTIONS, 9)[0].equal(tokenize_t5(first, CAPTIONS, 9)[0])


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": b"{"}, {"spiece.model": b"\x0a\xff\x01"}])
def test_a_broken_tokenizer_is_named(tmp_path, files):
    folder = tmp_path / "google_t5-v1_1-xxl"
    os.makedirs(folder)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match="google_t5-v1_1-xxl"):
        t5_tokenizer(None, cache_dir=str(tmp_path))


def test_another_models_tokenizer_is_refused(tmp_path):
    bundled_clip_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not the tokenizer of T5"):
        read_t5_tokenizer(tmp_path)


def test_a_tokenizer_of_more_tokens_than_the_encoder_has():
    model = tiny_t5()
    rows = model.config.vocab_size
    encode_t5(model, torch.tensor([[rows - 1]]))
    with pytest.raises(UserError, match=f"the token embedding has {rows} rows and the tokenizer gives id {rows}; use"):
        encode_t5(model, torch.tensor([[0, rows]]))
