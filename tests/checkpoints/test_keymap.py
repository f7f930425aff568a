"""The key map engine: every rule in both directions, and nothing skipped."""

from __future__ import annotations

import pytest
import torch

from library.checkpoints.keymap import (
    Conv1x1,
    Each,
    Fused,
    KeyMap,
    KeyMapError,
    Rename,
    SwapHalves,
    Transpose,
    require_same_keys,
)

MAP = KeyMap(
    Rename("img_in.{p}", "x_embedder.{p}"),
    SwapHalves("final.{p}", "norm_out.{p}"),
    Transpose("projection", "text_projection.weight"),
    Each(
        "double.{i}",
        "blocks.{i}",
        Conv1x1("out.{p}", "to_out.{p}"),
        Fused("qkv.{p}", ("to_q.{p}", "to_k.{p}", "to_v.{p}")),
        Fused("linear1.{p}", ("q.{p}", "mlp.{p}"), rows=(1, 4)),
        Each("inner.", "", Rename("{rest}", "kept.{rest}")),
    ),
)


def file_tensors() -> dict[str, torch.Tensor]:
    return {
        "img_in.weight": torch.randn(4, 2),
        "final.weight": torch.arange(12.0).reshape(4, 3),
        "final.bias": torch.arange(4.0),
        "projection": torch.arange(6.0).reshape(2, 3),
        "double.11.out.weight": torch.randn(4, 3, 1, 1),
        "double.11.out.bias": torch.randn(4),
        "double.11.qkv.weight": torch.arange(12.0).reshape(6, 2),
        "double.11.linear1.bias": torch.arange(10.0),
        "double.11.inner.a.b.c": torch.randn(1),
    }


def test_each_rule_converts_as_it_says():
    model = MAP.to_model(file_tensors())
    assert model["norm_out.bias"].tolist() == [2, 3, 0, 1]
    assert model["norm_out.weight"].tolist() == [[6, 7, 8], [9, 10, 11], [0, 1, 2], [3, 4, 5]]
    assert model["text_projection.weight"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert model["blocks.11.to_out.weight"].shape == (4, 3)
    assert model["blocks.11.to_k.weight"].tolist() == [[4, 5], [6, 7]]
    assert model["blocks.11.q.bias"].tolist() == [0, 1]
    assert model["blocks.11.mlp.bias"].tolist() == list(range(2, 10))
    assert "blocks.11.kept.a.b.c" in model


def test_there_and_back_gives_the_same_keys_and_values():
    tensors = file_tensors()
    back = MAP.to_file(MAP.to_model(tensors))
    assert set(back) == set(tensors)
    for key, value in tensors.items():
        assert torch.equal(back[key], value), key
        assert back[key].is_contiguous(), key  # safetensors writes nothing else


def test_the_first_rule_that_fits_decides_in_both_directions():
    keys = KeyMap(Rename("a.9", "last"), Rename("a.{i}", "b.{i}"), Rename("{rest}", "{rest}"), Rename("c", "last"))
    assert [keys.by_file(name).models for name in ("a.9", "a.10", "c")] == [("last",), ("b.10",), ("c",)]
    assert [keys.by_model(name).file for name in ("last", "b.9")] == ["a.9", "a.9"]


def test_parts_of_a_fused_tensor_do_not_share_memory():
    model = MAP.to_model({"double.0.qkv.weight": torch.zeros(6, 2)})
    assert len({part.untyped_storage().data_ptr() for part in model.values()}) == 3


def test_unknown_keys_are_named():
    with pytest.raises(KeyMapError, match=r"7 tensors have unknown names: odd\.0, .* and 2 more"):
        MAP.to_model({f"odd.{n}": torch.zeros(1) for n in range(7)})
    with pytest.raises(KeyMapError, match=r"5 tensors have unknown names: odd\.0, .*, odd\.4$"):
        MAP.to_model({f"odd.{n}": torch.zeros(1) for n in range(5)})
    with pytest.raises(KeyMapError, match="img_in"):
        MAP.to_file({"img_in.weight": torch.zeros(1)})
    assert MAP.by_file("img_in.weights") is None  # a placeholder does not match more than it stands for


def test_a_fused_tensor_needs_all_its_parts():
    with pytest.raises(KeyMapError, match=r"blocks\.0\.to_v\.weight"):
        MAP.to_file({f"blocks.0.to_{x}.weight": torch.zeros(2, 2) for x in "qk"})
    assert MAP.to_model({"double.0.qkv.bias": torch.tensor([3.0, 4, 5])})["blocks.0.to_k.bias"].tolist() == [4]
    with pytest.raises(KeyMapError, match="7 rows"):
        MAP.to_model({"double.0.qkv.bias": torch.zeros(7)})


def test_names_of_modules_and_groups():
    assert MAP.file_name("blocks.3.to_k") == "double.3.qkv"
    assert MAP.groups(["x_embedder", "blocks.0.to_q", "blocks.0.to_k", "blocks.0.to_v"]) == {
        "img_in": ("x_embedder",),
        "double.0.qkv": ("blocks.0.to_q", "blocks.0.to_k", "blocks.0.to_v"),
    }
    with pytest.raises(KeyMapError, match="nowhere"):
        MAP.file_name("nowhere")


def test_missing_and_surplus_keys_are_errors():
    require_same_keys(["a"], ["a"], "the model")
    with pytest.raises(KeyMapError, match="the model lacks 1 tensors: b"):
        require_same_keys(["a"], ["a", "b"], "the model")
    with pytest.raises(KeyMapError, match="the model has 1 tensors too many: c"):
        require_same_keys(["a", "c"], ["a"], "the model")
