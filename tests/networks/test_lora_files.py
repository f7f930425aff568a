"""Files as other trainers wrote them, and broken ones."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from library.errors import UserError
from library.types import LoraTarget, Models
from networks import build
from networks.layer_args import LoraArgs, SplitLoraArgs
from networks.layers.lora import Entry, LoraLayer
from networks.layers.lora_split import DitLoraLayer
from tests.networks.builders import lora


def table(key="lora_te_x", rank=2, **more):
    return {f"{key}.lora_down.weight": torch.randn(rank, 6), f"{key}.lora_up.weight": torch.randn(4, rank), **more}


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(None, 2.0), (torch.tensor(0.0), 2.0), (torch.tensor(3), 3.0), (torch.tensor(0.5, dtype=torch.bfloat16), 0.5)],
)
def test_alpha_of_old_and_extracted_files(tmp_path, alpha, expected):
    tensors = table()
    if alpha is not None:
        tensors["lora_te_x.alpha"] = alpha
    save_file(tensors, tmp_path / "a.safetensors")
    entry = Entry.of(lora.read(tmp_path / "a.safetensors").entries["lora_te_x"])
    assert (entry.alpha, entry.rank) == (expected, 2)
    reference = tensors["lora_te_x.lora_up.weight"] @ tensors["lora_te_x.lora_down.weight"] * expected / 2
    torch.testing.assert_close(entry.change(), reference)


@pytest.mark.parametrize(
    "tensors",
    [
        {"lora_unet_x.hada_w1_a": torch.zeros(4, 2), "lora_unet_x.alpha": torch.tensor(1.0)},
        table(**{"lora_te_x.dora_scale": torch.ones(4, 1)}),
        table(**{"lora_te_y.lora_down.weight": torch.zeros(2, 6)}),
        {"model.diffusion_model.out.2.weight": torch.zeros(4)},
    ],
    ids=["LoHa", "DoRA", "half an entry", "a checkpoint"],
)
def test_other_content_is_named(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors: holds .*which is not LoRA of this kind"):
        lora.read(tmp_path / "a.safetensors")


def test_matrices_that_do_not_belong_together(tmp_path):
    save_file(
        {"k.lora_down.weight": torch.zeros(2, 6), "k.lora_up.weight": torch.zeros(4, 3)}, tmp_path / "a.safetensors"
    )
    file, models = lora.read(tmp_path / "a.safetensors"), Models(nn.ModuleDict({"x": nn.Linear(6, 4)}), {}, {}, None)
    targets = [LoraTarget("k", "denoiser", ("x",))]
    for action in (
        lambda: lora.from_weights(targets, models, file, args={}),
        lambda: build.merge(targets, models, file, 1.0),
    ):
        with pytest.raises(UserError, match=r"k: down \(2, 6\) and up \(4, 3\)"):
            action()


def test_changes_are_computed_in_float32():
    tensors = {"lora_down.weight": torch.randn(3, 6), "lora_up.weight": torch.randn(4, 3), "alpha": torch.tensor(0.7)}
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    change, exact = (Entry.of(each).change() for each in (half, {name: t.float() for name, t in half.items()}))
    assert change.dtype == torch.float32
    assert torch.equal(change, exact)


@pytest.mark.parametrize(
    "modules",
    [[nn.Conv2d(8, 12, 3, groups=2)], [nn.Conv2d(8, 12, 1)] * 2, [nn.Embedding(8, 12)]],
    ids=["groups", "several", "no layer"],
)
def test_modules_that_lora_cannot_adapt(modules):
    with pytest.raises(TypeError, match="LoRA cannot adapt"):
        LoraLayer.build(modules, 2, 1.0, LoraArgs())


def test_a_split_layer_of_another_size_is_refused():
    def split(*widths, rank=2):
        modules, args = [nn.Linear(6, width) for width in widths], SplitLoraArgs(split_qkv=True)
        return DitLoraLayer.build(modules, rank, 1.0, args)

    with pytest.raises(UserError, match="the file's layer has 10 outputs, the model's 8"):
        split(4, 4).load(split(4, 6).file_state())
    with pytest.raises(UserError, match="the file's rank is 6; with split_qkv=True a rank of 2 is 4 in files"):
        split(4, 4).load(split(4, 4, rank=3).file_state())


class Evil:
    def __reduce__(self):
        return eval, ("1/0",)


def test_unreadable_files_name_themselves(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"k": Evil()}))
    for name in ("none.safetensors", "cut.safetensors", "evil.pt"):
        with pytest.raises(UserError, match=name):
            lora.read(tmp_path / name)
