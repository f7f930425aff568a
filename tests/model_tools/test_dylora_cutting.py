"""The networks inside a DyLoRA file against the layer that trained them, at the same number of ranks."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from library.errors import UserError
from library.model_tools import dylora_cutting
from networks.layer_args import DyLoraArgs
from networks.layers.dylora import DyLoraLayer
from tests.model_tools.files import lora_tensors, write
from tests.model_tools.tools import options

SHAPES = {"lora_unet_linear": (7, 6), "lora_unet_conv": (5, 4, 3, 3)}


def cut(model: str, out: object, unit: int) -> None:
    dylora_cutting.cut_dylora(options("extract_lora_from_dylora", "--model", model, "--save_to", out, "--unit", unit))


def test_each_file_acts_as_its_ranks_did_in_training(tmp_path, monkeypatch):
    path = write(tmp_path / "in.safetensors", lora_tensors(rank=6, alpha=3.0, shapes=SHAPES))
    cut(path, tmp_path / "out.safetensors", 2)
    assert sorted(file.name for file in tmp_path.glob("out*")) == ["out-0002.safetensors", "out-0004.safetensors"]
    modules = {"lora_unet_linear": nn.Linear(6, 7), "lora_unet_conv": nn.Conv2d(4, 5, 3, padding=1)}
    inputs = {"lora_unet_linear": torch.randn(3, 6), "lora_unet_conv": torch.randn(2, 4, 5, 5)}
    whole = load_file(path)
    for layer, module in modules.items():
        entry = {name.removeprefix(f"{layer}."): t for name, t in whole.items() if name.startswith(layer)}
        trained = DyLoraLayer.rebuild([module], entry, DyLoraArgs(unit=2)).train()
        base, x = module(inputs[layer]), inputs[layer]
        for block, rank in ((0, 2), (1, 4)):
            monkeypatch.setattr(torch, "randint", lambda *_, block=block: torch.tensor(block))
            expected = trained.adapt(0, x, base) - base
            found = load_file(tmp_path / f"out-{rank:04d}.safetensors")
            down, up = found[f"{layer}.lora_down.weight"], found[f"{layer}.lora_up.weight"]
            scale = float(found[f"{layer}.alpha"]) / rank
            if layer == "lora_unet_linear":
                ours = x @ down.T @ up.T * scale
            else:
                ours = nn.functional.conv2d(nn.functional.conv2d(x, down, padding=1), up) * scale
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_metadata_and_dtypes(tmp_path):
    tensors = {name: tensor.half() for name, tensor in lora_tensors(rank=4, alpha=4.0).items()}
    path = write(tmp_path / "in.safetensors", tensors, {"ss_training_comment": "mine", "ss_steps": "7"})
    cut(path, tmp_path / "out.safetensors", 3)
    with safe_open(tmp_path / "out-0003.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_training_comment"] == "first 3 of 4 ranks of a DyLoRA; mine"
    assert (metadata["ss_network_dim"], metadata["ss_steps"]) == ("3", "7")
    for name, tensor in load_file(tmp_path / "out-0003.safetensors").items():
        # Half precision would round this alpha, 2 sqrt(3).
        assert tensor.dtype == (torch.float32 if name.endswith("alpha") else torch.float16)


def test_what_is_refused(tmp_path):
    path = write(tmp_path / "in.safetensors", lora_tensors(rank=4))
    with pytest.raises(UserError, match="--unit=4: must be below the rank"):
        cut(path, tmp_path / "out.safetensors", 4)
    with pytest.raises(UserError, match=r"in-0002\.safetensors would replace what is read"):
        cut(write(tmp_path / "in-0002.safetensors", lora_tensors(rank=4)), tmp_path / "in.safetensors", 2)


def test_the_script(run_script, tmp_path):
    path = write(tmp_path / "in.safetensors", lora_tensors(rank=4))
    line = ["networks/extract_lora_from_dylora.py", f"--model={path}", f"--save_to={tmp_path / 'out.safetensors'}"]
    done = run_script(*line, "--unit=1")
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("out-*.safetensors"))) == 3
    done = run_script(*line)
    assert done.returncode == 2
    assert "--unit is required" in done.stderr
