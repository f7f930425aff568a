"""Taking tensors out of files: number formats, and files without a memory map."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from library.checkpoints.reading import open_weights
from library.errors import UserError
from library.families.shared.reading import Reader, open_model


@pytest.fixture
def path(tmp_path):
    tensors = {
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "whole": torch.randn(2, 2, 2),
        "eighth": torch.randn(16).to(torch.float8_e4m3fn),
        "count": torch.tensor(7, dtype=torch.int8),
        "nothing": torch.zeros(0),
    }
    save_file(tensors, tmp_path / "m.safetensors", {"a": "b"})
    return tmp_path / "m.safetensors"


def test_formats_are_kept_but_for_those_that_nothing_is_computed_in(path):
    weights = open_weights(path)
    reader = Reader(weights, None)
    taken = reader.take(weights)
    assert {key: tensor.dtype for key, tensor in taken.items()} == {
        "half": torch.float16,
        "brain": torch.bfloat16,
        "whole": torch.float32,
        "eighth": torch.bfloat16,
        "count": torch.int8,
        "nothing": torch.float32,
    }
    assert reader.tensor_specs["eighth"] == (torch.float8_e4m3fn, (16,))
    assert torch.equal(taken["eighth"], weights["eighth"].bfloat16())


def test_one_format_for_all(path):
    weights = open_weights(path)
    taken = Reader(weights, torch.float32).take(["half", "eighth"])
    assert {tensor.dtype for tensor in taken.values()} == {torch.float32}
    assert torch.equal(taken["half"], weights["half"].float())


def test_a_file_without_a_memory_map_is_the_same_mapping(path):
    mapped, plain = open_weights(path), open_model(path, mapped=False)
    assert list(plain) == list(mapped)
    assert (plain.metadata, plain.shapes) == (mapped.metadata, mapped.shapes)
    for key, value in mapped.items():
        assert plain.dtype(key) == value.dtype
        assert plain[key].shape == value.shape
        assert torch.equal(plain[key].view(torch.uint8), value.view(torch.uint8)), key
    with pytest.raises(KeyError):
        plain["other"]


def test_a_file_without_a_memory_map_that_is_cut_short_is_refused(path):
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="cut short"):
        open_model(path, mapped=False)
