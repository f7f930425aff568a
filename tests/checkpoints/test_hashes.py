"""Hashes. References: the bytes of files that the safetensors library wrote, cut and hashed by hand."""

from __future__ import annotations

import hashlib
import json
import random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from library.checkpoints import hashes
from library.checkpoints.writing import write_safetensors


def tensors(dtype=torch.float32, size=700):
    rng = torch.Generator().manual_seed(0)
    return {
        "b.lora_up.weight": torch.randn(size, 500, generator=rng).to(dtype),
        "a.lora_down.weight": torch.randn(4, 500, generator=rng).to(dtype),
        "a.alpha": torch.tensor(2.0, dtype=dtype),
    }


METADATA = {"ss_steps": "10", "ss_comment": "ü", "modelspec.title": "x", "sshs_model_hash": "old"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("write", [save_file, lambda t, p, metadata: write_safetensors(p, t, metadata)])
def test_network_hashes_are_those_of_the_file_on_disk(tmp_path, dtype, write):
    found = hashes.network_hashes(tensors(dtype), METADATA)
    path = tmp_path / "a.safetensors"
    write(tensors(dtype), path, metadata=METADATA)
    raw = path.read_bytes()
    behind_header = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert len(behind_header) == (700 * 500 + 4 * 500 + 1) * dtype.itemsize
    assert found["sshs_model_hash"] == hashlib.sha256(behind_header).hexdigest()

    write(tensors(dtype), path, metadata={"ss_steps": "10", "ss_comment": "ü"})
    raw = path.read_bytes()
    expected = hashlib.sha256(raw[1048576 : 1048576 + 65536]).hexdigest()[:8]
    assert found["sshs_legacy_hash"] == expected == hashes.legacy_file_hash(path)
    assert (expected == "e3b0c442") == (len(raw) <= 1048576)


def test_bytes_of_the_legacy_hash_can_be_computed_from_the_tensor_alone(tmp_path):
    """No safetensors library: a header by hand, the tensor's bytes behind it."""
    tensor = torch.arange(400_000, dtype=torch.float32)
    header = {"__metadata__": {"ss_a": "1"}, "k": {"dtype": "F32", "shape": [400000], "data_offsets": [0, 1600000]}}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file = len(text).to_bytes(8, "little") + text + tensor.numpy().tobytes()
    found = hashes.network_hashes({"k": tensor}, {"ss_a": "1"})
    assert found["sshs_model_hash"] == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert found["sshs_legacy_hash"] == hashlib.sha256(file[0x100000:0x110000]).hexdigest()[:8]


def test_small_network_has_the_hash_of_nothing():
    assert hashes.network_hashes(tensors(size=3), {})["sshs_legacy_hash"] == "e3b0c442"


def test_only_training_metadata_influences_the_legacy_hash():
    base = hashes.network_hashes(tensors(), {"ss_steps": "10"})
    assert hashes.network_hashes(tensors(), {**base, "ss_steps": "10", "modelspec.title": "long" * 50}) == base
    assert hashes.network_hashes(tensors(), {"ss_steps": "10", "ss_x": "y" * 64}) != base


def test_file_hashes(tmp_path):
    path = tmp_path / "model.ckpt"
    content = random.Random(0).randbytes(3 * 1024 * 1024 + 17)
    path.write_bytes(content)
    assert hashes.file_hash(path) == hashlib.sha256(content).hexdigest()
    assert hashes.legacy_file_hash(path) == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    path.write_bytes(content[: 1024 * 1024])
    assert hashes.legacy_file_hash(path) == "e3b0c442"
    for function in (hashes.file_hash, hashes.legacy_file_hash):
        assert function(tmp_path / "none") == "NOFILE"
        assert function(tmp_path) == "IsADirectory"


# ---- fingerprints of models


class Small(nn.Module):
    """A few fixed weights; `order` is that in which they are made."""

    def __init__(self, order=("first", "second"), **changes):
        super().__init__()
        values = {"first": torch.arange(6.0).reshape(2, 3), "second": torch.tensor([0.5, -1.0]), **changes}
        for name in order:
            self.register_parameter(name, nn.Parameter(values[name]))


def test_a_fingerprint_is_that_of_earlier_versions():
    """It is in the notes of cache files, which would all be made again."""
    text = b"first(2, 3)" + torch.arange(6.0).numpy().tobytes()
    text += b"second(2,)" + torch.tensor([0.5, -1.0]).numpy().tobytes()
    assert hashes.weights_fingerprint(Small()) == hashlib.sha256(text).hexdigest()[:32]


@pytest.mark.parametrize(
    "same",
    [Small(("second", "first")), Small().bfloat16(), Small(first=torch.arange(6.0).view(2, 3).T.contiguous().T)],
    ids=["order", "dtype", "strides"],
)
def test_a_fingerprint_is_of_the_values_alone(same):
    assert hashes.weights_fingerprint(same) == hashes.weights_fingerprint(Small())


def test_any_weight_name_or_shape_changes_a_fingerprint():
    others = [
        Small(second=torch.tensor([0.5, -1.001])),
        Small(first=torch.arange(6.0).reshape(3, 2)),
        Small(("first",)),
    ]
    renamed = Small(("first", "other"), other=torch.tensor([0.5, -1.0]))
    found = {hashes.weights_fingerprint(module) for module in (Small(), *others, renamed)}
    assert len(found) == 5
