"""Weights in several files, and those of a part of a Diffusers folder."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.families.shared.sharded import open_sharded

A, B = {"a": torch.ones(2)}, {"b": torch.zeros(3, dtype=torch.float16)}


def write(folder, files):
    for name, content in files.items():
        if isinstance(content, list):
            (folder / name).write_text(json.dumps({"weight_map": dict(enumerate(content))}))
        elif name.endswith(".bin"):
            torch.save(content, folder / name)
        else:
            save_file(content, folder / name)


@pytest.mark.parametrize(
    ("files", "keys"),
    [
        ({"model.safetensors": A, "model.fp16.safetensors": B}, "a"),  # whole weights before variants
        ({"model.fp16.safetensors": B}, "b"),
        ({"pytorch_model.bin": A}, "a"),
        ({"pytorch_model.bin": B, "diffusion_pytorch_model.safetensors": A}, "a"),
        (
            {
                "model-00001-of-00002.safetensors": A,
                "model-00002-of-00002.safetensors": B,
                "model.safetensors.index.json": [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)],
            },
            "ab",
        ),
    ],
)
def test_the_files_of_a_folder(tmp_path, files, keys):
    write(tmp_path, files)
    weights = open_sharded(tmp_path)
    assert sorted(weights) == sorted(keys)
    for name in keys:
        expected = {**A, **B}[name]
        assert weights[name].equal(expected)
        assert weights.dtype(name) == expected.dtype
        assert weights.shapes[name] == tuple(expected.shape)


def test_the_first_shard_stands_for_all(tmp_path):
    write(tmp_path, {"x-00001-of-00002.safetensors": A, "x-00002-of-00002.safetensors": B})
    assert sorted(open_sharded(tmp_path / "x-00001-of-00002.safetensors", mapped=False)) == ["a", "b"]


@pytest.mark.parametrize(
    ("files", "opened", "message"),
    [
        ({"other.txt.safetensors": A}, "", "holds no weights"),
        (
            {"x-00001-of-00002.safetensors": A},
            "x-00001-of-00002.safetensors",
            "1 of the 2 files of the model are missing",
        ),
        ({"model.safetensors.index.json": ["gone.safetensors"]}, "", "files of the model are missing: gone"),
        (
            {"x-00001-of-00002.safetensors": A, "x-00002-of-00002.safetensors": A},
            "x-00001-of-00002.safetensors",
            "has tensors that another file of the same model has: a",
        ),
    ],
)
def test_what_is_incomplete_is_named(tmp_path, files, opened, message):
    write(tmp_path, files)
    with pytest.raises(UserError, match=message):
        open_sharded(tmp_path / opened)
